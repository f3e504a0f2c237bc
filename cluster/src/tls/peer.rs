//! Who is at the other end of a connection.

use std::fmt;

use proto::NodeId;
use tonic::{Extensions, Request, Status};

/// The authenticated other end.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum PeerIdentity {
    /// A node of this cluster.
    Node(NodeId),
    /// A client with a certificate of this cluster.
    Client(String),
    /// Root on this machine, over the local Unix socket.
    LocalRoot,
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(id) => write!(f, "node {id}"),
            Self::Client(name) => write!(f, "client `{name}`"),
            Self::LocalRoot => f.write_str("root on this machine"),
        }
    }
}

/// Who sent the request: from the TLS connection, or root over a Unix socket. None: nobody known.
#[must_use]
pub fn peer<T>(request: &Request<T>) -> Option<PeerIdentity> {
    peer_of(request.extensions())
}

/// As [`peer`], by a request's extensions.
#[must_use]
pub fn peer_of(extensions: &Extensions) -> Option<PeerIdentity> {
    if let Some(info) = extensions.get::<Option<super::ConnectInfo>>() {
        return info.as_ref().map(|info| info.peer.clone());
    }
    let uds = extensions.get::<tonic::transport::server::UdsConnectInfo>()?;
    (uds.peer_cred.as_ref()?.uid() == 0).then_some(PeerIdentity::LocalRoot)
}

/// The serial number of the certificate that a client called with, lower-case hexadecimal; `None`:
/// no client called.
#[must_use]
pub fn client_serial<T>(request: &Request<T>) -> Option<String> {
    let info = request.extensions().get::<Option<super::ConnectInfo>>()?.as_ref()?;
    matches!(info.peer, PeerIdentity::Client(_)).then(|| info.serial.to_string())
}

/// The calling node's id.
///
/// # Errors
/// `PERMISSION_DENIED` for anyone else.
pub fn require_node<T>(request: &Request<T>) -> Result<NodeId, Status> {
    match peer(request) {
        Some(PeerIdentity::Node(id)) => Ok(id),
        Some(other) => Err(Status::permission_denied(format!(
            "this service is for the cluster's nodes only; you are {other}"
        ))),
        None => Err(Status::unauthenticated("no identity on this connection")),
    }
}

/// Any authenticated caller.
///
/// # Errors
/// `UNAUTHENTICATED` where the connection carries no identity.
pub fn require_any<T>(request: &Request<T>) -> Result<PeerIdentity, Status> {
    peer(request).ok_or_else(|| Status::unauthenticated("no identity on this connection"))
}
