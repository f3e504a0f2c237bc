//! Which CAs are trusted at this moment, by all listeners and connectors of a node. They can be
//! exchanged at any time; the next handshake asks the new ones.

use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::config::{TlsError, provider};
use crate::identity::Trusted;

/// The present verifiers.
#[derive(Debug)]
pub(crate) struct Roots {
    present: ArcSwap<Verifiers>,
}

#[derive(Debug)]
struct Verifiers {
    client: Arc<dyn ClientCertVerifier>,
    server: Arc<WebPkiServerVerifier>,
    /// By the CA that signs alone; while the one before is trusted as well.
    signer: Option<Arc<dyn ClientCertVerifier>>,
}

fn store<'a>(pems: impl IntoIterator<Item = &'a String>) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for pem in pems {
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(TlsError::of)?;
        roots.add(der).map_err(TlsError::of)?;
    }
    Ok(Arc::new(roots))
}

fn of_clients(roots: Arc<RootCertStore>) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    WebPkiClientVerifier::builder_with_provider(roots, provider()).build().map_err(TlsError::of)
}

impl Verifiers {
    fn of(trusted: &Trusted) -> Result<Self, TlsError> {
        let roots = store(&trusted.roots)?;
        let client = of_clients(roots.clone())?;
        // Where the present one is certified by another one, that one has signed before.
        let signer = trusted.cross.as_ref().map(|_| of_clients(store(trusted.roots.first())?));
        let server = WebPkiServerVerifier::builder_with_provider(roots, provider())
            .build()
            .map_err(TlsError::of)?;
        Ok(Self { client, server, signer: signer.transpose()? })
    }
}

impl Roots {
    pub(crate) fn new(trusted: &Trusted) -> Result<Arc<Self>, TlsError> {
        let present = ArcSwap::from_pointee(Verifiers::of(trusted)?);
        Ok(Arc::new(Self { present }))
    }

    /// Others from now on. Nothing changes where they do not work.
    pub(crate) fn replace(&self, trusted: &Trusted) -> Result<(), TlsError> {
        self.present.store(Arc::new(Verifiers::of(trusted)?));
        Ok(())
    }

    /// Whether a chain (the certificate itself first) leads to one of them. Asked for the time at
    /// which it was issued: whether it is over is another question.
    pub(crate) fn issued(&self, chain: &[CertificateDer<'_>], at_unix_s: u64) -> bool {
        verifies(self.present.load().client.as_ref(), chain, at_unix_s)
    }

    /// Whether it leads to the CA before alone, which signs no more. What the certificate says of its
    /// CA proves nothing: whoever has that key writes there what it likes.
    pub(crate) fn issued_before(&self, chain: &[CertificateDer<'_>], at_unix_s: u64) -> bool {
        let present = self.present.load();
        let signer = present.signer.as_ref();
        signer.is_some_and(|signer| !verifies(signer.as_ref(), chain, at_unix_s))
    }
}

fn verifies(
    verifier: &dyn ClientCertVerifier,
    chain: &[CertificateDer<'_>],
    at_unix_s: u64,
) -> bool {
    let Some((own, rest)) = chain.split_first() else { return false };
    let at = UnixTime::since_unix_epoch(std::time::Duration::from_secs(at_unix_s));
    // Nodes' certificates are good for clients as well.
    verifier.verify_client_cert(own, rest, at).is_ok()
}

impl ClientCertVerifier for Roots {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.present.load().client.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.present.load().client.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.present.load().client.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.present.load().client.supported_verify_schemes()
    }
}

impl ServerCertVerifier for Roots {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let server = &self.present.load().server;
        server.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ClientCertVerifier::verify_tls12_signature(self, message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ClientCertVerifier::verify_tls13_signature(self, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ClientCertVerifier::supported_verify_schemes(self)
    }
}

#[cfg(test)]
mod tests {
    use proto::NodeId;

    use super::*;
    use crate::identity::{Ca, Life, request};

    type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

    const NOW: u64 = 1_800_000_000;

    fn der(pem: &str) -> Outcome<CertificateDer<'static>> {
        Ok(CertificateDer::from_pem_slice(pem.as_bytes())?)
    }

    #[test]
    fn who_knows_the_old_ca_alone_can_verify_the_new_one_until_it_is_dropped() -> Outcome {
        let (old, new, other) = (Ca::make("c1")?, Ca::make("c1")?, Ca::make("c1")?);
        let life = Life { from_unix_s: NOW, lasts_s: 3600 };
        let sign = |ca: &Ca| -> Outcome<CertificateDer<'static>> {
            der(&ca.sign_node("c1", NodeId(1), &request()?.1, life)?)
        };
        let (of_old, of_new, of_other) = (sign(&old)?, sign(&new)?, sign(&other)?);
        let (cross, new_root) = (der(&old.cross_sign(&new)?)?, der(&new.certificate_pem)?);
        let old_root = der(&old.certificate_pem)?;
        let along = [cross.clone(), new_root.clone(), old_root];
        let shown =
            |own: &CertificateDer<'static>| [std::slice::from_ref(own), along.as_slice()].concat();

        let roots = Roots::new(&Trusted::only(&old.certificate_pem))?;
        assert!(roots.issued(&shown(&of_old), NOW) && roots.issued(&shown(&of_new), NOW));
        assert!(!roots.issued(&[of_new.clone(), new_root], NOW), "nobody certified it");
        assert!(!roots.issued(&shown(&of_other), NOW) && !roots.issued(&[], NOW));
        // What the cross-certificate is for is the new CA's key alone.
        assert!(!roots.issued(&[of_other.clone(), cross.clone()], NOW));
        // As a server's, for the name it is asked by; and not once it has expired.
        let name = crate::identity::any_node("c1").ok_or("no name")?;
        let verify = |at| {
            let at = UnixTime::since_unix_epoch(std::time::Duration::from_secs(at));
            roots.verify_server_cert(&of_new, &along, &name, &[], at).is_ok()
        };
        assert!(verify(NOW) && !verify(NOW + 3601));

        // While both are trusted, it is known of which one something is.
        assert!(!roots.issued_before(&shown(&of_old), NOW), "no other one signs yet");
        let both = vec![new.certificate_pem.clone(), old.certificate_pem.clone()];
        let cross_pem = Some(old.cross_sign(&new)?);
        roots.replace(&Trusted { revision: 2, roots: both, cross: cross_pem })?;
        assert!(roots.issued(&shown(&of_old), NOW) && roots.issued_before(&shown(&of_old), NOW));
        assert!(roots.issued(&shown(&of_new), NOW) && !roots.issued_before(&shown(&of_new), NOW));

        roots.replace(&Trusted::only(&new.certificate_pem))?;
        assert!(!roots.issued(&shown(&of_old), NOW), "it was dropped");
        assert!(roots.issued(&shown(&of_new), NOW) && roots.issued(&[of_new], NOW));
        assert!(!roots.issued(&shown(&of_other), NOW));
        // What is no certificate changes nothing.
        let bad = Trusted { roots: vec!["garbage".to_owned()], ..Trusted::default() };
        assert!(roots.replace(&bad).is_err() && roots.issued(&shown(&sign(&new)?), NOW));
        Ok(())
    }
}
