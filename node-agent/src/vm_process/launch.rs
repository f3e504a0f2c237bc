//! What the agent hands in, and the process's first word back.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::supervisor::Launch;

/// The content of the launch file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessLaunch {
    /// The VM.
    pub launch: Launch,
    /// Its folder in the run folder: sockets, logs, exit record.
    pub folder: PathBuf,
    /// User and group to become; `None`: stay.
    pub uid: Option<u32>,
    /// The cgroup to join.
    pub cgroup: Option<PathBuf>,
}

/// One line of JSON on the start's connection (descriptor 0).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Startup {
    /// The VM runs, or listens for its migration.
    Ready {
        /// Receiving processes: where they listen.
        listen: Option<SocketAddr>,
        /// Receiving processes: SHA-256 of their certificate, hexadecimal.
        fingerprint: Option<String>,
    },
    /// It cannot, and the process ends.
    Failed {
        /// Why, for people.
        reason: String,
    },
}
