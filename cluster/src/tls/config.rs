//! rustls configurations: always TLS 1.3, always the ring provider, always the cluster's own CA.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig,
    SignatureScheme,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use crate::identity::Identity;

/// HTTP/2, as gRPC speaks it.
const ALPN: &[u8] = b"h2";

/// Keys or certificates that rustls does not take.
#[derive(Debug, thiserror::Error)]
#[error("the node's key and certificates do not work: {0}")]
pub(crate) struct TlsError(String);

impl TlsError {
    fn of(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// ring, with ChaCha20-Poly1305 first where the CPU has no instructions for AES.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    if !std::arch::is_x86_feature_detected!("aes") {
        provider.cipher_suites.sort_by_key(|suite| {
            suite.suite() != rustls::CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
        });
    }
    Arc::new(provider)
}

fn parse(
    identity: &Identity,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>, RootCertStore), TlsError> {
    let own = CertificateDer::from_pem_slice(identity.certificate_pem.as_bytes())
        .map_err(TlsError::of)?;
    let ca = CertificateDer::from_pem_slice(identity.ca_pem.as_bytes()).map_err(TlsError::of)?;
    let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).map_err(TlsError::of)?;
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone()).map_err(TlsError::of)?;
    // The CA goes along so that a joining node can compare its fingerprint.
    Ok((vec![own, ca], key, roots))
}

/// For the api listener: only holders of this cluster's certificates get through the handshake.
pub(crate) fn member_server(identity: &Identity) -> Result<Arc<ServerConfig>, TlsError> {
    let (chain, key, roots) = parse(identity)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(TlsError::of)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::of)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(TlsError::of)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// For the enrolment listener: the client has no certificate yet.
pub(crate) fn enrol_server(identity: &Identity) -> Result<Arc<ServerConfig>, TlsError> {
    let (chain, key, _) = parse(identity)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::of)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(TlsError::of)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// For connections to other members.
pub(crate) fn member_client(identity: &Identity) -> Result<Arc<ClientConfig>, TlsError> {
    let (chain, key, roots) = parse(identity)?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::of)?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .map_err(TlsError::of)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// For a joining node: trusts exactly the CA whose fingerprint its token carries.
pub(crate) fn enrol_client(ca_fingerprint: &str) -> Result<Arc<ClientConfig>, TlsError> {
    let verifier = PinnedCa { fingerprint: ca_fingerprint.to_owned(), provider: provider() };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::of)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// Finds the CA in the chain by its fingerprint, then verifies the chain against it as usual.
#[derive(Debug)]
struct PinnedCa {
    fingerprint: String,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let unknown = || rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let ca = intermediates
            .iter()
            .find(|der| crate::identity::fingerprint_der(der) == self.fingerprint)
            .ok_or_else(unknown)?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|_| unknown())?
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
