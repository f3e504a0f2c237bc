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
use proto::record::NodeRecord;
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
    /// Drained, or absent as planned: takes no VMs, gives its VMs away.
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
    /// The state of a node, from its record, whether a fenced record exists, and the detector's
    /// verdict. A planned absence is maintenance, silent or not, once nothing runs there.
    #[must_use]
    pub fn of(record: &NodeRecord, fenced: bool, verdict: Verdict) -> Self {
        let absent = record.absence.is_some();
        let clear = record.absence.is_some_and(|absence| absence.clear);
        match verdict {
            _ if fenced => Self::Fenced,
            _ if clear => Self::Maintenance,
            Verdict::Dead { .. } => Self::Fencing,
            Verdict::Unknown { .. } | Verdict::NotLeading => Self::Unknown,
            Verdict::Alive { .. } if absent || record.maintenance => Self::Maintenance,
            Verdict::Alive { .. } => Self::Online,
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
    /// Since when each node's lease is known to bind its VMs; a node that is missing: from before.
    bound_ms: BTreeMap<NodeId, Option<u64>>,
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
            self.leading = Some(Leading {
                term,
                since_ms: now_ms,
                ticked_ms: now_ms,
                heard_ms: BTreeMap::new(),
                bound_ms: BTreeMap::new(),
            });
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

    /// Whether the configuration, as it was just read, says that the node's lease binds its VMs:
    /// not while HA is disarmed, and not before the node has said after that that it does again; nor
    /// while it is down as planned.
    /// Silence from before proves nothing: a full L is counted from the first time that it is read
    /// here. To be told at each reading.
    pub fn binds(&mut self, node: NodeId, binds: bool, now_ms: u64) {
        if let Some(leading) = &mut self.leading {
            let since_ms = leading.bound_ms.entry(node).or_insert(None);
            *since_ms = if binds { since_ms.or(Some(now_ms)) } else { None };
        }
    }

    /// The node was removed from the cluster.
    pub fn forget(&mut self, node: NodeId) {
        if let Some(leading) = &mut self.leading {
            leading.heard_ms.remove(&node);
            leading.bound_ms.remove(&node);
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
        let bound_ms = leading.bound_ms.get(&node).copied();
        let unbound = bound_ms == Some(None);
        let counted_from_ms =
            heard_ms.unwrap_or(0).max(leading.since_ms).max(bound_ms.flatten().unwrap_or(0));
        let silent_ms = now_ms.saturating_sub(counted_from_ms);
        let age_ms = now_ms.saturating_sub(heard_ms.unwrap_or(leading.since_ms));
        // The last tick may be old if the caller forgot it: then nothing is certain.
        let stalled = now_ms.saturating_sub(leading.ticked_ms) > self.timing.stall_ms();
        if silent_ms >= self.timing.lease_ms() && !stalled && !unbound {
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
    fn silence_while_no_lease_binds_proves_nothing() {
        let mut detector = leading(0);
        detector.heard(OTHER, 0);
        detector.binds(OTHER, true, 0);
        detector.binds(OTHER, false, 1_000);
        assert!(matches!(run_to(&mut detector, 0, 60_000), Verdict::Unknown { .. }));
        // It says that it binds again, and falls silent at once: a full L from now.
        detector.binds(OTHER, true, 60_000);
        detector.binds(OTHER, true, 65_000);
        assert!(matches!(run_to(&mut detector, 60_000, 69_999), Verdict::Unknown { .. }));
        assert!(matches!(run_to(&mut detector, 69_999, 70_000), Verdict::Dead { .. }));
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
        let going = serde_json::json!({"absence": {"kind": "reboot"}});
        let gone = serde_json::json!({"absence": {"kind": "reboot", "clear": true}});
        let (well, drained) = (serde_json::json!({}), serde_json::json!({"maintenance": true}));
        let cases = [
            (&well, false, alive, NodeState::Online),
            (&drained, false, alive, NodeState::Maintenance),
            (&drained, false, lost, NodeState::Unknown),
            (&well, false, Verdict::NotLeading, NodeState::Unknown),
            (&well, false, dead, NodeState::Fencing),
            (&well, true, dead, NodeState::Fenced),
            // It is back, but has not cleaned up yet.
            (&well, true, alive, NodeState::Fenced),
            // It dies on its way down: something may run there.
            (&going, false, alive, NodeState::Maintenance),
            (&going, false, dead, NodeState::Fencing),
            (&gone, false, lost, NodeState::Maintenance),
            (&gone, false, dead, NodeState::Maintenance),
            (&gone, true, dead, NodeState::Fenced),
        ];
        for (said, fenced, verdict, expected) in cases {
            let mut record = serde_json::json!({
                "node_id": 1, "name": "n1", "api_address": "", "cpus": 1, "memory_bytes": 1,
            });
            let fields = said.as_object().unwrap().clone();
            record.as_object_mut().unwrap().extend(fields);
            let record = serde_json::from_value(record).unwrap();
            assert_eq!(NodeState::of(&record, fenced, verdict), expected, "{said} {verdict:?}");
        }
    }
}
