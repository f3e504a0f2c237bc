//! The certificate authority: one ECDSA P-256 key per cluster, made at `init`.

use std::time::Duration;

use proto::NodeId;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
    date_time_ymd,
};
use ring::digest;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use super::names;

/// A certificate is good from so long before its issue, seconds: the clocks of nodes and clients may
/// be behind the signer's.
pub(crate) const BACKDATE_S: u64 = 3600;

/// The CA's time, seconds since 1970: from long ago, so that a clock that is behind gets to hear about
/// it in words, until 2070. Nothing is signed for outside of it.
const BEGIN_UNIX_S: u64 = 1_577_836_800;
const END_UNIX_S: u64 = 3_155_760_000;

/// When a certificate begins and how long it lasts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Life {
    /// The signer's clock, seconds since 1970.
    pub(crate) from_unix_s: u64,
    /// Seconds.
    pub(crate) lasts_s: u64,
}

impl Life {
    /// From now on, by this machine's clock.
    pub(crate) fn from_now(lasts: Duration) -> Self {
        Self { from_unix_s: crate::membership::unix_now_s(), lasts_s: lasts.as_secs().max(1) }
    }
}

/// The CA's key and certificate. Kept only sealed ([`super::SealedCa`]); the clear key is wiped from
/// memory after its use.
#[derive(Clone)]
pub(crate) struct Ca {
    /// PKCS #8.
    pub(super) key_der: Zeroizing<Vec<u8>>,
    /// Certificate, PEM.
    pub(crate) certificate_pem: String,
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ca").finish_non_exhaustive()
    }
}

/// Why nothing is signed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SignError {
    /// Nobody could honour it.
    #[error("the certificate request is not valid: {0}")]
    Request(String),
    /// The signer's clock, seconds since 1970, is surely wrong.
    #[error(
        "the clock of the node that signs is {0} s after 1970, outside of the time of the cluster's CA (2020 to 2070): set it (`timedatectl set-ntp true`)"
    )]
    Clock(u64),
}

impl From<rcgen::Error> for SignError {
    fn from(error: rcgen::Error) -> Self {
        Self::Request(error.to_string())
    }
}

impl Ca {
    /// The clear key, PKCS #8.
    #[cfg(test)]
    pub(crate) fn key_bytes(&self) -> &[u8] {
        &self.key_der
    }

    /// A new authority for a cluster.
    pub(crate) fn make(cluster_id: &str) -> Result<Self, rcgen::Error> {
        // Each has a name of its own, so that a chain tells which one is meant.
        let mut number = [0; 4];
        getrandom::fill(&mut number).map_err(|_| rcgen::Error::RingUnspecified)?;
        let name = format!("Holdfast CA {} of cluster {cluster_id}", hex(&number));
        // It certifies its successor (`cross_sign`), and nothing else that signs.
        let params = authority(&name, 1)?;
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let key_der = Zeroizing::new(issuer.key().serialize_der());
        Ok(Self { key_der, certificate_pem: issuer.pem() })
    }

    /// Certifies another CA's key: whoever trusts this CA alone can verify what that one signs.
    pub(crate) fn cross_sign(&self, other: &Self) -> Result<String, rcgen::Error> {
        let name =
            common_name_of(&other.certificate_pem).ok_or(rcgen::Error::CouldNotParseCertificate)?;
        let mut params = authority(&name, 0)?;
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::try_from(other.key_der.as_slice())?;
        Ok(params.signed_by(&key, &self.issuer()?)?.pem())
    }

