//! The source's agent: drives its VM process, asks for the commit, tells the target.

use std::time::{Duration, Instant};

use proto::v1::migrate_out_event::Event;
use proto::v1::{
    AbortMigrationRequest, FinishMigrationRequest, MigrateOutEvent, MigrateOutRequest,
    MigrationDone, MigrationProgress, PrepareMigrationRequest, PrepareMigrationResponse,
    VmProcessEmpty,
};
use proto::{Generation, Name, VmId};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::{CommitOutcome, Manifest, MigrationError, PROTOCOL, SourceOptions, TargetPeer};
use crate::supervisor::{Stop, Supervisor, VmError, VmState};

/// How long the target's agent is asked to run the VM after the commit; then its own watch of the
/// placement has to do.
const FINISH_LIMIT: Duration = Duration::from_secs(15);
/// How long the source process may take to say how it went once the target runs.
const DONE_LIMIT: Duration = Duration::from_secs(15);

/// Moves a running VM to `target`. `commit` is called at most once, when the target has everything
/// and the vCPUs stand still; it may take as long as it takes. `cancel` works until then.
///
/// # Errors
/// [`MigrationError`]. Before the commit the VM runs on here and the target's process is gone.
pub async fn run_source<C, F, P>(
    supervisor: &Supervisor,
    name: &Name,
    target: &dyn TargetPeer,
    options: SourceOptions,
    commit: C,
    progress: P,
    cancel: CancellationToken,
) -> Result<MigrationDone, MigrationError>
where
    C: FnOnce() -> F + Send,
    F: Future<Output = CommitOutcome> + Send,
    P: FnMut(MigrationProgress) + Send,
{
    let vm = supervisor.status(name).await?;
    if vm.state != VmState::Running {
        return Err(MigrationError::State { name: name.clone(), state: vm.state.word() });
    }
    let source = Source { supervisor, name, target, options, generation: vm.generation };
    let prepared = source.prepare(vm.vm_id).await?;
    let result = source.drive(prepared, commit, progress, cancel).await;
    if let Err(error) = &result {
        source.abort_target(error).await;
    }
    result
}

struct Source<'a> {
    supervisor: &'a Supervisor,
    name: &'a Name,
    target: &'a dyn TargetPeer,
    options: SourceOptions,
    generation: Generation,
}

