//! Watches: every change from a revision on. The newest are in memory, shared by all watches; a
//! watch that is slow, or begins in the past, reads on in the history. None has a queue.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{BoxStream, StreamExt};
use proto::{Revision, keys};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::Node;
use super::read::failed;
use crate::consensus::Look;
use crate::machine::{
    Span, Written, floor_of_prefix, folders_of_prefix, journal, revision, written_at,
};
use crate::{Compacted, KeyValue, StoreError, WatchBatch, WatchError, WatchEvent};

/// Changes that a watch looks at at once in the history, and bytes that it takes, about.
const WATCH_ROWS: usize = 256;
const WATCH_BYTES: usize = 256 << 10;

type Batches = BoxStream<'static, Result<WatchBatch, WatchError>>;

impl Node {
    /// Changes from a revision on (0: from now on), without those under `priv/`.
    pub(crate) fn watch(
        self: &Arc<Self>,
        prefix: &str,
        from: Revision,
    ) -> Result<Batches, WatchError> {
        self.watch_with(prefix, from, None)
    }

    /// The same, with its number limited and with reports of progress.
    pub(crate) fn watch_for_client(
        self: &Arc<Self>,
        prefix: &str,
        from: Revision,
    ) -> Result<Batches, WatchError> {
        let limits = &self.config.limits;
        let Ok(slot) = self.watch_slots.clone().try_acquire_owned() else {
            return Err(WatchError::TooMany { limit: limits.client_watches });
        };
        self.watch_with(prefix, from, Some((slot, limits.watch_progress)))
    }

    fn watch_with(
        self: &Arc<Self>,
        prefix: &str,
        from: Revision,
        client: Option<(OwnedSemaphorePermit, Duration)>,
    ) -> Result<Batches, WatchError> {
        self.alive()?;
        let (oldest, last) = self
            .db
            .view(|view| Ok((floor_of_prefix(view, prefix)?, revision(view)?)))
            .map_err(failed)?;
        let next = if from.0 == 0 { last + 1 } else { from.0 };
        if next < oldest {
            return Err(Compacted { asked: Revision(next), oldest: Revision(oldest) }.into());
        }
        let (slot, progress) = client.unzip();
        let watching = Watching {
            node: self.clone(),
            prefix: prefix.to_owned(),
            next,
            told: next.saturating_sub(1),
            ready: VecDeque::new(),
            over: false,
            progress: progress.map(|every| (every, Instant::now() + every)),
            _slot: slot,
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
    /// The last revision that the watcher has heard of.
    told: u64,
    /// What was read ahead in the history, at most one page.
    ready: VecDeque<WatchBatch>,
    over: bool,
    /// How often it is told of progress, and when next.
    progress: Option<(Duration, Instant)>,
    _slot: Option<OwnedSemaphorePermit>,
}

impl Watching {
    async fn next_batch(&mut self) -> Result<WatchBatch, WatchError> {
        let mut applied = self.node.machine.applied();
        let mut recovered = self.node.recovered.subscribe();
        let mut failure = self.node.failure();
        loop {
            if let Some(batch) = self.ready.pop_front() {
                self.told = batch.revision.0;
                self.progress = self.progress.map(|(every, _)| (every, Instant::now() + every));
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
            let due = self.progress.map(|(_, due)| due);
            tokio::select! {
                changed = applied.changed() => changed.map_err(|_| StoreError::Shutdown)?,
                _ = failure.changed() => {}
                () = until(due) => if let Some(batch) = self.tell_progress() {
                    return Ok(batch);
                },
            }
        }
    }

    fn tell_progress(&mut self) -> Option<WatchBatch> {
        self.progress = self.progress.map(|(every, _)| (every, Instant::now() + every));
        let seen = self.next - 1;
        if seen <= self.told {
            return None;
        }
        self.told = seen;
        Some(WatchBatch { revision: Revision(seen), events: Vec::new() })
    }

    /// Looks on; false where there is nothing new.
    fn look(&mut self) -> Result<bool, WatchError> {
        let prefix = self.prefix.as_str();
        let wanted = |key: &str| key.starts_with(prefix) && !key.starts_with(keys::PRIV);
        match self.node.machine.recent().look(self.next, wanted) {
            Look::Found(found) => {
                self.next = found.first().map_or(self.next, |one| one.revision) + 1;
                found.into_iter().for_each(|written| self.take(written));
                Ok(true)
            }
            Look::Nothing(last) => {
                self.next = self.next.max(last + 1);
                Ok(false)
            }
            Look::Older => self.look_in_history(),
        }
    }

    fn look_in_history(&mut self) -> Result<bool, WatchError> {
        let (prefix, next) = (self.prefix.as_str(), self.next);
        let page = self.node.db.view(|view| {
            let (oldest, last) = (floor_of_prefix(view, prefix)?, revision(view)?);
            if next < oldest {
                return Ok(Err(Compacted { asked: Revision(next), oldest: Revision(oldest) }));
            }
            if last < next {
                return Ok(Ok((Vec::new(), next)));
            }
            let folders = folders_of_prefix(prefix);
            let folders: Vec<&str> = folders.into_iter().map(|(_, folder)| folder).collect();
            let (rows, rest) = journal(view, &folders, Span::From(next), WATCH_ROWS)?;
            let (mut found, mut bytes): (Vec<Written>, usize) = (Vec::new(), 0);
            for (at, key) in rows {
                let new = found.last().is_none_or(|last| last.revision != at.revision);
                if new && bytes > WATCH_BYTES {
                    return Ok(Ok((found, at.revision)));
                }
                if key.starts_with(prefix) {
                    let written = written_at(view, &key, at.revision)?;
                    bytes += written.version.value.as_ref().map_or(0, Vec::len);
                    found.push(written);
                }
            }
            Ok(Ok((found, rest.unwrap_or(last + 1))))
        });
        let (found, then) = page.map_err(failed)??;
        let moved = then > self.next;
        found.into_iter().for_each(|written| self.take(written));
        self.next = then;
        Ok(moved)
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

/// Never, where there is no time.
async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}
