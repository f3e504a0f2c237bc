//! rustls configurations: always TLS 1.3, always the ring provider, always the CAs that the cluster trusts now.

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig,
    SignatureScheme,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use super::Roots;
use crate::identity::{Pair, Trusted};

/// HTTP/2, as gRPC speaks it.
const ALPN: &[u8] = b"h2";

/// Keys or certificates that rustls does not take.
#[derive(Debug, thiserror::Error)]
#[error("the node's key and certificates do not work: {0}")]
pub(crate) struct TlsError(String);

impl TlsError {
    pub(super) fn of(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// ring, with ChaCha20-Poly1305 first where the CPU has no instructions for AES.
pub(super) fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    if !std::arch::is_x86_feature_detected!("aes") {
        provider.cipher_suites.sort_by_key(|suite| {
            suite.suite() != rustls::CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
        });
    }
    Arc::new(provider)
}

/// What this node shows of itself in each new handshake, and which CAs it trusts there. Both can be
/// exchanged at any time: connections that are open stay as they are.
pub(crate) struct Credentials {
    present: ArcSwap<CertifiedKey>,
    /// What that was made of.
    parts: Mutex<(Pair, Trusted)>,
    roots: Arc<Roots>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

impl Credentials {
    pub(crate) fn new(pair: &Pair, trusted: &Trusted) -> Result<Arc<Self>, TlsError> {
        let present = ArcSwap::from_pointee(certified(pair, trusted)?);
        let (parts, roots) = (Mutex::new((pair.clone(), trusted.clone())), Roots::new(trusted)?);
        Ok(Arc::new(Self { present, parts, roots }))
    }

    /// Another pair from now on. Nothing changes where it does not work.
    pub(crate) fn replace(&self, pair: &Pair) -> Result<(), TlsError> {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        self.present.store(Arc::new(certified(pair, &parts.1)?));
        parts.0 = pair.clone();
        Ok(())
    }

    /// Other CAs from now on. Nothing changes where they do not work.
    pub(crate) fn trust(&self, trusted: &Trusted) -> Result<(), TlsError> {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = certified(&parts.0, trusted)?;
        self.roots.replace(trusted)?;
        self.present.store(Arc::new(shown));
        parts.1 = trusted.clone();
        Ok(())
    }

    pub(crate) fn roots(&self) -> &Arc<Roots> {
        &self.roots
    }
}

/// Refuses a key that is not the certificate's.
fn certified(pair: &Pair, trusted: &Trusted) -> Result<CertifiedKey, TlsError> {
    let key = PrivateKeyDer::from_pem_slice(pair.pem().as_bytes()).map_err(TlsError::of)?;
    // The CAs go along so that a joining node can compare their fingerprint; and what certifies the
    // one that signs by the one before, for those who know only that.
    let along = trusted.cross.iter().chain(&trusted.roots).map(String::as_str);
    let chain = std::iter::once(pair.pem()).chain(along);
    let chain = chain.map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()));
    let chain = chain.collect::<Result<Vec<_>, _>>().map_err(TlsError::of)?;
    CertifiedKey::from_der(chain, key, &provider()).map_err(TlsError::of)
}

impl ResolvesServerCert for Credentials {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.present.load_full())
    }
}

impl ResolvesClientCert for Credentials {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.present.load_full())
    }
    fn has_certs(&self) -> bool {
        true
    }
}

/// No session is resumed: a resumed one would go on with the certificates of its first handshake.
fn server(config: &mut ServerConfig) {
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
}

/// For the api listener: only holders of this cluster's certificates get through the handshake.
pub(crate) fn member_server(own: &Arc<Credentials>) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::of)?
        .with_client_cert_verifier(own.roots().clone())
        .with_cert_resolver(own.clone());
    server(&mut config);
    Ok(Arc::new(config))
}

/// For the enrolment listener: the client has no certificate yet.
pub(crate) fn enrol_server(own: &Arc<Credentials>) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::of)?
        .with_no_client_auth()
        .with_cert_resolver(own.clone());
    server(&mut config);
    Ok(Arc::new(config))
}

/// For connections to other members.
pub(crate) fn member_client(own: &Arc<Credentials>) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::of)?
        .dangerous()
        .with_custom_certificate_verifier(own.roots().clone())
        .with_client_cert_resolver(own.clone());
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
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
