//! The cluster's CA as the replicated state has it, and who can sign with it.
//!
//! `priv/ca` holds the CA's certificate and its key, encrypted under the sealing key that each
//! member has on its disk (`identity/seal.rs`). A member whose sealing key is lost or damaged works
//! as any other, but signs nothing. While the CA is rotated ([`rotation`]) it holds the other one, too.
//!
//! Invariant: whatever is signed is recorded in a transaction that compares this record's revision; so
//! nothing new is of a CA that does not sign any more.

pub(crate) mod rotation;

use std::path::Path;

use proto::Revision;
use serde::{Deserialize, Serialize};

use crate::host::blocking;
use crate::identity::{Ca, SEALING_KEY, SealError, SealedCa, SealingKey, Trusted, key_id};
use crate::machine::{Read, Record, Table, decode};
use crate::membership::from_json;
use crate::node::Node;
use crate::storage::Db;
use crate::{Consistency, MembershipError, StoreError, Txn};

/// The record's key.
pub(crate) const CA_KEY: &str = "priv/ca";

/// What is under [`CA_KEY`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CaRecord {
    /// Who signs.
    present: SealedCa,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rotation: Option<Rotation>,
}

/// How far a rotation is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "kebab-case")]
enum Rotation {
    /// Members learn to trust the next CA.
    Trusting {
        next: SealedCa,
        /// The next one certified by the present one, PEM.
        cross_pem: String,
    },
    /// Nodes get certificates of the one that signs now.
    Renewing(Before),
    /// All nodes have theirs. What the previous one signed for clients is good until the end.
    Renewed(Before),
}

/// The CA that signed before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Before {
    /// Its certificate, PEM.
    previous_pem: String,
    /// The present one certified by it, PEM.
    cross_pem: String,
}

impl CaRecord {
    /// A new cluster's.
    pub(crate) fn first(ca: &Ca, key: &SealingKey, cluster_id: &str) -> Result<Self, SealError> {
        Ok(Self { present: SealedCa::seal(ca, key, cluster_id, CA_KEY)?, rotation: None })
    }

    /// What members trust by it.
    pub(crate) fn trusted(&self, revision: Revision) -> Trusted {
        let present = self.present.certificate_pem.clone();
        let (other, cross) = match &self.rotation {
            None => (None, None),
            // Nobody shows anything of the next one yet.
            Some(Rotation::Trusting { next, .. }) => (Some(&next.certificate_pem), None),
            Some(Rotation::Renewing(before) | Rotation::Renewed(before)) => {
                (Some(&before.previous_pem), Some(before.cross_pem.clone()))
            }
        };
        let roots = [present].into_iter().chain(other.cloned()).collect();
        Trusted { revision: revision.0, roots, cross }
    }

    /// What a client that gets its certificate now has to trust, PEM. Never the previous CA: the client
    /// would trust it for good. A node that still shows something of it is not spoken to until it has
    /// the new one's.
    pub(crate) fn for_clients(&self) -> String {
        match self.rotation {
            Some(Rotation::Trusting { .. }) => self.trusted(Revision(0)).bundle(),
            None | Some(Rotation::Renewing(_) | Rotation::Renewed(_)) => {
                self.present.certificate_pem.clone()
            }
        }
    }

    /// The identifier of the key that signs.
    pub(crate) fn signer_key_id(&self) -> String {
        key_id(&self.present.certificate_pem).unwrap_or_default()
    }

    /// Whether a rotation waits for the members' word that they trust all of it.
    pub(crate) fn waits_for_trust(&self) -> bool {
        matches!(self.rotation, Some(Rotation::Trusting { .. }))
    }

    /// Whether no rotation is under way.
    pub(crate) fn is_settled(&self) -> bool {
        self.rotation.is_none()
    }

    /// Whether all nodes show what the CA signed that signs now, and the one before is still trusted.
    #[cfg(test)]
    pub(crate) fn is_renewed(&self) -> bool {
        matches!(self.rotation, Some(Rotation::Renewed(_)))
    }

    /// The CA that signs, and the data folder's sealing key that opened it.
    fn open(&self, folder: &Path, cluster_id: &str) -> Result<(Ca, SealingKey), SealError> {
        let key = SealingKey::load(folder)?;
        Ok((self.present.open(&key, cluster_id, CA_KEY)?, key))
    }
}

/// The record as a member's own copy has it.
#[derive(Debug)]
pub(crate) struct OwnCopy {
    pub(crate) record: CaRecord,
    /// Its last write.
    pub(crate) revision: Revision,
}

impl OwnCopy {
    /// What members trust by it.
    pub(crate) fn trusted(&self) -> Trusted {
        self.record.trusted(self.revision)
    }
}

/// Reads a member's own copy; `None`: that has not come so far.
pub(crate) fn own_copy(db: &Db) -> std::io::Result<Option<OwnCopy>> {
    let Some(row) = db.view(|view| view.get(Table::Data, CA_KEY.as_bytes()))? else {
        return Ok(None);
    };
    let row: Record = decode(&row)?;
    let record = serde_json::from_slice(&row.value).map_err(std::io::Error::other)?;
    Ok(Some(OwnCopy { record, revision: Revision(row.mod_revision) }))
}

/// The CA that signs, from a member's own copy.
pub(crate) fn own_ca(db: &Db, folder: &Path, cluster_id: &str) -> Result<Ca, String> {
    let own = own_copy(db).map_err(|error| error.to_string())?;
    let own = own.ok_or("its copy of the state does not have the CA yet")?;
    own.record.open(folder, cluster_id).map(|(ca, _)| ca).map_err(|error| cannot_sign(&error))
}

/// What a member signs with.
#[derive(Debug)]
pub(crate) struct Signer {
    pub(crate) ca: Ca,
    pub(crate) sealing_key: SealingKey,
    pub(crate) record: CaRecord,
    pub(crate) revision: Revision,
}

impl Signer {
    /// Has a transaction come to nothing where another CA signs by then.
    pub(crate) fn unchanged(&self, txn: Txn) -> Txn {
        txn.if_revision(CA_KEY, self.revision)
    }
}

/// The record, as fresh as asked.
async fn read(node: &Node, consistency: Consistency) -> Result<(CaRecord, Revision), StoreError> {
    let kv = node.get(CA_KEY, consistency).await?.0;
    let missing = || StoreError::Failed { why: "the cluster's CA record is missing".to_owned() };
    let kv = kv.ok_or_else(missing)?;
    Ok((from_json(&kv)?, kv.mod_revision))
}

/// The CA that signs, opened with this member's sealing key.
pub(crate) async fn signer(node: &Node) -> Result<Signer, MembershipError> {
    let (record, revision) = read(node, Consistency::Linearizable).await?;
    let (folder, cluster_id) = (node.config().data_dir.clone(), node.identity().cluster_id.clone());
    let opening = record.clone();
    let opened = blocking(node.db().host(), move || opening.open(&folder, &cluster_id)).await;
    let opened = opened.map_err(|error| StoreError::Failed { why: error.to_string() })?;
    match opened {
        Ok((ca, sealing_key)) => Ok(Signer { ca, sealing_key, record, revision }),
        Err(error) => {
            let (node, why) = (node.label().borrow().clone(), cannot_sign(&error));
            tracing::error!(%why, "this node cannot sign");
            Err(MembershipError::CannotSign { node, why })
        }
    }
}

/// At the start: says so where this node will not be able to sign.
pub(crate) fn check(record: &CaRecord, folder: &Path, cluster_id: &str) {
    if let Err(error) = record.open(folder, cluster_id) {
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
