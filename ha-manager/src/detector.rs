//! The leader's failure detector: when may a node be called dead?
//!
//! Intuition: the leader remembers when it last *received* a heartbeat of each node. A node whose
//! heartbeat came in at `r` counted its own lease from before `r`, so `L` after `r` it has ended
//! its HA VMs or was reset (see [`crate::lease`]). What other leaders heard is unknown to this
//! one, so everyone gets a full `L` from this leader's own election, and again after each time
//! that the leader itself did not run for a while.
//!
//! Rejected: to hand the times over from leader to leader (they are on another machine's clock),
//! and to trust the log's times (a log entry per heartbeat wears disks and says when it was
//! proposed, not when the node sent it).
//!
//! Owns: the times of one leadership. Never: fences, or decides what a dead node means.
//!
//! Invariant: a [`Verdict::Dead`] is only given by a leader that has led, without a stall, for L.

use std::collections::BTreeMap;

use proto::NodeId;
use serde::Serialize;

use crate::lease::Timing;

/// What the detector thinks of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// This node does not lead: it knows nothing.
    NotLeading,
    /// Heard within the last three heartbeats.
    Alive {
        /// Since its last heartbeat came in.
        age_ms: u64,
    },
    /// Not heard lately, or not yet by this leader. Its VMs may well run.
    Unknown {
        /// Since its last heartbeat came in, or since this leader began to count.
        age_ms: u64,
    },
    /// Not heard for the whole lease time: none of its HA VMs runs any more.
    Dead {
        /// Since its last heartbeat came in, or since this leader began to count.
        age_ms: u64,
    },
}

/// The state of a node as people see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeState {
    /// Up, takes VMs.
    Online,
    /// Up, drained: takes no VMs, gives its VMs away.
    Maintenance,
    /// Not heard lately.
    Unknown,
    /// Declared dead, the record not yet committed.
    Fencing,
    /// Declared dead by a committed record; has not come back clean yet.
    Fenced,
    /// No longer a member.
    Gone,
}

impl NodeState {
    /// The state of a node, from its record's `maintenance` (`None`: no record), whether a
    /// fenced record exists, and the detector's verdict.
    #[must_use]
    pub fn of(maintenance: Option<bool>, fenced: bool, verdict: Verdict) -> Self {
        match (maintenance, fenced, verdict) {
            (None, _, _) => Self::Gone,
            (Some(_), true, _) => Self::Fenced,
            (Some(_), false, Verdict::Dead { .. }) => Self::Fencing,
            (Some(_), false, Verdict::Unknown { .. } | Verdict::NotLeading) => Self::Unknown,
            (Some(true), false, Verdict::Alive { .. }) => Self::Maintenance,
            (Some(false), false, Verdict::Alive { .. }) => Self::Online,
        }
    }

    /// The word shown to people.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Maintenance => "maintenance",
            Self::Unknown => "unknown",
            Self::Fencing => "fencing",
            Self::Fenced => "fenced",
            Self::Gone => "gone",
        }
    }
}

/// One node's detector. It counts only while that node leads.
#[derive(Debug, Clone)]
pub struct Detector {
    me: NodeId,
    timing: Timing,
    leading: Option<Leading>,
}

#[derive(Debug, Clone)]
struct Leading {
    term: u64,
    /// No node is counted from before this moment: the election, or the end of the last stall.
    since_ms: u64,
    ticked_ms: u64,
    heard_ms: BTreeMap<NodeId, u64>,
}

impl Detector {
    /// A detector that does not lead. `me` is the node it runs on.
    #[must_use]
    pub fn new(me: NodeId, timing: Timing) -> Self {
        Self { me, timing, leading: None }
    }

    /// This node leads in `term`. Call on the first knowledge of it; more calls for the same term
    /// change nothing, another term starts afresh.
    pub fn lead(&mut self, term: u64, now_ms: u64) {
        if self.leading.as_ref().is_none_or(|leading| leading.term != term) {
            let heard_ms = BTreeMap::new();
            self.leading = Some(Leading { term, since_ms: now_ms, ticked_ms: now_ms, heard_ms });
        }
    }

