//! The members as Raft's configuration lists them.

use std::time::Duration;

use proto::NodeId;

use super::Node;
use crate::Member;
use crate::consensus::{Forward, Forwarded, MemberNode, Metrics, change};

/// How long another voter may take to be elected.
const HAND_OVER: Duration = Duration::from_secs(2);

/// All of them, by id.
pub(super) fn of(metrics: &Metrics) -> Vec<Member> {
    let membership = metrics.membership_config.membership();
    // While the voters are changed: those who vote before and after it.
    let sets = membership.get_joint_config();
    membership
        .nodes()
        .map(|(id, node)| Member {
            node_id: NodeId(*id),
            name: node.name.clone(),
            api_address: node.api_address.clone(),
            enrol_address: node.enrol_address.clone(),
            voter: sets.iter().all(|voters| voters.contains(id)),
            zone: node.zone.clone(),
            witness: node.witness,
        })
        .collect()
}

impl Node {
    /// Notes where the members are reached now, and what this one is called.
    pub(super) fn follow_members(&self, metrics: &Metrics) {
        let membership = metrics.membership_config.membership();
        for (id, node) in membership.nodes() {
            self.peers.note(*id, &node.api_address);
        }
        if let Some(me) = membership.get_node(&self.id().0) {
            self.label.send_if_modified(|label| {
                let changed = *label != me.name;
                label.clone_from(&me.name);
                changed
            });
        }
    }

    /// Where the membership says something else of this node than its configuration (it came up at
    /// another address, in another zone), the leader is asked to change that.
    pub(super) async fn describe(&self) {
        let metrics = self.metrics();
        let me = self.id().0;
        let Some(present) = metrics.membership_config.membership().get_node(&me) else { return };
        let node = MemberNode::of(&present.name, self.config());
        if node == *present {
            return;
        }
        tracing::info!(address = %node.api_address, zone = %node.zone, "telling the cluster what this node is now");
        let answer = self.ask_leader(Forward::Describe { id: me, node }, self.deadline()).await;
        if !matches!(answer, Ok(Forwarded::Done)) {
            tracing::warn!(?answer, "the cluster does not know yet");
        }
    }

    /// Where this node leads: another voter leads instead, if one answers.
    pub(crate) async fn hand_over(&self) {
        if !self.leads() {
            return;
        }
        let (me, silence) = (self.id().0, self.silence_limit());
        let answer = change::transfer(&self.raft, me, None, HAND_OVER, silence).await;
        tracing::info!(?answer, "handing leadership over");
    }
}
