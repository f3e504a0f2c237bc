//! Watches: every change from a revision on, read from the history.

use std::collections::VecDeque;
use std::sync::Arc;

use futures::stream::{BoxStream, StreamExt};
use proto::Revision;

use super::Node;
use super::read::failed;
use crate::machine::{
    Span, Written, floor_of_prefix, folders_of_prefix, journal, revision, written_at,
};
use crate::{Compacted, KeyValue, StoreError, WatchBatch, WatchError, WatchEvent};

/// Changes that a watch looks at at once.
const WATCH_ROWS: usize = 256;

impl Node {
    /// Changes from a revision on (0: from now on), without those under `priv/`.
    pub(crate) fn watch(
        self: &Arc<Self>,
        prefix: &str,
        from: Revision,
    ) -> Result<BoxStream<'static, Result<WatchBatch, WatchError>>, WatchError> {
        self.alive()?;
        let (oldest, last) = self
            .db
            .view(|view| Ok((floor_of_prefix(view, prefix)?, revision(view)?)))
            .map_err(failed)?;
        let next = if from.0 == 0 { last + 1 } else { from.0 };
        if next < oldest {
            return Err(Compacted { asked: Revision(next), oldest: Revision(oldest) }.into());
        }
        let watching = Watching {
            node: self.clone(),
            prefix: prefix.to_owned(),
            next,
            ready: VecDeque::new(),
            over: false,
        };
        let stream = futures::stream::unfold(watching, |mut watching| async move {
            if watching.over {
                return None;
            }
            let item = watching.next_batch().await;
            watching.over = item.is_err();
            Some((item, watching))
        });
        Ok(stream.boxed())
    }
}

/// A watch's position: all revisions before `next` have been looked at.
struct Watching {
    node: Arc<Node>,
    prefix: String,
    next: u64,
    ready: VecDeque<WatchBatch>,
    over: bool,
}

impl Watching {
    async fn next_batch(&mut self) -> Result<WatchBatch, WatchError> {
        let mut applied = self.node.machine.applied();
        let mut recovered = self.node.recovered.subscribe();
        let mut failure = self.node.failure();
        loop {
            if let Some(batch) = self.ready.pop_front() {
                return Ok(batch);
            }
            self.node.alive()?;
            if !*recovered.borrow_and_update() {
                tokio::select! {
                    changed = recovered.changed() => changed.map_err(|_| StoreError::Shutdown)?,
                    _ = failure.changed() => {}
                }
                continue;
            }
            applied.mark_unchanged();
            if self.look()? {
                continue;
            }
            tokio::select! {
                changed = applied.changed() => changed.map_err(|_| StoreError::Shutdown)?,
                _ = failure.changed() => {}
            }
        }
    }

    /// Reads on in the history; false where there is nothing new.
    fn look(&mut self) -> Result<bool, WatchError> {
        let folders = folders_of_prefix(&self.prefix);
        let folders: Vec<&str> = folders.into_iter().map(|(_, folder)| folder).collect();
        let (prefix, next) = (self.prefix.as_str(), self.next);
        let (oldest, last, found, rest) = self
            .node
            .db
            .view(|view| {
                let (oldest, last) = (floor_of_prefix(view, prefix)?, revision(view)?);
                if next < oldest || last < next {
                    return Ok((oldest, last, Vec::new(), None));
                }
                let (rows, rest) = journal(view, &folders, Span::From(next), WATCH_ROWS)?;
                let wanted = rows.iter().filter(|(_, key)| key.starts_with(prefix));
                let found: std::io::Result<Vec<Written>> =
                    wanted.map(|(at, key)| written_at(view, key, at.revision)).collect();
                Ok((oldest, last, found?, rest))
            })
            .map_err(failed)?;
        if next < oldest {
            return Err(Compacted { asked: Revision(next), oldest: Revision(oldest) }.into());
        }
        if last < next {
            return Ok(false);
        }
        for written in found {
            self.take(written);
        }
        self.next = rest.unwrap_or(last + 1);
        Ok(true)
    }

    fn take(&mut self, written: Written) {
        let (key, revision) = (written.key, Revision(written.revision));
        let event = match written.version.value {
            None => WatchEvent::Deleted { key },
            Some(value) => WatchEvent::Put(KeyValue {
                key,
                value,
                create_revision: Revision(written.version.head.create_revision),
                mod_revision: revision,
            }),
        };
        match self.ready.back_mut() {
            Some(batch) if batch.revision == revision => batch.events.push(event),
            _ => self.ready.push_back(WatchBatch { revision, events: vec![event] }),
        }
    }
}
