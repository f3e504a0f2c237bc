//! Opening the connections of a migration from the source.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::{ClientConfig, ClientConnection, Connection};
use rustls_pki_types::ServerName;

use super::identity::SERVER_NAME;
use super::stream::{Step, TlsStream};
use super::{Fingerprint, Identity};
use crate::migrate::stream::{Connector, Stream, TICK};
use crate::migrate::{CancelToken, StreamError};

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

fn shake_hands(
    connection: Connection,
    socket: TcpStream,
    limit: Duration,
    cancel: &CancelToken,
) -> Result<Box<dyn Stream>, StreamError> {
    let doing = "agreeing on TLS";
    ticking(&socket).map_err(|source| StreamError::Io { doing, source })?;
    let begin = Instant::now();
    let mut stream = TlsStream::new(connection, socket);
    while stream.handshake()? == Step::Waiting {
        if cancel.is_cancelled() {
            return Err(StreamError::Cancelled);
        }
        if begin.elapsed() > limit {
            return Err(StreamError::Stalled { doing, limit });
        }
    }
    Ok(Box::new(stream))
}

/// Lets a socket block for one tick at most, as a [`Stream`] must.
pub(super) fn ticking(socket: &TcpStream) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(TICK))?;
    socket.set_write_timeout(Some(TICK))
}
