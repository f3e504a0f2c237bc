//! What the owner does to a VM on request: stop, shutdown, reset, pause, resume; and deletion.

use std::sync::Arc;
use std::time::Duration;

use cluster::FileChange;
use proto::record::{Phase, Placement, Requested};
use proto::{Name, keys};
use tonic::Status;

use super::shutdowns::Overrule;
use super::{no_task, unknown_vm};
use crate::api::forward::Caller;
use crate::documents::{self, Refusal, Wanted};
use crate::events::stamped;
use crate::jobs::Job;
use crate::node::Node;
use crate::supervisor::{Stop, VmError};
use crate::task::{TaskContext, TaskFailure};

impl From<VmError> for TaskFailure {
    fn from(error: VmError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<crate::store::UpdateError> for TaskFailure {
    fn from(error: crate::store::UpdateError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Whether a process of the VM may be there to be stopped.
fn runs(phase: Phase) -> bool {
    match phase {
        Phase::Starting
        | Phase::Started
        | Phase::Stopping
        | Phase::Migrating { .. }
        | Phase::Relocating { .. }
        | Phase::Frozen => true,
        Phase::Stopped | Phase::Recovering | Phase::Error | Phase::Unplaceable => false,
    }
}

async fn placement(node: &Node, vm: &Name) -> Result<Placement, Status> {
    let placement = node.store.placement(vm).await?;
    Ok(placement.ok_or_else(|| unknown_vm(vm))?.value)
}

fn refuse_migrating(vm: &Name, phase: Phase) -> Result<(), String> {
    match phase {
        Phase::Migrating { .. } => {
            Err(format!("VM `{vm}` is being migrated: cancel that task or wait for its end"))
        }
        _ => Ok(()),
    }
}

/// Stops a VM at once (its disks are flushed); gives the task's id. For the owner, or for anyone
/// where the VM runs nowhere.
///
/// # Errors
/// `NOT_FOUND`, `FAILED_PRECONDITION`: nothing was changed.
pub async fn stop(node: &Arc<Node>, caller: &Caller, vm: &Name) -> Result<String, Status> {
    let present = placement(node, vm).await?;
    refuse_migrating(vm, present.phase).map_err(Status::failed_precondition)?;
    if present.phase == Phase::Stopped && present.requested == Requested::Stopped {
        return Err(Status::failed_precondition(format!("VM `{vm}` is not running")));
    }
    let (node_, vm_, user) = (node.clone(), vm.clone(), caller.user.clone());
    node.tasks
        .spawn("vm.stop", vm.as_str(), &caller.user, move |task| async move {
            let why = format!("stop asked by {user}, task {}", task.id());
            overrule_shutdowns(&node_, &task, &vm_, &Overrule { why, ends: true });
            let job = node_.jobs.begin(&vm_).await;
            end(&node_, &task, &vm_, &user, job, node_.supervisor.stop(&vm_, Stop::Graceful)).await
        })
        .map_err(no_task)
}

/// Presses the power button and waits for the guest; gives the task's id. For the owner.
///
/// # Errors
/// `NOT_FOUND`, `FAILED_PRECONDITION`: nothing was changed.
pub async fn shutdown(
    node: &Arc<Node>,
    caller: &Caller,
    vm: &Name,
    timeout_s: u32,
    force: bool,
) -> Result<String, Status> {
    let present = placement(node, vm).await?;
    refuse_migrating(vm, present.phase).map_err(Status::failed_precondition)?;
    running_here(node, vm, &present)?;
    let timeout = Duration::from_secs(match timeout_s {
        0 => 60,
        seconds => u64::from(seconds),
    });
    let (node_, vm_, user) = (node.clone(), vm.clone(), caller.user.clone());
    node.tasks
        .spawn("vm.shutdown", vm.as_str(), &caller.user, move |task| async move {
            press_power_button(&node_, &task, &vm_, &user, timeout, force).await
        })
        .map_err(no_task)
}

/// Tells the VM's shutdowns that something else takes their place.
fn overrule_shutdowns(node: &Node, task: &TaskContext, vm: &Name, overrule: &Overrule) {
    let count = node.shutdowns.overrule(vm, overrule);
    if count > 0 {
        task.log(format!("{count} shutdown of {vm} under way: cancelled for this"));
    }
}

/// Why a shutdown gave up waiting for its guest.
enum GaveUp {
    Cancelled,
    Overruled(Overrule),
}

impl From<GaveUp> for TaskFailure {
    fn from(gave_up: GaveUp) -> Self {
        match gave_up {
            GaveUp::Cancelled => Self::Cancelled,
            GaveUp::Overruled(overrule) => Self::Overruled(overrule.why),
        }
    }
}

async fn press_power_button(
    node: &Node,
    task: &TaskContext,
    vm: &Name,
    user: &str,
    timeout: Duration,
    force: bool,
) -> Result<Option<serde_json::Value>, TaskFailure> {
    let shutdown = node.shutdowns.begin(vm);
    let gave_up = || async {
        tokio::select! {
            overrule = shutdown.overruled() => GaveUp::Overruled(overrule),
            () = task.cancel().cancelled() => GaveUp::Cancelled,
        }
    };
    let job = tokio::select! {
        job = node.jobs.begin(vm) => job,
        gave_up = gave_up() => return Err(gave_up.into()),
    };
    let stopping = async {
        task.progress("waiting for the guest", 0, 0);
        tokio::select! {
            stopped = node.supervisor.stop(vm, Stop::PowerButton { timeout, force }) => {
                stopped.map_err(Ended::from)
            }
            gave_up = gave_up() => Err(Ended::GaveUp(gave_up)),
        }
    };
    end(node, task, vm, user, job, stopping).await
}

/// Why a VM that was to end has not, as far as is known.
enum Ended {
    GaveUp(GaveUp),
    Failed(VmError),
}

impl From<VmError> for Ended {
    fn from(error: VmError) -> Self {
        Self::Failed(error)
    }
}

impl From<Ended> for TaskFailure {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::GaveUp(gave_up) => gave_up.into(),
            Ended::Failed(error) => error.into(),
        }
    }
}

/// Says that the VM is to end, lets `stopping` end it, and says what became of it.
async fn end<E: Into<Ended>>(
    node: &Node,
    task: &TaskContext,
    vm: &Name,
    user: &str,
    job: Job,
    stopping: impl Future<Output = Result<(), E>>,
) -> Result<Option<serde_json::Value>, TaskFailure> {
    let changed = node
        .store
        .update_placement(vm, |placement| {
            refuse_migrating(vm, placement.phase)?;
            placement.requested = Requested::Stopped;
            placement.note(stamped(&format!("stop asked by {user}")));
            placement.phase = match runs(placement.phase) {
                true => Phase::Stopping,
                false => Phase::Stopped,
            };
            Ok(())
        })
        .await?;
    if changed.value.phase == Phase::Stopped {
        task.log(format!("{vm} was not running; it is not started again"));
        return Ok(None);
    }
    if changed.value.owner != node.id {
        drop(job);
        return Err(TaskFailure::Failed(format!(
            "VM `{vm}` moved to {} meanwhile, which stops it",
            node.name_of(changed.value.owner)
        )));
    }
    task.progress("stopping", 0, 0);
    let stopped = stopping.await.map_err(Into::into);
    if let Err(Ended::GaveUp(GaveUp::Overruled(overrule))) = &stopped
        && overrule.ends
    {
        // Whoever ends it now finds it stopping, and so does the reconciler if nobody does.
        drop(job);
        return Err(TaskFailure::Overruled(overrule.why.clone()));
    }
    let still_runs = stopped.is_err() && node.supervisor.get(vm).is_some();
    node.store
        .update_placement(vm, |placement| {
            if placement.owner != node.id || placement.phase != Phase::Stopping {
                return Ok(());
            }
            if still_runs {
                placement.phase = Phase::Started;
                placement.requested = Requested::Started;
                placement.note(stamped("it runs on"));
            } else {
                placement.phase = Phase::Stopped;
                placement.message = None;
                placement.note(stamped("stopped"));
            }
            Ok(())
        })
        .await?;
    drop(job);
    stopped?;
    task.log(format!("{vm} is stopped"));
    Ok(None)
}

fn running_here(node: &Node, vm: &Name, placement: &Placement) -> Result<(), Status> {
    if placement.owner == node.id && node.supervisor.get(vm).is_some() {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "VM `{vm}` is {}, not running{}",
        placement.phase.word(),
        if runs(placement.phase) { " yet" } else { ": start it first" }
    )))
}

