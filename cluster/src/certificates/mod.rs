//! What the cluster knows of the certificates that its CA has signed: one record each, by serial
//! number, from its issue until some time after its end; of one that was revoked for ever.
//!
//! ```text
//!   enrolment, issue_client ──► signed, recorded
//!   Raft.Renew (leader) ──────► judged, signed, recorded ──► claimed by its node ──► on its disk
//!                                  ──► in its handshakes ──► settled: it claims no other one
//!   revoke ───────────────────► record.revoked ──► each member's list of what is refused
//! ```
//!
//! Invariants: a node shows what it has claimed (`in_use`), and what a member has claimed is not
//! revoked; so no revocation locks a member out. (A node that has to help itself, since nobody talks to
//! it, claims what it shows as soon as it can.) A renewal that is played again is refused: it would be
//! the second one on its key. Which certificate is the later one is asked of the store's revisions,
//! never of a clock.

mod issue;
mod list;
mod revoke;

use std::collections::{BTreeMap, BTreeSet};

use proto::record::{CertificateHolder, CertificateRecord, RemovalRecord, RemovalState};
use proto::{NodeId, Revision, keys};

use tonic::Status;

use crate::identity::{Certificate, SignError};
use crate::machine::{Read, Table};
use crate::membership::{from_json, to_json, unix_now_s};
use crate::node::Node;
use crate::storage::Db;
use crate::tls::PeerIdentity;
use crate::{Consistency, KeyValue, StoreError, Txn};

pub(crate) use issue::{issue_client, issue_next};
pub(crate) use list::{clients, list, shown_own};
pub(crate) use revoke::{Administration, revoke};

/// Records that one transaction forgets.
const FORGET_MAX: usize = 100;
/// Attempts of a transaction whose compares meet concurrent changes.
const ATTEMPTS: usize = 16;

/// A record with the key it is under.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    serial: String,
    pub(crate) record: CertificateRecord,
    created: Revision,
    /// The last write.
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
        in_use: false,
        revoked: None,
        trouble: None,
        authority: certificate.authority.clone(),
    })
}

fn recorded_as(txn: Txn, certificate_pem: &str, in_use: bool) -> Result<Txn, StoreError> {
    let unreadable = || StoreError::Failed { why: "a new certificate cannot be read".to_owned() };
    let certificate = Certificate::from_pem(certificate_pem).ok_or_else(unreadable)?;
    let record = CertificateRecord { in_use, ..record_of(&certificate).ok_or_else(unreadable)? };
    let key = keys::certificate(&certificate.serial);
    Ok(txn.if_absent(key.clone()).put(key, to_json(&record)?))
}

/// Has a transaction record a certificate (PEM) that nobody shows yet.
fn recorded(txn: Txn, certificate_pem: &str) -> Result<Txn, StoreError> {
    recorded_as(txn, certificate_pem, false)
}

/// Has a transaction record the certificate (PEM) that a node comes in with.
pub(crate) fn enrolled(txn: Txn, certificate_pem: &str) -> Result<Txn, StoreError> {
    recorded_as(txn, certificate_pem, true)
}

/// Why nothing was signed, for whoever asked.
pub(crate) fn not_signed(error: &SignError) -> Status {
    match error {
        SignError::Request(_) => Status::invalid_argument(error.to_string()),
        SignError::Clock(_) => Status::failed_precondition(error.to_string()),
    }
}

/// Why a node does not show a certificate that it was given.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClaimError {
    /// An administrator was faster.
    #[error("it was revoked before it was used; the next attempt gets another one")]
    Revoked,
    /// It was never recorded, or that was forgotten.
    #[error("the cluster has no record of it; the next attempt gets another one")]
    Unknown,
    /// Whether it is claimed is not known.
    #[error("its use cannot be recorded: {0}")]
    Store(#[from] StoreError),
}

/// Records that a node shows a certificate from now on. Before it does: so nobody can revoke what it
/// works with.
pub(crate) async fn claim(node: &Node, serial: &str) -> Result<(), ClaimError> {
    let key = keys::certificate(serial);
    for _ in 0..ATTEMPTS {
        let kv = node.get(&key, Consistency::Linearizable).await?.0.ok_or(ClaimError::Unknown)?;
        let mut record: CertificateRecord = from_json(&kv)?;
        if record.revoked.is_some() {
            return Err(ClaimError::Revoked);
        }
        if record.in_use {
            return Ok(());
        }
        record.in_use = true;
        let txn = Txn::new().if_revision(key.clone(), kv.mod_revision);
        if node.txn(txn.put(key.clone(), to_json(&record)?)).await?.committed() {
            return Ok(());
        }
    }
    Err(StoreError::NoQuorum { why: "its record is being changed by others".to_owned() }.into())
}

