//! The machine's watchdog: resets this node when it is no longer petted.
//!
//! Owns the device while it is open. Decides nothing: when to pet is the lease's to say. Linux'
//! watchdog API: Documentation/watchdog/watchdog-api.rst.
//!
//! Invariant: dropping an armed watchdog leaves it running, so an agent that dies while HA VMs are
//! here gets the node reset; only [`Watchdog::disarm`] stops it.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Where Linux puts watchdogs; the numbered one is the same device without the old rules.
const DEVICES: [&str; 2] = ["/dev/watchdog0", "/dev/watchdog"];
const WDIOF_SETTIMEOUT: u32 = 0x0080;
const WDIOF_MAGICCLOSE: u32 = 0x0100;
const WDIOF_CARDRESET: libc::c_int = 0x0020;
const WDIOS_DISABLECARD: libc::c_int = 0x0001;

/// `struct watchdog_info`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Info {
    options: u32,
    firmware_version: u32,
    identity: [u8; 32],
}

nix::ioctl_read!(get_support, b'W', 0, Info);
nix::ioctl_read!(get_boot_status, b'W', 2, libc::c_int);
nix::ioctl_read!(set_options, b'W', 4, libc::c_int);
nix::ioctl_read!(keep_alive, b'W', 5, libc::c_int);
nix::ioctl_readwrite!(set_timeout, b'W', 6, libc::c_int);

/// Why no watchdog guards this node.
#[derive(Debug, thiserror::Error)]
pub enum WatchdogError {
    /// None there, and none could be made.
    #[error("there is no watchdog: no /dev/watchdog0 or /dev/watchdog, and `modprobe softdog` {0}")]
    None(String),
    /// Another process has it, as a rule.
    #[error("watchdog {} cannot be used: {action}: {source}", path.display())]
    Io {
        /// The device.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// It took a time that is too long to be safe.
    #[error(
        "watchdog {} ({identity}) cannot reset after {wanted_s} s: it offers {granted_s} s; \
         raise the lease time or use another watchdog", path.display()
    )]
    Timeout {
        /// The device.
        path: PathBuf,
        /// Its name.
        identity: String,
        /// What was asked for.
        wanted_s: u64,
        /// What it would do.
        granted_s: u64,
    },
}

/// An open watchdog. It runs from the moment it was opened.
#[derive(Debug)]
pub struct Watchdog {
    file: File,
    path: PathBuf,
    info: Info,
    timeout: Duration,
}

impl Watchdog {
    /// Opens `device`, or the first that is there, loading softdog where there is none. It will
    /// reset the machine `timeout` after the last [`Watchdog::pet`] (rounded down to seconds).
    ///
    /// # Errors
    /// [`WatchdogError`]; a watchdog that was opened all the same has been disarmed again.
    pub fn open(device: Option<&Path>, timeout: Duration) -> Result<Self, WatchdogError> {
        let path = match device {
            Some(path) => path.to_owned(),
            None => find_or_load()?,
        };
        let io = |action| {
            let path = path.clone();
            move |source| WatchdogError::Io { path, action, source }
        };
        let file = OpenOptions::new().write(true).open(&path).map_err(io("opening it"))?;
        let mut info = Info { options: 0, firmware_version: 0, identity: [0; 32] };
        // SAFETY: the descriptor is open and `info` has the layout of struct watchdog_info.
        unsafe { get_support(file.as_raw_fd(), &raw mut info) }
            .map_err(|errno| io("asking what it is")(errno.into()))?;
        let mut watchdog = Self { file, path: path.clone(), info, timeout };
        match watchdog.set_timeout(timeout) {
            Ok(()) => Ok(watchdog),
            Err(error) => {
                watchdog.disarm();
                Err(error)
            }
        }
    }

    /// Whether there is one that may be running: another process armed it and left it so, as a
    /// rule. Loads nothing and arms nothing. Where the kernel does not tell, one that is there may.
    #[must_use]
    pub fn may_be_armed(device: Option<&Path>) -> bool {
        let path = match device {
            Some(path) if path.exists() => path.to_owned(),
            Some(_) => return false,
            None => match find() {
                Some(path) => path,
                None => return false,
            },
        };
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        // The device without a number is the first one (watchdog-api.rst).
        let name = if name == "watchdog" { "watchdog0" } else { name };
        let state = std::fs::read_to_string(format!("/sys/class/watchdog/{name}/state"));
        state.map_or(true, |state| state.trim() != "inactive")
    }

    /// What the device calls itself, e.g. `i6300ESB timer`.
    #[must_use]
    pub fn identity(&self) -> String {
        let text = self.info.identity.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(text).into_owned()
    }

