//! The cluster's CA as the replicated state has it, and who can sign with it.
//!
//! `priv/ca` holds the CA's certificate and its key, encrypted under the sealing key that each
//! member has on its disk (`identity/seal.rs`). A member whose sealing key is lost or damaged works
//! as any other, but signs nothing.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::host::blocking;
use crate::identity::{Ca, SEALING_KEY, SealError, SealedCa, SealingKey};
use crate::machine::{Read, Record, Table, decode};
use crate::membership::from_json;
use crate::node::Node;
use crate::storage::Db;
use crate::{Consistency, MembershipError, StoreError};

/// The record's key.
pub(crate) const CA_KEY: &str = "priv/ca";

/// What is under [`CA_KEY`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CaRecord {
    /// Who signs.
    pub(crate) present: SealedCa,
}

impl CaRecord {
    /// A new cluster's.
    pub(crate) fn first(ca: &Ca, key: &SealingKey, cluster_id: &str) -> Result<Self, SealError> {
        Ok(Self { present: SealedCa::seal(ca, key, cluster_id, CA_KEY)? })
    }

    /// The CA that signs, and the data folder's sealing key that opened it.
    fn open(&self, folder: &Path, cluster_id: &str) -> Result<(Ca, SealingKey), SealError> {
        let key = SealingKey::load(folder)?;
        Ok((self.present.open(&key, cluster_id, CA_KEY)?, key))
    }
}

/// The record as a member's own copy has it; `None`: that has not come so far.
pub(crate) fn own_copy(db: &Db) -> std::io::Result<Option<CaRecord>> {
    let Some(row) = db.view(|view| view.get(Table::Data, CA_KEY.as_bytes()))? else {
        return Ok(None);
    };
    let record: Record = decode(&row)?;
    serde_json::from_slice(&record.value).map(Some).map_err(std::io::Error::other)
}

/// The CA that signs, from a member's own copy.
pub(crate) fn own_ca(db: &Db, folder: &Path, cluster_id: &str) -> Result<Ca, String> {
    let record = own_copy(db).map_err(|error| error.to_string())?;
    let record = record.ok_or("its copy of the state does not have the CA yet")?;
    record.open(folder, cluster_id).map(|(ca, _)| ca).map_err(|error| cannot_sign(&error))
}

/// What a member signs with.
#[derive(Debug)]
pub(crate) struct Signer {
    pub(crate) ca: Ca,
    pub(crate) sealing_key: SealingKey,
}

/// The CA that signs, opened with this member's sealing key.
pub(crate) async fn signer(node: &Node) -> Result<Signer, MembershipError> {
    let kv = node.get(CA_KEY, Consistency::Linearizable).await?.0;
    let missing = || StoreError::Failed { why: "the cluster's CA record is missing".to_owned() };
    let record: CaRecord = from_json(&kv.ok_or_else(missing)?)?;
    let (folder, cluster_id) = (node.config().data_dir.clone(), node.identity().cluster_id.clone());
    let opened = blocking(node.db().host(), move || record.open(&folder, &cluster_id)).await;
    let opened = opened.map_err(|error| StoreError::Failed { why: error.to_string() })?;
    match opened {
        Ok((ca, sealing_key)) => Ok(Signer { ca, sealing_key }),
        Err(error) => {
            let (node, why) = (node.label().borrow().clone(), cannot_sign(&error));
            tracing::error!(%why, "this node cannot sign");
            Err(MembershipError::CannotSign { node, why })
        }
    }
}

/// At the start: says so where this node will not be able to sign.
pub(crate) fn check(db: &Db, folder: &Path, cluster_id: &str) {
    let found = match own_copy(db) {
        Ok(Some(record)) => record.open(folder, cluster_id).map(drop),
        // A node that joins has its key on disk a moment later.
        Ok(None) => return,
        Err(error) => {
            tracing::error!(%error, "the CA's record cannot be read");
            return;
        }
    };
    if let Err(error) = found {
        let why = cannot_sign(&error);
        tracing::error!(%why, "this node cannot sign certificates; all else works");
    }
}

/// Why nothing is signed, and what helps.
fn cannot_sign(error: &SealError) -> String {
    format!(
        "{error}; copy {SEALING_KEY} from another member's data folder (for the agent's user alone, mode 600), or remove this node, empty its data folder and join again"
    )
}

#[cfg(test)]
mod key_tests;
