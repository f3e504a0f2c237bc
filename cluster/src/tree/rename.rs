//! Renames: of a file over another, of a whole folder in one commit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use proto::Revision;

use super::change::{is_empty, keep};
use super::commit::Failure;
use super::inode::Body;
use super::names::{self, PATH_MAX};
use super::namespace::{Move, Namespace};
use super::state::{Caller, Stayed, Tree, bounded};
use crate::{FileChange, FileRefused};

/// Most files that one rename of a folder moves.
const FILES_MAX: usize = 2000;
/// Most bytes that it moves; the store takes little more in one transaction.
const BYTES_MAX: usize = 2_500_000;
/// Attempts while others change what is being moved.
const TRIES: usize = 20;
/// So long a program that could not rename a file may take to copy it.
const BY_HAND: Duration = Duration::from_secs(10);

/// From where to where.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rename<'a> {
    pub(super) from_parent: u64,
    pub(super) from_name: &'a str,
    pub(super) to_parent: u64,
    pub(super) to_name: &'a str,
    /// Nothing may be there.
    pub(super) no_replace: bool,
}

/// What a rename comes to.
enum Planned {
    Nothing,
    /// It is not in the store yet.
    Local(u64),
    /// It has to be saved first.
    SaveFirst(u64),
    /// It stands for something that this would remove.
    Stays {
        inode: u64,
        from: String,
        to: String,
    },
    Commit(Box<Moving>),
}

/// Keys that move.
struct Moving {
    inode: u64,
    from: String,
    to: String,
    is_folder: bool,
    /// Key and revision.
    keys: Vec<(String, u64)>,
    keep: Option<FileChange>,
    /// Content that is not saved yet.
    unsaved: Option<super::buffer::Plan>,
}

impl Tree {
    /// Renames.
    pub(super) async fn rename(
        self: &Arc<Self>,
        rename: Rename<'_>,
        caller: Caller,
    ) -> Result<(), Errno> {
        caller.require_root()?;
        bounded(async {
            let _names = self.names.write().await;
            for _ in 0..TRIES {
                let planned = plan(&self.lock().names, rename)?;
                match planned {
                    Planned::Nothing => return Ok(()),
                    Planned::Local(inode) => {
                        let (parent, name) = (rename.to_parent, rename.to_name);
                        self.change(|names| {
                            let mut stale = Vec::new();
                            names.relink(inode, parent, name, &mut stale);
                            ((), stale)
                        });
                        return Ok(());
                    }
                    Planned::SaveFirst(inode) => self.save_in_order(inode, caller).await?,
                    Planned::Stays { inode, from, to } => {
                        return Err(self.stays((inode, &from), &to, caller));
                    }
                    Planned::Commit(moving) => {
                        self.may_write(caller, &moving.from)?;
                        self.may_write(caller, &moving.to)?;
                        if self.try_rename(rename, moving, caller).await? {
                            return Ok(());
                        }
                    }
                }
            }
            Err(Errno::EAGAIN)
        })
        .await
    }

    /// Says why a document was not moved away, and remembers for whom.
    fn stays(&self, (inode, from): (u64, &str), to: &str, caller: Caller) -> Errno {
        let reason = format!(
            "{from} was not renamed to {to}: that would remove what the document stands for; write \
             into it, or rename another file over it (a backup is a copy, `cp`)"
        );
        tracing::info!(%reason, "a change in the mounted tree was refused");
        self.lock().stayed = Some(Stayed { inode, pid: caller.pid, at: Instant::now() });
        self.change(|names| ((), names.note(from, &reason)));
        Errno::EPERM
    }

    /// Whether a document stays although it is to be removed: the very program was just told that
    /// it cannot be moved away, and does it by hand (it has copied it).
    pub(super) fn is_moved_by_hand(&self, inode: u64, caller: Caller) -> bool {
        let mut state = self.lock();
        let same = |stayed: &mut Stayed| stayed.inode == inode && stayed.pid == caller.pid;
        let stayed = state.stayed.take_if(same);
        stayed.is_some_and(|stayed| stayed.at.elapsed() < BY_HAND)
    }

    /// One attempt; false: somebody changed what is being moved.
    async fn try_rename(
        self: &Arc<Self>,
        rename: Rename<'_>,
        moving: Box<Moving>,
        caller: Caller,
    ) -> Result<bool, Errno> {
        let Some(changes) = self.changes(&moving, rename.no_replace).await? else {
            return Ok(false);
        };
        let first = moving.keys.first().map(|(key, _)| key.clone()).unwrap_or_default();
        let expected = Move {
            inode: moving.inode,
            to_parent: rename.to_parent,
            to_name: rename.to_name.to_owned(),
            to_key: moved(&first, &moving),
            from_key: first,
        };
        let expecting = Expecting::begin(self, expected);
        let outcome = self.commit(changes, caller).await;
        drop(expecting);
        let revision = match outcome {
            Ok(revision) => revision,
            Err(Failure::Refused(FileRefused::Conflict { path, .. })) => {
                let occupied = rename.no_replace && path == moving.to;
                return if occupied { Err(Errno::EEXIST) } else { Ok(false) };
            }
            Err(failure) => {
                return Err(match self.errno_at(&moving.to, failure) {
                    // To `mv` this would mean a folder that is moved into itself, and it says so.
                    Errno::EINVAL => Errno::EBADMSG,
                    errno => errno,
                });
            }
        };
        if let Some(plan) = &moving.unsaved
            && let Ok(file) = self.lock().names.file(moving.inode)
            && let Some(buffer) = &mut file.buffer
        {
            buffer.committed(plan, plan.content.len(), revision);
            file.touched = None;
        }
        self.refresh(moving.inode).await.or_else(|error| match error {
            // A folder has nothing to refresh.
            Errno::EISDIR => Ok(()),
            other => Err(other),
        })?;
        Ok(true)
    }

