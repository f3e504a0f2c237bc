//! What a member's ports speak.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    AlertDescription, ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    SupportedProtocolVersion,
};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::common::{Lab, Outcome};

/// A client that does not care whom it talks to.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// What the client's half of a handshake ends with.
async fn handshake(
    address: &str,
    version: &'static SupportedProtocolVersion,
) -> Outcome<std::io::Result<()>> {
    let provider = Arc::new(ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[version])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
        .with_no_client_auth();
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("somebody")?;
    Ok(TlsConnector::from(Arc::new(config)).connect(name, stream).await.map(drop))
}

#[test]
fn tls_1_2_is_refused() -> Outcome {
    let lab = Lab::new(1)?;
    let config = &lab.nodes[0].config;
    for address in [config.api_address.clone(), config.enrol_address.clone()] {
        lab.nodes[0].run(|_| async move {
            let refused = handshake(&address, &rustls::version::TLS12).await?;
            let error = refused.err().ok_or("TLS 1.2 was accepted")?;
            let error = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
            let alert = AlertDescription::ProtocolVersion;
            assert_eq!(error, Some(&Error::AlertReceived(alert)), "at {address}");
            // It is the version that is refused: with 1.3 the same client gets as far as to be
            // asked who it is.
            handshake(&address, &rustls::version::TLS13).await??;
            Outcome::Ok(())
        })??;
    }
    Ok(())
}
