//! The database. Rows of the state machine's tables are stored under the number of the state they
//! belong to (4 bytes BE before the key): a snapshot is loaded beside the running state under the
//! next number, and one small batch makes it the current one. A crash in between leaves rows of a
//! number that is not current; opening removes them.
//!
//! Raft's log is in RocksDB's write-ahead log, and what an entry changes in the state is not
//! ([`Db::write_replayable`]): an end without [`Db::close`] throws the state back to where all
//! families last reached their files together, and Raft applies the log from there again. So the
//! log may only be cut off up to where the state is durable ([`Db::flush`]).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, Direction, FlushOptions,
    IteratorMode, Options, ReadOptions, SnapshotWithThreadMode, WriteBatch, WriteOptions,
};

use super::FolderLock;
use crate::OpenError;
use crate::host::{GroupCommit, Host};
use crate::machine::{self, Read, Table};

/// Column families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cf {
    /// Raft log entries by index (8 bytes BE).
    Log,
    /// Raft's own small state: vote, committed, purged.
    Vote,
    /// A table of the state machine.
    Table(Table),
    /// Format, number of the current state, boot.
    Local,
}

impl Cf {
    pub(super) const ALL: [Self; 8] = [
        Self::Local,
        Self::Log,
        Self::Vote,
        Self::Table(Table::Data),
        Self::Table(Table::Journal),
        Self::Table(Table::Versions),
        Self::Table(Table::Dedup),
        Self::Table(Table::Machine),
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Local => "default",
            Self::Log => "log",
            Self::Vote => "vote",
            Self::Table(Table::Data) => "data",
            Self::Table(Table::Journal) => "journal",
            Self::Table(Table::Versions) => "versions",
            Self::Table(Table::Dedup) => "dedup",
            Self::Table(Table::Machine) => "machine",
        }
    }
}

const FORMAT: &[u8] = b"5";
/// Of what is read from files, so much stays in memory.
const CACHE_BYTES: usize = 32 << 20;
/// With less room than this nothing at all is written any more.
const LAST_BYTES: u64 = 4 << 20;

