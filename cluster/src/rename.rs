//! Another name for a node. The name is a label: certificates, placements and records go by the id.

use std::time::Instant;

use proto::{Name, NodeId};

use crate::consensus::{Forward, Forwarded};
use crate::membership::{from_json, name_key, to_json};
use crate::node::Node;
use crate::{Consistency, MembershipError, StoreError, Txn};

/// Takes the new name, changes the label, gives the old name back. Repeating it ends what an
/// interrupted attempt began.
pub(crate) async fn rename_node(
    node: &Node,
    id: NodeId,
    name: &Name,
) -> Result<(), MembershipError> {
    let key = name_key(name.as_str());
    let (taken, _) = node.get(&key, Consistency::Linearizable).await?;
    let taken_by = taken.as_ref().map(from_json::<u64>).transpose()?;
    let refused = || {
        MembershipError::Invalid(format!(
            "a node named `{name}` is in the cluster already; choose another name"
        ))
    };
    if taken_by.is_some_and(|other| other != id.0) {
        return Err(refused());
    }
    let txn = Txn::new().if_absent(key.clone()).put(key.clone(), to_json(&id.0)?);
    if taken_by.is_none() && !node.txn(txn).await?.committed() {
        return Err(refused());
    }
    let limit = node.config().request_timeout;
    let rename = Forward::Rename { id: id.0, name: name.to_string() };
    match node.ask_leader(rename, Instant::now() + limit).await {
        Ok(Forwarded::Done) => {}
        Ok(Forwarded::UnknownNode) => return Err(MembershipError::UnknownNode(id.to_string())),
        Err(StoreError::UnknownOutcome { .. }) => return Err(MembershipError::Timeout(limit)),
        Ok(other) => return Err(StoreError::UnknownOutcome { why: format!("{other:?}") }.into()),
        Err(error) => return Err(error.into()),
    }
    let mut txn = Txn::new();
    for kv in node.range(&name_key(""), "", 0, Consistency::Linearizable, true).await?.kvs {
        if kv.key != key && from_json::<u64>(&kv)? == id.0 {
            txn = txn.if_revision(kv.key.clone(), kv.mod_revision).delete(kv.key);
        }
    }
    if !txn.is_empty() {
        node.txn(txn).await?;
    }
    Ok(())
}
