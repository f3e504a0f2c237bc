//! Listeners: accept, shake hands, and yield only connections whose other end is known.
//!
//! Handshakes run beside each other, so a peer that sends garbage or nothing holds up nobody; at
//! most [`HANDSHAKES_MAX`] run at once and each has [`HANDSHAKE_LIMIT`].

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use futures::stream::unfold;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::{ConnectInfo, Guarded, Refusal, Trust};
use crate::host::{Connection, Listen};
use crate::identity::{Certificate, subject_of};

const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
const HANDSHAKES_MAX: usize = 256;
/// A connection whose certificate is refused lives so long, for the other end to be told why.
const TOLD: Duration = Duration::from_secs(2);
/// How often a refused address is mentioned in the log.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// An authenticated connection of the api listener (or an anonymous one of the enrolment listener).
#[derive(Debug)]
pub struct TlsConnection {
    stream: Guarded<TlsStream<Connection>>,
    info: Option<ConnectInfo>,
}

impl Connected for TlsConnection {
    type ConnectInfo = Option<ConnectInfo>;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.info.clone()
    }
}

/// Whom a listener lets in.
#[derive(Debug, Clone)]
pub(crate) enum Admit {
    /// Nodes and clients of the cluster with this id, as long as they are trusted.
    Members(String, Arc<Trust>),
    /// Anyone; the service behind asks for a token.
    Anyone,
}

/// Connections of a listener, for as long as the stream is polled.
pub(crate) fn incoming<L: Listen>(
    listener: L,
    tls: Arc<ServerConfig>,
    admit: Admit,
) -> impl Stream<Item = io::Result<TlsConnection>> + Send + 'static + use<L> {
    let state = Listening {
        listener: Box::new(listener),
        acceptor: TlsAcceptor::from(tls),
        admit,
        handshakes: JoinSet::new(),
        complaint: None,
    };
    unfold(state, |mut state| async move {
        let connection = state.next().await;
        Some((Ok(connection), state))
    })
}

struct Listening {
    listener: Box<dyn Listen>,
    acceptor: TlsAcceptor,
    admit: Admit,
    handshakes: JoinSet<(SocketAddr, io::Result<TlsConnection>)>,
    complaint: Option<(IpAddr, Instant)>,
}

impl Listening {
    async fn next(&mut self) -> TlsConnection {
        loop {
            tokio::select! {
                accepted = self.listener.accept(), if self.handshakes.len() < HANDSHAKES_MAX => {
                    match accepted {
                        Ok((connection, remote)) => self.begin(connection, remote),
                        Err(error) => {
                            // Out of file descriptors, most likely: give others time to close.
                            tracing::warn!(%error, "accept failed");
                            tokio::time::sleep(Duration::from_millis(100)).await;
                        }
                    }
                }
                Some(done) = self.handshakes.join_next() => match done {
                    Ok((_, Ok(connection))) => return connection,
                    Ok((remote, Err(error))) => self.complain(remote, &error),
                    Err(error) => tracing::warn!(%error, "a handshake ended oddly"),
                },
            }
        }
    }

    fn begin(&mut self, connection: Connection, remote: SocketAddr) {
        let (acceptor, admit) = (self.acceptor.clone(), self.admit.clone());
        self.handshakes.spawn(async move {
            let shaken = tokio::time::timeout(
                HANDSHAKE_LIMIT,
                handshake(acceptor, connection, remote, admit),
            );
            let result = shaken.await.unwrap_or_else(|_| {
                Err(io::Error::new(io::ErrorKind::TimedOut, "no TLS handshake within 10 s"))
            });
            (remote, result)
        });
    }

    /// Once per address and minute: a port scanner must not fill the log.
    fn complain(&mut self, remote: SocketAddr, error: &io::Error) {
        let now = Instant::now();
        let repeated = self
            .complaint
            .is_some_and(|(ip, at)| ip == remote.ip() && now.duration_since(at) < LOG_EVERY);
        if repeated {
            tracing::debug!(%remote, %error, "connection refused");
        } else {
            tracing::warn!(%remote, %error, "connection refused");
            self.complaint = Some((remote.ip(), now));
        }
    }
}

async fn handshake(
    acceptor: TlsAcceptor,
    connection: Connection,
    remote: SocketAddr,
    admit: Admit,
) -> io::Result<TlsConnection> {
    let stream = acceptor.accept(connection).await?;
    let Admit::Members(cluster_id, trust) = admit else {
        return Ok(TlsConnection { stream: Guarded::new(stream, None), info: None });
    };
    let denied = |why: String| io::Error::new(io::ErrorKind::PermissionDenied, why);
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let nobody = || denied("its certificate names no node or client".to_owned());
    let der = chain.first().ok_or_else(nobody)?;
    let (cluster, peer) = subject_of(der).ok_or_else(nobody)?;
    if cluster != cluster_id {
        return Err(denied(format!("its certificate is of cluster {cluster}")));
    }
    let certificate = Certificate::from_der(der).ok_or_else(nobody)?;
    let info = ConnectInfo { peer, serial: certificate.serial.as_str().into(), remote };
    let (open, refusal) = trust.enter(certificate, chain);
    if let Some(refusal @ (Refusal::Untrusted | Refusal::Unrecorded)) = refusal {
        return Err(denied(refusal.words().to_owned()));
    }
    if let Some(refusal) = refusal {
        // Each of its requests is answered with the reason, and nothing else.
        tracing::warn!(%remote, peer = %info.peer, serial = %info.serial, ?refusal, "refused");
        open.keep_to_tell();
        let open = Arc::downgrade(&open);
        tokio::spawn(async move {
            tokio::time::sleep(TOLD).await;
            if let Some(open) = open.upgrade() {
                open.cut();
            }
        });
    }
    Ok(TlsConnection { stream: Guarded::new(stream, Some(open)), info: Some(info) })
}

impl AsyncRead for TlsConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for TlsConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
