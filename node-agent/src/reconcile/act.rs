//! Carries out one [`Step`] for one VM, whose job the caller holds.

use ha_manager::owner::{self, Ended, Step};
use proto::Name;
use proto::record::{Phase, Placement};

use super::{Memory, launch};
use crate::events::stamped;
use crate::node::Node;
use crate::store::{RecordError, Versioned, giving_to, json};
use crate::supervisor::{ExitReason, RunningVm, StartError, Stop, VmError};

/// Why a step was not done; it is tried again.
#[derive(Debug, thiserror::Error)]
pub(super) enum ActError {
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Store(#[from] cluster::StoreError),
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error("the placement changed meanwhile")]
    Changed,
    #[error("its process ended meanwhile")]
    Ended,
}

/// Reads the placement from a quorum and the process's state from itself, decides, acts. `known`: the
/// VM had a process at the look that led to this.
pub(super) async fn act(
    node: &Node,
    memory: &Memory,
    vm: &Name,
    known: bool,
    forget_failures: bool,
) -> Result<(), ActError> {
    // Before the placement is read: until then nobody else is given what it says is this node's.
    let deadline_ns = node.lease.deadline_ns();
    let placement = node.store.placement(vm).await?;
    let process = match node.supervisor.get(vm) {
        Some(_) => node.supervisor.status(vm).await.ok(),
        None => None,
    };
    if known && process.is_none() {
        // It has ended since. The next look has its reason.
        return Err(ActError::Ended);
    }
    let starting = process.is_none() && node.supervisor.is_busy(vm);
    let value = placement.as_ref().map(|placement| &placement.value);
    let seen = process.as_ref().map(RunningVm::seen);
    let step = owner::decide(node.id, value, seen.as_ref(), starting, node.lease.may_start());
    let (placement, process) = (placement.as_ref(), process.as_ref());
    let acting = Acting { node, vm, deadline_ns, placement, process };
    match step {
        Step::Leave if forget_failures => acting.put(owner::forget_failures).await,
        Step::Leave => Ok(()),
        Step::Start => acting.start().await,
        Step::MarkStarted => acting.mark_started().await,
        Step::MarkLost => acting.mark_lost(memory).await,
        Step::Stop => acting.stop().await,
        Step::MarkStopped => acting.mark_stopped().await,
        Step::Kill => acting.kill().await,
        Step::ResolveCommit { committed } => acting.resolve_commit(committed).await,
        Step::RunIncoming => acting.run_incoming().await,
        Step::SettleMigration => acting.settle_migration().await,
        Step::HandOver => acting.hand_over().await,
    }
}

struct Acting<'a> {
    node: &'a Node,
    vm: &'a Name,
    /// The lease's, from before the placement was read.
    deadline_ns: Option<u64>,
    placement: Option<&'a Versioned<Placement>>,
    process: Option<&'a RunningVm>,
}