    /// This node does not lead (any more): everything heard is forgotten.
    pub fn follow(&mut self) {
        self.leading = None;
    }

    /// To be called at least each heartbeat interval, and before verdicts are asked for. A longer
    /// gap means that this machine stood still while heartbeats may have waited in its sockets or
    /// gone elsewhere: everyone gets a full L again.
    pub fn tick(&mut self, now_ms: u64) {
        let stall_ms = self.timing.stall_ms();
        if let Some(leading) = &mut self.leading {
            if now_ms.saturating_sub(leading.ticked_ms) > stall_ms {
                leading.since_ms = now_ms;
            }
            leading.ticked_ms = now_ms;
        }
    }

    /// A heartbeat of `node` came in at `received_ms`; whether it is answered is another matter.
    pub fn heard(&mut self, node: NodeId, received_ms: u64) {
        if let Some(leading) = &mut self.leading {
            let last_ms = leading.heard_ms.entry(node).or_insert(received_ms);
            *last_ms = received_ms.max(*last_ms);
        }
    }

    /// The node was removed from the cluster.
    pub fn forget(&mut self, node: NodeId) {
        if let Some(leading) = &mut self.leading {
            leading.heard_ms.remove(&node);
        }
    }

    /// The term this node leads in.
    #[must_use]
    pub fn term(&self) -> Option<u64> {
        self.leading.as_ref().map(|leading| leading.term)
    }

    /// Since the node's heartbeat last came in here; `None` if it never did in this leadership.
    #[must_use]
    pub fn age_ms(&self, node: NodeId, now_ms: u64) -> Option<u64> {
        let heard_ms = *self.leading.as_ref()?.heard_ms.get(&node)?;
        Some(now_ms.saturating_sub(heard_ms))
    }

