//! `node fence NODE`, on the leader: the plan step of `ha-manager`, carried out as one transaction.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ha_manager::{Action, ByHand, FenceDenied, plan_by_hand};
use proto::NodeId;
use proto::v1::ReleasedVm;
use tonic::Status;

use super::execute::fence;
use super::fencing::Fenced;
use super::observe::{Snapshot, observe};
use crate::node::Node;

/// How long others (the plan's own fencing, changes of the VMs) may keep this one from its turn.
const TURN_LIMIT: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_millis(200);

/// Fences a node that is lost for good, on the word of `user` that its machine is off: its VMs'
/// generations rise, and those that are not highly available are stopped, to be started where they
/// can run. Says what became of each.
///
/// # Errors
/// `FAILED_PRECONDITION`: it is heard, its lease may still run, or the person did not say that the
/// machine is off; nothing was changed. `UNAVAILABLE`: this node does not lead, or the outcome
/// cannot be learnt; asking again is safe.
pub async fn fence_by_hand(
    node: &Arc<Node>,
    target: NodeId,
    machine_is_off: bool,
    user: &str,
) -> Result<Vec<ReleasedVm>, Status> {
    let begin = Instant::now();
    loop {
        let snapshot = observe(node).await?;
        let observations = node.leader.observations(snapshot.state.nodes.keys().copied());
        let timing = node.lease.timing();
        let planned =
            plan_by_hand(&snapshot.state, &observations, timing, target, machine_is_off, user);
        let planned = planned.map_err(|denied| refused(node, target, denied))?;
        match carry_out(node, &snapshot, &planned).await? {
            Some(Fenced::Committed) => {
                tracing::warn!(node = %target, user, "fenced by hand");
                return Ok(released(&snapshot, &planned));
            }
            Some(Fenced::Failed(why)) => return Err(Status::unavailable(why)),
            Some(Fenced::Overtaken) | None if begin.elapsed() < TURN_LIMIT => {
                tokio::time::sleep(AGAIN).await;
            }
            Some(Fenced::Overtaken) | None => {
                return Err(Status::aborted(format!(
                    "node {} is being fenced by the HA manager, or its VMs are being changed; try again",
                    node.name_of(target)
                )));
            }
        }
    }
}

/// `None`: another fencing of the node is under way.
async fn carry_out(
    node: &Arc<Node>,
    snapshot: &Snapshot,
    planned: &ByHand,
) -> Result<Option<Fenced>, Status> {
    let epoch = node.leader.epoch();
    let epoch = epoch.ok_or_else(|| Status::unavailable(FenceDenied::NotLeading.to_string()))?;
    let Action::Fence { node: dead, fenced, vms, reason } = &planned.action else {
        return Err(Status::internal("internal error: not a fencing"));
    };
    // Dead, and not merely fenced once: a node that is heard again is not taken anything from.
    let Some(claim) = node.leader.begin_fencing(*dead, epoch, false) else { return Ok(None) };
    let outcome = fence(node, snapshot, claim, epoch, *dead, *fenced, vms, reason);
    let outcome = outcome.await;
    outcome.map(Some).map_err(|_| Status::unavailable("the agent is ending"))
}

fn refused(node: &Node, target: NodeId, denied: FenceDenied) -> Status {
    let text = format!("node {} is not fenced: {denied}", node.name_of(target));
    match denied {
        FenceDenied::NoSuchNode => Status::not_found(text),
        FenceDenied::NotLeading => Status::unavailable(text),
        FenceDenied::Heard { .. } | FenceDenied::LeaseMayRun { .. } | FenceDenied::Unconfirmed => {
            Status::failed_precondition(text)
        }
    }
}

fn released(snapshot: &Snapshot, planned: &ByHand) -> Vec<ReleasedVm> {
    let of = |(name, (phase, bound)): (proto::Name, (proto::record::Phase, bool))| ReleasedVm {
        ha: snapshot.state.vms.get(&name).is_some_and(|vm| vm.placement.ha),
        vm: name.to_string(),
        bound,
        phase: phase.word().to_owned(),
    };
    planned.released().into_iter().map(of).collect()
}
