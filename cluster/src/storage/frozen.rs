//! The database of a stopped member, looked at and not changed: not even the mark changes by which
//! the member sees, when it is opened the next time, whether a power loss took its unsynced tail.

use std::io;
use std::path::Path;

use rocksdb::DB;

use super::db::{LOG, STATE, io_error, look, open_error};
use super::families::{check, log_families, log_options, state_families, state_options};
use super::view::{LogView, View};
use crate::OpenError;

/// A member's databases that are only read. The folder must be locked meanwhile.
pub(crate) struct Frozen {
    log: DB,
    state: DB,
    /// The machine lost power since this database was last closed: the unsynced tail is gone.
    pub(crate) lost_tail: bool,
}

impl std::fmt::Debug for Frozen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frozen").field("lost_tail", &self.lost_tail).finish_non_exhaustive()
    }
}

impl Frozen {
    /// Opens them and reads all of it once, so that damage is found now. `boot`: of this machine, now.
    pub(crate) fn open(folder: &Path, boot: &str) -> Result<Self, OpenError> {
        let fail = |error: io::Error| open_error(folder, &error);
        // RocksDB would make a folder for its own log before it finds that there is none.
        for path in [folder.join(STATE), folder.join(LOG)] {
            if !path.join("CURRENT").exists() {
                return Err(OpenError::Unusable {
                    path,
                    detail: "is not there, or not whole: this node's copy is lost; recover another node, or restore a backup".to_owned(),
                });
            }
        }
        let opened = |options, part, families| {
            DB::open_cf_descriptors_read_only(&options, folder.join(part), families, false)
                .map_err(|error| fail(io_error(error)))
        };
        let state = opened(state_options(false), STATE, state_families())?;
        let log = opened(log_options(false), LOG, log_families())?;
        check(&log, &state).map_err(fail)?;
        let lost_tail = look(&log, folder, boot)?;
        Ok(Self { log, state, lost_tail })
    }

    /// Reads the state.
    pub(crate) fn view<T>(&self, f: impl FnOnce(&View<'_>) -> io::Result<T>) -> io::Result<T> {
        f(&View::of(&self.state)?)
    }

    /// Reads the log.
    pub(crate) fn log(&self) -> LogView<'_> {
        LogView(&self.log)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use async_trait::async_trait;

    use super::*;
    use crate::host::{Connection, GroupCommit, Host, SyncNow, ThisHost};
    use crate::machine::{Read, Table};
    use crate::storage::{Cf, Db, FolderLock};

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    /// This machine after it was started anew.
    #[derive(Debug)]
    struct Boot(&'static str);

    #[async_trait]
    impl Host for Boot {
        async fn dial(&self, address: &str) -> io::Result<Connection> {
            ThisHost.dial(address).await
        }
        fn group_commit(&self, folder: &Path, sync: SyncNow) -> io::Result<Box<dyn GroupCommit>> {
            ThisHost.group_commit(folder, sync)
        }
        fn blocking(&self, work: Box<dyn FnOnce() + Send>) {
            work();
        }
        fn free_bytes(&self, _: &Path) -> Option<u64> {
            None
        }
        fn boot_id(&self) -> String {
            self.0.to_owned()
        }
    }

    /// A copy of a running member's database: what its process leaves when it is killed.
    fn killed(folder: &Path) -> Result<(tempfile::TempDir, Frozen), Box<dyn std::error::Error>> {
        let copy = tempfile::tempdir()?;
        for part in [LOG, STATE] {
            std::fs::create_dir(copy.path().join(part))?;
            for entry in std::fs::read_dir(folder.join(part))? {
                let entry = entry?;
                std::fs::copy(entry.path(), copy.path().join(part).join(entry.file_name()))?;
            }
        }
        let frozen = Frozen::open(copy.path(), "one")?;
        Ok((copy, frozen))
    }

    #[test]
    fn what_the_log_brings_again_is_in_files_after_a_flush_alone() -> Outcome {
        let folder = tempfile::tempdir()?;
        let path = folder.path();
        let db = Db::create(path, FolderLock::take(path)?, Arc::new(Boot("one")))?;
        db.write_log(|batch| batch.put(Cf::Log, b"entry", b"1"))?;
        db.write(|batch| batch.set(Table::Data, b"a", Some(b"1")))?;
        let rows = |frozen: &Frozen| {
            let entry = frozen.log().get(Cf::Log, b"entry")?;
            frozen.view(|view| Ok((entry, view.get(Table::Data, b"a")?)))
        };
        let (_copy, frozen) = killed(path)?;
        assert_eq!(rows(&frozen)?, (Some(b"1".to_vec()), None));
        db.flush()?;
        let (_copy, frozen) = killed(path)?;
        assert_eq!(rows(&frozen)?, (Some(b"1".to_vec()), Some(b"1".to_vec())));
        // An end in order leaves nothing to be applied again.
        db.write(|batch| batch.set(Table::Data, b"a", Some(b"2")))?;
        db.close();
        let (_copy, frozen) = killed(path)?;
        assert_eq!(rows(&frozen)?.1, Some(b"2".to_vec()));
        Ok(())
    }

    /// A member that lost its tail and does not know it gives its vote a second time.
    #[test]
    fn to_look_at_a_member_does_not_hide_that_it_lost_its_tail() -> Outcome {
        let folder = tempfile::tempdir()?;
        let path = folder.path();
        let db = Db::create(path, FolderLock::take(path)?, Arc::new(Boot("one")))?;
        db.write(|batch| batch.set(Table::Data, b"a", Some(b"1")))?;
        db.flush()?;
        // The power goes: it is not closed.
        drop(db);
        for _ in 0..2 {
            let frozen = Frozen::open(path, "two")?;
            assert!(frozen.lost_tail);
            let row = frozen.view(|view| view.get(Table::Data, b"a"))?;
            assert_eq!(row.as_deref(), Some(b"1".as_slice()));
        }
        let db = Db::open(path, FolderLock::take(path)?, Arc::new(Boot("two")))?;
        assert!(db.lost_tail);
        db.close();
        drop(db);
        assert!(Frozen::open(path, "two")?.lost_tail, "it was closed, and has heard nothing yet");
        let db = Db::open(path, FolderLock::take(path)?, Arc::new(Boot("two")))?;
        assert!(db.lost_tail);
        db.tail_is_back()?;
        db.close();
        drop(db);
        assert!(!Frozen::open(path, "three")?.lost_tail, "it was closed");
        let none = tempfile::tempdir()?;
        assert!(Frozen::open(none.path(), "one").is_err());
        assert_eq!(std::fs::read_dir(none.path())?.count(), 0, "it makes none");
        Ok(())
    }
}