    /// What to think of a node now. The leader never calls itself dead: it cannot commit a
    /// fenced record without a quorum, and with one it is alive.
    #[must_use]
    pub fn verdict(&self, node: NodeId, now_ms: u64) -> Verdict {
        let Some(leading) = &self.leading else { return Verdict::NotLeading };
        if node == self.me {
            return Verdict::Alive { age_ms: 0 };
        }
        let heard_ms = leading.heard_ms.get(&node).copied();
        let counted_from_ms = heard_ms.unwrap_or(0).max(leading.since_ms);
        let silent_ms = now_ms.saturating_sub(counted_from_ms);
        let age_ms = now_ms.saturating_sub(heard_ms.unwrap_or(leading.since_ms));
        // The last tick may be old if the caller forgot it: then nothing is certain.
        let stalled = now_ms.saturating_sub(leading.ticked_ms) > self.timing.stall_ms();
        if silent_ms >= self.timing.lease_ms() && !stalled {
            Verdict::Dead { age_ms }
        } else if heard_ms.is_some() && age_ms <= self.timing.unknown_after_ms() {
            Verdict::Alive { age_ms }
        } else {
            Verdict::Unknown { age_ms }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: NodeId = NodeId(1);
    const OTHER: NodeId = NodeId(2);

    fn leading(now_ms: u64) -> Detector {
        let mut detector = Detector::new(ME, Timing::default());
        detector.lead(1, now_ms);
        detector
    }

    /// Ticks each second, as the leader's loop does, and gives the verdict at the end.
    fn run_to(detector: &mut Detector, from_ms: u64, to_ms: u64) -> Verdict {
        (from_ms..=to_ms).step_by(1_000).chain([to_ms]).for_each(|now_ms| detector.tick(now_ms));
        detector.verdict(OTHER, to_ms)
    }

    #[test]
    fn a_transcript_of_a_node_that_falls_silent() {
        let mut detector = leading(0);
        let mut heard_until = |from, to| {
            for now_ms in (from..=to).step_by(1_000) {
                detector.tick(now_ms);
                detector.heard(OTHER, now_ms);
            }
        };
        heard_until(0, 20_000);
        assert_eq!(detector.verdict(OTHER, 20_000), Verdict::Alive { age_ms: 0 });
        assert_eq!(run_to(&mut detector, 20_000, 23_000), Verdict::Alive { age_ms: 3_000 });
        assert_eq!(run_to(&mut detector, 23_000, 23_001), Verdict::Unknown { age_ms: 3_001 });
        assert_eq!(run_to(&mut detector, 23_001, 29_999), Verdict::Unknown { age_ms: 9_999 });
        assert_eq!(run_to(&mut detector, 29_999, 30_000), Verdict::Dead { age_ms: 10_000 });
        detector.heard(OTHER, 30_001);
        assert_eq!(detector.verdict(OTHER, 30_001), Verdict::Alive { age_ms: 0 });
    }

    #[test]
    fn a_new_leader_waits_a_full_lease_for_everyone() {
        let mut detector = leading(5_000);
        assert_eq!(detector.verdict(OTHER, 5_000), Verdict::Unknown { age_ms: 0 });
        assert_eq!(run_to(&mut detector, 5_000, 14_999), Verdict::Unknown { age_ms: 9_999 });
        assert_eq!(run_to(&mut detector, 14_999, 15_000), Verdict::Dead { age_ms: 10_000 });
    }

    #[test]
    fn a_leadership_lost_and_regained_starts_afresh() {
        let mut detector = leading(0);
        detector.heard(OTHER, 100);
        run_to(&mut detector, 0, 8_000);
        detector.follow();
        assert_eq!(detector.verdict(OTHER, 20_000), Verdict::NotLeading);
        detector.heard(OTHER, 20_500); // a late message to a follower counts for nothing
        detector.lead(3, 21_000);
        assert_eq!(detector.age_ms(OTHER, 21_000), None);
        assert_eq!(run_to(&mut detector, 21_000, 30_999), Verdict::Unknown { age_ms: 9_999 });
        // A term that was missed in between (no `follow` seen) starts afresh too.
        detector.lead(5, 30_999);
        assert_eq!(run_to(&mut detector, 30_999, 40_998), Verdict::Unknown { age_ms: 9_999 });
        detector.lead(5, 40_998);
        assert_eq!(run_to(&mut detector, 40_998, 40_999), Verdict::Dead { age_ms: 10_000 });
    }

    #[test]
    fn a_leader_that_stood_still_waits_again() {
        let mut detector = leading(0);
        detector.heard(OTHER, 0);
        detector.tick(1_000);
        // Stopped for a minute. Without a tick nothing is certain, with one the wait begins anew.
        assert!(matches!(detector.verdict(OTHER, 61_000), Verdict::Unknown { .. }));
        assert!(matches!(run_to(&mut detector, 61_000, 70_999), Verdict::Unknown { .. }));
        assert!(matches!(run_to(&mut detector, 70_999, 71_000), Verdict::Dead { .. }));
    }

    #[test]
    fn the_leader_never_calls_itself_dead() {
        let mut detector = leading(0);
        run_to(&mut detector, 0, 60_000);
        assert_eq!(detector.verdict(ME, 60_000), Verdict::Alive { age_ms: 0 });
    }

    #[test]
    fn node_states_from_what_is_known() {
        let (alive, lost) = (Verdict::Alive { age_ms: 0 }, Verdict::Unknown { age_ms: 5_000 });
        let dead = Verdict::Dead { age_ms: 10_000 };
        let cases = [
            (None, false, alive, NodeState::Gone),
            (None, true, dead, NodeState::Gone),
            (Some(false), false, alive, NodeState::Online),
            (Some(true), false, alive, NodeState::Maintenance),
            (Some(true), false, lost, NodeState::Unknown),
            (Some(false), false, Verdict::NotLeading, NodeState::Unknown),
            (Some(false), false, dead, NodeState::Fencing),
            (Some(false), true, dead, NodeState::Fenced),
            // It is back, but has not cleaned up yet.
            (Some(false), true, alive, NodeState::Fenced),
        ];
        for (maintenance, fenced, verdict, expected) in cases {
            assert_eq!(NodeState::of(maintenance, fenced, verdict), expected, "{verdict:?}");
        }
    }
}
