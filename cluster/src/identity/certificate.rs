//! What stands in a certificate, and when a node asks for its next one.

use std::time::Duration;

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::ca::{BACKDATE_S, hex};
use super::names::subject_of;
use crate::tls::PeerIdentity;

/// One certificate, without its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Certificate {
    /// Whom it names.
    pub(crate) holder: PeerIdentity,
    /// Lower-case hexadecimal.
    pub(crate) serial: String,
    /// Seconds since 1970, as its issuer's clock was.
    pub(crate) issued_unix_s: u64,
    /// Its end, seconds since 1970.
    pub(crate) expires_unix_s: u64,
    /// SHA-256 of its public key, hexadecimal.
    pub(crate) key_hash: String,
    /// The identifier of its CA's key, as it says itself.
    pub(crate) authority: String,
}

/// What a certificate is good for at some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// TLS takes it.
    Good,
    /// It is over.
    Expired,
    /// It begins later: whoever signed it had a clock that was ahead.
    NotYet,
}

impl Certificate {
    /// Reads a certificate of a node or client. Its signature is not looked at.
    pub(crate) fn from_der(der: &[u8]) -> Option<Self> {
        let (_, holder) = subject_of(der)?;
        let (_, parsed) = X509Certificate::from_der(der).ok()?;
        let seconds = |time: i64| u64::try_from(time).unwrap_or(0);
        let validity = parsed.validity();
        let key = ring::digest::digest(
            &ring::digest::SHA256,
            &parsed.public_key().subject_public_key.data,
        );
        Some(Self {
            holder,
            serial: serial_of(&parsed),
            issued_unix_s: seconds(validity.not_before.timestamp()).saturating_add(BACKDATE_S),
            expires_unix_s: seconds(validity.not_after.timestamp()),
            key_hash: hex(key.as_ref()),
            authority: authority_of(&parsed),
        })
    }

    /// As [`Certificate::from_der`], from text.
    pub(crate) fn from_pem(pem: &str) -> Option<Self> {
        Self::from_der(&CertificateDer::from_pem_slice(pem.as_bytes()).ok()?)
    }

    /// When its holder asks for the next one: at two thirds of its life, or up to a twentieth of it
    /// earlier. How much earlier follows from the serial number, so that nodes which got theirs
    /// together do not all ask together, and one that restarts does not change its mind.
    pub(crate) fn due_unix_s(&self) -> u64 {
        let life_s = self.expires_unix_s.saturating_sub(self.issued_unix_s);
        let share = self.serial.bytes().map(u64::from).sum::<u64>() % 100;
        let early_s = (life_s / 20).saturating_mul(share) / 100;
        self.issued_unix_s.saturating_add(life_s / 3 * 2).saturating_sub(early_s)
    }

    /// What it is good for now.
    pub(crate) fn standing(&self, now_unix_s: u64) -> Standing {
        if now_unix_s >= self.expires_unix_s {
            Standing::Expired
        } else if now_unix_s < self.issued_unix_s.saturating_sub(BACKDATE_S) {
            Standing::NotYet
        } else {
            Standing::Good
        }
    }

    /// How long it is still good; nothing where it is not.
    pub(crate) fn left(&self, now_unix_s: u64) -> Duration {
        match self.standing(now_unix_s) {
            Standing::Good => Duration::from_secs(self.expires_unix_s - now_unix_s),
            Standing::Expired | Standing::NotYet => Duration::ZERO,
        }
    }
}

fn authority_of(certificate: &X509Certificate<'_>) -> String {
    let named =
        certificate.extensions().iter().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(id) => id.key_identifier.as_ref(),
            _ => None,
        });
    named.map(|id| hex(id.0)).unwrap_or_default()
}

fn serial_of(certificate: &X509Certificate<'_>) -> String {
    hex(certificate.raw_serial())
}

/// Number, begin and end (seconds since 1970) of any certificate, the CA's for one.
pub(crate) fn dates(pem: &str) -> Option<(String, u64, u64)> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    let (_, parsed) = X509Certificate::from_der(&der).ok()?;
    let seconds = |time: i64| u64::try_from(time).unwrap_or(0);
    let validity = parsed.validity();
    let (begin, end) = (validity.not_before.timestamp(), validity.not_after.timestamp());
    Some((serial_of(&parsed), seconds(begin), seconds(end)))
}

#[cfg(test)]
mod tests {
    use proto::NodeId;

    use super::*;

    fn certificate(serial: &str, issued_unix_s: u64, expires_unix_s: u64) -> Certificate {
        Certificate {
            holder: PeerIdentity::Node(NodeId(1)),
            serial: serial.to_owned(),
            issued_unix_s,
            expires_unix_s,
            key_hash: String::new(),
            authority: String::new(),
        }
    }

    #[test]
    fn the_next_one_is_asked_for_well_before_the_end() {
        let day = 86_400;
        let mut seen = std::collections::BTreeSet::new();
        for number in 0..50u32 {
            let serial = format!("{:032x}", number.wrapping_mul(2_654_435_761));
            let due = certificate(&serial, 1000, 1000 + 300 * day).due_unix_s() - 1000;
            assert!(due <= 200 * day && due >= 185 * day, "{due}");
            seen.insert(due);
        }
        assert!(seen.len() > 10, "all at once: {seen:?}");
        // Nonsense in, no panic out.
        assert_eq!(certificate("00", 5, 4).due_unix_s(), 5);
        assert!(certificate("ff", u64::MAX, u64::MAX).due_unix_s() > 0);
    }

    #[test]
    fn one_that_begins_later_is_no_better_than_one_that_is_over() {
        let issued = 1_800_000_000;
        let one = certificate("00", issued, issued + 100);
        let cases = [
            (issued - BACKDATE_S - 1, Standing::NotYet, 0),
            (issued - BACKDATE_S, Standing::Good, BACKDATE_S + 100),
            (issued, Standing::Good, 100),
            (issued + 99, Standing::Good, 1),
            (issued + 100, Standing::Expired, 0),
            (0, Standing::NotYet, 0),
            (u64::MAX, Standing::Expired, 0),
        ];
        for (now, standing, left_s) in cases {
            let left = Duration::from_secs(left_s);
            assert_eq!((one.standing(now), one.left(now)), (standing, left), "at {now}");
        }
    }
}
