//! A VM's folder in the run folder, and the state file by which a later agent finds its process.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use proto::{Generation, Name, VmId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Launch, VmError};

/// What the agent knows of a VM process, for the agent after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StateFile {
    pub(crate) name: Name,
    pub(crate) vm_id: VmId,
    /// At the start. The process itself knows the present one (an incoming VM's is raised).
    pub(crate) generation: Generation,
    pub(crate) pid: u32,
    /// Field 22 of `/proc/PID/stat`.
    pub(crate) start_time: u64,
    /// Of which boot of the machine: pid and start time may both come again after another. Empty:
    /// not known.
    #[serde(default)]
    pub(crate) boot_id: String,
    pub(crate) ha: bool,
    pub(crate) memory_bytes: u64,
    pub(crate) uid: Option<u32>,
    pub(crate) cgroup: Option<PathBuf>,
    pub(crate) migration_id: Option<String>,
}

/// Paths of one VM in the run folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Files {
    folder: PathBuf,
}

impl Files {
    /// Makes the folder that holds all VMs' folders: for this user only, since whoever reaches the
    /// control sockets commands the VMs.
    pub(super) fn make_root(run_dir: &Path) -> Result<(), VmError> {
        make_private_folder(&run_dir.join("vms"))
    }

    pub(crate) fn new(run_dir: &Path, name: &Name) -> Self {
        Self { folder: run_dir.join("vms").join(name.as_str()) }
    }

    /// A VM's folder that is known.
    pub(crate) fn at(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// Every VM that has a folder.
    pub(super) fn all(run_dir: &Path) -> Result<Vec<(Name, Self)>, VmError> {
        let root = run_dir.join("vms");
        let listing = || VmError::io("listing", &root);
        let mut found = Vec::new();
        for entry in fs::read_dir(&root).map_err(listing())? {
            // One that cannot be seen may be a VM's.
            let entry = entry.map_err(listing())?;
            let name = entry.file_name().to_str().and_then(|name| name.parse::<Name>().ok());
            found.extend(name.map(|name| (name.clone(), Self::new(run_dir, &name))));
        }
        Ok(found)
    }

    /// As [`Self::all`]; none where no agent has made the folder yet.
    pub(super) fn all_if_any(run_dir: &Path) -> Result<Vec<(Name, Self)>, VmError> {
        match Self::all(run_dir) {
            Err(VmError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                Ok(Vec::new())
            }
            found => found,
        }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }
    pub(crate) fn launch(&self) -> PathBuf {
        self.folder.join("launch.json")
    }
    pub(crate) fn state(&self) -> PathBuf {
        self.folder.join("state.json")
    }
    pub(crate) fn control_socket(&self) -> PathBuf {
        self.folder.join("control.sock")
    }
    pub(crate) fn deadline_socket(&self) -> PathBuf {
        self.folder.join("deadline.sock")
    }
    pub(crate) fn exit_record(&self) -> PathBuf {
        self.folder.join("exit")
    }
    /// An empty folder for the process to have as its root.
    pub(crate) fn empty_root(&self) -> PathBuf {
        self.folder.join("root")
    }
    pub(crate) fn console_log(&self) -> PathBuf {
        self.folder.join("console.log")
    }
    pub(crate) fn process_log(&self) -> PathBuf {
        self.folder.join("process.log")
    }

    /// Makes the folder, and clears what an earlier process of this VM left, except its logs.
    pub(super) fn prepare(&self) -> Result<(), VmError> {
        make_private_folder(&self.folder)?;
        let stale =
            [self.state(), self.exit_record(), self.control_socket(), self.deadline_socket()];
        stale.iter().try_for_each(|path| remove_if_there(path))
    }

    pub(super) fn write_state(&self, state: &StateFile) -> Result<(), VmError> {
        write_whole(&self.state(), state)
    }

    #[cfg(test)]
    pub(super) fn read_state(&self) -> Result<StateFile, VmError> {
        read(&self.state())
    }

    /// `None`: no process of the VM was left here.
    pub(super) fn read_state_if_any(&self) -> Result<Option<StateFile>, VmError> {
        match read(&self.state()) {
            Ok(state) => Ok(Some(state)),
            Err(VmError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn forget_process(&self) -> Result<(), VmError> {
        let stale = [self.state(), self.control_socket(), self.deadline_socket()];
        stale.iter().try_for_each(|path| remove_if_there(path))
    }

    pub(super) fn write_launch(&self, launch: &impl Serialize) -> Result<(), VmError> {
        write_whole(&self.launch(), launch)
    }

    pub(super) fn read_launch(&self) -> Result<Launch, VmError> {
        let launch: crate::vm_process::ProcessLaunch = read(&self.launch())?;
        Ok(launch.launch)
    }

    pub(super) fn remove_all(&self) -> Result<(), VmError> {
        match fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(VmError::io("deleting", &self.folder)(error))
            }
            _ => Ok(()),
        }
    }
}

fn make_private_folder(path: &Path) -> Result<(), VmError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(VmError::io("creating", path))
}

fn remove_if_there(path: &Path) -> Result<(), VmError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(VmError::io("deleting", path)(error))
        }
        _ => Ok(()),
    }
}

/// Replaces a file by rename: whoever reads it sees the old or the new one, whole. The run folder
/// is emptied by a reboot, so nothing is synced.
fn write_whole(path: &Path, value: &impl Serialize) -> Result<(), VmError> {
    let draft = path.with_extension("draft");
    let text = serde_json::to_vec_pretty(value)
        .map_err(|error| VmError::io("encoding", path)(error.into()))?;
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&draft)
        .and_then(|mut file| file.write_all(&text))
        .and_then(|()| fs::rename(&draft, path))
        .map_err(VmError::io("writing", path))
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, VmError> {
    let text = fs::read(path).map_err(VmError::io("reading", path))?;
    serde_json::from_slice(&text).map_err(|error| VmError::io("reading", path)(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_file_is_whole_or_an_error() {
        let run = tempfile::tempdir().unwrap();
        Files::make_root(run.path()).unwrap();
        let name: Name = "web".parse().unwrap();
        let files = Files::new(run.path(), &name);
        files.prepare().unwrap();
        let state = StateFile {
            name: name.clone(),
            vm_id: VmId(uuid::Uuid::from_u128(7)),
            generation: Generation(3),
            pid: 42,
            start_time: 4242,
            boot_id: crate::clock::boot_id(),
            ha: true,
            memory_bytes: 64 << 20,
            uid: Some(100_007),
            cgroup: None,
            migration_id: None,
        };
        files.write_state(&state).unwrap();
        assert_eq!(files.read_state().unwrap(), state);
        assert_eq!(Files::all(run.path()).unwrap(), vec![(name, files.clone())]);
        fs::write(files.state(), b"{\"name\":").unwrap();
        assert!(files.read_state().is_err());
        files.prepare().unwrap();
        assert!(!files.state().exists());
        files.remove_all().unwrap();
        files.remove_all().unwrap();
    }
}