    fn issuer(&self) -> Result<Issuer<'static, KeyPair>, rcgen::Error> {
        let key = KeyPair::try_from(self.key_der.as_slice())?;
        Issuer::from_ca_cert_pem(&self.certificate_pem, key)
    }

    /// A certificate for a node's request. What the request asks for is ignored but its key.
    pub(crate) fn sign_node(
        &self,
        cluster_id: &str,
        node: NodeId,
        csr_pem: &str,
        life: Life,
    ) -> Result<String, SignError> {
        let mut params = params(&common_name(node))?;
        params.subject_alt_names = vec![
            SanType::URI(names::node_uri(cluster_id, node).try_into()?),
            SanType::DnsName(names::node_dns(cluster_id, node).try_into()?),
            SanType::DnsName(names::cluster_dns(cluster_id).try_into()?),
        ];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params, csr_pem, life)
    }

    /// A certificate for a client's request.
    pub(crate) fn sign_client(
        &self,
        cluster_id: &str,
        name: &str,
        csr_pem: &str,
        life: Life,
    ) -> Result<String, SignError> {
        let mut params = params(name)?;
        params.subject_alt_names =
            vec![SanType::URI(names::client_uri(cluster_id, name).try_into()?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params, csr_pem, life)
    }

    fn sign(
        &self,
        mut params: CertificateParams,
        csr_pem: &str,
        life: Life,
    ) -> Result<String, SignError> {
        let request = CertificateSigningRequestParams::from_pem(csr_pem)?;
        if !(BEGIN_UNIX_S..END_UNIX_S).contains(&life.from_unix_s) {
            return Err(SignError::Clock(life.from_unix_s));
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let after = |seconds: u64| date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds);
        params.not_before = after(life.from_unix_s.saturating_sub(BACKDATE_S));
        params.not_after = after(life.from_unix_s.saturating_add(life.lasts_s).min(END_UNIX_S));
        Ok(params.signed_by(&request.public_key, &self.issuer()?)?.pem())
    }
}

/// What stands in a CA's certificate; `below`: how many more may stand between it and a holder's.
fn authority(name: &str, below: u8) -> Result<CertificateParams, rcgen::Error> {
    let mut params = params(name)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2070, 1, 1);
    Ok(params)
}

fn common_name_of(certificate_pem: &str) -> Option<String> {
    let der = CertificateDer::from_pem_slice(certificate_pem.as_bytes()).ok()?;
    let (_, parsed) = X509Certificate::from_der(&der).ok()?;
    let name = parsed.subject().iter_common_name().next()?;
    name.as_str().ok().map(str::to_owned)
}

/// The identifier of a CA's key, lower-case hexadecimal: it stands in all that the CA signs.
pub(crate) fn key_id(certificate_pem: &str) -> Option<String> {
    let der = CertificateDer::from_pem_slice(certificate_pem.as_bytes()).ok()?;
    let (_, parsed) = X509Certificate::from_der(&der).ok()?;
    parsed.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(id) => Some(hex(id.0)),
        _ => None,
    })
}

fn common_name(node: NodeId) -> String {
    format!("node {node}")
}

/// A certificate's parts that are the same for all.
fn params(common_name: &str) -> Result<CertificateParams, rcgen::Error> {
    let mut serial = [0u8; 16];
    getrandom::fill(&mut serial).map_err(|_| rcgen::Error::RingUnspecified)?;
    // Positive, and always of 16 bytes: it is written the same way everywhere.
    serial[0] = (serial[0] & 0x7f) | 0x40;
    let mut params = CertificateParams::default();
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

/// A new key (PEM) and a member's request for its next certificate (PEM), which names it.
pub(crate) fn renewal_request(
    cluster_id: &str,
    node: NodeId,
) -> Result<(String, String), rcgen::Error> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, common_name(node));
    params.subject_alt_names = vec![SanType::URI(names::node_uri(cluster_id, node).try_into()?)];
    let csr = params.serialize_request(&key)?;
    Ok((key.serialize_pem(), csr.pem()?))
}

/// Whether a request names this very node, and nobody else. Who asks for its next certificate says
/// for whom; a request for anyone else's is a mistake or an attack.
pub(crate) fn check_renewal(
    cluster_id: &str,
    node: NodeId,
    csr_pem: &str,
) -> Result<(), SignError> {
    let request = CertificateSigningRequestParams::from_pem(csr_pem)?;
    let named: Vec<&str> = request
        .params
        .subject_alt_names
        .iter()
        .map(|name| match name {
            SanType::URI(uri) => uri.as_str(),
            SanType::DnsName(name) | SanType::Rfc822Name(name) => name.as_str(),
            _ => "an address",
        })
        .collect();
    let expected = names::node_uri(cluster_id, node);
    if named != [expected.as_str()] {
        let shown: String = named.join(", ").chars().take(200).collect();
        return Err(SignError::Request(format!("it names `{shown}`, but `{expected}` asks")));
    }
    Ok(())
}

