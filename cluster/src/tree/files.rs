//! Open files: opening, creating, reading, writing, saving.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use nix::errno::Errno;
use proto::Revision;

use super::buffer::{Buffer, Plan};
use super::commit::Failure;
use super::inode::Body;
use super::names;
use super::state::{Caller, Handle, Tree, bounded};
use crate::{FileChange, FileRefused, StoreError};

/// Attempts to append where others do, too.
const TRIES: usize = 100;

/// How a file is opened.
#[derive(Debug, Clone, Copy)]
pub(super) struct Opening {
    pub(super) write: bool,
    pub(super) append: bool,
    pub(super) truncate: bool,
    pub(super) exclusive: bool,
}

impl Opening {
    pub(super) fn of(flags: i32) -> Self {
        let has = |flag: i32| flags & flag != 0;
        Self {
            write: flags & libc::O_ACCMODE != libc::O_RDONLY,
            append: has(libc::O_APPEND),
            truncate: has(libc::O_TRUNC),
            exclusive: has(libc::O_EXCL),
        }
    }
}

/// Where a save got to.
enum Saved {
    Done,
    Again,
}

impl Tree {
    /// Opens a file or a generated one.
    pub(super) async fn open(
        self: &Arc<Self>,
        inode: u64,
        opening: Opening,
        caller: Caller,
    ) -> Result<u64, Errno> {
        if self.lock().names.get(inode)?.tells_of_quorum() {
            self.quorum.ask(&self.source).await;
        }
        let path = {
            let mut state = self.lock();
            let path = state.names.path(inode).unwrap_or_default();
            match &state.names.get(inode)?.body {
                Body::Folder(_) => return Err(Errno::EISDIR),
                Body::Generated(_) if opening.write => return Err(Errno::EACCES),
                Body::Generated(generated) => {
                    let content = self.generate(&state, &generated.clone());
                    return Ok(state.open(Handle::Generated(content)));
                }
                Body::File(_) => {}
            }
            state.names.pin(inode);
            path
        };
        let opened = bounded(self.open_file(inode, &path, opening, caller)).await;
        if opened.is_err() {
            self.unpin(inode);
        }
        opened
    }

    async fn open_file(
        self: &Arc<Self>,
        inode: u64,
        path: &str,
        opening: Opening,
        caller: Caller,
    ) -> Result<u64, Errno> {
        if names::is_private(path) {
            caller.require_root()?;
        }
        if opening.write || opening.truncate {
            self.may_write(caller, path)?;
        }
        if !opening.truncate {
            self.load(inode).await?;
        }
        let mut state = self.lock();
        let file = state.names.file(inode)?;
        if opening.truncate {
            let base = file.stored.map_or(0, |stored| stored.revision);
            file.buffer.get_or_insert_with(|| Buffer::loaded(Vec::new(), base)).empty();
            file.touched = Some(SystemTime::now());
        }
        let Opening { write, append, .. } = opening;
        Ok(state.open(Handle::File { inode, write, append, wrote: false }))
    }

    /// Reads a file's content into memory, where it is not yet. The inode is pinned.
    async fn load(&self, inode: u64) -> Result<(), Errno> {
        let path = {
            let mut state = self.lock();
            if state.names.file(inode)?.buffer.is_some() {
                return Ok(());
            }
            state.names.path(inode)?
        };
        let (content, revision) = self.source.content(&path).await?.ok_or(Errno::ENOENT)?;
        {
            let mut state = self.lock();
            let file = state.names.file(inode)?;
            if file.buffer.is_none() {
                if let Some(stored) = &mut file.stored {
                    // The store may be ahead of the names by a moment.
                    stored.size = content.len() as u64;
                }
                file.buffer = Some(Buffer::loaded(content, revision));
            }
        }
        self.refresh(inode).await
    }

    /// Reads an open file again where the store has it newer.
    pub(super) async fn refresh(&self, inode: u64) -> Result<(), Errno> {
        let path = {
            let mut state = self.lock();
            let path = state.names.path(inode);
            let file = state.names.file(inode)?;
            match (path, file.stored, &file.buffer) {
                (Ok(path), Some(stored), Some(buffer))
                    if !buffer.is_dirty() && buffer.base() < stored.revision =>
                {
                    path
                }
                _ => return Ok(()),
            }
        };
        if let Some((content, revision)) = self.source.content(&path).await?
            && let Some(buffer) = &mut self.lock().names.file(inode)?.buffer
        {
            buffer.refresh(&content, revision);
        }
        Ok(())
    }

