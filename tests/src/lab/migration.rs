//! Live migrations in the lab: asked for, watched, and met at a chosen moment.

use std::io::{Read, Seek, SeekFrom};
use std::time::{Duration, Instant};

use anyhow::ensure;
use proto::v1::{ListTasksResponse, Task, TaskProgress};

use super::cluster::{LIMIT, SETTLE};
use super::{Lab, wait_until};

/// What `vm migrate -o json` prints, and the demo's figures repeat.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Migration {
    /// From the request to the target's running and the source's end.
    pub total_ms: u64,
    /// How long the vCPUs stood still.
    pub downtime_ms: u64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// Precopy rounds, the last one (stop-and-copy) included.
    pub rounds: u64,
}

impl Lab {
    /// Moves a VM live.
    ///
    /// # Errors
    /// If it fails, with what `clusterctl` said.
    pub fn migrate(&self, asked: u32, vm: &str, target: u32) -> anyhow::Result<Migration> {
        self.ctl_json(asked, &["vm", "migrate", vm, &format!("node{target}")])
    }

    /// Waits until a live migration of a VM has begun to send memory.
    ///
    /// # Errors
    /// If none does.
    pub fn wait_precopy(&self, asked: u32, vm: &str) -> anyhow::Result<()> {
        wait_until(SETTLE, "the migration sends memory", || {
            Ok(self.migration_progress(asked, vm)?.is_some_and(|progress| progress.done > 0))
        })
    }

    /// How long a node's agent log is now, bytes; for [`Self::wait_log`].
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn log_length(&self, number: u32) -> anyhow::Result<u64> {
        Ok(std::fs::metadata(self.agent_log(number))?.len())
    }

    /// Waits until a node's agent has logged a text since its log had a length. The log reaches
    /// this machine as it is written, so this is precise to milliseconds.
    ///
    /// # Errors
    /// If it does not in time.
    pub fn wait_log(&self, number: u32, since: u64, text: &str) -> anyhow::Result<()> {
        let deadline = Instant::now() + LIMIT;
        let mut log = std::fs::File::open(self.agent_log(number))?;
        log.seek(SeekFrom::Start(since))?;
        let mut seen = Vec::new();
        loop {
            log.read_to_end(&mut seen)?;
            if String::from_utf8_lossy(&seen).contains(text) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "node{number} did not log `{text}`");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// How far a VM's live migration is; `None` if none runs.
    ///
    /// # Errors
    /// If the node cannot say.
    pub fn migration_progress(&self, asked: u32, vm: &str) -> anyhow::Result<Option<TaskProgress>> {
        Ok(self.migration_task(asked, vm)?.and_then(|task| task.progress))
    }

    /// The task of a VM's live migration that runs.
    ///
    /// # Errors
    /// If the node cannot say.
    pub fn migration_task(&self, asked: u32, vm: &str) -> anyhow::Result<Option<Task>> {
        let tasks = self.ctl_json::<ListTasksResponse>(asked, &["task", "list"])?.tasks;
        Ok(tasks.into_iter().find(|task| {
            task.subject == vm && task.kind.contains("migrate") && task.state == "running"
        }))
    }
}