    /// The changes of one commit; None: the store is not what the names in memory say.
    async fn changes(
        &self,
        moving: &Moving,
        no_replace: bool,
    ) -> Result<Option<Vec<FileChange>>, Errno> {
        let keys = moving.keys.iter().map(|(key, _)| key.clone()).collect();
        let contents = self.source.contents(keys).await?;
        let mut bytes = 0;
        let mut changes: Vec<FileChange> = moving.keep.iter().cloned().collect();
        for ((key, revision), content) in moving.keys.iter().zip(contents) {
            let Some((mut content, present)) = content else { return Ok(None) };
            if present != *revision {
                return Ok(None);
            }
            if let Some(plan) = &moving.unsaved {
                content.clone_from(&plan.content);
            }
            let to = moved(key, moving);
            if to.len() > PATH_MAX {
                return Err(Errno::ENAMETOOLONG);
            }
            bytes += key.len() + to.len() + content.len();
            changes.push(FileChange::remove(key.as_str()).if_revision(Revision(*revision)));
            let put = FileChange::write(to, content);
            changes.push(if no_replace { put.if_revision(Revision(0)) } else { put });
        }
        if moving.is_folder && bytes > BYTES_MAX {
            return Err(Errno::E2BIG);
        }
        Ok(Some(changes))
    }
}

/// An expected move; it ends with the attempt, also with one that is given up midway.
struct Expecting<'a> {
    tree: &'a Tree,
    expected: Move,
}

impl<'a> Expecting<'a> {
    fn begin(tree: &'a Tree, expected: Move) -> Self {
        tree.lock().names.expect_move(expected.clone());
        Self { tree, expected }
    }
}

impl Drop for Expecting<'_> {
    fn drop(&mut self) {
        self.tree.lock().names.end_move(&self.expected);
    }
}

/// What becomes of a key.
fn moved(key: &str, moving: &Moving) -> String {
    format!("{}{}", moving.to, &key[moving.from.len().min(key.len())..])
}

/// What is to be done, by the names in memory.
fn plan(names: &Namespace, rename: Rename<'_>) -> Result<Planned, Errno> {
    let Rename { from_parent, from_name, to_parent, to_name, no_replace } = rename;
    let inode = names.child(from_parent, from_name).ok_or(Errno::ENOENT)?;
    names.live_folder(to_parent)?;
    let from = names.path(inode)?;
    let to = names::join(&names.path(to_parent)?, to_name)?;
    let target = names.child(to_parent, to_name);
    if target == Some(inode) {
        return Ok(Planned::Nothing);
    }
    if target.is_some() && no_replace {
        return Err(Errno::EEXIST);
    }
    if names::is_private(&from) || names::is_private(&to) || names::is_status(&to) {
        return Err(Errno::EPERM);
    }
    let is_folder = match &names.get(inode)?.body {
        Body::Generated(_) => return Err(Errno::EPERM),
        Body::Folder(folder) if folder.fixed => return Err(Errno::EBUSY),
        Body::Folder(_) => true,
        Body::File(_) => false,
    };
    if is_folder && to.starts_with(&names::marker(&from)) {
        return Err(Errno::EINVAL);
    }
    if let Some(target) = target {
        check_target(names, target, is_folder)?;
    }
    let moving = |keys, unsaved| Moving {
        inode,
        from: from.clone(),
        to: to.clone(),
        is_folder,
        keys,
        keep: keep(names, from_parent, inode),
        unsaved,
    };
    if is_folder {
        let keys: Vec<_> = names.keys(&names::marker(&from)).into_iter().collect();
        return match keys.len() {
            0 => Ok(Planned::Local(inode)),
            count if count > FILES_MAX => Err(Errno::E2BIG),
            _ => Ok(Planned::Commit(Box::new(moving(keys, None)))),
        };
    }
    let Some(file) = names.get(inode)?.file() else { return Err(Errno::EPERM) };
    let target_stored = target.and_then(|target| names.get(target).ok()?.file()?.stored).is_some();
    match file.stored {
        None if target_stored => Ok(Planned::SaveFirst(inode)),
        None => Ok(Planned::Local(inode)),
        Some(_) if names::is_object(&from) && !names::is_object(&to) => {
            Ok(Planned::Stays { inode, from: from.clone(), to: to.clone() })
        }
        Some(stored) => {
            let unsaved = file.buffer.as_ref().and_then(super::buffer::Buffer::plan);
            let keys = vec![(from.clone(), stored.revision)];
            Ok(Planned::Commit(Box::new(moving(keys, unsaved))))
        }
    }
}

/// Whether something may be replaced.
fn check_target(names: &Namespace, target: u64, by_folder: bool) -> Result<(), Errno> {
    match (&names.get(target)?.body, by_folder) {
        (Body::Generated(_), _) => Err(Errno::EPERM),
        (Body::File(_), true) => Err(Errno::ENOTDIR),
        (Body::File(_), false) => Ok(()),
        (Body::Folder(_), false) => Err(Errno::EISDIR),
        (Body::Folder(folder), true) if folder.fixed => Err(Errno::EBUSY),
        (Body::Folder(_), true) if !is_empty(names, target)? => Err(Errno::ENOTEMPTY),
        (Body::Folder(_), true) => Ok(()),
    }
}
