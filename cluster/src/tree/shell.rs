//! The kernel's requests: what memory can answer is answered at once, everything else by a task.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, Errno as Code, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use nix::errno::Errno;
use tokio::runtime::Handle as Runtime;

use super::attributes::{Attributes, REVISION_ATTRIBUTE};
use super::files::Opening;
use super::names::{self, NAME_MAX};
use super::rename::Rename;
use super::state::{Caller, Handle, State, Tree};

/// Never given twice in the life of a mount: inode numbers are not reused.
const GENERATION: Generation = Generation(0);

/// What fuser calls.
pub(super) struct Shell {
    pub(super) tree: Arc<Tree>,
    pub(super) runtime: Runtime,
}

fn code(errno: Errno) -> Code {
    Code::from_i32(errno as i32)
}

fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), pid: request.pid() }
}

impl Shell {
    /// Does work apart from the thread that reads requests. A task that ends without an answer
    /// (the agent is going down) answers `EIO` by dropping it.
    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        drop(self.runtime.spawn(work));
    }

    fn empty(
        &self,
        reply: ReplyEmpty,
        work: impl Future<Output = Result<(), Errno>> + Send + 'static,
    ) {
        self.spawn(async move {
            match work.await {
                Ok(()) => reply.ok(),
                Err(errno) => reply.error(code(errno)),
            }
        });
    }
}

impl Tree {
    /// An entry for the kernel, which then knows of the inode.
    fn entry(&self, inode: u64) -> Result<Attributes, Errno> {
        let mut state = self.lock();
        let attributes = self.attributes(&state, inode)?;
        state.names.looked_up(inode);
        Ok(attributes)
    }

    fn look_up(&self, parent: u64, name: &OsStr, caller: Caller) -> Result<Attributes, Errno> {
        let name = names::name(name)?;
        if self.is_private(parent) {
            caller.require_root()?;
        }
        let child = {
            let state = self.lock();
            state.names.folder(parent)?;
            state.names.child(parent, name).ok_or(Errno::ENOENT)?
        };
        self.entry(child)
    }

    fn reply_entry(&self, reply: ReplyEntry, found: Result<u64, Errno>) {
        match found.and_then(|inode| self.entry(inode)) {
            Ok(Attributes { ttl, attr }) => reply.entry(&ttl, &attr, GENERATION),
            Err(errno) => reply.error(code(errno)),
        }
    }

    /// What a folder holds, beginning with itself and the one above.
    fn list(state: &State, folder: u64) -> Result<Vec<(String, u64, bool)>, Errno> {
        let inode = state.names.get(folder)?;
        let parent = if inode.parent == 0 { folder } else { inode.parent };
        let mut entries = vec![(".".to_owned(), folder, true), ("..".to_owned(), parent, true)];
        for (name, child) in &state.names.folder(folder)?.children {
            let is_folder = state.names.get(*child).is_ok_and(|child| child.folder().is_some());
            entries.push((name.clone(), *child, is_folder));
        }
        Ok(entries)
    }

    /// A folder's entries from a place on. They are those of when it was last read from its
    /// beginning, so that places stay the same.
    fn entries_from(
        &self,
        handle: u64,
        offset: u64,
    ) -> Result<Vec<(u64, String, u64, bool)>, Errno> {
        let mut state = self.lock();
        let folder = match state.handles.get(&handle) {
            Some(Handle::Folder { inode, .. }) => *inode,
            Some(_) | None => return Err(Errno::EBADF),
        };
        if offset == 0 {
            let fresh = Self::list(&state, folder)?;
            if let Some(Handle::Folder { entries, .. }) = state.handles.get_mut(&handle) {
                *entries = fresh;
            }
        }
        let Some(Handle::Folder { entries, .. }) = state.handles.get(&handle) else {
            return Err(Errno::EBADF);
        };
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        // More than one answer holds is of no use.
        let entries = entries.iter().zip(1u64..).skip(from).take(1024);
        Ok(entries.map(|((name, inode, folder), at)| (at, name.clone(), *inode, *folder)).collect())
    }
}

fn kind(is_folder: bool) -> FileType {
    if is_folder { FileType::Directory } else { FileType::RegularFile }
}

/// Answers a question for an extended attribute of some size.
fn reply_xattr(reply: ReplyXattr, size: u32, value: Result<Vec<u8>, Errno>) {
    match value {
        Err(errno) => reply.error(code(errno)),
        Ok(value) => match u32::try_from(value.len()) {
            Ok(length) if size == 0 => reply.size(length),
            Ok(length) if length <= size => reply.data(&value),
            Ok(_) | Err(_) => reply.error(Code::ERANGE),
        },
    }
}

