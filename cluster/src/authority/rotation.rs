//! Another CA for a running cluster, without a pause.
//!
//! ```text
//!   begin ──► trusting ── each member has said ──► renewing ── each node shows ──► renewed ── finish ──►
//!             the next CA   that it trusts both    the new CA    one of the new     nodes     the old CA is
//!             is in the     (on disk, in each      signs                            are done  trusted no more
//!             record        handshake)
//! ```
//!
//! The leader takes it further, by transactions on the one record `priv/ca`: whoever leads goes on
//! where the last one was, and a phase is entered once. A member that is down holds a phase up until it
//! is back or was removed: without it the node would be locked out for good.
//!
//! Who trusts the old CA alone (a client, a node that joins with an older token) can verify what the
//! new one signs until the end: nodes show the new CA certified by the old one as well. So clients have
//! the whole phase `renewed` to get certificates of the new one, and a person says when it is over.
//!
//! Invariant: a CA signs only once all members trust it, and is dropped only once no node shows
//! anything that it signed.

use std::collections::BTreeSet;

use proto::record::{CertificateHolder, CertificateRecord};
use proto::{NodeId, Revision, keys, v1};

use super::{Before, CA_KEY, CaRecord, OwnCopy, Rotation, Signer, read, signer};
use crate::certificates::{self, Administration, Known};
use crate::identity::{Ca, SealedCa, dates, fingerprint, key_id};
use crate::membership::{from_json, to_json, unix_now_s};
use crate::node::Node;
use crate::{Consistency, Member, MembershipError, StoreError, Txn};

/// Attempts of a transaction whose compares meet concurrent changes.
const ATTEMPTS: usize = 16;

/// Begins a rotation, or says how far the one that is under way is.
pub(crate) async fn begin(node: &Node, by: &str) -> Result<v1::CaStatus, MembershipError> {
    for _ in 0..ATTEMPTS {
        let signer = signer(node).await?;
        if signer.record.rotation.is_some() {
            break;
        }
        let next = next(node, &signer).map_err(MembershipError::Invalid)?;
        let txn = signer.unchanged(Txn::new().by(by)).put(CA_KEY, to_json(&next)?);
        if node.txn(txn).await?.committed() {
            tracing::warn!(%by, "the cluster's CA is being rotated");
            break;
        }
    }
    status(node, Consistency::Linearizable).await
}

/// The record with a new CA that does not sign yet.
fn next(node: &Node, signer: &Signer) -> Result<CaRecord, String> {
    let cluster_id = &node.identity().cluster_id;
    let made = Ca::make(cluster_id).and_then(|ca| Ok((signer.ca.cross_sign(&ca)?, ca)));
    let (cross_pem, ca) = made.map_err(|error| format!("no CA could be made: {error}"))?;
    let next = SealedCa::seal(&ca, &signer.sealing_key, cluster_id, CA_KEY);
    let next = next.map_err(|error| error.to_string())?;
    let rotation = Some(Rotation::Trusting { next, cross_pem });
    Ok(CaRecord { present: signer.record.present.clone(), rotation })
}

/// As the leader: goes on to the next phase where nobody is waited for.
pub(crate) async fn advance(node: &Node, own: &OwnCopy) -> Result<(), StoreError> {
    let record = match &own.record.rotation {
        Some(Rotation::Trusting { next, cross_pem }) => {
            if !distrusting(node, own.revision).await?.is_empty() {
                return Ok(());
            }
            let previous_pem = own.record.present.certificate_pem.clone();
            let before = Before { previous_pem, cross_pem: cross_pem.clone() };
            CaRecord { present: next.clone(), rotation: Some(Rotation::Renewing(before)) }
        }
        Some(Rotation::Renewing(before)) => {
            if !outdated(node, &own.record).await?.is_empty() {
                return Ok(());
            }
            let rotation = Some(Rotation::Renewed(before.clone()));
            CaRecord { present: own.record.present.clone(), rotation }
        }
        Some(Rotation::Renewed(_)) | None => return Ok(()),
    };
    let txn = Txn::new().by("system").if_revision(CA_KEY, own.revision);
    if node.txn(txn.put(CA_KEY, to_json(&record)?)).await?.committed() {
        tracing::warn!(phase = phase(&record), "the rotation of the cluster's CA goes on");
    }
    Ok(())
}

