//! The VM's life as its agent sees it: one state, changed here only.
//!
//! ```text
//!  Live ──migrate_out──► MovingOut ──commit wanted──► AwaitingCommit ──committed──► Migrated ─► end
//!   ▲ ▲                      │ failed, cancelled            │ refused
//!   │ └──────────────────────┴──────────────────────────────┘
//!   └──run_incoming── IncomingComplete ◄──all received── Incoming
//! ```
//!
//! Invariant: a process that was told of a commit has closed its write gate for good.

use std::error::Error;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use proto::v1::VmProcessStatus;
use proto::{Generation, Name, VmId};
use tonic::Status;
use vmm_core::gate::{WriteGate, boottime_ns};
use vmm_core::machine::{Machine, MachineEvent};
use vmm_core::memory::GuestMemory;
use vmm_core::migrate::tls::Identity;
use vmm_core::migrate::{CancelToken, DirtyPages, MigrationVm, Pagemap, VmError};
use vmm_core::pci::PciError;
use vmm_core::virtio::ImageError;

use super::announce::Announcer;
use super::exit::ExitRecord;

/// How long the disks' locks are waited for: the source of a migration lets go of them when it hears
/// of the commit, and a process that was killed may take a moment to be gone.
const LOCK_LIMIT: Duration = Duration::from_secs(5);
/// How often they are tried: all of it is downtime.
const LOCK_AGAIN: Duration = Duration::from_millis(1);
/// How long a migration that was refused may take to let the VM run on.
const RESUME_LIMIT: Duration = Duration::from_secs(20);

/// How long a status waits for a change that is under way.
const STATUS_LIMIT: Duration = Duration::from_secs(1);
const STATUS_AGAIN: Duration = Duration::from_millis(5);
/// How long a pause, or the end, waits for the console's log on disk.
const LOG_LIMIT: Duration = Duration::from_millis(200);

/// What the process is doing with its VM.
#[derive(Debug)]
pub(super) enum Phase {
    Live,
    MovingOut { cancel: CancelToken },
    AwaitingCommit { id: String, decide: SyncSender<bool> },
    Migrated { id: String },
    Incoming,
    IncomingComplete { id: String, running: SyncSender<()> },
    Ending,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) phase: Phase,
    pub(super) generation: Generation,
    /// By a person's wish; a migration's own pause is not meant.
    pub(super) paused: bool,
    started_ns: u64,
}

/// One VM, under its agent's command.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) name: Name,
    pub(super) vm_id: VmId,
    pub(super) ha: bool,
    pub(super) machine: Arc<Machine>,
    pub(super) gate: WriteGate,
    pub(super) identity: Mutex<Option<Identity>>,
    pub(super) pagemap: Option<Arc<Pagemap>>,
    pub(super) announcer: Announcer,
    exit_file: File,
    ending: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    /// The last status, for when a change under way takes long.
    told: Mutex<VmProcessStatus>,
}

/// What the machine's guest and this process's VM are made of.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) name: Name,
    pub(super) vm_id: VmId,
    pub(super) generation: Generation,
    pub(super) ha: bool,
    pub(super) machine: Arc<Machine>,
    pub(super) gate: WriteGate,
    pub(super) pagemap: Option<Arc<Pagemap>>,
    pub(super) announcer: Announcer,
    pub(super) exit_file: File,
    /// It is to be received.
    pub(super) incoming: bool,
}

