//! Starts, watches, adopts and stops the VM processes of this node.
//!
//! Owns the run folder's `vms/` (one folder per VM: launch description, sockets, logs, state file)
//! and the processes' lives. Decides nothing: which VM runs here, at which generation, is the
//! caller's to know from the placement. Never touches a disk or the replicated configuration.
//!
//! ```text
//!  start ──► node-agent vm ──ready──► running ⇄ paused ──► gone ──► VmExited
//!              │ failed                 ▲  └► awaiting-commit ──► migrated
//!              ▼                        │
//!            StartError       incoming ─┘ (run_incoming)
//! ```
//!
//! Invariants: one process per VM name; a process is identified by pid *and* start time, and is
//! signalled through its pidfd only; a process that ends is reported exactly once.

mod adopt;
mod client;
mod deadline;
mod health;
mod launch;
mod left;
mod process;
mod start;
#[cfg(test)]
mod start_tests;
mod state;
#[cfg(test)]
pub(crate) mod test_strangers;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ha_manager::owner;
use proto::v1::vm_process_client::VmProcessClient;
use proto::{Generation, Name, VmId};
use tokio::sync::mpsc;
use tonic::transport::Channel;

pub use launch::{
    BootFiles, CpuidLeaf, DiskFile, IncomingLaunch, Launch, Nic, ResolveError, mac_of,
};
pub(crate) use left::LeftRunning;
pub use start::{StartError, Started};
pub(crate) use state::{Files, StateFile};

use process::ProcessHandle;

/// How often it is looked whether what was killed is gone.
const GONE_EVERY: Duration = Duration::from_millis(50);

/// How a supervisor works; from the agent's configuration.
#[derive(Debug, Clone)]
pub struct SupervisorConfig {
    /// Folder for sockets, logs and state files. Root only.
    pub run_dir: PathBuf,
    /// The binary that is run as `BINARY vm --launch FILE`: this one, `/proc/self/exe` as a rule.
    pub binary: PathBuf,
    /// First user id of the range that VM processes get one each of; `None`: all stay with this
    /// process's user (also where the agent is not root).
    pub uid_base: Option<u32>,
    /// Make a cgroup v2 for each VM where the host has one.
    pub cgroups: bool,
    /// Memory that is left to the host when a VM is checked for fitting, bytes.
    pub reserve_memory_bytes: u64,
    /// How long a VM process may take to be ready.
    pub start_timeout: Duration,
    /// How often each process is asked for a sign of life, and the longest that it may take to
    /// answer then.
    pub probe_every: Duration,
    /// A process, or a vCPU, that gives no sign of life for this long hangs: that of an HA VM is
    /// ended.
    pub hang_limit: Duration,
}

impl SupervisorConfig {
    /// The defaults for a run folder: this binary, own users from 100000 on, cgroups.
    #[must_use]
    pub fn new(run_dir: impl Into<PathBuf>) -> Self {
        Self {
            run_dir: run_dir.into(),
            binary: PathBuf::from("/proc/self/exe"),
            uid_base: Some(100_000),
            cgroups: true,
            reserve_memory_bytes: 0,
            start_timeout: Duration::from_secs(120),
            probe_every: Duration::from_secs(5),
            hang_limit: Duration::from_secs(30),
        }
    }
}

/// What a VM process is doing, as it said last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmState {
    /// Made, not yet run.
    Created,
    /// vCPUs run.
    Running,
    /// vCPUs stand still, at a person's wish.
    Paused,
    /// Receives a migration; the source still runs the VM.
    Incoming,
    /// Has received all of it and waits for the commit to be read.
    IncomingComplete,
    /// Source side: paused, all sent, and only the placement says who runs it.
    AwaitingCommit,
    /// Source side: committed elsewhere; the process is ending.
    Migrated,
    /// Ending.
    Stopped,
    /// Answers nothing: hung, or stopped by a signal.
    Unknown,
}

