//! A new cluster with the data of a backup.
//!
//! It is another cluster than the one that was backed up: its id, its CA and so every certificate
//! are new, and nothing of the old one can speak to it. What the old one's VMs are is kept (their
//! documents, ids, images); where they run is not: each is at rest, owned by the new first node,
//! and a person starts it once no machine of the old cluster can run it any more. Nothing else can
//! know that. Its generation is far above what the old cluster can have come to since the backup
//! was made, so that a process which an agent still finds on its machine is an old one and ends.
//!
//! Invariant: the whole file is read and checked before anything is written; until the node's
//! identity is written, last of all, the folder is that of no member.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::sync::Arc;

use proto::backup::{BackupError, Header, Reader, Row, Summary, is_kept};
use proto::record::{DiskClaim, Phase, Placement, Requested};
use proto::{Generation, InvalidName, Name, NodeId, VmId, keys};
use tokio::sync::mpsc;

use crate::machine::{VALUE_MAX, valid_key};
use crate::membership::to_json;
use crate::node::Node;
use crate::{Cluster, InitError, StoreError, Txn, Uninitialized};

/// The node that a cluster begins with.
const FIRST: NodeId = NodeId(1);
/// Generations that the old cluster has not come to since.
const GENERATIONS: u64 = 1_000_000;
/// A generation beyond this was never counted up to.
const GENERATION_MAX: u64 = u64::MAX / 2;
/// Read at once.
const PIECE: usize = 256 << 10;
/// Of one transaction.
const BATCH_BYTES: usize = 1 << 20;
const BATCH_KEYS: usize = 1000;

/// What a restored VM says of itself.
const MESSAGE: &str =
    "restored from a backup; start it once no machine of the old cluster can run it";

/// What was restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// What the backup says of itself.
    pub header: Header,
    /// Keys that were taken over.
    pub keys: u64,
    /// VMs among them.
    pub vms: u64,
}

