//! Starting a VM process: check that it fits, make what it needs, spawn it, wait until it is ready.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use nix::sys::signal::Signal;
use proto::{ByteSize, Name, vm_needs_bytes};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use super::process::ProcessHandle;
use super::{Entry, Files, Launch, Live, StateFile, Supervisor, VmError, client};
use crate::network::{NetworkError, ensure_bridge};
use crate::vm_process::{ProcessLaunch, Startup};
use crate::{clock, jail};

/// User ids are spread over this many from `uid_base` on.
const UID_RANGE: u32 = 50_000;

/// Why a VM did not start. Nothing of it is left running: its process, if there was one, is gone.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It runs already, or is being started.
    #[error("VM `{0}` already has a process on this node")]
    AlreadyRunning(Name),
    /// An HA VM without a fresh lease.
    #[error("HA VM `{0}` is not started: this node holds no fresh lease from the cluster's leader")]
    NoLease(Name),
    /// Too big for this node at present.
    #[error("VM `{name}` needs {} of memory, this node has {} left: stop or move another VM, or make it smaller", mib(*needed_bytes), mib(*available_bytes))]
    Memory {
        /// The VM.
        name: Name,
        /// Guest memory and overhead.
        needed_bytes: u64,
        /// What may be used.
        available_bytes: u64,
    },
    /// Its network.
    #[error("VM `{name}`: {source}")]
    Network {
        /// The VM.
        name: Name,
        /// Why.
        source: NetworkError,
    },
    /// The process said why it cannot run the VM.
    #[error("VM `{name}` did not start: {reason}")]
    Refused {
        /// The VM.
        name: Name,
        /// Its words.
        reason: String,
    },
    /// The process ended or hung before it was ready.
    #[error("VM `{name}`: its process {how} before it was ready: {tail}")]
    Lost {
        /// The VM.
        name: Name,
        /// What happened.
        how: String,
        /// The end of its log.
        tail: String,
    },
    /// The run folder, or the process could not be made.
    #[error(transparent)]
    Io(#[from] VmError),
}

fn mib(bytes: u64) -> ByteSize {
    ByteSize(bytes >> 20 << 20)
}

/// A VM process that is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    /// Receiving processes only: where they listen.
    pub listen: Option<SocketAddr>,
    /// Receiving processes only: SHA-256 of their one-off certificate, hexadecimal.
    pub fingerprint: Option<String>,
}

impl Supervisor {
    /// Starts a VM, or the receiving end of its migration, and returns when it runs (or listens).
    ///
    /// # Errors
    /// [`StartError`]; then no process of it is left.
    pub async fn start(&self, launch: Launch) -> Result<Started, StartError> {
        let uid = self.reserve(&launch)?;
        let mut attempt = Attempt::new(self, &launch.name);
        match self.start_reserved(launch, uid, &mut attempt).await {
            Ok(started) => Ok(started),
            Err(error) => {
                attempt.end().await;
                Err(error)
            }
        }
    }

    async fn start_reserved(
        &self,
        launch: Launch,
        uid: Option<u32>,
        attempt: &mut Attempt,
    ) -> Result<Started, StartError> {
        let name = launch.name.clone();
        // After the name is taken: a node that was fenced waits for the HA VMs that are being
        // started before it calls itself clean, so either it waits for this one, or this deadline,
        // from before the placement was read, has passed.
        if launch.ha && launch.deadline_ns.is_none_or(|at| at <= clock::boottime_ns()) {
            return Err(StartError::NoLease(name));
        }
        for nic in &launch.nics {
            ensure_bridge(&nic.bridge, &nic.uplink)
                .await
                .map_err(|source| StartError::Network { name: name.clone(), source })?;
        }
        let files = self.files(&name);
        files.prepare()?;
        let cgroup = self.shared.config.cgroups.then(|| {
            let memory_bytes = vm_needs_bytes(launch.spec.memory.0);
            jail::cgroup::make(&self.shared.config.run_dir, &name, memory_bytes, launch.spec.cpus)
        });
        attempt.cgroup = cgroup.flatten();
        let process_launch = ProcessLaunch {
            launch,
            folder: files.folder().to_owned(),
            uid,
            cgroup: attempt.cgroup.clone(),
        };
        files.write_launch(&process_launch)?;
        if process_launch.launch.ha {
            self.shared.deadlines.add(&name, files.deadline_socket());
        }
        self.spawn(&files, &process_launch, attempt).await
    }

