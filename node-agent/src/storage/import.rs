//! An image on its way in: written to a hidden file, hashed, synced, then linked to its name.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

use super::StorageError;
use super::pool::{Pool, sync_folder};

/// What is known of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Name in the pool.
    pub name: String,
    /// kernel | initrd | firmware | disk; empty where nobody said.
    #[serde(default)]
    pub kind: String,
    /// Bytes, as a reader sees them.
    pub size_bytes: u64,
    /// SHA-256 at the import, hexadecimal; empty for files that were not imported and for disks
    /// that were written since.
    #[serde(default)]
    pub sha256: String,
    /// The file's modification time at the import, nanoseconds; the digest holds while it does.
    #[serde(default)]
    modified_ns: i128,
}

impl ImageInfo {
    /// What the folder knows about a file; none where it vanished.
    pub(super) fn read(folder: &Path, name: &str) -> Option<Self> {
        let found = fs::metadata(folder.join(name)).ok()?;
        let recorded = fs::read(Self::record_path(folder, name)).ok();
        let recorded: Option<Self> = recorded.and_then(|text| serde_json::from_slice(&text).ok());
        let mut info = recorded.unwrap_or_else(|| Self {
            name: String::new(),
            kind: String::new(),
            size_bytes: 0,
            sha256: String::new(),
            modified_ns: 0,
        });
        if info.modified_ns != modified_ns(&found) || info.size_bytes != found.len() {
            info.sha256.clear();
        }
        info.name = name.to_owned();
        info.size_bytes = found.len();
        Some(info)
    }

    pub(super) fn forget(folder: &Path, name: &str) {
        // A record left behind is harmless: its time will not match another file's.
        let _ = fs::remove_file(Self::record_path(folder, name));
    }

    fn record_path(folder: &Path, name: &str) -> PathBuf {
        folder.join(format!(".{name}.json"))
    }
}

fn modified_ns(found: &fs::Metadata) -> i128 {
    i128::from(found.mtime()) * 1_000_000_000 + i128::from(found.mtime_nsec())
}

/// An import under way. Dropped before [`Import::commit`], it leaves nothing behind.
#[derive(Debug)]
pub struct Import {
    folder: PathBuf,
    image: String,
    reference: String,
    expected_bytes: Option<u64>,
    temporary: PathBuf,
    target: PathBuf,
    file: File,
    written_bytes: u64,
    digest: DigestContext,
}

/// `ring`'s context has no `Debug`.
struct DigestContext(Context);

impl std::fmt::Debug for DigestContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sha256")
    }
}

impl Import {
    pub(super) fn begin(
        pool: &Pool,
        image: &str,
        expected_bytes: Option<u64>,
    ) -> Result<Self, StorageError> {
        let target = pool.image_path(image)?;
        let reference = pool.reference(image);
        if fs::symlink_metadata(&target).is_ok() {
            return Err(StorageError::Exists(reference));
        }
        let temporary = pool.folder().join(format!(".import-{}", uuid::Uuid::new_v4()));
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o640)
            .open(&temporary)
            .map_err(StorageError::io("creating", &temporary))?;
        Ok(Self {
            folder: pool.folder().to_owned(),
            image: image.to_owned(),
            reference,
            expected_bytes,
            temporary,
            target,
            file,
            written_bytes: 0,
            digest: DigestContext(Context::new(&SHA256)),
        })
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// More than was announced, or the system's (a full file system, say).
    pub fn write(&mut self, data: &[u8]) -> Result<(), StorageError> {
        let after = self.written_bytes.saturating_add(data.len() as u64);
        if let Some(expected) = self.expected_bytes.filter(|expected| after > *expected) {
            return Err(self.refuse(format!("more than the announced {expected} bytes came")));
        }
        self.file.write_all(data).map_err(StorageError::io("writing", &self.temporary))?;
        self.digest.0.update(data);
        self.written_bytes = after;
        Ok(())
    }

