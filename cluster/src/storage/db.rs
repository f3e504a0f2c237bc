//! The databases. Raft's log and vote are in one, whose write-ahead log is what is synced; the state
//! machine's tables are in another, which has none: an end without [`Db::close`] throws the state
//! back to where it last reached its files, and Raft applies the log from there again. So the log may
//! only be cut off up to where the state is durable ([`Db::flush`]); and what the state's files hold
//! is durable in the log before: an entry that was applied and then lost could come back as another.
//!
//! Rows of the tables are stored under the number of the state they belong to (4 bytes BE before the
//! key): a snapshot is loaded beside the running state under the next number, and one small batch
//! makes it the current one. A crash in between leaves rows of a number that is not current; opening
//! removes them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use rocksdb::{DB, FlushOptions, WriteBatch};

use super::FolderLock;
use super::batch::{Batch, LogBatch};
use super::checkpoint::Checkpoint;
use super::families::{
    check, leave_bottommost_files, log_families, log_handles, log_options, state_families,
    state_handles, state_options,
};
use super::state::State;
use super::view::{LogView, View};
use crate::OpenError;
use crate::host::{GroupCommit, Host};

/// The folders of the two databases in a data folder.
pub(crate) const LOG: &str = "log";
pub(crate) const STATE: &str = "db";

const FORMAT: &[u8] = b"7";
/// With less room than this nothing at all is written any more.
const LAST_BYTES: u64 = 4 << 20;

/// The open databases; shared, and closed once by [`Db::close`].
pub(crate) struct Db {
    folder: PathBuf,
    host: Arc<dyn Host>,
    open: RwLock<Option<Open>>,
    disk_low: AtomicBool,
    closing: AtomicBool,
    /// See [`Db::logged_bytes`].
    logged: AtomicU64,
    /// The machine lost power since this database was last closed: the unsynced tail is gone.
    pub(crate) lost_tail: bool,
}

struct Open {
    // Dropped in this order: what waits for an fsync, the databases, the folder's lock.
    flusher: Box<dyn GroupCommit>,
    log: Arc<DB>,
    state: State,
    _lock: FolderLock,
}

impl std::fmt::Debug for Db {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Db").field("folder", &self.folder).finish_non_exhaustive()
    }
}

/// Whether an error says that the disk is full.
pub(crate) fn is_disk_full(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::StorageFull
        || error.kind() == io::ErrorKind::QuotaExceeded
        || error.to_string().contains("No space left")
}