/// Ends a rotation. Unless it is forced, an administrator keeps a certificate that lets him in.
pub(crate) async fn finish(
    node: &Node,
    by: &str,
    force: bool,
) -> Result<v1::CaStatus, MembershipError> {
    for _ in 0..ATTEMPTS {
        let (record, revision) = read(node, Consistency::Linearizable).await?;
        let waiting = match record.rotation {
            // Ended already, perhaps by this very request.
            None => break,
            Some(Rotation::Trusting { .. }) => {
                named(distrusting(node, revision).await?, "does not trust the new CA yet")
            }
            Some(Rotation::Renewing(_) | Rotation::Renewed(_)) => {
                named(outdated(node, &record).await?, "has no certificate of the new CA yet")
            }
        };
        if !waiting.is_empty() || !matches!(record.rotation, Some(Rotation::Renewed(_))) {
            let of =
                if waiting.is_empty() { "its next phase".to_owned() } else { waiting.join(", ") };
            return Err(MembershipError::Invalid(format!(
                "the CA's rotation is in phase `{}` and waits for {of}; see `clusterctl cluster ca status`, bring that node back or remove it (`clusterctl cluster remove NODE`), then finish",
                phase(&record)
            )));
        }
        let administration = Administration::read(node).await?;
        if !force {
            let known = certificates::all(node, Consistency::Linearizable).await?;
            administration.with_only(&record.signer_key_id(), &known, unix_now_s())?;
        }
        let ended = CaRecord { present: record.present, rotation: None };
        // Compared with revocations and changes of roles, which leave one administrator as well.
        let mut txn = administration.compared(Txn::new().by(by).if_revision(CA_KEY, revision))?;
        txn = txn.put(CA_KEY, to_json(&ended)?);
        for kv in node.range(keys::CA_TRUST, "", 0, Consistency::Linearizable, false).await?.kvs {
            txn = txn.delete(kv.key);
        }
        if node.txn(txn).await?.committed() {
            tracing::warn!(%by, "the cluster's previous CA is trusted no more");
            break;
        }
    }
    status(node, Consistency::Linearizable).await
}

/// The members that have not said yet that they trust all of a revision of the record.
async fn distrusting(node: &Node, revision: Revision) -> Result<Vec<Member>, StoreError> {
    let mut trusting = BTreeSet::new();
    for kv in node.range(keys::CA_TRUST, "", 0, Consistency::Stale, false).await?.kvs {
        if from_json::<u64>(&kv)? == revision.0 {
            trusting.insert(kv.key);
        }
    }
    let members = node.members().into_iter();
    Ok(members.filter(|member| !trusting.contains(&keys::ca_trust(member.node_id))).collect())
}

/// The nodes that do not show a certificate of the CA that signs yet, or may show another one too:
/// members, and those that are just being let in.
async fn outdated(node: &Node, record: &CaRecord) -> Result<Vec<Member>, StoreError> {
    let signer = key_id(&record.present.certificate_pem).unwrap_or_default();
    let removed = certificates::removed(node).await?;
    let (mut new, mut old) = (BTreeSet::new(), BTreeSet::new());
    for known in certificates::all(node, Consistency::Linearizable).await? {
        if let CertificateRecord {
            holder: CertificateHolder::Node(id),
            in_use: true,
            authority,
            ..
        } = known.record
        {
            if authority == signer {
                new.insert(id)
            } else {
                old.insert(id)
            };
        }
    }
    let members = node.members();
    let joining = old.iter().filter(|id| members.iter().all(|member| member.node_id != **id));
    let joining = joining.filter(|id| !removed.contains_key(id)).map(|id| nameless(*id));
    let late = |member: &&Member| !new.contains(&member.node_id) || old.contains(&member.node_id);
    Ok(members.iter().filter(late).cloned().chain(joining).collect())
}

