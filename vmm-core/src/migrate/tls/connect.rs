//! Opening the connections of a migration: from the source, and at the target's listener.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};
use rustls_pki_types::ServerName;

use super::identity::SERVER_NAME;
use super::stream::TlsStream;
use super::{Fingerprint, Identity};
use crate::migrate::stream::{Acceptor, Connector, Stream, TICK};
use crate::migrate::{CancelToken, StreamError};

/// How long one peer may take for its TLS handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);

/// Opens the source's connections to one target.
#[derive(Debug)]
pub struct TlsConnector {
    target: SocketAddr,
    config: Arc<ClientConfig>,
    limit: Duration,
}

impl TlsConnector {
    /// Connections to the process at `target` that holds the certificate with fingerprint `peer`;
    /// each attempt takes at most `limit`.
    ///
    /// # Errors
    /// [`StreamError::Tls`] if TLS can't be set up here.
    pub fn new(
        target: SocketAddr,
        identity: &Identity,
        peer: Fingerprint,
        limit: Duration,
    ) -> Result<Self, StreamError> {
        Ok(Self { target, config: Arc::new(identity.client_config(peer)?), limit })
    }
}

impl Connector for TlsConnector {
    fn connect(&mut self, cancel: &CancelToken) -> Result<Box<dyn Stream>, StreamError> {
        let doing = "connecting to the target";
        let socket = TcpStream::connect_timeout(&self.target, self.limit)
            .map_err(|source| StreamError::Io { doing, source })?;
        let name = ServerName::try_from(SERVER_NAME)
            .map_err(|error| StreamError::Tls { reason: error.to_string() })?;
        let connection = ClientConnection::new(Arc::clone(&self.config), name)
            .map_err(|error| StreamError::Tls { reason: error.to_string() })?;
        shake_hands(Connection::Client(connection), socket, self.limit, cancel)
    }
}

/// Gives the target's connections from a listener. Whoever is not the expected source is turned
/// away and logged; the wait goes on.
#[derive(Debug)]
pub struct TlsAcceptor {
    listener: TcpListener,
    config: Arc<ServerConfig>,
}

impl TlsAcceptor {
    /// Accepts from `listener` only the process that holds the certificate with fingerprint `peer`.
    ///
    /// # Errors
    /// [`StreamError`] if TLS can't be set up, or the listener can't be made non-blocking.
    pub fn new(
        listener: TcpListener,
        identity: &Identity,
        peer: Fingerprint,
    ) -> Result<Self, StreamError> {
        let doing = "preparing the listener";
        listener.set_nonblocking(true).map_err(|source| StreamError::Io { doing, source })?;
        Ok(Self { listener, config: Arc::new(identity.server_config(peer)?) })
    }
}

impl Acceptor for TlsAcceptor {
    fn accept(
        &mut self,
        limit: Duration,
        cancel: &CancelToken,
    ) -> Result<Box<dyn Stream>, StreamError> {
        let doing = "waiting for the source to connect";
        let begin = Instant::now();
        loop {
            if cancel.is_cancelled() {
                return Err(StreamError::Cancelled);
            }
            let Some(left) = limit.checked_sub(begin.elapsed()) else {
                return Err(StreamError::Stalled { doing, limit });
            };
            match self.listener.accept() {
                Ok((socket, peer)) => match self.welcome(socket, left.min(HANDSHAKE_LIMIT), cancel)
                {
                    Ok(stream) => return Ok(stream),
                    Err(StreamError::Cancelled) => return Err(StreamError::Cancelled),
                    Err(error) => tracing::warn!(%peer, %error, "turned a migration peer away"),
                },
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    wait_readable(&self.listener, left.min(TICK))
                }
                // The peer hung up in the queue, or descriptors ran out for a moment: the next may do.
                Err(error) => {
                    tracing::warn!(%error, "a migration peer could not be accepted");
                    std::thread::sleep(left.min(TICK));
                }
            }
        }
    }
}

impl TlsAcceptor {
    fn welcome(
        &self,
        socket: TcpStream,
        limit: Duration,
        cancel: &CancelToken,
    ) -> Result<Box<dyn Stream>, StreamError> {
        let connection = ServerConnection::new(Arc::clone(&self.config))
            .map_err(|error| StreamError::Tls { reason: error.to_string() })?;
        shake_hands(Connection::Server(connection), socket, limit, cancel)
    }
}

/// Waits until a connection is there, at most `limit`.
fn wait_readable(listener: &TcpListener, limit: Duration) {
    use std::os::fd::AsRawFd;
    let mut poll = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let millis = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: `poll` is one valid pollfd and outlives the call. The result does not matter: the caller accepts again.
    unsafe { libc::poll(&raw mut poll, 1, millis) };
}

fn shake_hands(
    connection: Connection,
    socket: TcpStream,
    limit: Duration,
    cancel: &CancelToken,
) -> Result<Box<dyn Stream>, StreamError> {
    let doing = "agreeing on TLS";
    let io = |source| StreamError::Io { doing, source };
    socket.set_nonblocking(false).map_err(io)?;
    socket.set_nodelay(true).map_err(io)?;
    socket.set_read_timeout(Some(TICK)).map_err(io)?;
    socket.set_write_timeout(Some(TICK)).map_err(io)?;
    let begin = Instant::now();
    let mut stream = TlsStream::new(connection, socket);
    while stream.is_handshaking() {
        match stream.handshake_step() {
            Ok(()) => {}
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => {}
                ErrorKind::InvalidData => {
                    return Err(StreamError::NotThePeer { reason: error.to_string() });
                }
                ErrorKind::UnexpectedEof => return Err(StreamError::Closed { doing }),
                _ => return Err(io(error)),
            },
        }
        if cancel.is_cancelled() {
            return Err(StreamError::Cancelled);
        }
        if begin.elapsed() > limit {
            return Err(StreamError::Stalled { doing, limit });
        }
    }
    Ok(Box::new(stream))
}
