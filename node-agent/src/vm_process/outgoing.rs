//! The source's end of a live migration.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use proto::v1::migrate_out_event::Event;
use proto::v1::{MigrateOutEvent, MigrateOutRequest, MigrationDone, MigrationProgress};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tonic::Status;
use vmm_core::migrate::tls::{Fingerprint, TlsConnector};
use vmm_core::migrate::{
    CancelToken, Commit, CommitWanted, Migrated, Progress, SourceError, SourceHooks, SourceOptions,
    Subject, migrate,
};

use super::control::{Control, Phase, chain, internal};
use super::exit::ExitRecord;

/// How long the target may take to be reached.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// How long the agent may take to hear the last word.
const LAST_WORD_LIMIT: Duration = Duration::from_secs(2);
/// Where no limit is given.
const DOWNTIME_LIMIT: Duration = Duration::from_millis(50);

type Events = UnboundedSender<Result<MigrateOutEvent, Status>>;

/// Begins to move the VM; what happens comes from the receiver.
pub(super) fn begin(
    control: &Arc<Control>,
    request: MigrateOutRequest,
) -> Result<UnboundedReceiver<Result<MigrateOutEvent, Status>>, Status> {
    let target: SocketAddr = request.address.parse().map_err(|_| {
        Status::invalid_argument(format!("`{}` is not an address and port", request.address))
    })?;
    let peer: Fingerprint = request
        .target_fingerprint
        .parse()
        .map_err(|error| Status::invalid_argument(format!("{error}")))?;
    let identity = control.identity.lock().unwrap_or_else(PoisonError::into_inner).take();
    let identity = identity
        .ok_or_else(|| Status::failed_precondition("ask for the migration's identity first"))?;
    let connector = TlsConnector::new(target, &identity, peer, CONNECT_LIMIT)
        .map_err(|error| internal(&error))?;
    let options = enter(control, &request)?;
    let (events, receiver) = unbounded_channel();
    let thread = std::thread::Builder::new().name("migrate-out".into());
    let (moving, id) = (Arc::clone(control), request.migration_id);
    let spawned = thread.spawn(move || run(&moving, id, connector, &options, events));
    if let Err(error) = spawned {
        control.set_phase(Phase::Live);
        return Err(internal(&error));
    }
    Ok(receiver)
}

/// Changes the phase, so that nothing else is done with the VM meanwhile.
fn enter(control: &Control, request: &MigrateOutRequest) -> Result<SourceOptions, Status> {
    let mut state = control.state();
    if !matches!(state.phase, Phase::Live) || state.paused {
        return Err(Status::failed_precondition("only a running VM can be moved"));
    }
    let mut options = SourceOptions::new(Subject {
        migration_id: request.migration_id.clone(),
        vm_id: control.vm_id,
        vm_name: control.name.to_string(),
        generation: state.generation,
    });
    options.downtime_limit = match request.downtime_limit_ms {
        0 => DOWNTIME_LIMIT,
        limit_ms => Duration::from_millis(u64::from(limit_ms)),
    };
    options.forced_downtime_limit = options.forced_downtime_limit.max(options.downtime_limit);
    let limit_mib_s = u64::from(request.bandwidth_limit_mib_s);
    options.bandwidth_limit_bytes_s = NonZeroU64::new(limit_mib_s << 20);
    options.pagemap = control.pagemap.clone();
    let cancel: CancelToken = options.cancel.clone();
    state.phase = Phase::MovingOut { cancel };
    Ok(options)
}

fn run(
    control: &Control,
    id: String,
    mut connector: TlsConnector,
    options: &SourceOptions,
    events: Events,
) {
    let mut hooks = Hooks { control, id, cancel: options.cancel.clone(), events: events.clone() };
    match migrate(&control.moving(), &mut connector, options, &mut hooks) {
        Ok(migrated) => {
            tracing::info!(?migrated, "moved away");
            send(&events, Event::Done(done(&migrated)));
            hooks.wait_until_heard();
            control.end(&ExitRecord::Migrated);
        }
        Err(error) => {
            tracing::warn!(error = chain(&error), "the migration failed");
            control.runs_on(!matches!(error, SourceError::NotResumed { .. }));
            send(&events, Event::Failed(chain(&error)));
        }
    }
}

struct Hooks<'a> {
    control: &'a Control,
    id: String,
    cancel: CancelToken,
    events: Events,
}

impl SourceHooks for Hooks<'_> {
    fn progress(&mut self, progress: &Progress) {
        let heard = send(
            &self.events,
            Event::Progress(MigrationProgress {
                round: progress.round,
                bytes: progress.bytes,
                remaining_bytes: progress.remaining_bytes,
                bandwidth_bytes_s: progress.bandwidth_bytes_s,
                dirty_bytes_s: progress.dirty_bytes_s,
                expected_downtime_ms: progress.expected_downtime.map(millis),
                phase: progress.phase.as_str().to_owned(),
            }),
        );
        if !heard && self.cancel.cancel() {
            tracing::warn!("the agent is gone: the migration is cancelled");
        }
    }

    /// Blocks until the agent, or the one after it, has told the outcome. Before the agent was asked
    /// nobody can have committed, so an agent that is gone already is a refusal for certain.
    fn commit(&mut self, wanted: &CommitWanted) -> Commit {
        let (decide, decision) = sync_channel(1);
        if !self.control.set_phase(Phase::AwaitingCommit { id: self.id.clone(), decide }) {
            return Commit::Refused("the VM is ending".into());
        }
        let asked = send(
            &self.events,
            Event::CommitWanted(MigrationDone {
                total_ms: millis(wanted.elapsed),
                downtime_ms: 0,
                bytes: wanted.bytes,
                rounds: wanted.rounds,
            }),
        );
        if !asked {
            return Commit::Refused("the agent went away before it was asked to commit".into());
        }
        match decision.recv() {
            Ok(true) => Commit::Committed,
            Ok(false) => Commit::Refused("the agent refused it".into()),
            // The sender lives in the phase, which only a decision or the end of the process
            // replaces; without either, nothing is known, so nothing may run.
            Err(_) => loop {
                std::thread::park();
            },
        }
    }
}

impl Hooks<'_> {
    /// The agent hangs up when it has heard the last word.
    fn wait_until_heard(&self) {
        let begin = Instant::now();
        while !self.events.is_closed() && begin.elapsed() < LAST_WORD_LIMIT {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// False if nobody listens any more.
fn send(events: &Events, event: Event) -> bool {
    events.send(Ok(MigrateOutEvent { event: Some(event) })).is_ok()
}

fn done(migrated: &Migrated) -> MigrationDone {
    MigrationDone {
        total_ms: millis(migrated.total),
        // Without the target's word, the pause until the commit is all that is known.
        downtime_ms: millis(migrated.downtime.unwrap_or(migrated.paused_before_commit)),
        bytes: migrated.bytes,
        rounds: migrated.rounds,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
