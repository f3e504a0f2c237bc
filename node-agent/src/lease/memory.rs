//! What an agent leaves to the one after it on the same boot: when its lease ends.
//!
//! An agent that ended left the watchdog running and its HA VMs with the deadline of its last lease.
//! [`FormerLease`] is that lease as the next agent may use it until it has one of its own: to pet for
//! as long as the earlier one could have, and to know when the VMs must be gone.
//!
//! Invariant: nothing here lasts longer than it would have for the agent that held the lease.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ha_manager::Timing;

use crate::clock::{boot_id, boottime_ns};

/// The note in the run folder, rewritten in place at each renewal. The run folder is in memory, so
/// no disk is worn.
#[derive(Debug)]
pub(super) struct LeaseMemory {
    file: File,
    boot_id: String,
}

const NAME: &str = "lease";
const NS_PER_MS: u64 = 1_000_000;

impl LeaseMemory {
    /// The note of this agent; what an earlier one left stays until the first renewal.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn open(run_dir: &Path) -> io::Result<Self> {
        let path = run_dir.join(NAME);
        let file = File::options().write(true).create(true).truncate(false).open(path)?;
        Ok(Self { file, boot_id: boot_id() })
    }

    /// Notes the deadline of a renewed lease, `CLOCK_BOOTTIME` in nanoseconds. To be called before
    /// any VM process is told, so that none has a later deadline than the next agent reads.
    pub(super) fn renewed(&self, deadline_ns: u64) {
        // Of one length always, so that no part of an older note is left behind it.
        let note = format!("{deadline_ns:020} {}\n", self.boot_id);
        if let Err(error) = self.file.write_all_at(note.as_bytes(), 0) {
            tracing::warn!(%error, "cannot note the lease: an agent after this one cannot go on from it");
        }
    }
}

/// The lease of the agent before this one, `CLOCK_BOOTTIME` in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FormerLease {
    /// Until when the earlier agent could have petted while HA VMs ran; 0: not at all.
    pet_until_ns: u64,
    /// From when on no VM process that it started may run.
    ends_ns: u64,
}

impl FormerLease {
    /// What the note in the run folder gives; to be called when this agent starts.
    pub(super) fn read(run_dir: &Path, timing: Timing) -> Self {
        Self::of(noted_deadline_ns(run_dir), boottime_ns(), timing)
    }

    /// Every heartbeat of the earlier agent was sent before now. So no deadline that it could give
    /// lies further ahead than one that was granted now, and a note that says so is none.
    fn of(noted_ns: Option<u64>, now_ns: u64, timing: Timing) -> Self {
        let latest_ns = now_ns.saturating_add(timing.self_stop_ms() * NS_PER_MS);
        let rest_ns = timing.self_stop_ms().saturating_sub(timing.pet_limit_ms()) * NS_PER_MS;
        match noted_ns.filter(|noted_ns| *noted_ns <= latest_ns) {
            Some(ends_ns) => Self { pet_until_ns: ends_ns.saturating_sub(rest_ns), ends_ns },
            None => Self { pet_until_ns: 0, ends_ns: latest_ns },
        }
    }

    /// Whether it still allows petting while HA VMs may run.
    pub(super) fn may_pet(self, now_ns: u64) -> bool {
        now_ns < self.pet_until_ns
    }

    /// Whether its VMs must be gone.
    pub(super) fn has_ended(self, now_ns: u64) -> bool {
        now_ns >= self.ends_ns
    }
}

fn noted_deadline_ns(run_dir: &Path) -> Option<u64> {
    let note = std::fs::read_to_string(run_dir.join(NAME)).ok()?;
    let (deadline_ns, boot) = note.trim_end().split_once(' ')?;
    // Another boot's clock means nothing here.
    deadline_ns.parse().ok().filter(|_| boot == boot_id())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = NS_PER_MS;

    #[test]
    fn an_earlier_lease_counts_as_long_as_its_owner_could_have_used_it() {
        // Granted at 50 s; looked at 3 s later.
        let lease = FormerLease::of(Some(56_000 * MS), 53_000 * MS, Timing::default());
        assert!(lease.may_pet(53_999 * MS) && !lease.may_pet(54_000 * MS));
        assert!(!lease.has_ended(55_999 * MS) && lease.has_ended(56_000 * MS));
        // Without a note, what runs has a deadline from a heartbeat before this agent's start.
        let unknown = FormerLease::of(None, 53_000 * MS, Timing::default());
        assert!(!unknown.may_pet(0) && !unknown.may_pet(53_000 * MS));
        assert!(!unknown.has_ended(58_999 * MS) && unknown.has_ended(59_000 * MS));
        // Nothing could be granted ahead of time.
        let garbage = FormerLease::of(Some(u64::MAX), 53_000 * MS, Timing::default());
        assert_eq!(garbage, unknown);
        assert!(FormerLease::of(Some(0), u64::MAX, Timing::default()).has_ended(u64::MAX));
    }

    #[test]
    fn it_is_read_from_the_note_of_this_boot_only() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(noted_deadline_ns(folder.path()), None);
        let memory = LeaseMemory::open(folder.path()).unwrap();
        memory.renewed(boottime_ns() + 1_000 * MS);
        memory.renewed(77);
        assert_eq!(noted_deadline_ns(folder.path()), Some(77));
        assert!(FormerLease::read(folder.path(), Timing::default()).has_ended(78));
        // The next agent opens it and leaves it as it is until its own first renewal.
        LeaseMemory::open(folder.path()).unwrap();
        assert_eq!(noted_deadline_ns(folder.path()), Some(77));
        for note in [format!("{:020} another-boot\n", 77), "garbage".to_owned(), String::new()] {
            std::fs::write(folder.path().join(NAME), note).unwrap();
            assert_eq!(noted_deadline_ns(folder.path()), None);
        }
    }
}