pub(super) fn io_error(error: rocksdb::Error) -> io::Error {
    let text = error.to_string();
    let kind = match error.kind() {
        rocksdb::ErrorKind::Corruption => io::ErrorKind::InvalidData,
        _ if text.contains("No space left") => io::ErrorKind::StorageFull,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}

impl Db {
    /// Makes the database of a new member in a locked data folder.
    pub(crate) fn create(
        folder: &Path,
        lock: FolderLock,
        host: Arc<dyn Host>,
    ) -> Result<Self, OpenError> {
        Self::open_as(folder, lock, host, true)
    }

    /// Opens the database of a member, and reads all of it once, so that damage is found now and not
    /// when the cluster depends on this copy. One that is not whole is refused: RocksDB would make an
    /// empty one where the file that names the others is missing, and a member that forgot its vote
    /// may give it twice.
    pub(crate) fn open(
        folder: &Path,
        lock: FolderLock,
        host: Arc<dyn Host>,
    ) -> Result<Self, OpenError> {
        Self::open_as(folder, lock, host, false)
    }

    fn open_as(
        folder: &Path,
        lock: FolderLock,
        host: Arc<dyn Host>,
        new: bool,
    ) -> Result<Self, OpenError> {
        let fail = |error: io::Error| open_error(folder, &error);
        let opened = |options, part, families| {
            DB::open_cf_descriptors(&options, folder.join(part), families)
                .map_err(|error| fail(io_error(error)))
        };
        let state =
            State::new(opened(state_options(new), STATE, state_families())?).map_err(fail)?;
        let log = Arc::new(opened(log_options(new), LOG, log_families())?);
        for (rocks, handles) in
            [(&state.rocks, state_handles(&state.rocks)), (&log, log_handles(&log))]
        {
            leave_bottommost_files(rocks, &handles.map_err(fail)?).map_err(fail)?;
        }
        let logged = check(&log, &state.rocks).map_err(fail)?;
        let lost_tail = begin(&log, folder, host.boot_id(), new)?;
        let synced = log.clone();
        let sync = Arc::new(move || synced.flush_wal(true).map_err(io_error));
        let flusher = host.group_commit(folder, sync).map_err(fail)?;
        let db = Self {
            folder: folder.to_owned(),
            host,
            open: RwLock::new(Some(Open { flusher, log, state, _lock: lock })),
            disk_low: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            logged: AtomicU64::new(logged),
            lost_tail,
        };
        db.drop_other_states().map_err(fail)?;
        Ok(db)
    }

    fn guard(&self) -> RwLockReadGuard<'_, Option<Open>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, f: impl FnOnce(&Open) -> io::Result<T>) -> io::Result<T> {
        match self.guard().as_ref() {
            Some(open) => f(open),
            None => Err(io::Error::other("the database is closed")),
        }
    }

    /// Counts bytes that went into the log.
    pub(crate) fn logged(&self, bytes: usize) {
        self.logged.fetch_add(u64::try_from(bytes).unwrap_or(0), Ordering::Relaxed);
    }

    /// A snapshot holds what these bytes of the log brought.
    pub(crate) fn log_is_held(&self, bytes: u64) {
        let less = |logged: u64| Some(logged.saturating_sub(bytes));
        // It never fails: there is always a next value.
        let _ = self.logged.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Bytes of the log since the last snapshot; after an opening, all that there are.
    pub(crate) fn logged_bytes(&self) -> u64 {
        self.logged.load(Ordering::Relaxed)
    }

    /// Where it is.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Reads the state from one consistent view.
    pub(crate) fn view<T>(&self, f: impl FnOnce(&View<'_>) -> io::Result<T>) -> io::Result<T> {
        self.with(|open| f(&open.state.view()))
    }

    /// Reads the log.
    pub(crate) fn log<T>(&self, f: impl FnOnce(&LogView<'_>) -> io::Result<T>) -> io::Result<T> {
        self.with(|open| f(&LogView(open.log.as_ref())))
    }

    /// The state as it is now, beside the one that goes on. Blocks.
    pub(crate) fn checkpoint(&self) -> io::Result<Checkpoint> {
        self.with(|open| {
            let folder = self.folder.join("snapshots");
            open.state
                .write_out(&|| open.flusher.sync_now(), |rocks| Checkpoint::take(rocks, &folder))
        })
    }

    /// Collects changes of the log and writes them as one batch. Durable with the next fsync.
    pub(crate) fn write_log(
        &self,
        f: impl FnOnce(&mut LogBatch<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.with(|open| {
            let mut batch = LogBatch { rocks: &open.log, batch: WriteBatch::default() };
            f(&mut batch)?;
            open.log.write(batch.batch).map_err(io_error)
        })
    }

    /// Collects changes of the state, which the log brings again, and writes them as one batch.
    /// Durable with [`Db::flush`].
    pub(crate) fn write(&self, f: impl FnOnce(&mut Batch<'_>) -> io::Result<()>) -> io::Result<()> {
        self.with(|open| open.state.write(f, &|| open.flusher.sync_now()))
    }

    /// Writes the state out to files, all tables at one point, after the log; waits for it, blocks.
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.with(|open| open.state.write_out(&|| open.flusher.sync_now(), |_| Ok(())))
    }

    /// Whether so much of the state is in memory only that it is time for [`Db::flush`]; true once
    /// until that was done.
    pub(crate) fn flush_is_due(&self) -> bool {
        self.guard().as_ref().is_some_and(|open| open.state.is_due())
    }

    /// What is in memory only of the state, bytes, about.
    pub(crate) fn in_memory_bytes(&self) -> u64 {
        self.guard().as_ref().map_or(0, |open| open.state.in_memory())
    }

    /// Begins to write what is left of the log out to files, so that its write-ahead log can go.
    pub(crate) fn flush_log(&self) -> io::Result<()> {
        self.with(|open| {
            let mut options = FlushOptions::default();
            options.set_wait(false);
            open.log.flush_cfs_opt(&log_handles(&open.log)?, &options).map_err(io_error)
        })
    }

    /// Calls `done` when everything written before is durable.
    pub(crate) fn when_durable(&self, done: impl FnOnce(io::Result<()>) + Send + 'static) {
        match self.guard().as_ref() {
            Some(open) => open.flusher.submit(Box::new(done)),
            None => done(Err(io::Error::other("the database is closed"))),
        }
    }

    /// Waits until everything written before is durable.
    pub(crate) async fn durable(&self) -> io::Result<()> {
        let (tx, rx) = tokio::sync::oneshot::channel();
        self.when_durable(move |result| {
            let _ = tx.send(result);
        });
        rx.await.unwrap_or_else(|_| Err(io::Error::other("the database is closed")))
    }

    /// Whether the disk had too little room when it was last measured.
    pub(crate) fn disk_low(&self) -> bool {
        self.disk_low.load(Ordering::Relaxed)
    }

    /// Whether there is no room either for the little that staying in touch writes: a vote, how
    /// far the log is committed. Measured now.
    pub(crate) fn disk_exhausted(&self) -> bool {
        self.disk_low() && self.free_bytes().is_some_and(|free| free < LAST_BYTES)
    }

    /// The machine it is on.
    pub(crate) fn host(&self) -> &dyn Host {
        self.host.as_ref()
    }

    /// Free room, bytes; None where the system does not say.
    pub(crate) fn free_bytes(&self) -> Option<u64> {
        self.host.free_bytes(&self.folder)
    }

    /// Measures the free room against a limit.
    pub(crate) fn measure(&self, min_free_bytes: u64) -> bool {
        let low = self.free_bytes().is_some_and(|free| free < min_free_bytes);
        if self.disk_low.swap(low, Ordering::Relaxed) != low {
            if low {
                tracing::error!(folder = %self.folder.display(), "the disk is nearly full: this node takes no log entries until there is room");
            } else {
                tracing::info!(folder = %self.folder.display(), "the disk has room again");
            }
        }
        low
    }

    /// Whether it waits for its readers to be closed: who reads for long looks here and ends.
    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    /// Writes out everything and closes. Later calls fail.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
        let open = self.open.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(open) = open {
            let end = || {
                open.state.write_out(&|| open.flusher.sync_now(), |_| Ok(()))?;
                open.log.put(b"closed", b"1").map_err(io_error)?;
                open.log.flush_wal(true).map_err(io_error)
            };
            if let Err(error) = end() {
                tracing::error!(%error, "the database could not be written out at its end");
            }
        }
    }

    /// What a power loss may have taken of the log's end is known to be here again.
    pub(crate) fn tail_is_back(&self) -> io::Result<()> {
        self.with(|open| open.log.delete(b"lost").map_err(io_error))
    }

    /// Removes rows of states that are not current.
    pub(crate) fn drop_other_states(&self) -> io::Result<()> {
        // Each read of what is in memory looks at what was removed there as a range.
        if self.with(|open| open.state.has_others())? {
            self.write(|batch| batch.drop_other_states())?;
        }
        Ok(())
    }
}

pub(super) fn next(state: u32) -> io::Result<u32> {
    state.checked_add(1).ok_or_else(|| io::Error::other("no more state numbers"))
}

pub(super) fn state_number(stored: Option<Vec<u8>>) -> io::Result<u32> {
    match stored {
        None => Ok(0),
        Some(bytes) => {
            <[u8; 4]>::try_from(bytes.as_slice()).map(u32::from_be_bytes).map_err(|_| {
                io::Error::new(io::ErrorKind::InvalidData, "the state's number is damaged")
            })
        }
    }
}

/// Marks the database as in use; answers whether an unsynced tail may have been lost.
fn begin(rocks: &DB, folder: &Path, boot: String, new: bool) -> Result<bool, OpenError> {
    let fail = |error: rocksdb::Error| open_error(folder, &io_error(error));
    if new && rocks.get(b"format").map_err(fail)?.is_none() {
        rocks.put(b"format", FORMAT).map_err(fail)?;
    }
    let lost_tail = look(rocks, folder, &boot)?;
    if lost_tail {
        // It stays lost over an orderly end, until the cluster has given it back.
        rocks.put(b"lost", b"1").map_err(fail)?;
    }
    rocks.delete(b"closed").map_err(fail)?;
    rocks.put(b"boot", boot).map_err(fail)?;
    rocks.flush_wal(true).map_err(fail)?;
    Ok(lost_tail)
}

/// Checks the format; answers whether an unsynced tail may have been lost.
pub(super) fn look(rocks: &DB, folder: &Path, boot: &str) -> Result<bool, OpenError> {
    let fail = |error: rocksdb::Error| open_error(folder, &io_error(error));
    match rocks.get(b"format").map_err(fail)? {
        // A member's has it from before its identity was written.
        None => {
            let error =
                io::Error::new(io::ErrorKind::InvalidData, "the database has lost its rows");
            return Err(open_error(folder, &error));
        }
        Some(format) if format == FORMAT => {}
        Some(format) => {
            return Err(OpenError::Unusable {
                path: folder.to_owned(),
                detail: format!(
                    "the database has format {}, this agent knows {}; install the version that wrote it",
                    String::from_utf8_lossy(&format),
                    String::from_utf8_lossy(FORMAT)
                ),
            });
        }
    }
    let closed = rocks.get(b"closed").map_err(fail)?.is_some();
    let last_boot = rocks.get(b"boot").map_err(fail)?;
    let same_boot = last_boot.as_ref().is_none_or(|last| last == boot.as_bytes());
    let lost = rocks.get(b"lost").map_err(fail)?.is_some();
    Ok(lost || (!closed && !same_boot))
}

pub(super) fn open_error(folder: &Path, error: &io::Error) -> OpenError {
    let (path, detail) = (folder.to_owned(), error.to_string());
    if is_disk_full(error) {
        OpenError::DiskFull { path, detail }
    } else if error.kind() == io::ErrorKind::InvalidData || detail.contains("Corruption") {
        OpenError::Corrupt { path, detail }
    } else {
        // RocksDB reports a missing or unreadable file of its own as an I/O or argument error.
        OpenError::Unusable {
            path,
            detail: format!(
                "its databases cannot be opened ({detail}); if files are missing, remove this node from the cluster, empty its data folder and join again"
            ),
        }
    }
}
