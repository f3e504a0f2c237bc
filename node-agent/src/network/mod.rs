//! Bridges, taps and announcements: how VMs reach the network.
//!
//! Owns the bridges it makes (on demand, by name) and the taps of VM processes. A tap belongs to
//! the process that opened it and vanishes with it, so nothing is ever left behind. Never touches
//! addresses, routes or firewalls.

mod announce;
mod bridge;
mod tap;

pub use announce::rarp_frame;
pub use bridge::ensure_bridge;
pub use tap::{Tap, VNET_HEADER_BYTES};

/// Why a network could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Linux' limit and characters.
    #[error(
        "`{0}` cannot be an interface's name: use 1 to 15 characters without space, `/` and `:`"
    )]
    BadName(String),
    /// Something else has the bridge's name.
    #[error("`{0}` exists and is not a bridge: give the network another bridge name")]
    NotABridge(String),
    /// No such NIC on this node.
    #[error("uplink `{0}` does not exist on this node: correct the network's uplink")]
    NoUplink(String),
    /// The NIC serves another bridge.
    #[error("uplink `{uplink}` already belongs to another bridge, so `{bridge}` cannot have it")]
    UplinkTaken {
        /// The NIC.
        uplink: String,
        /// The bridge that wants it.
        bridge: String,
    },
    /// Netlink refused.
    #[error("{action} `{interface}` failed: {source}")]
    Netlink {
        /// What was being done.
        action: &'static str,
        /// To what.
        interface: String,
        /// The kernel's reason.
        source: Box<rtnetlink::Error>,
    },
    /// The system refused.
    #[error("{action} `{interface}` failed: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        interface: String,
        /// The system's reason.
        source: std::io::Error,
    },
}

impl NetworkError {
    fn io(action: &'static str, interface: &str) -> impl FnOnce(std::io::Error) -> Self {
        let interface = interface.to_owned();
        move |source| Self::Io { action, interface, source }
    }

    fn netlink(action: &'static str, interface: &str) -> impl FnOnce(rtnetlink::Error) -> Self {
        let interface = interface.to_owned();
        move |source| Self::Netlink { action, interface, source: Box::new(source) }
    }
}

/// Linux' rule for interface names (`dev_valid_name`).
fn check_name(name: &str) -> Result<(), NetworkError> {
    let plain = |c: char| !c.is_whitespace() && !matches!(c, '/' | ':' | '\0');
    let valid =
        (1..=15).contains(&name.len()) && !matches!(name, "." | "..") && name.chars().all(plain);
    if valid { Ok(()) } else { Err(NetworkError::BadName(name.to_owned())) }
}
