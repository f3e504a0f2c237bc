//! Taking a node out: announce it, look what it owns, change Raft's membership, clear its records.
//!
//! ```text
//!   status/removals/ID := leaving ──► owns VMs? ──yes──► withdrawn, refused
//!                                         │no
//!                                  Raft's membership ──► status/removals/ID := removed,
//!                                                        its name, node and fenced records deleted
//! ```
//!
//! Invariant: every transaction that gives a VM to a node compares that its removal record is
//! absent. So what the look after the announcement does not see can never come.
//!
//! Each step can be repeated: whatever interrupted a removal, asking again (by name or id) ends it.

use proto::record::{Phase, Placement, RemovalRecord, RemovalState};
use proto::{NodeId, Revision, keys};
use tokio::time::Instant;

use crate::consensus::{Forward, Forwarded};
use crate::membership::{from_json, name_key, to_json};
use crate::node::Node;
use crate::{Consistency, MembershipError, StoreError, Txn, TxnOutcome};

/// VMs that a refusal names.
const NAMED_MAX: usize = 20;
/// Attempts of a transaction whose compares meet concurrent changes.
const ATTEMPTS: usize = 16;

/// Who is to go.
#[derive(Debug, Clone)]
struct Leaver {
    id: NodeId,
    name: String,
    /// The removal record's last write, once it is written.
    announced: Revision,
}

/// Takes a node out, by name or id.
pub(crate) async fn remove_node(node: &Node, wanted: &str) -> Result<(), MembershipError> {
    let mut leaver = find(node, wanted).await?;
    if leaver.id == node.id() {
        let alone = node.members().len() <= 1;
        let refusal = if alone { MembershipError::LastNode } else { MembershipError::Itself };
        return Err(refusal(leaver.id));
    }
    leaver.announced = announce(node, &leaver).await?;
    let owned = match owned(node, leaver.id).await {
        Ok(owned) => owned,
        Err(error) => return withdraw(node, &leaver, error.into()).await,
    };
    if !owned.is_empty() {
        let (name, vms) = (leaver.name.clone(), owned);
        return withdraw(node, &leaver, MembershipError::OwnsVms { node: name, vms }).await;
    }
    match leave_raft(node, leaver.id).await {
        Ok(()) => finish(node, &leaver).await,
        // Whether it is still a member is not known: the announcement stays for the repetition.
        Err(error @ (MembershipError::Timeout(_) | MembershipError::Store(_))) => Err(error),
        Err(error) => withdraw(node, &leaver, error).await,
    }
}

/// A member, or one whose removal was begun.
async fn find(node: &Node, wanted: &str) -> Result<Leaver, MembershipError> {
    let members = node.members();
    let member = members
        .iter()
        .find(|member| member.name == wanted)
        .or_else(|| members.iter().find(|member| member.node_id.to_string() == wanted));
    if let Some(member) = member {
        let (id, name) = (member.node_id, member.name.clone());
        return Ok(Leaver { id, name, announced: Revision(0) });
    }
    let records = node.range(keys::REMOVALS, "", 0, Consistency::Linearizable, false).await?.kvs;
    for kv in records {
        let record: RemovalRecord = from_json(&kv)?;
        let Ok(id) = kv.key[keys::REMOVALS.len()..].parse().map(NodeId) else { continue };
        let begun = record.state == RemovalState::Leaving;
        if begun && (record.name == wanted || id.to_string() == wanted) {
            return Ok(Leaver { id, name: record.name, announced: kv.mod_revision });
        }
    }
    Err(MembershipError::UnknownNode(wanted.to_owned()))
}

/// Writes the record, anew where it is there: another removal that gives up does not take it away.
async fn announce(node: &Node, leaver: &Leaver) -> Result<Revision, MembershipError> {
    let key = keys::removal(leaver.id);
    let record = RemovalRecord { name: leaver.name.clone(), state: RemovalState::Leaving };
    for _ in 0..ATTEMPTS {
        let (present, _) = node.get(&key, Consistency::Linearizable).await?;
        let revision = present.as_ref().map_or(Revision(0), |kv| kv.mod_revision);
        let txn = Txn::new().if_revision(key.clone(), revision);
        let outcome = node.txn(txn.put(key.clone(), to_json(&record)?)).await?;
        if let TxnOutcome::Committed { revision } = outcome {
            return Ok(revision);
        }
    }
    Err(MembershipError::Invalid("this node is being removed by others; look again".to_owned()))
}

/// The VMs that are the node's, or on their way to it.
async fn owned(node: &Node, id: NodeId) -> Result<Vec<String>, StoreError> {
    let placements = node.range(keys::PLACEMENTS, "", 0, Consistency::Linearizable, false).await?;
    let mut owned = Vec::new();
    for kv in placements.kvs {
        let placement: Placement = from_json(&kv)?;
        let coming = matches!(
            placement.phase,
            Phase::Migrating { target } | Phase::Relocating { target } if target == id
        );
        if (placement.owner == id || coming) && owned.len() < NAMED_MAX {
            owned.push(kv.key[keys::PLACEMENTS.len()..].to_owned());
        }
    }
    Ok(owned)
}

/// The node stays: it may be given VMs again. Where this cannot be written, the next attempt does.
async fn withdraw(
    node: &Node,
    leaver: &Leaver,
    why: MembershipError,
) -> Result<(), MembershipError> {
    let key = keys::removal(leaver.id);
    let txn = Txn::new().if_revision(key.clone(), leaver.announced).delete(key);
    if let Err(error) = node.txn(txn).await {
        tracing::warn!(node = %leaver.name, "it stays, and cannot be given VMs yet: {error}");
    }
    Err(why)
}

async fn leave_raft(node: &Node, id: NodeId) -> Result<(), MembershipError> {
    let limit = node.config().request_timeout * 2;
    match node.ask_leader(Forward::Remove { id: id.0 }, Instant::now() + limit).await {
        Err(StoreError::UnknownOutcome { .. }) => Err(MembershipError::Timeout(limit)),
        Err(error) => Err(error.into()),
        // Gone from Raft already: an earlier attempt got no further.
        Ok(Forwarded::Done | Forwarded::UnknownNode) => Ok(()),
        Ok(Forwarded::LastNode) => Err(MembershipError::LastNode(id)),
        Ok(Forwarded::QuorumAtRisk { left, voters }) => {
            Err(MembershipError::QuorumAtRisk { node: id, left, voters })
        }
        Ok(Forwarded::DiskFull { folder, free_bytes }) => {
            Err(StoreError::DiskFull { path: folder.into(), free_bytes }.into())
        }
        // It leads, and nobody else can.
        Ok(Forwarded::Refused(why)) => {
            Err(MembershipError::Invalid(format!("node {id} stays a member: {why}")))
        }
        Ok(other) => Err(StoreError::UnknownOutcome { why: format!("{other:?}") }.into()),
    }
}

/// It is no member any more: its name is free, its records go.
async fn finish(node: &Node, leaver: &Leaver) -> Result<(), MembershipError> {
    let record = RemovalRecord { name: leaver.name.clone(), state: RemovalState::Removed };
    let mut txn = Txn::new()
        .put(keys::removal(leaver.id), to_json(&record)?)
        .delete(keys::node(leaver.id))
        .delete(keys::fenced(leaver.id));
    for taken in node.range(&name_key(""), "", 0, Consistency::Linearizable, true).await?.kvs {
        if from_json::<u64>(&taken)? == leaver.id.0 {
            txn = txn.delete(taken.key);
        }
    }
    node.txn(txn).await?;
    Ok(())
}