    /// Creates and opens a file; one that is there is opened, unless it must be new. The answer:
    /// its inode, and the number it is open under.
    pub(super) async fn create(
        self: &Arc<Self>,
        parent: u64,
        name: &str,
        opening: Opening,
        caller: Caller,
    ) -> Result<(u64, u64), Errno> {
        let (path, present) = {
            let state = self.lock();
            state.names.live_folder(parent)?;
            let path = names::join(&state.names.path(parent)?, name)?;
            (path, state.names.child(parent, name))
        };
        self.may_write(caller, &path)?;
        match present {
            Some(_) if opening.exclusive => return Err(Errno::EEXIST),
            Some(inode) => return Ok((inode, self.open(inode, opening, caller).await?)),
            None => {}
        }
        if opening.exclusive && !names::is_document(&path) {
            let inode = bounded(self.create_now(parent, name, &path, caller)).await?;
            let opening = Opening { truncate: false, ..opening };
            return Ok((inode, self.open(inode, opening, caller).await?));
        }
        let now = SystemTime::now();
        let mut state = self.lock();
        let inode = state.names.create(parent, name, opening.exclusive, now)?;
        state.names.pin(inode);
        // Whoever makes a file saves it, also one that may only read it.
        let (write, append) = (true, opening.append);
        Ok((inode, state.open(Handle::File { inode, write, append, wrote: false })))
    }

    /// Commits an empty file that must be new in the whole cluster.
    pub(super) async fn create_now(
        &self,
        parent: u64,
        name: &str,
        path: &str,
        caller: Caller,
    ) -> Result<u64, Errno> {
        let _names = self.names.read().await;
        let file = FileChange::write(path, Vec::new()).if_revision(Revision(0));
        // Nobody makes a folder of this name at the same time.
        let folder = FileChange::remove(names::marker(path)).if_revision(Revision(0));
        match self.commit(vec![file, folder], caller).await {
            Ok(_) => {}
            Err(Failure::Refused(FileRefused::Conflict { .. })) => return Err(Errno::EEXIST),
            Err(failure) => return Err(self.errno_at(path, failure)),
        }
        self.lock().names.child(parent, name).ok_or(Errno::EIO)
    }

    /// Commits a file's unsaved changes.
    pub(super) async fn save(self: &Arc<Self>, inode: u64, caller: Caller) -> Result<(), Errno> {
        let _names = self.names.read().await;
        let _order = self.in_order(inode).await;
        self.save_in_order(inode, caller).await
    }

    /// As [`Tree::save`]; the caller holds the locks.
    pub(super) async fn save_in_order(
        self: &Arc<Self>,
        inode: u64,
        caller: Caller,
    ) -> Result<(), Errno> {
        let Some((path, mut plan, is_new)) = self.plan(inode)? else { return Ok(()) };
        let planned_len = plan.content.len();
        for _ in 0..TRIES {
            match self.try_save(inode, &path, (&mut plan, planned_len), is_new, caller).await {
                Ok(Saved::Done) => return self.refresh(inode).await,
                Ok(Saved::Again) => {}
                Err(errno) => {
                    if let Ok(file) = self.lock().names.file(inode)
                        && let Some(buffer) = &mut file.buffer
                    {
                        buffer.refused(&plan);
                    }
                    return Err(errno);
                }
            }
        }
        Err(Errno::EAGAIN)
    }

    /// What is to be saved; None: nothing, or of a file without a path.
    fn plan(&self, inode: u64) -> Result<Option<(String, Plan, bool)>, Errno> {
        let mut state = self.lock();
        let Ok(path) = state.names.path(inode) else { return Ok(None) };
        let file = state.names.file(inode)?;
        let is_new = file.stored.is_none();
        Ok(file.buffer.as_ref().and_then(Buffer::plan).map(|plan| (path, plan, is_new)))
    }

