//! Fencing one node: one transaction, asked for until its outcome is known, beside the planning.
//!
//! ```text
//!  Leader::begin_fencing ─► FencingClaim ─► carry_out (a task of its own) ─► settled
//!      │ refused: heard meanwhile, or a fencing of this node is under way
//! ```
//!
//! Invariants: one fencing of a node at a time; while its outcome is not known, the node's
//! heartbeats are not acknowledged; what one leadership began never ends a claim of the next.

use std::time::Duration;

use cluster::{StoreError, TxnOutcome};
use proto::NodeId;
use tokio::sync::oneshot;

use super::leader::{Epoch, Leader};

/// How soon an unknown outcome is asked for again.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// The right of one leadership to fence a node, and the bar on that node's heartbeats. Dropped
/// without [`FencingClaim::settled`], the bar stays for as long as that leadership: the safe side.
#[derive(Debug)]
pub(super) struct FencingClaim {
    leader: Leader,
    node: NodeId,
    epoch: Epoch,
}

impl FencingClaim {
    pub(super) fn new(leader: Leader, node: NodeId, epoch: Epoch) -> Self {
        Self { leader, node, epoch }
    }

    /// The outcome is known: the node's heartbeats are answered by the records again.
    fn settled(self) {
        self.leader.end_fencing(self.node, self.epoch);
    }
}

/// What became of a fencing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fenced {
    /// It is committed.
    Committed,
    /// Something it compared has changed, or another leader acts: nothing was written.
    Overtaken,
    /// Nothing was written, or this node takes no part any more.
    Failed(String),
}

/// Carries a fencing out in a task of its own, and tells the outcome to whoever waits for it.
/// `commit` asks for the transaction, which is named: asking again does not do it twice.
pub(super) fn carry_out<C, F>(
    claim: FencingClaim,
    reason: String,
    mut commit: C,
) -> oneshot::Receiver<Fenced>
where
    C: FnMut() -> F + Send + 'static,
    F: Future<Output = Result<TxnOutcome, StoreError>> + Send,
{
    let (told, outcome) = oneshot::channel();
    tokio::spawn(async move {
        let node = claim.node;
        let mut may_be_written = false;
        let outcome = loop {
            match commit().await {
                Ok(TxnOutcome::Committed { .. }) => {
                    tracing::warn!(%node, "HA: fenced: {reason}");
                    break Fenced::Committed;
                }
                // Either way it is settled: it cannot be committed any more, or was.
                Ok(TxnOutcome::Conflict { .. }) | Err(StoreError::Forgotten { .. }) => {
                    break Fenced::Overtaken;
                }
                Err(error) => {
                    tracing::warn!(%node, "HA: fencing: {error}");
                    may_be_written |= perhaps_written(&error);
                    if is_over(&error) {
                        // The claim stays: this node acknowledges nothing any more anyway.
                        let _ = told.send(Fenced::Failed(error.to_string()));
                        return;
                    }
                    if !may_be_written {
                        break Fenced::Failed(error.to_string());
                    }
                    // As another leader's, it meets that one's epoch and comes to nothing: known.
                    tokio::time::sleep(ASK_AGAIN).await;
                }
            }
        };
        claim.settled();
        // Nobody waits for what the plan asked for: the next plan sees it.
        let _ = told.send(outcome);
    });
    outcome
}

/// Whether a transaction that failed so may be in the log.
fn perhaps_written(error: &StoreError) -> bool {
    !matches!(
        error,
        StoreError::NoQuorum { .. }
            | StoreError::DiskFull { .. }
            | StoreError::NoSpace { .. }
            | StoreError::TooLarge(_)
            | StoreError::Invalid(_)
    )
}

