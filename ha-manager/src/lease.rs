//! The node lease: how long a node may run HA VMs without hearing from the Raft leader.
//!
//! ```text
//! node     sent ─────────── 0.4 L ──── 0.6 L ──── 0.8 L
//!           │                last pet   HA VMs     reset by the
//!           │                of the     stopped    watchdog at
//!           │                watchdog              the latest
//! leader    └─► received ──────────────────────────────── L: dead, fenced, started elsewhere
//! ```
//!
//! The leader acknowledges a heartbeat only after a quorum confirmed, *after* the heartbeat came
//! in, that it still leads. The node counts from the moment it *sent* that heartbeat, which is
//! before the leader received it, so the node's L always begins first.
//!
//! Owns: the arithmetic of those moments. Never: reads a clock, sends, stops or pets anything.
//!
//! Invariants: a deadline never comes from a heartbeat that this node did not send or has
//! forgotten; it never moves backwards except by [`NodeLease::revoke`].

use std::collections::BTreeMap;

/// The lease time `L` and all that scales from it. Milliseconds, seconds where the name says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    lease_ms: u64,
}

/// A lease time that the parts of the system cannot keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a lease of {0} ms is refused: give {min} to {max} ms; shorter leases lose to a leader election, longer ones leave VMs down",
    min = Timing::LEASE_MIN_MS,
    max = Timing::LEASE_MAX_MS
)]
pub struct InvalidLease(pub u64);

impl Default for Timing {
    fn default() -> Self {
        Self { lease_ms: Self::LEASE_DEFAULT_MS }
    }
}

impl Timing {
    /// The lease time where nothing is configured.
    pub const LEASE_DEFAULT_MS: u64 = 10_000;
    /// Least lease time: 0.4 L must hold a watchdog timeout of one whole second.
    pub const LEASE_MIN_MS: u64 = 3_000;
    /// Longest lease time.
    pub const LEASE_MAX_MS: u64 = 300_000;

    /// Timing for a lease time, which must be the same on all nodes.
    ///
    /// # Errors
    /// [`InvalidLease`] outside [`Self::LEASE_MIN_MS`] to [`Self::LEASE_MAX_MS`].
    pub fn new(lease_ms: u64) -> Result<Self, InvalidLease> {
        if (Self::LEASE_MIN_MS..=Self::LEASE_MAX_MS).contains(&lease_ms) {
            Ok(Self { lease_ms })
        } else {
            Err(InvalidLease(lease_ms))
        }
    }

    /// `L`: the leader may declare a node dead this long after it last received a heartbeat.
    #[must_use]
    pub fn lease_ms(self) -> u64 {
        self.lease_ms
    }

    /// 0.6 L: the node ends its HA VMs this long after it sent the last acknowledged heartbeat.
    #[must_use]
    pub fn self_stop_ms(self) -> u64 {
        self.lease_ms * 6 / 10
    }

    /// 0.4 L: with HA VMs running, the watchdog is petted up to this age of the lease only.
    #[must_use]
    pub fn pet_limit_ms(self) -> u64 {
        self.lease_ms * 4 / 10
    }

    /// 0.8 L: a machine that hangs has been reset by then.
    #[must_use]
    pub fn reset_by_ms(self) -> u64 {
        self.lease_ms * 8 / 10
    }

    /// The timeout to give the watchdog, in the whole seconds that it takes: the last pet is at
    /// 0.4 L, so a timeout of at most 0.4 L resets by 0.8 L. (Petting until 0.6 L with a timeout
    /// of 0.2 L would reset no sooner, and a healthy agent could be stalled half as long.)
    #[must_use]
    pub fn watchdog_timeout_s(self) -> u64 {
        (self.reset_by_ms() - self.pet_limit_ms()) / 1000
    }

    /// How often to pet: four chances within the timeout.
    #[must_use]
    pub fn pet_interval_ms(self) -> u64 {
        self.watchdog_timeout_s() * 1000 / 4
    }

    /// How often a node sends a heartbeat: 0.1 L, one second by default.
    #[must_use]
    pub fn heartbeat_interval_ms(self) -> u64 {
        self.lease_ms / 10
    }

    /// What must be left of the lease for an HA VM to be started: 0.2 L.
    #[must_use]
    pub fn start_margin_ms(self) -> u64 {
        self.lease_ms * 2 / 10
    }

    /// A node that was not heard for this long (three heartbeats) is shown as `unknown`, and
    /// nothing new is placed on it.
    #[must_use]
    pub fn unknown_after_ms(self) -> u64 {
        self.heartbeat_interval_ms() * 3
    }

    /// A leader that did not run for this long distrusts all it heard before and waits a full L.
    #[must_use]
    pub fn stall_ms(self) -> u64 {
        self.lease_ms * 3 / 10
    }
}

/// Whether the node may run HA VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseState {
    /// It may, until the deadline.
    Fresh,
    /// It must have none running.
    Expired,
}

