//! The state as it was at one moment, beside the one that goes on: its files under a second name.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rocksdb::DB;

use super::db::io_error;
use super::families::{state_families, state_options};
use super::view::View;

/// A state that does not change any more. Dropping it removes its files' second names.
pub(crate) struct Checkpoint {
    rocks: Option<DB>,
    folder: PathBuf,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint").field("folder", &self.folder).finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Takes one of a state's database in a new folder below `parent`, which must be on the same
    /// file system. What is in memory only is written out first.
    pub(super) fn take(rocks: &DB, parent: &Path) -> io::Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(parent)?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = parent.join(format!("sending-{}-{number}", std::process::id()));
        // From here on it is removed, however far it comes.
        let mut taken = Self { rocks: None, folder };
        let checkpoint = rocksdb::checkpoint::Checkpoint::new(rocks).map_err(io_error)?;
        checkpoint.create_checkpoint(&taken.folder).map_err(io_error)?;
        let (options, families) = (state_options(false), state_families());
        let opened = DB::open_cf_descriptors_read_only(&options, &taken.folder, families, false);
        taken.rocks = Some(opened.map_err(io_error)?);
        Ok(taken)
    }

    /// Reads from it.
    pub(crate) fn view<T>(&self, f: impl FnOnce(&View<'_>) -> io::Result<T>) -> io::Result<T> {
        match &self.rocks {
            Some(rocks) => f(&View::of(rocks)?),
            None => Err(io::Error::other("the checkpoint was not taken")),
        }
    }
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        drop(self.rocks.take());
        if let Err(error) = fs::remove_dir_all(&self.folder)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, folder = %self.folder.display(), "a checkpoint is left until the next start");
        }
    }
}
