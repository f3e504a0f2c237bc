//! One pool's folder: its marker, the images in it, and raw disks made sparse.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use nix::sys::statvfs::statvfs;
use proto::record::{PoolKind, PoolRecord};
use proto::{Name, parse_image};

use super::{Content, ImageInfo, ImageKind, Import, StorageError};

/// Proves that a folder is the pool's: holds the pool's name.
const MARKER: &str = ".holdfast-pool";

/// All pools of the cluster, as this node sees them.
#[derive(Debug, Clone, Default)]
pub struct Pools(Vec<PoolRecord>);

impl Pools {
    /// The pools of these records.
    #[must_use]
    pub fn new(records: Vec<PoolRecord>) -> Self {
        Self(records)
    }

    /// Opens a pool's folder on this node.
    ///
    /// # Errors
    /// [`StorageError::UnknownPool`], or those of [`Pool::open`].
    pub fn open(&self, name: &Name) -> Result<Pool, StorageError> {
        let record = self.0.iter().find(|record| record.name == *name);
        Pool::open(record.ok_or_else(|| StorageError::UnknownPool(name.clone()))?)
    }

    /// The path of an image that must be there, given as `pool/name`.
    ///
    /// # Errors
    /// [`StorageError::MissingImage`] with the path it was looked for at, and those of `open`.
    pub fn existing(&self, image: &str) -> Result<PathBuf, StorageError> {
        let (pool, name) = parse_image(image)?;
        self.open(&pool)?.existing(name)
    }

    /// As [`Pools::existing`], of an image that can be used as `kind`.
    ///
    /// # Errors
    /// [`StorageError::WrongKind`] with what it is, and those of `existing`.
    pub fn existing_as(&self, image: &str, kind: ImageKind) -> Result<PathBuf, StorageError> {
        let (pool, name) = parse_image(image)?;
        self.open(&pool)?.existing_as(name, kind)
    }

    /// The path of a raw disk, made (sparse, zeroed, durable) if it is not there.
    ///
    /// # Errors
    /// As [`Pools::open`]; [`StorageError::Io`] if the file system refuses.
    pub fn ensure_disk(&self, image: &str, size_bytes: u64) -> Result<PathBuf, StorageError> {
        let (pool, name) = parse_image(image)?;
        self.open(&pool)?.ensure_disk(name, size_bytes)
    }

    /// Whether every node sees the same content under this `pool/name`.
    ///
    /// # Errors
    /// [`StorageError::UnknownPool`] or a malformed reference.
    pub fn is_shared(&self, image: &str) -> Result<bool, StorageError> {
        let (pool, _) = parse_image(image)?;
        let record = self.0.iter().find(|record| record.name == pool);
        Ok(record.ok_or(StorageError::UnknownPool(pool))?.kind == PoolKind::SharedDir)
    }
}

/// Space of a pool's file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolUsage {
    /// All of it, bytes.
    pub capacity_bytes: u64,
    /// What an unprivileged process may still use, bytes.
    pub free_bytes: u64,
}

/// A pool's folder on this node, proven by its marker.
#[derive(Debug, Clone)]
pub struct Pool {
    name: Name,
    path: PathBuf,
}

impl Pool {
    /// Whether a new pool's folder is there already.
    ///
    /// # Errors
    /// [`StorageError::NoFolder`] if it is not, [`StorageError::BadPath`] if it cannot be.
    pub fn check_folder(record: &PoolRecord) -> Result<(), StorageError> {
        let path = checked_path(&record.path)?;
        if path.is_dir() { Ok(()) } else { Err(StorageError::NoFolder { path }) }
    }

    /// Makes the folder and its marker: for the node that creates the pool. Doing it again is
    /// fine.
    ///
    /// # Errors
    /// [`StorageError::BadPath`], [`StorageError::OtherPool`], or the system's.
    pub fn initialise(record: &PoolRecord) -> Result<Self, StorageError> {
        let path = checked_path(&record.path)?;
        fs::create_dir_all(&path).map_err(StorageError::io("creating", &path))?;
        match read_marker(&path)? {
            Some(other) if other != record.name.as_str() => {
                return Err(StorageError::OtherPool { path, other });
            }
            Some(_) => {}
            None => write_marker(&path, &record.name)?,
        }
        Ok(Self { name: record.name.clone(), path })
    }