impl Acting<'_> {
    /// Puts the placement, changed, if it is still as it was read.
    async fn put(&self, change: impl FnOnce(&mut Placement)) -> Result<(), ActError> {
        let Some(present) = self.placement else { return Ok(()) };
        let mut placement = present.value.clone();
        change(&mut placement);
        if self.node.store.put_placement_at(self.vm, present.revision, &placement).await? {
            Ok(())
        } else {
            Err(ActError::Changed)
        }
    }

    /// The same, with the event that the change gives.
    async fn put_event(
        &self,
        change: impl FnOnce(&mut Placement) -> String,
    ) -> Result<(), ActError> {
        self.put(|placement| {
            let event = change(placement);
            placement.note(stamped(&event));
        })
        .await
    }

    async fn start(&self) -> Result<(), ActError> {
        let Some(present) = self.placement else { return Ok(()) };
        tracing::info!(vm = %self.vm, generation = %present.value.generation, "starting");
        let made = launch::make_launch(self.node, self.vm, &present.value, self.deadline_ns).await;
        let failure = match made {
            Ok(launch) => match self.node.supervisor.start(launch).await {
                Ok(_) => return self.mark_started().await,
                Err(error) if !says_failed(&error) => return Ok(()),
                Err(error) => error.to_string(),
            },
            Err(launch::LaunchError::Record(error)) => return Err(error.into()),
            Err(error) => error.to_string(),
        };
        tracing::warn!(vm = %self.vm, "start failed: {failure}");
        let here = self.node.name();
        self.put_event(|placement| owner::start_failed(placement, here.as_str(), failure)).await
    }

    async fn mark_started(&self) -> Result<(), ActError> {
        let here = self.node.name();
        self.put_event(|placement| owner::started(placement, here.as_str())).await
    }

    /// It should run here and does not.
    async fn mark_lost(&self, memory: &Memory) -> Result<(), ActError> {
        let Some(present) = self.placement else { return Ok(()) };
        let reason = memory.take_exit(self.vm, present.value.generation);
        let here = self.node.name();
        self.put_event(|placement| owner::lost(placement, ended(reason), here.as_str())).await
    }

    /// What it is stopped for (to be given to another node, for a planned shutdown, for good) is done
    /// at the next look, which finds no process.
    async fn stop(&self) -> Result<(), ActError> {
        self.node.supervisor.stop(self.vm, Stop::Graceful).await?;
        let stopping = self.placement.is_some_and(|present| present.value.phase == Phase::Stopping);
        if stopping { self.mark_stopped().await } else { Ok(()) }
    }

    async fn mark_stopped(&self) -> Result<(), ActError> {
        self.put_event(owner::stopped).await
    }

    /// It was stopped to be another node's: gives it to that.
    async fn hand_over(&self) -> Result<(), ActError> {
        let Some(present) = self.placement else { return Ok(()) };
        let Phase::Relocating { target } = present.value.phase else { return Ok(()) };
        let to = self.node.name_of(target);
        let mut placement = present.value.clone();
        let event = owner::handed_over(&mut placement, &to);
        placement.note(stamped(&event));
        let key = proto::keys::placement(self.vm);
        let txn = giving_to(cluster::Txn::new(), target)
            .if_revision(key.clone(), present.revision)
            .put(key, json(&placement));
        if self.node.cluster().txn(txn).await?.committed() {
            return Ok(());
        }
        // If that is for the VM's own change, this comes to nothing as well.
        self.put_event(|placement| owner::not_handed_over(placement, &to)).await
    }

    async fn kill(&self) -> Result<(), ActError> {
        let now = self.placement.map_or_else(
            || "the VM was deleted".to_owned(),
            |p| {
                format!(
                    "the VM is {} at {}, generation {}",
                    p.value.phase.word(),
                    self.node.name_of(p.value.owner),
                    p.value.generation
                )
            },
        );
        tracing::warn!(vm = %self.vm, "ending its process here: {now}");
        self.node.supervisor.stop(self.vm, Stop::Kill).await?;
        if self.placement.is_none() {
            self.node.supervisor.forget(self.vm)?;
        }
        Ok(())
    }

    async fn resolve_commit(&self, committed: bool) -> Result<(), ActError> {
        let Some(migration_id) = self.process.and_then(|process| process.migration_id.clone())
        else {
            // A source does not remember the attempt's name after an agent restart; it has one only.
            return Ok(self.node.supervisor.resolve_commit(self.vm, "", committed).await?);
        };
        Ok(self.node.supervisor.resolve_commit(self.vm, &migration_id, committed).await?)
    }

    async fn run_incoming(&self) -> Result<(), ActError> {
        let (Some(present), Some(process)) = (self.placement, self.process) else { return Ok(()) };
        let Some(migration_id) = &process.migration_id else { return Ok(()) };
        let deadline_ns = self.deadline_ns.filter(|_| present.value.ha);
        let generation = present.value.generation;
        self.node.supervisor.run_incoming(self.vm, migration_id, generation, deadline_ns).await?;
        tracing::info!(vm = %self.vm, %generation, "the commit was read: the VM runs here");
        Ok(())
    }

    /// An agent restart in the middle of a migration: the VM stays here.
    async fn settle_migration(&self) -> Result<(), ActError> {
        self.put(|placement| {
            placement.phase = Phase::Started;
            placement.note(stamped("the migration was interrupted; the VM runs on here"));
        })
        .await
    }
}

