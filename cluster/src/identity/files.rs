//! This node's identity on disk: `node.key`, `node.crt`, `ca.crt`, and `identity.json`, which is
//! written last and so says that the others are complete.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use proto::NodeId;
use serde::{Deserialize, Serialize};

use crate::OpenError;

const RECORD: &str = "identity.json";
const KEY: &str = "node.key";
const CERTIFICATE: &str = "node.crt";
const CA: &str = "ca.crt";

/// Who this node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NodeIdentity {
    pub(crate) cluster_id: String,
    pub(crate) cluster_name: String,
    pub(crate) node_id: NodeId,
    pub(crate) node_name: String,
}

/// The record with key and certificates, PEM.
#[derive(Clone)]
pub(crate) struct Identity {
    pub(crate) record: NodeIdentity,
    pub(crate) key_pem: String,
    pub(crate) certificate_pem: String,
    pub(crate) ca_pem: String,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("record", &self.record).finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads a folder's identity; None where it has none yet.
    pub(crate) fn load(folder: &Path) -> Result<Option<Self>, OpenError> {
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read_to_string(&path).map_err(|source| OpenError::Io { path, source })
        };
        if !folder.join(RECORD).exists() {
            return Ok(None);
        }
        let record = serde_json::from_str(&read(RECORD)?).map_err(|error| OpenError::Unusable {
            path: folder.join(RECORD),
            detail: format!("is not readable ({error}); restore it, or remove this node, empty its data folder and join again"),
        })?;
        Ok(Some(Self {
            record,
            key_pem: read(KEY)?,
            certificate_pem: read(CERTIFICATE)?,
            ca_pem: read(CA)?,
        }))
    }

    /// Writes it so that it is there wholly or not at all.
    pub(crate) fn store(&self, folder: &Path) -> Result<(), OpenError> {
        let record = serde_json::to_string_pretty(&self.record).map_err(|error| {
            OpenError::Unusable { path: folder.join(RECORD), detail: error.to_string() }
        })?;
        for (name, text) in [
            (KEY, &self.key_pem),
            (CERTIFICATE, &self.certificate_pem),
            (CA, &self.ca_pem),
            (RECORD, &record),
        ] {
            let path = folder.join(name);
            write_private(&path, text.as_bytes())
                .map_err(|source| OpenError::Io { path, source })?;
        }
        Ok(())
    }
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
