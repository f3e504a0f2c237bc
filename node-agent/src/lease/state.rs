//! The lease as the rest of the agent sees it: one lock around the pure [`NodeLease`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ha_manager::{Ack, LeaseState, NodeLease, Timing};
use tokio::sync::watch;

use crate::clock::boottime_ns;

/// Handle on this node's lease. Clones share it.
#[derive(Debug, Clone)]
pub struct Lease {
    inner: Arc<Mutex<NodeLease>>,
    /// Changes when the lease becomes fresh, is renewed or is revoked.
    changed: Arc<watch::Sender<Option<u64>>>,
}

/// Milliseconds of `CLOCK_BOOTTIME`, rounded down.
#[must_use]
pub fn boottime_ms() -> u64 {
    boottime_ns() / 1_000_000
}

impl Lease {
    /// No lease yet.
    #[must_use]
    pub fn new(timing: Timing) -> Self {
        Self {
            inner: Arc::new(Mutex::new(NodeLease::new(timing))),
            changed: Arc::new(watch::Sender::new(None)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, NodeLease> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A heartbeat is about to be sent; gives its number.
    #[must_use]
    pub fn begin_heartbeat(&self) -> u64 {
        // The time is taken before the number is known to anyone: never later than the sending.
        let now_ms = boottime_ms();
        self.lock().begin_heartbeat(now_ms)
    }

    /// The leader's answer. Returns the new deadline where it moved.
    pub fn acknowledged(&self, sequence: u64, term: u64) -> Option<u64> {
        let ack = self.lock().acknowledged(sequence, term);
        match ack {
            Ack::Renewed { .. } => {
                let deadline_ns = self.deadline_ns();
                self.changed.send_replace(deadline_ns);
                deadline_ns
            }
            Ack::Outrun | Ack::Unasked | Ack::OldTerm => None,
        }
    }

    /// The answer to a heartbeat says that the node was fenced: no lease until a heartbeat sent from
    /// now on is acknowledged. False: that heartbeat is answered or outdated, and nothing changes.
    #[must_use]
    pub fn revoke(&self, sequence: u64) -> bool {
        let revoked = self.lock().revoke(sequence);
        if revoked {
            self.changed.send_replace(None);
        }
        revoked
    }

    /// Until when HA VMs may run, `CLOCK_BOOTTIME` in nanoseconds; `None` without a lease.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        self.lock().deadline_ms().map(|ms| ms.saturating_mul(1_000_000))
    }

    /// Whether HA VMs may run now.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.lock().state(boottime_ms()) == LeaseState::Fresh
    }

    /// Whether an HA VM may be started now: enough is left that it is not ended at once.
    #[must_use]
    pub fn may_start(&self) -> bool {
        self.lock().may_start(boottime_ms())
    }

    /// Whether the watchdog may be petted now.
    #[must_use]
    pub fn may_pet(&self, ha_vms_running: usize) -> bool {
        self.lock().may_pet(boottime_ms(), ha_vms_running)
    }

    /// Since the heartbeat that the lease rests on was sent.
    #[must_use]
    pub fn age_ms(&self) -> Option<u64> {
        self.lock().age_ms(boottime_ms())
    }

    /// The timing the lease was made with.
    #[must_use]
    pub fn timing(&self) -> Timing {
        self.lock().timing()
    }

    /// Told at each renewal and revocation, with the deadline.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Option<u64>> {
        self.changed.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_renewal_is_announced_and_a_revocation_too() {
        let lease = Lease::new(Timing::default());
        let mut told = lease.subscribe();
        assert!(!lease.is_fresh() && !lease.may_start() && lease.may_pet(0) && !lease.may_pet(1));
        let sequence = lease.begin_heartbeat();
        let deadline = lease.acknowledged(sequence, 1);
        assert!(deadline.is_some_and(|ns| ns > boottime_ns()));
        assert_eq!(*told.borrow_and_update(), deadline);
        assert!(lease.is_fresh() && lease.may_start() && lease.may_pet(1));
        assert_eq!(lease.acknowledged(sequence, 1), None, "an answer counts once");
        assert!(!lease.revoke(sequence), "it was answered");
        assert!(lease.is_fresh());
        let sequence = lease.begin_heartbeat();
        assert!(lease.revoke(sequence));
        assert_eq!(*told.borrow_and_update(), None);
        assert!(!lease.is_fresh());
    }
}