impl Control {
    pub(super) fn new(parts: Parts) -> Self {
        let phase = if parts.incoming { Phase::Incoming } else { Phase::Live };
        let state = State { phase, generation: parts.generation, paused: false, started_ns: 0 };
        Self {
            name: parts.name,
            vm_id: parts.vm_id,
            ha: parts.ha,
            machine: parts.machine,
            gate: parts.gate,
            identity: Mutex::default(),
            pagemap: parts.pagemap,
            announcer: parts.announcer,
            exit_file: parts.exit_file,
            ending: AtomicBool::new(false),
            state: Mutex::new(state),
            changed: Condvar::new(),
            told: Mutex::default(),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes on to another phase. `false`: the end has begun, or the VM is another node's; nothing
    /// leads away from either.
    pub(super) fn set_phase(&self, phase: Phase) -> bool {
        let mut state = self.state();
        let over = matches!(state.phase, Phase::Ending | Phase::Migrated { .. });
        if !over {
            state.phase = phase;
        }
        drop(state);
        self.changed.notify_all();
        !over
    }

    /// The state, unless a change under way (a flush to storage that hangs, say) holds it for long.
    fn state_soon(&self) -> Option<MutexGuard<'_, State>> {
        let begin = Instant::now();
        loop {
            match self.state.try_lock() {
                Ok(state) => return Some(state),
                Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) if begin.elapsed() >= STATUS_LIMIT => return None,
                Err(TryLockError::WouldBlock) => std::thread::sleep(STATUS_AGAIN),
            }
        }
    }

    /// What the process is doing. Answers also while a change takes long, with what was before it:
    /// this is how the agent tells a process that is slow from one that hangs.
    pub(super) fn status(&self) -> VmProcessStatus {
        let now = self.state_soon().map(|state| self.describe(&state));
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(now) = now {
            *told = now;
        }
        told.silent_ms = u64::try_from(self.machine.silence().as_millis()).unwrap_or(u64::MAX);
        told.clone()
    }

    fn describe(&self, state: &State) -> VmProcessStatus {
        let word = match &state.phase {
            Phase::Live if state.paused => "paused",
            Phase::Live | Phase::MovingOut { .. } => "running",
            Phase::AwaitingCommit { .. } => "awaiting-commit",
            Phase::Migrated { .. } => "migrated",
            Phase::Incoming => "incoming",
            Phase::IncomingComplete { .. } => "incoming-complete",
            Phase::Ending => "stopped",
        };
        VmProcessStatus {
            vm: self.name.to_string(),
            generation: state.generation.0,
            state: word.to_owned(),
            boot_time_ns: state.started_ns,
            deadline_ns: self.gate.deadline_ns(),
            ..VmProcessStatus::default()
        }
    }

