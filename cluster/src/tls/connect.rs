//! gRPC channels to other members, each accepted only from the node it is meant for.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use crate::host::{Connection, Host};

const CONNECT_LIMIT: Duration = Duration::from_secs(3);

/// A channel that connects at its first use. `expect` is the name that the server's certificate
/// must carry; `address` is where it is.
pub(crate) fn channel(
    host: Arc<dyn Host>,
    tls: Arc<ClientConfig>,
    address: String,
    expect: ServerName<'static>,
) -> Channel {
    // The URI is never dialled; it fills HTTP/2's :authority.
    Endpoint::from_static("http://member.holdfast")
        .connect_timeout(CONNECT_LIMIT)
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(5))
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20)
        .connect_with_connector_lazy(service_fn(move |_: Uri| {
            let (host, tls) = (host.clone(), tls.clone());
            let (address, expect) = (address.clone(), expect.clone());
            async move { connect(host.as_ref(), tls, &address, expect).await.map(TokioIo::new) }
        }))
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
