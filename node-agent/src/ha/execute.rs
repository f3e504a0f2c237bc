//! Carries out one action of a plan. Decides nothing: each action is one transaction that compares
//! what it was decided on, so a stale one changes nothing.

use std::sync::Arc;
use std::time::Duration;

use cluster::{Txn, TxnOutcome};
use ha_manager::{Action, FencedVm, VmRef};
use proto::record::{FencedRecord, Phase, Placement, Requested};
use proto::v1::tasks_client::TasksClient;
use proto::v1::vms_client::VmsClient;
use proto::v1::{GetTaskRequest, MigrateVmRequest};
use proto::{NodeId, Revision, keys};
use tokio::sync::oneshot;

use super::fencing::{Fenced, FencingClaim, carry_out};
use super::leader::Epoch;
use super::observe::Snapshot;
use crate::events::stamped;
use crate::node::Node;
use crate::store::{giving_to, json};

/// Who asks for the moves of a drain.
pub(super) const HA_USER: &str = "ha-manager";

/// A transaction that comes to nothing once another leader has begun to act.
fn txn_of(epoch: Epoch) -> Txn {
    Txn::new().if_revision(keys::HA_LEADER, epoch.revision)
}

/// Adds the VM's placement, changed, to a transaction.
fn with_placement(
    txn: Txn,
    snapshot: &Snapshot,
    vm: &VmRef,
    change: impl FnOnce(&mut Placement),
) -> Option<Txn> {
    let mut placement = snapshot.state.vms.get(&vm.name)?.placement.clone();
    change(&mut placement);
    let key = keys::placement(&vm.name);
    Some(txn.if_revision(key.clone(), vm.mod_revision).put(key, json(&placement)))
}

/// Carries out one action. Returns when its transaction is settled, except for what may take long
/// (fencing, moving): that goes on by itself.
pub(super) async fn execute(node: &Arc<Node>, snapshot: &Snapshot, action: Action) {
    let Some(epoch) = node.leader.epoch() else { return };
    match action {
        Action::Fence { node: dead, fenced, vms, reason } => {
            let known = fenced != Revision(0);
            if let Some(claim) = node.leader.begin_fencing(dead, epoch, known) {
                // Nobody waits: what becomes of it is seen by the next plan.
                drop(fence(node, snapshot, claim, epoch, dead, fenced, &vms, &reason));
            }
        }
        Action::Start { vm, to, reason } => {
            let txn = giving_to(txn_of(epoch), to);
            let txn = with_placement(txn, snapshot, &vm, |placement| {
                placement.owner = to;
                placement.generation = placement.generation.next();
                placement.phase = Phase::Starting;
                placement.message = None;
                placement.retry_at_unix_ms = None;
                placement.note(stamped(&reason));
            });
            commit(node, &vm, &reason, txn).await;
        }
        Action::Delay { vm, until_unix_ms, reason } => {
            let txn = with_placement(txn_of(epoch), snapshot, &vm, |placement| {
                placement.retry_at_unix_ms = Some(until_unix_ms);
                placement.note(stamped(&reason));
            });
            commit(node, &vm, &reason, txn).await;
        }
        Action::Reassign { vm, to, reason } => {
            let txn = giving_to(txn_of(epoch), to);
            let txn = with_placement(txn, snapshot, &vm, |placement| {
                placement.owner = to;
                placement.generation = placement.generation.next();
                placement.note(stamped(&reason));
            });
            commit(node, &vm, &reason, txn).await;
        }
        Action::MarkUnplaceable { vm, message } => {
            let txn = with_placement(txn_of(epoch), snapshot, &vm, |placement| {
                placement.phase = Phase::Unplaceable;
                placement.note(stamped(&message));
                placement.message = Some(message.clone());
            });
            commit(node, &vm, &message, txn).await;
        }
        Action::MarkError { vm, message } => {
            let txn = with_placement(txn_of(epoch), snapshot, &vm, |placement| {
                placement.phase = Phase::Error;
                placement.retry_at_unix_ms = None;
                placement.note(stamped(&message));
                placement.message = Some(message.clone());
            });
            commit(node, &vm, &message, txn).await;
        }
        Action::Migrate { vm, from, to, reason } => {
            if node.leader.begin_move(&vm.name) {
                tracing::info!(vm = %vm.name, "{reason}");
                let node = node.clone();
                tokio::spawn(async move {
                    let moved = migrate(&node, &vm, from, to).await;
                    if let Err(status) = &moved {
                        tracing::warn!(vm = %vm.name, "moving it failed: {}", status.message());
                    }
                    node.leader.end_move(&vm.name, moved.is_ok());
                });
            }
        }
    }
}