    /// Locks the disks and lets the VM run from its beginning.
    pub(super) fn boot(&self) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.run(&mut self.state())
    }

    fn run(&self, state: &mut State) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.lock_disks()?;
        self.gate.check()?;
        self.machine.resume()?;
        state.started_ns = boottime_ns();
        Ok(())
    }

    fn lock_disks(&self) -> Result<(), PciError> {
        let begin = Instant::now();
        loop {
            match self.machine.pci().lock_disks() {
                Err(PciError::Image(ImageError::InUse { .. })) if begin.elapsed() < LOCK_LIMIT => {
                    std::thread::sleep(LOCK_AGAIN);
                }
                outcome => return outcome,
            }
        }
    }

    pub(super) fn pause(&self) -> Result<(), Status> {
        let mut state = self.state();
        state.must_be_live("paused")?;
        self.machine.pause().map_err(|error| internal(&error))?;
        state.paused = true;
        drop(state);
        self.machine.serial().output().flush(LOG_LIMIT);
        Ok(())
    }

    pub(super) fn resume(&self) -> Result<(), Status> {
        let mut state = self.state();
        state.must_be_live("resumed")?;
        self.machine.resume().map_err(|error| internal(&error))?;
        state.paused = false;
        Ok(())
    }

    pub(super) fn reset(&self) -> Result<(), Status> {
        let mut state = self.state();
        state.must_be_live("reset")?;
        self.machine.reset().map_err(|error| internal(&error))?;
        state.paused = false;
        Ok(())
    }

    pub(super) fn press_power_button(&self) -> Result<(), Status> {
        self.state().must_be_live("shut down")?;
        if self.machine.press_power_button() {
            return Ok(());
        }
        Err(Status::unavailable("the guest does not listen to its power button (yet)"))
    }

    /// Stands still with all disk writes durable, ready for [`Control::end`].
    pub(super) fn quiesce(&self) -> Result<(), Status> {
        self.state().begin_ending()?;
        self.machine.pause().map_err(|error| internal(&error))?;
        self.machine.pci().flush().map_err(|error| internal(&error))
    }

    /// Source side: the outcome of the commit. `id` empty: of whichever commit is awaited.
    pub(super) fn resolve_commit(&self, id: &str, committed: bool) -> Result<(), Status> {
        let mut state = self.state();
        let same = |known: &str| id.is_empty() || id == known;
        match &state.phase {
            Phase::AwaitingCommit { id: known, .. } if same(known) => {}
            Phase::Migrated { id: known } if committed && same(known) => return Ok(()),
            Phase::Live if !committed => return Ok(()),
            _ => return Err(Status::failed_precondition("it awaits no such commit")),
        }
        if !committed {
            return self.run_on(state);
        }
        // First nothing can write any more, then the target may take the locks.
        self.gate.close();
        let unlocked = self.machine.pci().unlock_disks();
        let phase = std::mem::replace(&mut state.phase, Phase::Ending);
        if let Phase::AwaitingCommit { id, decide } = phase {
            state.phase = Phase::Migrated { id };
            // The migration's thread waits for this; if it is gone, the process ends anyway.
            let _ = decide.send(true);
        }
        drop(state);
        if let Err(error) = unlocked {
            tracing::error!(%error, "the disks' locks go with this process instead");
            self.end(&ExitRecord::Migrated);
        }
        Ok(())
    }

    /// The commit was refused: wait until the migration's thread has let the VM run on.
    fn run_on(&self, state: MutexGuard<'_, State>) -> Result<(), Status> {
        if let Phase::AwaitingCommit { decide, .. } = &state.phase {
            let _ = decide.try_send(false);
        }
        let waiting = |state: &mut State| matches!(state.phase, Phase::AwaitingCommit { .. });
        let waited = self.changed.wait_timeout_while(state, RESUME_LIMIT, waiting);
        let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        drop(state);
        if timeout.timed_out() {
            return Err(Status::deadline_exceeded("it does not run on yet"));
        }
        Ok(())
    }

    /// Target side: the agent has read the commit.
    pub(super) fn run_incoming(
        &self,
        id: &str,
        generation: Generation,
        deadline_ns: Option<u64>,
    ) -> Result<(), Status> {
        let mut state = self.state();
        match &state.phase {
            Phase::IncomingComplete { id: known, .. } if known == id => {}
            Phase::Live if state.generation == generation => return Ok(()),
            _ => return Err(Status::failed_precondition("no VM was received in that migration")),
        }
        match deadline_ns {
            // Both the lease that the agent read the commit under and this process's own must last.
            Some(deadline_ns)
                if self.ha
                    && (deadline_ns <= boottime_ns()
                        || !super::deadline::renew(&self.gate, deadline_ns)) =>
            {
                return Err(Status::failed_precondition("the node's lease has run out"));
            }
            None if self.ha => {
                return Err(Status::failed_precondition("an HA VM needs its node's lease to run"));
            }
            _ => {}
        }
        self.run(&mut state).map_err(|error| internal(error.as_ref()))?;
        state.generation = generation;
        let phase = std::mem::replace(&mut state.phase, Phase::Live);
        drop(state);
        if let Phase::IncomingComplete { running, .. } = phase {
            // The receiving thread tells the source; it may be gone with the connection.
            let _ = running.try_send(());
        }
        self.announcer.announce(&self.machine);
        Ok(())
    }

    /// What the guest did by itself.
    pub(super) fn handle_event(&self, event: MachineEvent) {
        tracing::info!(?event, "the machine stands still");
        match event {
            MachineEvent::DeadlinePassed => self.end(&ExitRecord::Lease),
            // Overtaken by what was done about an earlier one: the guest runs on already, or is
            // being moved by now, and is not touched.
            _ if !self.machine.is_halted() => tracing::info!("nothing is left to do about it"),
            MachineEvent::Shutdown => {
                // Devices are drained and flushed by the pause.
                let record = match self.quiesce() {
                    Ok(()) => ExitRecord::GuestShutdown,
                    Err(status) => ExitRecord::Error(status.message().to_owned()),
                };
                self.end(&record);
            }
            MachineEvent::Reset(_) => {
                let state = self.state();
                // While a commit is awaited, and after it, nothing may run, by whatever event.
                if !matches!(state.phase, Phase::Live | Phase::MovingOut { .. }) {
                    return;
                }
                // Again, under the lock: somebody may have reset it since, and a migration may have
                // saved the state of what runs now.
                if !self.machine.is_halted() {
                    return;
                }
                if let Err(error) = self.machine.reset() {
                    self.end(&ExitRecord::Error(format!("reset: {}", chain(&error))));
                }
            }
            MachineEvent::Crashed { reason } => self.end(&ExitRecord::Error(reason)),
        }
    }

    /// Ends the process. The first reason counts; later callers wait for the end.
    pub(super) fn end(&self, record: &ExitRecord) -> ! {
        self.gate.close();
        if self.ending.swap(true, Ordering::SeqCst) {
            loop {
                std::thread::park();
            }
        }
        tracing::info!(?record, "ending");
        self.machine.serial().output().flush(LOG_LIMIT);
        record.write(&self.exit_file);
        // SAFETY: ends the process at once without running anything else in it, which is wanted:
        // no destructor may wait for a guest or a peer.
        unsafe { libc::_exit(0) }
    }
}

