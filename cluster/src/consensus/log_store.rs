//! Raft's log, vote, and committed position in the database.
//!
//! Appends return when the entries are readable, and are reported when a shared fsync has made them
//! durable. A vote is durable when `save_vote` returns.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};

use super::log_cache::LogCache;
use super::types::{Entry, LogId, TypeConfig, Vote};
use crate::machine::{decode, encode};
use crate::storage::{Cf, Db, LogView};

const VOTE: &[u8] = b"vote";
const COMMITTED: &[u8] = b"committed";
const PURGED: &[u8] = b"purged";

/// How much one message to a follower carries at most (at least one entry), bytes.
const MESSAGE_BYTES: usize = 4 << 20;

/// Reads and writes Raft's log; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct LogStore {
    db: Arc<Db>,
    /// Changes with the database, after it.
    cache: Arc<Mutex<LogCache>>,
}

impl LogStore {
    pub(crate) fn new(db: Arc<Db>) -> Self {
        Self { db, cache: Arc::default() }
    }

    fn cache(&self) -> MutexGuard<'_, LogCache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, from: u64, to: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        if let Some(entries) = self.cache().read(from, to, max_bytes) {
            return Ok(entries);
        }
        self.db.log(|log| {
            let (mut entries, mut bytes) = (Vec::new(), 0);
            for row in log.rows_from(Cf::Log, &from.to_be_bytes())? {
                let (key, value) = row?;
                if index_of(&key)? >= to || (bytes > 0 && bytes + value.len() > max_bytes) {
                    break;
                }
                bytes += value.len();
                entries.push(entry(&key, &value)?);
            }
            Ok(entries)
        })
    }

    fn setting<T: serde::de::DeserializeOwned>(&self, key: &[u8]) -> io::Result<Option<T>> {
        self.db.log(|log| log.get(Cf::Vote, key)?.map(|bytes| decode(&bytes)).transpose())
    }
}

/// The last index that a database knows to be committed.
pub(super) fn committed(log: &LogView<'_>) -> io::Result<u64> {
    let row = log.get(Cf::Vote, COMMITTED)?;
    let id: Option<Option<LogId>> = row.map(|bytes| decode(&bytes)).transpose()?;
    Ok(id.flatten().map_or(0, |id| id.index))
}

/// An entry of the log. One that cannot be read stops this member: to pass over it would make its
/// copy another one than everybody else's.
pub(super) fn entry(key: &[u8], value: &[u8]) -> io::Result<Entry> {
    let index = index_of(key)?;
    decode(value).map_err(|error| {
        let version = env!("CARGO_PKG_VERSION");
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "log entry {index} cannot be read by this agent, version {version} ({error}): another version wrote it, or it is damaged; all nodes of a cluster run the same version: install the one that the others run, and if the error stays, remove this node, empty its data folder and join again"
            ),
        )
    })
}

