//! Who wrote last, when another node began to start a guest: the order that must hold, by the one
//! clock that all nodes share, the machine's that emulates them.
//!
//! A node's log and the disks of its guests reach this machine as they are written. So when a node
//! logs that it starts a guest, what the guest's disk holds at that moment is all that its former
//! copy may ever have written.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;

use super::Lab;
use super::guest::Guest;
use crate::guest::records::{self, Record};
use crate::violation;

/// Looks for a node that starts a guest; from [`Lab::watch_start`].
#[derive(Debug)]
pub struct StartWatch {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Option<Start>>>,
}

/// The moment a node began to start a guest.
#[derive(Debug, Clone)]
pub struct Start {
    /// The node.
    pub node: u32,
    /// How many records were on the guest's disk.
    pub records: usize,
}

impl Lab {
    /// From now on, looks for one of `nodes` that starts the guest.
    ///
    /// # Errors
    /// If a node's log cannot be read.
    pub fn watch_start(&self, guest: &Guest, nodes: &[u32]) -> anyhow::Result<StartWatch> {
        let text = format!("starting vm={} ", guest.name);
        let disk = self.disk_of(guest);
        let mut logs = Vec::new();
        for node in nodes {
            logs.push(Follower::from_end(*node, &self.agent_log(*node))?);
        }
        let ended = Arc::new(AtomicBool::new(false));
        let stop = ended.clone();
        let thread = std::thread::spawn(move || {
            while !stop.load(Ordering::Acquire) {
                for log in &mut logs {
                    if log.has(&text)? {
                        let records = records::read(&disk)?.iter().flatten().count();
                        return Ok(Some(Start { node: log.node, records }));
                    }
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            Ok(None)
        });
        Ok(StartWatch { ended, thread })
    }
}

impl StartWatch {
    /// Ends it: the first start that it saw.
    ///
    /// # Errors
    /// If it saw none.
    pub fn seen(self) -> anyhow::Result<Start> {
        self.ended.store(true, Ordering::Release);
        let seen = self.thread.join().map_err(|_| anyhow::anyhow!("the watch broke"))??;
        seen.context("no node has logged that it starts the guest")
    }
}

/// What is wrong with a handover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandoverError {
    /// One of both copies has written nothing, or more was read than is there: this proves nothing.
    #[error("the boot before this one, or this one, has written no record")]
    Nothing,
    /// The former copy ran when another was started.
    #[error(
        "node{node} began to start the guest when {then} records were on its disk, and a boot from \
         before wrote record {late} later"
    )]
    WroteOn {
        /// That starts it.
        node: u32,
        /// Records at that moment.
        then: usize,
        /// The record.
        late: u64,
    },
}

impl Start {
    /// Checks that nothing was written by a former boot later than this; `records` are the disk's,
    /// `boot` the one that this start brought about. Gives the last record before it and its first.
    ///
    /// # Errors
    /// [`HandoverError`]; one that no later try takes back is recorded as [`violation`].
    pub fn check(&self, records: &[Record], boot: [u8; 16]) -> anyhow::Result<(Record, Record)> {
        Ok(self.compare(records, boot).inspect_err(|error| {
            if matches!(error, HandoverError::WroteOn { .. }) {
                violation::report(&error.to_string());
            }
        })?)
    }

    fn compare(
        &self,
        records: &[Record],
        boot: [u8; 16],
    ) -> Result<(Record, Record), HandoverError> {
        let Self { node, records: then } = *self;
        let (before, after) = records.split_at_checked(then).ok_or(HandoverError::Nothing)?;
        // Boots follow each other (`records::check`): one that wrote on is the last one of before.
        let last = before.last().ok_or(HandoverError::Nothing)?;
        if let Some(late) = after.iter().find(|record| record.boot_id == last.boot_id) {
            return Err(HandoverError::WroteOn { node, then, late: late.number });
        }
        let first = records.iter().find(|record| record.boot_id == boot);
        Ok((*last, *first.ok_or(HandoverError::Nothing)?))
    }
}

/// A log that grows.
struct Follower {
    node: u32,
    file: File,
    /// What came since the last whole line.
    rest: Vec<u8>,
}

impl Follower {
    fn from_end(node: u32, path: &Path) -> anyhow::Result<Self> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self { node, file, rest: Vec::new() })
    }

    /// Whether a line with the text has come since the last look.
    fn has(&mut self, text: &str) -> anyhow::Result<bool> {
        self.file.read_to_end(&mut self.rest)?;
        let whole = self.rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        let rest = self.rest.split_off(whole);
        let lines = std::mem::replace(&mut self.rest, rest);
        Ok(String::from_utf8_lossy(&lines).contains(text))
    }
}

impl Lab {
    pub(super) fn agent_log(&self, number: u32) -> PathBuf {
        self.folder().join(format!("{number}/agent.log"))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn record(number: u64, boots_before: u64) -> Record {
        let boot_id = [u8::try_from(boots_before).unwrap(); 16];
        Record { number, boots_before, boot_id, wall_ns: number, uptime_ns: number }
    }

    #[test]
    fn a_former_copy_that_writes_on_is_found() {
        let records = [record(1, 0), record(2, 0), record(3, 1)];
        let at = |then| Start { node: 2, records: then };
        let (last, first) = at(2).compare(&records, [1; 16]).unwrap();
        assert_eq!((last.number, first.number), (2, 3));
        let wrote_on = HandoverError::WroteOn { node: 2, then: 1, late: 2 };
        assert_eq!(at(1).compare(&records, [1; 16]), Err(wrote_on));
        assert_eq!(at(3).compare(&records, [2; 16]), Err(HandoverError::Nothing), "no such boot");
        assert_eq!(at(0).compare(&records, [0; 16]), Err(HandoverError::Nothing), "the first boot");
        assert_eq!(at(4).compare(&records, [1; 16]), Err(HandoverError::Nothing), "read too late");
        // One that was started once more meanwhile is no former copy.
        let twice = [record(1, 0), record(2, 1), record(3, 2)];
        let (last, first) = at(1).compare(&twice, [2; 16]).unwrap();
        assert_eq!((last.number, first.number), (1, 3));
    }

    #[test]
    fn lines_are_found_whole_and_once() {
        let mut log = tempfile::NamedTempFile::new().unwrap();
        log.write_all(b"starting vm=web generation=1\n").unwrap();
        let mut follower = Follower::from_end(1, log.path()).unwrap();
        assert!(!follower.has("starting vm=web ").unwrap(), "that was before");
        log.write_all(b"starting vm=we").unwrap();
        assert!(!follower.has("starting vm=web ").unwrap());
        log.write_all(b"b generation=2\nand").unwrap();
        assert!(follower.has("starting vm=web ").unwrap());
        assert!(!follower.has("starting vm=web ").unwrap());
    }
}
