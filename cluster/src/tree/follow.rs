//! Following the store: all names once, then every change.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use proto::{Revision, keys};

use super::names;
use super::namespace::Change;
use super::source::{Listing, Origin};
use super::state::{LOG_MAX, LogLine, Tree};
use crate::{KeyValue, WatchBatch, WatchError, WatchEvent};

/// Before another attempt.
const PAUSE: Duration = Duration::from_millis(500);
/// Pages of the history that are read for `.log`: the system's changes are among them.
const PAGES_MAX: usize = 10;

/// Follows until it is dropped.
pub(super) async fn follow(tree: Arc<Tree>) {
    loop {
        match follow_once(&tree).await {
            Ok(()) => {}
            Err(WatchError::Compacted(error)) => {
                tracing::info!(%error, "the mounted tree reads everything again");
            }
            Err(error @ (WatchError::Store(_) | WatchError::TooMany { .. })) => {
                tracing::debug!(%error, "the mounted tree cannot follow the store");
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn follow_once(tree: &Arc<Tree>) -> Result<(), WatchError> {
    let listing = tree.source.list().await?;
    let mut watch = tree.source.watch(listing.revision + 1)?;
    take_listing(tree, listing);
    refresh_open_files(tree).await;
    take_history(tree).await;
    while let Some(batch) = watch.next().await {
        let batch = batch?;
        let origin = match batch.events.first() {
            Some(WatchEvent::Put(KeyValue { key, .. }) | WatchEvent::Deleted { key }) => {
                tree.source.origin(key, batch.revision.0).await.unwrap_or_default()
            }
            None => Origin::default(),
        };
        take_batch(tree, batch, &origin);
    }
    Ok(())
}

fn take_listing(tree: &Tree, listing: Listing) {
    let listed = listing.files.into_iter();
    let files = listed.map(|file| (file.key, file.revision, file.size, file.seconds));
    let mut state = tree.lock();
    let stale = state.names.replace("", files.collect());
    state.names.revision = state.names.revision.max(listing.revision);
    state.placements = listing.placements.into_iter().collect::<BTreeMap<_, _>>();
    let revision = state.names.revision;
    drop(state);
    tree.notices.tell(stale);
    tree.applied.send_replace(revision.max(1));
}

/// A listing has no contents: open files that changed are read.
async fn refresh_open_files(tree: &Arc<Tree>) {
    let behind = tree.lock().names.behind();
    for inode in behind {
        if let Err(error) = tree.refresh(inode).await {
            tracing::debug!(%error, inode, "an open file could not be read again");
        }
    }
}

/// What was done before this node began to follow, for `.log`.
async fn take_history(tree: &Tree) {
    let (mut lines, mut before) = (Vec::new(), Revision(0));
    for _ in 0..PAGES_MAX {
        let Ok(page) = tree.source.history(before).await else { break };
        let people = page.changes.into_iter().filter(|change| !names::is_status(&change.path));
        lines.extend(people.map(|change| LogLine {
            revision: change.revision.0,
            origin: Origin { author: change.author, seconds: change.at_ms / 1000 },
            path: change.path,
            removed: change.content.is_none(),
        }));
        match page.next_before {
            Some(next) if lines.len() < LOG_MAX => before = next,
            Some(_) | None => break,
        }
    }
    lines.truncate(LOG_MAX);
    let mut state = tree.lock();
    state.log.clear();
    lines.into_iter().rev().for_each(|line| state.log(line));
}

fn take_batch(tree: &Tree, batch: WatchBatch, origin: &Origin) {
    let revision = batch.revision.0;
    let mut changes = Vec::with_capacity(batch.events.len());
    let mut state = tree.lock();
    for event in batch.events {
        let (key, content) = match event {
            WatchEvent::Put(kv) => (kv.key, Some(kv.value)),
            WatchEvent::Deleted { key } => (key, None),
        };
        if key.starts_with(keys::PLACEMENTS) {
            match content {
                Some(record) => state.placements.insert(key, record),
                None => state.placements.remove(&key),
            };
        } else if !key.starts_with(names::STATUS) {
            let (origin, path, removed) = (origin.clone(), key.clone(), content.is_none());
            // The history may have been ahead of the watch.
            if state.log.back().is_none_or(|last| last.revision <= revision) {
                state.log(LogLine { revision, origin, path, removed });
            }
            changes.push(Change { key, content });
        }
    }
    let stale = state.names.apply(revision, origin.seconds, &changes);
    drop(state);
    tree.notices.tell(stale);
    tree.applied.send_replace(revision);
}