fn index_of(key: &[u8]) -> io::Result<u64> {
    <[u8; 8]>::try_from(key)
        .map(u64::from_be_bytes)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a log key is damaged"))
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> Result<Vec<Entry>, io::Error>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let from = match range.start_bound() {
            Bound::Included(index) => *index,
            Bound::Excluded(index) => index.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let to = match range.end_bound() {
            Bound::Included(index) => index.saturating_add(1),
            Bound::Excluded(index) => *index,
            Bound::Unbounded => u64::MAX,
        };
        self.read(from, to, usize::MAX)
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, io::Error> {
        self.read(start, end, MESSAGE_BYTES)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        self.setting(VOTE)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let last_purged_log_id: Option<LogId> = self.setting(PURGED)?;
        let last = self.db.log(|log| {
            let row = log.last(Cf::Log)?;
            row.map(|(key, value)| entry(&key, &value)).transpose()
        })?;
        let last_log_id = last.map(|entry| entry.log_id).or(last_purged_log_id);
        Ok(LogState { last_purged_log_id, last_log_id })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let bytes = encode(vote)?;
        self.db.write_log(|batch| batch.put(Cf::Vote, VOTE, &bytes))?;
        self.db.durable().await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        // Not synced: it survives the process, and what a power loss does to it is seen at opening
        // (`Db::lost_tail`).
        let bytes = encode(&committed)?;
        self.db.write_log(|batch| batch.put(Cf::Vote, COMMITTED, &bytes))
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.setting::<Option<LogId>>(COMMITTED)?.flatten())
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: IOFlushed<TypeConfig>,
    ) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut appended = Vec::new();
        self.db.write_log(|batch| {
            for entry in entries {
                let row = encode(&entry)?;
                batch.put(Cf::Log, &entry.log_id.index.to_be_bytes(), &row)?;
                appended.push((entry, row.len()));
            }
            Ok(())
        })?;
        self.db.logged(appended.iter().map(|(_, size)| *size).sum());
        {
            let mut cache = self.cache();
            appended.into_iter().for_each(|(entry, size)| cache.push(entry, size));
        }
        self.db.when_durable(move |result| callback.io_completed(result));
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let from = last_log_id.map_or(0, |id| id.index.saturating_add(1));
        self.db.write_log(|batch| batch.delete_range(Cf::Log, &from.to_be_bytes(), &[0xff; 9]))?;
        self.cache().truncate(from);
        Ok(())
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        let (purged, to) = (encode(&log_id)?, log_id.index.saturating_add(1));
        self.db.write_log(|batch| {
            batch.put(Cf::Vote, PURGED, &purged)?;
            batch.delete_range(Cf::Log, &[0; 8], &to.to_be_bytes())
        })?;
        // All of it may be gone, and more than it had: the next entry begins anew.
        self.cache().purge(to);
        // What it was is in memory yet, most of it: it never comes into a file.
        let db = self.db.clone();
        self.db.host().blocking(Box::new(move || {
            if let Err(error) = db.flush_log() {
                tracing::warn!(%error, "the log's end was not written out; it stays in the write-ahead log");
            }
        }));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use openraft::vote::RaftLeaderId;

    use super::*;
    use crate::host::ThisHost;
    use crate::storage::FolderLock;

    /// Bytes of the files with an ending in a folder.
    fn size(folder: &std::path::Path, ending: &str) -> io::Result<u64> {
        let mut bytes = 0;
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().ends_with(ending) {
                bytes += entry.metadata()?.len();
            }
        }
        Ok(bytes)
    }

    #[tokio::test]
    async fn what_is_cut_off_of_the_log_never_comes_into_a_table_file()
    -> Result<(), Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        let lock = FolderLock::take(folder.path())?;
        let db = Arc::new(Db::create(folder.path(), lock, Arc::new(ThisHost))?);
        let mut log = LogStore::new(db.clone());
        db.write_log(|batch| {
            (0..100u64).try_for_each(|n| batch.put(Cf::Log, &n.to_be_bytes(), &[7; 100_000]))
        })?;
        let path = folder.path().join(crate::storage::LOG);
        assert!(size(&path, ".log")? > 9_000_000, "the write-ahead log has all of it");
        type LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>;
        let leader = LeaderId::new(1, 1).to_committed();
        log.purge(LogId::new(leader, 95)).await?;
        // In the background.
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while size(&path, ".log")? > 1_000_000 {
            assert!(std::time::Instant::now() < until, "the write-ahead log stays");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        let left = size(&path, ".sst")?;
        assert!((400_000..1_000_000).contains(&left), "{left} bytes of four entries");
        let kept = db.log(|log| Ok(log.rows_from(Cf::Log, &[0; 8])?.count()))?;
        assert_eq!(kept, 4);
        db.close();
        Ok(())
    }

    #[tokio::test]
    async fn an_entry_of_another_version_is_an_error_that_says_so()
    -> Result<(), Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        let lock = FolderLock::take(folder.path())?;
        let db = Arc::new(Db::create(folder.path(), lock, Arc::new(ThisHost))?);
        db.write_log(|batch| batch.put(Cf::Log, &7u64.to_be_bytes(), &[0xff; 40]))?;
        let mut log = LogStore::new(db.clone());
        let read = log.try_get_log_entries(0..9).await.map(drop);
        let begun = log.get_log_state().await.map(drop);
        for failed in [read, begun] {
            let text = failed.err().ok_or("it was read")?.to_string();
            assert!(text.contains("log entry 7 cannot be read"), "{text}");
            assert!(text.contains("run the same version"), "{text}");
        }
        db.close();
        Ok(())
    }
}
