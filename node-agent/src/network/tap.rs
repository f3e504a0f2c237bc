//! A tap: opened, plugged into its bridge and brought up by the VM process itself while it is still
//! root. Not persistent: it is gone when the process is.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::{NetworkError, check_name};

/// `struct virtio_net_hdr_v1`: stands before each frame (virtio 1.2 §5.1.6).
pub const VNET_HEADER_BYTES: i32 = 12;

/// An open tap and its interface.
#[derive(Debug)]
pub struct Tap {
    /// Frames, each behind a [`VNET_HEADER_BYTES`] long virtio-net header. Non-blocking.
    pub file: File,
    /// The interface's name, chosen by the kernel.
    pub name: String,
}

/// `linux/sockios.h`: plug an interface into a bridge.
const SIOCBRADDIF: libc::c_ulong = 0x89a2;

nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_write_ptr_bad!(tun_set_vnet_hdr_sz, libc::TUNSETVNETHDRSZ, libc::c_int);
nix::ioctl_write_ptr_bad!(bridge_add_interface, SIOCBRADDIF, libc::ifreq);
nix::ioctl_readwrite_bad!(get_flags, libc::SIOCGIFFLAGS, libc::ifreq);
nix::ioctl_write_ptr_bad!(set_flags, libc::SIOCSIFFLAGS, libc::ifreq);
nix::ioctl_readwrite_bad!(get_mtu, libc::SIOCGIFMTU, libc::ifreq);
nix::ioctl_write_ptr_bad!(set_mtu, libc::SIOCSIFMTU, libc::ifreq);

impl Tap {
    /// Opens a new tap and plugs it into `bridge`, with the bridge's MTU. Needs CAP_NET_ADMIN.
    ///
    /// # Errors
    /// [`NetworkError::Io`]: says which step the kernel refused.
    pub fn open(bridge: &str) -> Result<Self, NetworkError> {
        check_name(bridge)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(NetworkError::io("opening /dev/net/tun for", bridge))?;
        let name = create(&file).map_err(NetworkError::io("making a tap for", bridge))?;
        let tap = Self { file, name };
        // The host must not speak IPv6 on it; where the file is missing, it does not.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", tap.name), "1");
        tap.plug_in(bridge).map_err(NetworkError::io("plugging a tap into bridge", bridge))?;
        Ok(tap)
    }

    fn plug_in(&self, bridge: &str) -> io::Result<()> {
        let control =
            socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        let mut request = request(bridge)?;
        // SAFETY: `request` is a valid ifreq that names an interface; the kernel fills the MTU.
        unsafe { get_mtu(control.as_raw_fd(), &raw mut request) }?;
        // SAFETY: SIOCGIFMTU has just written this member of the union.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        let mut own = self.request()?;
        own.ifr_ifru.ifru_mtu = mtu;
        // SAFETY: a valid ifreq with a name and an MTU, as SIOCSIFMTU takes it.
        unsafe { set_mtu(control.as_raw_fd(), &raw const own) }?;
        self.join(&control, bridge)?;
        let mut own = self.request()?;
        // SAFETY: a valid ifreq that names an interface; the kernel fills the flags.
        unsafe { get_flags(control.as_raw_fd(), &raw mut own) }?;
        let up = i16::try_from(libc::IFF_UP).map_err(io::Error::other)?;
        // SAFETY: SIOCGIFFLAGS has just written this member of the union.
        unsafe { own.ifr_ifru.ifru_flags |= up };
        // SAFETY: a valid ifreq with a name and flags, as SIOCSIFFLAGS takes it.
        unsafe { set_flags(control.as_raw_fd(), &raw const own) }?;
        Ok(())
    }

    fn join(&self, control: &OwnedFd, bridge: &str) -> io::Result<()> {
        let index = nix::net::if_::if_nametoindex(self.name.as_str())?;
        let mut join = request(bridge)?;
        join.ifr_ifru.ifru_ifindex = i32::try_from(index).map_err(io::Error::other)?;
        // SAFETY: a valid ifreq with the bridge's name and the tap's index, as SIOCBRADDIF takes it.
        unsafe { bridge_add_interface(control.as_raw_fd(), &raw const join) }?;
        Ok(())
    }

    fn request(&self) -> io::Result<libc::ifreq> {
        request(&self.name)
    }
}

/// Turns an open /dev/net/tun into a new tap; gives the name that the kernel chose.
fn create(file: &File) -> io::Result<String> {
    let mut wish = request("hftap%d")?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    wish.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: a valid ifreq; the kernel writes the chosen name into it (the ioctl is declared as a
    // write in Linux' header, yet copies back), and `wish` is a mutable local that outlives the call.
    unsafe { tun_set_iff(file.as_raw_fd(), &raw mut wish) }?;
    // SAFETY: the argument points to an int that outlives the call.
    unsafe { tun_set_vnet_hdr_sz(file.as_raw_fd(), &VNET_HEADER_BYTES) }?;
    let name = wish.ifr_name.iter().take_while(|c| **c != 0).map(|c| c.cast_unsigned());
    String::from_utf8(name.collect()).map_err(io::Error::other)
}

/// An ifreq that names an interface.
fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::other("interface name too long"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}
