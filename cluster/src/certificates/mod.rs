//! What the cluster knows of the certificates that its CA has signed: one record each, by serial
//! number, from its issue until some time after its end.
//!
//! ```text
//!   enrolment, issue_client ──► signed, recorded
//!   Raft.Renew (leader) ──────► judged, signed, recorded ──► the node's next handshakes
//!   revoke ───────────────────► record.revoked ──► each member's list of what is refused
//! ```
//!
//! Invariant: no key gets two certificates; a request that is played again is refused.

mod issue;
mod list;
mod revoke;

use std::collections::{BTreeMap, BTreeSet};

use proto::record::{CertificateHolder, CertificateRecord, RemovalRecord, RemovalState};
use proto::{NodeId, Revision, keys};

use crate::identity::Certificate;
use crate::membership::{from_json, to_json, unix_now_s};
use crate::node::Node;
use crate::tls::PeerIdentity;
use crate::{Consistency, StoreError, Txn};

pub(crate) use issue::{issue_client, issue_next};
pub(crate) use list::{list, shown_own};
pub(crate) use revoke::revoke;

/// Records that one transaction forgets.
const FORGET_MAX: usize = 100;

/// A record with the key it is under.
#[derive(Debug, Clone)]
struct Known {
    serial: String,
    record: CertificateRecord,
    revision: Revision,
}

/// The record of a certificate that was signed just now.
fn record_of(certificate: &Certificate) -> Option<CertificateRecord> {
    let holder = match &certificate.holder {
        PeerIdentity::Node(id) => CertificateHolder::Node(*id),
        PeerIdentity::Client(name) => CertificateHolder::Client(name.clone()),
        PeerIdentity::LocalRoot => return None,
    };
    Some(CertificateRecord {
        holder,
        issued_unix_s: certificate.issued_unix_s,
        expires_unix_s: certificate.expires_unix_s,
        key_hash: certificate.key_hash.clone(),
        revoked: None,
        trouble: None,
    })
}

/// Has a transaction record a certificate (PEM).
pub(crate) fn recorded(txn: Txn, certificate_pem: &str) -> Result<Txn, StoreError> {
    let unreadable = || StoreError::Failed { why: "a new certificate cannot be read".to_owned() };
    let certificate = Certificate::from_pem(certificate_pem).ok_or_else(unreadable)?;
    let record = record_of(&certificate).ok_or_else(unreadable)?;
    let key = keys::certificate(&certificate.serial);
    Ok(txn.if_absent(key.clone()).put(key, to_json(&record)?))
}

/// Records a node's own certificate where nobody has: an earlier version signed it, or the node did
/// itself because it had expired.
pub(crate) async fn record_own(node: &Node, own: &Certificate) -> Result<(), StoreError> {
    let key = keys::certificate(&own.serial);
    let (present, _) = node.get(&key, Consistency::Stale).await?;
    if present.is_none()
        && let Some(record) = record_of(own)
    {
        // A conflict is as good: it is there, and this node has not applied that yet.
        node.txn(Txn::new().if_absent(key.clone()).put(key, to_json(&record)?)).await?;
    }
    Ok(())
}

/// Notes in a node's record why it has not got the next certificate.
pub(crate) async fn note_trouble(
    node: &Node,
    own: &Certificate,
    why: &str,
) -> Result<(), StoreError> {
    let key = keys::certificate(&own.serial);
    let Some(kv) = node.get(&key, Consistency::Stale).await?.0 else { return Ok(()) };
    let mut record: CertificateRecord = from_json(&kv)?;
    if record.trouble.as_deref() != Some(why) {
        record.trouble = Some(why.to_owned());
        let txn = Txn::new().if_revision(key.clone(), kv.mod_revision);
        node.txn(txn.put(key, to_json(&record)?)).await?;
    }
    Ok(())
}

async fn all(node: &Node, consistency: Consistency) -> Result<Vec<Known>, StoreError> {
    let kvs = node.range(keys::CERTIFICATES, "", 0, consistency, false).await?.kvs;
    kvs.into_iter()
        .map(|kv| {
            let record = from_json(&kv)?;
            let serial = kv.key[keys::CERTIFICATES.len()..].to_owned();
            Ok(Known { serial, record, revision: kv.mod_revision })
        })
        .collect()
}

/// Removed nodes, and the names that they had.
async fn removed(node: &Node) -> Result<BTreeMap<NodeId, String>, StoreError> {
    let kvs = node.range(keys::REMOVALS, "", 0, Consistency::Stale, false).await?.kvs;
    let mut removed = BTreeMap::new();
    for kv in kvs {
        let record: RemovalRecord = from_json(&kv)?;
        if record.state == RemovalState::Removed
            && let Ok(id) = kv.key[keys::REMOVALS.len()..].parse()
        {
            removed.insert(NodeId(id), record.name);
        }
    }
    Ok(removed)
}

/// Each node's latest, by serial number.
fn newest(known: &[Known]) -> BTreeSet<String> {
    let mut newest: BTreeMap<NodeId, &Known> = BTreeMap::new();
    for one in known {
        let CertificateHolder::Node(id) = one.record.holder else { continue };
        let order = |known: &Known| (known.record.issued_unix_s, known.revision);
        let best = newest.entry(id).or_insert(one);
        if order(one) > order(best) {
            *best = one;
        }
    }
    newest.into_values().map(|known| known.serial.clone()).collect()
}

/// As the leader: forgets certificates whose end is long past.
pub(crate) async fn forget(node: &Node) -> Result<(), StoreError> {
    let memory_s = node.config().certificates.memory.as_secs();
    let now_unix_s = unix_now_s();
    let old = |known: &Known| known.record.expires_unix_s.saturating_add(memory_s) < now_unix_s;
    let known = all(node, Consistency::Stale).await?;
    let mut txn = Txn::new().by("system");
    for known in known.into_iter().filter(old).take(FORGET_MAX) {
        txn = txn.delete(keys::certificate(&known.serial));
    }
    if !txn.is_empty() {
        node.txn(txn).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) const NOW: u64 = 1_800_000_000;

    pub(super) fn known(serial: &str, holder: CertificateHolder, issued_unix_s: u64) -> Known {
        let record = CertificateRecord {
            holder,
            issued_unix_s,
            expires_unix_s: issued_unix_s + 1200,
            key_hash: String::new(),
            revoked: None,
            trouble: None,
        };
        Known { serial: serial.to_owned(), record, revision: Revision(1) }
    }
}
