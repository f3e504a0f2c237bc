//! This node's identity on disk: `node.pem` (its certificate and the key to it, in one file, so that
//! they always belong together), `ca.crt`, and `identity.json`, which is written last and so says
//! that the others are complete. Earlier versions wrote `node.key` and `node.crt`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use proto::NodeId;
use serde::{Deserialize, Serialize};

use super::Certificate;
use crate::OpenError;

const RECORD: &str = "identity.json";
const PAIR: &str = "node.pem";
const OLD_KEY: &str = "node.key";
const OLD_CERTIFICATE: &str = "node.crt";
const CA: &str = "ca.crt";

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

/// The record with the pair and the CA's certificate (PEM).
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) record: NodeIdentity,
    pub(crate) pair: Pair,
    pub(crate) ca_pem: String,
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
        Ok(Some(Self { record, pair: Pair::load(folder)?, ca_pem: read(folder, CA)? }))
    }

    /// Writes it so that it is there wholly or not at all.
    pub(crate) fn store(&self, folder: &Path) -> Result<(), OpenError> {
        let record = serde_json::to_string_pretty(&self.record).map_err(|error| {
            OpenError::Unusable { path: folder.join(RECORD), detail: error.to_string() }
        })?;
        self.pair.store(folder)?;
        write(folder, CA, &self.ca_pem)?;
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

    fn load(folder: &Path) -> Result<Self, OpenError> {
        if folder.join(PAIR).exists() {
            return Ok(Self(read(folder, PAIR)?));
        }
        Ok(Self::new(&read(folder, OLD_KEY)?, &read(folder, OLD_CERTIFICATE)?))
    }

    /// Replaces the pair on disk: a crash at any point leaves the old one or the new one, whole.
    pub(crate) fn store(&self, folder: &Path) -> Result<(), OpenError> {
        write(folder, PAIR, &self.0)?;
        for old in [OLD_KEY, OLD_CERTIFICATE] {
            let path = folder.join(old);
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(OpenError::Io { path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }
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
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
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

    type Parts = (Pair, String, String);

    fn pair(ca: &Ca) -> Result<Parts, Box<dyn std::error::Error>> {
        let (key, csr) = request()?;
        let life = Life { from_unix_s: 1_800_000_000, lasts_s: 3600 };
        let certificate = ca.sign_node("c1", NodeId(1), &csr, life)?;
        Ok((Pair::new(&key, &certificate), key, certificate))
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
        let ca_pem = ca.certificate_pem.clone();
        let ((first, key, certificate), (second, _, next)) = (pair(&ca)?, pair(&ca)?);
        // As an earlier version left it.
        Identity { record, pair: first.clone(), ca_pem: ca_pem.clone() }.store(folder)?;
        fs::remove_file(folder.join(PAIR))?;
        write(folder, OLD_KEY, &key)?;
        write(folder, OLD_CERTIFICATE, &certificate)?;
        let works = |expected: &Pair| -> Result<(), Box<dyn std::error::Error>> {
            let loaded = Identity::load(folder)?.ok_or("nothing there")?;
            // rustls refuses a key that is not the certificate's.
            crate::tls::Credentials::new(&loaded.pair, &ca_pem)?;
            assert_eq!(loaded.pair.certificate(), expected.certificate());
            Ok(())
        };
        works(&first)?;
        // Half of the new one was written when the power went.
        fs::write(folder.join("node.tmp"), &next[..100])?;
        works(&first)?;
        // The new one is there, the old files are not gone yet.
        write(folder, PAIR, second.pem())?;
        works(&second)?;
        second.store(folder)?;
        works(&second)?;
        assert!(!folder.join(OLD_KEY).exists() && !folder.join(OLD_CERTIFICATE).exists());
        // What was read can be written again.
        Identity::load(folder)?.ok_or("nothing there")?.store(folder)?;
        works(&second)?;
        let mode = fs::metadata(folder.join(PAIR))?.permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        Ok(())
    }
}
