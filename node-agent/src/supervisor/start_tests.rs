//! Starts that fail or are dropped: a VM's name is not free before its process is gone.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use proto::{BootSpec, ByteSize, CpuModel, Generation, HaSpec, Name, VmId, VmSpec, vm_needs_bytes};

use super::process::ProcessHandle;
use super::{BootFiles, Files, Launch, StartError, Stop, Supervisor, SupervisorConfig};

const LIMIT: Duration = Duration::from_secs(30);

/// A supervisor whose VM processes never say a word.
fn supervisor(folder: &Path, start_timeout: Duration) -> Supervisor {
    let binary = folder.join("says-nothing");
    fs::write(&binary, "#!/bin/sh\nexec sleep 600\n").unwrap();
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
    let mut config = SupervisorConfig::new(folder.join("run"));
    (config.binary, config.start_timeout) = (binary, start_timeout);
    (config.uid_base, config.cgroups) = (None, false);
    Supervisor::new(config).unwrap().0
}

fn launch(name: &Name, ha: bool) -> Launch {
    Launch {
        name: name.clone(),
        vm_id: VmId(uuid::Uuid::from_u128(7)),
        generation: Generation(1),
        ha,
        spec: VmSpec {
            name: name.clone(),
            cpus: 1,
            memory: ByteSize(64 << 20),
            cpu: CpuModel::Host,
            boot: BootSpec { kernel: None, initrd: None, cmdline: String::new(), firmware: None },
            disks: Vec::new(),
            nics: Vec::new(),
            ha: HaSpec { enabled: ha, ..HaSpec::default() },
        },
        boot: BootFiles::default(),
        disks: Vec::new(),
        nics: Vec::new(),
        cpuid: Vec::new(),
        deadline_ns: ha.then(|| crate::clock::boottime_ns() + 60_000_000_000),
        incoming: None,
    }
}

/// The process of a start under way, once it has been written down.
async fn process(files: &Files) -> ProcessHandle {
    let begin = Instant::now();
    loop {
        if let Ok(Some(state)) = files.read_state_if_any() {
            return ProcessHandle::reopen(state.pid, state.start_time).unwrap().unwrap();
        }
        assert!(begin.elapsed() < LIMIT, "no process was started");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_failed_has_left_no_process() {
    let folder = tempfile::tempdir().unwrap();
    let supervisor = supervisor(folder.path(), Duration::from_millis(300));
    let web: Name = "web".parse().unwrap();
    let files = supervisor.files(&web);
    let start = tokio::spawn({
        let (supervisor, launch) = (supervisor.clone(), launch(&web, true));
        async move { supervisor.start(launch).await }
    });
    let process = process(&files).await;
    assert_eq!(supervisor.ha_count(), 1);
    let error = tokio::time::timeout(LIMIT, start).await.unwrap().unwrap().unwrap_err();
    assert!(process.has_ended(), "it may still write to the VM's disks");
    assert!(matches!(error, StartError::Lost { .. }), "{error}");
    assert!(!supervisor.is_busy(&web) && !files.state().exists());
    assert_eq!(supervisor.ha_count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_was_dropped_keeps_the_name_until_its_process_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let supervisor = supervisor(folder.path(), LIMIT);
    let web: Name = "web".parse().unwrap();
    let files = supervisor.files(&web);
    let start = tokio::spawn({
        let (supervisor, launch) = (supervisor.clone(), launch(&web, true));
        async move { supervisor.start(launch).await }
    });
    let process = process(&files).await;
    start.abort();
    assert!(start.await.unwrap_err().is_cancelled());
    // A VM that is "stopped" may be started anywhere.
    let stopped = supervisor.stop(&web, Stop::Kill);
    tokio::time::timeout(LIMIT, stopped).await.expect("its name is never free again").unwrap();
    assert!(process.has_ended(), "the VM could be started beside it");
    assert!(!supervisor.is_busy(&web) && !files.state().exists());
    assert_eq!(supervisor.ha_count(), 0);
}

#[tokio::test]
async fn a_vm_that_fits_is_one_that_placement_would_fit() {
    let folder = tempfile::tempdir().unwrap();
    let supervisor = supervisor(folder.path(), Duration::from_millis(1));
    let web: Name = "web".parse().unwrap();
    let mut launch = launch(&web, false);
    launch.spec.memory = ByteSize(1 << 60);
    let error = supervisor.start(launch).await.unwrap_err();
    let StartError::Memory { needed_bytes, .. } = error else { panic!("{error}") };
    assert_eq!(needed_bytes, vm_needs_bytes(1 << 60));
    assert!(!supervisor.is_busy(&web));
}
