//! Committing: one way to the writer, with the limits that a program's `close` needs.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::state::{Caller, Tree};
use crate::{FileChange, FileRefused};

/// How long a commit may take while there is a quorum. The kernel lets nobody list a folder while
/// something in it is being made, moved or removed: this bounds that, too.
const LIMIT: Duration = Duration::from_secs(8);
/// How long this node may lag behind its own commit.
const LAG: Duration = Duration::from_secs(3);

/// Why a commit failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The writer's answer.
    Refused(FileRefused),
    /// No quorum was found in time: given up, whatever becomes of it.
    GivenUp,
    /// It was not tried.
    Errno(Errno),
}

/// What a person is told of a change that was given up.
const GIVEN_UP: &str = "the outcome is unknown: the quorum was lost while the change was under way; \
                        look at the file when there is one again, before repeating the change";

impl Tree {
    /// Commits changes, and waits until the names in memory have them. The answer is the revision.
    pub(super) async fn commit(
        &self,
        changes: Vec<FileChange>,
        caller: Caller,
    ) -> Result<u64, Failure> {
        if self.quorum.is_lost() {
            return Err(Failure::Errno(Errno::EROFS));
        }
        let author = self.author(caller);
        let commit = tokio::time::timeout(LIMIT, self.writer.commit(changes, &author));
        let answer = tokio::select! {
            answer = commit => answer.map_err(|_| unanswered())?,
            () = self.quorum.lost_for(&self.source, Instant::now()) => return Err(Failure::GivenUp),
        };
        match answer {
            Ok(revision) => {
                self.wait_applied(revision.0).await;
                Ok(revision.0)
            }
            Err(refused) => {
                if let FileRefused::NoQuorum(_) = refused {
                    self.quorum.lose();
                }
                Err(Failure::Refused(refused))
            }
        }
    }

    /// Waits until the names in memory have a revision. A node that lags shows it a little later.
    async fn wait_applied(&self, revision: u64) {
        let mut applied = self.applied.subscribe();
        let waited = tokio::time::timeout(LAG, applied.wait_for(|now| *now >= revision));
        if waited.await.is_err() {
            tracing::debug!(revision, "the mounted tree lags behind its own commit");
        }
    }

    /// What a program is told of a failure; a refused document gets its note.
    pub(super) fn errno(&self, failure: Failure) -> Errno {
        let refused = match failure {
            Failure::Errno(errno) => return errno,
            Failure::GivenUp => return Errno::EROFS,
            Failure::Refused(refused) => refused,
        };
        tracing::info!(%refused, "a change in the mounted tree was refused");
        match &refused {
            FileRefused::Invalid { path, .. } => {
                let reason = match self.removed_at(path) {
                    Some(revision) => format!("{refused}\n\n{}", removed_before(path, revision)),
                    None => refused.to_string(),
                };
                self.change(|names| ((), names.note(path, &reason)));
                Errno::EINVAL
            }
            FileRefused::Conflict { .. } => Errno::EAGAIN,
            FileRefused::Denied(_) => Errno::EACCES,
            FileRefused::TooLarge(_) => Errno::EFBIG,
            FileRefused::NoQuorum(_) => Errno::EROFS,
            FileRefused::Unknown(_) => Errno::EIO,
            FileRefused::Full(_) => Errno::ENOSPC,
            FileRefused::Busy(_) if self.source.node().db().disk_low() => Errno::ENOSPC,
            FileRefused::Busy(_) => Errno::EBUSY,
        }
    }

    /// The revision that removed a file that is not there, if that was not long ago.
    fn removed_at(&self, path: &str) -> Option<u64> {
        let state = self.lock();
        let last = state.log.iter().rev().find(|line| line.path == path)?;
        last.removed.then_some(last.revision)
    }

    /// As [`Tree::errno`], where one file is written: who may not write it, finds no room, or cannot
    /// know what became of it, is told so beside it.
    pub(super) fn errno_at(&self, path: &str, failure: Failure) -> Errno {
        if let Some(reason) = reason_beside(&failure) {
            self.change(|names| ((), names.note(path, &reason)));
        }
        self.errno(failure)
    }

    /// Whether a change may begin at all.
    pub(super) fn may_write(&self, caller: Caller, path: &str) -> Result<(), Errno> {
        caller.require_root()?;
        if super::names::is_private(path) {
            return Err(Errno::EACCES);
        }
        if super::names::is_status(path) {
            return Err(Errno::EPERM);
        }
        if self.quorum.is_lost() { Err(Errno::EROFS) } else { Ok(()) }
    }

    fn author(&self, caller: Caller) -> String {
        let node = self.cluster.node_name().borrow().clone();
        match user_name(caller.uid) {
            Some(name) => format!("uid {} ({name}) on {node}", caller.uid),
            None => format!("uid {} on {node}", caller.uid),
        }
    }
}

/// What else is said of a document that was refused, where the one before it is gone: `mv` and
/// `install` from another file system remove that first.
fn removed_before(path: &str, revision: u64) -> String {
    format!(
        "{path} was removed before, in revision {revision}, as `mv` and `install` from another file \
         system do: there is none now. Its content from before comes back with `clusterctl config \
         rollback {path} --to {}`",
        revision.saturating_sub(1)
    )
}

/// What is said beside a file, of what an error's number does not tell.
fn reason_beside(failure: &Failure) -> Option<String> {
    match failure {
        Failure::GivenUp => Some(GIVEN_UP.to_owned()),
        Failure::Refused(
            refused @ (FileRefused::Denied(_)
            | FileRefused::Full(_)
            | FileRefused::TooLarge(_)
            | FileRefused::Unknown(_)),
        ) => Some(refused.to_string()),
        // A refused document has its note from [`Tree::errno`]; the others say enough.
        Failure::Refused(
            FileRefused::Invalid { .. }
            | FileRefused::Conflict { .. }
            | FileRefused::NoQuorum(_)
            | FileRefused::Busy(_),
        )
        | Failure::Errno(_) => None,
    }
}

fn unanswered() -> Failure {
    let why = format!("no answer within {LIMIT:?}; look at the file before repeating the change");
    Failure::Refused(FileRefused::Unknown(why))
}

/// A user's name by `/etc/passwd` alone: a directory service could hang.
fn user_name(uid: u32) -> Option<String> {
    static KNOWN: Mutex<BTreeMap<u32, Option<String>>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let looked_up = || {
        let text = std::fs::read_to_string("/etc/passwd").ok()?;
        let line = text.lines().find(|line| line.split(':').nth(2) == Some(&uid.to_string()))?;
        let name: String = line.split(':').next()?.chars().take(32).collect();
        let plain = |letter: char| letter.is_ascii_graphic();
        (!name.is_empty() && name.chars().all(plain)).then_some(name)
    };
    known.entry(uid).or_insert_with(looked_up).clone()
}
