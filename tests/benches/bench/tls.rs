//! gRPC channels over TLS with both sides verified, the same way to both stores.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use hyper_util::rt::TokioIo;
use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

/// A client's side of TLS.
#[derive(Clone)]
pub(crate) struct Tls {
    config: Arc<ClientConfig>,
    server: ServerName<'static>,
}

impl Tls {
    /// From PEM texts; `server` is the name in the members' certificates.
    pub(crate) fn new(
        ca: &str,
        certificate: &str,
        key: &str,
        server: &str,
    ) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).context("the CA")?)?;
        let chain = CertificateDer::pem_slice_iter(certificate.as_bytes());
        let chain = chain.collect::<Result<Vec<_>, _>>().context("the client's certificate")?;
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).context("the client's key")?;
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self { config: Arc::new(config), server: ServerName::try_from(server.to_owned())? })
    }

    /// A connection of its own to a port of this machine, made at its first use.
    pub(crate) fn channel(&self, port: u16) -> Channel {
        let tls = self.clone();
        Endpoint::from_static("http://store")
            .connect_timeout(Duration::from_secs(5))
            .connect_with_connector_lazy(service_fn(move |_: Uri| {
                let tls = tls.clone();
                async move {
                    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
                    stream.set_nodelay(true)?;
                    let connector = TlsConnector::from(tls.config);
                    connector.connect(tls.server, stream).await.map(TokioIo::new)
                }
            }))
    }
}
