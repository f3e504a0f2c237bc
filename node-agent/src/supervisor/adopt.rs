//! Finding the VM processes of an agent before this one.

use std::sync::Arc;

use proto::Name;

use super::process::ProcessHandle;
use super::{Entry, Files, Live, RunningVm, StateFile, Supervisor, VmError, VmState, client};
use crate::clock;

impl Supervisor {
    /// Adopts every VM process that an earlier agent left: the state file's pid must have the
    /// start time that was written down. Records of processes that are gone are removed.
    ///
    /// Waits for none of them: from here on each is renewed, counted and killed as any other. What
    /// it is doing is [`VmState::Unknown`] until it has answered, and one that never does hangs.
    ///
    /// # Errors
    /// [`VmError::Io`] if the run folder, or what is written in it, cannot be read: a VM that runs
    /// unknown to its agent would be started once more.
    pub fn adopt_all(&self) -> Result<Vec<RunningVm>, VmError> {
        let found = Files::all(&self.shared.config.run_dir)?;
        found.into_iter().try_for_each(|(name, files)| self.adopt(&name, files))?;
        Ok(self.running())
    }

    fn adopt(&self, name: &Name, files: Files) -> Result<(), VmError> {
        let Some(state) = files.read_state_if_any()? else { return Ok(()) };
        let Some(process) = reopen(&files, &state)? else {
            tracing::info!(vm = %name, pid = state.pid, "its process ended while no agent ran");
            self.clean_up(&files, &state);
            return Ok(());
        };
        if state.ha {
            self.shared.deadlines.add(name, files.deadline_socket());
        }
        let client = client::connect(files.control_socket());
        let live = Live::new(files, state, process, client);
        live.last().state = VmState::Unknown;
        tracing::info!(vm = %name, pid = live.process.pid(), "adopted");
        self.admit(Arc::new(live));
        Ok(())
    }

    /// Takes a process into the books and watches it.
    pub(super) fn admit(&self, live: Arc<Live>) {
        let name = live.state.name.clone();
        self.vms().insert(name, Entry::Live(Arc::clone(&live)));
        let supervisor = self.clone();
        tokio::spawn(async move {
            let config = &supervisor.shared.config;
            let health = async {
                live.watch_health(config).await;
                // It was killed: its end tells.
                std::future::pending().await
            };
            let reason = tokio::select! {
                reason = live.watch() => reason,
                reason = health => reason,
            };
            supervisor.retire(&live, reason);
        });
    }

    fn retire(&self, live: &Arc<Live>, reason: super::ExitReason) {
        let name = &live.state.name;
        tracing::info!(vm = %name, %reason, "its process ended");
        self.shared.deadlines.remove(name);
        self.clean_up(&live.files, &live.state);
        let generation = live.last().generation;
        let vm_id = live.state.vm_id;
        let exit =
            super::VmExited { name: name.clone(), vm_id, generation, reason: reason.clone() };
        {
            // As one step: whoever no longer finds the VM finds why in the channel.
            let mut vms = self.vms();
            vms.remove(name);
            // Nobody listens while the agent ends; the state file is gone, so nothing is forgotten.
            let _ = self.shared.exits.send(exit);
        }
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

/// The process of a state file, if it still runs.
///
/// # Errors
/// [`VmError::Io`] if that cannot be told.
pub(super) fn reopen(files: &Files, state: &StateFile) -> Result<Option<ProcessHandle>, VmError> {
    let same_boot = state.boot_id.is_empty() || state.boot_id == clock::boot_id();
    if !same_boot {
        return Ok(None);
    }
    let found = ProcessHandle::reopen(state.pid, state.start_time);
    found.map_err(VmError::io("finding the process of", files.state()))
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
            killed: None,
        };
        let gone = tokio::sync::watch::Sender::new(None);
        Self { files, state, process, client, last: std::sync::Mutex::new(last), gone }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixListener};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::supervisor::test_strangers::Stranger;
    use crate::supervisor::{ExitReason, SupervisorConfig};

    #[tokio::test]
    async fn a_process_of_another_boot_is_not_touched() {
        let folder = tempfile::tempdir().unwrap();
        let config = SupervisorConfig::new(folder.path());
        let (supervisor, _exits) = Supervisor::new(config).unwrap();
        let mut stranger = Stranger::leave(folder.path(), "web", false);
        stranger.state.boot_id = "the boot before".into();
        stranger.files.write_state(&stranger.state).unwrap();
        let adopted = supervisor.adopt_all().unwrap();
        assert_eq!((adopted, stranger.process.reap()), (Vec::new(), None));
        assert!(!stranger.files.state().exists());
    }

