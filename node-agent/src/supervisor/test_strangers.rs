//! Processes that know nothing of VMs, with the state files that an earlier agent left of them.

use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;
use proto::{Generation, VmId};

use super::process::ProcessHandle;
use super::{Files, StateFile};
use crate::clock;

/// Ended with the test, whatever becomes of that.
pub(crate) struct Stranger {
    pub(super) process: ProcessHandle,
    pub(super) state: StateFile,
    pub(super) files: Files,
}

impl Stranger {
    #[expect(clippy::zombie_processes, reason = "it is reaped through its pidfd")]
    pub(crate) fn leave(run_dir: &Path, vm: &str, ha: bool) -> Self {
        let child = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
        let process = ProcessHandle::open(child.id()).unwrap();
        let name: proto::Name = vm.parse().unwrap();
        let files = Files::new(run_dir, &name);
        files.prepare().unwrap();
        let state = StateFile {
            name,
            vm_id: VmId(uuid::Uuid::from_u128(7)),
            generation: Generation(3),
            pid: process.pid(),
            start_time: process.start_time(),
            boot_id: clock::boot_id(),
            ha,
            memory_bytes: 64 << 20,
            uid: None,
            cgroup: None,
            migration_id: None,
        };
        files.write_state(&state).unwrap();
        Self { process, state, files }
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.process.has_ended()
    }

    pub(crate) fn end(&self) {
        self.process.signal(Signal::SIGKILL).unwrap();
    }

    /// What is written down of it can no longer be read.
    pub(crate) fn damage(&self) {
        std::fs::write(self.files.state(), b"{").unwrap();
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        if self.process.signal(Signal::SIGKILL).is_ok() {
            self.process.wait_and_reap();
        }
    }
}