/// Why nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// It is none, or not whole.
    #[error("{0}; nothing was changed")]
    Backup(#[from] BackupError),
    /// It is whole, and something in it cannot be.
    #[error(
        "the backup holds something that cannot be restored: {key:?}: {why}; nothing was changed"
    )]
    Content {
        /// Which key.
        key: String,
        /// Why.
        why: String,
    },
    /// It cannot be read.
    #[error("the backup cannot be read: {0}")]
    Read(#[from] io::Error),
    /// The cluster was not made.
    #[error(transparent)]
    Init(#[from] InitError),
}

impl From<InvalidName> for RestoreError {
    fn from(error: InvalidName) -> Self {
        Self::Init(error.into())
    }
}

impl Uninitialized {
    /// Makes a new cluster with this node as its only member, and a backup's data. An empty name:
    /// as the old one's. Can be tried again after an error.
    ///
    /// # Errors
    /// [`RestoreError`]
    pub async fn restore(
        &self,
        file: File,
        cluster_name: &str,
        node_name: &str,
    ) -> Result<(Cluster, Restored), RestoreError> {
        // Before minutes are spent on the file.
        node_name.parse::<Name>()?;
        let checked = Checked::read(file, None).await?;
        let restored = checked.restored.clone();
        let name =
            if cluster_name.is_empty() { &restored.header.cluster_name } else { cluster_name };
        name.parse::<Name>()?;
        let cluster = self.form(name, node_name, Some(&checked)).await?;
        tracing::warn!(
            from = %restored.header.cluster_id, revision = restored.header.revision,
            keys = restored.keys, vms = restored.vms,
            "restored from a backup: every VM is at rest until a person starts it"
        );
        Ok((cluster, restored))
    }
}

/// A backup that was read to its end and found good.
#[derive(Debug)]
pub(crate) struct Checked {
    file: Arc<File>,
    owners: Owners,
    pub(crate) restored: Restored,
}

/// The node whose own state a backup is.
#[derive(Debug)]
pub(crate) struct Own {
    /// What its id was in the old cluster.
    pub(crate) id: NodeId,
    /// The VMs that a majority is known to have left to it, by their placement's key.
    pub(crate) settled: BTreeMap<String, VmId>,
}

impl Own {
    /// Whether a VM is surely this node's, and goes on there as it is. One with HA is not: while
    /// the node was cut off, the others started it elsewhere. One that was migrating may be with
    /// its target. What the node's log says beyond what was agreed to counts only against it.
    fn runs(&self, key: &str, placement: &Placement) -> bool {
        runs_on(placement, self.id) && self.settled.get(key) == Some(&placement.vm_id)
    }
}

/// Who owns the VMs.
#[derive(Debug, Clone)]
struct Owners {
    /// The node that a cluster is made of.
    new: NodeId,
    /// Where this is its own state.
    survivor: Option<Arc<Own>>,
}

impl Checked {
    /// Reads it. `survivor`: the node whose own state it is.
    pub(crate) async fn read(file: File, survivor: Option<Own>) -> Result<Self, RestoreError> {
        let owners = Owners { new: FIRST, survivor: survivor.map(Arc::new) };
        let (reading, of) = (Arc::new(file), owners.clone());
        let file = reading.clone();
        let read = tokio::task::spawn_blocking(move || check(&reading, &of));
        let restored = read.await.map_err(io::Error::other)??;
        Ok(Self { file, owners, restored })
    }

    /// Writes its rows into an empty cluster.
    pub(crate) async fn write(&self, node: &Node) -> Result<(), InitError> {
        let (batches, mut ready) = mpsc::channel::<Vec<Row>>(2);
        let (file, owners) = (self.file.clone(), self.owners.clone());
        let reading = tokio::task::spawn_blocking(move || batched(&file, &owners, &batches));
        while let Some(batch) = ready.recv().await {
            let txn = batch
                .into_iter()
                .fold(Txn::new().by("restore"), |txn, (key, value)| txn.put(key, value));
            node.txn(txn).await?;
        }
        let failed = |why: String| InitError::Store(StoreError::Failed { why });
        let read = reading.await.map_err(|error| failed(error.to_string()))?;
        read.map_err(|error| failed(error.to_string()))
    }
}

/// Reads a file from its begin to its end.
fn read(
    mut file: &File,
    mut take: impl FnMut(Row) -> Result<(), RestoreError>,
) -> Result<(Header, Summary), RestoreError> {
    file.rewind()?;
    let (mut reader, mut piece) = (Reader::default(), vec![0; PIECE]);
    loop {
        match file.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => reader.push(&piece[..count])?.into_iter().try_for_each(&mut take)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let header = reader.header().cloned();
    let summary = reader.finish()?;
    let header = header.ok_or(BackupError::CutOff(summary.bytes))?;
    Ok((header, summary))
}

fn check(file: &File, owners: &Owners) -> Result<Restored, RestoreError> {
    let (mut kept, mut vms) = (0, 0);
    let (header, _) = read(file, |row| {
        let key = row.0.clone();
        let wrong = |why: String| RestoreError::Content { key: key.clone(), why };
        if let Some((key, value)) = restored(row, owners).map_err(wrong)? {
            valid_key(&key).map_err(wrong)?;
            if value.len() > VALUE_MAX {
                return Err(wrong(format!("it has {} bytes", value.len())));
            }
            kept += 1;
            vms += u64::from(key.starts_with(keys::PLACEMENTS));
        }
        Ok(())
    })?;
    Ok(Restored { header, keys: kept, vms })
}

fn batched(
    file: &File,
    owners: &Owners,
    batches: &mpsc::Sender<Vec<Row>>,
) -> Result<(), RestoreError> {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    // Whoever writes them gave up, and says why.
    let send = |batch: Vec<Row>| {
        batches.blocking_send(batch).map_err(|_| io::Error::other("given up").into())
    };
    read(file, |row| {
        let key = row.0.clone();
        let changed = restored(row, owners).map_err(|why| RestoreError::Content { key, why })?;
        let Some((key, value)) = changed else { return Ok(()) };
        bytes += key.len() + value.len();
        batch.push((key, value));
        if bytes >= BATCH_BYTES || batch.len() >= BATCH_KEYS {
            bytes = 0;
            return send(std::mem::take(&mut batch));
        }
        Ok(())
    })?;
    if batch.is_empty() { Ok(()) } else { send(batch) }
}

/// A row as the new cluster has it; `None`: it does not.
fn restored((key, value): Row, owners: &Owners) -> Result<Option<Row>, String> {
    if !is_kept(&key) {
        return Ok(None);
    }
    if let Some(name) = key.strip_prefix(keys::PLACEMENTS) {
        name.parse::<Name>().map_err(|error| error.to_string())?;
        let found: Placement = serde_json::from_slice(&value).map_err(|error| error.to_string())?;
        let placement = match &owners.survivor {
            Some(own) if own.runs(&key, &found) => Placement { owner: owners.new, ..found },
            _ => at_rest(found, owners.new)?,
        };
        let value = to_json(&placement).map_err(|error| error.to_string())?;
        return Ok(Some((key, value)));
    }
    if key.starts_with(keys::DISKS) {
        serde_json::from_slice::<DiskClaim>(&value).map_err(|error| error.to_string())?;
    }
    Ok(Some((key, value)))
}

/// Whether a placement leaves a VM to a node, and nobody else may have it.
pub(crate) fn runs_on(placement: &Placement, node: NodeId) -> bool {
    let moving = matches!(placement.phase, Phase::Migrating { .. });
    placement.owner == node && !placement.ha && !moving
}

fn at_rest(mut placement: Placement, owner: NodeId) -> Result<Placement, String> {
    if placement.generation.0 > GENERATION_MAX {
        return Err(format!("its generation {} is out of bounds", placement.generation));
    }
    placement.owner = owner;
    placement.generation = Generation(placement.generation.0 + GENERATIONS);
    placement.phase = Phase::Stopped;
    placement.requested = Requested::Stopped;
    placement.start_failures = 0;
    placement.tried.clear();
    placement.home = None;
    placement.lock = None;
    placement.retry_at_unix_ms = None;
    placement.message = Some(MESSAGE.to_owned());
    placement.note("restored from a backup".to_owned());
    Ok(placement)
}
