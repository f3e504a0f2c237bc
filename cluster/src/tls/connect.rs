//! gRPC channels to other members, each accepted only from the node it is meant for.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use super::{Guarded, Trust};
use crate::host::{Connection, Host};
use crate::identity::Certificate;

const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// An attempt that ends this much after its limit was not waited for.
const LATE: Duration = Duration::from_millis(500);

/// A channel that connects at its first use. `expect` is the name that the server's certificate
/// must carry; `address` says where it is, at each connection anew. A server that is not trusted any
/// more is refused, and cut.
pub(crate) fn channel(
    host: Arc<dyn Host>,
    tls: Arc<ClientConfig>,
    trust: Option<Arc<Trust>>,
    address: impl Fn() -> String + Send + Sync + 'static,
    expect: ServerName<'static>,
) -> Channel {
    // The URI is never dialled; it fills HTTP/2's :authority.
    Endpoint::from_static("http://member.holdfast")
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(5))
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20)
        .connect_with_connector_lazy(service_fn(move |_: Uri| {
            let (host, tls, trust) = (host.clone(), tls.clone(), trust.clone());
            let (address, expect) = (address(), expect.clone());
            async move {
                let attempt = || connect(host.as_ref(), tls.clone(), &address, expect.clone());
                let stream = dial(CONNECT_LIMIT, attempt).await?;
                trusted(stream, trust.as_deref()).map(TokioIo::new)
            }
        }))
}

/// Dials for whoever waits now. A channel keeps a dial whose request was given up, without polling
/// it, for its next request: what that finds, perhaps minutes later, is an attempt that the other
/// end has long closed, or the news of a node that is up again since. Such a dial begins anew.
/// An attempt that is waited for fails within `limit`.
async fn dial<T, F>(limit: Duration, attempt: impl Fn() -> F + Send) -> io::Result<T>
where
    F: Future<Output = io::Result<T>> + Send,
{
    loop {
        let begun = Instant::now();
        let dialled = attempt().await;
        if dialled.is_ok() || begun.elapsed() < limit + LATE {
            return dialled;
        }
    }
}

fn trusted(
    stream: TlsStream<Connection>,
    trust: Option<&Trust>,
) -> io::Result<Guarded<TlsStream<Connection>>> {
    let Some(trust) = trust else { return Ok(Guarded::new(stream, None)) };
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let certificate =
        chain.first().and_then(|der| Certificate::from_der(der)).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "its certificate names no node")
        })?;
    match trust.enter(certificate, chain) {
        (open, None) => Ok(Guarded::new(stream, Some(open))),
        (_, Some(refusal)) => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("its certificate counts no more ({refusal:?})"),
        )),
    }
}

/// One TLS connection.
pub(crate) async fn connect(
    host: &dyn Host,
    tls: Arc<ClientConfig>,
    address: &str,
    expect: ServerName<'static>,
) -> io::Result<TlsStream<Connection>> {
    let dialled = tokio::time::timeout(CONNECT_LIMIT, async {
        let connection = host.dial(address).await?;
        TlsConnector::from(tls).connect(expect, connection).await
    });
    dialled.await.unwrap_or_else(|_| {
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("{address} did not answer within {} s", CONNECT_LIMIT.as_secs()),
        ))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Fails at its second poll, and is counted.
    async fn fail(attempts: &AtomicUsize) -> io::Result<()> {
        attempts.fetch_add(1, Ordering::SeqCst);
        tokio::task::yield_now().await;
        Err(io::ErrorKind::UnexpectedEof.into())
    }

    #[tokio::test]
    async fn a_dial_that_is_waited_for_fails_once() {
        let attempts = AtomicUsize::new(0);
        dial(CONNECT_LIMIT, || fail(&attempts)).await.unwrap_err();
        assert_eq!(attempts.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_dial_that_was_left_alone_begins_anew() {
        let attempts = AtomicUsize::new(0);
        let limit = Duration::from_millis(1);
        let mut dialling = Box::pin(dial(limit, || fail(&attempts)));
        assert!(futures::poll!(dialling.as_mut()).is_pending());
        // Nobody polls it meanwhile.
        std::thread::sleep(limit + LATE);
        dialling.await.unwrap_err();
        assert_eq!(attempts.load(Ordering::SeqCst), 2);
    }
}