    /// Whether it was this watchdog that reset the machine last, where the driver knows that.
    #[must_use]
    pub fn has_reset_this_machine(&self) -> bool {
        let mut status = 0;
        // SAFETY: the descriptor is open; WDIOC_GETBOOTSTATUS writes one int.
        unsafe { get_boot_status(self.file.as_raw_fd(), &raw mut status) }.is_ok()
            && status & WDIOF_CARDRESET != 0
    }

    /// After how long without a pet it resets the machine.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Starts the time anew.
    ///
    /// # Errors
    /// The kernel's; the machine will be reset then.
    pub fn pet(&self) -> std::io::Result<()> {
        let mut ignored = 0;
        // SAFETY: the descriptor is open; the ioctl takes no more than a pointer to an int.
        unsafe { keep_alive(self.file.as_raw_fd(), &raw mut ignored) }?;
        Ok(())
    }

    /// Stops it while it stays open. `false`: it cannot be stopped so, and must be petted on.
    #[must_use]
    pub fn stop(&self) -> bool {
        let mut disable = WDIOS_DISABLECARD;
        // SAFETY: the descriptor is open; WDIOC_SETOPTIONS reads one int.
        unsafe { set_options(self.file.as_raw_fd(), &raw mut disable) }.is_ok()
    }

    /// Stops it for good: the machine is not reset any more. For an orderly end without HA VMs.
    pub fn disarm(mut self) {
        let stopped = self.stop();
        // The magic close: a driver that knows it stops when the last byte before closing is `V`.
        let told = self.file.write_all(b"V");
        if !stopped && (told.is_err() || self.info.options & WDIOF_MAGICCLOSE == 0) {
            tracing::warn!(
                device = %self.path.display(), identity = self.identity(),
                "the watchdog cannot be stopped (nowayout): it will reset this machine"
            );
        }
    }

    fn set_timeout(&mut self, timeout: Duration) -> Result<(), WatchdogError> {
        let wanted_s = timeout.as_secs().max(1);
        let mut seconds = libc::c_int::try_from(wanted_s).unwrap_or(libc::c_int::MAX);
        if self.info.options & WDIOF_SETTIMEOUT != 0 {
            // SAFETY: the descriptor is open; the ioctl reads and writes one int.
            unsafe { set_timeout(self.file.as_raw_fd(), &raw mut seconds) }.map_err(|errno| {
                let path = self.path.clone();
                WatchdogError::Io { path, action: "setting its timeout", source: errno.into() }
            })?;
        } else {
            // SAFETY: as above; WDIOC_GETTIMEOUT writes one int.
            unsafe { get_timeout(self.file.as_raw_fd(), &raw mut seconds) }.map_err(|errno| {
                let path = self.path.clone();
                WatchdogError::Io { path, action: "reading its timeout", source: errno.into() }
            })?;
        }
        let granted_s = u64::try_from(seconds).unwrap_or(u64::MAX);
        if granted_s > wanted_s {
            let (path, identity) = (self.path.clone(), self.identity());
            return Err(WatchdogError::Timeout { path, identity, wanted_s, granted_s });
        }
        self.timeout = Duration::from_secs(granted_s);
        Ok(())
    }
}

nix::ioctl_read!(get_timeout, b'W', 7, libc::c_int);

fn find() -> Option<PathBuf> {
    DEVICES.iter().map(PathBuf::from).find(|path| path.exists())
}

fn find_or_load() -> Result<PathBuf, WatchdogError> {
    if let Some(path) = find() {
        return Ok(path);
    }
    let outcome = match Command::new("modprobe").arg("softdog").output() {
        Ok(output) if output.status.success() => "made none".to_owned(),
        Ok(output) => format!("failed: {}", String::from_utf8_lossy(&output.stderr).trim()),
        Err(error) => format!("could not be run: {error}"),
    };
    find().ok_or(WatchdogError::None(outcome))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_watchdog_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Watchdog::open(Some(file.path()), Duration::from_secs(8)).unwrap_err();
        assert!(error.to_string().contains("asking what it is"), "{error}");
        let none = Path::new("/dev/no-such-watchdog");
        assert!(!Watchdog::may_be_armed(Some(none)));
        assert!(Watchdog::may_be_armed(Some(file.path())), "nobody says that it is not");
        let error = Watchdog::open(Some(none), Duration::from_secs(8)).unwrap_err();
        assert!(error.to_string().contains("/dev/no-such-watchdog"), "{error}");
    }
}
