//! The lab on disk: a folder with `lab.json` (who runs, which ports), the nodes' disks and sockets.
//! Another process (`lab down`, `lab ssh`) finds the lab by it.
//!
//! ```text
//! FOLDER/lab.json  lab.lock      switch/N.sock, control.sock
//!        programs/ (9p, read-only to the nodes)   shared/ (9p, the nodes' shared storage)
//!        N/ data.raw  console.log  agent.log  qmp.sock
//! ```

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::process::ProcessId;

/// What the nodes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// Virtual machines with a kernel, a disk, a watchdog and a network of their own.
    Qemu,
    /// Agents as plain processes on this machine, with its own /dev/kvm.
    Process,
}

/// A lab that was started.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// What its nodes are.
    pub backend: Backend,
    /// The secret of `lab-node serve`.
    pub token: String,
    /// Memory of a node, MiB.
    pub memory_mib: u32,
    /// CPUs of a node.
    pub cpus: u32,
    /// Whether the nodes start an agent.
    pub agent: bool,
    /// The node lease, milliseconds.
    pub lease_ms: u64,
    /// The switch; `None` with [`Backend::Process`].
    pub switch: Option<ProcessId>,
    /// The nodes, by number from 1.
    pub nodes: Vec<NodeState>,
}

/// A node of a lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeState {
    /// Its number, from 1; its name is `nodeN`.
    pub number: u32,
    /// Whether it has no hardware watchdog, and loads softdog.
    pub softdog: bool,
    /// Its QEMU, or its agent; `None`: powered off.
    pub process: Option<ProcessId>,
    /// Where the host reaches its `lab-node serve`.
    pub exec: SocketAddr,
    /// Where the host reaches its agent's API.
    pub api: SocketAddr,
}

impl State {
    /// Reads the state of the lab in a folder.
    ///
    /// # Errors
    /// If there is no lab, or its state cannot be read.
    pub fn load(folder: &Path) -> anyhow::Result<Self> {
        Self::find(folder)?.with_context(|| {
            format!("no lab is running in {}: start one with `deploy/lab up`", folder.display())
        })
    }

    /// Reads the state of the lab in a folder; `None` if there is none.
    ///
    /// # Errors
    /// If its state cannot be read.
    pub fn find(folder: &Path) -> anyhow::Result<Option<Self>> {
        let path = folder.join("lab.json");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        serde_json::from_str(&text).map(Some).with_context(|| {
            format!("{} is damaged: end the lab's processes and remove the folder", path.display())
        })
    }

    /// Writes the state, whole.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&self, folder: &Path) -> anyhow::Result<()> {
        let new = folder.join("lab.json.new");
        std::fs::write(&new, serde_json::to_vec_pretty(self)?)?;
        std::fs::rename(new, folder.join("lab.json"))?;
        Ok(())
    }

    /// The node with this number.
    ///
    /// # Errors
    /// If there is none.
    pub fn node(&self, number: u32) -> anyhow::Result<&NodeState> {
        let node = self.nodes.iter().find(|node| node.number == number);
        node.with_context(|| format!("no node {number}: this lab has 1 to {}", self.nodes.len()))
    }

    /// Whether any process of it runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.processes().any(|process| process.is_alive())
    }

    /// Every process of the lab, nodes first.
    pub fn processes(&self) -> impl Iterator<Item = ProcessId> {
        self.nodes.iter().filter_map(|node| node.process).chain(self.switch)
    }
}

/// Where the lab is without `--dir`: in `$HOLDFAST_CACHE/lab`.
#[must_use]
pub fn default_folder() -> PathBuf {
    cache().join("lab")
}

/// `$HOLDFAST_CACHE`, by the rules of `deploy/env.sh`.
#[must_use]
pub fn cache() -> PathBuf {
    let from =
        |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("HOLDFAST_CACHE").unwrap_or_else(|| {
        let home = || from("HOME").unwrap_or_else(|| "/root".into()).join(".cache");
        from("XDG_CACHE_HOME").unwrap_or_else(home).join("holdfast")
    })
}

/// Makes the folder ours: refuses a lab that runs, clears what a former one left.
pub(super) fn claim(folder: &Path) -> anyhow::Result<Flock<File>> {
    let busy = || format!("a lab runs in {} already: `deploy/lab down` ends it", folder.display());
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let is_a_labs = folder.join("lab.lock").exists();
    ensure!(
        is_a_labs || std::fs::read_dir(folder)?.next().is_none(),
        "{} has files that are no lab's, and a lab removes all in its folder: give an empty one",
        folder.display()
    );
    let lock = File::create(folder.join("lab.lock"))?;
    let lock =
        Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|_| anyhow::anyhow!(busy()))?;
    if let Ok(old) = State::load(folder) {
        ensure!(!old.is_alive(), busy());
    }
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name() == "lab.lock" {
            continue;
        }
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(lock)
}

/// Removes what temporary labs left whose process was killed; their nodes died with it.
pub(super) fn sweep(labs: &Path) {
    let Ok(entries) = std::fs::read_dir(labs) else { return };
    for folder in entries.flatten().map(|entry| entry.path()) {
        let Ok(lock) = File::open(folder.join("lab.lock")) else { continue };
        let unused = Flock::lock(lock, FlockArg::LockExclusiveNonblock).is_ok();
        if unused && !State::load(&folder).is_ok_and(|old| old.is_alive()) {
            // What cannot be removed now is tried again by the next lab.
            let _ = std::fs::remove_dir_all(&folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_other_files_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("thesis.txt");
        std::fs::write(&kept, "years of work").unwrap();
        let refused = claim(dir.path()).unwrap_err().to_string();
        assert!(refused.contains("no lab's") && kept.exists(), "{refused}");
        // What a former lab left is cleared, and a lab that was not started is no error.
        let folder = dir.path().join("lab");
        drop(claim(&folder).unwrap());
        std::fs::write(folder.join("lab.json.new"), "{").unwrap();
        drop(claim(&folder).unwrap());
        assert!(!folder.join("lab.json.new").exists());
        assert!(State::find(&folder).unwrap().is_none());
    }
}