/// The machine, as a migration sees it: one whose end has begun is not resumed any more, however
/// the migration ends.
pub(super) struct Moving<'a> {
    vm: &'a dyn MigrationVm,
    state: &'a Mutex<State>,
}

impl Control {
    pub(super) fn moving(&self) -> Moving<'_> {
        Moving { vm: self.machine.as_ref(), state: &self.state }
    }

    /// The migration has failed, and the VM runs on here (`resumed`: it does), unless its agent has
    /// learnt meanwhile that it is another node's.
    pub(super) fn runs_on(&self, resumed: bool) {
        if self.set_phase(Phase::Live) {
            self.state().paused = !resumed;
        } else if matches!(self.state().phase, Phase::Migrated { .. }) {
            self.end(&ExitRecord::Migrated);
        }
    }
}

impl MigrationVm for Moving<'_> {
    fn memory(&self) -> &GuestMemory {
        self.vm.memory()
    }
    fn start_dirty_tracking(&self) -> Result<(), VmError> {
        self.vm.start_dirty_tracking()
    }
    fn take_dirty(&self) -> Result<DirtyPages, VmError> {
        self.vm.take_dirty()
    }
    fn stop_dirty_tracking(&self) -> Result<(), VmError> {
        self.vm.stop_dirty_tracking()
    }
    fn flush_disks(&self) -> Result<(), VmError> {
        self.vm.flush_disks()
    }
    fn pause(&self) -> Result<(), VmError> {
        self.vm.pause()
    }
    fn save_state(&self) -> Result<Vec<u8>, VmError> {
        self.vm.save_state()
    }

    /// Under the state's lock: a stop is accepted before this, or after and then pauses the VM.
    fn resume(&self) -> Result<(), VmError> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.may_run() { self.vm.resume() } else { Ok(()) }
    }
}

impl State {
    /// Nothing else is done with the VM from here on. A commit that is under way comes first: its
    /// phase, which the migration's thread waits on, is never taken away, not even for a moment.
    fn begin_ending(&mut self) -> Result<(), Status> {
        let committing = match &self.phase {
            // Too late to cancel means that the process is about to wait for its commit.
            Phase::MovingOut { cancel } => !cancel.cancel(),
            Phase::AwaitingCommit { .. } | Phase::Migrated { .. } => true,
            Phase::Live | Phase::Incoming | Phase::IncomingComplete { .. } | Phase::Ending => false,
        };
        if committing {
            return Err(Status::failed_precondition("its migration is being committed"));
        }
        self.phase = Phase::Ending;
        Ok(())
    }

