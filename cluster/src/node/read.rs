//! Reads and watches.

use std::time::Instant;

use futures::stream::{BoxStream, StreamExt};
use proto::{Revision, keys};

use super::Node;
use crate::consensus::{Forward, Forwarded, position};
use crate::machine::{
    HistoryEvent, Read, Record, Table, compacted, decode, history_key, history_revision,
    prefix_end, revision,
};
use crate::storage::View;
use crate::{
    Compacted, Consistency, KeyValue, RangeResult, StoreError, WatchBatch, WatchError, WatchEvent,
};

/// History rows that a watch takes at once.
const WATCH_ROWS: usize = 1024;

fn failed(error: std::io::Error) -> StoreError {
    StoreError::Failed { why: error.to_string() }
}

impl Node {
    /// Waits until a read here is as fresh as asked.
    async fn ready(&self, consistency: Consistency) -> Result<(), StoreError> {
        self.alive()?;
        match consistency {
            Consistency::Stale if *self.recovered.borrow() => Ok(()),
            Consistency::Stale => Err(StoreError::Recovering),
            Consistency::Linearizable => self.catch_up().await,
        }
    }

    async fn catch_up(&self) -> Result<(), StoreError> {
        let deadline = self.deadline();
        let asked = self.ask_leader(Forward::ReadIndex, deadline).await;
        let index = match asked {
            Ok(Forwarded::ReadIndex(index)) => index,
            Ok(other) => return Err(StoreError::NoQuorum { why: format!("{other:?}") }),
            // A read has no outcome to be unknown.
            Err(StoreError::UnknownOutcome { why }) => return Err(StoreError::NoQuorum { why }),
            Err(error) => return Err(error),
        };
        let mut applied = self.machine.applied();
        let left = deadline.saturating_duration_since(Instant::now());
        let caught_up = applied.wait_for(|applied| applied.index >= index);
        match tokio::time::timeout(left, caught_up).await {
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
        self.ready(consistency).await?;
        let limit = if limit == 0 { usize::MAX } else { limit };
        let start = if after >= prefix && !after.is_empty() {
            [after.as_bytes(), &[0]].concat()
        } else {
            prefix.as_bytes().to_vec()
        };
        let end = prefix_end(prefix.as_bytes());
        let read = |view: &View<'_>| {
            let (mut kvs, mut more) = (Vec::new(), false);
            for row in view.rows(Table::Data, &start)? {
                let (key, value) = row?;
                if end.as_ref().is_some_and(|end| key >= *end) {
                    break;
                }
                let key = String::from_utf8_lossy(&key).into_owned();
                if !private && key.starts_with(keys::PRIV) {
                    continue;
                }
                if kvs.len() == limit {
                    more = true;
                    break;
                }
                kvs.push(key_value(key, &value)?);
            }
            Ok(RangeResult { kvs, revision: Revision(revision(view)?), more })
        };
        self.db.view(read).map_err(failed)
    }

    /// Changes from a revision on (0: from now on), without those under `priv/`.
    pub(crate) fn watch(
        self: &std::sync::Arc<Self>,
        prefix: &str,
        from: Revision,
    ) -> Result<BoxStream<'static, Result<WatchBatch, WatchError>>, WatchError> {
        self.alive()?;
        let (oldest, last) =
            self.db.view(|view| Ok((compacted(view)?, revision(view)?))).map_err(failed)?;
        let next = if from.0 == 0 { last + 1 } else { from.0 };
        if next < oldest {
            return Err(Compacted { asked: Revision(next), oldest: Revision(oldest) }.into());
        }
        let watching = Watching {
            node: self.clone(),
            prefix: prefix.to_owned(),
            next,
            ready: std::collections::VecDeque::new(),
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

    /// The store's revision that this node has applied.
    pub(crate) fn revision(&self) -> u64 {
        self.db.view(position).map_or(0, |applied| applied.revision)
    }

    /// Whether a node is known to have been removed.
    pub(crate) fn was_removed(&self, id: proto::NodeId) -> bool {
        let key = removed_key(id);
        self.db.view(|view| view.get(Table::Data, key.as_bytes())).is_ok_and(|row| row.is_some())
    }
}

/// Says that a node was removed. It stays: ids are never given twice.
pub(crate) fn removed_key(id: proto::NodeId) -> String {
    format!("{}removed/{:020}", keys::PRIV, id.0)
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

/// A watch's position: all revisions before `next` have been looked at.
struct Watching {
    node: std::sync::Arc<Node>,
    prefix: String,
    next: u64,
    ready: std::collections::VecDeque<WatchBatch>,
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
        let (oldest, last, rows) = self
            .node
            .db
            .view(|view| {
                let rows =
                    view.scan(Table::History, &history_key(self.next, 0), None, WATCH_ROWS)?;
                Ok((compacted(view)?, revision(view)?, rows))
            })
            .map_err(failed)?;
        if self.next < oldest {
            let (asked, oldest) = (Revision(self.next), Revision(oldest));
            return Err(Compacted { asked, oldest }.into());
        }
        if last < self.next {
            return Ok(false);
        }
        // A full page may end within a revision: that one is read again, unless it is alone.
        let whole_to = match rows.last() {
            Some((key, _)) if rows.len() == WATCH_ROWS => {
                let cut = history_revision(key).map_err(failed)?;
                if cut == self.next { self.whole_revision(cut)? } else { cut - 1 }
            }
            _ => last,
        };
        if self.ready.is_empty() {
            for (key, value) in rows {
                let revision = history_revision(&key).map_err(failed)?;
                if revision > whole_to {
                    break;
                }
                self.take(revision, &value)?;
            }
        }
        self.next = whole_to + 1;
        Ok(true)
    }

    /// One revision with more rows than a page.
    fn whole_revision(&mut self, revision: u64) -> Result<u64, WatchError> {
        let (from, to) = (history_key(revision, 0), history_key(revision + 1, 0));
        let node = self.node.clone();
        let rows = node
            .db
            .view(|view| view.scan(Table::History, &from, Some(&to), usize::MAX))
            .map_err(failed)?;
        for (_, value) in rows {
            self.take(revision, &value)?;
        }
        // Where none of it was asked for, the caller finds `ready` empty and takes its page, whose
        // rows are of this revision alone and are passed over the same way.
        Ok(revision)
    }

    fn take(&mut self, revision: u64, value: &[u8]) -> Result<(), WatchError> {
        let event: HistoryEvent = decode(value).map_err(failed)?;
        if !event.key.starts_with(&self.prefix) || event.key.starts_with(keys::PRIV) {
            return Ok(());
        }
        let revision = Revision(revision);
        let event = match event.value {
            None => WatchEvent::Deleted { key: event.key },
            Some(value) => WatchEvent::Put(KeyValue {
                key: event.key,
                value,
                create_revision: Revision(event.create_revision),
                mod_revision: revision,
            }),
        };
        match self.ready.back_mut() {
            Some(batch) if batch.revision == revision => batch.events.push(event),
            _ => self.ready.push_back(WatchBatch { revision, events: vec![event] }),
        }
        Ok(())
    }
}