impl Source<'_> {
    async fn prepare(&self, vm_id: VmId) -> Result<PrepareMigrationResponse, MigrationError> {
        let launch = self.supervisor.launch_of(self.name)?;
        let mut client = self.supervisor.client(self.name)?;
        let identity = client.migration_identity(VmProcessEmpty {}).await;
        let identity = identity.map_err(|status| self.refused("migration identity", status))?;
        let macs = launch.nics.iter().map(|nic| nic.mac).collect();
        let manifest =
            Manifest { spec: launch.spec, vm_id, ha: Some(launch.ha), cpuid: launch.cpuid, macs };
        let launch = serde_json::to_vec(&manifest)
            .map_err(|error| MigrationError::Request(error.to_string()))?;
        let request = PrepareMigrationRequest {
            vm: self.name.to_string(),
            generation: self.generation.0,
            source_node: self.options.source_node.0,
            migration_id: self.options.migration_id.clone(),
            launch,
            source_fingerprint: identity.into_inner().fingerprint,
            protocol_min: *PROTOCOL.start(),
            protocol_max: *PROTOCOL.end(),
        };
        let prepared = self.target.prepare(request).await;
        if let Err(status) = &prepared {
            // The answer may be lost while the process over there was made.
            self.abort_target(status).await;
        }
        prepared.map_err(|status| MigrationError::Target { name: self.name.clone(), status })
    }

    async fn drive<C, F, P>(
        &self,
        prepared: PrepareMigrationResponse,
        commit: C,
        mut progress: P,
        cancel: CancellationToken,
    ) -> Result<MigrationDone, MigrationError>
    where
        C: FnOnce() -> F + Send,
        F: Future<Output = CommitOutcome> + Send,
        P: FnMut(MigrationProgress) + Send,
    {
        let mut client = self.supervisor.client(self.name)?;
        let request = MigrateOutRequest {
            migration_id: self.options.migration_id.clone(),
            address: self.look_up(&prepared.address).await?,
            target_fingerprint: prepared.target_fingerprint,
            downtime_limit_ms: self.options.downtime_limit_ms,
            bandwidth_limit_mib_s: self.options.bandwidth_limit_mib_s,
            protocol: prepared.protocol,
        };
        let events = client.migrate_out(request).await;
        let mut events = events.map_err(|status| self.refused("migrate", status))?.into_inner();
        let mut cancelled = false;
        let wanted = loop {
            let event = tokio::select! {
                event = events.message() => event,
                () = cancel.cancelled(), if !cancelled => {
                    cancelled = true;
                    // Refused means that it has just ended one way or the other: the stream says.
                    let _ = client.cancel_migration(VmProcessEmpty {}).await;
                    continue;
                }
            };
            match self.event(event).await? {
                Event::Progress(now) => progress(now),
                Event::CommitWanted(wanted) => break wanted,
                Event::Done(_) => return Err(self.failed("it ended without a commit".into())),
                Event::Failed(_) if cancelled => {
                    return Err(MigrationError::Cancelled(self.name.clone()));
                }
                Event::Failed(reason) => return Err(self.failed(reason)),
            }
        };
        let outcome = if cancelled {
            CommitOutcome::Refused("it was cancelled".into())
        } else {
            commit().await
        };
        match outcome {
            CommitOutcome::Committed(generation) => {
                Ok(self.committed(generation, wanted, events).await)
            }
            CommitOutcome::Refused(reason) => {
                let name = self.name.clone();
                let id = &self.options.migration_id;
                self.supervisor.resolve_commit(self.name, id, false).await?;
                if cancelled {
                    return Err(MigrationError::Cancelled(name));
                }
                Err(MigrationError::Refused { name, reason })
            }
            CommitOutcome::Gone(reason) => {
                self.end_source().await;
                Err(MigrationError::Lost { name: self.name.clone(), reason })
            }
        }
    }

    /// The VM is not this node's any more: its process here never runs it again.
    async fn end_source(&self) {
        let id = &self.options.migration_id;
        if let Err(error) = self.supervisor.resolve_commit(self.name, id, true).await {
            tracing::warn!(vm = %self.name, %error, "the source process is killed: the VM is not this node's");
            if let Err(error) = self.supervisor.stop(self.name, Stop::Kill).await {
                tracing::error!(vm = %self.name, %error, "the source process cannot be killed");
            }
        }
    }

    /// The VM's process knows no names, only addresses.
    async fn look_up(&self, address: &str) -> Result<String, MigrationError> {
        let found = tokio::net::lookup_host(address).await;
        let found = found.map_err(|error| self.failed(format!("target {address}: {error}")))?;
        let first = { found }.next().map(|address| address.to_string());
        first.ok_or_else(|| self.failed(format!("target {address} has no address")))
    }

    /// From here on nothing fails any more: the VM belongs to the target.
    async fn committed(
        &self,
        generation: Generation,
        wanted: MigrationDone,
        events: Streaming<MigrateOutEvent>,
    ) -> MigrationDone {
        // The source's process lets go of the disks first: the target's takes their locks to run.
        self.end_source().await;
        self.finish_target(generation).await;
        let done = tokio::time::timeout(DONE_LIMIT, last_word(events)).await;
        done.ok().flatten().unwrap_or(wanted)
    }

    async fn finish_target(&self, generation: Generation) {
        let request = FinishMigrationRequest {
            vm: self.name.to_string(),
            migration_id: self.options.migration_id.clone(),
            generation: generation.0,
        };
        let begin = Instant::now();
        loop {
            let left = FINISH_LIMIT.saturating_sub(begin.elapsed());
            let asked = tokio::time::timeout(left, self.target.finish(request.clone())).await;
            match asked {
                Ok(Ok(_)) => return,
                Ok(Err(status)) if !left.is_zero() => {
                    tracing::debug!(vm = %self.name, %status, "the target does not run it yet");
                    tokio::time::sleep(Duration::from_millis(100).min(left)).await;
                }
                _ => {
                    tracing::warn!(vm = %self.name, "the target did not confirm in time; it acts on the placement");
                    return;
                }
            }
        }
    }

    async fn abort_target(&self, reason: &(dyn std::error::Error + Sync)) {
        let request = AbortMigrationRequest {
            vm: self.name.to_string(),
            migration_id: self.options.migration_id.clone(),
            reason: reason.to_string(),
        };
        if let Err(status) = self.target.abort(request).await {
            tracing::debug!(vm = %self.name, %status, "the target was not told to forget the VM");
        }
    }

    async fn event(
        &self,
        event: Result<Option<MigrateOutEvent>, Status>,
    ) -> Result<Event, MigrationError> {
        match event {
            Ok(Some(MigrateOutEvent { event: Some(event) })) => Ok(event),
            Ok(_) => Err(self.failed("its process said nothing more".into())),
            Err(status) => Err(self.lost(&status).await),
        }
    }

    /// The connection to the VM's process broke: as a rule because it ended.
    async fn lost(&self, status: &Status) -> MigrationError {
        let gone = self.supervisor.wait_gone(self.name);
        match tokio::time::timeout(Duration::from_secs(2), gone).await {
            Ok(Some(reason)) => {
                MigrationError::Lost { name: self.name.clone(), reason: reason.to_string() }
            }
            _ => self.failed(status.message().to_owned()),
        }
    }

    fn failed(&self, reason: String) -> MigrationError {
        MigrationError::Failed { name: self.name.clone(), reason }
    }

    fn refused(&self, action: &'static str, status: Status) -> MigrationError {
        VmError::Process { name: self.name.clone(), action, status }.into()
    }
}

async fn last_word(mut events: Streaming<MigrateOutEvent>) -> Option<MigrationDone> {
    while let Ok(Some(event)) = events.message().await {
        if let Some(Event::Done(done)) = event.event {
            return Some(done);
        }
    }
    None
}
