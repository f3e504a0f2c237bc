//! The CAs that a member trusts: one, and while the cluster's CA is rotated two.
//!
//! On disk (`ca.crt`) they are PEM blocks under a line with the revision of the CA's record that
//! says so: a member whose database is behind, after a power loss or while it joins, must not go back
//! to what its record said before.

use super::ca::{fingerprint, key_id};

/// What the first line of `ca.crt` begins with, before the revision.
const HEAD: &str = "# the cluster's CA, as of revision ";
const END: &str = "-----END CERTIFICATE-----";

/// Certificates, PEM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Trusted {
    /// Of the CA's record; 0: before any.
    pub(crate) revision: u64,
    /// The trusted CAs; the one that signs comes first.
    pub(crate) roots: Vec<String>,
    /// The one that signs, certified by another one of them: so that who knows only that other one
    /// can verify it.
    pub(crate) cross: Option<String>,
}

impl Trusted {
    /// One CA alone.
    pub(crate) fn only(ca_pem: &str) -> Self {
        Self { revision: 0, roots: vec![ca_pem.to_owned()], cross: None }
    }

    /// All of a text, as `ca.crt` holds it.
    pub(crate) fn parse(text: &str) -> Self {
        let head = text.lines().next().and_then(|line| line.strip_prefix(HEAD));
        let revision = head.and_then(|revision| revision.trim().parse().ok()).unwrap_or(0);
        let blocks = text.split_inclusive(END).filter_map(|part| {
            let begin = part.find("-----BEGIN CERTIFICATE-----")?;
            part.ends_with(END).then(|| format!("{}\n", &part[begin..]))
        });
        Self { revision, roots: blocks.collect(), cross: None }
    }

    /// As `ca.crt` holds it. What certifies one by another comes with the record.
    pub(crate) fn text(&self) -> String {
        format!("{HEAD}{}\n{}", self.revision, self.bundle())
    }

    /// The trusted CAs, PEM.
    pub(crate) fn bundle(&self) -> String {
        let end = |pem: &String| format!("{}\n", pem.trim_end());
        self.roots.iter().map(end).collect()
    }

    /// The certificate of the CA that signs.
    pub(crate) fn signer_pem(&self) -> &str {
        self.roots.first().map_or("", String::as_str)
    }

    /// SHA-256 of that certificate's DER, hexadecimal.
    pub(crate) fn signer_fingerprint(&self) -> String {
        fingerprint(self.signer_pem()).unwrap_or_default()
    }

    /// The identifier of its key, which stands in all that it signs.
    pub(crate) fn signer_key_id(&self) -> String {
        key_id(self.signer_pem()).unwrap_or_default()
    }

    /// Whether a CA (its certificate, PEM) is among them.
    pub(crate) fn contains(&self, ca_pem: &str) -> bool {
        let wanted = fingerprint(ca_pem);
        wanted.is_some() && self.roots.iter().any(|root| fingerprint(root) == wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Ca;

    #[test]
    fn what_is_written_is_read_again() -> Result<(), Box<dyn std::error::Error>> {
        let (one, two) = (Ca::make("c1")?.certificate_pem, Ca::make("c1")?.certificate_pem);
        let both = Trusted { revision: 42, roots: vec![two.clone(), one.clone()], cross: None };
        let read = Trusted::parse(&both.text());
        assert_eq!((read.revision, read.roots.len()), (42, 2));
        assert_eq!(read.signer_fingerprint(), both.signer_fingerprint());
        assert!(read.contains(&one) && read.contains(&two) && !read.contains(""));
        assert_eq!(read.text(), both.text());
        assert_eq!(Trusted::parse(&one).revision, 0);
        assert!(!Trusted::parse(&one).contains(&two));
        for nothing in ["", "garbage", &one[..one.len() / 2]] {
            assert_eq!(Trusted::parse(nothing).roots.len(), 0, "{nothing}");
        }
        Ok(())
    }
}
