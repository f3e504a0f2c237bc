//! Checksums of the whole state machine at one place of the log, for members to compare.
//!
//! A log entry ([`Command::Check`](crate::machine::Command::Check)) names the place: each member
//! applies it, takes a view of the database right there (a moment), and reads that view through in
//! a thread of its own, while later entries are applied. So all read exactly the same state,
//! history and bookkeeping included, however far each is by then, and no write waits.
//!
//! Reading is slow on purpose: nobody waits for it, and guests and Raft's log share the core and the
//! disk with it. The view keeps RocksDB from forgetting what was written over since; so it is given
//! up after [`VIEW_MAX`].
//!
//! Never: a checksum of a state that was reached by a snapshot past the entry, or one kept over a
//! restart. Such a member says that it has none.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

use crate::machine::{Table, revision};
use crate::storage::{Db, View};

/// Results that are kept.
const KEPT: usize = 8;
/// Computed side by side, at most: a member that catches up on a long log meets many.
const RUNNING_MAX: usize = 2;
/// Read at a stretch, bytes.
const SLICE: usize = 1 << 20;
/// A stretch and the pause after it take at least so long: 32 MiB/s.
const SLICE_TIME: Duration = Duration::from_millis(31);
/// No pause is longer: the database may be waiting to be closed.
const PAUSE_MAX: Duration = Duration::from_millis(200);
/// A view is kept no longer. All that there may be at most (3.5 GiB) is read in less.
const VIEW_MAX: Duration = Duration::from_secs(280);

/// What a member answers when its checksum is asked for. On the wire (postcard).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Checked {
    /// It has none for that place; it has applied the log up to here.
    Absent { applied: u64 },
    /// It is being computed.
    Running,
    /// Computed.
    Done(Checksum),
    /// It could not be computed; that says nothing of the copy.
    Failed(String),
    /// The copy cannot be read.
    Faulty(String),
}

/// Of a state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Checksum {
    /// The store's revision in that state.
    pub(crate) revision: u64,
    /// SHA-256 of each table, by its name.
    pub(crate) tables: Vec<(String, [u8; 32])>,
}

impl Checksum {
    /// Of everything, hexadecimal.
    pub(crate) fn whole(&self) -> String {
        let mut sum = Context::new(&SHA256);
        for (name, table) in &self.tables {
            sum.update(name.as_bytes());
            sum.update(table);
        }
        sum.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Names of the tables that are not the same in another.
    pub(crate) fn differences(&self, other: &Self) -> Vec<&str> {
        let same = |table: &(String, [u8; 32])| other.tables.contains(table);
        self.tables.iter().filter(|table| !same(table)).map(|(name, _)| name.as_str()).collect()
    }
}

/// This member's, by log index.
#[derive(Debug, Default)]
pub(crate) struct Checksums {
    results: Mutex<BTreeMap<u64, Checked>>,
}

impl Checksums {
    fn results(&self) -> MutexGuard<'_, BTreeMap<u64, Checked>> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known for a log index.
    pub(crate) fn get(&self, index: u64) -> Option<Checked> {
        self.results().get(&index).cloned()
    }

    /// The last place whose checksum is being computed.
    pub(crate) fn running(&self) -> Option<u64> {
        let results = self.results();
        let mut running = results.iter().rev().filter(|(_, state)| **state == Checked::Running);
        running.next().map(|(index, _)| *index)
    }

    /// Before the entry is applied: from here on the place is known. `None`: there is no room.
    pub(super) fn reserve(self: &Arc<Self>, index: u64) -> Option<Slot> {
        let mut results = self.results();
        let running = results.values().filter(|state| **state == Checked::Running).count();
        let room = running < RUNNING_MAX;
        let state = if room {
            Checked::Running
        } else {
            Checked::Failed("it is still busy with earlier checks".to_owned())
        };
        results.insert(index, state);
        // What runs stays, and so counts.
        let mut over = results.len().saturating_sub(KEPT);
        results.retain(|_, state| {
            let goes = over > 0 && *state != Checked::Running;
            over -= usize::from(goes);
            !goes
        });
        room.then(|| Slot { of: self.clone(), index, end: None })
    }

