//! Reads of the past.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use proto::Revision;
use tokio::time::Instant;

use super::Node;
use super::read::failed;
use crate::host::blocking;
use crate::machine::{self, At, Version, Written, changes, floor_of_prefix, range_at};
use crate::storage::View;
use crate::{
    Change, Compacted, Consistency, History, KeyValue, RangeResult, ReadAtError, StoreError,
};

/// Changes that one answer has where nothing else is asked for.
const CHANGES: usize = 100;
const CHANGES_MAX: usize = 1000;
/// How long a quorum is looked for before the history is answered from what is here.
const CONFIRM: Duration = Duration::from_secs(1);

impl Node {
    /// One key right after a revision, on any key.
    pub(crate) async fn get_at(
        self: &Arc<Self>,
        key: &str,
        at: Revision,
    ) -> Result<Option<KeyValue>, ReadAtError> {
        self.reach(at).await?;
        let asked = key.to_owned();
        let was = self.read_blocking(move |view| machine::get_at(view, &asked, at.0)).await?;
        match was {
            At::Was(version, revision) => {
                Ok(key_value(Written { key: key.to_owned(), revision, version }))
            }
            At::Absent => Ok(None),
            At::Compacted(oldest) => Err(Compacted { asked: at, oldest: Revision(oldest) }.into()),
        }
    }

    /// Keys with a prefix right after a revision, without those under `priv/`.
    pub(crate) async fn range_at(
        self: &Arc<Self>,
        prefix: &str,
        after: &str,
        limit: usize,
        at: Revision,
    ) -> Result<RangeResult, ReadAtError> {
        self.reach(at).await?;
        let limit = if limit == 0 { usize::MAX } else { limit };
        let (prefix, after) = (prefix.to_owned(), after.to_owned());
        let read = move |view: &View<'_>| {
            let oldest = floor_of_prefix(view, &prefix)?;
            if at.0 < oldest {
                return Ok(Err(Compacted { asked: at, oldest: Revision(oldest) }));
            }
            range_at(view, &prefix, &after, limit, at.0).map(Ok)
        };
        let (found, more) = self.read_blocking(read).await??;
        let kvs = found.into_iter().filter_map(key_value).collect();
        Ok(RangeResult { kvs, revision: at, more })
    }

    /// Changes, the newest first.
    pub(crate) async fn history(
        self: &Arc<Self>,
        prefix: &str,
        exact: bool,
        before: Revision,
        limit: usize,
    ) -> Result<History, StoreError> {
        self.ready(Consistency::Stale).await?;
        match self.catch_up((Instant::now() + CONFIRM).min(self.deadline())).await {
            Ok(()) | Err(StoreError::NoQuorum { .. }) => {}
            Err(error) => return Err(error),
        }
        let limit = if limit == 0 { CHANGES } else { limit.min(CHANGES_MAX) };
        let before = if before.0 == 0 { u64::MAX } else { before.0 };
        let prefix = prefix.to_owned();
        let read = move |view: &View<'_>| {
            let found = changes(view, &prefix, exact, before, limit)?;
            Ok((found, floor_of_prefix(view, &prefix)?))
        };
        let (found, oldest) = self.read_blocking(read).await?;
        Ok(History {
            changes: found.changes.into_iter().map(change).collect(),
            next_before: found.next_before.map(Revision),
            compacted: Revision(oldest),
        })
    }

    /// Waits until this node has applied a revision.
    async fn reach(&self, at: Revision) -> Result<(), ReadAtError> {
        self.ready(Consistency::Stale).await?;
        if self.revision() >= at.0 {
            return Ok(());
        }
        // The others may be further than this node.
        self.ready(Consistency::Linearizable).await?;
        let present = Revision(self.revision());
        if present < at { Err(ReadAtError::Future { asked: at, present }) } else { Ok(()) }
    }

    /// Reads where it may take its time.
    pub(super) async fn read_blocking<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl FnOnce(&View<'_>) -> io::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let db = self.db.clone();
        let read = blocking(self.db.host(), move || db.view(read)).await;
        read.and_then(|read| read).map_err(failed)
    }
}

fn key_value(written: Written) -> Option<KeyValue> {
    let Version { value, head } = written.version;
    Some(KeyValue {
        key: written.key,
        value: value?,
        create_revision: Revision(head.create_revision),
        mod_revision: Revision(written.revision),
    })
}

fn change(written: Written) -> Change {
    let Version { head, value } = written.version;
    Change {
        revision: Revision(written.revision),
        at_ms: head.at_ms,
        author: head.author,
        path: written.key,
        content: value,
        previous_revision: Revision(head.previous_revision),
    }
}
