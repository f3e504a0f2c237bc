//! This node's identity on disk: `node.pem` (its certificate and the key to it, then the pair before
//! where there is one: in one file, so that they always belong together), `ca.crt`, and
//! `identity.json`, which is written last and so says that the others are complete.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use proto::NodeId;
use serde::{Deserialize, Serialize};

use super::{Certificate, Trusted};
use crate::OpenError;

const RECORD: &str = "identity.json";
const PAIR: &str = "node.pem";
/// The trusted CAs.
pub(crate) const CA_FILE: &str = "ca.crt";
/// Where a pair begins in the text of several.
const BEGIN: &str = "-----BEGIN CERTIFICATE-----";

/// Who this node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NodeIdentity {
    pub(crate) cluster_id: String,
    pub(crate) cluster_name: String,
    pub(crate) node_id: NodeId,
    pub(crate) node_name: String,
}

/// A certificate and the key to it: one PEM text, so that they always go together.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Pair(String);

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair").finish_non_exhaustive()
    }
}

/// The record with the pair and the trusted CAs.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) record: NodeIdentity,
    pub(crate) pair: Pair,
    /// The pair before: for when this one turns out to be of no use.
    pub(crate) previous: Option<Pair>,
    pub(crate) trusted: Trusted,
}

impl Identity {
    /// Reads a folder's identity; None where it has none yet.
    pub(crate) fn load(folder: &Path) -> Result<Option<Self>, OpenError> {
        if !folder.join(RECORD).exists() {
            return Ok(None);
        }
        let record = serde_json::from_str(&read(folder, RECORD)?).map_err(|error| OpenError::Unusable {
            path: folder.join(RECORD),
            detail: format!("is not readable ({error}); restore it, or remove this node, empty its data folder and join again"),
        })?;
        let (pair, previous) = Pair::load(folder)?;
        let trusted = Trusted::parse(&read(folder, CA_FILE)?);
        Ok(Some(Self { record, pair, previous, trusted }))
    }

    /// Writes it so that it is there wholly or not at all.
    pub(crate) fn store(&self, folder: &Path) -> Result<(), OpenError> {
        let record = serde_json::to_string_pretty(&self.record).map_err(|error| {
            OpenError::Unusable { path: folder.join(RECORD), detail: error.to_string() }
        })?;
        self.pair.store(folder, self.previous.as_ref())?;
        store_trusted(folder, &self.trusted)?;
        write(folder, RECORD, &record)
    }
}

impl Pair {
    pub(crate) fn new(key_pem: &str, certificate_pem: &str) -> Self {
        Self(format!("{}\n{}\n", certificate_pem.trim_end(), key_pem.trim_end()))
    }

    /// Both, PEM.
    pub(crate) fn pem(&self) -> &str {
        &self.0
    }

    /// What stands in the certificate.
    pub(crate) fn certificate(&self) -> Option<Certificate> {
        Certificate::from_pem(&self.0)
    }

    fn load(folder: &Path) -> Result<(Self, Option<Self>), OpenError> {
        let mut present = read(folder, PAIR)?;
        let second = present.match_indices(BEGIN).nth(1).map(|(at, _)| at);
        let previous = second.map(|at| Self(present.split_off(at)));
        Ok((Self(present), previous))
    }

    /// Replaces the pairs on disk: a crash at any point leaves the old ones or the new ones, whole.
    pub(crate) fn store(&self, folder: &Path, previous: Option<&Self>) -> Result<(), OpenError> {
        let previous = previous.map_or("", |previous| &previous.0);
        write(folder, PAIR, &format!("{}{previous}", self.0))
    }
}

/// Replaces the trusted CAs on disk.
pub(crate) fn store_trusted(folder: &Path, trusted: &Trusted) -> Result<(), OpenError> {
    write(folder, CA_FILE, &trusted.text())
}

fn read(folder: &Path, name: &str) -> Result<String, OpenError> {
    let path = folder.join(name);
    fs::read_to_string(&path).map_err(|source| OpenError::Io { path, source })
}

fn write(folder: &Path, name: &str, text: &str) -> Result<(), OpenError> {
    let path = folder.join(name);
    write_private(&path, text.as_bytes()).map_err(|source| OpenError::Io { path, source })
}

/// Replaces a file that only its owner may read, durably.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    // A leftover would keep its own mode.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::identity::{Ca, Life, request};

    fn pair(ca: &Ca) -> Result<Pair, Box<dyn std::error::Error>> {
        let (key, csr) = request()?;
        let life = Life { from_unix_s: 1_800_000_000, lasts_s: 3600 };
        Ok(Pair::new(&key, &ca.sign_node("c1", NodeId(1), &csr, life)?))
    }

    #[test]
    fn a_crash_between_two_pairs_leaves_one_that_works() -> Result<(), Box<dyn std::error::Error>> {
        let (folder, ca) = (tempfile::tempdir()?, Ca::make("c1")?);
        let folder = folder.path();
        let record = NodeIdentity {
            cluster_id: "c1".to_owned(),
            cluster_name: "test".to_owned(),
            node_id: NodeId(1),
            node_name: "n1".to_owned(),
        };
        let trusted = Trusted::only(&ca.certificate_pem);
        let (first, second) = (pair(&ca)?, pair(&ca)?);
        let identity = Identity { record, pair: first.clone(), previous: None, trusted };
        identity.store(folder)?;
        let works =
            |expected: &Pair, before: Option<&Pair>| -> Result<(), Box<dyn std::error::Error>> {
                let loaded = Identity::load(folder)?.ok_or("nothing there")?;
                for (pair, expected) in
                    [(Some(&loaded.pair), Some(expected)), (loaded.previous.as_ref(), before)]
                {
                    assert_eq!(pair, expected);
                    if let Some(pair) = pair {
                        // rustls refuses a key that is not the certificate's.
                        crate::tls::Credentials::new(pair, &loaded.trusted)?;
                    }
                }
                Ok(())
            };
        works(&first, None)?;
        // Half of the new one was written when the power went.
        fs::write(folder.join("node.tmp"), &second.pem()[..100])?;
        works(&first, None)?;
        second.store(folder, Some(&first))?;
        works(&second, Some(&first))?;
        // What was read can be written again.
        Identity::load(folder)?.ok_or("nothing there")?.store(folder)?;
        works(&second, Some(&first))?;
        second.store(folder, None)?;
        works(&second, None)?;
        let mode = fs::metadata(folder.join(PAIR))?.permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        Ok(())
    }
}