impl VmState {
    /// The word in `VmProcessStatus.state`.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Incoming => "incoming",
            Self::IncomingComplete => "incoming-complete",
            Self::AwaitingCommit => "awaiting-commit",
            Self::Migrated => "migrated",
            Self::Stopped => "stopped",
            Self::Unknown => "unknown",
        }
    }

    /// Reads the word; anything else is [`VmState::Unknown`].
    #[must_use]
    pub fn from_word(word: &str) -> Self {
        let all = [
            Self::Created,
            Self::Running,
            Self::Paused,
            Self::Incoming,
            Self::IncomingComplete,
            Self::AwaitingCommit,
            Self::Migrated,
            Self::Stopped,
        ];
        all.into_iter().find(|state| state.word() == word).unwrap_or(Self::Unknown)
    }
}

/// A VM process of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningVm {
    /// The VM's name.
    pub name: Name,
    /// Its id for life.
    pub vm_id: VmId,
    /// The generation the process acts for.
    pub generation: Generation,
    /// Bound by the node lease.
    pub ha: bool,
    /// What it did when it was last asked or changed; see [`Supervisor::status`] for now.
    pub state: VmState,
    /// Set while (and only while) the process receives a migration.
    pub migration_id: Option<String>,
    /// The process.
    pub pid: u32,
    /// Guest memory, bytes.
    pub memory_bytes: u64,
}

impl RunningVm {
    /// As the decision about it sees it.
    #[must_use]
    pub fn seen(&self) -> owner::Process {
        let state = match self.state {
            VmState::Unknown => owner::ProcessState::Silent,
            VmState::IncomingComplete => owner::ProcessState::Complete,
            VmState::AwaitingCommit => owner::ProcessState::AwaitingCommit,
            VmState::Migrated => owner::ProcessState::Migrated,
            VmState::Created
            | VmState::Running
            | VmState::Paused
            | VmState::Incoming
            | VmState::Stopped => owner::ProcessState::Answers,
        };
        owner::Process {
            vm_id: self.vm_id,
            generation: self.generation,
            receives: self.migration_id.is_some(),
            state,
        }
    }
}

/// Why a VM process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered itself off.
    GuestShutdown,
    /// Stopped on request, after its disks were flushed.
    Stopped,
    /// Killed on request.
    Killed,
    /// It gave no sign of life any more, and was killed.
    Hung(String),
    /// Its deadline passed without a renewal.
    Lease,
    /// Handed over to another node.
    Migrated,
    /// An incoming migration that was given up before its commit.
    IncomingAborted(String),
    /// Its own error, or a signal that nobody here sent.
    Failed(String),
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::GuestShutdown => f.write_str("the guest powered off"),
            Self::Stopped => f.write_str("stopped"),
            Self::Killed => f.write_str("killed"),
            Self::Hung(reason) => write!(f, "hung and was killed: {reason}"),
            Self::Lease => f.write_str("the node lease ended"),
            Self::Migrated => f.write_str("moved to another node"),
            Self::IncomingAborted(reason) => write!(f, "incoming migration given up: {reason}"),
            Self::Failed(reason) => write!(f, "failed: {reason}"),
        }
    }
}

/// A VM process ended. Sent once for each process that was running or adopted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmExited {
    /// The VM's name.
    pub name: Name,
    /// Its id for life.
    pub vm_id: VmId,
    /// The generation the process acted for.
    pub generation: Generation,
    /// Why.
    pub reason: ExitReason,
}

/// How to stop a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// SIGKILL: what was not flushed is lost, as by pulling the plug.
    Kill,
    /// Pause, flush the disks, end; SIGKILL after ten seconds.
    Graceful,
    /// Press the power button and wait for the guest.
    PowerButton {
        /// How long the guest has.
        timeout: Duration,
        /// Stop it all the same when the time is over.
        force: bool,
    },
}

/// Why a VM process did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// No process of that name here.
    #[error("VM `{0}` has no running process on this node")]
    NotRunning(Name),
    /// The guest did not react to its power button.
    #[error(
        "VM `{name}` did not shut down within {seconds} s: its guest ignores the power button; use `vm stop`, or `vm shutdown --force`"
    )]
    ShutdownTimeout {
        /// The VM.
        name: Name,
        /// The limit.
        seconds: u64,
    },
    /// The process refused or could not be asked.
    #[error("VM `{name}`: {action} failed: {}", status.message())]
    Process {
        /// The VM.
        name: Name,
        /// What was asked.
        action: &'static str,
        /// Its answer.
        status: tonic::Status,
    },
    /// The process cannot be signalled.
    #[error("VM `{name}`: cannot signal process {pid}: {errno}")]
    Signal {
        /// The VM.
        name: Name,
        /// Its process.
        pid: u32,
        /// The system's reason.
        errno: nix::errno::Errno,
    },
    /// A file of the VM's run folder.
    #[error("{action} {} failed: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// The VM processes of this node. Cheap to clone; all clones are the same supervisor.
