//! Checksums of the whole state machine at one place of the log, for members to compare.
//!
//! A log entry ([`Command::Check`](crate::machine::Command::Check)) names the place: each member
//! applies it, takes a view of the database right there (a moment), and reads that view through in
//! a thread of its own, while later entries are applied. So all read exactly the same state,
//! history and bookkeeping included, however far each is by then, and no write waits.
//!
//! Never: a checksum of a state that was reached by a snapshot past the entry, or one kept over a
//! restart. Such a member says that it has none.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

use crate::machine::{Table, revision};
use crate::storage::{Db, View};

/// Results that are kept.
const KEPT: usize = 8;
/// Computed side by side, at most: a member that catches up on a long log meets many.
const RUNNING_MAX: usize = 2;
/// Rows between two looks whether the database is to be closed.
const ROWS: usize = 256;

/// What a member answers when its checksum is asked for. On the wire (postcard).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Checked {
    /// It has none for that place; it has applied the log up to here.
    Absent { applied: u64 },
    /// It is being computed.
    Running,
    /// Computed.
    Done(Checksum),
    /// It could not be computed.
    Failed(String),
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

    /// Before the entry is applied: from here on the place is known. False: there is no room.
    pub(super) fn reserve(&self, index: u64) -> bool {
        let mut results = self.results();
        let running = results.values().filter(|state| **state == Checked::Running).count();
        let room = running < RUNNING_MAX;
        let state = if room {
            Checked::Running
        } else {
            Checked::Failed("it is still busy with earlier checks".to_owned())
        };
        results.insert(index, state);
        while results.len() > KEPT {
            results.pop_first();
        }
        room
    }

    /// After the entry is applied, and before the next one is: returns once the view is taken.
    pub(super) async fn begin(self: &Arc<Self>, db: &Arc<Db>, index: u64, slot: bool) {
        if !slot {
            return;
        }
        let me = self.clone();
        let (tell, taken) = tokio::sync::oneshot::channel();
        let reading = db.clone();
        db.host().blocking(Box::new(move || {
            let computed = reading.view(|view| {
                // Nobody waits any more where Raft is ending.
                let _ = tell.send(());
                compute(view, &|| reading.is_closing())
            });
            me.end(index, computed);
        }));
        // An error: the database is closed, there was no view to take.
        let _ = taken.await;
    }

    fn end(&self, index: u64, computed: io::Result<Checksum>) {
        let state = match computed {
            Ok(checksum) => Checked::Done(checksum),
            Err(error) => {
                tracing::error!(index, %error, "the state could not be read for its checksum");
                Checked::Failed(format!("its copy cannot be read: {error}"))
            }
        };
        if let Some(kept) = self.results().get_mut(&index) {
            *kept = state;
        }
    }
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
fn compute(view: &View<'_>, ended: &dyn Fn() -> bool) -> io::Result<Checksum> {
    let mut tables = Vec::new();
    for table in Table::ALL {
        let mut sum = Context::new(&SHA256);
        for (count, row) in view.all_rows(table)?.enumerate() {
            if count % ROWS == 0 && ended() {
                return Err(io::Error::other("the database is being closed"));
            }
            let (key, value) = row?;
            for part in [key.as_slice(), &value] {
                sum.update(&(part.len() as u64).to_le_bytes());
                sum.update(part);
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
    use super::*;
    use crate::host::ThisHost;
    use crate::storage::FolderLock;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    fn sum(rows: &[(Table, &[u8], &[u8])]) -> Result<Checksum, Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        let db = Db::create(folder.path(), FolderLock::take(folder.path())?, Arc::new(ThisHost))?;
        db.write(|batch| {
            rows.iter().try_for_each(|(table, key, value)| batch.set(*table, key, Some(value)))
        })?;
        let computed = db.view(|view| compute(view, &|| false))?;
        db.close();
        Ok(computed)
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

    #[test]
    fn it_ends_when_the_database_is_to_be_closed() -> Outcome {
        let folder = tempfile::tempdir()?;
        let db = Db::create(folder.path(), FolderLock::take(folder.path())?, Arc::new(ThisHost))?;
        db.write(|batch| batch.set(Table::Data, b"a", Some(b"1")))?;
        let computed = db.view(|view| compute(view, &|| true));
        assert!(computed.is_err_and(|error| error.to_string().contains("closed")));
        db.close();
        Ok(())
    }

    #[test]
    fn what_is_kept_and_what_runs_is_bounded() {
        let checksums = Checksums::default();
        assert!(checksums.reserve(1) && checksums.reserve(2));
        assert_eq!(checksums.running(), Some(2));
        assert!(!checksums.reserve(3), "two run");
        checksums.end(2, Err(io::Error::other("x")));
        assert!(checksums.reserve(4));
        checksums.end(4, Ok(Checksum { revision: 7, tables: Vec::new() }));
        assert!(matches!(checksums.get(4), Some(Checked::Done(sum)) if sum.revision == 7));
        assert_eq!(checksums.running(), Some(1));
        for index in 5..100 {
            checksums.reserve(index);
        }
        assert_eq!(checksums.get(1), None);
        assert_eq!(checksums.results().len(), KEPT);
    }
}
