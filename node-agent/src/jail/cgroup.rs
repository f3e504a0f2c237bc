//! A cgroup v2 for each VM: memory, number of threads, share of the CPUs. Below a folder of
//! Holdfast's own at the root, so that stopping the agent's service does not reach the VMs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use proto::Name;

const ROOT: &str = "/sys/fs/cgroup";
/// File caches and the VMM's own memory may grow to this beside the guest's memory.
const HEADROOM_BYTES: u64 = 256 << 20;
/// Threads: vCPUs, devices, connections, with room.
const THREADS_MAX: u32 = 256;

/// Makes a VM's cgroup; `None` where the host has no writable cgroup v2, with the reason logged.
#[must_use]
pub fn make(run_dir: &Path, vm: &Name, memory_bytes: u64, cpus: u32) -> Option<PathBuf> {
    let root = Path::new(ROOT);
    let unified = statfs(root).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC);
    if !unified {
        tracing::debug!("{ROOT} is no cgroup v2: VMs run without limits of their own");
        return None;
    }
    match try_make(root, run_dir, vm, memory_bytes, cpus) {
        Ok(path) => Some(path),
        Err(error) => {
            tracing::warn!(%vm, %error, "no cgroup for this VM: it runs without limits of its own");
            None
        }
    }
}

fn try_make(
    root: &Path,
    run_dir: &Path,
    vm: &Name,
    memory_bytes: u64,
    cpus: u32,
) -> io::Result<PathBuf> {
    let ours = root.join("holdfast");
    let instance = ours.join(instance_name(run_dir));
    let cgroup = instance.join(vm.as_str());
    fs::create_dir_all(&cgroup)?;
    for parent in [root, ours.as_path(), instance.as_path()] {
        // Controllers that the host keeps for itself are missing below; the limits then are too.
        let _ = fs::write(parent.join("cgroup.subtree_control"), "+memory +pids +cpu");
    }
    let memory_max = memory_bytes.saturating_add(HEADROOM_BYTES).to_string();
    let limits = [
        ("memory.max", memory_max),
        ("memory.oom.group", "1".to_owned()),
        ("pids.max", THREADS_MAX.to_string()),
        ("cpu.weight", cpus.saturating_mul(100).clamp(1, 10_000).to_string()),
    ];
    for (file, value) in limits {
        if let Err(error) = fs::write(cgroup.join(file), value) {
            tracing::debug!(%vm, file, %error, "limit not set");
        }
    }
    Ok(cgroup)
}

/// Moves the calling process.
///
/// # Errors
/// The kernel's.
pub fn join(cgroup: &Path) -> io::Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0")
}

/// Removes a VM's cgroup after its process is gone.
pub fn remove(cgroup: &Path) {
    if let Err(error) = fs::remove_dir(cgroup)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::debug!(cgroup = %cgroup.display(), %error, "not removed");
    }
}

/// Several agents on one host have a run folder each.
fn instance_name(run_dir: &Path) -> String {
    let text = run_dir.to_string_lossy();
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    text.trim_matches('/').chars().map(plain).collect()
}