/// Has the records say that this node shows one certificate, and no other of its own. Where nobody
/// has recorded it (the first node's, or one that a node signed itself), this does. False: something
/// was changed meanwhile; look again later. An error where it was revoked: the node needs another one.
pub(crate) async fn settle(node: &Node, own: &Certificate) -> Result<bool, StoreError> {
    let (mut txn, mut found) = (Txn::new(), false);
    // A copy that is behind may not know yet what this node itself claimed before it was restarted.
    for mut known in all(node, Consistency::Linearizable).await? {
        let shown = known.serial == own.serial;
        found |= shown;
        if shown && known.record.revoked.is_some() {
            let why = format!("certificate {}, which this node shows, was revoked", own.serial);
            return Err(StoreError::Failed { why });
        }
        let its_own = known.record.holder == CertificateHolder::Node(node.id());
        if !its_own || known.record.in_use == shown {
            continue;
        }
        known.record.in_use = shown;
        if !shown {
            known.record.trouble = None;
        }
        let key = keys::certificate(&known.serial);
        txn = txn.if_revision(key.clone(), known.revision).put(key, to_json(&known.record)?);
    }
    if !found && let Some(record) = record_of(own) {
        let key = keys::certificate(&own.serial);
        let record = CertificateRecord { in_use: true, ..record };
        txn = txn.if_absent(key.clone()).put(key, to_json(&record)?);
    }
    Ok(txn.is_empty() || node.txn(txn).await?.committed())
}

/// Whether this node's copy of the state has a record of a certificate.
pub(crate) fn is_recorded(db: &Db, serial: &str) -> std::io::Result<bool> {
    let key = keys::certificate(serial);
    db.view(|view| Ok(view.get(Table::Data, key.as_bytes())?.is_some()))
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

/// All records. One that cannot be read is left out, and said: it must not keep others from their
/// certificates. (Its own is refused, see `node/denied.rs`.)
pub(crate) async fn all(node: &Node, consistency: Consistency) -> Result<Vec<Known>, StoreError> {
    let kvs = node.range(keys::CERTIFICATES, "", 0, consistency, false).await?.kvs;
    let found = kvs.len();
    let known: Vec<_> = kvs.into_iter().filter_map(known_of).collect();
    if known.len() < found {
        let count = found - known.len();
        tracing::warn!(
            count,
            "records of certificates cannot be read; those certificates are refused"
        );
    }
    Ok(known)
}

fn known_of(kv: KeyValue) -> Option<Known> {
    let record = from_json(&kv).ok()?;
    let serial = kv.key[keys::CERTIFICATES.len()..].to_owned();
    Some(Known { serial, record, created: kv.create_revision, revision: kv.mod_revision })
}

/// Removed nodes, and the names that they had.
pub(crate) async fn removed(node: &Node) -> Result<BTreeMap<NodeId, String>, StoreError> {
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

/// When the latest certificate that each node shows was recorded.
fn shown_since(known: &[Known]) -> BTreeMap<NodeId, Revision> {
    let mut since = BTreeMap::new();
    for one in known.iter().filter(|one| one.record.in_use) {
        if let CertificateHolder::Node(id) = one.record.holder {
            let latest = since.entry(id).or_insert(one.created);
            *latest = (*latest).max(one.created);
        }
    }
    since
}

/// The certificates that nobody asks for any more. That they are over is not taken from this node's
/// clock alone: each member has got its own certificate since, so all have come to that time by the
/// clocks of those who signed. What was revoked is never forgotten: it would be good again.
fn forgettable<'a>(
    known: &'a [Known],
    members: &BTreeSet<NodeId>,
    now_unix_s: u64,
    memory_s: u64,
) -> Vec<&'a Known> {
    let shown_by = |known: &Known| match known.record.holder {
        CertificateHolder::Node(id) if known.record.in_use => members.contains(&id).then_some(id),
        _ => None,
    };
    let mut got: BTreeMap<NodeId, u64> = BTreeMap::new();
    for one in known {
        if let Some(id) = shown_by(one) {
            let latest = got.entry(id).or_default();
            *latest = (*latest).max(one.record.issued_unix_s);
        }
    }
    let all = members.iter().map(|id| got.get(id).copied().unwrap_or(0)).min().unwrap_or(0);
    let past_unix_s = all.min(now_unix_s);
    let old = |one: &&Known| {
        let record = &one.record;
        let over = record.expires_unix_s.saturating_add(memory_s) < past_unix_s;
        over && record.revoked.is_none() && shown_by(one).is_none()
    };
    known.iter().filter(old).collect()
}

