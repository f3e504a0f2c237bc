//! Finding the VM processes of an agent before this one.

use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use proto::Name;

use super::process::ProcessHandle;
use super::{Entry, Files, Live, RunningVm, StateFile, Supervisor, VmError, client};
use crate::clock;

/// How long a process that was found by its state file may take to answer. One that does not is
/// killed: nobody could stop it otherwise when its VM has to run elsewhere.
const ADOPTION_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a killed one may take to be gone. One that the kernel holds (storage that hangs) runs
/// nothing more and keeps its disks' locks until then: the agent need not wait for it.
const DEATH_TIMEOUT: Duration = Duration::from_secs(5);

impl Supervisor {
    /// Adopts every VM process that an earlier agent left: the state file's pid must have the
    /// start time that was written down, and its socket must answer for the same VM. Processes
    /// that do not answer are killed; records of processes that are gone are removed.
    ///
    /// # Errors
    /// [`VmError::Io`] if the run folder cannot be read.
    pub async fn adopt_all(&self) -> Result<Vec<RunningVm>, VmError> {
        let found = Files::all(&self.shared.config.run_dir)?;
        futures::future::join_all(
            found.into_iter().map(|(name, files)| async move { self.adopt(&name, files).await }),
        )
        .await;
        Ok(self.running())
    }

    async fn adopt(&self, name: &Name, files: Files) {
        let Ok(state) = files.read_state() else { return };
        let same_boot = state.boot_id.is_empty() || state.boot_id == clock::boot_id();
        let process = ProcessHandle::reopen(state.pid, state.start_time).filter(|_| same_boot);
        let Some(process) = process else {
            tracing::info!(vm = %name, pid = state.pid, "its process ended while no agent ran");
            self.clean_up(&files, &state);
            return;
        };
        let answer = client::first_status(&files, ADOPTION_TIMEOUT).await;
        let Some((client, status)) = answer.filter(|(_, status)| status.vm == name.as_str()) else {
            tracing::warn!(vm = %name, pid = state.pid, "its process answers nothing: killing it");
            if let Err(errno) = process.signal(Signal::SIGKILL) {
                tracing::error!(vm = %name, pid = state.pid, %errno, "cannot kill it");
            }
            match tokio::time::timeout(DEATH_TIMEOUT, process.exited()).await {
                Ok(Ok(_)) => self.clean_up(&files, &state),
                _ => tracing::error!(vm = %name, pid = state.pid, "it is not gone yet"),
            }
            return;
        };
        if state.ha {
            self.shared.deadlines.add(name, files.deadline_socket());
        }
        let live = Live::new(files, state, process, client);
        live.remember(&status);
        tracing::info!(vm = %name, pid = live.process.pid(), state = status.state, "adopted");
        self.admit(Arc::new(live));
    }

    /// Takes a ready process into the books and watches it.
    pub(super) fn admit(&self, live: Arc<Live>) {
        let name = live.state.name.clone();
        self.vms().insert(name, Entry::Live(Arc::clone(&live)));
        let supervisor = self.clone();
        tokio::spawn(async move {
            let reason = live.watch().await;
            supervisor.retire(&live, reason);
        });
    }

    fn retire(&self, live: &Arc<Live>, reason: super::ExitReason) {
        let name = &live.state.name;
        tracing::info!(vm = %name, %reason, "its process ended");
        self.shared.deadlines.remove(name);
        self.clean_up(&live.files, &live.state);
        let generation = live.last().generation;
        self.vms().remove(name);
        let vm_id = live.state.vm_id;
        let exit =
            super::VmExited { name: name.clone(), vm_id, generation, reason: reason.clone() };
        // Nobody listens while the agent ends; the state file is gone, so nothing is forgotten.
        let _ = self.shared.exits.send(exit);
        live.gone.send_replace(Some(reason));
    }

    pub(super) fn clean_up(&self, files: &Files, state: &StateFile) {
        if let Some(cgroup) = &state.cgroup {
            crate::jail::cgroup::remove(cgroup);
        }
        if let Err(error) = files.forget_process() {
            tracing::warn!(vm = %state.name, %error, "its run folder is not clean");
        }
    }
}

impl Live {
    pub(super) fn new(
        files: Files,
        state: StateFile,
        process: ProcessHandle,
        client: proto::v1::vm_process_client::VmProcessClient<tonic::transport::Channel>,
    ) -> Self {
        let last = super::LastSeen {
            state: super::VmState::Created,
            generation: state.generation,
            incoming: state.migration_id.clone(),
            killed: false,
        };
        let gone = tokio::sync::watch::Sender::new(None);
        Self { files, state, process, client, last: std::sync::Mutex::new(last), gone }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use proto::{Generation, VmId};

    use super::*;
    use crate::supervisor::SupervisorConfig;

    #[expect(clippy::zombie_processes, reason = "it is reaped through its pidfd")]
    #[tokio::test]
    async fn a_process_of_another_boot_is_not_touched() {
        let folder = tempfile::tempdir().unwrap();
        let config = SupervisorConfig::new(folder.path());
        let (supervisor, _exits) = Supervisor::new(config).unwrap();
        let stranger = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
        let process = ProcessHandle::open(stranger.id()).unwrap();
        let name: Name = "web".parse().unwrap();
        let files = Files::new(folder.path(), &name);
        files.prepare().unwrap();
        let state = StateFile {
            name,
            vm_id: VmId(uuid::Uuid::from_u128(7)),
            generation: Generation(3),
            pid: process.pid(),
            start_time: process.start_time(),
            boot_id: "the boot before".into(),
            ha: false,
            memory_bytes: 64 << 20,
            uid: None,
            cgroup: None,
            migration_id: None,
        };
        files.write_state(&state).unwrap();
        let adopted = supervisor.adopt_all().await.unwrap();
        let untouched = process.reap();
        process.signal(Signal::SIGKILL).unwrap();
        process.wait_and_reap();
        assert_eq!((adopted, untouched), (Vec::new(), None));
        assert!(!files.state().exists());
    }
}