    /// Whether a migration that ends in this phase without a commit lets the guest run on.
    fn may_run(&self) -> bool {
        match self.phase {
            Phase::Live | Phase::MovingOut { .. } | Phase::AwaitingCommit { .. } => true,
            Phase::Migrated { .. }
            | Phase::Incoming
            | Phase::IncomingComplete { .. }
            | Phase::Ending => false,
        }
    }

    fn must_be_live(&self, what: &str) -> Result<(), Status> {
        match self.phase {
            Phase::Live => Ok(()),
            Phase::MovingOut { .. } | Phase::AwaitingCommit { .. } => Err(
                Status::failed_precondition(format!("it is being migrated and cannot be {what}")),
            ),
            Phase::Migrated { .. } | Phase::Ending => {
                Err(Status::failed_precondition("it is ending"))
            }
            Phase::Incoming | Phase::IncomingComplete { .. } => {
                Err(Status::failed_precondition("it has not arrived here yet"))
            }
        }
    }
}

pub(super) fn internal(error: &(dyn Error + 'static)) -> Status {
    Status::internal(chain(error))
}

/// An error with all its causes, each once.
pub(super) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;

    /// A VM that counts how often it was let run.
    #[derive(Debug, Default)]
    struct Counting(std::sync::atomic::AtomicUsize);

    impl MigrationVm for Counting {
        fn memory(&self) -> &GuestMemory {
            unreachable!("only pausing and resuming are asked for here")
        }
        fn start_dirty_tracking(&self) -> Result<(), VmError> {
            Ok(())
        }
        fn take_dirty(&self) -> Result<DirtyPages, VmError> {
            unreachable!("only pausing and resuming are asked for here")
        }
        fn stop_dirty_tracking(&self) -> Result<(), VmError> {
            Ok(())
        }
        fn flush_disks(&self) -> Result<(), VmError> {
            Ok(())
        }
        fn pause(&self) -> Result<(), VmError> {
            Ok(())
        }
        fn save_state(&self) -> Result<Vec<u8>, VmError> {
            Ok(Vec::new())
        }
        fn resume(&self) -> Result<(), VmError> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    #[test]
    fn a_stop_that_was_accepted_in_the_middle_of_a_move_is_the_end() {
        let vm = Counting::default();
        let resumed = || vm.0.load(Ordering::SeqCst);
        let (decide, _decision) = sync_channel(1);
        let awaiting = Phase::AwaitingCommit { id: "m".into(), decide };
        for (phase, times) in
            [(Phase::MovingOut { cancel: CancelToken::default() }, 1), (awaiting, 2)]
        {
            let state = Mutex::new(state(phase));
            Moving { vm: &vm, state: &state }.resume().unwrap();
            assert_eq!(resumed(), times, "a failed or refused migration runs on");
        }
        let state = Mutex::new(state(Phase::MovingOut { cancel: CancelToken::default() }));
        state.lock().unwrap().begin_ending().unwrap();
        Moving { vm: &vm, state: &state }.resume().unwrap();
        assert_eq!(resumed(), 2, "it ran after its stop was accepted");
    }

    fn state(phase: Phase) -> State {
        State { phase, generation: Generation(1), paused: false, started_ns: 0 }
    }

    #[test]
    fn an_end_never_takes_the_outcome_away_from_a_commit() {
        let (decide, decision) = sync_channel(1);
        let mut awaiting = state(Phase::AwaitingCommit { id: "m".into(), decide });
        assert!(awaiting.begin_ending().is_err());
        let Phase::AwaitingCommit { decide, .. } = &awaiting.phase else {
            panic!("{:?}", awaiting.phase)
        };
        decide.send(true).unwrap();
        assert_eq!(decision.recv(), Ok(true));

        let cancel = CancelToken::default();
        let mut moving = state(Phase::MovingOut { cancel: cancel.clone() });
        moving.begin_ending().unwrap();
        assert!(cancel.is_cancelled(), "nothing can commit after the end has begun");
        assert!(matches!(moving.phase, Phase::Ending));
        assert!(state(Phase::Migrated { id: "m".into() }).begin_ending().is_err());
    }
}