/// As the leader: forgets certificates whose end is long past.
pub(crate) async fn forget(node: &Node) -> Result<(), StoreError> {
    let memory_s = node.config().certificates.memory.as_secs();
    let members = node.members().into_iter().map(|member| member.node_id).collect();
    let known = all(node, Consistency::Stale).await?;
    let mut txn = Txn::new().by("system");
    for known in forgettable(&known, &members, unix_now_s(), memory_s).into_iter().take(FORGET_MAX)
    {
        // It may have been revoked meanwhile.
        let key = keys::certificate(&known.serial);
        txn = txn.if_revision(key.clone(), known.revision).delete(key);
    }
    if !txn.is_empty() {
        node.txn(txn).await?;
    }
    Ok(())
}

#[cfg(test)]
mod record_tests;

#[cfg(test)]
mod tests {
    use proto::record::Revocation;

    use super::*;

    pub(super) const NOW: u64 = 1_800_000_000;

    pub(super) fn known(serial: &str, holder: CertificateHolder, issued_unix_s: u64) -> Known {
        let record = CertificateRecord {
            holder,
            issued_unix_s,
            expires_unix_s: issued_unix_s + 1200,
            key_hash: String::new(),
            in_use: false,
            revoked: None,
            trouble: None,
            authority: String::new(),
        };
        let (created, revision) = (Revision(1), Revision(1));
        Known { serial: serial.to_owned(), record, created, revision }
    }

    #[test]
    fn no_clock_alone_has_anything_forgotten_and_nothing_a_revocation() {
        let node = |id, issued, in_use| {
            let mut one = known("node", CertificateHolder::Node(NodeId(id)), issued);
            one.record.in_use = in_use;
            one
        };
        let ann = |issued| known("ann", CertificateHolder::Client("ann".to_owned()), issued);
        let (members, memory_s) = (BTreeSet::from([NodeId(1), NodeId(2)]), 1000);
        let forgotten = |all: &[Known], now: u64| forgettable(all, &members, now, memory_s).len();
        // Over since NOW + 1200, to be forgotten after NOW + 2200.
        let (late, later) = (NOW + 2201, NOW + 9000);
        let agreed = [ann(NOW), node(1, late, true), node(2, late, true)];
        assert_eq!(forgotten(&agreed, later), 1);
        assert_eq!(forgotten(&agreed, NOW + 2200), 0, "this clock is behind");
        // A clock that is years ahead, here and at whoever signed for the one that asked.
        let alone = [ann(NOW), node(1, later, true), node(2, NOW, true)];
        assert_eq!(forgotten(&alone, u64::MAX), 0, "the other member has not come so far");
        let unknown = [ann(NOW), node(1, later, true)];
        assert_eq!(forgotten(&unknown, later), 0, "nothing is known of the other member");
        let unused = [ann(NOW), node(1, later, true), node(2, later, false)];
        assert_eq!(forgotten(&unused, later), 0, "it was signed, and nobody has used it");
        // What a member shows stays, what a former member showed goes.
        let shown = [node(1, NOW, true), node(1, later, true), node(2, later, true)];
        assert_eq!(forgotten(&shown, later), 0);
        let gone = [node(3, NOW, true), node(1, later, true), node(2, later, true)];
        assert_eq!(forgotten(&gone, later), 1);
        let mut revoked = agreed;
        revoked[0].record.revoked = Some(Revocation { at_unix_s: NOW, by: "root".to_owned() });
        assert_eq!(forgotten(&revoked, u64::MAX), 0, "it would be good again");
    }
}
