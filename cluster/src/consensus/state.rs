//! The state machine as openraft drives it: entries in, one batch with data, last applied and
//! membership out.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::vec::IntoIter;

use futures::{Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use tokio::sync::watch;

use super::checksum::Checksums;
use super::recent::Recent;
use super::snapshot::{self, SnapshotData, SnapshotFile};
use super::types::{LogId, Snapshot, SnapshotMeta, StoredMembership, TypeConfig};
use crate::host::blocking;
use crate::machine::{
    Changes, Command, Overlay, Read, Reply, Table, apply, decode, encode, revision,
};
use crate::storage::{Db, View};

const APPLIED: &[u8] = b"applied";
const MEMBERSHIP: &[u8] = b"membership";
/// Entries that one batch takes at most.
const BATCH_MAX: usize = 256;
/// A batch ends with the entry whose changes make it this large, bytes: a small entry may change much.
const BATCH_BYTES: usize = 16 << 20;
/// A snapshot is loaded in batches of about this size, bytes.
const LOAD_BATCH: usize = 4 << 20;

/// How far the state has come. Sent after the batch that brought it there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Applied {
    /// The store's revision.
    pub(crate) revision: u64,
    /// Index of the last applied log entry.
    pub(crate) index: u64,
}

/// The store's state machine on the database.
#[derive(Debug, Clone)]
pub(crate) struct StateMachine {
    db: Arc<Db>,
    applied: Arc<watch::Sender<Applied>>,
    recent: Arc<Recent>,
    checksums: Arc<Checksums>,
}

type Replies = Vec<(Option<openraft::storage::ApplyResponder<TypeConfig>>, Reply)>;

impl StateMachine {
    /// On an open database.
    pub(crate) fn open(db: Arc<Db>) -> io::Result<Self> {
        let applied = db.view(position)?;
        let recent = Arc::new(Recent::new(applied.revision));
        let applied = Arc::new(watch::channel(applied).0);
        Ok(Self { db, applied, recent, checksums: Arc::default() })
    }

    /// How far the state has come, now and later.
    pub(crate) fn applied(&self) -> watch::Receiver<Applied> {
        self.applied.subscribe()
    }

    /// The last changes.
    pub(crate) fn recent(&self) -> &Recent {
        &self.recent
    }

    /// The checksums that this member has computed.
    pub(crate) fn checksums(&self) -> &Checksums {
        &self.checksums
    }

    fn folder(&self) -> PathBuf {
        self.db.folder().join("snapshots")
    }

    fn apply_all(&self, entries: Vec<EntryResponder<TypeConfig>>) -> io::Result<()> {
        let mut entries = entries.into_iter();
        while entries.len() > 0 {
            self.apply_batch(&mut entries)?;
        }
        Ok(())
    }

    /// Applies the next entries, at least one, as one batch.
    fn apply_batch(&self, entries: &mut IntoIter<EntryResponder<TypeConfig>>) -> io::Result<()> {
        let (changes, replies, applied) = self.db.view(|view| {
            let mut state = Overlay::new(view);
            let mut replies: Replies = Vec::with_capacity(entries.len());
            let mut last = None;
            while state.changed_bytes() < BATCH_BYTES
                && let Some((entry, responder)) = entries.next()
            {
                last = Some(entry.log_id);
                let reply = match &entry.payload {
                    EntryPayload::Blank => Reply::None,
                    EntryPayload::Normal(command) => {
                        apply(&mut state, entry.log_id.index, command)?
                    }
                    EntryPayload::Membership(membership) => {
                        let stored = StoredMembership::new(Some(entry.log_id), membership.clone());
                        state.put(Table::Machine, MEMBERSHIP, encode(&stored)?);
                        Reply::None
                    }
                };
                replies.push((responder, reply));
            }
            let mut index = 0;
            if let Some(last) = last {
                index = last.index;
                state.put(Table::Machine, APPLIED, encode(&last)?);
            }
            let applied = Applied { revision: revision(&state)?, index };
            Ok((state.into_changes(), replies, applied))
        })?;
        self.write(&changes)?;
        self.recent.add(&changes, applied.revision)?;
        self.applied.send_replace(applied);
        for (responder, reply) in replies {
            if let Some(responder) = responder {
                responder.send(reply);
            }
        }
        Ok(())
    }

    fn write(&self, changes: &Changes) -> io::Result<()> {
        self.db.write(|batch| {
            for (table, key, value) in changes.iter() {
                batch.set(table, key, value)?;
            }
            Ok(())
        })?;
        if self.db.flush_is_due() {
            let db = self.db.clone();
            self.db.host().blocking(Box::new(move || {
                if let Err(error) = db.flush() {
                    tracing::error!(%error, "the state was not written out");
                }
            }));
        }
        Ok(())
    }