    /// Ends the import: checks length and digest, makes it durable, and gives it its name.
    /// `sha256` is what the sender says (hexadecimal); empty: not said.
    ///
    /// # Errors
    /// [`StorageError::Import`] on a difference, [`StorageError::Exists`] if the name was taken
    /// meanwhile, or the system's. Nothing is left behind then.
    pub fn commit(mut self, kind: &str, sha256: &str) -> Result<ImageInfo, StorageError> {
        if let Some(expected) = self.expected_bytes.filter(|bytes| *bytes != self.written_bytes) {
            let came = self.written_bytes;
            return Err(self.refuse(format!("{came} of the announced {expected} bytes came")));
        }
        let digest = hex(self.digest.0.clone().finish().as_ref());
        if !sha256.is_empty() && !sha256.eq_ignore_ascii_case(&digest) {
            return Err(self.refuse(format!("its SHA-256 is {digest}, {sha256} was announced")));
        }
        let found = self.publish()?;
        let info = ImageInfo {
            name: self.image.clone(),
            kind: kind.to_owned(),
            size_bytes: found.len(),
            sha256: digest,
            modified_ns: modified_ns(&found),
        };
        self.record(&info)?;
        Ok(info)
    }

    /// Gives the file a length without writing it.
    pub(super) fn set_sparse_length(&mut self, size_bytes: u64) -> Result<(), StorageError> {
        self.file.set_len(size_bytes).map_err(StorageError::io("sizing", &self.temporary))
    }

    /// Syncs, then links the file to its name, which must be free. A hard link refuses a taken
    /// name, where a rename would replace it; file systems without links get the rename.
    pub(super) fn publish(&mut self) -> Result<fs::Metadata, StorageError> {
        self.file.sync_all().map_err(StorageError::io("syncing", &self.temporary))?;
        match fs::hard_link(&self.temporary, &self.target) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(StorageError::Exists(self.reference.clone()));
            }
            Err(_) => fs::rename(&self.temporary, &self.target)
                .map_err(StorageError::io("naming", &self.target))?,
        }
        sync_folder(&self.folder)?;
        self.file.metadata().map_err(StorageError::io("reading", &self.target))
    }

    /// Keeps kind and digest beside the image. Replaced by rename, so it is whole.
    fn record(&self, info: &ImageInfo) -> Result<(), StorageError> {
        let path = ImageInfo::record_path(&self.folder, &self.image);
        let draft = self.folder.join(format!(".record-{}", uuid::Uuid::new_v4()));
        let text = serde_json::to_vec(info).unwrap_or_default();
        fs::write(&draft, text)
            .and_then(|()| fs::rename(&draft, &path))
            .map_err(StorageError::io("writing", &path))
    }

    fn refuse(&self, reason: String) -> StorageError {
        StorageError::Import { image: self.reference.clone(), reason }
    }
}