    fn end(&self, index: u64, state: Checked) {
        if let Some(kept) = self.results().get_mut(&index) {
            *kept = state;
        }
    }
}

/// Room for one that is being computed. Invariant: it is free again once this value is gone,
/// whatever became of the work.
#[derive(Debug)]
pub(super) struct Slot {
    of: Arc<Checksums>,
    index: u64,
    end: Option<Checked>,
}

impl Slot {
    /// After the entry is applied, and before the next one is: returns once the view is taken.
    pub(super) async fn begin(self, db: &Arc<Db>) {
        self.run(db, compute).await;
    }

    async fn run<F>(self, db: &Arc<Db>, compute: F)
    where
        F: FnOnce(&View<'_>, Between<'_>) -> Result<Checksum, Stop> + Send + 'static,
    {
        let (tell, taken) = tokio::sync::oneshot::channel();
        let reading = db.clone();
        db.host().blocking(Box::new(move || {
            // It goes with the work: where that panics, and where it never runs.
            let mut slot = self;
            let mut pace = Pace::begin();
            let computed = reading.view(|view| {
                // Nobody waits any more where Raft is ending.
                let _ = tell.send(());
                Ok(compute(view, &mut || pace.rest(reading.is_closing())))
            });
            slot.end = Some(match computed.unwrap_or_else(|error| Err(Stop::Read(error))) {
                Ok(checksum) => Checked::Done(checksum),
                Err(Stop::Read(error)) if is_damage(&error) && !reading.is_closing() => {
                    let index = slot.index;
                    tracing::error!(index, %error, "THIS NODE'S COPY CANNOT BE READ");
                    Checked::Faulty(format!("its copy cannot be read: {error}"))
                }
                Err(Stop::GivenUp(why)) => Checked::Failed(why.to_owned()),
                Err(Stop::Read(_)) if reading.is_closing() => Checked::Failed(CLOSING.to_owned()),
                Err(Stop::Read(error)) => Checked::Failed(format!("it was not read: {error}")),
            });
        }));
        // An error: the database is closed, there was no view to take.
        let _ = taken.await;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let unfinished = || Checked::Failed("the work ended in the middle".to_owned());
        self.of.end(self.index, self.end.take().unwrap_or_else(unfinished));
    }
}

/// Why there is no checksum.
#[derive(Debug)]
enum Stop {
    /// The copy cannot be read.
    Read(io::Error),
    /// It was not read to its end.
    GivenUp(&'static str),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Read(error)
    }
}

/// Whether a failed read says that the copy is damaged. What a machine lacks for a moment (memory,
/// file descriptors) is nothing to empty a data folder for.
fn is_damage(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidData || says_damage(&error.to_string())
}

/// The same of a failure that is only known in words: RocksDB's, and strerror's for `EIO`.
pub(crate) fn says_damage(failure: &str) -> bool {
    let signs = ["Corruption", "damaged row", "Input/output error", "No such file"];
    signs.iter().any(|sign| failure.contains(sign))
}

const CLOSING: &str = "its database is being closed";

/// What is done after each slice; an error ends the work.
type Between<'a> = &'a mut dyn FnMut() -> Result<(), Stop>;

/// How fast it reads.
struct Pace {
    begun: Instant,
    slice: Instant,
}

impl Pace {
    fn begin() -> Self {
        Self { begun: Instant::now(), slice: Instant::now() }
    }

    /// After a slice; blocks.
    fn rest(&mut self, closing: bool) -> Result<(), Stop> {
        if closing {
            return Err(Stop::GivenUp(CLOSING));
        }
        if self.begun.elapsed() >= VIEW_MAX {
            return Err(Stop::GivenUp("reading its copy took too long"));
        }
        std::thread::sleep(pause(self.slice.elapsed()));
        self.slice = Instant::now();
        Ok(())
    }
}

/// After a slice that took so long. A disk that is slow, or busy, is left alone for half as long.
fn pause(took: Duration) -> Duration {
    SLICE_TIME.saturating_sub(took).max(took / 2).min(PAUSE_MAX)
}

fn name(table: Table) -> &'static str {
    match table {
        Table::Data => "data",
        Table::Journal => "journal",
        Table::Versions => "versions",
        Table::Dedup => "dedup",
        Table::Machine => "machine",
    }
}