/// A node that is not listed as a member yet.
fn nameless(node_id: NodeId) -> Member {
    Member {
        node_id,
        name: format!("node id {node_id}"),
        api_address: String::new(),
        enrol_address: String::new(),
        voter: false,
        zone: String::new(),
        witness: false,
    }
}

fn named(members: Vec<Member>, why: &str) -> Vec<String> {
    members.into_iter().map(|member| format!("{} ({why})", member.name)).collect()
}

fn phase(record: &CaRecord) -> &'static str {
    match record.rotation {
        None => "stable",
        Some(Rotation::Trusting { .. }) => "trusting",
        Some(Rotation::Renewing(_)) => "renewing",
        Some(Rotation::Renewed(_)) => "renewed",
    }
}

/// Which CA signs, and how far a rotation is.
pub(crate) async fn status(
    node: &Node,
    consistency: Consistency,
) -> Result<v1::CaStatus, MembershipError> {
    let (record, revision) = read(node, consistency).await?;
    let waiting_for = match &record.rotation {
        Some(Rotation::Trusting { .. }) => {
            named(distrusting(node, revision).await?, "does not trust the new CA yet")
        }
        Some(Rotation::Renewing(_) | Rotation::Renewed(_)) => {
            named(outdated(node, &record).await?, "has no certificate of the new CA yet")
        }
        None => Vec::new(),
    };
    let other = record.trusted(revision).roots.get(1).and_then(|other| fingerprint(other));
    let present_pem = &record.present.certificate_pem;
    Ok(v1::CaStatus {
        phase: phase(&record).to_owned(),
        fingerprint: fingerprint(present_pem).unwrap_or_default(),
        expires_unix_s: dates(present_pem).map_or(0, |(_, _, end)| end),
        other_fingerprint: other.unwrap_or_default(),
        waiting_for,
        clients: clients(node, &record).await?,
    })
}

/// The clients that have a good certificate of the CA that goes, and none of the one that stays.
async fn clients(node: &Node, record: &CaRecord) -> Result<Vec<String>, StoreError> {
    let present = &record.present.certificate_pem;
    let (goes, stays) = match &record.rotation {
        None => return Ok(Vec::new()),
        Some(Rotation::Trusting { next, .. }) => (present, &next.certificate_pem),
        Some(Rotation::Renewing(before) | Rotation::Renewed(before)) => {
            (&before.previous_pem, present)
        }
    };
    let (goes, stays) = (key_id(goes).unwrap_or_default(), key_id(stays).unwrap_or_default());
    let known = certificates::all(node, Consistency::Stale).await?;
    let of = |authority: &str| holders(&known, authority, unix_now_s());
    Ok(of(&goes).difference(&of(&stays)).cloned().collect())
}

/// The clients with a good certificate of a CA.
fn holders(known: &[Known], authority: &str, now_unix_s: u64) -> BTreeSet<String> {
    let of = known.iter().map(|known| &known.record).filter(|record| {
        record.revoked.is_none()
            && record.expires_unix_s > now_unix_s
            && record.authority == authority
    });
    let name = |record: &CertificateRecord| match &record.holder {
        CertificateHolder::Client(name) => Some(name.clone()),
        CertificateHolder::Node(_) => None,
    };
    of.filter_map(name).collect()
}

/// For the cluster's status: how far a rotation is, while there is one.
pub(crate) async fn under_way(node: &Node) -> Option<v1::CaStatus> {
    let (record, _) = read(node, Consistency::Stale).await.ok()?;
    record.rotation.as_ref()?;
    status(node, Consistency::Stale).await.ok()
}
