//! A cluster's worth of machines on this one: nodes with a kernel, a disk, a watchdog and a power
//! button, on a network that can be cut. No root is needed.
//!
//! ```text
//! Lab ─┬─ QEMU 1 … N   each with its own /dev/kvm          [`qemu`]
//!      ├─ switch       their network, with scissors        [`switch`]
//!      ├─ exec         programs in the nodes               [`exec`]
//!      └─ FOLDER       disks, logs, who runs               [`state`]
//! ```
//! Invariants: every process is known by pid and start time; a [`Lab`] made with
//! [`Lifetime::WithUs`] leaves neither processes nor files, however it ends.

pub mod assets;
pub mod cluster;
mod commands;
pub mod exec;
mod faults;
pub mod guest;
pub mod handover;
pub mod host;
pub mod knock;
pub mod loopback;
pub mod migration;
pub mod process;
pub mod qemu;
pub mod scenario;
pub mod state;
pub mod switch;
pub mod talk;
mod up;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::fcntl::Flock;

use process::Lifetime;
use state::State;

/// How a lab is to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its folder; anything in it is the lab's.
    pub folder: PathBuf,
    /// How many nodes, 1 to 9.
    pub nodes: u32,
    /// CPUs of a node. An emulated node with more than one panics now and then: QEMU's emulation of
    /// SVM is not safe with several.
    pub cpus: u32,
    /// Memory of a node, MiB.
    pub memory_mib: u32,
    /// The nodes without a hardware watchdog: they have softdog.
    pub softdog: Vec<u32>,
    /// Whether the nodes run an agent.
    pub agent: bool,
    /// The node lease, milliseconds.
    pub lease_ms: u64,
    /// Whether it outlives this process.
    pub lifetime: Lifetime,
}

/// The lease that nodes have by default.
pub const LEASE_MS: u64 = 10_000;

impl Options {
    /// As [`Self::temporary`], for suites that measure no failover. Those that kill agents want their
    /// VMs back, and in an emulated node a restart takes about as long as the default lease gives a
    /// VM without an agent (0.6 L). Others want no node reset because the machine that emulates it
    /// stalled for 0.4 L.
    #[must_use]
    pub fn patient(nodes: u32) -> Self {
        Self { lease_ms: 2 * LEASE_MS, ..Self::temporary(nodes) }
    }

    /// A lab that ends with this process, in a folder of its own.
    #[must_use]
    pub fn temporary(nodes: u32) -> Self {
        let folder = state::cache().join(format!("labs/{}", std::process::id()));
        let lifetime = Lifetime::WithUs;
        Self {
            folder,
            nodes,
            cpus: 1,
            memory_mib: 1536,
            softdog: Vec::new(),
            agent: true,
            lease_ms: LEASE_MS,
            lifetime,
        }
    }
}

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    folder: PathBuf,
    state: State,
    lifetime: Lifetime,
    /// Held while the lab belongs to this process.
    _lock: Option<Flock<File>>,
}

impl Lab {
    /// The lab that runs in a folder.
    ///
    /// # Errors
    /// If there is none.
    pub fn attach(folder: &Path) -> anyhow::Result<Self> {
        let state = State::load(folder)?;
        let folder = std::fs::canonicalize(folder)?;
        Ok(Self { folder, state, lifetime: Lifetime::Detached, _lock: None })
    }

    /// Ends every process of the lab and removes its folder.
    ///
    /// # Errors
    /// If a process does not die or the folder cannot be removed.
    pub fn down(mut self) -> anyhow::Result<()> {
        self.lifetime = Lifetime::Detached; // nothing is left for drop
        self.end()
    }

    /// Copies the nodes' logs to where they outlive the lab.
    fn keep_logs(&self) -> anyhow::Result<PathBuf> {
        let name = self.folder.file_name().context("the lab has no folder")?;
        let kept = state::cache().join("lab-logs").join(name);
        for number in self.numbers() {
            let to = kept.join(number.to_string());
            std::fs::create_dir_all(&to)?;
            for log in ["agent.log", "console.log", "qemu.log", "resets.log"] {
                let from = self.folder.join(number.to_string()).join(log);
                if from.exists() {
                    std::fs::copy(from, to.join(log))?;
                }
            }
        }
        Ok(kept)
    }

    fn end(&mut self) -> anyhow::Result<()> {
        for process in self.state.processes() {
            // A frozen process takes SIGKILL too.
            ensure!(process.kill_and_wait(), "process {} does not end", process.pid);
        }
        std::fs::remove_dir_all(&self.folder)
            .with_context(|| format!("removing {}", self.folder.display()))
    }

    /// The lab's folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The folder that all nodes have at /shared.
    #[must_use]
    pub fn shared(&self) -> PathBuf {
        self.folder.join("shared")
    }

    /// What is known of it.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The nodes' numbers.
    #[must_use]
    pub fn numbers(&self) -> Vec<u32> {
        self.state.nodes.iter().map(|node| node.number).collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.lifetime != Lifetime::WithUs {
            return;
        }
        if !process::is_stopping() {
            // Nobody called `down`: something failed, and the logs may say what.
            match self.keep_logs() {
                Ok(kept) => eprintln!("lab: the nodes' logs are kept in {}", kept.display()),
                Err(error) => eprintln!("lab: the nodes' logs are lost: {error:#}"),
            }
        }
        if let Err(error) = self.end() {
            eprintln!("lab: {error:#}");
        }
    }
}

/// Waits for a condition: asks again after 50 ms, or after as long as the last answer took. To ask
/// costs an emulated node's only CPU much, and what is waited for needs it too.
///
/// # Errors
/// If the limit passes first, or the condition itself fails.
pub fn wait_until(
    limit: Duration,
    what: &str,
    mut condition: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let asked = Instant::now();
        if condition()? {
            return Ok(());
        }
        ensure!(!process::is_stopping(), "the lab is being ended");
        ensure!(Instant::now() < deadline, "waited {limit:?} in vain: {what}");
        std::thread::sleep(
            asked.elapsed().clamp(Duration::from_millis(50), Duration::from_secs(1)),
        );
    }
}
