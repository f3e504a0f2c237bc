//! Carries out one action of a plan. Decides nothing: each action is one transaction that compares
//! what it was decided on, so a stale one changes nothing.

use std::sync::Arc;
use std::time::Duration;

use cluster::{Txn, TxnOutcome};
use ha_manager::{Action, Edit, FencedVm, VmRef, edits};
use proto::record::FencedRecord;
use proto::v1::tasks_client::TasksClient;
use proto::v1::vms_client::VmsClient;
use proto::v1::{GetTaskRequest, MigrateVmRequest};
use proto::{Name, NodeId, Revision, keys};
use tokio::sync::oneshot;

use super::fencing::{Fenced, FencingClaim, carry_out};
use super::leader::Epoch;
use super::observe::Snapshot;
use crate::events::stamped;
use crate::node::Node;
use crate::store::{giving_to, json};

/// Who asks for the moves of a drain.
pub(crate) const HA_USER: &str = "ha-manager";

/// A transaction that comes to nothing once another leader has begun to act.
fn txn_of(epoch: Epoch) -> Txn {
    Txn::new().if_revision(keys::HA_LEADER, epoch.revision)
}

/// Adds what an action writes to a transaction.
fn with_edits(mut txn: Txn, edits: Vec<Edit>) -> Txn {
    for Edit { vm, at, mut placement, gives_to, note } in edits {
        placement.note(stamped(&note));
        let key = keys::placement(&vm);
        txn = txn.if_revision(key.clone(), at).put(key, json(&placement));
        if let Some(to) = gives_to {
            txn = giving_to(txn, to);
        }
    }
    txn
}

/// Carries out one action. Returns when its transaction is settled, except for what may take long
/// (fencing, moving): that goes on by itself.
pub(super) async fn execute(node: &Arc<Node>, snapshot: &Snapshot, action: Action) {
    let Some(epoch) = node.leader.epoch() else { return };
    let edits = edits(&snapshot.state, &action);
    match action {
        Action::Fence { node: dead, fenced, vms, reason } => {
            let known = fenced != Revision(0);
            if let Some(claim) = node.leader.begin_fencing(dead, epoch, known) {
                // Nobody waits: what becomes of it is seen by the next plan.
                drop(fence(node, snapshot, claim, epoch, dead, fenced, &vms, &reason));
            }
        }
        Action::Migrate { vm, from, to, reason, .. } => {
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
        // No node says that it can be switched off from outside.
        Action::PowerOff { .. } => {}
        Action::Start { .. }
        | Action::Relocate { .. }
        | Action::Reassign { .. }
        | Action::Remember { .. }
        | Action::Stop { .. }
        | Action::Freeze { .. }
        | Action::Delay { .. }
        | Action::MarkUnplaceable { .. }
        | Action::MarkError { .. } => {
            let Some((vm, note)) = edits.first().map(|edit| (edit.vm.clone(), edit.note.clone()))
            else {
                return;
            };
            commit(node, &vm, &note, with_edits(txn_of(epoch), edits)).await;
        }
    }
}

async fn commit(node: &Node, vm: &Name, reason: &str, txn: Txn) {
    match node.cluster().txn(txn).await {
        Ok(TxnOutcome::Committed { .. }) => tracing::info!(%vm, "HA: {reason}"),
        Ok(TxnOutcome::Conflict { .. }) => {
            tracing::debug!(%vm, "HA: decided on old knowledge, planning again");
        }
        Err(error) => tracing::warn!(%vm, "HA: {error}"),
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
    let txn = txn_of(epoch).if_revision(key.clone(), fenced).put(key, json(&record));
    let action = Action::Fence { node: dead, fenced, vms: vms.to_vec(), reason: reason.to_owned() };
    let txn = with_edits(txn, edits(&snapshot.state, &action));
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