    /// Loads a snapshot beside the present state, then makes it the present one.
    fn load(&self, meta: &SnapshotMeta, file: &SnapshotFile) -> io::Result<()> {
        self.db.drop_other_states()?;
        let mut waiting: Vec<(Table, Vec<u8>, Vec<u8>)> = Vec::new();
        let mut size = 0;
        let flush = |waiting: &mut Vec<(Table, Vec<u8>, Vec<u8>)>| {
            self.db.write(|batch| {
                for (table, key, value) in waiting.drain(..) {
                    batch.set_in_next(table, &key, &value)?;
                }
                Ok(())
            })
        };
        snapshot::load(file, |table, key, value| {
            size += key.len() + value.len();
            waiting.push((table, key.to_vec(), value));
            if size >= LOAD_BATCH {
                size = 0;
                flush(&mut waiting)?;
            }
            Ok(())
        })?;
        flush(&mut waiting)?;
        self.db.write(|batch| {
            batch.switch_to_next()?;
            let applied = meta.last_log_id.as_ref().map(encode).transpose()?;
            batch.set(Table::Machine, APPLIED, applied.as_deref())?;
            batch.set(Table::Machine, MEMBERSHIP, Some(&encode(&meta.last_membership)?))
        })?;
        // The leader counts this node as holding all of it from now on.
        self.db.flush()?;
        self.db.drop_other_states()
    }
}

/// Where a view's state stands.
pub(crate) fn position(view: &View<'_>) -> io::Result<Applied> {
    let applied: Option<LogId> = applied(view)?;
    Ok(Applied { revision: revision(view)?, index: applied.map_or(0, |id| id.index) })
}

pub(super) fn applied(view: &View<'_>) -> io::Result<Option<LogId>> {
    view.get(Table::Machine, APPLIED)?.map(|bytes| decode(&bytes)).transpose()
}

pub(super) fn membership(view: &View<'_>) -> io::Result<StoredMembership> {
    let stored = view.get(Table::Machine, MEMBERSHIP)?;
    Ok(stored.map(|bytes| decode(&bytes)).transpose()?.unwrap_or_default())
}

pub(super) fn meta(view: &View<'_>) -> io::Result<SnapshotMeta> {
    Ok(SnapshotMeta { last_log_id: applied(view)?, last_membership: membership(view)? })
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        self.db.view(|view| Ok((applied(view)?, membership(view)?)))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut batch = Vec::new();
        while let Some(entry) = entries.next().await {
            let entry = entry?;
            let check_at = match entry.0.payload {
                EntryPayload::Normal(Command::Check) => Some(entry.0.log_id.index),
                _ => None,
            };
            batch.push(entry);
            if let Some(index) = check_at {
                // The batch ends here: the checksum is that of the state after this very entry.
                let slot = self.checksums.reserve(index);
                self.apply_all(std::mem::take(&mut batch))?;
                if let Some(slot) = slot {
                    slot.begin(&self.db).await;
                }
            } else if batch.len() == BATCH_MAX {
                self.apply_all(std::mem::take(&mut batch))?;
            }
        }
        self.apply_all(batch)
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotData,
    ) -> Result<(), io::Error> {
        let (machine, meta) = (self.clone(), meta.clone());
        let loaded = blocking(self.db.host(), move || {
            let file = match snapshot {
                SnapshotData::Received(file) => file,
                SnapshotData::Own(of) => SnapshotFile::copy(&of, &machine.folder())?,
            };
            machine.load(&meta, &file)
        });
        loaded.await??;
        let applied = self.db.view(position)?;
        self.recent.reset(applied.revision);
        self.applied.send_replace(applied);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let meta = self.db.view(meta)?;
        let snapshot = SnapshotData::Own(self.db.clone());
        Ok(meta.last_log_id.is_some().then_some(Snapshot { meta, snapshot }))
    }
}

impl RaftSnapshotBuilder<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let db = self.db.clone();
        let built = blocking(self.db.host(), move || {
            let logged = db.logged_bytes();
            let meta = db.view(meta)?;
            // Raft cuts the log off up to here, and would have nothing to bring the state back with.
            db.flush()?;
            db.log_is_held(logged);
            Ok::<_, io::Error>(meta)
        });
        Ok(Snapshot { meta: built.await??, snapshot: SnapshotData::Own(self.db.clone()) })
    }
}
