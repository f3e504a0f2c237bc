//! A one-off key and certificate, and how the peer names it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring as provider};
use rustls::{ClientConfig, ServerConfig, SupportedCipherSuite};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::verify::PinnedPeer;
use crate::migrate::StreamError;

/// The SHA-256 of a certificate's DER encoding. As text: 64 lower-case hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

/// Why a text is not a [`Fingerprint`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a certificate fingerprint is 64 hexadecimal digits (SHA-256)")]
pub struct InvalidFingerprint;

impl Fingerprint {
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, certificate);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.as_ref());
        Self(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Fingerprint {
    type Err = InvalidFingerprint;

    fn from_str(text: &str) -> Result<Self, InvalidFingerprint> {
        let digits = text.as_bytes();
        if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(InvalidFingerprint);
        }
        let mut bytes = [0; 32];
        for (index, byte) in bytes.iter_mut().enumerate() {
            let pair = text.get(index * 2..index * 2 + 2).ok_or(InvalidFingerprint)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| InvalidFingerprint)?;
        }
        Ok(Self(bytes))
    }
}

/// This side's key and certificate, made for one migration and never stored.
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("fingerprint", &self.fingerprint().to_string())
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// Makes a new ECDSA P-256 key and its self-signed certificate.
    ///
    /// # Errors
    /// [`StreamError::Tls`] if the host has no randomness to give.
    pub fn generate() -> Result<Self, StreamError> {
        let failed = |error: rcgen::Error| StreamError::Tls { reason: error.to_string() };
        let key = rcgen::KeyPair::generate().map_err(failed)?;
        let parameters =
            rcgen::CertificateParams::new(vec![SERVER_NAME.to_owned()]).map_err(failed)?;
        let certificate = parameters.self_signed(&key).map_err(failed)?;
        Ok(Self {
            certificate: certificate.der().clone(),
            key: PrivatePkcs8KeyDer::from(key.serialize_der()),
        })
    }

    /// What the peer must be told, to accept this side.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    pub(super) fn client_config(&self, peer: Fingerprint) -> Result<ClientConfig, StreamError> {
        let provider = crypto_provider();
        let verifier = Arc::new(PinnedPeer::new(peer, &provider));
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls_error)?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_auth_cert(vec![self.certificate.clone()], self.private_key())
            .map_err(tls_error)?;
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }

    pub(super) fn server_config(&self, peer: Fingerprint) -> Result<ServerConfig, StreamError> {
        let provider = crypto_provider();
        let verifier = Arc::new(PinnedPeer::new(peer, &provider));
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls_error)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![self.certificate.clone()], self.private_key())
            .map_err(tls_error)?;
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        Ok(config)
    }

    fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.clone_key())
    }
}

/// The name in every migration certificate. It says nothing: the fingerprint does.
pub(super) const SERVER_NAME: &str = "migration.holdfast.invalid";

/// ring, with AES-128-GCM first (with 256-bit keys guest memory takes a third longer to encrypt), or
/// ChaCha20-Poly1305 where the CPU has no instructions for AES. The source's order counts.
fn crypto_provider() -> Arc<CryptoProvider> {
    let mut provider = provider::default_provider();
    provider.cipher_suites = cipher_suites(std::arch::is_x86_feature_detected!("aes"));
    Arc::new(provider)
}

fn cipher_suites(cpu_has_aes: bool) -> Vec<SupportedCipherSuite> {
    let chacha = provider::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256;
    let mut suites = vec![
        provider::cipher_suite::TLS13_AES_128_GCM_SHA256,
        provider::cipher_suite::TLS13_AES_256_GCM_SHA384,
    ];
    suites.insert(if cpu_has_aes { suites.len() } else { 0 }, chacha);
    suites
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function in map_err")]
fn tls_error(error: rustls::Error) -> StreamError {
    StreamError::Tls { reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cipher_is_what_the_cpu_is_quick_at() {
        let first = |cpu_has_aes| cipher_suites(cpu_has_aes)[0].suite();
        assert_eq!(first(true), rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
        assert_eq!(first(false), rustls::CipherSuite::TLS13_CHACHA20_POLY1305_SHA256);
        assert_eq!(cipher_suites(true).len(), cipher_suites(false).len());
    }

    #[test]
    fn a_fingerprint_is_its_text() {
        let fingerprint = Identity::generate().unwrap().fingerprint();
        assert_eq!(fingerprint.to_string().parse(), Ok(fingerprint));
        assert_ne!(fingerprint, Identity::generate().unwrap().fingerprint());
        for bad in ["", "00", &"g".repeat(64), &"0".repeat(65), &"é".repeat(32)] {
            assert_eq!(bad.parse::<Fingerprint>(), Err(InvalidFingerprint), "{bad}");
        }
    }
}
