//! `vm start`, on the leader: makes sure that the owner can take the VM (or gives it to a node that
//! can), says "starting" in the placement, and waits for what the owner makes of it.

use std::sync::Arc;

use cluster::Txn;
use ha_manager::{Mobility, check_start, owner, place};
use proto::record::{Phase, Placement, Requested};
use proto::{Generation, Name, NodeId};
use tonic::Status;

use super::{no_task, unknown_vm};
use crate::api::forward::Caller;
use crate::events::stamped;
use crate::ha::observe;
use crate::node::Node;
use crate::store::giving_to;
use crate::task::{TaskContext, TaskFailure};

/// Starts a VM that runs nowhere; gives the task's id.
///
/// # Errors
/// `NOT_FOUND`, `FAILED_PRECONDITION`: nothing was changed.
pub async fn start(node: &Arc<Node>, caller: &Caller, vm: &Name) -> Result<String, Status> {
    let snapshot = observe(node).await?;
    let observations = node.leader.observations(snapshot.state.nodes.keys().copied());
    let view = snapshot.state.vms.get(vm).ok_or_else(|| unknown_vm(vm))?;
    startable(vm, &view.placement, &node.name_of(view.placement.owner))
        .map_err(Status::failed_precondition)?;
    let owner = view.placement.owner;
    let (state, policy) = (&snapshot.state, &snapshot.policy);
    let to = match check_start(state, &observations, policy, vm, view, owner) {
        Ok(()) => owner,
        Err(_) if view.mobility != Mobility::Bound => {
            place(state, &observations, policy, vm, view, false)
                .map_err(|none| Status::failed_precondition(none.to_string()))?
        }
        Err(denied) => {
            return Err(Status::failed_precondition(format!(
                "VM `{vm}` cannot start on {}, where its files are: {denied}",
                node.name_of(owner)
            )));
        }
    };
    let (generation, to_name) = request(node, caller, vm, to).await?;
    let node_ = node.clone();
    let vm_ = vm.clone();
    node.tasks
        .spawn("vm.start", vm.as_str(), &caller.user, move |task| async move {
            task.log(format!("{to_name} is to start {vm_}, generation {generation}"));
            wait(&node_, &task, &vm_, generation, &to_name).await
        })
        .map_err(no_task)
}

/// Whether a VM in this state may be started, and why not.
fn startable(vm: &Name, placement: &Placement, owner: &str) -> Result<(), String> {
    match placement.phase {
        Phase::Stopped | Phase::Error | Phase::Unplaceable | Phase::Recovering => Ok(()),
        Phase::Frozen => Err(format!(
            "VM `{vm}` is frozen while {owner} is down as planned: it starts when that is back"
        )),
        Phase::Started | Phase::Migrating { .. } | Phase::Relocating { .. } => {
            Err(format!("VM `{vm}` already runs on {owner}"))
        }
        Phase::Starting => Err(format!("VM `{vm}` is being started on {owner}")),
        Phase::Stopping => {
            Err(format!("VM `{vm}` is being stopped on {owner}; start it when it is stopped"))
        }
    }
}

async fn request(
    node: &Node,
    caller: &Caller,
    vm: &Name,
    to: NodeId,
) -> Result<(Generation, String), Status> {
    let to_name = node.name_of(to);
    let changed = node
        .store
        .update_placement_if(
            vm,
            |placement| {
                startable(vm, placement, &node.name_of(placement.owner))?;
                placement.owner = to;
                placement.generation = placement.generation.next();
                placement.phase = Phase::Starting;
                placement.requested = Requested::Started;
                owner::forget_failures(placement);
                placement.home = None;
                placement.retry_at_unix_ms = None;
                placement.message = None;
                placement.note(stamped(&format!("start on {to_name} asked by {}", caller.user)));
                Ok(())
            },
            || giving_to(Txn::new(), to),
        )
        .await?;
    Ok((changed.value.generation, to_name))
}

/// Waits for the owner's word.
async fn wait(
    node: &Node,
    task: &TaskContext,
    vm: &Name,
    generation: Generation,
    to: &str,
) -> Result<Option<serde_json::Value>, TaskFailure> {
    task.progress("starting", 0, 0);
    let outcome = node.board.wait_for(|view| {
        let Some(placement) = view.placements.get(vm).map(|placement| &placement.value) else {
            // Not applied here yet, or deleted meanwhile.
            return (view.revision.0 > 0 && node.board.get(vm).is_none()).then(|| {
                Err(TaskFailure::Failed(format!("VM `{vm}` was deleted while it started")))
            });
        };
        if placement.generation < generation {
            return None;
        }
        let message = placement.message.clone();
        match placement.phase {
            Phase::Started | Phase::Migrating { .. } => Some(Ok(placement.owner)),
            // An HA VM that failed here is tried elsewhere.
            Phase::Starting
            | Phase::Recovering
            | Phase::Stopping
            | Phase::Relocating { .. }
            | Phase::Frozen => None,
            Phase::Stopped => {
                Some(Err(TaskFailure::Failed(format!("VM `{vm}` was stopped again"))))
            }
            Phase::Error | Phase::Unplaceable => {
                Some(Err(TaskFailure::Failed(message.unwrap_or_else(|| "it failed".to_owned()))))
            }
        }
    });
    tokio::select! {
        outcome = outcome => {
            let owner = outcome.unwrap_or_else(|| Err(TaskFailure::Failed("the agent is ending".into())))?;
            let name = node.name_of(owner);
            task.log(format!("{vm} runs on {name}"));
            Ok(Some(serde_json::json!({ "node": name })))
        }
        () = task.cancel().cancelled() => Err(TaskFailure::Failed(format!(
            "no longer waiting; {to} goes on starting `{vm}`: use `clusterctl vm stop {vm}`"
        ))),
    }
}