/// A request for a certificate on a key (PEM both).
pub(crate) fn request_for(key_pem: &str) -> Result<String, rcgen::Error> {
    let key = KeyPair::from_pem(key_pem)?;
    CertificateParams::default().serialize_request(&key)?.pem()
}

/// SHA-256 of a request's public key: the same for a repeated request with the same key.
pub(crate) fn request_key_hash(csr_pem: &str) -> Result<String, SignError> {
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
    use crate::identity::Certificate;
    use crate::tls::PeerIdentity;

    #[test]
    fn certificates_name_their_holder() -> Result<(), Box<dyn std::error::Error>> {
        let ca = Ca::make("c1")?;
        let (_, csr) = request()?;
        let life = Life { from_unix_s: 1_800_000_000, lasts_s: 3600 };
        let pem = ca.sign_node("c1", NodeId(3), &csr, life)?;
        let der = CertificateDer::from_pem_slice(pem.as_bytes())?;
        let read = Certificate::from_pem(&pem).ok_or("not read")?;
        assert_eq!((read.issued_unix_s, read.expires_unix_s), (1_800_000_000, 1_800_003_600));
        assert_eq!((read.serial.len(), read.key_hash), (32, request_key_hash(&csr)?));
        assert_eq!(names::subject_of(&der), Some(("c1".to_owned(), PeerIdentity::Node(NodeId(3)))));
        let pem = ca.sign_client("c1", "ann", &csr, life)?;
        let der = CertificateDer::from_pem_slice(pem.as_bytes())?;
        assert_eq!(
            names::subject_of(&der),
            Some(("c1".to_owned(), PeerIdentity::Client("ann".to_owned())))
        );
        assert!(ca.sign_client("c1", "ann", "garbage", life).is_err());
        Ok(())
    }

    #[test]
    fn nothing_is_signed_by_a_clock_that_is_surely_wrong() -> Result<(), Box<dyn std::error::Error>>
    {
        let (ca, (_, csr)) = (Ca::make("c1")?, request()?);
        let (_, begin, end) = crate::identity::dates(&ca.certificate_pem).ok_or("not read")?;
        assert_eq!((begin, end), (BEGIN_UNIX_S, END_UNIX_S));
        let sign = |from_unix_s, lasts_s| {
            ca.sign_node("c1", NodeId(3), &csr, Life { from_unix_s, lasts_s })
        };
        for wrong in [0, 1, begin - 1, end, u64::MAX] {
            let refused = sign(wrong, 3600).err().ok_or("it was signed")?.to_string();
            assert!(refused.contains("timedatectl"), "{refused}");
        }
        // It ends with the CA, and is good from an hour before: clocks may be behind.
        let pem = sign(end - 10, u64::MAX)?;
        let (_, from, until) = crate::identity::dates(&pem).ok_or("not read")?;
        assert_eq!((from, until), (end - 10 - 3600, end));
        Ok(())
    }

    #[test]
    fn a_renewal_names_the_node_that_asks_and_nobody_else() -> Result<(), Box<dyn std::error::Error>>
    {
        let (_, csr) = renewal_request("c1", NodeId(3))?;
        check_renewal("c1", NodeId(3), &csr)?;
        let (_, anonymous) = request()?;
        let key = KeyPair::generate()?;
        let mut both = CertificateParams::default();
        for node in [3, 1] {
            let uri = names::node_uri("c1", NodeId(node)).try_into()?;
            both.subject_alt_names.push(SanType::URI(uri));
        }
        let both = both.serialize_request(&key)?.pem()?;
        for (cluster, node, csr) in [
            ("c1", 4, csr.as_str()),
            ("c2", 3, &csr),
            ("c1", 3, &anonymous),
            ("c1", 3, &both),
            ("c1", 3, "garbage"),
            ("c1", 3, &csr[..csr.len() / 2]),
        ] {
            let refused = check_renewal(cluster, NodeId(node), csr).err().ok_or("taken")?;
            assert!(refused.to_string().contains("not valid"), "{refused}");
        }
        Ok(())
    }
}
