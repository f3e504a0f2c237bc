//! What is known of the quorum, so that a write without one is refused at once.
//!
//! Lost: a voter has no leader or cannot reach it (at once where a connection is refused, after
//! [`SILENT_LEADER`] where the leader lost its power and says nothing at all), or as the leader has
//! not heard of a majority for [`SILENCE`]; a learner, which no leader owes anything, asks when a
//! write is not answered. A store that is only slow is none that was lost. Found again: by an answer
//! of the quorum.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::source::Source;

/// So long without contact is a loss.
const SILENCE: Duration = Duration::from_millis(700);
/// A write without a quorum fails after this: an election takes no longer, as a rule.
const PATIENCE: Duration = Duration::from_millis(900);
/// Between two looks.
const EVERY: Duration = Duration::from_millis(100);
/// How long the quorum may take to answer a question.
const ANSWER: Duration = Duration::from_millis(1000);
/// A leader that says nothing for so long, asked after [`PATIENCE`], is gone.
const SILENT_LEADER: Duration = Duration::from_millis(1500);

/// Whether there is one.
#[derive(Debug, Clone, Default)]
pub(super) struct Quorum {
    lost: Arc<AtomicBool>,
    /// It did not answer when it was asked last, for somebody who only looks.
    unheard: Arc<AtomicBool>,
}

impl Quorum {
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    /// For those who only look: as it was when it was asked last, or is known since.
    pub(super) fn seems_lost(&self) -> bool {
        self.is_lost() || self.unheard.load(Ordering::SeqCst)
    }

    /// Asks, as `cluster status` does and with its patience: a follower whose leader says nothing
    /// knows of no loss by itself. No write is refused for it: one finds out in its own time.
    pub(super) async fn ask(&self, source: &Source) {
        if self.is_lost() {
            return;
        }
        let patience = source.node().config().request_timeout / 2;
        let heard = matches!(tokio::time::timeout(patience, source.quorum()).await, Ok(Ok(())));
        self.unheard.store(!heard, Ordering::SeqCst);
    }

    /// A write found none.
    pub(super) fn lose(&self) {
        if !self.lost.swap(true, Ordering::SeqCst) {
            tracing::warn!("no quorum: the mounted tree is read-only until there is one");
        }
    }

    /// Resolves if a write that began then has to be given up for want of a quorum.
    pub(super) async fn lost_for(&self, source: &Source, begin: Instant) {
        let (mut cut_off, mut asked_again) = (None, false);
        loop {
            tokio::time::sleep(EVERY).await;
            let node = source.node();
            let silent = if node.is_voter() {
                if begin.elapsed() >= PATIENCE / 2 && cut_off.is_none() {
                    cut_off = Some(node.leader_unreachable(PATIENCE / 3).await);
                }
                if begin.elapsed() >= PATIENCE && cut_off == Some(false) && !asked_again {
                    asked_again = true;
                    cut_off = Some(node.leader_silent(SILENT_LEADER).await);
                }
                let silent = cut_off == Some(true) || node.out_of_touch(SILENCE);
                begin.elapsed() >= PATIENCE && silent
            } else {
                !matches!(tokio::time::timeout(PATIENCE - EVERY, source.quorum()).await, Ok(Ok(())))
            };
            if silent {
                return self.lose();
            }
        }
    }

    /// Keeps watch until it is dropped.
    pub(super) async fn follow(self, source: Source) {
        let mut silent_since: Option<Instant> = None;
        loop {
            tokio::time::sleep(EVERY).await;
            if source.node().out_of_touch(SILENCE) {
                let since = *silent_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= PATIENCE {
                    self.lose();
                }
            } else {
                silent_since = None;
                if self.is_lost()
                    && matches!(tokio::time::timeout(ANSWER, source.quorum()).await, Ok(Ok(())))
                {
                    self.lost.store(false, Ordering::SeqCst);
                    self.unheard.store(false, Ordering::SeqCst);
                    tracing::info!("there is a quorum again: the mounted tree can be written");
                }
            }
        }
    }
}