async fn commit(node: &Node, vm: &VmRef, reason: &str, txn: Option<Txn>) {
    let Some(txn) = txn else { return };
    match node.cluster().txn(txn).await {
        Ok(TxnOutcome::Committed { .. }) => tracing::info!(vm = %vm.name, "HA: {reason}"),
        Ok(TxnOutcome::Conflict { .. }) => {
            tracing::debug!(vm = %vm.name, "HA: decided on old knowledge, planning again");
        }
        Err(error) => tracing::warn!(vm = %vm.name, "HA: {error}"),
    }
}

/// Fences a node, in a task of its own: its outcome may be long in coming, and everything else
/// goes on meanwhile.
#[expect(clippy::too_many_arguments, reason = "an action's fields, and who carries it out")]
pub(super) fn fence(
    node: &Arc<Node>,
    snapshot: &Snapshot,
    claim: FencingClaim,
    epoch: Epoch,
    dead: NodeId,
    fenced: Revision,
    vms: &[FencedVm],
    reason: &str,
) -> oneshot::Receiver<Fenced> {
    let record = FencedRecord { term: epoch.term, by: node.id, reason: reason.to_owned() };
    let key = keys::fenced(dead);
    let mut txn = txn_of(epoch).if_revision(key.clone(), fenced).put(key, json(&record));
    for FencedVm { vm, phase } in vms {
        let changed = with_placement(txn.clone(), snapshot, vm, |placement| {
            placement.generation = placement.generation.next();
            placement.phase = *phase;
            if *phase == Phase::Stopped {
                placement.requested = Requested::Stopped;
            }
            placement
                .note(stamped(&format!("{reason}: fenced; generation {}", placement.generation)));
        });
        if let Some(changed) = changed {
            txn = changed;
        }
    }
    // Named, so that asking again tells the outcome instead of doing it twice.
    let txn = txn.named(format!("fence-{}-{}", node.id, uuid::Uuid::new_v4()), 1);
    let cluster = node.cluster().clone();
    carry_out(claim, reason.to_owned(), move || {
        let (cluster, txn) = (cluster.clone(), txn.clone());
        async move { cluster.txn(txn).await }
    })
}

/// Asks the owner to move the VM, and waits for its task.
async fn migrate(node: &Node, vm: &VmRef, from: NodeId, to: NodeId) -> Result<(), tonic::Status> {
    let request =
        MigrateVmRequest { vm: vm.name.to_string(), target: to.to_string(), ..Default::default() };
    let channel = node
        .cluster()
        .peer_channel(from)
        .map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    let mut request = tonic::Request::new(request);
    crate::api::forward::set_user(&mut request, HA_USER);
    let task_id = VmsClient::new(channel.clone()).migrate(request).await?.into_inner().task_id;
    let mut tasks = TasksClient::new(channel);
    loop {
        let task = tasks.get(GetTaskRequest { task_id: task_id.clone() }).await?.into_inner();
        match task.state.as_str() {
            "running" => tokio::time::sleep(Duration::from_millis(500)).await,
            "done" => return Ok(()),
            _ => return Err(tonic::Status::aborted(task.error)),
        }
    }
}
