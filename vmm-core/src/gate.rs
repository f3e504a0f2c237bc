//! The write gate: until when a process may write to the disks of its virtual machine.
//!
//! Owns one deadline in nanoseconds of `CLOCK_BOOTTIME` (a clock that goes on while the machine is
//! suspended). Every disk write, discard and write-zeroes asks [`WriteGate::check`] when it is
//! submitted, so a process that wakes up after a long stop writes nothing more. It never decides
//! what the deadline is: that comes from the node's lease.
//!
//! Invariant: a gate that was closed stays closed; no renewal opens it again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The deadline of a virtual machine that is bound to no lease.
pub const NO_DEADLINE: u64 = u64::MAX;

/// The value that stands for "closed for good".
const CLOSED: u64 = 0;

/// Why a write was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The lease ended without being renewed.
    #[error(
        "disk write refused: the lease ended at {deadline_ns} ns, it is {now_ns} ns \
         (CLOCK_BOOTTIME); the virtual machine may be running elsewhere by now"
    )]
    DeadlinePassed {
        /// The deadline, nanoseconds of `CLOCK_BOOTTIME`.
        deadline_ns: u64,
        /// The time of the check, same clock.
        now_ns: u64,
    },
    /// The gate was closed: this process gave up the virtual machine.
    #[error("disk write refused: this process gave up the virtual machine's disks for good")]
    Closed,
}

/// A shared, cheap to check deadline. Clones are the same gate.
#[derive(Debug, Clone)]
pub struct WriteGate {
    deadline_ns: Arc<AtomicU64>,
}

impl Default for WriteGate {
    fn default() -> Self {
        Self::new(NO_DEADLINE)
    }
}

impl WriteGate {
    /// A gate that is open until `deadline_ns` of `CLOCK_BOOTTIME`; [`NO_DEADLINE`] for ever.
    #[must_use]
    pub fn new(deadline_ns: u64) -> Self {
        Self { deadline_ns: Arc::new(AtomicU64::new(deadline_ns)) }
    }

    /// Asks whether a write may be submitted now.
    ///
    /// # Errors
    /// [`Refused`] when the deadline has passed or the gate is closed.
    pub fn check(&self) -> Result<(), Refused> {
        match self.deadline_ns.load(Ordering::Acquire) {
            NO_DEADLINE => Ok(()),
            CLOSED => Err(Refused::Closed),
            deadline_ns => {
                let now_ns = boottime_ns();
                if now_ns < deadline_ns {
                    Ok(())
                } else {
                    Err(Refused::DeadlinePassed { deadline_ns, now_ns })
                }
            }
        }
    }

    /// Takes a new deadline, earlier or later ([`NO_DEADLINE`] lifts it).
    ///
    /// Returns false, and changes nothing, when the gate is closed.
    pub fn renew(&self, deadline_ns: u64) -> bool {
        let deadline_ns = deadline_ns.max(CLOSED + 1);
        self.deadline_ns
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |current| {
                (current != CLOSED).then_some(deadline_ns)
            })
            .is_ok()
    }

    /// Refuses every write from now on; cannot be undone.
    pub fn close(&self) {
        self.deadline_ns.store(CLOSED, Ordering::Release);
    }

    /// The deadline in nanoseconds of `CLOCK_BOOTTIME`; `None` when there is none or it is closed.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        Some(self.deadline_ns.load(Ordering::Acquire))
            .filter(|deadline| ![NO_DEADLINE, CLOSED].contains(deadline))
    }

    /// Whether [`Self::close`] was called.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.deadline_ns.load(Ordering::Acquire) == CLOSED
    }
}

/// Now, in nanoseconds of `CLOCK_BOOTTIME`.
#[must_use]
pub fn boottime_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec that the call fills; CLOCK_BOOTTIME exists on every Linux
    // that has KVM.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    if result != 0 {
        // A clock that cannot be read proves no lease: the end of time closes every deadline.
        return NO_DEADLINE;
    }
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_until_the_deadline_and_not_after() {
        let gate = WriteGate::default();
        assert_eq!(gate.check(), Ok(()));
        let later = boottime_ns() + 60_000_000_000;
        assert!(gate.renew(later));
        assert_eq!(gate.check(), Ok(()));
        assert_eq!(gate.deadline_ns(), Some(later));
        assert!(gate.renew(boottime_ns()));
        assert!(matches!(gate.check(), Err(Refused::DeadlinePassed { .. })));
        assert!(gate.renew(0), "a deadline of zero is long past, not closed for good");
        assert!(matches!(gate.check(), Err(Refused::DeadlinePassed { .. })));
        assert!(gate.renew(NO_DEADLINE));
        assert_eq!(gate.check(), Ok(()));
    }

    #[test]
    fn a_closed_gate_stays_closed_for_every_clone() {
        let gate = WriteGate::default();
        let clone = gate.clone();
        gate.close();
        assert_eq!(clone.check(), Err(Refused::Closed));
        assert!(!clone.renew(NO_DEADLINE));
        assert_eq!(gate.check(), Err(Refused::Closed));
        assert!(gate.is_closed());
    }
}
