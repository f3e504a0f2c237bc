//! The certificate authority: one ECDSA P-256 key per cluster, made at `init`.

use proto::NodeId;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
    date_time_ymd,
};
use ring::digest;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};

use super::names;

/// The CA's key and certificate, as kept under `priv/ca`.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Ca {
    key_pem: String,
    /// Certificate, PEM.
    pub(crate) certificate_pem: String,
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ca").finish_non_exhaustive()
    }
}

/// A certificate request that cannot be honoured.
#[derive(Debug, thiserror::Error)]
#[error("the certificate request is not valid: {0}")]
pub(crate) struct CsrError(String);

impl From<rcgen::Error> for CsrError {
    fn from(error: rcgen::Error) -> Self {
        Self(error.to_string())
    }
}

impl Ca {
    /// A new authority for a cluster.
    pub(crate) fn make(cluster_id: &str) -> Result<Self, rcgen::Error> {
        let mut params = params(&format!("Holdfast CA of cluster {cluster_id}"))?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_after = date_time_ymd(2070, 1, 1);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        Ok(Self { key_pem: issuer.key().serialize_pem(), certificate_pem: issuer.pem() })
    }

    /// A certificate for a node's request. What the request asks for is ignored but its key.
    pub(crate) fn sign_node(
        &self,
        cluster_id: &str,
        node: NodeId,
        csr_pem: &str,
    ) -> Result<String, CsrError> {
        let mut params = params(&format!("node {node}"))?;
        params.subject_alt_names = vec![
            SanType::URI(names::node_uri(cluster_id, node).try_into()?),
            SanType::DnsName(names::node_dns(cluster_id, node).try_into()?),
            SanType::DnsName(names::cluster_dns(cluster_id).try_into()?),
        ];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params, csr_pem)
    }

    /// A certificate for a client's request.
    pub(crate) fn sign_client(
        &self,
        cluster_id: &str,
        name: &str,
        csr_pem: &str,
    ) -> Result<String, CsrError> {
        let mut params = params(name)?;
        params.subject_alt_names =
            vec![SanType::URI(names::client_uri(cluster_id, name).try_into()?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params, csr_pem)
    }

    fn sign(&self, mut params: CertificateParams, csr_pem: &str) -> Result<String, CsrError> {
        let request = CertificateSigningRequestParams::from_pem(csr_pem)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let issuer =
            Issuer::from_ca_cert_pem(&self.certificate_pem, KeyPair::from_pem(&self.key_pem)?)?;
        Ok(params.signed_by(&request.public_key, &issuer)?.pem())
    }
}

/// Valid from long ago, so that a clock that is behind gets to hear about it in words.
fn params(common_name: &str) -> Result<CertificateParams, rcgen::Error> {
    let mut serial = [0u8; 16];
    getrandom::fill(&mut serial).map_err(|_| rcgen::Error::RingUnspecified)?;
    serial[0] &= 0x7f;
    let mut params = CertificateParams::default();
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2060, 1, 1);
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, common_name);
    Ok(params)
}

/// A new key (PEM) and a request for a certificate on it (PEM).
pub(crate) fn request() -> Result<(String, String), rcgen::Error> {
    let key = KeyPair::generate()?;
    let csr = CertificateParams::default().serialize_request(&key)?;
    Ok((key.serialize_pem(), csr.pem()?))
}

/// A request for a certificate on a key (PEM both).
pub(crate) fn request_for(key_pem: &str) -> Result<String, rcgen::Error> {
    let key = KeyPair::from_pem(key_pem)?;
    CertificateParams::default().serialize_request(&key)?.pem()
}

/// SHA-256 of a request's public key: the same for a repeated request with the same key.
pub(crate) fn request_key_hash(csr_pem: &str) -> Result<String, CsrError> {
    use rcgen::PublicKeyData;
    let request = CertificateSigningRequestParams::from_pem(csr_pem)?;
    Ok(hex(digest::digest(&digest::SHA256, request.public_key.der_bytes()).as_ref()))
}

/// SHA-256 of a certificate's DER, hexadecimal.
pub(crate) fn fingerprint(certificate_pem: &str) -> Option<String> {
    let der = CertificateDer::from_pem_slice(certificate_pem.as_bytes()).ok()?;
    Some(fingerprint_der(&der))
}

/// SHA-256, hexadecimal.
pub(crate) fn fingerprint_der(der: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, der).as_ref())
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::PeerIdentity;

    #[test]
    fn certificates_name_their_holder() -> Result<(), Box<dyn std::error::Error>> {
        let ca = Ca::make("c1")?;
        let (_, csr) = request()?;
        let der = CertificateDer::from_pem_slice(ca.sign_node("c1", NodeId(3), &csr)?.as_bytes())?;
        assert_eq!(names::subject_of(&der), Some(("c1".to_owned(), PeerIdentity::Node(NodeId(3)))));
        let der = CertificateDer::from_pem_slice(ca.sign_client("c1", "ann", &csr)?.as_bytes())?;
        assert_eq!(
            names::subject_of(&der),
            Some(("c1".to_owned(), PeerIdentity::Client("ann".to_owned())))
        );
        assert!(ca.sign_client("c1", "ann", "garbage").is_err());
        Ok(())
    }
}
