//! A view of the placements that follows the store by a watch: what this node has applied.
//!
//! It may be behind. It wakes whoever waits and says what to look at; whatever must be true when
//! it is acted upon is read again, confirmed with a quorum.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cluster::{Consistency, WatchEvent};
use futures::StreamExt as _;
use proto::record::Placement;
use proto::{Name, Revision, keys};
use tokio::sync::watch;

use super::records::decode;
use super::{Store, Versioned};

/// All placements as of some revision.
#[derive(Debug, Clone, Default)]
pub struct BoardView {
    /// Of what was applied last.
    pub revision: Revision,
    /// By VM name.
    pub placements: Arc<BTreeMap<Name, Versioned<Placement>>>,
}

/// The followed view. Clones share it.
#[derive(Debug, Clone)]
pub struct Board {
    view: Arc<watch::Sender<BoardView>>,
}

impl Default for Board {
    fn default() -> Self {
        Self { view: Arc::new(watch::Sender::new(BoardView::default())) }
    }
}

impl Board {
    /// What is known now.
    #[must_use]
    pub fn view(&self) -> BoardView {
        self.view.borrow().clone()
    }

    /// One VM's placement as known now.
    #[must_use]
    pub fn get(&self, vm: &Name) -> Option<Versioned<Placement>> {
        self.view.borrow().placements.get(vm).cloned()
    }

    /// Told of every change.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<BoardView> {
        self.view.subscribe()
    }

    /// Waits until the view holds what `wanted` looks for.
    pub async fn wait_for<T>(&self, mut wanted: impl FnMut(&BoardView) -> Option<T>) -> Option<T> {
        let mut receiver = self.view.subscribe();
        let mut found = None;
        let held = receiver.wait_for(|view| {
            found = wanted(view);
            found.is_some()
        });
        held.await.ok()?;
        found
    }

    /// Follows the store until the task is dropped. A broken watch begins again from a fresh read.
    pub async fn follow(&self, store: &Store) {
        loop {
            if let Err(error) = self.follow_once(store).await {
                tracing::warn!("following the placements: {error}; reading them again");
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    async fn follow_once(&self, store: &Store) -> anyhow::Result<()> {
        let range = store.cluster().range(keys::PLACEMENTS, "", 0, Consistency::Stale).await?;
        let mut placements = BTreeMap::new();
        for kv in &range.kvs {
            if let Ok(name) = kv.key[keys::PLACEMENTS.len()..].parse() {
                placements.insert(name, decode(kv)?);
            }
        }
        self.publish(range.revision, placements.clone());
        let mut watch = store.cluster().watch(keys::PLACEMENTS, Revision(range.revision.0 + 1))?;
        while let Some(batch) = watch.next().await {
            let batch = batch?;
            for event in &batch.events {
                match event {
                    WatchEvent::Put(kv) => {
                        if let Ok(name) = kv.key[keys::PLACEMENTS.len()..].parse() {
                            placements.insert(name, decode(kv)?);
                        }
                    }
                    WatchEvent::Deleted { key } => {
                        if let Ok(name) = key[keys::PLACEMENTS.len()..].parse::<Name>() {
                            placements.remove(&name);
                        }
                    }
                }
            }
            self.publish(batch.revision, placements.clone());
        }
        Ok(())
    }

    fn publish(&self, revision: Revision, placements: BTreeMap<Name, Versioned<Placement>>) {
        self.view.send_replace(BoardView { revision, placements: Arc::new(placements) });
    }
}