/// What is done to a running VM without changing its placement.
#[derive(Debug, Clone, Copy)]
enum Press {
    Reset,
    Pause,
    Resume,
}

async fn press(
    node: &Arc<Node>,
    caller: &Caller,
    vm: &Name,
    press: Press,
) -> Result<String, Status> {
    let present = placement(node, vm).await?;
    refuse_migrating(vm, present.phase).map_err(Status::failed_precondition)?;
    running_here(node, vm, &present)?;
    let kind = match press {
        Press::Reset => "vm.reset",
        Press::Pause => "vm.pause",
        Press::Resume => "vm.resume",
    };
    let (node_, vm_, user) = (node.clone(), vm.clone(), caller.user.clone());
    node.tasks
        .spawn(kind, vm.as_str(), &caller.user, move |task| async move {
            if matches!(press, Press::Reset) {
                let why = format!("reset asked by {user}, task {}", task.id());
                overrule_shutdowns(&node_, &task, &vm_, &Overrule { why, ends: false });
            }
            let _job = node_.jobs.begin(&vm_).await;
            match press {
                Press::Reset => node_.supervisor.reset(&vm_).await?,
                Press::Pause => node_.supervisor.pause(&vm_).await?,
                Press::Resume => node_.supervisor.resume(&vm_).await?,
            }
            task.log(format!("{kind} of {vm_}: done"));
            Ok(None)
        })
        .map_err(no_task)
}

