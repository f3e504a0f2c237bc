//! A tap interface: whole Ethernet frames behind a virtio-net header (Linux `tun.c`).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

/// Bytes of the header before each frame: `struct virtio_net_hdr_v1`.
pub(crate) const HEADER_BYTES: usize = 12;

const TUN: u32 = b'T' as u32;
ioctl_iow_nr!(TUNSETIFF, TUN, 202, libc::c_int);
ioctl_iow_nr!(TUNSETOFFLOAD, TUN, 208, libc::c_uint);
ioctl_ior_nr!(TUNGETIFF, TUN, 210, libc::c_uint);
ioctl_iow_nr!(TUNSETVNETHDRSZ, TUN, 216, libc::c_int);

/// Frames may come without a finished checksum.
pub(crate) const OFFLOAD_CSUM: libc::c_uint = 1;
/// TCP over IPv4 may come in segments of 64 KiB.
pub(crate) const OFFLOAD_TSO4: libc::c_uint = 2;
/// TCP over IPv6 may come in segments of 64 KiB.
pub(crate) const OFFLOAD_TSO6: libc::c_uint = 4;
/// Such segments may carry ECN.
pub(crate) const OFFLOAD_TSO_ECN: libc::c_uint = 8;

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The device node.
    #[error("cannot open /dev/net/tun: load the tun module, or run with CAP_NET_ADMIN")]
    Open(#[source] io::Error),
    /// A name that no interface can have.
    #[error("{0:?} is no interface name: 1 to 15 bytes, no slash, no blank")]
    Name(String),
    /// The interface.
    #[error("cannot attach to tap interface {name}: it may be in use, or owned by another user")]
    Attach {
        /// The interface.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is no tap with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR.
    #[error("the file handed over is not a tap opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    Flags,
    /// An ioctl.
    #[error("{what} on a tap interface failed")]
    Ioctl {
        /// The ioctl.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// `struct ifreq` as TUNSETIFF and TUNGETIFF use it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    pad: [u8; 22],
}

/// An attached tap interface.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Attaches to interface `name`, which is made when it is not there (with CAP_NET_ADMIN).
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(name: &str) -> Result<Self, TapError> {
        let bad = |byte: u8| byte == b'/' || byte == 0 || byte.is_ascii_whitespace();
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.bytes().any(bad) {
            return Err(TapError::Name(name.to_owned()));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(TapError::Open)?;
        let mut request = InterfaceRequest::empty();
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        request.flags = flags();
        // SAFETY: the kernel reads and fills one `ifreq` that lives across the call.
        let result = unsafe { ioctl_with_mut_ref(&file, TUNSETIFF(), &mut request) };
        check(result).map_err(|source| TapError::Attach { name: name.to_owned(), source })?;
        Self::set_up(file)
    }

    /// Takes a tap that somebody else attached, such as a privileged agent.
    ///
    /// # Errors
    /// [`TapError::Flags`] when it is not of the right kind.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        let file = File::from(fd);
        let mut request = InterfaceRequest::empty();
        // SAFETY: the kernel fills one `ifreq` that lives across the call.
        let result = unsafe { ioctl_with_mut_ref(&file, TUNGETIFF(), &mut request) };
        if check(result).is_err() || request.flags & flags() != flags() {
            return Err(TapError::Flags);
        }
        // SAFETY: plain flag calls on a file that is open.
        let result = unsafe {
            let now = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(file.as_raw_fd(), libc::F_SETFL, now | libc::O_NONBLOCK)
        };
        check(result).map_err(|source| TapError::Ioctl { what: "O_NONBLOCK", source })?;
        Self::set_up(file)
    }

    fn set_up(file: File) -> Result<Self, TapError> {
        let size = libc::c_int::try_from(HEADER_BYTES).unwrap_or(0);
        // SAFETY: the kernel reads one int that lives across the call.
        let result = unsafe { ioctl_with_ref(&file, TUNSETVNETHDRSZ(), &size) };
        check(result).map_err(|source| TapError::Ioctl { what: "TUNSETVNETHDRSZ", source })?;
        Ok(Self { file })
    }

    /// Says which offloads the guest takes in frames that it receives.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn set_offload(&self, offload: libc::c_uint) -> io::Result<()> {
        // SAFETY: the argument is a plain number.
        let result =
            unsafe { ioctl_with_val(&self.file, TUNSETOFFLOAD(), libc::c_ulong::from(offload)) };
        check(result)
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl InterfaceRequest {
    fn empty() -> Self {
        Self { name: [0; libc::IFNAMSIZ], flags: 0, pad: [0; 22] }
    }
}

fn flags() -> libc::c_short {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    libc::c_short::try_from(flags).unwrap_or(0)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
impl Tap {
    /// A stand-in for tests: any file that keeps packet boundaries.
    pub(crate) fn fake(fd: OwnedFd) -> Self {
        Self { file: File::from(fd) }
    }
}
