//! `vm migrate`, on the owner: checks first, then phase migrating, then the two VM processes do
//! the copying and this agent commits.

use std::sync::Arc;
use std::time::Duration;

use cluster::{Cluster, Consistency, StoreError, Txn, TxnOutcome};
use ha_manager::{Denied, Mobility, NoPlace, check_target, owner, place};
use proto::record::{Phase, Placement};
use proto::v1::peer_client::PeerClient;
use proto::v1::{MigrateVmRequest, MigrationProgress};
use proto::{CpuModel, Name, NodeId, VmSpec, keys};
use tonic::Status;

use super::create::unknown_node;
use super::{no_task, unknown_vm};
use crate::api::forward::{Caller, channel, unreachable};
use crate::events::stamped;
use crate::ha::{HA_USER, Snapshot, observe};
use crate::migration::{CommitOutcome, MigrationError, SourceOptions, run_source};
use crate::node::Node;
use crate::store::{Versioned, giving_to, json};
use crate::supervisor::VmState;
use crate::task::{TaskContext, TaskFailure};

/// Moves a running VM to another node; gives the task's id.
///
/// # Errors
/// `NOT_FOUND`, `FAILED_PRECONDITION`: nothing was changed, not a byte was moved.
pub async fn migrate(
    node: &Arc<Node>,
    caller: &Caller,
    vm: &Name,
    request: MigrateVmRequest,
) -> Result<String, Status> {
    let snapshot = observe(node).await?;
    let observations = crate::ha::observations(node, caller, &snapshot).await?;
    let view = snapshot.state.vms.get(vm).ok_or_else(|| unknown_vm(vm))?;
    check_phase(node, vm, view.placement.phase)?;
    let refuse = |target: &str, why: Denied| {
        Status::failed_precondition(format!("VM `{vm}` cannot move to {target}: {why}"))
    };
    let target = if request.target.is_empty() {
        if view.mobility == Mobility::Bound {
            return Err(refuse("another node", Denied::NotShared));
        }
        place(&snapshot.state, &observations, &snapshot.policy, vm, view, true)
            .map_err(|NoPlace(denied)| Status::failed_precondition(NoPlace(denied).to_string()))?
    } else {
        let target = node.find(&request.target).ok_or_else(|| unknown_node(&request.target))?;
        check_target(&snapshot.state, &observations, &snapshot.policy, vm, view, target)
            .map_err(|denied| refuse(&request.target, denied))?;
        target
    };
    check_process(node, vm, &snapshot).await?;
    let (node_, vm_, user) = (node.clone(), vm.clone(), caller.user.clone());
    node.tasks
        .spawn("vm.migrate", vm.as_str(), &caller.user, move |task| async move {
            run(&node_, &task, &vm_, target, &user, &request).await
        })
        .map_err(no_task)
}

fn check_phase(node: &Node, vm: &Name, phase: Phase) -> Result<(), Status> {
    let refuse = |why: String| Err(Status::failed_precondition(format!("VM `{vm}` {why}")));
    match phase {
        Phase::Started => Ok(()),
        Phase::Migrating { target } => {
            refuse(format!("is being migrated to {} already", node.name_of(target)))
        }
        phase => {
            refuse(format!("is {}: only a running VM is migrated; start it first", phase.word()))
        }
    }
}

/// Whether the VM's process is in a state to be moved.
async fn check_process(node: &Node, vm: &Name, snapshot: &Snapshot) -> Result<(), Status> {
    let refuse = |why: String| Err(Status::failed_precondition(format!("VM `{vm}` {why}")));
    let spec = snapshot.documents.get(vm).and_then(|text| VmSpec::parse(text).ok());
    if spec.is_some_and(|spec| spec.cpu == CpuModel::Host) {
        return refuse(
            "has cpu = \"host\", which ties it to this node's processor; set cpu = \"baseline\" in \
             its document and start it anew"
                .to_owned(),
        );
    }
    match node.supervisor.status(vm).await.map(|vm| vm.state) {
        Ok(VmState::Running) => Ok(()),
        Ok(VmState::Paused) => refuse("is paused: resume it first".to_owned()),
        Ok(state) => refuse(format!("is not ready to move (its process is {})", state.word())),
        Err(error) => Err(Status::failed_precondition(error.to_string())),
    }
}