#[derive(Clone)]
pub struct Supervisor {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supervisor").field("vms", &self.running()).finish_non_exhaustive()
    }
}

struct Shared {
    config: SupervisorConfig,
    vms: Mutex<BTreeMap<Name, Entry>>,
    exits: mpsc::UnboundedSender<VmExited>,
    deadlines: deadline::Renewer,
}

/// A VM name in use: its process is being started, or runs.
#[derive(Clone)]
enum Entry {
    Starting { memory_bytes: u64, uid: Option<u32>, ha: bool },
    Live(Arc<Live>),
}

/// A running VM process.
struct Live {
    files: Files,
    state: StateFile,
    process: ProcessHandle,
    client: VmProcessClient<Channel>,
    last: Mutex<LastSeen>,
    gone: tokio::sync::watch::Sender<Option<ExitReason>>,
}

struct LastSeen {
    state: VmState,
    generation: Generation,
    incoming: Option<String>,
    /// Set before this agent kills it, so that the exit is told as what it is.
    killed: Option<ExitReason>,
}

impl Supervisor {
    /// A supervisor over a run folder, which is made where missing. The receiver gets every exit.
    /// Call [`Supervisor::adopt_all`] next, before anything is started.
    ///
    /// # Errors
    /// [`VmError::Io`] if the folder cannot be made.
    pub fn new(
        config: SupervisorConfig,
    ) -> Result<(Self, mpsc::UnboundedReceiver<VmExited>), VmError> {
        Files::make_root(&config.run_dir)?;
        let (exits, receiver) = mpsc::unbounded_channel();
        let shared =
            Shared { config, vms: Mutex::default(), exits, deadlines: deadline::Renewer::new() };
        Ok((Self { shared: Arc::new(shared) }, receiver))
    }

    /// The VM processes that are ready here, by name, as last seen. Never blocks on a process.
    #[must_use]
    pub fn running(&self) -> Vec<RunningVm> {
        let vms = self.vms();
        let live = vms.values().filter_map(|entry| match entry {
            Entry::Live(live) => Some(live.summary()),
            Entry::Starting { .. } => None,
        });
        live.collect()
    }

    /// One of [`Supervisor::running`].
    #[must_use]
    pub fn get(&self, name: &Name) -> Option<RunningVm> {
        self.live(name).ok().map(|live| live.summary())
    }

    /// Whether a process of this VM runs or is being started.
    #[must_use]
    pub fn is_busy(&self, name: &Name) -> bool {
        self.vms().contains_key(name)
    }

    /// HA VMs that have a process here, those that are being started among them.
    #[must_use]
    pub fn ha_count(&self) -> usize {
        let vms = self.vms();
        let ha = vms.values().filter(|entry| match entry {
            Entry::Live(live) => live.state.ha,
            Entry::Starting { ha, .. } => *ha,
        });
        ha.count()
    }

    /// Asks the process what it is doing now; [`VmState::Unknown`] if it does not answer in time.
    ///
    /// # Errors
    /// [`VmError::NotRunning`].
    pub async fn status(&self, name: &Name) -> Result<RunningVm, VmError> {
        let live = self.live(name)?;
        live.refresh().await;
        Ok(live.summary())
    }