/// Presses the reset button; for the owner. Gives the task's id.
///
/// # Errors
/// `NOT_FOUND`, `FAILED_PRECONDITION`.
pub async fn reset(node: &Arc<Node>, caller: &Caller, vm: &Name) -> Result<String, Status> {
    press(node, caller, vm, Press::Reset).await
}

/// Stops the vCPUs and keeps all else; for the owner. Gives the task's id.
///
/// # Errors
/// `NOT_FOUND`, `FAILED_PRECONDITION`.
pub async fn pause(node: &Arc<Node>, caller: &Caller, vm: &Name) -> Result<String, Status> {
    press(node, caller, vm, Press::Pause).await
}

/// Lets the vCPUs run again; for the owner. Gives the task's id.
///
/// # Errors
/// `NOT_FOUND`, `FAILED_PRECONDITION`.
pub async fn resume(node: &Arc<Node>, caller: &Caller, vm: &Name) -> Result<String, Status> {
    press(node, caller, vm, Press::Resume).await
}

/// Deletes a VM that runs nowhere: document, placement and disk claims in one transaction. Its
/// disk images stay. Gives the task's id.
///
/// # Errors
/// `NOT_FOUND`, `FAILED_PRECONDITION`: nothing was changed.
pub async fn delete(node: &Arc<Node>, caller: &Caller, vm: &Name) -> Result<String, Status> {
    let present = placement(node, vm).await?;
    deletable(vm, &present).map_err(Status::failed_precondition)?;
    let (node_, vm_, caller_) = (node.clone(), vm.clone(), caller.clone());
    node.tasks
        .spawn("vm.delete", vm.as_str(), &caller.user, move |task| async move {
            remove(&node_, &caller_, &vm_).await?;
            task.log(format!(
                "{vm_} is deleted; its disk images are kept, see `clusterctl image list`"
            ));
            Ok(None)
        })
        .map_err(no_task)
}

fn deletable(vm: &Name, placement: &Placement) -> Result<(), String> {
    match placement.phase {
        Phase::Stopped | Phase::Error | Phase::Unplaceable => Ok(()),
        phase => {
            Err(format!("VM `{vm}` is {}: stop it first (`clusterctl vm stop {vm}`)", phase.word()))
        }
    }
}

async fn remove(node: &Arc<Node>, caller: &Caller, vm: &Name) -> Result<(), Status> {
    let change = [FileChange::remove(keys::vm_document(vm))];
    match documents::commit(node, caller, &change, &Wanted::default()).await? {
        Ok(_) => Ok(()),
        Err(refusals) => Err(refusals.first().map_or_else(|| unknown_vm(vm), Refusal::status)),
    }
}
