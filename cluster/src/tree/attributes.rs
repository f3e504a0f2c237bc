//! What `stat` and its like are told.

use std::time::{Duration, SystemTime};

use fuser::{FileAttr, FileType, INodeNo};
use nix::errno::Errno;

use super::inode::Body;
use super::names;
use super::state::{State, Tree};

/// How long the kernel may believe it if no notice reaches it.
const BELIEVED: Duration = Duration::from_secs(1);
/// The extended attribute that holds the revision of a file's last change.
pub(super) const REVISION_ATTRIBUTE: &str = "user.holdfast.revision";

/// Attributes, and how long they may be believed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attributes {
    pub(super) ttl: Duration,
    pub(super) attr: FileAttr,
}

/// What a file system says of itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub(super) blocks: u64,
    pub(super) free: u64,
    pub(super) available: u64,
    pub(super) files: u64,
    pub(super) block_size: u32,
}

impl Tree {
    /// An inode's attributes.
    pub(super) fn attributes(&self, state: &State, number: u64) -> Result<Attributes, Errno> {
        let inode = state.names.get(number)?;
        // Without a path there is no mode to follow from it; whoever still has it open keeps it.
        let path = state.names.path(number).unwrap_or_default();
        let private = names::is_private(&path);
        let believed = if private { Duration::ZERO } else { BELIEVED };
        let (kind, size, time, perm, ttl) = match &inode.body {
            Body::Folder(folder) => {
                let perm = names::mode(&path, true);
                (FileType::Directory, 0, folder.stamp.time(), perm, believed)
            }
            Body::File(file) => {
                let own = file.is_dirty() || file.stored.is_none();
                let ttl = if own { Duration::ZERO } else { believed };
                let perm = names::mode(&path, false);
                (FileType::RegularFile, file.size(), file.time(), perm, ttl)
            }
            Body::Generated(generated) => {
                let size = self.generate(state, generated).len() as u64;
                let time = state.names.last_change();
                (FileType::RegularFile, size, time, 0o444, Duration::ZERO)
            }
        };
        let nlink = u32::from(inode.linked || number == super::inode::ROOT);
        Ok(Attributes { ttl, attr: attr(number, kind, size, time, perm, nlink) })
    }

    /// The revision of a file's last change in the store.
    pub(super) fn revision_of(&self, number: u64) -> Result<u64, Errno> {
        let state = self.lock();
        let file = state.names.get(number)?.file().and_then(|file| file.stored);
        file.map(|stored| stored.revision).ok_or(Errno::ENODATA)
    }

    /// The room on the disk that the store is on.
    pub(super) async fn room(&self) -> Result<Room, Errno> {
        let folder = self.source.node().config().data_dir.clone();
        let asked = tokio::task::spawn_blocking(move || nix::sys::statvfs::statvfs(&folder));
        let stat = match tokio::time::timeout(Duration::from_secs(2), asked).await {
            Ok(Ok(stat)) => stat?,
            Ok(Err(_)) | Err(_) => return Err(Errno::EIO),
        };
        Ok(Room {
            blocks: stat.blocks(),
            free: stat.blocks_free(),
            available: stat.blocks_available(),
            files: self.lock().names.len() as u64,
            block_size: u32::try_from(stat.fragment_size()).unwrap_or(4096),
        })
    }
}

fn attr(
    number: u64,
    kind: FileType,
    size: u64,
    time: SystemTime,
    perm: u16,
    nlink: u32,
) -> FileAttr {
    FileAttr {
        ino: INodeNo(number),
        size,
        blocks: size.div_ceil(512),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind,
        perm,
        nlink,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}