/// Reads all rows of a view. Lengths go into the sum, so that no two states have the same input.
fn compute(view: &View<'_>, between: Between<'_>) -> Result<Checksum, Stop> {
    let (mut tables, mut slice) = (Vec::new(), 0);
    for table in Table::ALL {
        let mut sum = Context::new(&SHA256);
        for row in view.all_rows(table, b"")? {
            let (key, value) = row?;
            for part in [key.as_slice(), &value] {
                sum.update(&(part.len() as u64).to_le_bytes());
                sum.update(part);
                slice += part.len();
            }
            if slice >= SLICE {
                slice = 0;
                between()?;
            }
        }
        let mut bytes = [0; 32];
        bytes.copy_from_slice(sum.finish().as_ref());
        tables.push((name(table).to_owned(), bytes));
    }
    Ok(Checksum { revision: revision(view)?, tables })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use async_trait::async_trait;

    use super::*;
    use crate::host::{Connection, GroupCommit, Host, SyncNow, ThisHost};
    use crate::storage::FolderLock;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    fn sum(rows: &[(Table, &[u8], &[u8])]) -> Result<Checksum, Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        let db = Db::create(folder.path(), FolderLock::take(folder.path())?, Arc::new(ThisHost))?;
        db.write(|batch| {
            rows.iter().try_for_each(|(table, key, value)| batch.set(*table, key, Some(value)))
        })?;
        let computed = db.view(|view| Ok(compute(view, &mut || Ok(()))))?;
        db.close();
        computed.map_err(|stop| format!("{stop:?}").into())
    }

    #[test]
    fn every_byte_of_every_table_counts_and_nothing_else() -> Outcome {
        let rows: &[(Table, &[u8], &[u8])] =
            &[(Table::Data, b"a", b"1"), (Table::Data, b"b", b"2"), (Table::Journal, b"", b"a")];
        let one = sum(rows)?;
        let reversed: Vec<_> = rows.iter().rev().copied().collect();
        assert_eq!(one, sum(&reversed)?, "whatever order it was written in");
        let moved = sum(&[(Table::Data, b"a1", b""), rows[1], rows[2]])?;
        assert_eq!(one.differences(&moved), ["data"]);
        assert_ne!(one.whole(), moved.whole());
        let elsewhere = sum(&[rows[0], (Table::Dedup, b"b", b"2"), rows[2]])?;
        assert_eq!(one.differences(&elsewhere), ["data", "dedup"]);
        assert_eq!(one.differences(&one), [""; 0]);
        Ok(())
    }

    fn database(folder: &Path, host: Arc<dyn Host>) -> Result<Arc<Db>, crate::OpenError> {
        Ok(Arc::new(Db::create(folder, FolderLock::take(folder)?, host)?))
    }

    #[test]
    fn it_reads_in_slices_and_ends_between_two() -> Outcome {
        let folder = tempfile::tempdir()?;
        let db = database(folder.path(), Arc::new(ThisHost))?;
        db.write(|batch| {
            (0..5u8).try_for_each(|n| batch.set(Table::Data, &[n], Some(&vec![n; SLICE])))
        })?;
        let mut slices = 0;
        let mut count = || {
            slices += 1;
            Ok(())
        };
        assert!(db.view(|view| Ok(compute(view, &mut count)))?.is_ok());
        assert_eq!(slices, 5);
        let mut left = 3;
        let mut end = || {
            left -= 1;
            if left > 0 { Ok(()) } else { Err(Stop::GivenUp(CLOSING)) }
        };
        let ended = db.view(|view| Ok(compute(view, &mut end)))?;
        assert!(matches!(ended, Err(Stop::GivenUp(CLOSING))), "{ended:?}");
        assert_eq!(left, 0, "nothing is read after it");
        db.close();
        Ok(())
    }

    #[test]
    fn it_takes_neither_the_core_nor_the_disk_for_itself() {
        let ms = Duration::from_millis;
        assert_eq!(pause(ms(1)), ms(30), "32 MiB/s at most");
        assert_eq!(pause(ms(40)), ms(20), "a slow disk is not read without a pause");
        assert_eq!(pause(Duration::from_secs(60)), PAUSE_MAX);
        assert!(matches!(Pace::begin().rest(true), Err(Stop::GivenUp(CLOSING))));
        let mut old = Pace::begin();
        if let Some(begun) = old.begun.checked_sub(VIEW_MAX) {
            old.begun = begun;
            assert!(matches!(old.rest(false), Err(Stop::GivenUp(why)) if why.contains("too long")));
        }
        // All that there may be is read while the view is kept.
        let most = (3584 << 20) / SLICE;
        assert!(SLICE_TIME * u32::try_from(most).unwrap() < VIEW_MAX);
    }

    #[test]
    fn what_is_kept_and_what_runs_is_bounded() {
        let checksums = Arc::new(Checksums::default());
        let (first, second) = (checksums.reserve(1), checksums.reserve(2));
        assert!(first.is_some() && second.is_some());
        assert_eq!(checksums.running(), Some(2));
        assert!(checksums.reserve(3).is_none(), "two run");
        drop(second);
        assert!(matches!(checksums.get(2), Some(Checked::Failed(_))), "it was not finished");
        let mut fourth = checksums.reserve(4).unwrap();
        fourth.end = Some(Checked::Done(Checksum { revision: 7, tables: Vec::new() }));
        drop(fourth);
        assert!(matches!(checksums.get(4), Some(Checked::Done(sum)) if sum.revision == 7));
        assert_eq!(checksums.running(), Some(1));
        for index in 5..100 {
            checksums.reserve(index);
        }
        assert_eq!(checksums.results().len(), KEPT);
        assert_eq!(checksums.get(4), None);
        assert_eq!(checksums.get(1), Some(Checked::Running), "else one more could run");
        drop(first);
        assert_eq!(checksums.running(), None);
    }

    /// Runs work until it panics, as a thread does; or not at all, as a runtime that is ending.
    #[derive(Debug)]
    struct Failing {
        runs: bool,
    }

    #[async_trait]
    impl Host for Failing {
        async fn dial(&self, address: &str) -> io::Result<Connection> {
            ThisHost.dial(address).await
        }
        fn group_commit(&self, folder: &Path, sync: SyncNow) -> io::Result<Box<dyn GroupCommit>> {
            ThisHost.group_commit(folder, sync)
        }
        fn blocking(&self, work: Box<dyn FnOnce() + Send>) {
            if self.runs {
                // The panic is the thread's.
                drop(std::thread::spawn(work).join());
            }
        }
        fn free_bytes(&self, _: &Path) -> Option<u64> {
            None
        }
        fn boot_id(&self) -> String {
            String::new()
        }
    }

    #[tokio::test]
    async fn work_that_panics_or_never_runs_frees_its_slot() -> Outcome {
        for runs in [true, false] {
            let folder = tempfile::tempdir()?;
            let db = database(folder.path(), Arc::new(Failing { runs }))?;
            let checksums = Arc::new(Checksums::default());
            // One more than there is room for at once.
            for index in 0..=RUNNING_MAX as u64 {
                let slot = checksums.reserve(index).ok_or(format!("no room at {index}"))?;
                slot.run(&db, |_, _| panic!("of the test")).await;
                let ended = checksums.get(index);
                assert!(
                    matches!(&ended, Some(Checked::Failed(why)) if why.contains("in the middle")),
                    "{ended:?}"
                );
            }
            assert_eq!(checksums.running(), None);
            db.close();
        }
        Ok(())
    }

    #[tokio::test]
    async fn a_copy_that_cannot_be_read_is_at_fault_unless_it_is_being_closed() -> Outcome {
        let folder = tempfile::tempdir()?;
        let db = database(folder.path(), Arc::new(Failing { runs: true }))?;
        let checksums = Arc::new(Checksums::default());
        fn unreadable(_: &View<'_>, _: Between<'_>) -> Result<Checksum, Stop> {
            Err(Stop::Read(io::Error::new(io::ErrorKind::InvalidData, "Corruption: a block")))
        }
        let slot = checksums.reserve(1).ok_or("no room")?;
        slot.run(&db, unreadable).await;
        let ended = checksums.get(1);
        assert!(
            matches!(&ended, Some(Checked::Faulty(why)) if why.contains("Corruption: a block")),
            "{ended:?}"
        );
        // What passes is no damage.
        fn starved(_: &View<'_>, _: Between<'_>) -> Result<Checksum, Stop> {
            Err(Stop::Read(io::Error::other("IO error: Too many open files")))
        }
        let slot = checksums.reserve(3).ok_or("no room")?;
        slot.run(&db, starved).await;
        let ended = checksums.get(3);
        assert!(
            matches!(&ended, Some(Checked::Failed(why)) if why.contains("Too many open files")),
            "{ended:?}"
        );
        db.close();
        let slot = checksums.reserve(2).ok_or("no room")?;
        slot.begin(&db).await;
        assert_eq!(checksums.get(2), Some(Checked::Failed(CLOSING.to_owned())));
        Ok(())
    }
}
