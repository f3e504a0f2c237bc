//! TLS 1.3 between nodes and clients: who is at the other end is known before a byte is served.

mod config;
mod connect;
mod listen;
mod peer;
mod roots;
mod trust;

pub(crate) use config::{Credentials, enrol_client, enrol_server, member_client, member_server};
pub(crate) use connect::{channel, connect};
pub use listen::TlsConnection;
pub(crate) use listen::{Admit, incoming};
pub use peer::{PeerIdentity, client_serial, peer, peer_of, require_any, require_node};
pub(crate) use roots::Roots;
#[cfg(test)]
pub(crate) use trust::Open;
pub(crate) use trust::{Denied, Guarded, Recorded, Refusal, Trust};

/// What a service learns about the connection a request came in on (a request extension, as
/// `Option<ConnectInfo>`; see [`peer`]).
#[derive(Debug, Clone)]
pub struct ConnectInfo {
    /// The authenticated other end.
    pub peer: PeerIdentity,
    /// The serial number of its certificate, lower-case hexadecimal.
    pub serial: std::sync::Arc<str>,
    /// Its address.
    pub remote: std::net::SocketAddr,
}
