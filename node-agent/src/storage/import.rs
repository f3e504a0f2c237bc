//! An image on its way in: written to a hidden file, hashed, synced, then linked to its name.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

use super::pool::{Pool, sync_folder};
use super::{Content, ImageKind, StorageError};

/// What is known of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Name in the pool.
    pub name: String,
    /// kernel | initrd | firmware | disk: as it was imported, else as its content tells; empty
    /// where that tells nothing.
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
            // Guests write disks; anything else that has changed is another file by that name.
            if info.kind != ImageKind::Disk.word() {
                info.kind.clear();
            }
        }
        info.name = name.to_owned();
        info.size_bytes = found.len();
        Some(info)
    }

    /// As [`ImageInfo::read`], with the kind that the content tells where none is recorded.
    pub(super) fn look(folder: &Path, name: &str) -> Option<Self> {
        let mut info = Self::read(folder, name)?;
        if info.kind.is_empty() {
            let content = File::open(folder.join(name)).and_then(|file| Content::of(&file));
            let kind = content.ok().and_then(Content::kind);
            info.kind = kind.map(|kind| kind.word().to_owned()).unwrap_or_default();
        }
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
            .read(true)
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

    /// Ends the import: checks length, digest and kind, makes it durable, and gives it its name.
    /// `kind` and `sha256` (hexadecimal) are what the sender says; none and empty: not said.
    ///
    /// # Errors
    /// [`StorageError::Import`] on a difference, [`StorageError::Exists`] if the name was taken
    /// meanwhile, or the system's. Nothing is left behind then.
    pub fn commit(
        mut self,
        kind: Option<ImageKind>,
        sha256: &str,
    ) -> Result<ImageInfo, StorageError> {
        if let Some(expected) = self.expected_bytes.filter(|bytes| *bytes != self.written_bytes) {
            let came = self.written_bytes;
            return Err(self.refuse(format!("{came} of the announced {expected} bytes came")));
        }
        let digest = hex(self.digest.0.clone().finish().as_ref());
        if !sha256.is_empty() && !sha256.eq_ignore_ascii_case(&digest) {
            return Err(self.refuse(format!("its SHA-256 is {digest}, {sha256} was announced")));
        }
        let kind = self.kind(kind)?;
        self.publish(kind, digest)
    }

    /// What the image is: as was said, if its content does not speak against it, else as that
    /// tells.
    fn kind(&self, said: Option<ImageKind>) -> Result<ImageKind, StorageError> {
        let content =
            Content::of(&self.file).map_err(StorageError::io("reading", &self.temporary))?;
        let kind = said.or_else(|| content.kind()).ok_or_else(|| {
            let why = "its content does not tell what it is: say it with --kind kernel, initrd, \
                       firmware or disk";
            self.refuse(why.to_owned())
        })?;
        content.check(kind, self.written_bytes).map_err(|reason| self.refuse(reason))?;
        Ok(kind)
    }

    /// Gives the file a length without writing it.
    pub(super) fn set_sparse_length(&mut self, size_bytes: u64) -> Result<(), StorageError> {
        self.file.set_len(size_bytes).map_err(StorageError::io("sizing", &self.temporary))
    }

    /// Makes it durable under its name, and records what it is.
    pub(super) fn publish(
        &mut self,
        kind: ImageKind,
        sha256: String,
    ) -> Result<ImageInfo, StorageError> {
        let found = self.link()?;
        let info = ImageInfo {
            name: self.image.clone(),
            kind: kind.word().to_owned(),
            size_bytes: found.len(),
            sha256,
            modified_ns: modified_ns(&found),
        };
        self.record(&info)?;
        Ok(info)
    }

    /// Syncs, then links the file to its name, which must be free. A hard link refuses a taken
    /// name, where a rename would replace it; file systems without links get the rename.
    fn link(&mut self) -> Result<fs::Metadata, StorageError> {
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

    const DISK: Option<ImageKind> = Some(ImageKind::Disk);

    fn import(
        pool: &Pool,
        name: &str,
        data: &[u8],
        kind: Option<ImageKind>,
    ) -> Result<ImageInfo, StorageError> {
        let mut import = pool.import(name, None).unwrap();
        import.write(data).unwrap();
        import.commit(kind, "")
    }

    #[test]
    fn a_kind_is_what_was_said_unless_the_content_is_something_else() {
        let folder = tempfile::tempdir().unwrap();
        let pool = Pool::initialise(&record(PoolKind::SharedDir, folder.path())).unwrap();
        let before = names(folder.path());
        for (data, kind, reason) in [
            (&b"\x7fELF"[..], DISK, "a kernel, not a raw disk"),
            (b"QFI\xfb", DISK, "qemu-img convert"),
            (b"070701", Some(ImageKind::Kernel), "not a kernel"),
            (b"who knows", None, "--kind"),
        ] {
            let error = import(&pool, "a", data, kind).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        assert_eq!(names(folder.path()), before);
        assert_eq!(import(&pool, "kernel", b"\x7fELF", None).unwrap().kind, "kernel");
        assert_eq!(import(&pool, "initrd", b"070701", None).unwrap().kind, "initrd");
        assert_eq!(import(&pool, "disk", &[0; 512], DISK).unwrap().kind, "disk");
        let listed: Vec<_> = pool.images().unwrap().into_iter().map(|info| info.kind).collect();
        assert_eq!(listed, ["disk", "initrd", "kernel"]);
    }

    #[test]
    fn an_image_is_used_as_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let shared = record(PoolKind::SharedDir, folder.path());
        let pool = Pool::initialise(&shared).unwrap();
        import(&pool, "kernel", b"\x7fELF", None).unwrap();
        import(&pool, "disk", &[0; 512], DISK).unwrap();
        // Put there by hand.
        fs::write(folder.path().join("copied"), b"070701").unwrap();
        let pools = Pools::new(vec![shared]);
        for (image, kind) in [
            ("shared/kernel", ImageKind::Kernel),
            ("shared/disk", ImageKind::Disk),
            ("shared/copied", ImageKind::Initrd),
        ] {
            assert!(pools.existing_as(image, kind).is_ok(), "{image}");
            let all = [ImageKind::Kernel, ImageKind::Initrd, ImageKind::Firmware, ImageKind::Disk];
            for other in all.into_iter().filter(|other| *other != kind) {
                let error = pools.existing_as(image, other).unwrap_err();
                assert!(matches!(error, StorageError::WrongKind { .. }), "{image}: {error}");
            }
        }
        // What a guest writes to its disk is its own business.
        fs::write(folder.path().join("disk"), b"\x7fELF").unwrap();
        assert!(pools.existing_as("shared/disk", ImageKind::Disk).is_ok());
        let made = pools.ensure_disk("shared/made", 512).unwrap();
        fs::write(made, b"070701").unwrap();
        assert!(pools.existing_as("shared/made", ImageKind::Disk).is_ok());
        assert!(pools.existing_as("shared/made", ImageKind::Initrd).is_err());
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
        let mut import = pool.import("initrd", Some(6)).unwrap();
        import.write(b"abc").unwrap();
        assert!(pool.images().unwrap().is_empty(), "seen before it is whole");
        import.write(b"def").unwrap();
        let info = import.commit(Some(ImageKind::Initrd), "").unwrap();
        assert_eq!(info.sha256, "bef57ec7f53a6d40beb640a780a639c83bc29ac8a9816f1fc6c5c6dcd93c4721");
        assert_eq!(pool.images().unwrap(), vec![info]);
        fs::write(pool.existing("initrd").unwrap(), b"\x7fELF is another file").unwrap();
        let info = &pool.images().unwrap()[0];
        assert_eq!(info.sha256, "", "a digest of other content");
        assert_eq!(info.kind, "kernel", "the kind of other content");
    }

    #[test]
    fn what_is_not_whole_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let pool = Pool::initialise(&record(PoolKind::SharedDir, folder.path())).unwrap();
        let before = names(folder.path());
        let mut short = pool.import("a", Some(6)).unwrap();
        short.write(b"abc").unwrap();
        assert!(short.commit(DISK, "").unwrap_err().to_string().contains("3 of the announced 6"));
        let mut long = pool.import("a", Some(2)).unwrap();
        assert!(long.write(b"abc").unwrap_err().to_string().contains("more than"));
        drop(long);
        let mut other = pool.import("a", None).unwrap();
        other.write(b"abc").unwrap();
        assert!(other.commit(DISK, "00").unwrap_err().to_string().contains("SHA-256"));
        assert_eq!(names(folder.path()), before);
    }

    #[test]
    fn a_taken_name_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let pool = Pool::initialise(&record(PoolKind::SharedDir, folder.path())).unwrap();
        let mut late = pool.import("a", None).unwrap();
        late.write(&[1; 512]).unwrap();
        let mut first = pool.import("a", None).unwrap();
        first.write(&[2; 512]).unwrap();
        first.commit(DISK, "").unwrap();
        assert!(matches!(late.commit(DISK, ""), Err(StorageError::Exists(_))));
        assert_eq!(fs::read(folder.path().join("a")).unwrap(), [2; 512]);
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