/// The open database; shared, and closed once by [`Db::close`].
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
    // Dropped in this order: what waits for an fsync, the database, the folder's lock.
    flusher: Box<dyn GroupCommit>,
    rocks: Arc<DB>,
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
        let path = folder.join("db");
        let rocks = DB::open_cf_descriptors(&db_options(new), &path, families())
            .map_err(|error| fail(io_error(error)))?;
        leave_bottommost_files(&rocks).map_err(fail)?;
        let rocks = Arc::new(rocks);
        let logged = check(&rocks).map_err(fail)?;
        let lost_tail = begin(&rocks, folder, host.boot_id(), new)?;
        let synced = rocks.clone();
        let sync = Box::new(move || synced.flush_wal(true).map_err(io_error));
        let flusher = host.group_commit(folder, sync).map_err(fail)?;
        let db = Self {
            folder: folder.to_owned(),
            host,
            open: RwLock::new(Some(Open { flusher, rocks, _lock: lock })),
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

    /// Reads from one consistent view.
    pub(crate) fn view<T>(&self, f: impl FnOnce(&View<'_>) -> io::Result<T>) -> io::Result<T> {
        self.with(|open| f(&View::of(open.rocks.as_ref())?))
    }

    /// Collects changes and writes them as one batch. Durable with the next fsync.
    pub(crate) fn write(&self, f: impl FnOnce(&mut Batch<'_>) -> io::Result<()>) -> io::Result<()> {
        self.write_with(&WriteOptions::default(), f)
    }

    /// The same for changes of the current state that the log brings again. Durable with [`Db::flush`].
    pub(crate) fn write_replayable(
        &self,
        f: impl FnOnce(&mut Batch<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        self.write_with(&options, f)
    }

    fn write_with(
        &self,
        options: &WriteOptions,
        f: impl FnOnce(&mut Batch<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.with(|open| {
            let current = open.rocks.get(b"state").map_err(io_error)?;
            let mut batch = Batch {
                rocks: &open.rocks,
                batch: WriteBatch::default(),
                state: state_number(current)?,
            };
            f(&mut batch)?;
            open.rocks.write_opt(batch.batch, options).map_err(io_error)
        })
    }

    /// Writes everything out to files, all families at one point, and waits for it; blocks.
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.with(|open| flush(&open.rocks))
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
                flush(&open.rocks)?;
                open.rocks.put(b"closed", b"1").map_err(io_error)?;
                open.rocks.flush_wal(true).map_err(io_error)
            };
            if let Err(error) = end() {
                tracing::error!(%error, "the database could not be written out at its end");
            }
        }
    }

    /// What a power loss may have taken of the log's end is known to be here again.
    pub(crate) fn tail_is_back(&self) -> io::Result<()> {
        self.with(|open| open.rocks.delete(b"lost").map_err(io_error))
    }

    /// Removes rows of states that are not current.
    pub(crate) fn drop_other_states(&self) -> io::Result<()> {
        self.write(|batch| {
            let (current, after) = (batch.state.to_be_bytes(), next(batch.state)?.to_be_bytes());
            for table in Table::ALL {
                let cf = handle(batch.rocks, Cf::Table(table))?;
                batch.batch.delete_range_cf(cf, [0; 4].as_slice(), &current);
                batch.batch.delete_range_cf(cf, after.as_slice(), &[0xff; 5]);
            }
            Ok(())
        })
    }
}

fn next(state: u32) -> io::Result<u32> {
    state.checked_add(1).ok_or_else(|| io::Error::other("no more state numbers"))
}

fn state_number(stored: Option<Vec<u8>>) -> io::Result<u32> {
    match stored {
        None => Ok(0),
        Some(bytes) => {
            <[u8; 4]>::try_from(bytes.as_slice()).map(u32::from_be_bytes).map_err(|_| {
                io::Error::new(io::ErrorKind::InvalidData, "the state's number is damaged")
            })
        }
    }
}

fn handle(rocks: &DB, cf: Cf) -> io::Result<&ColumnFamily> {
    rocks
        .cf_handle(cf.name())
        .ok_or_else(|| io::Error::other(format!("column family {} is missing", cf.name())))
}

fn flush(rocks: &DB) -> io::Result<()> {
    let families: io::Result<Vec<_>> = Cf::ALL.into_iter().map(|cf| handle(rocks, cf)).collect();
    rocks.flush_cfs_opt(&families?, &FlushOptions::default()).map_err(io_error)
}

pub(super) fn db_options(new: bool) -> Options {
    let mut options = Options::default();
    options.create_if_missing(new);
    options.create_missing_column_families(new);
    // All families reach their files together, so that no file is ahead of another after a crash.
    options.set_atomic_flush(true);
    options.set_max_total_wal_size(64 << 20);
    options.set_keep_log_file_num(4);
    options.set_max_log_file_size(4 << 20);
    options
}

/// RocksDB writes each family's lowest files anew once no reader of older states is left, to forget
/// the numbers of their rows; there is always one soon. It may be left for as long as this, s.
const BOTTOMMOST_DELAY: &str = "86400";

fn leave_bottommost_files(rocks: &DB) -> io::Result<()> {
    for cf in Cf::ALL {
        let options = [("bottommost_file_compaction_delay", BOTTOMMOST_DELAY)];
        rocks.set_options_cf(handle(rocks, cf)?, &options).map_err(io_error)?;
    }
    Ok(())
}

/// All families, which share a cache.
pub(super) fn families() -> Vec<ColumnFamilyDescriptor> {
    let cache = Cache::new_lru_cache(CACHE_BYTES);
    let family = |cf: Cf| ColumnFamilyDescriptor::new(cf.name(), cf_options(cf, &cache));
    Cf::ALL.into_iter().map(family).collect()
}

fn cf_options(cf: Cf, cache: &Cache) -> Options {
    let mut options = Options::default();
    options.set_compression_type(rocksdb::DBCompressionType::Lz4);
    options.set_write_buffer_size(16 << 20);
    // Who writes does not wait for one that is on its way to a slow disk.
    options.set_max_write_buffer_number(4);
    // Taken at once, by each family, however little it gets.
    options.set_arena_block_size(128 << 10);
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    if matches!(cf, Cf::Log) {
        // Read again after a crash only, and gone with the next snapshot.
        options.set_compression_type(rocksdb::DBCompressionType::None);
    }
    if matches!(cf, Cf::Table(Table::Data | Table::Dedup | Table::Machine)) {
        // Each new key is looked for first, and is nowhere.
        table.set_bloom_filter(10.0, false);
    }
    options.set_block_based_table_factory(&table);
    options
}

/// Reads everything once; checksums are verified on the way. The answer is how many bytes the log has.
pub(super) fn check(rocks: &DB) -> io::Result<u64> {
    let mut logged = 0;
    for cf in Cf::ALL {
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        for row in rocks.iterator_cf_opt(handle(rocks, cf)?, options, IteratorMode::Start) {
            let (_, value) = row.map_err(io_error)?;
            if matches!(cf, Cf::Log) {
                logged += u64::try_from(value.len()).unwrap_or(0);
            }
        }
    }
    Ok(logged)
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
            path: path.join("db"),
            detail: format!(
                "cannot be opened ({detail}); if files are missing, remove this node from the cluster, empty its data folder and join again"
            ),
        }
    }
}

