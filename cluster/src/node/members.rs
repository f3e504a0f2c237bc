//! The members as Raft's configuration lists them.

use proto::NodeId;

use crate::Member;
use crate::consensus::Metrics;

/// All of them, by id.
pub(super) fn of(metrics: &Metrics) -> Vec<Member> {
    let membership = metrics.membership_config.membership();
    let voters: Vec<u64> = membership.voter_ids().collect();
    membership
        .nodes()
        .map(|(id, node)| Member {
            node_id: NodeId(*id),
            name: node.name.clone(),
            api_address: node.api_address.clone(),
            enrol_address: node.enrol_address.clone(),
            voter: voters.contains(id),
        })
        .collect()
}
