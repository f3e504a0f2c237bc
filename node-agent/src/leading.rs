//! Where the lead goes when its node is drained: it is about to be stopped.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use cluster::{Consistency, Member};
use proto::NodeId;

use crate::node::Node;

/// Who may lead instead of a drained node: voters that are neither drained themselves nor
/// witnesses. With nobody of that kind the drained node leads on: two that pass the lead to and fro
/// would keep a dead node from ever being declared dead.
fn heirs(members: &[Member], drained: &BTreeSet<NodeId>) -> Vec<NodeId> {
    let fit =
        |member: &&Member| member.voter && !member.witness && !drained.contains(&member.node_id);
    members.iter().filter(fit).map(|member| member.node_id).collect()
}

/// Has another node lead, where `from` leads and is drained.
pub async fn leave_if_drained(node: &Node, from: NodeId) {
    if node.cluster().leader() != Some(from) {
        return;
    }
    let records = match node.store.nodes(Consistency::Linearizable).await {
        Ok(records) => records,
        Err(error) => return tracing::debug!("who is drained: {error}"),
    };
    let drained = records.iter().filter(|(_, record)| record.value.maintenance);
    let drained: BTreeSet<NodeId> = drained.map(|(id, _)| *id).collect();
    if !drained.contains(&from) {
        return;
    }
    for heir in heirs(&node.cluster().members(), &drained) {
        match node.cluster().transfer_leader(Some(heir)).await {
            Ok(_) => return tracing::info!(node = %heir, "leads, as {from} is drained"),
            Err(error) => tracing::debug!(node = %heir, "does not lead instead: {error}"),
        }
    }
}

/// Looks for the agent's life.
pub(crate) async fn leave_while_drained(node: Arc<Node>) {
    loop {
        tokio::time::sleep(Duration::from_secs(2)).await;
        leave_if_drained(&node, node.id).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64, voter: bool, witness: bool) -> Member {
        Member {
            node_id: NodeId(id),
            name: format!("n{id}"),
            api_address: String::new(),
            enrol_address: String::new(),
            voter,
            zone: String::new(),
            witness,
        }
    }

    #[test]
    fn a_drained_node_leaves_the_lead_to_a_voter_that_stays() {
        let members = [
            member(1, true, false),
            member(2, true, false),
            member(3, true, true),
            member(4, false, false),
            member(5, true, false),
        ];
        assert_eq!(heirs(&members, &BTreeSet::from([NodeId(1)])), [NodeId(2), NodeId(5)]);
        let drained = BTreeSet::from([1, 2, 5].map(NodeId));
        assert_eq!(heirs(&members, &drained), []);
    }
}