/// What an acknowledgement did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ack {
    /// The deadline moved to this moment of the node's clock.
    Renewed {
        /// The new [`NodeLease::deadline_ms`].
        deadline_ms: u64,
    },
    /// A later heartbeat was acknowledged already: out of order, or a duplicate.
    Outrun,
    /// Not a heartbeat that is outstanding: never sent, sent before a revocation, or long ago.
    Unasked,
    /// From a term that this node knows to be over.
    OldTerm,
}

/// The node's side of its lease.
#[derive(Debug, Clone)]
pub struct NodeLease {
    timing: Timing,
    next_sequence: u64,
    /// When each outstanding heartbeat was sent. Invariant: at most [`OUTSTANDING_MAX`], and all
    /// later than the one the lease rests on.
    outstanding: BTreeMap<u64, u64>,
    /// When the latest acknowledged heartbeat was sent.
    granted_ms: Option<u64>,
    /// The highest term that acknowledged.
    term: u64,
}

/// Heartbeats remembered while unanswered: more than a lease time's worth.
const OUTSTANDING_MAX: usize = 64;

impl NodeLease {
    /// A node that just came up: no lease yet.
    #[must_use]
    pub fn new(timing: Timing) -> Self {
        Self { timing, next_sequence: 1, outstanding: BTreeMap::new(), granted_ms: None, term: 0 }
    }

    /// Notes that a heartbeat is about to be sent and gives its sequence number. Take `now_ms`
    /// *before* handing the message to the network.
    pub fn begin_heartbeat(&mut self, now_ms: u64) -> u64 {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        self.outstanding.insert(sequence, now_ms);
        while self.outstanding.len() > OUTSTANDING_MAX {
            self.outstanding.pop_first();
        }
        sequence
    }

    /// Takes the leader's answer to a heartbeat. An answer that says `fenced` is not one: call
    /// [`Self::revoke`] instead.
    pub fn acknowledged(&mut self, sequence: u64, term: u64) -> Ack {
        if term < self.term {
            return Ack::OldTerm;
        }
        let Some(&sent_ms) = self.outstanding.get(&sequence) else {
            let outrun = self.granted_ms.is_some()
                && sequence
                    < self.outstanding.first_key_value().map_or(self.next_sequence, |e| *e.0);
            return if outrun { Ack::Outrun } else { Ack::Unasked };
        };
        self.term = term;
        self.outstanding = self.outstanding.split_off(&(sequence + 1));
        self.granted_ms = Some(self.granted_ms.map_or(sent_ms, |granted| granted.max(sent_ms)));
        Ack::Renewed { deadline_ms: self.deadline_ms().unwrap_or(0) }
    }

    /// The leader's answer to a heartbeat says that the node was fenced: no lease until it has cleaned
    /// up and a heartbeat sent *after* this call is acknowledged. False, and nothing changes, where
    /// that heartbeat is not outstanding: it was sent before what this node has learned since (that it
    /// was fenced, and cleaned up), and the next one's answer says it again if it holds.
    pub fn revoke(&mut self, sequence: u64) -> bool {
        if !self.outstanding.contains_key(&sequence) {
            return false;
        }
        self.outstanding.clear();
        self.granted_ms = None;
        true
    }

    /// When the node's HA VMs must have ended (0.6 L after sending), on the node's clock; `None`
    /// without a lease. VM processes hold the same moment.
    #[must_use]
    pub fn deadline_ms(&self) -> Option<u64> {
        Some(self.granted_ms?.saturating_add(self.timing.self_stop_ms()))
    }

    /// Whether HA VMs may run now.
    #[must_use]
    pub fn state(&self, now_ms: u64) -> LeaseState {
        match self.deadline_ms() {
            Some(deadline_ms) if now_ms < deadline_ms => LeaseState::Fresh,
            Some(_) | None => LeaseState::Expired,
        }
    }

    /// Whether the watchdog may be petted now. A node without an HA VM process has nothing that
    /// could be doubled, and pets always.
    #[must_use]
    pub fn may_pet(&self, now_ms: u64, ha_vms_running: usize) -> bool {
        let young = self.granted_ms.is_some_and(|granted_ms| {
            now_ms < granted_ms.saturating_add(self.timing.pet_limit_ms())
        });
        ha_vms_running == 0 || young
    }

    /// Whether an HA VM may be started now: enough of the lease is left that it will not be ended
    /// at once.
    #[must_use]
    pub fn may_start(&self, now_ms: u64) -> bool {
        self.state(now_ms.saturating_add(self.timing.start_margin_ms())) == LeaseState::Fresh
    }

    /// Milliseconds since the heartbeat that the lease rests on was sent; `None` without a lease.
    #[must_use]
    pub fn age_ms(&self, now_ms: u64) -> Option<u64> {
        Some(now_ms.saturating_sub(self.granted_ms?))
    }