    async fn try_save(
        &self,
        inode: u64,
        path: &str,
        (plan, planned_len): (&mut Plan, usize),
        is_new: bool,
        caller: Caller,
    ) -> Result<Saved, Errno> {
        let expected = plan.expected.map(Revision);
        let content = Some(plan.content.clone());
        let mut changes = vec![FileChange { path: path.to_owned(), expected, content }];
        if is_new && !names::is_document(path) {
            changes.push(FileChange::remove(names::marker(path)).if_revision(Revision(0)));
        }
        let begun = Instant::now();
        let revision = match self.commit(changes, caller).await {
            Ok(revision) => revision,
            Err(Failure::Refused(FileRefused::Conflict { path: at, .. })) => {
                return self.resolve(path, &at, plan).await;
            }
            Err(Failure::Refused(unknown @ FileRefused::Unknown(_))) => {
                let seen = self.look(path, plan, begun, unknown).await;
                seen.map_err(|failure| self.errno_at(path, failure))?
            }
            Err(failure) => return Err(self.errno_at(path, failure)),
        };
        self.change(|names| {
            let mut stale = Vec::new();
            if let Ok(file) = names.file(inode) {
                file.touched = None;
                if let Some(buffer) = &mut file.buffer {
                    buffer.committed(plan, planned_len, revision);
                }
                stale.push(super::namespace::Stale::Inode(inode));
            }
            if let Ok(inode) = names.get(inode) {
                let (parent, name) = (inode.parent, inode.name.clone());
                names.clear_note(parent, &name, &mut stale);
            }
            ((), stale)
        });
        Ok(Saved::Done)
    }

    /// Another node was faster: what was appended goes behind what it wrote.
    async fn resolve(&self, path: &str, at: &str, plan: &mut Plan) -> Result<Saved, Errno> {
        if at != path {
            return Err(Errno::EISDIR);
        }
        if plan.exclusive {
            return Err(Errno::EEXIST);
        }
        let present = self.source.confirmed(path).await;
        let present = present.map_err(|error| self.errno(Failure::Refused(store_error(&error))))?;
        let (content, revision) = present.unwrap_or_default();
        plan.rebase(&content, revision)?;
        Ok(Saved::Again)
    }

    /// The outcome of a write that was begun then is unknown: what is there tells. Without a quorum
    /// nothing does, as for a write that is given up.
    async fn look(
        &self,
        path: &str,
        plan: &Plan,
        begun: Instant,
        unknown: FileRefused,
    ) -> Result<u64, Failure> {
        let confirmed = tokio::select! {
            confirmed = self.source.confirmed(path) => confirmed,
            () = self.quorum.lost_for(&self.source, begun) => return Err(Failure::GivenUp),
        };
        match confirmed {
            Ok(Some((content, revision)))
                if content == plan.content && plan.expected.is_none_or(|base| revision > base) =>
            {
                Ok(revision)
            }
            Err(StoreError::NoQuorum { .. }) => {
                self.quorum.lose();
                Err(Failure::GivenUp)
            }
            // It may still be under way.
            Ok(_) | Err(_) => Err(Failure::Refused(unknown)),
        }
    }

    /// Bytes of an open file or a generated one.
    pub(super) fn read(&self, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let mut state = self.lock();
        let inode = match state.handles.get(&handle) {
            Some(Handle::Generated(content)) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
                let size = usize::try_from(size).unwrap_or(usize::MAX);
                let to = from.saturating_add(size).min(content.len());
                return Ok(content[from..to].to_vec());
            }
            Some(Handle::File { inode, .. }) => *inode,
            Some(Handle::Folder { .. }) => return Err(Errno::EISDIR),
            None => return Err(Errno::EBADF),
        };
        let buffer = state.names.file(inode)?.buffer.as_ref().ok_or(Errno::EIO)?;
        Ok(buffer.read(offset, size).to_vec())
    }

    /// Writes into an open file.
    pub(super) fn write(&self, handle: u64, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        if self.quorum.is_lost() {
            return Err(Errno::EROFS);
        }
        let mut state = self.lock();
        let (inode, append) = match state.handles.get_mut(&handle) {
            Some(Handle::File { inode, write: true, append, wrote }) => {
                *wrote = true;
                (*inode, *append)
            }
            Some(_) | None => return Err(Errno::EBADF),
        };
        let file = state.names.file(inode)?;
        file.touched = Some(SystemTime::now());
        file.buffer.as_mut().ok_or(Errno::EIO)?.write(offset, bytes, append)
    }
}

/// What a read of the store says, in the writer's words.
fn store_error(error: &StoreError) -> FileRefused {
    match error {
        StoreError::NoQuorum { why } => FileRefused::NoQuorum(why.clone()),
        other => FileRefused::Busy(other.to_string()),
    }
}