#[allow(clippy::too_many_arguments, reason = "the kernel's protocol")]
impl Filesystem for Shell {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = [
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_AUTO_INVAL_DATA,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ];
        for flag in wanted {
            // An older kernel does without.
            let _ = config.add_capabilities(flag);
        }
        // It is not too large.
        let _ = config.set_max_write(1 << 20);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (tree, caller) = (self.tree.clone(), caller(request));
        let answer = move |tree: &Tree, name: &OsStr, reply: ReplyEntry| match tree
            .look_up(parent.0, name, caller)
        {
            Ok(Attributes { ttl, attr }) => reply.entry(&ttl, &attr, GENERATION),
            Err(errno) => reply.error(code(errno)),
        };
        if !tree.is_private(parent.0) {
            return answer(&tree, name, reply);
        }
        let name = name.to_owned();
        self.spawn(async move {
            match tree.refresh_private().await {
                Ok(()) => answer(&tree, &name, reply),
                Err(errno) => reply.error(code(errno)),
            }
        });
    }

    fn forget(&self, _request: &Request, inode: INodeNo, times: u64) {
        self.tree.lock().names.forget(inode.0, times);
    }

    fn getattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        let state = self.tree.lock();
        let attributes = self.tree.attributes(&state, inode.0);
        drop(state);
        match attributes {
            Ok(Attributes { ttl, attr }) => reply.attr(&ttl, &attr),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn setattr(
        &self,
        request: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (tree, caller) = (self.tree.clone(), caller(request));
        self.spawn(async move {
            let changed = async {
                // Owner, group and mode follow from the path, times from the revision. Who asks
                // for what is so already is told that it is done; times are kept silently.
                let owned = uid.is_none_or(|uid| uid == 0) && gid.is_none_or(|gid| gid == 0);
                let mode = mode.map(|mode| mode & 0o7777);
                if !owned || mode.is_some_and(|mode| !names::mode_fits(mode)) {
                    return Err(Errno::EPERM);
                }
                if let Some(size) = size {
                    tree.truncate(inode.0, handle.map(|handle| handle.0), size, caller).await?;
                }
                tree.attributes(&tree.lock(), inode.0)
            };
            match changed.await {
                Ok(Attributes { ttl, attr }) => reply.attr(&ttl, &attr),
                Err(errno) => reply.error(code(errno)),
            }
        });
    }

    fn readlink(&self, _request: &Request, _inode: INodeNo, reply: ReplyData) {
        reply.error(Code::EINVAL);
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        let (tree, caller, name) = (self.tree.clone(), caller(request), name.to_owned());
        self.spawn(async move {
            let made = async {
                if mode & libc::S_IFMT != libc::S_IFREG {
                    return Err(Errno::EPERM);
                }
                let name = names::name(&name)?;
                let path = names::join(&tree.lock().names.path(parent.0)?, name)?;
                tree.may_write(caller, &path)?;
                tree.create_now(parent.0, name, &path, caller).await
            };
            let made = made.await;
            tree.reply_entry(reply, made);
        });
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let (tree, caller, name) = (self.tree.clone(), caller(request), name.to_owned());
        self.spawn(async move {
            let made = match names::name(&name) {
                Ok(name) => tree.mkdir(parent.0, name, caller).await,
                Err(errno) => Err(errno),
            };
            tree.reply_entry(reply, made);
        });
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (tree, caller, name) = (self.tree.clone(), caller(request), name.to_owned());
        self.empty(reply, async move { tree.unlink(parent.0, names::name(&name)?, caller).await });
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (tree, caller, name) = (self.tree.clone(), caller(request), name.to_owned());
        self.empty(reply, async move { tree.rmdir(parent.0, names::name(&name)?, caller).await });
    }

    fn symlink(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(Code::EPERM);
    }

    fn link(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _parent: INodeNo,
        _name: &OsStr,
        reply: ReplyEntry,
    ) {
        reply.error(Code::EPERM);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (tree, caller) = (self.tree.clone(), caller(request));
        let (name, new_name) = (name.to_owned(), new_name.to_owned());
        self.empty(reply, async move {
            if !(flags - RenameFlags::RENAME_NOREPLACE).is_empty() {
                return Err(Errno::EINVAL);
            }
            let rename = Rename {
                from_parent: parent.0,
                from_name: names::name(&name)?,
                to_parent: new_parent.0,
                to_name: names::name(&new_name)?,
                no_replace: flags.contains(RenameFlags::RENAME_NOREPLACE),
            };
            tree.rename(rename, caller).await
        });
    }

    fn open(&self, request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let (tree, caller) = (self.tree.clone(), caller(request));
        let opening = Opening::of(flags.0);
        self.spawn(async move {
            match tree.open(inode.0, opening, caller).await {
                Ok(handle) => reply.opened(FileHandle(handle), open_flags(opening)),
                Err(errno) => reply.error(code(errno)),
            }
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (tree, caller, name) = (self.tree.clone(), caller(request), name.to_owned());
        let opening = Opening::of(flags);
        self.spawn(async move {
            let created = async {
                let name = names::name(&name)?;
                let (inode, handle) = tree.create(parent.0, name, opening, caller).await?;
                Ok((tree.entry(inode)?, handle))
            };
            match created.await {
                Ok((Attributes { ttl, attr }, handle)) => {
                    let handle = FileHandle(handle);
                    reply.created(&ttl, &attr, GENERATION, handle, open_flags(opening));
                }
                Err(errno) => reply.error(code(errno)),
            }
        });
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.tree.read(handle.0, offset, size) {
            Ok(bytes) => reply.data(&bytes),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn write(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = self.tree.write(handle.0, offset, data);
        match written.and_then(|()| u32::try_from(data.len()).map_err(|_| Errno::EFBIG)) {
            Ok(size) => reply.written(size),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn flush(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        let (tree, caller) = (self.tree.clone(), caller(request));
        self.empty(reply, async move { tree.flush(handle.0, caller, false).await });
    }

    fn release(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let (tree, caller) = (self.tree.clone(), caller(request));
        self.empty(reply, async move {
            tree.release(handle.0, caller).await;
            Ok(())
        });
    }

    fn fsync(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let (tree, caller) = (self.tree.clone(), caller(request));
        self.empty(reply, async move { tree.flush(handle.0, caller, true).await });
    }

    fn opendir(&self, request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let (tree, caller) = (self.tree.clone(), caller(request));
        let answer = move |tree: &Tree, reply: ReplyOpen| {
            let mut state = tree.lock();
            let found = state.names.folder(inode.0).map(|_| ());
            match found {
                Ok(()) => {
                    state.names.pin(inode.0);
                    let handle = Handle::Folder { inode: inode.0, entries: Vec::new() };
                    let handle = state.open(handle);
                    drop(state);
                    reply.opened(FileHandle(handle), FopenFlags::empty());
                }
                Err(errno) => reply.error(code(errno)),
            }
        };
        if !tree.is_private(inode.0) {
            return answer(&tree, reply);
        }
        self.spawn(async move {
            let refreshed = async {
                caller.require_root()?;
                tree.refresh_private().await
            };
            match refreshed.await {
                Ok(()) => answer(&tree, reply),
                Err(errno) => reply.error(code(errno)),
            }
        });
    }

    fn readdir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        match self.tree.entries_from(handle.0, offset) {
            Ok(entries) => {
                for (at, name, inode, folder) in entries {
                    if reply.add(INodeNo(inode), at, kind(folder), name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn readdirplus(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let entries = match self.tree.entries_from(handle.0, offset) {
            Ok(entries) => entries,
            Err(errno) => return reply.error(code(errno)),
        };
        let mut state = self.tree.lock();
        for (at, name, inode, _) in entries {
            // What is gone by now is left out.
            let Ok(Attributes { ttl, attr }) = self.tree.attributes(&state, inode) else {
                continue;
            };
            if reply.add(INodeNo(inode), at, &name, &ttl, &attr, GENERATION) {
                break;
            }
            if name != "." && name != ".." {
                state.names.looked_up(inode);
            }
        }
        drop(state);
        reply.ok();
    }

    fn releasedir(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.tree.lock().handles.remove(&handle.0);
        self.tree.unpin(inode.0);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        // Names are committed when they change.
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        let tree = self.tree.clone();
        self.spawn(async move {
            match tree.room().await {
                Ok(room) => reply.statfs(
                    room.blocks,
                    room.free,
                    room.available,
                    room.files,
                    u64::from(u32::MAX),
                    room.block_size,
                    u32::try_from(NAME_MAX).unwrap_or(u32::MAX),
                    room.block_size,
                ),
                Err(errno) => reply.error(code(errno)),
            }
        });
    }

    fn setxattr(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Code::ENOTSUP);
    }

    fn getxattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let value = if name == REVISION_ATTRIBUTE {
            self.tree.revision_of(inode.0).map(|revision| revision.to_string().into_bytes())
        } else {
            Err(Errno::ENODATA)
        };
        reply_xattr(reply, size, value);
    }

    fn listxattr(&self, _request: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        let has = self.tree.revision_of(inode.0).is_ok();
        let names = if has { format!("{REVISION_ATTRIBUTE}\0") } else { String::new() };
        reply_xattr(reply, size, Ok(names.into_bytes()));
    }

    fn removexattr(&self, _request: &Request, _inode: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Code::ENOTSUP);
    }

    fn access(&self, _request: &Request, _inode: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // The kernel checks the modes itself.
        reply.ok();
    }

    fn fallocate(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Code::EOPNOTSUPP);
    }

    fn lseek(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        // The kernel then does it itself.
        reply.error(Code::ENOSYS);
    }
}

/// Reads and writes come here and not to the page cache: what is open is shared, and is of one
/// version. A file that is only read has nothing to tell when it is closed.
fn open_flags(opening: Opening) -> FopenFlags {
    let reads_only = if opening.write { FopenFlags::empty() } else { FopenFlags::FOPEN_NOFLUSH };
    FopenFlags::FOPEN_DIRECT_IO | reads_only
}