    #[tokio::test]
    async fn a_state_file_that_cannot_be_read_is_no_sign_that_nothing_runs() {
        let folder = tempfile::tempdir().unwrap();
        let (supervisor, _exits) = Supervisor::new(SupervisorConfig::new(folder.path())).unwrap();
        let stranger = Stranger::leave(folder.path(), "web", true);
        let files = &stranger.files;
        std::fs::write(files.state(), b"{").unwrap();
        let refused = supervisor.adopt_all().unwrap_err();
        assert!(refused.to_string().contains("state.json"), "{refused}");
        std::fs::remove_file(files.state()).unwrap();
        assert_eq!(
            supervisor.adopt_all().unwrap(),
            Vec::new(),
            "a VM that has ended left its logs"
        );
    }

    #[tokio::test]
    async fn a_process_that_cannot_be_watched_is_not_told_to_be_gone() {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        let folder = tempfile::tempdir().unwrap();
        let (supervisor, mut exits) =
            Supervisor::new(SupervisorConfig::new(folder.path())).unwrap();
        let stranger = Stranger::leave(folder.path(), "web", true);
        supervisor.adopt_all().unwrap();
        // No descriptor is left when its watch begins, which is when this test first waits.
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 3, hard).unwrap();
        let told = tokio::time::timeout(Duration::from_millis(200), exits.recv()).await;
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        assert!(told.is_err(), "{told:?}");
        assert_eq!(supervisor.ha_count(), 1);
        assert!(stranger.files.state().exists(), "the next agent would not find it");
        stranger.end();
        let limit = Duration::from_secs(30);
        let exited = tokio::time::timeout(limit, exits.recv()).await.unwrap().unwrap();
        assert!(matches!(exited.reason, ExitReason::Failed(_)), "{exited:?}");
    }

    #[tokio::test]
    async fn a_process_that_hangs_delays_no_other_and_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = SupervisorConfig::new(folder.path());
        config.probe_every = Duration::from_millis(100);
        config.hang_limit = Duration::from_millis(600);
        let (supervisor, mut exits) = Supervisor::new(config).unwrap();
        let hung = Stranger::leave(folder.path(), "web", true);
        let files = &hung.files;
        // It is there and takes connections, and that is all.
        let _control = UnixListener::bind(files.control_socket()).unwrap();
        let deadlines = UnixDatagram::bind(files.deadline_socket()).unwrap();
        deadlines.set_read_timeout(Some(Duration::from_secs(10))).unwrap();

        let begin = Instant::now();
        let adopted = supervisor.adopt_all().unwrap();
        assert!(begin.elapsed() < Duration::from_millis(500), "{:?}", begin.elapsed());
        let states: Vec<_> = adopted.iter().map(|vm| (vm.name.as_str(), vm.state)).collect();
        assert_eq!(states, [("web", VmState::Unknown)]);
        assert_eq!(supervisor.ha_count(), 1, "the watchdog knows of it");
        supervisor.renew_deadlines(77);
        let mut deadline = [0; 8];
        deadlines.recv(&mut deadline).unwrap();
        assert_eq!(u64::from_le_bytes(deadline), 77, "its lease goes on from the first moment");

        let limit = Duration::from_secs(30);
        let exited = tokio::time::timeout(limit, exits.recv()).await.unwrap().unwrap();
        let ExitReason::Hung(why) = &exited.reason else { panic!("{exited:?}") };
        assert!(why.contains("does not answer"), "{why}");
        assert!(supervisor.running().is_empty() && !files.state().exists());
    }

    #[tokio::test]
    async fn a_hung_process_without_ha_is_left_to_people() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = SupervisorConfig::new(folder.path());
        config.probe_every = Duration::from_millis(20);
        config.hang_limit = Duration::from_millis(60);
        let (supervisor, mut exits) = Supervisor::new(config).unwrap();
        let hung = Stranger::leave(folder.path(), "web", false);
        let _control = UnixListener::bind(hung.files.control_socket()).unwrap();
        supervisor.adopt_all().unwrap();
        let wait = tokio::time::timeout(Duration::from_millis(600), exits.recv()).await;
        assert!(wait.is_err(), "{wait:?}");
        assert_eq!(supervisor.running().len(), 1);
        supervisor.stop(&"web".parse().unwrap(), crate::supervisor::Stop::Kill).await.unwrap();
        assert_eq!(exits.recv().await.unwrap().reason, ExitReason::Killed);
    }
}
