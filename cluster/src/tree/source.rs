//! What the tree reads of the store: lists, contents, changes. Reads are this node's own, as far
//! as it has applied; they block on the disk, never on other nodes, and have a time limit.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::BoxStream;
use nix::errno::Errno;
use proto::{Revision, keys};

use super::names;
use crate::machine::{Read, Record, Table, decode, decode_head, prefix_end, version_key};
use crate::node::Node;
use crate::storage::View;
use crate::{Consistency, History, StoreError, WatchBatch, WatchError};

/// How long the disk may take to answer a read.
const READ_LIMIT: Duration = Duration::from_secs(3);

/// One file of a listing.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) key: String,
    pub(super) revision: u64,
    pub(super) size: u64,
    /// When it was written, seconds since 1970.
    pub(super) seconds: u64,
}

/// Who made a revision, and when.
#[derive(Debug, Clone, Default)]
pub(super) struct Origin {
    pub(super) author: String,
    /// Seconds since 1970.
    pub(super) seconds: u64,
}

/// Everything at one revision.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) files: Vec<Listed>,
    /// The placement records, for `.vms`.
    pub(super) placements: Vec<(String, Vec<u8>)>,
    pub(super) revision: u64,
}

/// Reads the store.
#[derive(Debug, Clone)]
pub(super) struct Source {
    node: Arc<Node>,
}

impl Source {
    pub(super) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }

    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&View<'_>) -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, Errno> {
        let node = self.node.clone();
        let reading = tokio::task::spawn_blocking(move || node.db().view(read));
        match tokio::time::timeout(READ_LIMIT, reading).await {
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(error))) => {
                tracing::warn!(%error, "the mounted tree cannot read the store");
                Err(Errno::EIO)
            }
            Ok(Err(_)) | Err(_) => Err(Errno::EIO),
        }
    }

    /// All files, those under `priv/` included.
    pub(super) async fn list(&self) -> Result<Listing, StoreError> {
        // Refused while the node may know less than it once did.
        self.node.get(keys::VMS, Consistency::Stale).await?;
        let listing = self.read(|view| {
            let (mut files, mut placements) = (Vec::new(), Vec::new());
            each(view, "", |key, record| {
                if key.starts_with(keys::PLACEMENTS) {
                    placements.push((key, record.value));
                } else if !key.starts_with(names::STATUS) {
                    files.push(listed(view, key, &record)?);
                }
                Ok(())
            })?;
            let revision = crate::machine::revision(view)?;
            Ok(Listing { files, placements, revision })
        });
        listing.await.map_err(|error| StoreError::Failed { why: error.to_string() })
    }

    /// Files with a prefix.
    pub(super) async fn list_under(&self, prefix: &'static str) -> Result<Vec<Listed>, Errno> {
        let listing = self.read(move |view| {
            let mut files = Vec::new();
            each(view, prefix, |key, record| {
                files.push(listed(view, key, &record)?);
                Ok(())
            })?;
            Ok(files)
        });
        listing.await
    }

    /// Content and revision of some keys, all at one revision of the store; absent ones are None.
    pub(super) async fn contents(
        &self,
        keys: Vec<String>,
    ) -> Result<Vec<Option<(Vec<u8>, u64)>>, Errno> {
        let contents = self.read(move |view| {
            let one = |key: &String| {
                let row = view.get(Table::Data, key.as_bytes())?;
                let record = row.map(|bytes| decode::<Record>(&bytes)).transpose()?;
                Ok(record.map(|record| (record.value, record.mod_revision)))
            };
            keys.iter().map(one).collect()
        });
        contents.await
    }

    /// Content and revision of one key; None: absent.
    pub(super) async fn content(&self, key: &str) -> Result<Option<(Vec<u8>, u64)>, Errno> {
        let mut one = self.contents(vec![key.to_owned()]).await?;
        Ok(one.pop().flatten())
    }

    /// As [`Source::content`], as fresh as a quorum knows it.
    pub(super) async fn confirmed(&self, key: &str) -> Result<Option<(Vec<u8>, u64)>, StoreError> {
        let (kv, _) = self.node.get(key, Consistency::Linearizable).await?;
        Ok(kv.map(|kv| (kv.value, kv.mod_revision.0)))
    }

    /// Who made a revision of a key, and when.
    pub(super) async fn origin(&self, key: &str, revision: u64) -> Result<Origin, Errno> {
        let key = key.to_owned();
        self.read(move |view| origin(view, &key, revision)).await
    }

    /// Changes before a revision (0: up to now), the newest first.
    pub(super) async fn history(&self, before: Revision) -> Result<History, StoreError> {
        self.node.history("", false, before, 0).await
    }

    /// Whether a quorum answers.
    pub(super) async fn quorum(&self) -> Result<(), StoreError> {
        self.node.get(keys::HA_LEADER, Consistency::Linearizable).await.map(drop)
    }

    /// Changes from a revision on, without those of `priv/`.
    pub(super) fn watch(
        &self,
        from: u64,
    ) -> Result<BoxStream<'static, Result<WatchBatch, WatchError>>, WatchError> {
        self.node.watch("", Revision(from))
    }

    pub(super) fn node(&self) -> &Arc<Node> {
        &self.node
    }
}

fn listed(view: &View<'_>, key: String, record: &Record) -> std::io::Result<Listed> {
    let (revision, size) = (record.mod_revision, record.value.len() as u64);
    let seconds = origin(view, &key, revision)?.seconds;
    Ok(Listed { key, revision, size, seconds })
}

fn origin(view: &View<'_>, key: &str, revision: u64) -> std::io::Result<Origin> {
    let Some(row) = view.get(Table::Versions, &version_key(key, revision))? else {
        return Ok(Origin::default());
    };
    let head = decode_head(&row)?;
    Ok(Origin { author: head.author, seconds: head.at_ms / 1000 })
}

fn each(
    view: &View<'_>,
    prefix: &str,
    mut see: impl FnMut(String, Record) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let end = prefix_end(prefix.as_bytes());
    for row in view.rows(Table::Data, prefix.as_bytes())? {
        let (key, value) = row?;
        if end.as_ref().is_some_and(|end| key >= *end) {
            break;
        }
        // Keys are text; what is not cannot be shown.
        if let Ok(key) = String::from_utf8(key) {
            see(key, decode(&value)?)?;
        }
    }
    Ok(())
}