    /// Stops the vCPUs and keeps all else.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn pause(&self, name: &Name) -> Result<(), VmError> {
        self.live(name)?.pause().await
    }

    /// Lets the vCPUs run again.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn resume(&self, name: &Name) -> Result<(), VmError> {
        self.live(name)?.resume().await
    }

    /// Presses the reset button: the same process begins anew from its boot files.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn reset(&self, name: &Name) -> Result<(), VmError> {
        self.live(name)?.reset().await
    }

    /// Stops a VM and waits for its process to be gone. A VM that is not running is stopped; one that
    /// is being started, or whose start was given up and whose process is not gone yet, is not.
    ///
    /// # Errors
    /// [`VmError::ShutdownTimeout`] if the guest ignored its power button and `force` is unset.
    pub async fn stop(&self, name: &Name, how: Stop) -> Result<(), VmError> {
        loop {
            let entry = self.vms().get(name).cloned();
            match entry {
                Some(Entry::Live(live)) => return live.stop(how).await,
                Some(Entry::Starting { .. }) => tokio::time::sleep(GONE_EVERY).await,
                None => return Ok(()),
            }
        }
    }

    /// Tells every HA VM's process its new deadline (`CLOCK_BOOTTIME`, nanoseconds). Never blocks
    /// and needs no runtime: safe to call from any thread.
    pub fn renew_deadlines(&self, deadline_ns: u64) {
        self.shared.deadlines.renew(deadline_ns);
    }

    /// Kills every HA VM's process at once and says which. They are gone when their exits come.
    pub fn kill_all_ha(&self) -> Vec<Name> {
        let vms = self.vms();
        let ha = vms.values().filter_map(|entry| match entry {
            Entry::Live(live) if live.state.ha => Some(live),
            _ => None,
        });
        ha.filter_map(|live| live.kill().ok().map(|()| live.state.name.clone())).collect()
    }

    /// Kills every HA VM's process, those that are being started as soon as they are ready, and
    /// returns when none is left.
    pub async fn end_all_ha(&self) {
        loop {
            self.kill_all_ha();
            if self.ha_count() == 0 {
                return;
            }
            tokio::time::sleep(GONE_EVERY).await;
        }
    }

    /// Connects to the VM's serial console: what is sent goes to the guest, what the guest writes
    /// comes out, beginning with the newest of what it wrote before.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn console(
        &self,
        name: &Name,
        input: impl futures::Stream<Item = Vec<u8>> + Send + 'static,
    ) -> Result<tonic::Streaming<proto::v1::ConsoleOutput>, VmError> {
        self.live(name)?.console(input).await
    }

    /// The console log's file of a VM; it stays after the VM ended, until it is deleted.
    #[must_use]
    pub fn console_log(&self, name: &Name) -> PathBuf {
        self.files(name).console_log()
    }

    /// The log of the VM process itself.
    #[must_use]
    pub fn process_log(&self, name: &Name) -> PathBuf {
        self.files(name).process_log()
    }

    /// Removes what a VM that is gone for good leaves in the run folder.
    ///
    /// # Errors
    /// [`VmError::Io`].
    pub fn forget(&self, name: &Name) -> Result<(), VmError> {
        if self.is_busy(name) {
            return Ok(());
        }
        self.files(name).remove_all()
    }

    /// Source side: the commit's outcome is known. `committed` ends the process, else it resumes.
    ///
    /// # Errors
    /// [`VmError`]; asking again is safe.
    pub async fn resolve_commit(
        &self,
        name: &Name,
        migration_id: &str,
        committed: bool,
    ) -> Result<(), VmError> {
        self.live(name)?.resolve_commit(migration_id, committed).await
    }

    /// Target side: the commit was read; run the VM that was received.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn run_incoming(
        &self,
        name: &Name,
        migration_id: &str,
        generation: Generation,
        deadline_ns: Option<u64>,
    ) -> Result<(), VmError> {
        self.live(name)?.run_incoming(migration_id, generation, deadline_ns).await
    }

    /// A client of the VM's process, for what this type has no word for.
    pub(crate) fn client(&self, name: &Name) -> Result<VmProcessClient<Channel>, VmError> {
        Ok(self.live(name)?.client.clone())
    }

    pub(crate) fn launch_of(&self, name: &Name) -> Result<Launch, VmError> {
        self.live(name)?.files.read_launch()
    }

    pub(crate) async fn wait_gone(&self, name: &Name) -> Option<ExitReason> {
        let live = self.live(name).ok()?;
        Some(live.wait_gone().await)
    }

    fn vms(&self) -> MutexGuard<'_, BTreeMap<Name, Entry>> {
        self.shared.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn live(&self, name: &Name) -> Result<Arc<Live>, VmError> {
        match self.vms().get(name) {
            Some(Entry::Live(live)) => Ok(Arc::clone(live)),
            _ => Err(VmError::NotRunning(name.clone())),
        }
    }

    fn files(&self, name: &Name) -> Files {
        Files::new(&self.shared.config.run_dir, name)
    }
}

impl VmError {
    fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { action, path, source }
    }
}