async fn run(
    node: &Arc<Node>,
    task: &TaskContext,
    vm: &Name,
    target: NodeId,
    user: &str,
    request: &MigrateVmRequest,
) -> Result<Option<serde_json::Value>, TaskFailure> {
    let job = node.jobs.begin(vm).await;
    let target_name = node.name_of(target);
    let here = node.name().to_string();
    let migrating = node
        .store
        .update_placement_if(
            vm,
            |placement| {
                if placement.owner != node.id || placement.phase != Phase::Started {
                    return Err(format!("VM `{vm}` is {} now", placement.phase.word()));
                }
                placement.phase = Phase::Migrating { target };
                if user != HA_USER {
                    // A person's wish takes the place of where HA would have brought it back to.
                    placement.home = None;
                }
                placement
                    .note(stamped(&format!("migration {here} → {target_name} asked by {user}")));
                Ok(())
            },
            || giving_to(Txn::new(), target),
        )
        .await?;
    task.log(format!("moving {vm} from {here} to {target_name}"));
    let done = copy(node, task, vm, target, &target_name, &migrating, request).await;
    match done {
        Ok(done) => {
            task.log(format!(
                "{vm} runs on {target_name}: {} ms in all, {} ms down, {} bytes, {} rounds",
                done.total_ms, done.downtime_ms, done.bytes, done.rounds
            ));
            drop(job);
            Ok(Some(serde_json::json!({
                "total_ms": done.total_ms,
                "downtime_ms": done.downtime_ms,
                "bytes": done.bytes,
                "rounds": done.rounds,
            })))
        }
        Err(error) => {
            settle(node, task, vm, &migrating, &error.to_string()).await;
            drop(job);
            Err(match error {
                MigrationError::Cancelled(_) => TaskFailure::Cancelled,
                error => TaskFailure::Failed(error.to_string()),
            })
        }
    }
}

/// Downtime and bandwidth that the request wants, or else the cluster's settings.
async fn limits(node: &Node, request: &MigrateVmRequest) -> (u32, u32) {
    let settings = node.store.settings(Consistency::Stale).await.unwrap_or_default().migration;
    let or = |wanted: u32, setting: u64| match wanted {
        0 => u32::try_from(setting).unwrap_or(u32::MAX),
        wanted => wanted,
    };
    let bandwidth_mib_s = settings.bandwidth.map_or(0, |bandwidth| bandwidth.0 >> 20);
    (
        or(request.downtime_limit_ms, settings.downtime.as_ms()),
        or(request.bandwidth_limit_mib_s, bandwidth_mib_s),
    )
}

async fn copy(
    node: &Arc<Node>,
    task: &TaskContext,
    vm: &Name,
    target: NodeId,
    target_name: &str,
    migrating: &Versioned<Placement>,
    request: &MigrateVmRequest,
) -> Result<proto::v1::MigrationDone, MigrationError> {
    let channel = channel(node, target)
        .map_err(|status| MigrationError::Target { name: vm.clone(), status })?;
    let peer = PeerClient::new(channel);
    let (downtime_limit_ms, bandwidth_limit_mib_s) = limits(node, request).await;
    let options = SourceOptions {
        migration_id: uuid::Uuid::new_v4().to_string(),
        source_node: node.id,
        downtime_limit_ms,
        bandwidth_limit_mib_s,
    };
    let mut committed = migrating.value.clone();
    let event = owner::committed(&mut committed, target, target_name);
    committed.note(stamped(&event));
    let key = keys::placement(vm);
    let txn = giving_to(Txn::new(), target)
        .if_revision(key.clone(), migrating.revision)
        .put(key, json(&committed))
        .named(format!("migrate-{}", options.migration_id), 1);
    let commit = {
        let (cluster, node) = (node.cluster().clone(), node.clone());
        let (vm, task) = (vm.clone(), task.clone());
        move || async move {
            task.log("all of it is over there; committing".to_owned());
            commit(&cluster, &node, &vm, txn, &committed).await
        }
    };
    let progress = {
        let task = task.clone();
        let mut round = 0;
        move |now: MigrationProgress| {
            if now.round != round {
                round = now.round;
                task.log(line(&now));
            }
            let total = now.bytes.saturating_add(now.remaining_bytes);
            task.progress(line(&now), now.bytes, total);
        }
    };
    let cancel = task.cancel().clone();
    let moved = run_source(&node.supervisor, vm, &peer, options, commit, progress, cancel).await;
    moved.map_err(|error| match error {
        MigrationError::Target { name, status } => {
            MigrationError::Target { name, status: unreachable(node, target, &status) }
        }
        error => error,
    })
}

fn line(now: &MigrationProgress) -> String {
    let known = |number: Option<u64>, unit: &str| {
        number.map_or_else(|| "unknown".to_owned(), |number| format!("{number} {unit}"))
    };
    format!(
        "{}, round {}: {} MiB moved, {} MiB left, {} MiB/s; dirtied: {}, expected downtime: {}",
        now.phase,
        now.round,
        now.bytes >> 20,
        now.remaining_bytes >> 20,
        now.bandwidth_bytes_s >> 20,
        known(now.dirty_bytes_s.map(|bytes| bytes >> 20), "MiB/s"),
        known(now.expected_downtime_ms, "ms")
    )
}

