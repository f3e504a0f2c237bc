//! The target's listener: finds the expected source among whoever connects.
//!
//! All handshakes under way go on side by side, on the one thread that waits: a stranger that says
//! nothing delays nobody. They are bounded in number and in time; where there are too many, the
//! oldest goes, since the right source needs a few milliseconds.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::{Connection, ServerConfig, ServerConnection};

use super::connect::ticking;
use super::stream::{Step, TlsStream};
use super::{Fingerprint, Identity};
use crate::migrate::stream::{Acceptor, Stream, TICK};
use crate::migrate::{CancelToken, StreamError};

/// How long one peer may take for its TLS handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// Handshakes under way at once.
const HANDSHAKES_MAX: usize = 32;

/// Gives the target's connections from a listener. Whoever is not the expected source is turned
/// away and logged; the wait goes on.
pub struct TlsAcceptor {
    listener: TcpListener,
    config: Arc<ServerConfig>,
    /// Oldest first. Invariant: at most [`HANDSHAKES_MAX`].
    guests: VecDeque<Guest>,
}

/// Whoever has connected and not proved anything yet.
struct Guest {
    stream: TlsStream,
    address: SocketAddr,
    since: Instant,
}

impl std::fmt::Debug for TlsAcceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsAcceptor")
            .field("listener", &self.listener)
            .field("guests", &self.guests.len())
            .finish_non_exhaustive()
    }
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
        let config = Arc::new(identity.server_config(peer)?);
        Ok(Self { listener, config, guests: VecDeque::new() })
    }

    /// Takes in everyone who waits at the listener.
    fn take_in(&mut self) {
        // So many at most, so that those who are in get their turn.
        for _ in 0..HANDSHAKES_MAX {
            let (socket, address) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // The peer hung up in the queue, or descriptors ran out for a moment.
                Err(error) => {
                    tracing::warn!(%error, "a migration peer could not be accepted");
                    self.guests.pop_front();
                    return;
                }
            };
            match self.welcome(socket) {
                Ok(stream) => {
                    if self.guests.len() >= HANDSHAKES_MAX {
                        self.guests.pop_front();
                    }
                    self.guests.push_back(Guest { stream, address, since: Instant::now() });
                }
                Err(error) => tracing::warn!(%address, %error, "a migration peer is not served"),
            }
        }
    }

    fn welcome(&self, socket: TcpStream) -> io::Result<TlsStream> {
        socket.set_nonblocking(true)?;
        let connection =
            ServerConnection::new(Arc::clone(&self.config)).map_err(io::Error::other)?;
        Ok(TlsStream::new(Connection::Server(connection), socket))
    }

    /// Goes on with each handshake; the first that is done is the source.
    fn go_on(&mut self) -> Option<TlsStream> {
        let mut index = 0;
        while let Some(guest) = self.guests.get_mut(index) {
            let late = guest.since.elapsed() > HANDSHAKE_LIMIT;
            match guest.stream.handshake() {
                Ok(Step::Done) => return self.guests.remove(index).map(|guest| guest.stream),
                Ok(Step::Waiting) if !late => index += 1,
                Ok(Step::Waiting) => self.turn_away(index, "it did not finish its handshake"),
                Err(error) => self.turn_away(index, &error.to_string()),
            }
        }
        None
    }

    fn turn_away(&mut self, index: usize, why: &str) {
        if let Some(Guest { address, .. }) = self.guests.remove(index) {
            tracing::warn!(%address, why, "turned a migration peer away");
        }
    }

    /// Waits until someone connects or says something, at most `limit`.
    fn wait(&self, limit: Duration) {
        let guests = self.guests.iter().map(|guest| guest.stream.socket().as_raw_fd());
        let watched = |fd: RawFd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut polls: Vec<_> =
            std::iter::once(self.listener.as_raw_fd()).chain(guests).map(watched).collect();
        let count = libc::nfds_t::try_from(polls.len()).unwrap_or(0);
        let millis = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: `polls` holds `count` valid pollfds and outlives the call. The result does not
        // matter: the caller looks at all of them again.
        unsafe { libc::poll(polls.as_mut_ptr(), count, millis) };
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
            self.take_in();
            if let Some(stream) = self.go_on() {
                ticking(stream.socket()).map_err(|source| StreamError::Io { doing, source })?;
                return Ok(Box::new(stream));
            }
            let Some(left) = limit.checked_sub(begin.elapsed()) else {
                return Err(StreamError::Stalled { doing, limit });
            };
            self.wait(left.min(TICK));
        }
    }
}
