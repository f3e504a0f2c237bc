//! The one clock that leases and deadlines are counted on: `CLOCK_BOOTTIME`, which goes on while
//! the machine sleeps. Never compared between machines. The wall clock is for people, and for
//! waits that nothing but patience hangs on.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds since this machine booted.
///
/// `CLOCK_BOOTTIME` exists on every kernel since 2.6.39; should it fail all the same, the answer
/// is the end of time, so that every deadline has passed: the safe side.
#[must_use]
pub fn boottime_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .ok()
        .and_then(|now| u64::try_from(Duration::from(now).as_nanos()).ok())
        .unwrap_or(u64::MAX)
}

/// Unix milliseconds; 0 on a machine that thinks it is before 1970.
#[must_use]
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Changes with each boot of this machine; empty where the kernel does not say.
#[must_use]
pub(crate) fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::boottime_ns;

    #[test]
    fn it_goes_on() {
        let first = boottime_ns();
        std::thread::sleep(std::time::Duration::from_millis(2));
        let later = boottime_ns();
        assert!(later - first >= 2_000_000 && later < u64::MAX, "{first} {later}");
    }
}
