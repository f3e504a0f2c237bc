//! The listeners: mTLS for nodes and clients, enrolment, and the local socket.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proto::v1::config_server::ConfigServer;
use proto::v1::ha_server::HaServer;
use proto::v1::membership_server::MembershipServer;
use proto::v1::nodes_server::NodesServer;
use proto::v1::peer_server::PeerServer;
use proto::v1::storage_server::StorageServer;
use proto::v1::tasks_server::TasksServer;
use proto::v1::vms_server::VmsServer;
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::Request;
use tonic::service::{InterceptorLayer, Routes};
use tonic::transport::Server;

use super::membership::MembershipService;
use super::{Api, Former};
use crate::access::Guard;
use crate::node::Node;

/// Streams of one connection; a client that opens more waits.
const STREAMS_MAX: u32 = 256;

fn server() -> Server {
    Server::builder()
        .max_concurrent_streams(STREAMS_MAX)
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
}

/// The services that clients use; a [`Guard`] stands before them.
fn client_routes(api: &Api, former: Option<Arc<dyn Former>>) -> Routes {
    Routes::new(MembershipServer::new(MembershipService { api: api.clone(), former }))
        .add_service(ConfigServer::new(api.clone()))
        .add_service(NodesServer::new(api.clone()))
        .add_service(VmsServer::new(api.clone()))
        .add_service(HaServer::new(api.clone()))
        .add_service(TasksServer::new(api.clone()))
        .add_service(StorageServer::new(api.clone()))
}

/// Why a port is not served (any more).
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// This node's certificate or key cannot be used.
    #[error("TLS: {0}")]
    Tls(String),
    /// The transport.
    #[error(transparent)]
    Transport(#[from] tonic::transport::Error),
}

/// Serves members and clients on the api port, until `stop`.
///
/// # Errors
/// [`ServeError`].
pub async fn serve_members(
    api: Api,
    node: Arc<Node>,
    listener: TcpListener,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let cluster = node.cluster().clone();
    let routes = client_routes(&api, None).add_service(PeerServer::new(api));
    let routes = routes.add_service(cluster.raft_service());
    let incoming =
        cluster.incoming(listener).map_err(|error| ServeError::Tls(error.to_string()))?;
    let admit = InterceptorLayer::new(move |request: Request<()>| {
        cluster.admit(&request)?;
        Ok(request)
    });
    let guard = Guard::new(node.access.clone(), &node.config.socket_path());
    let guard = guard.confirming(node.store.clone());
    let serve = server().layer(admit).layer(guard).add_routes(routes);
    Ok(serve.serve_with_incoming_shutdown(incoming, stop.cancelled()).await?)
}

/// Serves enrolment, until `stop`.
///
/// # Errors
/// [`ServeError`].
pub async fn serve_enrolment(
    node: Arc<Node>,
    listener: TcpListener,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let cluster = node.cluster().clone();
    let incoming =
        cluster.enrol_incoming(listener).map_err(|error| ServeError::Tls(error.to_string()))?;
    let routes = Routes::new(cluster.enrolment_service());
    let serve = server().add_routes(routes);
    Ok(serve.serve_with_incoming_shutdown(incoming, stop.cancelled()).await?)
}

/// Why the local socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another agent serves there.
    #[error("{0} is served by another node-agent: give each agent a run folder of its own")]
    InUse(std::path::PathBuf),
    /// The system refused.
    #[error("cannot make the local socket {path}: {source}")]
    Io {
        /// Where.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Makes the local socket, for root only.
///
/// # Errors
/// [`SocketError`].
pub async fn bind_local(path: &Path) -> Result<UnixListener, SocketError> {
    let io = |source| SocketError::Io { path: path.to_owned(), source };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(io)?;
    }
    if tokio::net::UnixStream::connect(path).await.is_ok() {
        return Err(SocketError::InUse(path.to_owned()));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
        Ok(()) | Err(_) => {}
    }
    // Never open to others, not even between making it and changing its mode.
    let before = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(path);
    nix::sys::stat::umask(before);
    let listener = bound.map_err(io)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(io)?;
    Ok(listener)
}

/// Serves root on this machine, until `stop`. The guard checks the peer credentials with each request.
///
/// # Errors
/// The transport's.
pub async fn serve_local(
    api: Api,
    former: Arc<dyn Former>,
    guard: Guard,
    listener: UnixListener,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let routes = client_routes(&api, Some(former));
    let incoming = UnixListenerStream::new(listener);
    let serve = server().layer(guard).add_routes(routes);
    serve.serve_with_incoming_shutdown(incoming, stop.cancelled()).await
}
