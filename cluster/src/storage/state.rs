//! The state's database: written without a write-ahead log, and written out only after the log.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rocksdb::{DB, Direction, FlushOptions, IteratorMode, ReadOptions, WriteBatch, WriteOptions};

use super::batch::Batch;
use super::db::{io_error, next, state_number};
use super::families::{state_handles, table_handle};
use super::view::View;
use crate::machine::Table;

/// With so much in memory only, it is time to write it out. (A snapshot, which does the same, comes
/// earlier unless entries are large.)
const DUE_BYTES: u64 = 32 << 20;
/// More than this is not left in memory only: RocksDB would soon write it out by itself, whatever
/// became of the log.
const MOST_BYTES: u64 = 80 << 20;

/// Makes the log durable, as far as it was written when this is called.
pub(super) type SyncLog<'a> = &'a dyn Fn() -> io::Result<()>;

/// The database, and the order in which it and the log reach the disk: what its files hold is durable
/// in the log before. Otherwise an entry that was applied, and lost with the log's end, could come
/// back as another one.
pub(super) struct State {
    pub(super) rocks: Arc<DB>,
    /// The current state's, once it is written.
    number: AtomicU32,
    /// Whoever writes it out.
    turn: Mutex<()>,
    /// It is being written out, and with it perhaps what is written now: the log comes first.
    log_first: RwLock<bool>,
    /// What batches held since it was last written out, bytes.
    in_memory: AtomicU64,
    due: AtomicBool,
}

impl State {
    pub(super) fn new(rocks: DB) -> io::Result<Self> {
        let number = state_number(rocks.get(b"state").map_err(io_error)?)?;
        Ok(Self {
            rocks: Arc::new(rocks),
            number: AtomicU32::new(number),
            turn: Mutex::new(()),
            log_first: RwLock::new(false),
            in_memory: AtomicU64::new(0),
            due: AtomicBool::new(false),
        })
    }

