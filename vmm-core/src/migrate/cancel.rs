//! Cancelling a migration: possible until the commit begins, by one atomic step.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

const OPEN: u8 = 0;
const CANCELLED: u8 = 1;
const COMMITTING: u8 = 2;

/// Shared between a migration and whoever may cancel it.
///
/// Invariant: it leaves `OPEN` once, to `CANCELLED` or to `COMMITTING`, and never changes again; so
/// a cancel that was accepted is never followed by a commit.
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<AtomicU8>);

impl CancelToken {
    /// Cancels; false if the commit has begun, which can't be stopped any more.
    #[must_use]
    pub fn cancel(&self) -> bool {
        self.leave_open(CANCELLED)
    }

    /// Whether it was cancelled.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire) == CANCELLED
    }

    /// Begins the commit; false if it was cancelled before.
    #[must_use]
    pub(crate) fn begin_commit(&self) -> bool {
        self.leave_open(COMMITTING)
    }

    fn leave_open(&self, to: u8) -> bool {
        match self.0.compare_exchange(OPEN, to, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => true,
            Err(state) => state == to,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cancel_and_commit_exclude_each_other() {
        let token = CancelToken::default();
        assert!(token.cancel() && token.cancel() && token.is_cancelled() && !token.begin_commit());
        let token = CancelToken::default();
        assert!(token.begin_commit() && !token.cancel() && !token.is_cancelled());
    }
}