/// A row outside the state machine's tables: key and value.
type RawRow = (Box<[u8]>, Box<[u8]>);
/// A row of a table: key and value.
type Row = (Vec<u8>, Box<[u8]>);

/// A consistent view of everything.
pub(crate) struct View<'a> {
    rocks: &'a DB,
    snapshot: SnapshotWithThreadMode<'a, DB>,
    state: u32,
}

impl<'a> View<'a> {
    pub(super) fn of(rocks: &'a DB) -> io::Result<Self> {
        let snapshot = rocks.snapshot();
        let state = state_number(snapshot.get(b"state").map_err(io_error)?)?;
        Ok(Self { rocks, snapshot, state })
    }

    /// A row outside the state machine's tables.
    pub(crate) fn raw(&self, cf: Cf, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.snapshot.get_cf(handle(self.rocks, cf)?, key).map_err(io_error)
    }

    /// Rows of a family outside the tables, from a key on.
    pub(crate) fn raw_from(
        &self,
        cf: Cf,
        from: &[u8],
    ) -> io::Result<impl Iterator<Item = io::Result<RawRow>>> {
        let mode = IteratorMode::From(from, Direction::Forward);
        let rows = self.snapshot.iterator_cf(handle(self.rocks, cf)?, mode);
        Ok(rows.map(|row| row.map_err(io_error)))
    }

    /// The last row of a family outside the tables.
    pub(crate) fn raw_last(&self, cf: Cf) -> io::Result<Option<RawRow>> {
        let mut rows = self.snapshot.iterator_cf(handle(self.rocks, cf)?, IteratorMode::End);
        rows.next().transpose().map_err(io_error)
    }

    /// Rows of a table from a key on, without their number.
    pub(crate) fn rows(
        &self,
        table: Table,
        from: &[u8],
    ) -> io::Result<impl Iterator<Item = io::Result<Row>>> {
        self.rows_with(table, from, None, ReadOptions::default())
    }

    /// All rows of a table, past the cache: reading everything once does not push out what is
    /// read often.
    pub(crate) fn all_rows(
        &self,
        table: Table,
    ) -> io::Result<impl Iterator<Item = io::Result<Row>>> {
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        self.rows_with(table, b"", None, options)
    }

