//! Another name for a node. The name is a label: certificates, placements and records go by the id.
//!
//! ```text
//!   claim: names/NEW := id, the node's other names written anew ──► label (Raft's membership) ──►
//!   release: the other names deleted, the node's document moved; compares that no other rename
//!            of the node has claimed since, else it begins anew
//! ```
//!
//! Invariants: a name that a member is called by is always claimed; what is claimed when a node's
//! removal is announced is given back by the removal, and nothing is claimed after.

use proto::{Name, NodeId, Revision, keys};
use tokio::time::Instant;

use crate::consensus::{Forward, Forwarded};
use crate::membership::{check_label, from_json, name_key, to_json};
use crate::node::Node;
use crate::{Consistency, MembershipError, StoreError, Txn, TxnOutcome};

/// How often it begins anew when others rename the same node.
const ATTEMPTS: usize = 16;

/// Takes the new name, changes the label, gives the old names back. Repeating it ends what an
/// interrupted attempt began.
pub(crate) async fn rename_node(
    node: &Node,
    id: NodeId,
    name: &Name,
) -> Result<(), MembershipError> {
    check_label(name)?;
    for _ in 0..ATTEMPTS {
        let Some(claim) = claim(node, id, name).await? else { continue };
        label(node, id, name).await?;
        if release(node, &claim, name).await? {
            return Ok(());
        }
    }
    let text = "this node is being renamed by others at the same time; look again";
    Err(MembershipError::Invalid(text.to_owned()))
}

/// A name that is claimed.
#[derive(Debug)]
struct Claim {
    /// Of the claimed name, and of the node's others: all were written then.
    revision: Revision,
    /// The keys of the node's other names.
    others: Vec<String>,
}

/// Claims the name; `None`: others were faster.
async fn claim(node: &Node, id: NodeId, name: &Name) -> Result<Option<Claim>, MembershipError> {
    let removal = keys::removal(id);
    if node.get(&removal, Consistency::Linearizable).await?.0.is_some() {
        let text =
            format!("node {id} is being removed from the cluster, or was; it keeps its name");
        return Err(MembershipError::Invalid(text));
    }
    let key = name_key(name.as_str());
    let mut txn = Txn::new().if_absent(removal);
    let (mut others, mut held) = (Vec::new(), false);
    for kv in node.range(&name_key(""), "", 0, Consistency::Linearizable, true).await?.kvs {
        let holder: u64 = from_json(&kv)?;
        if kv.key == key && holder != id.0 {
            return Err(MembershipError::Invalid(format!(
                "a node named `{name}` is in the cluster already; choose another name"
            )));
        }
        if holder == id.0 {
            // Written anew even where it stays as it is: a rename that is under way finds out.
            txn = txn.if_revision(kv.key.clone(), kv.mod_revision);
            txn = txn.put(kv.key.clone(), kv.value.clone());
            held |= kv.key == key;
            others.extend((kv.key != key).then_some(kv.key));
        }
    }
    if !held {
        txn = txn.if_absent(key.clone()).put(key, to_json(&id.0)?);
    }
    let TxnOutcome::Committed { revision } = node.txn(txn).await? else { return Ok(None) };
    Ok(Some(Claim { revision, others }))
}

/// Changes what the membership calls the node.
async fn label(node: &Node, id: NodeId, name: &Name) -> Result<(), MembershipError> {
    let limit = node.config().request_timeout;
    let rename = Forward::Rename { id: id.0, name: name.to_string() };
    match node.ask_leader(rename, Instant::now() + limit).await {
        Ok(Forwarded::Done) => Ok(()),
        Ok(Forwarded::UnknownNode) => Err(MembershipError::UnknownNode(id.to_string())),
        Ok(Forwarded::DiskFull { folder, free_bytes }) => {
            Err(StoreError::DiskFull { path: folder.into(), free_bytes }.into())
        }
        Err(StoreError::UnknownOutcome { .. }) => Err(MembershipError::Timeout(limit)),
        Ok(other) => Err(StoreError::UnknownOutcome { why: format!("{other:?}") }.into()),
        Err(error) => Err(error.into()),
    }
}

/// Gives the other names back, and moves what people say of the node to its new name. `false`:
/// another rename has claimed since.
async fn release(node: &Node, claim: &Claim, name: &Name) -> Result<bool, MembershipError> {
    let mut txn = Txn::new().if_revision(name_key(name.as_str()), claim.revision);
    let to = keys::node_document(name);
    let mut free = node.get(&to, Consistency::Linearizable).await?.0.is_none();
    for other in &claim.others {
        txn = txn.if_revision(other.clone(), claim.revision).delete(other.clone());
        let Ok(old) = other[name_key("").len()..].parse::<Name>() else { continue };
        let from = keys::node_document(&old);
        if free && let Some(document) = node.get(&from, Consistency::Linearizable).await?.0 {
            txn = txn.if_revision(from.clone(), document.mod_revision).delete(from);
            txn = txn.if_absent(to.clone()).put(to.clone(), document.value);
            free = false;
        }
    }
    Ok(node.txn(txn).await?.committed())
}
