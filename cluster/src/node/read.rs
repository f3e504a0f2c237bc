//! Reads of the present state.

use proto::{Revision, keys};
use tokio::time::Instant;

use super::Node;
use crate::consensus::{Applied, position};
use crate::machine::{Read, Record, Table, decode, prefix_end, revision};
use crate::storage::View;
use crate::{Consistency, KeyValue, RangeResult, StoreError};

pub(super) fn failed(error: std::io::Error) -> StoreError {
    StoreError::Failed { why: error.to_string() }
}

impl Node {
    /// Waits until a read here is as fresh as asked.
    pub(crate) async fn ready(&self, consistency: Consistency) -> Result<(), StoreError> {
        self.alive()?;
        match consistency {
            Consistency::Stale if *self.recovered.borrow() => Ok(()),
            Consistency::Stale => Err(StoreError::Recovering),
            Consistency::Linearizable => self.catch_up(self.deadline()).await,
            Consistency::Since(confirmed) => {
                self.has_applied(self.deadline(), |applied| applied.index >= confirmed.index).await
            }
        }
    }

    pub(super) async fn catch_up(&self, deadline: Instant) -> Result<(), StoreError> {
        let index = self.confirm.index(deadline).await?;
        self.has_applied(deadline, |applied| applied.index >= index).await
    }

    /// Waits until this node has applied so much.
    pub(super) async fn has_applied(
        &self,
        deadline: Instant,
        enough: impl FnMut(&Applied) -> bool,
    ) -> Result<(), StoreError> {
        let mut applied = self.machine.applied();
        let left = deadline.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, applied.wait_for(enough)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(StoreError::Shutdown),
            Err(_) => Err(StoreError::NoQuorum {
                why: "this node is behind and did not catch up in time".to_owned(),
            }),
        }
    }

    /// One key, on any key.
    pub(crate) async fn get(
        &self,
        key: &str,
        consistency: Consistency,
    ) -> Result<(Option<KeyValue>, Revision), StoreError> {
        self.ready(consistency).await?;
        let read = |view: &View<'_>| {
            let row = view.get(Table::Data, key.as_bytes())?;
            let kv = row.map(|bytes| key_value(key.to_owned(), &bytes)).transpose()?;
            Ok((kv, Revision(revision(view)?)))
        };
        self.db.view(read).map_err(failed)
    }

    /// Keys with a prefix; those under `priv/` only where `private` is set.
    pub(crate) async fn range(
        &self,
        prefix: &str,
        after: &str,
        limit: usize,
        consistency: Consistency,
        private: bool,
    ) -> Result<RangeResult, StoreError> {
        self.range_within(prefix, after, limit, usize::MAX, consistency, private).await
    }

    /// The same, with an end at about `bytes` as well.
    pub(crate) async fn range_within(
        &self,
        prefix: &str,
        after: &str,
        limit: usize,
        bytes: usize,
        consistency: Consistency,
        private: bool,
    ) -> Result<RangeResult, StoreError> {
        self.ready(consistency).await?;
        let limit = if limit == 0 { usize::MAX } else { limit };
        let start = if after >= prefix && !after.is_empty() {
            [after.as_bytes(), &[0]].concat()
        } else {
            prefix.as_bytes().to_vec()
        };
        let end = prefix_end(prefix.as_bytes());
        let read = |view: &View<'_>| {
            let (mut kvs, mut more, mut size) = (Vec::new(), false, 0);
            for row in view.rows(Table::Data, &start)? {
                let (key, value) = row?;
                if end.as_ref().is_some_and(|end| key >= *end) {
                    break;
                }
                let key = String::from_utf8_lossy(&key).into_owned();
                if !private && key.starts_with(keys::PRIV) {
                    continue;
                }
                if kvs.len() == limit || size > bytes {
                    more = true;
                    break;
                }
                size += key.len() + value.len();
                kvs.push(key_value(key, &value)?);
            }
            Ok(RangeResult { kvs, revision: Revision(revision(view)?), more })
        };
        self.db.view(read).map_err(failed)
    }

    /// The store's revision that this node has applied.
    pub(crate) fn revision(&self) -> u64 {
        self.db.view(position).map_or(0, |applied| applied.revision)
    }
}

fn key_value(key: String, bytes: &[u8]) -> std::io::Result<KeyValue> {
    let record: Record = decode(bytes)?;
    Ok(KeyValue {
        key,
        value: record.value,
        create_revision: Revision(record.create_revision),
        mod_revision: Revision(record.mod_revision),
    })
}