impl Drop for Import {
    fn drop(&mut self) {
        // Already gone after a rename; what cannot be removed is a hidden file, never an image.
        let _ = fs::remove_file(&self.temporary);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use proto::record::{PoolKind, PoolRecord};

    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::storage::Pools;

    fn record(kind: PoolKind, path: &Path) -> PoolRecord {
        let path = path.to_str().unwrap().to_owned();
        PoolRecord { name: "shared".parse().unwrap(), kind, path }
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn an_image_appears_whole() {
        let folder = tempfile::tempdir().unwrap();
        let pool = Pool::initialise(&record(PoolKind::SharedDir, folder.path())).unwrap();
        let mut import = pool.import("vmlinuz", Some(6)).unwrap();
        import.write(b"abc").unwrap();
        assert!(pool.images().unwrap().is_empty(), "seen before it is whole");
        import.write(b"def").unwrap();
        let info = import.commit("kernel", "").unwrap();
        assert_eq!(info.sha256, "bef57ec7f53a6d40beb640a780a639c83bc29ac8a9816f1fc6c5c6dcd93c4721");
        assert_eq!(pool.images().unwrap(), vec![info]);
        fs::write(pool.existing("vmlinuz").unwrap(), b"changed").unwrap();
        assert_eq!(pool.images().unwrap()[0].sha256, "", "a digest of other content");
    }

    #[test]
    fn what_is_not_whole_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let pool = Pool::initialise(&record(PoolKind::SharedDir, folder.path())).unwrap();
        let before = names(folder.path());
        let mut short = pool.import("a", Some(6)).unwrap();
        short.write(b"abc").unwrap();
        assert!(short.commit("disk", "").unwrap_err().to_string().contains("3 of the announced 6"));
        let mut long = pool.import("a", Some(2)).unwrap();
        assert!(long.write(b"abc").unwrap_err().to_string().contains("more than"));
        drop(long);
        let mut other = pool.import("a", None).unwrap();
        other.write(b"abc").unwrap();
        assert!(other.commit("disk", "00").unwrap_err().to_string().contains("SHA-256"));
        assert_eq!(names(folder.path()), before);
    }

    #[test]
    fn a_taken_name_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let pool = Pool::initialise(&record(PoolKind::SharedDir, folder.path())).unwrap();
        let mut late = pool.import("a", None).unwrap();
        late.write(b"late").unwrap();
        let mut first = pool.import("a", None).unwrap();
        first.write(b"first").unwrap();
        first.commit("", "").unwrap();
        assert!(matches!(late.commit("", ""), Err(StorageError::Exists(_))));
        assert_eq!(fs::read(folder.path().join("a")).unwrap(), b"first");
        assert!(matches!(pool.import("a", None), Err(StorageError::Exists(_))));
    }

    #[test]
    fn nothing_leaves_the_pool() {
        let folder = tempfile::tempdir().unwrap();
        let pool = Pool::initialise(&record(PoolKind::SharedDir, folder.path())).unwrap();
        for name in ["..", "../x", "a/b", "/etc/passwd", ".hidden", "", "a\0b"] {
            assert!(pool.existing(name).is_err(), "{name:?}");
            assert!(pool.import(name, None).is_err(), "{name:?}");
            assert!(pool.create_disk(name, 512).is_err(), "{name:?}");
        }
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("link")).unwrap();
        assert!(matches!(pool.existing("link"), Err(StorageError::NotAFile { .. })));
        let path = folder.path().join("../other");
        assert!(matches!(
            Pool::open(&record(PoolKind::LocalDir, &path)),
            Err(StorageError::BadPath(_))
        ));
    }

    #[test]
    fn an_unmounted_share_is_noticed_before_a_disk_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let pools = Pools::new(vec![record(PoolKind::SharedDir, folder.path())]);
        let error = pools.ensure_disk("shared/web.raw", 1 << 20).unwrap_err();
        assert!(matches!(error, StorageError::NotMounted { .. }), "{error}");
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn disks_are_sparse_and_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let pools = Pools::new(vec![record(PoolKind::LocalDir, folder.path())]);
        let path = pools.ensure_disk("shared/web.raw", 1 << 30).unwrap();
        let found = fs::metadata(&path).unwrap();
        assert_eq!(found.len(), 1 << 30);
        assert!(found.blocks() * 512 < 1 << 20, "not sparse");
        let disk = fs::File::options().read(true).write(true).open(&path).unwrap();
        disk.write_all_at(b"guest data", 0).unwrap();
        assert_eq!(pools.ensure_disk("shared/web.raw", 1 << 30).unwrap(), path);
        let mut kept = [0; 10];
        disk.read_exact_at(&mut kept, 0).unwrap();
        assert_eq!(&kept, b"guest data");
        // Grown is fine; cut off is not.
        assert_eq!(pools.ensure_disk("shared/web.raw", 1 << 20).unwrap(), path);
        for (length, size) in [((1 << 30) - 512, 1 << 30), (1000, 512)] {
            disk.set_len(length).unwrap();
            let error = pools.ensure_disk("shared/web.raw", size).unwrap_err();
            assert!(matches!(error, StorageError::DiskLength { .. }), "{error}");
        }
        assert!(matches!(pools.existing("shared/none"), Err(StorageError::MissingImage { .. })));
        assert!(matches!(pools.existing("other/x"), Err(StorageError::UnknownPool(_))));
    }
}