/// Whether an error of a start says that the VM could not be started here, and does not run. Else the
/// next look decides anew: the lease went between the look and the start, or the VM has a process,
/// and is not to be given to another node for that.
fn says_failed(error: &StartError) -> bool {
    !matches!(error, StartError::NoLease(_) | StartError::AlreadyRunning(_))
}

/// How a process ended that should have run on.
fn ended(reason: Option<ExitReason>) -> Ended {
    match reason {
        Some(ExitReason::GuestShutdown) => Ended::ByGuest,
        Some(ExitReason::Failed(why)) => Ended::Failed(format!("ended: {why}")),
        Some(ExitReason::Hung(why)) => Ended::Failed(format!("hung and was killed: {why}")),
        // By the lease, by this agent, or while no agent looked (power loss, a reset).
        Some(
            reason @ (ExitReason::Lease
            | ExitReason::Killed
            | ExitReason::Stopped
            | ExitReason::Migrated
            | ExitReason::IncomingAborted(_)),
        ) => Ended::FromOutside(reason.to_string()),
        None => Ended::FromOutside("not running".to_owned()),
    }
}

#[cfg(test)]
fn placement(ha: bool) -> Placement {
    use proto::record::Requested;
    Placement {
        vm_id: proto::VmId(uuid::Uuid::from_u128(7)),
        owner: proto::NodeId(1),
        generation: proto::Generation(3),
        phase: Phase::Started,
        requested: Requested::Started,
        ha,
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

#[cfg(test)]
mod tests {
    use proto::record::Requested;

    use super::*;

    fn after(ha: bool, reason: Option<ExitReason>) -> Placement {
        let mut placement = placement(ha);
        let event = owner::lost(&mut placement, ended(reason), "n1");
        placement.note(event);
        placement
    }

    #[test]
    fn a_vm_that_has_a_process_here_has_not_failed_to_start() {
        let name: Name = "web".parse().unwrap();
        assert!(!says_failed(&StartError::AlreadyRunning(name.clone())));
        assert!(!says_failed(&StartError::NoLease(name.clone())));
        assert!(says_failed(&StartError::Refused { name, reason: "no such kernel".into() }));
    }

    #[test]
    fn a_guest_that_powers_off_stays_off() {
        for ha in [true, false] {
            let placement = after(ha, Some(ExitReason::GuestShutdown));
            assert_eq!(placement.phase, Phase::Stopped);
            assert_eq!(placement.requested, Requested::Stopped);
        }
    }

    #[test]
    fn a_crash_is_counted_for_ha_and_told_otherwise() {
        let placement = after(true, Some(ExitReason::Failed("signal 11".into())));
        assert_eq!((placement.phase, placement.start_failures), (Phase::Recovering, 1));
        let hung = after(true, Some(ExitReason::Hung("it does not answer for 30 s".into())));
        assert_eq!((hung.phase, hung.start_failures), (Phase::Recovering, 1));
        assert!(
            hung.events[0].contains("on n1 hung and was killed: it does not answer"),
            "{hung:?}"
        );
        let placement = after(false, Some(ExitReason::Failed("signal 11".into())));
        assert_eq!(placement.phase, Phase::Error);
        assert!(placement.message.is_some_and(|m| m.contains("signal 11")));
    }

    #[test]
    fn after_power_loss_the_owner_starts_it_at_a_new_generation() {
        let placement = after(false, None);
        assert_eq!((placement.phase, placement.generation.0), (Phase::Starting, 4));
        let placement = after(true, Some(ExitReason::Lease));
        assert_eq!((placement.phase, placement.start_failures), (Phase::Recovering, 0));
    }
}