    fn rows_with(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        mut options: ReadOptions,
    ) -> io::Result<impl Iterator<Item = io::Result<Row>>> {
        let state = self.state.to_be_bytes();
        let start = [state.as_slice(), from].concat();
        // The database itself looks no further: there may be many removed rows on the way.
        options.set_iterate_upper_bound(match to {
            Some(to) => [state.as_slice(), to].concat(),
            None => next(self.state)?.to_be_bytes().to_vec(),
        });
        let rows = self.snapshot.iterator_cf_opt(
            handle(self.rocks, Cf::Table(table))?,
            options,
            IteratorMode::From(&start, Direction::Forward),
        );
        Ok(rows.map(|row| {
            let (key, value) = row.map_err(io_error)?;
            Ok((key.get(4..).unwrap_or_default().to_vec(), value))
        }))
    }
}

impl Read for View<'_> {
    fn get(&self, table: Table, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.raw(Cf::Table(table), &[self.state.to_be_bytes().as_slice(), key].concat())
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        limit: usize,
    ) -> io::Result<Vec<machine::Row>> {
        let mut found = Vec::new();
        for row in self.rows_with(table, from, to, ReadOptions::default())?.take(limit) {
            let (key, value) = row?;
            found.push((key, value.into_vec()));
        }
        Ok(found)
    }

    fn scan_back(
        &self,
        table: Table,
        from: &[u8],
        to: &[u8],
        limit: usize,
    ) -> io::Result<Vec<machine::Row>> {
        let state = self.state.to_be_bytes();
        let bound = |key: &[u8]| [state.as_slice(), key].concat();
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(bound(from));
        options.set_iterate_upper_bound(bound(to));
        let cf = handle(self.rocks, Cf::Table(table))?;
        let rows = self.snapshot.iterator_cf_opt(cf, options, IteratorMode::End);
        rows.take(limit)
            .map(|row| {
                let (key, value) = row.map_err(io_error)?;
                Ok((key.get(4..).unwrap_or_default().to_vec(), value.into_vec()))
            })
            .collect()
    }
}

/// Changes that are written together.
pub(crate) struct Batch<'a> {
    rocks: &'a DB,
    batch: WriteBatch,
    state: u32,
}

impl Batch<'_> {
    /// Sets a row outside the tables.
    pub(crate) fn put(&mut self, cf: Cf, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.batch.put_cf(handle(self.rocks, cf)?, key, value);
        Ok(())
    }
    /// Removes rows outside the tables, `from <= key < to`.
    pub(crate) fn delete_range(&mut self, cf: Cf, from: &[u8], to: &[u8]) -> io::Result<()> {
        self.batch.delete_range_cf(handle(self.rocks, cf)?, from, to);
        Ok(())
    }
    /// Sets a row of a table (None: removes it) in the current state.
    pub(crate) fn set(&mut self, table: Table, key: &[u8], value: Option<&[u8]>) -> io::Result<()> {
        let cf = handle(self.rocks, Cf::Table(table))?;
        let key = [self.state.to_be_bytes().as_slice(), key].concat();
        match value {
            Some(value) => self.batch.put_cf(cf, key, value),
            None => self.batch.delete_cf(cf, key),
        }
        Ok(())
    }
    /// Sets a row in the state after the current one, which nobody reads yet.
    pub(crate) fn set_in_next(&mut self, table: Table, key: &[u8], value: &[u8]) -> io::Result<()> {
        let key = [next(self.state)?.to_be_bytes().as_slice(), key].concat();
        self.batch.put_cf(handle(self.rocks, Cf::Table(table))?, key, value);
        Ok(())
    }
    /// Makes the next state the current one; `set` goes there from here on.
    pub(crate) fn switch_to_next(&mut self) -> io::Result<()> {
        self.state = next(self.state)?;
        self.batch.put(b"state", self.state.to_be_bytes());
        Ok(())
    }
}
