//! What the guest's probe says of itself, and what a client that talks to it noticed.

use serde::{Deserialize, Serialize};

/// What `lab-node talk` noticed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TalkReport {
    /// Times a connection was made; 1: the first one lived to the end.
    pub connections: u64,
    /// Answers received.
    pub answers: u64,
    /// Answers that were not what was sent.
    pub wrong_answers: u64,
    /// The longest time between two answers, milliseconds.
    pub longest_silence_ms: u64,
}

/// The probe's answer to `status`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The kernel's boot id.
    pub boot_id: String,
    /// CPUs the guest sees.
    pub cpus: u64,
    /// Since boot, milliseconds (CLOCK_BOOTTIME).
    pub uptime_ms: u64,
    /// Times the memory pattern was filled and found right.
    pub memory_rounds: u64,
    /// Words of memory that were not what was written.
    pub memory_errors: u64,
    /// The last record on disk that was synced; 0: none yet.
    pub last_record: u64,
    /// Why no more records are written; empty: all is well or there is no disk.
    pub disk_error: String,
    /// Its second disk, if it has one.
    pub second_disk: Option<SecondDisk>,
}

/// The guest's second disk, as it finds it at its start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecondDisk {
    /// Its size, bytes.
    pub bytes: u64,
    /// CRC-32 of all of it, read past the page cache.
    pub crc: u32,
    /// Whether the kernel calls it read-only.
    pub readonly: bool,
    /// Why it cannot be opened for writing; empty: it can.
    pub write_error: String,
}
