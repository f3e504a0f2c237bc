//! Processes of the lab: started so that they end with it, and known again later by pid *and*
//! start time, so that a pid that was reused is never signalled.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// Whether a process outlives the program that started it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// It is killed when the starting thread's process ends, however it ends.
    WithUs,
    /// It stays, until someone ends it by its [`ProcessId`].
    Detached,
}

/// A process that cannot be mistaken for another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its pid.
    pub pid: i32,
    /// Clock ticks after boot at which it started (field 22 of `/proc/PID/stat`).
    pub start_ticks: u64,
}

impl ProcessId {
    /// The process that has this pid now.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        let (_, start_ticks) = stat(pid)?;
        Some(Self { pid, start_ticks })
    }

    /// Whether it still runs (a zombie does not).
    #[must_use]
    pub fn is_alive(&self) -> bool {
        stat(self.pid).is_some_and(|(state, start)| start == self.start_ticks && state != 'Z')
    }

    /// Signals it, if it still is that process.
    pub fn signal(&self, signal: Signal) {
        if self.is_alive() {
            // It may end in between: then there is nobody to signal, which is as good.
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }

    /// Kills it and waits until it is gone. False: it was still there after 5 s.
    #[must_use]
    pub fn kill_and_wait(&self) -> bool {
        self.signal(Signal::SIGKILL);
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.is_alive() && Instant::now() < deadline {
            // Our own child would stay a zombie; reap it if it is ours.
            let _ = nix::sys::wait::waitpid(
                Pid::from_raw(self.pid),
                Some(nix::sys::wait::WaitPidFlag::WNOHANG),
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        !self.is_alive()
    }
}

/// State letter and start time of a process.
fn stat(pid: i32) -> Option<(char, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, may hold anything: count from the last parenthesis.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// Set once: this program is told to end, and starts nothing any more.
static STOPPING: AtomicBool = AtomicBool::new(false);

/// From now on no process is started and nothing is waited for.
pub fn begin_stop() {
    STOPPING.store(true, Ordering::SeqCst);
}

/// Whether [`begin_stop`] was called.
#[must_use]
pub fn is_stopping() -> bool {
    STOPPING.load(Ordering::SeqCst)
}

/// Starts a process in its own session (a terminal's Ctrl-C does not reach it).
///
/// # Errors
/// If it cannot be started, or this program is ending.
pub fn spawn(command: &mut Command, lifetime: Lifetime) -> io::Result<(Child, ProcessId)> {
    if is_stopping() {
        return Err(io::Error::new(io::ErrorKind::Interrupted, "the lab is being ended"));
    }
    let parent = std::process::id();
    // SAFETY: between fork and exec only async-signal-safe calls are made: setsid, prctl, getppid.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            if lifetime == Lifetime::WithUs {
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                if u32::try_from(nix::unistd::getppid().as_raw()) != Ok(parent) {
                    return Err(io::Error::other("the lab ended while it started a process"));
                }
            }
            Ok(())
        });
    }
    let child = command.spawn()?;
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    let id = ProcessId::of(pid).ok_or_else(|| io::Error::other("it ended at once"))?;
    Ok((child, id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_again_and_ended() {
        let (_child, id) = spawn(Command::new("sleep").arg("60"), Lifetime::WithUs).unwrap();
        assert!(id.is_alive());
        let impostor = ProcessId { start_ticks: id.start_ticks + 1, ..id };
        assert!(!impostor.is_alive());
        impostor.signal(Signal::SIGKILL);
        assert!(id.is_alive(), "a signal meant for another process hit this one");
        assert!(id.kill_and_wait());
        assert!(!id.is_alive());
    }
}
