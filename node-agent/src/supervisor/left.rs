//! The HA VM processes that an earlier agent left running, for who must know of them before the
//! supervisor adopts them: the keeper of the watchdog.
//!
//! Never: takes one for gone that may run. A state file that cannot be read stands for a process.

use std::path::Path;

use nix::sys::signal::Signal;
use proto::Name;

use super::process::ProcessHandle;
use super::{Files, adopt};

/// What was found in the run folder. Processes leave it when they have ended; none comes to it.
#[derive(Debug)]
pub(crate) struct LeftRunning {
    processes: Vec<(Name, ProcessHandle)>,
    /// How many may run although nothing certain is known of them.
    unknown: usize,
}

impl LeftRunning {
    /// Looks once: an agent that is not a member yet starts none.
    pub(crate) fn find(run_dir: &Path) -> Self {
        let mut left = Self { processes: Vec::new(), unknown: 0 };
        match Files::all_if_any(run_dir) {
            Ok(found) => found.iter().for_each(|(name, files)| left.look_at(name, files)),
            Err(error) => left.note_unknown(&error),
        }
        left
    }

    fn look_at(&mut self, name: &Name, files: &Files) {
        let process = files.read_state_if_any().and_then(|state| match state {
            Some(state) if state.ha => adopt::reopen(files, &state),
            Some(_) | None => Ok(None),
        });
        match process {
            Ok(Some(process)) => self.processes.push((name.clone(), process)),
            Ok(None) => {}
            Err(error) => self.note_unknown(&error),
        }
    }

    fn note_unknown(&mut self, error: &super::VmError) {
        tracing::error!("an HA VM may run here that is not known: {error}");
        self.unknown += 1;
    }

    /// How many may still run.
    pub(crate) fn alive(&mut self) -> usize {
        self.processes.retain(|(_, process)| !process.has_ended());
        self.processes.len() + self.unknown
    }

    /// Kills them all and says which were told. They are gone when [`Self::alive`] says so.
    pub(crate) fn kill(&self) -> Vec<Name> {
        let told = self.processes.iter().filter(|(name, process)| {
            let told = process.signal(Signal::SIGKILL);
            told.inspect_err(|errno| tracing::error!(vm = %name, %errno, "cannot be killed"))
                .is_ok()
        });
        told.map(|(name, _)| name.clone()).collect()
    }
}
