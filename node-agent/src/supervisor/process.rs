//! A process that cannot be mistaken for another: pid, start time, and a pidfd that stays with it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A process of this machine, held by its pidfd.
#[derive(Debug)]
pub(super) struct ProcessHandle {
    pid: u32,
    start_time: u64,
    pidfd: OwnedFd,
}

impl ProcessHandle {
    /// Takes hold of a process.
    ///
    /// # Errors
    /// `NotFound` if there is none of that pid; the system's otherwise.
    pub(super) fn open(pid: u32) -> io::Result<Self> {
        let pidfd = pidfd_open(pid)?;
        // Read after the pidfd was opened: should the pid have been reused in between, the start
        // time is that of the process that the pidfd holds, and the caller sees the difference.
        let start_time = start_time(pid)?;
        Ok(Self { pid, start_time, pidfd })
    }

    /// Takes hold of a process that was known before; `None` if it is gone.
    ///
    /// # Errors
    /// The system's (no descriptor left, `/proc` not readable): whether it is gone is not known then,
    /// and one that may run must not be taken for gone.
    pub(super) fn reopen(pid: u32, expected_start_time: u64) -> io::Result<Option<Self>> {
        let pidfd = match pidfd_open(pid) {
            Ok(pidfd) => pidfd,
            Err(error) if says_gone(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        match start_time(pid) {
            Ok(start_time) if start_time == expected_start_time => {
                Ok(Some(Self { pid, start_time, pidfd }))
            }
            Ok(_) => Ok(None),
            Err(_) if has_ended(&pidfd) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether it is known to have ended.
    pub(super) fn has_ended(&self) -> bool {
        has_ended(&self.pidfd)
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Field 22 of `/proc/PID/stat`: clock ticks after boot.
    pub(super) fn start_time(&self) -> u64 {
        self.start_time
    }

    /// Sends a signal; a process that is gone already is fine.
    pub(super) fn signal(&self, signal: Signal) -> nix::Result<()> {
        // SAFETY: the call takes a file descriptor that is open as long as `self`, a signal
        // number, a null siginfo (allowed: the kernel makes one) and no flags.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal as libc::c_int,
                std::ptr::null::<libc::siginfo_t>(),
                0_u32,
            )
        };
        match nix::errno::Errno::result(answer) {
            Ok(_) | Err(nix::errno::Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Waits until the process has ended and reaps it if it is a child of this one. The status is
    /// known for children only.
    pub(super) async fn exited(&self) -> io::Result<Option<WaitStatus>> {
        // A pidfd becomes readable when its process ends (pidfd_open(2)).
        let pidfd = self.pidfd.try_clone()?;
        // SAFETY: an OwnedFd keeps its descriptor open, and the same one, until `watched` drops it.
        let watched = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        watched.readable().await?.retain_ready();
        Ok(self.reap())
    }

    /// Like [`Self::reap`] for a child that has just closed its connections: gives it a moment.
    pub(super) fn reap_soon(&self) -> Option<WaitStatus> {
        let mut polled = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut polled, 100_u16);
        self.reap()
    }

    /// Blocks until it has ended, and reaps it if it is a child.
    pub(super) fn wait_and_reap(&self) {
        while !self.has_ended() {
            let mut polled = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
            if poll(&mut polled, PollTimeout::NONE).is_err() {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        self.reap();
    }

    /// Reaps the process if it is a child that ended.
    pub(super) fn reap(&self) -> Option<WaitStatus> {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        waitid(self.id(), flags).ok().filter(|status| *status != WaitStatus::StillAlive)
    }

    fn id(&self) -> Id<'_> {
        Id::PIDFd(self.pidfd.as_fd())
    }
}

/// A pidfd becomes readable when its process ends (pidfd_open(2)).
fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    // An error says nothing: it counts as running.
    let looked = poll(&mut polled, 0_u16);
    let events = polled.first().and_then(PollFd::revents);
    looked.is_ok() && events.is_some_and(|events| events.contains(PollFlags::POLLIN))
}

/// Whether an error of `pidfd_open` means that no process has this pid: there is nothing of that
/// number, or it is now the number of another process's thread.
fn says_gone(error: &io::Error) -> bool {
    let gone = [libc::ESRCH, libc::ENOENT, libc::EINVAL];
    error.raw_os_error().is_some_and(|errno| gone.contains(&errno))
}

fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two numbers and returns a new descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0_u32) };
    let fd = nix::errno::Errno::result(fd)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given this descriptor to us and to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Field 22 of `/proc/PID/stat`. The second field, the command's name in parentheses, may hold
/// spaces and parentheses itself, so fields are counted after the last `)`.
fn start_time(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat: {stat}")))
}

fn parse_start_time(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_fields() {
        let stat = "7 (a) b) c) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 1 1";
        assert_eq!(parse_start_time(stat), Some(4242));
        for broken in
            ["", "7 (a", "7 (a) S 1 2 3", "7 (a) S 1 7 7 0 -1 1 1 0 0 0 0 0 0 0 20 0 1 0 x"]
        {
            assert_eq!(parse_start_time(broken), None, "{broken}");
        }
    }

    #[expect(clippy::zombie_processes, reason = "it is reaped through its pidfd")]
    #[tokio::test]
    async fn a_process_is_held_signalled_and_reaped() {
        let mut command = Command::new("sleep");
        let child = command.arg("600").stdin(Stdio::null()).spawn().unwrap();
        let process = ProcessHandle::open(child.id()).unwrap();
        let reopen = |start_time| ProcessHandle::reopen(child.id(), start_time).unwrap();
        assert!(reopen(process.start_time()).is_some());
        assert!(reopen(process.start_time() + 1).is_none());
        assert_eq!((process.reap(), process.has_ended()), (None, false));
        process.signal(Signal::SIGKILL).unwrap();
        let status = process.exited().await.unwrap();
        assert!(matches!(status, Some(WaitStatus::Signaled(_, Signal::SIGKILL, _))), "{status:?}");
        assert!(process.has_ended());
        process.signal(Signal::SIGKILL).unwrap();
        assert!(reopen(process.start_time()).is_none());
    }

    #[test]
    fn only_what_is_certainly_gone_is_called_gone() {
        // 0 is nobody's, and a thread is no process; both are what a reused pid may look like.
        assert!(ProcessHandle::reopen(0, 1).unwrap().is_none());
        assert!(ProcessHandle::reopen(u32::MAX >> 1, 1).unwrap().is_none());
        for errno in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EACCES, libc::EIO] {
            assert!(!says_gone(&io::Error::from_raw_os_error(errno)), "{errno}");
        }
        assert!(!says_gone(&io::Error::other("/proc/7/stat: garbage")));
    }
}
