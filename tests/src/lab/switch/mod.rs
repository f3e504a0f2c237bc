//! The lab's Ethernet switch: one Unix socket per node, frames behind a 32-bit length as QEMU's
//! `stream` backend sends them, and a control socket that cuts, slows and heals links.
//!
//! ```text
//! QEMU 1 ── 1.sock ─┐
//! QEMU 2 ── 2.sock ─┼─ Fabric (who gets the frame?) ─► each port's queue (when?) ─► its socket
//! QEMU 3 ── 3.sock ─┘        ▲ rules from control.sock
//! ```
//! [`fabric`] decides and does no I/O; [`server`] moves the bytes.

pub mod fabric;
pub mod server;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

pub use fabric::Rules;

/// What the control socket takes, one JSON line each; the answer is `ok` or the reason.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Command {
    /// Replaces all rules.
    Set(Rules),
    /// Answers with the rules (JSON) instead of `ok`.
    Get,
}

/// Sends one command and returns the answer.
///
/// # Errors
/// If the switch is gone or refuses.
pub fn control(socket: &Path, command: &Command) -> anyhow::Result<String> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("the lab's switch does not answer on {}", socket.display()))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    writeln!(stream, "{}", serde_json::to_string(command)?)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    let answer = answer.trim();
    if let Some(reason) = answer.strip_prefix("error: ") {
        bail!("the lab's switch refused: {reason}");
    }
    Ok(answer.to_owned())
}
