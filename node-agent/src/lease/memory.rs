//! What an agent leaves to the one after it on the same boot: when its lease ends.
//!
//! An agent that crashed left the watchdog running. The next one may pet it before it has a lease
//! of its own, but only as long as the crashed one could have: so that a machine whose agent
//! crashes and hangs on its way back is still reset by 0.8 L.
//!
//! Invariant: opening a watchdog pets it, so it counts as petting.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ha_manager::Timing;

use crate::clock::{boot_id, boottime_ns};

/// The note in the run folder, rewritten in place at each renewal. The run folder is in memory, so
/// no disk is worn.
#[derive(Debug)]
pub struct LeaseMemory {
    file: File,
    boot_id: String,
}

const NAME: &str = "lease";

impl LeaseMemory {
    /// The note of this agent; what an earlier one left stays until the first renewal.
    ///
    /// # Errors
    /// The system's.
    pub fn open(run_dir: &Path) -> io::Result<Self> {
        let path = run_dir.join(NAME);
        let file = File::options().write(true).create(true).truncate(false).open(path)?;
        Ok(Self { file, boot_id: boot_id() })
    }

    /// Notes the deadline of a renewed lease, `CLOCK_BOOTTIME` in nanoseconds.
    pub fn renewed(&self, deadline_ns: u64) {
        // Of one length always, so that no part of an older note is left behind it.
        let note = format!("{deadline_ns:020} {}\n", self.boot_id);
        if let Err(error) = self.file.write_all_at(note.as_bytes(), 0) {
            tracing::debug!(%error, "cannot note the lease");
        }
    }
}

/// Until when the watchdog may be petted under the lease that an earlier agent held on this boot,
/// `CLOCK_BOOTTIME` in nanoseconds; `None` if there was none.
fn pet_until_ns(run_dir: &Path, timing: Timing) -> Option<u64> {
    let note = std::fs::read_to_string(run_dir.join(NAME)).ok()?;
    let (deadline_ns, boot) = note.trim_end().split_once(' ')?;
    if boot != boot_id() {
        return None;
    }
    let deadline_ns: u64 = deadline_ns.parse().ok()?;
    let rest_ms = timing.self_stop_ms().checked_sub(timing.pet_limit_ms())?;
    deadline_ns.checked_sub(rest_ms * 1_000_000)
}

/// Whether the lease of an earlier agent still allows petting.
#[must_use]
pub fn may_still_pet(run_dir: &Path, timing: Timing) -> bool {
    pet_until_ns(run_dir, timing).is_some_and(|until_ns| boottime_ns() < until_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_earlier_lease_counts_as_long_as_its_owner_could_have_petted() {
        let folder = tempfile::tempdir().unwrap();
        let timing = Timing::default();
        assert!(!may_still_pet(folder.path(), timing), "there was no lease");
        let memory = LeaseMemory::open(folder.path()).unwrap();
        let self_stop_ns = timing.self_stop_ms() * 1_000_000;
        let pet_limit_ns = timing.pet_limit_ms() * 1_000_000;
        let granted_ns = boottime_ns();
        memory.renewed(granted_ns + self_stop_ns);
        assert!(may_still_pet(folder.path(), timing));
        assert_eq!(pet_until_ns(folder.path(), timing), Some(granted_ns + pet_limit_ns));
        // Granted just longer ago than it may be petted for.
        memory.renewed((granted_ns + self_stop_ns).saturating_sub(pet_limit_ns));
        assert!(!may_still_pet(folder.path(), timing));
        // Another boot's clock means nothing here.
        let note = format!("{:020} another-boot\n", granted_ns + self_stop_ns);
        std::fs::write(folder.path().join(NAME), note).unwrap();
        assert!(!may_still_pet(folder.path(), timing));
    }
}
