//! Why the process ended: written to a file that was opened while it still could, because the
//! agent that reads it may be another one than the parent.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::supervisor::ExitReason;

/// The last word of a VM process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "reason", content = "detail")]
pub enum ExitRecord {
    /// The guest powered off.
    GuestShutdown,
    /// Its agent asked.
    Stop,
    /// Its deadline passed.
    Lease,
    /// The VM runs elsewhere by a commit.
    Migrated,
    /// It was to receive a VM, which did not come.
    IncomingAborted(String),
    /// It could not go on.
    Error(String),
}

impl ExitRecord {
    /// Writes it. A process that cannot even do this ends all the same.
    pub(super) fn write(&self, mut file: &File) {
        if let Ok(text) = serde_json::to_vec(self) {
            let _ = file.write_all(&text);
        }
    }

    /// Reads what a process left; `None` if it left nothing (it was killed).
    pub(crate) fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }
}

impl From<ExitRecord> for ExitReason {
    fn from(record: ExitRecord) -> Self {
        match record {
            ExitRecord::GuestShutdown => Self::GuestShutdown,
            ExitRecord::Stop => Self::Stopped,
            ExitRecord::Lease => Self::Lease,
            ExitRecord::Migrated => Self::Migrated,
            ExitRecord::IncomingAborted(reason) => Self::IncomingAborted(reason),
            ExitRecord::Error(reason) => Self::Failed(reason),
        }
    }
}