    /// Spawns the process, writes its state file, lets it go on, and waits for its word.
    async fn spawn(
        &self,
        files: &Files,
        process_launch: &ProcessLaunch,
        attempt: &mut Attempt,
    ) -> Result<Started, StartError> {
        let launch = &process_launch.launch;
        let name = &launch.name;
        let binary = &self.shared.config.binary;
        let (ours, theirs) =
            std::os::unix::net::UnixStream::pair().map_err(VmError::io("connecting to", binary))?;
        let log = open_log(&files.process_log())?;
        let errors = log.try_clone().map_err(VmError::io("opening", files.process_log()))?;
        let mut child = Command::new(binary)
            .arg("vm")
            .arg("--launch")
            .arg(files.launch())
            // The start's conversation; the process puts /dev/null there when it is over.
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(log)
            .stderr(errors)
            .current_dir("/")
            .spawn()
            .map_err(VmError::io("running", binary))?;
        let process = ProcessHandle::open(child.id()).map_err(|error| {
            // It waits for "go", so it has done nothing yet; and as a child that was not waited for
            // it still has its pid.
            let _ = child.kill().and_then(|()| child.wait());
            VmError::io("watching", binary)(error)
        })?;
        let state = StateFile {
            name: name.clone(),
            vm_id: launch.vm_id,
            generation: launch.generation,
            pid: process.pid(),
            start_time: process.start_time(),
            boot_id: clock::boot_id(),
            ha: launch.ha,
            memory_bytes: launch.spec.memory.0,
            uid: process_launch.uid,
            cgroup: process_launch.cgroup.clone(),
            migration_id: launch.incoming.as_ref().map(|incoming| incoming.migration_id.clone()),
        };
        attempt.process = Some(process);
        files.write_state(&state)?;
        let talk = converse(ours);
        let answer = tokio::time::timeout(self.shared.config.start_timeout, talk).await;
        let lost = |how: &str| StartError::Lost {
            name: name.clone(),
            how: how.to_owned(),
            tail: log_tail(&files.process_log()),
        };
        let (listen, fingerprint) = match answer {
            Err(_) => return Err(lost("was not ready in time and was killed")),
            Ok(Err(error)) => {
                let ended = attempt.process.as_ref().map(ProcessHandle::reap_soon);
                return Err(lost(&match ended.flatten() {
                    Some(status) => format!("ended ({status:?})"),
                    None => format!("broke off ({error})"),
                }));
            }
            Ok(Ok(Startup::Failed { reason })) => {
                return Err(StartError::Refused { name: name.clone(), reason });
            }
            Ok(Ok(Startup::Ready { listen, fingerprint })) => (listen, fingerprint),
        };
        let Some(process) = attempt.process.take() else { return Err(lost("vanished")) };
        let client = client::connect(files.control_socket());
        let live = Arc::new(Live::new(files.clone(), state, process, client));
        // In the books before anything is waited for: whoever drops this start leaves no VM that
        // nobody knows of.
        self.admit(Arc::clone(&live));
        attempt.over = true;
        live.refresh().await;
        Ok(Started { listen, fingerprint })
    }

    /// Nothing of a start that failed runs any more: frees what it had.
    fn start_ended(&self, name: &Name, cgroup: Option<&Path>) {
        self.shared.deadlines.remove(name);
        if let Some(cgroup) = cgroup {
            jail::cgroup::remove(cgroup);
        }
        if let Err(error) = self.files(name).forget_process() {
            tracing::warn!(vm = %name, %error, "its run folder is not clean");
        }
        let mut vms = self.vms();
        if matches!(vms.get(name), Some(Entry::Starting { .. })) {
            vms.remove(name);
        }
    }

    /// Takes the name, a user id and the memory, or says why not.
    fn reserve(&self, launch: &Launch) -> Result<Option<u32>, StartError> {
        let memory_bytes = vm_needs_bytes(launch.spec.memory.0);
        let mut vms = self.vms();
        if vms.contains_key(&launch.name) {
            return Err(StartError::AlreadyRunning(launch.name.clone()));
        }
        let promised: u64 = vms.values().map(Entry::memory_bytes).sum();
        let starting: u64 = vms.values().map(Entry::starting_bytes).sum();
        let memory = HostMemory::read();
        let reserve = self.shared.config.reserve_memory_bytes;
        let available_bytes = memory.left(reserve, promised, starting);
        if memory_bytes > available_bytes {
            let name = launch.name.clone();
            return Err(StartError::Memory { name, needed_bytes: memory_bytes, available_bytes });
        }
        let base = self.shared.config.uid_base.filter(|_| nix::unistd::geteuid().is_root());
        let taken: Vec<u32> = vms.values().filter_map(Entry::uid).collect();
        let uid = base.map(|base| choose_uid(base, launch.vm_id, &taken));
        vms.insert(launch.name.clone(), Entry::Starting { memory_bytes, uid, ha: launch.ha });
        Ok(uid)
    }
}

/// A start under way. One that fails or is dropped has its process killed, and keeps the VM's name
/// until that is gone: until then it may write to disks, counts as an HA VM that is alive, and the VM
/// must be started neither here nor, by a placement that says that it failed, elsewhere.
struct Attempt {
    supervisor: Supervisor,
    name: Name,
    cgroup: Option<PathBuf>,
    process: Option<ProcessHandle>,
    /// It succeeded, or its end is under way.
    over: bool,
}

impl Attempt {
    fn new(supervisor: &Supervisor, name: &Name) -> Self {
        Self {
            supervisor: supervisor.clone(),
            name: name.clone(),
            cgroup: None,
            process: None,
            over: false,
        }
    }

