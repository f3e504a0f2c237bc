//! What keeps the lease's thread running on a machine that is short of CPU time or memory.
//!
//! A machine that is full of busy guests, or swaps, must not be reset for that: the thread that pets
//! the watchdog runs before anything that is not real-time, and does not wait for its own pages.
//! sched(7), mlockall(2).

use std::io;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::unistd::geteuid;

/// Above everything that is not real-time, below what an administrator put higher.
const PRIORITY: libc::c_int = 10;

/// Makes the calling thread real-time and keeps this process's memory out of the swap. Says what the
/// system refuses; the thread runs without it.
pub(super) fn make_urgent() {
    if let Err(error) = run_first() {
        tracing::warn!(
            "the lease's thread gets no real-time priority ({error}): a machine whose CPUs are busy \
             for seconds may lose its lease or be reset; let the agent run as root, or with \
             CAP_SYS_NICE"
        );
    }
    if let Err(error) = stay_in_memory() {
        tracing::warn!(
            "the agent's memory may be swapped out ({error}): let it run as root, or \
             without a limit of locked memory"
        );
    }
}

fn run_first() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: PRIORITY };
    // What is started from this thread does not inherit it.
    let policy = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;
    // SAFETY: 0 is the calling thread; the call only reads `parameters`, which outlive it.
    match unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Pages are locked as they come into use: mapping much costs nothing. Not under a limit, which
/// counts what is mapped: there a later mapping would fail.
fn stay_in_memory() -> io::Result<()> {
    let (limit, _) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
    if limit != RLIM_INFINITY && !geteuid().is_root() {
        return Err(io::Error::other(format!("RLIMIT_MEMLOCK is {limit} bytes")));
    }
    // SAFETY: takes no pointers. Programs that are started from here do not inherit it.
    match unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thread_is_real_time_and_what_it_starts_is_not() {
        let seen = std::thread::spawn(|| {
            run_first().map(|()| {
                let policy = || {
                    // SAFETY: takes no pointers; 0 is the calling thread.
                    unsafe { libc::sched_getscheduler(0) & !libc::SCHED_RESET_ON_FORK }
                };
                (policy(), std::thread::spawn(policy).join().unwrap())
            })
        });
        match seen.join().unwrap() {
            Ok(policies) => assert_eq!(policies, (libc::SCHED_RR, libc::SCHED_OTHER)),
            // Without CAP_SYS_NICE it is refused, and must be said so.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}"),
        }
    }
}