    /// Opens the folder. A local pool's folder is made where missing; a shared one must carry
    /// the marker, or it is a mount point without its mount.
    ///
    /// # Errors
    /// [`StorageError::NotMounted`], [`StorageError::OtherPool`], [`StorageError::BadPath`], or
    /// the system's.
    pub fn open(record: &PoolRecord) -> Result<Self, StorageError> {
        if record.kind == PoolKind::LocalDir {
            return Self::initialise(record);
        }
        let path = checked_path(&record.path)?;
        match read_marker(&path)? {
            Some(name) if name == record.name.as_str() => {
                Ok(Self { name: record.name.clone(), path })
            }
            Some(other) => Err(StorageError::OtherPool { path, other }),
            None => Err(StorageError::NotMounted { pool: record.name.clone(), path }),
        }
    }

    /// The pool's name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The path of an image that must be there.
    ///
    /// # Errors
    /// [`StorageError::MissingImage`] or [`StorageError::NotAFile`].
    pub fn existing(&self, image: &str) -> Result<PathBuf, StorageError> {
        let path = self.image_path(image)?;
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_file() || found.file_type().is_block_device() => Ok(path),
            Ok(_) => Err(StorageError::NotAFile { image: self.reference(image), path }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(StorageError::MissingImage { image: self.reference(image), path })
            }
            Err(error) => Err(StorageError::io("reading", path)(error)),
        }
    }

    /// As [`Pool::existing`], of an image that can be used as `kind`: as it was imported, else as
    /// its content says.
    ///
    /// # Errors
    /// [`StorageError::WrongKind`], and those of `existing`.
    pub fn existing_as(&self, image: &str, used_as: ImageKind) -> Result<PathBuf, StorageError> {
        let path = self.existing(image)?;
        let recorded = ImageInfo::read(&self.path, image).map(|info| info.kind).unwrap_or_default();
        let judged = match recorded.parse::<ImageKind>() {
            Ok(kind) if kind == used_as => Ok(()),
            Ok(kind) => Err(format!("it was imported as {kind}")),
            Err(_) => {
                let file = File::open(&path).map_err(StorageError::io("opening", &path))?;
                let found = file.metadata().map_err(StorageError::io("reading", &path))?;
                if !found.is_file() {
                    // A block device: whatever it holds is its guest's.
                    return Ok(path);
                }
                let content = Content::of(&file).map_err(StorageError::io("reading", &path))?;
                content.check(used_as, found.len())
            }
        };
        let image = || self.reference(image);
        judged.map_err(|reason| StorageError::WrongKind { image: image(), used_as, reason })?;
        Ok(path)
    }

    /// The path of a raw disk, made (sparse, zeroed, durable) if it is not there.
    ///
    /// # Errors
    /// [`StorageError::DiskLength`] if it is there and cannot be whole, or the system's.
    pub fn ensure_disk(&self, image: &str, size_bytes: u64) -> Result<PathBuf, StorageError> {
        let path = match self.existing(image) {
            Err(StorageError::MissingImage { .. }) => match self.create_disk(image, size_bytes) {
                Err(StorageError::Exists(_)) => self.existing(image)?,
                made => return made,
            },
            known => known?,
        };
        self.check_length(image, path, size_bytes)
    }

    /// A disk that is shorter than its document says would lose what the guest kept at its end.
    /// A longer one has been grown behind the document's back, and loses nothing.
    fn check_length(
        &self,
        image: &str,
        path: PathBuf,
        size_bytes: u64,
    ) -> Result<PathBuf, StorageError> {
        let metadata = fs::metadata(&path).map_err(StorageError::io("reading", path.clone()))?;
        let found_bytes = metadata.len();
        if metadata.is_file() && (found_bytes < size_bytes || !found_bytes.is_multiple_of(512)) {
            let image = self.reference(image);
            return Err(StorageError::DiskLength { image, path, found_bytes, size_bytes });
        }
        Ok(path)
    }

    /// Makes a raw disk: sparse, zeroed, durable when this returns.
    ///
    /// # Errors
    /// [`StorageError::Exists`], or the system's; then nothing is left behind.
    pub fn create_disk(&self, image: &str, size_bytes: u64) -> Result<PathBuf, StorageError> {
        let path = self.image_path(image)?;
        let mut import = Import::begin(self, image, Some(size_bytes))?;
        import.set_sparse_length(size_bytes)?;
        import.publish(ImageKind::Disk, String::new())?;
        Ok(path)
    }

    /// Begins to import an image.
    ///
    /// # Errors
    /// [`StorageError::Exists`], a name that is no image's, or the system's.
    pub fn import(&self, image: &str, size_bytes: Option<u64>) -> Result<Import, StorageError> {
        Import::begin(self, image, size_bytes)
    }

    /// The images in the folder, by name. Half-done imports and foreign files are left out.
    ///
    /// # Errors
    /// The system's.
    pub fn images(&self) -> Result<Vec<ImageInfo>, StorageError> {
        let mut images = Vec::new();
        let entries = fs::read_dir(&self.path).map_err(StorageError::io("listing", &self.path))?;
        for entry in entries {
            let entry = entry.map_err(StorageError::io("listing", &self.path))?;
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
            let plain_file = entry.metadata().is_ok_and(|found| found.is_file());
            if plain_file && self.image_path(&name).is_ok() {
                images.extend(ImageInfo::look(&self.path, &name));
            }
        }
        images.sort_by(|left, right| left.name.cmp(&right.name));
        Ok(images)
    }

    /// Deletes an image. Whether a VM still needs it is the caller's to know.
    ///
    /// # Errors
    /// [`StorageError::MissingImage`], or the system's.
    pub fn delete(&self, image: &str) -> Result<(), StorageError> {
        let path = self.existing(image)?;
        fs::remove_file(&path).map_err(StorageError::io("deleting", &path))?;
        ImageInfo::forget(&self.path, image);
        sync_folder(&self.path)
    }

    /// Space of the file system below.
    ///
    /// # Errors
    /// The system's.
    pub fn usage(&self) -> Result<PoolUsage, StorageError> {
        let found = statvfs(&self.path)
            .map_err(|errno| StorageError::io("measuring", &self.path)(errno.into()))?;
        let fragment = found.fragment_size();
        Ok(PoolUsage {
            capacity_bytes: found.blocks().saturating_mul(fragment),
            free_bytes: found.blocks_available().saturating_mul(fragment),
        })
    }

    pub(super) fn folder(&self) -> &Path {
        &self.path
    }

    pub(super) fn reference(&self, image: &str) -> String {
        format!("{}/{image}", self.name)
    }

    /// Joins after checking that `image` is a plain file name, so nothing leaves the folder.
    pub(super) fn image_path(&self, image: &str) -> Result<PathBuf, StorageError> {
        parse_image(&self.reference(image))?;
        Ok(self.path.join(image))
    }
}

fn checked_path(path: &str) -> Result<PathBuf, StorageError> {
    let path = PathBuf::from(path);
    let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
    if path.is_absolute() && path.components().all(plain) && path.components().count() > 1 {
        Ok(path)
    } else {
        Err(StorageError::BadPath(path))
    }
}

fn read_marker(folder: &Path) -> Result<Option<String>, StorageError> {
    let marker = folder.join(MARKER);
    match fs::read_to_string(&marker) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StorageError::io("reading", marker)(error)),
    }
}

fn write_marker(folder: &Path, name: &Name) -> Result<(), StorageError> {
    let marker = folder.join(MARKER);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .open(&marker)
        .map_err(StorageError::io("creating", &marker))?;
    let written = file.write_all(format!("{name}\n").as_bytes()).and_then(|()| file.sync_all());
    written.map_err(StorageError::io("writing", &marker))?;
    sync_folder(folder)
}

/// Makes the names in a folder durable.
pub(super) fn sync_folder(folder: &Path) -> Result<(), StorageError> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(StorageError::io("syncing", folder))
}