    /// Ends a start that failed; returns when nothing of it is left.
    async fn end(mut self) {
        let (told, ended) = oneshot::channel();
        self.give_up(Some(told));
        // Never told: then its process is not known to have ended, and its name stays taken.
        if ended.await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    fn give_up(&mut self, told: Option<oneshot::Sender<()>>) {
        self.over = true;
        let (supervisor, name) = (self.supervisor.clone(), self.name.clone());
        let cgroup = self.cgroup.take();
        let Some(process) = self.process.take() else {
            supervisor.start_ended(&name, cgroup.as_deref());
            tell(told);
            return;
        };
        if let Err(errno) = process.signal(Signal::SIGKILL) {
            tracing::error!(pid = process.pid(), %errno, "cannot kill a process that failed to start");
        }
        // The end must be waited for, which a drop cannot: a thread of its own does.
        let thread = std::thread::Builder::new().name("reaper".into());
        let spawned = thread.spawn(move || {
            process.wait_and_reap();
            supervisor.start_ended(&name, cgroup.as_deref());
            tell(told);
        });
        if let Err(error) = spawned {
            tracing::error!(vm = %self.name, %error, "its name stays taken: the end of its process cannot be seen");
        }
    }
}

fn tell(told: Option<oneshot::Sender<()>>) {
    if let Some(told) = told {
        // Whoever waited may be gone.
        let _ = told.send(());
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if !self.over {
            self.give_up(None);
        }
    }
}

impl Entry {
    fn memory_bytes(&self) -> u64 {
        match self {
            Self::Starting { memory_bytes, .. } => *memory_bytes,
            Self::Live(live) => vm_needs_bytes(live.state.memory_bytes),
        }
    }

    fn starting_bytes(&self) -> u64 {
        match self {
            Self::Starting { memory_bytes, .. } => *memory_bytes,
            Self::Live(_) => 0,
        }
    }

    fn uid(&self) -> Option<u32> {
        match self {
            Self::Starting { uid, .. } => *uid,
            Self::Live(live) => live.state.uid,
        }
    }
}

/// The same VM gets the same user as long as no other VM here has it.
fn choose_uid(base: u32, vm_id: proto::VmId, taken: &[u32]) -> u32 {
    let id = vm_id.0.as_u128();
    // The remainder of a division by a u32 is a u32.
    let start = u32::try_from(id % u128::from(UID_RANGE)).unwrap_or(0);
    let nth = |step: u32| base.saturating_add((start + step) % UID_RANGE);
    (0..UID_RANGE).map(nth).find(|uid| !taken.contains(uid)).unwrap_or(base)
}

/// Says "go", then waits for the process's one line.
async fn converse(ours: std::os::unix::net::UnixStream) -> io::Result<Startup> {
    ours.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(ours)?;
    stream.write_all(b"go\n").await?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).await?;
    if line.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it said nothing"));
    }
    serde_json::from_str(&line).map_err(io::Error::other)
}

fn open_log(path: &PathBuf) -> Result<File, VmError> {
    let opened = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    opened.map_err(VmError::io("opening", path))
}

/// The last lines of a log, for a message.
fn log_tail(path: &PathBuf) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().rev().take(5).collect();
    if lines.is_empty() {
        return format!("its log {} is empty", path.display());
    }
    lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
}

/// `/proc/meminfo`.
#[derive(Debug, Clone, Copy)]
struct HostMemory {
    total_bytes: u64,
    available_bytes: u64,
}

impl HostMemory {
    /// All there is where the file cannot be read: then the kernel decides.
    fn read() -> Self {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Self::parse(&text)
    }

    fn parse(text: &str) -> Self {
        let field = |label: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(label))?;
            let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
            kib.checked_mul(1024)
        };
        Self {
            total_bytes: field("MemTotal:").unwrap_or(u64::MAX),
            available_bytes: field("MemAvailable:").unwrap_or(u64::MAX),
        }
    }

    /// What a further VM may take: by what was promised to the others (a guest uses its memory
    /// late), and by what is free now.
    fn left(self, reserve: u64, promised: u64, starting: u64) -> u64 {
        let unpromised = self.total_bytes.saturating_sub(reserve).saturating_sub(promised);
        let free = self.available_bytes.saturating_sub(starting);
        unpromised.min(free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_counted_by_promise_and_by_what_is_free() {
        let memory = HostMemory::parse("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 600 kB\n");
        assert_eq!(memory.left(0, 0, 0), 600 * 1024);
        assert_eq!(memory.left(0, 900 * 1024, 0), 100 * 1024);
        assert_eq!(memory.left(200 * 1024, 900 * 1024, 0), 0);
        assert_eq!(memory.left(0, 0, 500 * 1024), 100 * 1024);
        assert_eq!(HostMemory::parse("").left(0, 0, 0), u64::MAX);
    }

    #[test]
    fn user_ids_are_stable_and_never_shared() {
        let vm = proto::VmId(uuid::Uuid::from_u128(50_000 * 7 + 49_999));
        assert_eq!(choose_uid(100_000, vm, &[]), 149_999);
        assert_eq!(choose_uid(100_000, vm, &[149_999]), 100_000);
        assert_eq!(choose_uid(100_000, vm, &[149_999, 100_000]), 100_001);
    }
}
