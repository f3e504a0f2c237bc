//! Telling the kernel what to forget. A thread of its own does it: such a call waits for locks
//! that the kernel holds while it waits for an answer of the tree.
//!
//! Invariant: nobody waits for this thread.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use fuser::{INodeNo, Notifier};

use super::namespace::Stale;

/// What is still to be told.
#[derive(Debug, Clone, Default)]
pub(super) struct Notices {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// A set: what changes often is told once. It is never larger than the tree.
    waiting: BTreeSet<Stale>,
    ended: bool,
}

impl Notices {
    /// Hands over; never blocks for long.
    pub(super) fn tell(&self, stale: Vec<Stale>) {
        if stale.is_empty() {
            return;
        }
        let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if !queue.ended {
            queue.waiting.extend(stale);
            self.shared.more.notify_one();
        }
    }

    /// Ends the thread once it comes back from the kernel.
    pub(super) fn end(&self) {
        let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.ended = true;
        queue.waiting.clear();
        self.shared.more.notify_one();
    }

    /// Starts the thread.
    pub(super) fn spawn(&self, notifier: Notifier) -> std::io::Result<()> {
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name("tree-notices".to_owned());
        thread.spawn(move || {
            while let Some(batch) = shared.next() {
                for stale in batch {
                    tell_kernel(&notifier, &stale);
                }
            }
        })?;
        Ok(())
    }
}

impl Shared {
    fn next(&self) -> Option<BTreeSet<Stale>> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        while queue.waiting.is_empty() {
            if queue.ended {
                return None;
            }
            queue = self.more.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        Some(std::mem::take(&mut queue.waiting))
    }
}

fn tell_kernel(notifier: &Notifier, stale: &Stale) {
    let told = match stale {
        // All pages: what is mapped into memory is read again too.
        Stale::Inode(inode) => notifier.inval_inode(INodeNo(*inode), 0, 0),
        Stale::Entry { parent, name, inode } => {
            // Wakes those who watch the file with inotify as well.
            let gone = notifier.delete(INodeNo(*parent), INodeNo(*inode), OsStr::new(name));
            gone.or_else(|_| notifier.inval_entry(INodeNo(*parent), OsStr::new(name)))
        }
    };
    // What the kernel does not know it has nothing to forget of.
    if let Err(error) = told {
        tracing::debug!(%error, ?stale, "the kernel did not take a notice");
    }
}