/// The commit: asks until the outcome is known. The VM stays paused meanwhile, as it must: whether
/// it is this node's or the target's is not known.
async fn commit(
    cluster: &Cluster,
    node: &Node,
    vm: &Name,
    txn: Txn,
    committed: &Placement,
) -> CommitOutcome {
    let mut may_be_written = false;
    loop {
        let why = match cluster.txn(txn.clone()).await {
            Ok(TxnOutcome::Committed { .. }) => {
                return CommitOutcome::Committed(committed.generation);
            }
            // It can no longer be written; what is written tells whose the VM is.
            Ok(TxnOutcome::Conflict { .. }) | Err(StoreError::Forgotten { .. }) => {
                match node.store.placement(vm).await {
                    Ok(present) => {
                        return settled(present.map(|p| p.value).as_ref(), committed, node.id);
                    }
                    Err(error) => format!("the outcome cannot be read yet: {error}"),
                }
            }
            Err(StoreError::Invalid(why) | StoreError::TooLarge(why)) => {
                return CommitOutcome::Refused(why);
            }
            // Nothing of it is in any log: the VM can go on here.
            Err(
                error @ (StoreError::NoQuorum { .. }
                | StoreError::DiskFull { .. }
                | StoreError::NoSpace { .. }),
            ) if !may_be_written => {
                return CommitOutcome::Refused(error.to_string());
            }
            Err(error) => {
                may_be_written = true;
                error.to_string()
            }
        };
        tracing::warn!(%vm, "committing the migration: {why}; asking again");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// What became of a commit that can no longer be written, by the placement that was read after.
/// Anything but this node's VM at the old generation must not run on here.
fn settled(present: Option<&Placement>, committed: &Placement, me: NodeId) -> CommitOutcome {
    let Some(present) = present.filter(|present| present.vm_id == committed.vm_id) else {
        return CommitOutcome::Gone("the VM was deleted meanwhile".to_owned());
    };
    if present.owner == committed.owner && present.generation == committed.generation {
        return CommitOutcome::Committed(committed.generation);
    }
    if present.owner == me && present.generation.next() == committed.generation {
        return CommitOutcome::Refused(
            "the placement was changed meanwhile, or the target was fenced".to_owned(),
        );
    }
    CommitOutcome::Gone(format!(
        "it was taken from this node meanwhile (it is {}, generation {})",
        present.phase.word(),
        present.generation
    ))
}

/// After a failure before the commit: the phase goes back to started, with what happened. If that
/// cannot be written now, the reconciler does it.
async fn settle(
    node: &Node,
    task: &TaskContext,
    vm: &Name,
    migrating: &Versioned<Placement>,
    why: &str,
) {
    let mut placement = migrating.value.clone();
    placement.phase = Phase::Started;
    placement.note(stamped(&format!("migration failed: {why}")));
    match node.store.put_placement_at(vm, migrating.revision, &placement).await {
        Ok(true) => {}
        Ok(false) => {
            let now = node
                .store
                .record::<Placement>(&keys::placement(vm), Consistency::Stale)
                .await
                .ok()
                .flatten();
            let now = now.map_or("gone", |now| now.value.phase.word());
            task.log(format!("the placement was changed meanwhile: {vm} is {now}"));
        }
        Err(error) => task.log(format!("the end of the migration is not written yet: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use proto::record::Requested;
    use proto::{Generation, VmId};

    use super::*;

    const ME: NodeId = NodeId(1);
    const TARGET: NodeId = NodeId(2);

    fn placement(owner: NodeId, generation: u64, phase: Phase) -> Placement {
        Placement {
            vm_id: VmId(uuid::Uuid::from_u128(7)),
            owner,
            generation: Generation(generation),
            phase,
            requested: Requested::Started,
            ha: true,
            cpus: 1,
            memory_bytes: 64 << 20,
            message: None,
            events: Vec::new(),
            start_failures: 0,
            tried: Vec::new(),
            home: None,
            lock: None,
            retry_at_unix_ms: None,
        }
    }

    #[test]
    fn what_is_not_measured_yet_is_not_called_nothing() {
        let mut now = MigrationProgress { phase: "precopy".into(), round: 1, ..Default::default() };
        let first = line(&now);
        assert!(first.ends_with("dirtied: unknown, expected downtime: unknown"), "{first}");
        now.dirty_bytes_s = Some(5 << 20);
        now.expected_downtime_ms = Some(0);
        let later = line(&now);
        assert!(later.ends_with("dirtied: 5 MiB/s, expected downtime: 0 ms"), "{later}");
    }

    #[test]
    fn after_a_conflict_the_vm_runs_on_here_only_as_this_nodes_at_the_old_generation() {
        let committed = placement(TARGET, 5, Phase::Started);
        let after = |present: Option<&Placement>| settled(present, &committed, ME);
        // The answer was lost, and a repetition met its own effect.
        assert_eq!(after(Some(&committed)), CommitOutcome::Committed(Generation(5)));
        let mine = placement(ME, 4, Phase::Migrating { target: TARGET });
        assert!(matches!(after(Some(&mine)), CommitOutcome::Refused(_)));
        // This node was fenced; the target was fenced right after the commit; started elsewhere.
        let mut another = placement(ME, 4, Phase::Started);
        another.vm_id = VmId(uuid::Uuid::from_u128(8));
        for gone in [
            placement(ME, 5, Phase::Recovering),
            placement(TARGET, 6, Phase::Recovering),
            placement(NodeId(3), 6, Phase::Starting),
            another,
        ] {
            assert!(matches!(after(Some(&gone)), CommitOutcome::Gone(_)), "{gone:?}");
        }
        assert!(matches!(after(None), CommitOutcome::Gone(_)));
    }
}
