//! Storage pools: folders that hold images (kernels, initramfs, firmware, raw disks).
//!
//! Owns the files of the pools and their safety: a path never leaves its pool, an image appears
//! whole or not at all, and a folder that is not the pool it stands for (an unmounted share) is
//! noticed before anything is made in it. Knows nothing of VMs or of who may write a disk.
//!
//! Blocking; call it from a blocking thread.

mod import;
mod kind;
mod pool;

pub use import::{ImageInfo, Import};
pub use kind::{Content, ImageKind, UnknownKind};
pub use pool::{Pool, PoolUsage, Pools};

use std::path::PathBuf;

use proto::Name;

/// Why something in a pool failed.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// Not `pool/name`, or a name that is not a plain file name.
    #[error(transparent)]
    Reference(#[from] proto::InvalidImage),
    /// No such pool in the cluster.
    #[error("storage pool `{0}` does not exist: see `clusterctl storage list`")]
    UnknownPool(Name),
    /// The record's path cannot be a pool.
    #[error("`{0}` cannot be a pool's folder: give an absolute path without `..`")]
    BadPath(PathBuf),
    /// The folder is not this pool's: most likely a share that is not mounted.
    #[error(
        "pool `{pool}`: {} on this node is not the pool's folder (its marker file is missing): \
         mount the share there", path.display()
    )]
    NotMounted {
        /// The pool.
        pool: Name,
        /// Its folder.
        path: PathBuf,
    },
    /// The folder belongs to another pool.
    #[error("{} already belongs to pool `{other}`: choose another folder", path.display())]
    OtherPool {
        /// The folder.
        path: PathBuf,
        /// What its marker says.
        other: String,
    },
    /// No such image here.
    #[error(
        "image `{image}` is missing on this node: looked for {}; import it with \
         `clusterctl image import`", path.display()
    )]
    MissingImage {
        /// `pool/name`.
        image: String,
        /// Where it should be.
        path: PathBuf,
    },
    /// A raw disk whose length cannot be right: it was cut off, or grew by a part of a sector.
    #[error(
        "disk `{image}` is damaged: {} has {found_bytes} bytes, which is no whole number of \
         512-byte sectors or less than the {size_bytes} bytes of its document; restore it from a \
         backup, or correct the document's size", path.display()
    )]
    DiskLength {
        /// `pool/name`.
        image: String,
        /// The file.
        path: PathBuf,
        /// Its length.
        found_bytes: u64,
        /// What the document says.
        size_bytes: u64,
    },
    /// The image is there already.
    #[error("image `{0}` already exists: delete it first or choose another name")]
    Exists(String),
    /// A folder, a device or a symbolic link stands where an image should be.
    #[error("image `{image}`: {} is not a plain file", path.display())]
    NotAFile {
        /// `pool/name`.
        image: String,
        /// What it is.
        path: PathBuf,
    },
    /// It is not what it is to be used as.
    #[error("image `{image}` cannot be used as {used_as}: {reason}")]
    WrongKind {
        /// `pool/name`.
        image: String,
        /// What for.
        used_as: ImageKind,
        /// What it is.
        reason: String,
    },
    /// The folder of a new pool is not there.
    #[error(
        "{} does not exist on this node: mount the share or make the folder there first, or let it \
         be made with --create", path.display()
    )]
    NoFolder {
        /// The folder.
        path: PathBuf,
    },
    /// The data that arrived is not what was announced.
    #[error("image `{image}` was not imported: {reason}")]
    Import {
        /// `pool/name`.
        image: String,
        /// What differs.
        reason: String,
    },
    /// The system refused.
    #[error("{action} {} failed: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

impl StorageError {
    fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}
