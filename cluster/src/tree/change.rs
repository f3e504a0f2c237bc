//! Folders made and removed, files removed.

use std::sync::Arc;

use nix::errno::Errno;
use proto::Revision;

use super::commit::Failure;
use super::inode::{Body, ROOT};
use super::names;
use super::namespace::Namespace;
use super::state::{Caller, Tree, bounded};
use crate::{FileChange, FileRefused};

impl Tree {
    /// Makes a folder; the answer is its inode.
    pub(super) async fn mkdir(
        self: &Arc<Self>,
        parent: u64,
        name: &str,
        caller: Caller,
    ) -> Result<u64, Errno> {
        let path = {
            let state = self.lock();
            state.names.live_folder(parent)?;
            if state.names.child(parent, name).is_some() {
                return Err(Errno::EEXIST);
            }
            names::join(&state.names.path(parent)?, name)?
        };
        self.may_write(caller, &path)?;
        bounded(async {
            let _names = self.names.read().await;
            let marker = FileChange::write(names::marker(&path), Vec::new());
            // Nobody makes a file of this name at the same time.
            let file = FileChange::remove(path.as_str()).if_revision(Revision(0));
            let changes = vec![marker.if_revision(Revision(0)), file];
            match self.commit(changes, caller).await {
                Ok(_) => {}
                Err(Failure::Refused(FileRefused::Conflict { .. })) => return Err(Errno::EEXIST),
                Err(failure) => return Err(self.errno(failure)),
            }
            self.lock().names.child(parent, name).ok_or(Errno::EIO)
        })
        .await
    }

    /// Removes a file. A note about a refused one is only taken away here.
    pub(super) async fn unlink(
        self: &Arc<Self>,
        parent: u64,
        name: &str,
        caller: Caller,
    ) -> Result<(), Errno> {
        let (inode, path) = {
            let state = self.lock();
            let inode = state.names.child(parent, name).ok_or(Errno::ENOENT)?;
            (inode, state.names.path(inode)?)
        };
        let is_note = {
            let state = self.lock();
            let one = state.names.get(inode)?;
            match &one.body {
                Body::Folder(_) => return Err(Errno::EISDIR),
                Body::Generated(_) if !one.is_note() => return Err(Errno::EPERM),
                Body::Generated(_) => true,
                Body::File(_) => false,
            }
        };
        if is_note {
            caller.require_root()?;
            self.change(|names| ((), names.unlink(inode)));
            return Ok(());
        }
        self.may_write(caller, &path)?;
        if self.is_moved_by_hand(inode, caller) {
            return Err(Errno::EPERM);
        }
        bounded(async {
            let _names = self.names.read().await;
            let _order = self.in_order(inode).await;
            self.unlink_in_order(inode, caller).await
        })
        .await
    }

    async fn unlink_in_order(&self, inode: u64, caller: Caller) -> Result<(), Errno> {
        let changes = {
            let mut state = self.lock();
            let path = state.names.path(inode)?;
            let parent = state.names.get(inode)?.parent;
            if state.names.file(inode)?.stored.is_none() {
                None
            } else {
                let kept = keep(&state.names, parent, inode);
                Some([FileChange::remove(path)].into_iter().chain(kept).collect())
            }
        };
        if let Some(changes) = changes {
            self.commit(changes, caller).await.map_err(|failure| self.errno_of_removal(failure))?;
        }
        // Where this node lags behind its own commit, or the file was never in the store.
        self.change(|names| ((), names.unlink(inode)));
        Ok(())
    }

    /// Removes an empty folder.
    pub(super) async fn rmdir(
        self: &Arc<Self>,
        parent: u64,
        name: &str,
        caller: Caller,
    ) -> Result<(), Errno> {
        let path = {
            let state = self.lock();
            let inode = state.names.child(parent, name).ok_or(Errno::ENOENT)?;
            state.names.path(inode)?
        };
        self.may_write(caller, &path)?;
        bounded(async {
            let _names = self.names.write().await;
            let changes = {
                let state = self.lock();
                let inode = state.names.child(parent, name).ok_or(Errno::ENOENT)?;
                let folder = state.names.folder(inode)?;
                if folder.fixed {
                    return Err(Errno::EBUSY);
                }
                if !is_empty(&state.names, inode)? {
                    return Err(Errno::ENOTEMPTY);
                }
                let kept = keep(&state.names, parent, inode);
                let marker = FileChange::remove(names::marker(&path));
                [marker].into_iter().chain(kept).collect()
            };
            self.commit(changes, caller).await.map_err(|failure| self.errno_of_removal(failure))?;
            Ok(())
        })
        .await
    }

    /// As [`Tree::errno`]; what is in use is busy rather than invalid.
    pub(super) fn errno_of_removal(&self, failure: Failure) -> Errno {
        match self.errno(failure) {
            Errno::EINVAL => Errno::EBUSY,
            other => other,
        }
    }
}

/// Whether a folder has nothing in it but notes.
pub(super) fn is_empty(names: &Namespace, inode: u64) -> Result<bool, Errno> {
    let children = names.folder(inode)?.children.values();
    Ok(children.into_iter().all(|child| names.get(*child).is_ok_and(|child| child.is_note())))
}

/// What keeps a folder that lives by its last entry alone when this entry goes.
pub(super) fn keep(names: &Namespace, folder: u64, leaving: u64) -> Option<FileChange> {
    let inode = names.folder(folder).ok()?;
    if folder == ROOT || inode.fixed || inode.marker.is_some() {
        return None;
    }
    let stays = |child: &&u64| **child != leaving && names.get(**child).is_ok_and(|c| !c.is_note());
    if inode.children.values().any(|child| stays(&child)) {
        return None;
    }
    let path = names.path(folder).ok()?;
    Some(FileChange::write(names::marker(&path), Vec::new()))
}