    /// The timing this lease was made with.
    #[must_use]
    pub fn timing(&self) -> Timing {
        self.timing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease() -> NodeLease {
        NodeLease::new(Timing::default())
    }

    #[test]
    fn the_moments_of_the_default_lease() {
        let timing = Timing::default();
        assert_eq!(
            (timing.pet_limit_ms(), timing.self_stop_ms(), timing.reset_by_ms(), timing.lease_ms()),
            (4_000, 6_000, 8_000, 10_000)
        );
        assert_eq!((timing.watchdog_timeout_s(), timing.pet_interval_ms()), (4, 1_000));
    }

    #[test]
    fn every_allowed_lease_keeps_the_order_of_its_moments() {
        for lease_ms in [3_000, 3_333, 4_999, 5_001, 10_000, 59_999, 300_000] {
            let timing = Timing::new(lease_ms).unwrap();
            assert!(timing.watchdog_timeout_s() >= 1, "{lease_ms}");
            let reset_ms = timing.pet_limit_ms() + timing.watchdog_timeout_s() * 1000;
            assert!(reset_ms <= timing.reset_by_ms(), "{lease_ms}");
            assert!(timing.self_stop_ms() < timing.reset_by_ms(), "{lease_ms}");
            assert!(timing.pet_interval_ms() * 2 < timing.watchdog_timeout_s() * 1000);
            // The margin for clock rates: a node 10 % slow against a leader 10 % fast.
            assert!(timing.reset_by_ms() * 110 <= timing.lease_ms() * 90, "{lease_ms}");
        }
        for lease_ms in [0, 2_999, 300_001, u64::MAX] {
            assert_eq!(Timing::new(lease_ms), Err(InvalidLease(lease_ms)));
        }
    }

    #[test]
    fn without_an_acknowledgement_there_is_no_lease() {
        let mut lease = lease();
        assert_eq!((lease.state(0), lease.deadline_ms()), (LeaseState::Expired, None));
        lease.begin_heartbeat(0);
        assert_eq!(lease.state(0), LeaseState::Expired);
        assert!(!lease.may_start(0) && !lease.may_pet(0, 1) && lease.may_pet(0, 0));
    }

    #[test]
    fn the_lease_counts_from_the_sending_not_from_the_answer() {
        let mut lease = lease();
        let sequence = lease.begin_heartbeat(1_000);
        // Answered 5.9 s later: 100 ms are left.
        assert_eq!(lease.acknowledged(sequence, 1), Ack::Renewed { deadline_ms: 7_000 });
        assert_eq!(lease.state(6_999), LeaseState::Fresh);
        assert_eq!(lease.state(7_000), LeaseState::Expired);
        assert!(lease.may_start(4_999) && !lease.may_start(5_000));
        assert!(lease.may_pet(4_999, 1) && !lease.may_pet(5_000, 1) && lease.may_pet(5_000, 0));
    }

    #[test]
    fn answers_out_of_order_twice_unasked_or_from_an_old_term_extend_nothing() {
        let mut lease = lease();
        let (first, second) = (lease.begin_heartbeat(0), lease.begin_heartbeat(1_000));
        assert_eq!(lease.acknowledged(second, 3), Ack::Renewed { deadline_ms: 7_000 });
        assert_eq!(lease.acknowledged(first, 3), Ack::Outrun);
        assert_eq!(lease.acknowledged(second, 3), Ack::Outrun);
        assert_eq!(lease.acknowledged(99, 3), Ack::Unasked);
        let third = lease.begin_heartbeat(2_000);
        assert_eq!(lease.acknowledged(third, 2), Ack::OldTerm);
        assert_eq!(lease.deadline_ms(), Some(7_000));
        // The same heartbeat may still be answered by the new leader.
        assert_eq!(lease.acknowledged(third, 4), Ack::Renewed { deadline_ms: 8_000 });
    }

    #[test]
    fn after_a_revocation_only_a_new_heartbeat_counts() {
        let mut lease = lease();
        let first = lease.begin_heartbeat(0);
        lease.acknowledged(first, 1);
        let [heard, late] = [1_000, 1_500].map(|now_ms| lease.begin_heartbeat(now_ms));
        assert!(!lease.revoke(first), "it was acknowledged since");
        assert!(lease.revoke(heard));
        assert_eq!(lease.state(1_001), LeaseState::Expired);
        assert_eq!(lease.acknowledged(late, 1), Ack::Unasked);
        let clean = lease.begin_heartbeat(2_000);
        assert_eq!(lease.acknowledged(clean, 1), Ack::Renewed { deadline_ms: 8_000 });
        // The second answer that says so comes when the node is clean again.
        assert!(!lease.revoke(late));
        assert_eq!(lease.state(2_001), LeaseState::Fresh);
    }

    #[test]
    fn a_leader_that_never_answers_costs_no_memory() {
        let mut lease = lease();
        for now_ms in 0..10_000 {
            lease.begin_heartbeat(now_ms);
        }
        assert_eq!(lease.outstanding.len(), OUTSTANDING_MAX);
        assert_eq!(lease.acknowledged(1, 1), Ack::Unasked);
    }
}