    /// A consistent view.
    pub(super) fn view(&self) -> View<'_> {
        loop {
            let number = self.number.load(Ordering::SeqCst);
            let view = View::at(&self.rocks, number);
            // It is set after the batch that makes a state the current one, and before the rows of
            // the one before go: as long as it stands, all rows of this state are there.
            if self.number.load(Ordering::SeqCst) == number {
                return view;
            }
        }
    }

    /// What is in memory only, bytes, about.
    pub(super) fn in_memory(&self) -> u64 {
        self.in_memory.load(Ordering::Relaxed)
    }

    /// Whether it is time to write it out; true once until it was.
    pub(super) fn is_due(&self) -> bool {
        self.in_memory() > DUE_BYTES && !self.due.swap(true, Ordering::Relaxed)
    }

    /// Writes one batch.
    pub(super) fn write(
        &self,
        f: impl FnOnce(&mut Batch<'_>) -> io::Result<()>,
        sync_log: SyncLog<'_>,
    ) -> io::Result<()> {
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        let state = self.number.load(Ordering::SeqCst);
        let mut batch = Batch { rocks: &self.rocks, batch: WriteBatch::default(), state };
        f(&mut batch)?;
        let after = batch.state;
        let bytes = u64::try_from(batch.batch.size_in_bytes()).unwrap_or(u64::MAX);
        {
            let log_first = self.log_first.read().unwrap_or_else(PoisonError::into_inner);
            if *log_first {
                sync_log()?;
            }
            self.rocks.write_opt(batch.batch, &options).map_err(io_error)?;
            if after != state {
                self.number.store(after, Ordering::SeqCst);
            }
        }
        let before = self.in_memory.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) > MOST_BYTES {
            self.write_out(sync_log, |_| Ok(()))?;
        }
        Ok(())
    }

    /// Whether there are rows of another state than the current one.
    pub(super) fn has_others(&self) -> io::Result<bool> {
        let (number, state) = (self.number.load(Ordering::SeqCst), &self.rocks);
        let after = next(number)?.to_be_bytes();
        for table in Table::ALL {
            let cf = table_handle(state, table)?;
            let first = |from: IteratorMode<'_>| {
                let mut options = ReadOptions::default();
                // What is in the cache is not read from the disk when copies are compared.
                options.fill_cache(false);
                let mut rows = state.iterator_cf_opt(cf, options, from);
                rows.next().transpose().map_err(io_error)
            };
            let later = first(IteratorMode::From(&after, Direction::Forward))?;
            let first = first(IteratorMode::Start)?;
            let other = first.is_some_and(|(key, _)| !key.starts_with(&number.to_be_bytes()));
            if other || later.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Writes all tables out to files, at one point; then does what must see these files, and no
    /// others that the log is behind.
    pub(super) fn write_out<T>(
        &self,
        sync_log: SyncLog<'_>,
        then: impl FnOnce(&DB) -> io::Result<T>,
    ) -> io::Result<T> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.set_log_first(true);
        let bytes = self.in_memory();
        let done = self.write_out_behind(sync_log, then);
        self.set_log_first(false);
        self.due.store(false, Ordering::Relaxed);
        if done.is_ok() {
            self.in_memory.fetch_sub(bytes, Ordering::Relaxed);
        }
        done
    }

    fn write_out_behind<T>(
        &self,
        sync_log: SyncLog<'_>,
        then: impl FnOnce(&DB) -> io::Result<T>,
    ) -> io::Result<T> {
        sync_log()?;
        let families = state_handles(&self.rocks)?;
        self.rocks.flush_cfs_opt(&families, &FlushOptions::default()).map_err(io_error)?;
        then(&self.rocks)
    }

    fn set_log_first(&self, first: bool) {
        *self.log_first.write().unwrap_or_else(PoisonError::into_inner) = first;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::storage::families::{state_families, state_options};

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    fn state(folder: &std::path::Path) -> Result<State, Box<dyn std::error::Error>> {
        let options = state_options(true);
        Ok(State::new(DB::open_cf_descriptors(&options, folder, state_families())?)?)
    }

    fn files(state: &State) -> Result<usize, Box<dyn std::error::Error>> {
        Ok(state.rocks.live_files()?.len())
    }

    #[test]
    fn the_log_is_synced_before_what_it_brought_comes_into_files() -> Outcome {
        let folder = tempfile::tempdir()?;
        let state = state(folder.path())?;
        let (syncs, at_files) = (Cell::new(0), Cell::new(Vec::new()));
        let sync = || {
            syncs.set(syncs.get() + 1);
            let mut seen = at_files.take();
            seen.push(files(&state).map_err(|error| io::Error::other(error.to_string()))?);
            at_files.set(seen);
            Ok(())
        };
        let put =
            |value: &[u8]| state.write(|batch| batch.set(Table::Data, b"a", Some(value)), &sync);
        put(b"1")?;
        assert_eq!(syncs.get(), 0, "in memory only");
        state.write_out(&sync, |_| {
            assert_eq!(syncs.get(), 1);
            // What is written while files are made may come into one of them.
            put(b"2")?;
            assert_eq!(syncs.get(), 2);
            Ok(())
        })?;
        assert_eq!(at_files.take()[0], 0, "there was no file yet at the first one");
        put(b"3")?;
        assert_eq!(syncs.get(), 2, "in memory only");
        Ok(())
    }

    #[test]
    fn a_log_that_cannot_be_synced_keeps_the_state_in_memory() -> Outcome {
        let folder = tempfile::tempdir()?;
        let state = state(folder.path())?;
        let broken = || Err(io::Error::other("the disk is gone"));
        state.write(|batch| batch.set(Table::Data, b"a", Some(b"1")), &broken)?;
        assert!(state.write_out(&broken, |_| Ok(())).is_err());
        assert_eq!(files(&state)?, 0);
        state.write_out(&|| Ok(()), |_| Ok(()))?;
        assert_eq!(files(&state)?, 1);
        Ok(())
    }

    #[test]
    fn what_is_in_memory_only_has_a_limit() -> Outcome {
        let folder = tempfile::tempdir()?;
        let state = state(folder.path())?;
        let value = vec![7; 8 << 20];
        let (mut due, mut put) = (0, 0);
        while files(&state)? == 0 {
            state.write(|batch| batch.set(Table::Data, &[put], Some(&value)), &|| Ok(()))?;
            put += 1;
            due += usize::from(state.is_due());
            assert!(u64::from(put) * (8 << 20) <= MOST_BYTES + (8 << 20), "nothing is written out");
        }
        assert_eq!(due, 1, "said once");
        assert_eq!(state.in_memory(), 0);
        Ok(())
    }
}
