//! Closing files: who saves what was changed, and what becomes of what could not be saved.
//!
//! Invariant: unsaved changes are given up only where nobody is left to save them. Whoever changed
//! something holds a number in `handles` until it is saved or given up: an open file does, and so
//! does a truncation by path.

use std::sync::Arc;
use std::time::SystemTime;

use nix::errno::Errno;

use super::files::Opening;
use super::state::{Caller, Handle, State, Tree, bounded};

/// How often the last one to close saves: others may change the file meanwhile, and leave it to
/// this one.
const SAVES: usize = 3;

impl Tree {
    /// `close`: saves what was written through this number. An open file that is only created or
    /// truncated yet waits: a shell closes a copy of it before its command writes.
    pub(super) async fn flush(
        self: &Arc<Self>,
        handle: u64,
        caller: Caller,
        sync: bool,
    ) -> Result<(), Errno> {
        let inode = {
            let mut state = self.lock();
            match state.handles.get_mut(&handle) {
                Some(Handle::File { inode, write: true, wrote, .. }) if *wrote || sync => {
                    *wrote = false;
                    *inode
                }
                Some(_) => return Ok(()),
                None => return Err(Errno::EBADF),
            }
        };
        let saved = bounded(self.save(inode, caller)).await;
        if saved.is_err()
            && let Some(Handle::File { wrote, .. }) = self.lock().handles.get_mut(&handle)
        {
            *wrote = true;
        }
        saved
    }

    /// The last `close`: nothing refers to this number any more, and no program hears of errors.
    pub(super) async fn release(self: &Arc<Self>, handle: u64, caller: Caller) {
        let inode = match self.lock().handles.get(&handle) {
            Some(Handle::File { inode, .. }) => Some(*inode),
            Some(Handle::Generated(_) | Handle::Folder { .. }) | None => None,
        };
        let Some(inode) = inode else {
            self.lock().handles.remove(&handle);
            return;
        };
        for save in 0..=SAVES {
            {
                let mut state = self.lock();
                if save == SAVES || !state.is_left_to(handle, inode) {
                    state.handles.remove(&handle);
                    break;
                }
            }
            if let Err(error) = bounded(self.save(inode, caller)).await {
                tracing::warn!(%error, "a file of the mounted tree was not saved");
            }
        }
        self.give_up(inode).await;
        self.unpin(inode);
    }

    /// Forgets unsaved changes that nobody is left to save.
    async fn give_up(&self, inode: u64) {
        let Some(path) = self.lost_path(inode) else { return };
        // Where it cannot be read, it is dropped with the last number.
        if let Ok(Some((content, revision))) = self.source.content(&path).await {
            let mut state = self.lock();
            // Whoever opened it meanwhile has it in hand now.
            let writer = state.has_writer(inode);
            if !writer
                && let Ok(file) = state.names.file(inode)
                && let Some(buffer) = file.buffer.as_mut().filter(|buffer| buffer.is_dirty())
            {
                buffer.reset(content, revision);
                file.touched = None;
            }
        }
        self.notices.tell(vec![super::namespace::Stale::Inode(inode)]);
        if let Err(error) = self.refresh(inode).await {
            tracing::debug!(%error, inode, "an open file could not be read again");
        }
    }

    /// The path of a file whose unsaved changes are lost. One that is not in the store goes here.
    fn lost_path(&self, inode: u64) -> Option<String> {
        let mut state = self.lock();
        if state.has_writer(inode) {
            return None;
        }
        let path = state.names.path(inode).ok()?;
        let file = state.names.file(inode).ok().filter(|file| file.is_dirty())?;
        if file.stored.is_some() {
            return Some(path);
        }
        let stale = state.names.abandon(inode);
        drop(state);
        self.notices.tell(stale);
        None
    }

    /// Lets go of a pinned inode; the content of a file that nobody has open is dropped.
    pub(super) fn unpin(&self, inode: u64) {
        let mut state = self.lock();
        if state.names.get(inode).is_ok_and(|inode| inode.opens == 1)
            && let Ok(file) = state.names.file(inode)
            && file.stored.is_some()
        {
            file.buffer = None;
        }
        state.names.unpin(inode);
    }

    /// `truncate`: of an open file at its next save, of a path at once.
    pub(super) async fn truncate(
        self: &Arc<Self>,
        inode: u64,
        handle: Option<u64>,
        size: u64,
        caller: Caller,
    ) -> Result<(), Errno> {
        let path = self.lock().names.path(inode).unwrap_or_default();
        self.may_write(caller, &path)?;
        let is_writer = |handle: &u64| self.lock().is_writer(*handle, inode);
        if let Some(handle) = handle.filter(is_writer) {
            return self.truncate_open(inode, handle, size);
        }
        let opening = Opening { write: true, append: false, truncate: false, exclusive: false };
        let handle = self.open(inode, opening, caller).await?;
        let saved = match self.truncate_open(inode, handle, size) {
            Ok(()) => self.flush(handle, caller, false).await,
            Err(errno) => Err(errno),
        };
        self.release(handle, caller).await;
        saved
    }

    fn truncate_open(&self, inode: u64, handle: u64, size: u64) -> Result<(), Errno> {
        let mut state = self.lock();
        let file = state.names.file(inode)?;
        file.buffer.as_mut().ok_or(Errno::EIO)?.truncate(size)?;
        file.touched = Some(SystemTime::now());
        if let Some(Handle::File { wrote, .. }) = state.handles.get_mut(&handle) {
            *wrote = true;
        }
        Ok(())
    }
}

impl State {
    /// Whether a number is that of a file that is open for writing.
    fn is_writer(&self, handle: u64, wanted: u64) -> bool {
        let open = self.handles.get(&handle);
        matches!(open, Some(Handle::File { inode, write: true, .. }) if *inode == wanted)
    }

    /// Whether somebody has a file open for writing.
    fn has_writer(&self, inode: u64) -> bool {
        self.handles.keys().any(|handle| self.is_writer(*handle, inode))
    }

    /// Whether nobody but this number is left to save what was changed.
    fn is_left_to(&mut self, handle: u64, inode: u64) -> bool {
        let others = self.handles.keys().any(|one| *one != handle && self.is_writer(*one, inode));
        let file = self.names.file(inode).ok();
        let buffer = file.and_then(|file| file.buffer.as_ref());
        let unsaved = buffer.is_some_and(|buffer| buffer.is_dirty() && !buffer.has_failed());
        unsaved && !others && self.is_writer(handle, inode)
    }
}