/// Whether this node will never learn the outcome.
fn is_over(error: &StoreError) -> bool {
    matches!(error, StoreError::Shutdown | StoreError::Failed { .. } | StoreError::Removed)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use ha_manager::Timing;
    use proto::Revision;

    use super::*;

    const DEAD: NodeId = NodeId(2);
    const OTHER: NodeId = NodeId(3);

    fn epoch(term: u64) -> Epoch {
        Epoch { term, revision: Revision(term * 10) }
    }

    fn committed() -> Result<TxnOutcome, StoreError> {
        Ok(TxnOutcome::Committed { revision: Revision(99) })
    }

    fn leading(term: u64) -> Leader {
        let leader = Leader::new(NodeId(1), Timing::default());
        leader.open(epoch(term));
        leader
    }

    #[tokio::test]
    async fn a_fencing_whose_outcome_is_not_known_holds_up_nothing_else() {
        let leader = leading(1);
        let asked = Arc::new(AtomicUsize::new(0));
        let claim = leader.begin_fencing(DEAD, epoch(1), true).unwrap();
        let counted = asked.clone();
        let outcome = carry_out(claim, "silent".into(), move || {
            counted.fetch_add(1, Ordering::SeqCst);
            std::future::pending()
        });
        while asked.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        assert!(leader.is_being_fenced(DEAD), "its heartbeats are not acknowledged");
        assert!(leader.begin_fencing(DEAD, epoch(1), true).is_none(), "one at a time");
        // The next node's goes its way meanwhile.
        let claim = leader.begin_fencing(OTHER, epoch(1), true).unwrap();
        let other = carry_out(claim, "silent".into(), || async { committed() });
        assert_eq!(other.await, Ok(Fenced::Committed));
        assert!(!leader.is_being_fenced(OTHER) && leader.is_being_fenced(DEAD));
        drop(outcome);
    }

    #[tokio::test]
    async fn an_unknown_outcome_is_asked_for_until_it_is_known() {
        let leader = leading(1);
        let claim = leader.begin_fencing(DEAD, epoch(1), true).unwrap();
        let unknown = || StoreError::UnknownOutcome { why: "cut off".into() };
        let no_quorum = || StoreError::NoQuorum { why: "cut off".into() };
        let mut answers =
            vec![committed(), Err(no_quorum()), Err(unknown()), Err(no_quorum())].into_iter().rev();
        // "Nothing was written" is the end of it only as long as nothing may be.
        let first = carry_out(claim, "silent".into(), {
            let answer = answers.next().unwrap();
            let mut answer = Some(answer);
            move || std::future::ready(answer.take().unwrap())
        });
        assert!(matches!(first.await, Ok(Fenced::Failed(_))));
        assert!(!leader.is_being_fenced(DEAD));
        let claim = leader.begin_fencing(DEAD, epoch(1), true).unwrap();
        let rest: Vec<_> = answers.collect();
        let mut rest = rest.into_iter();
        let outcome =
            carry_out(claim, "silent".into(), move || std::future::ready(rest.next().unwrap()));
        assert_eq!(outcome.await, Ok(Fenced::Committed));
    }

    #[tokio::test]
    async fn what_an_earlier_leadership_began_does_not_lift_the_bar_of_the_next() {
        let leader = leading(1);
        let old = leader.begin_fencing(DEAD, epoch(1), true).unwrap();
        let (answer, answered) = oneshot::channel();
        let mut answered = Some(answered);
        let outcome = carry_out(old, "silent".into(), move || {
            let answered = answered.take().unwrap();
            async { answered.await.unwrap() }
        });
        leader.open(epoch(2));
        assert!(leader.begin_fencing(DEAD, epoch(1), true).is_none(), "its epoch is over");
        let new = leader.begin_fencing(DEAD, epoch(2), true).unwrap();
        let conflict = TxnOutcome::Conflict { revision: Revision(1), conflicts: Vec::new() };
        answer.send(Ok(conflict)).unwrap();
        assert_eq!(outcome.await, Ok(Fenced::Overtaken));
        assert!(leader.is_being_fenced(DEAD), "the new leadership's fencing is under way");
        new.settled();
        assert!(!leader.is_being_fenced(DEAD));
    }
}
