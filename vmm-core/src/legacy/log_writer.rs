//! The thread that writes what a guest printed to its log file.
//!
//! ```text
//!          first byte               end of a line, FLUSH_BYTES, FLUSH_AFTER, flush, close
//!  Idle ──────────────► Gathering ─────────────────────────────────────────────► Writing
//!    ▲                      ▲ more came meanwhile                                  │
//!    └──────────────────────┴──────────────────────────────────────────────────────┘
//! ```
//! A process that dies without warning loses at most what was printed in the last `FLUSH_AFTER`. A
//! disk that is slower than the guest costs a part of the log, and the log says so.

use std::io::{self, Seek, Write};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::log_ring::{Core, LogFile};

/// So long after the first byte that waits, it is written.
const FLUSH_AFTER: Duration = Duration::from_millis(100);
/// When so many bytes wait, they are written.
const FLUSH_BYTES: u64 = 4096;
/// Most bytes of one write.
const CHUNK_BYTES: usize = 64 << 10;

/// How far the file is, and what its writer waits for.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// What lies before this offset is in the file, or gone.
    pub(super) offset: u64,
    /// Someone waits for it to be written.
    pub(super) hurry: bool,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    /// Waits for a first byte.
    Idle,
    /// Waits for the end of the line.
    Gathering,
    /// Looks by itself whether there is more.
    #[default]
    Writing,
}

impl Written {
    /// Whether the writer must be woken for `output`, which ends at `end`.
    pub(super) fn wants(&self, output: &[u8], end: u64) -> bool {
        match self.state {
            State::Idle => true,
            State::Gathering => {
                output.contains(&b'\n') || end.saturating_sub(self.offset) >= FLUSH_BYTES
            }
            State::Writing => false,
        }
    }
}

/// Starts the thread. It ends when the ring is closed and all is written.
pub(super) fn start(core: &Arc<Core>, log: LogFile) {
    let file_bytes = log.file.metadata().map_or(0, |meta| meta.len());
    let mut writer = Writer { core: Arc::clone(core), log, file_bytes };
    let thread = std::thread::Builder::new().name("serial-log".to_owned());
    let spawned = thread.spawn(move || writer.run());
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread for the serial log: there is none");
        core.lock().written = None;
    }
}

struct Writer {
    core: Arc<Core>,
    log: LogFile,
    file_bytes: u64,
}

impl Writer {
    fn run(&mut self) {
        let outcome = loop {
            let Some((missed, bytes)) = self.next() else { break Ok(()) };
            let end = self.write(missed, &bytes);
            if end.is_err() {
                break end;
            }
            self.core.flushed.notify_all();
        };
        if let Err(error) = outcome {
            tracing::warn!(%error, "the serial log cannot be written any more, giving it up");
        }
        self.core.lock().written = None;
        self.core.flushed.notify_all();
    }

    /// Waits for something to write: how many bytes are gone, and those that follow. `None`: all is
    /// written, and no more comes.
    fn next(&self) -> Option<(u64, Vec<u8>)> {
        let mut inner = self.core.lock();
        // What was taken the last time is in the file now.
        let mut gathering: Option<Instant> = None;
        loop {
            let (end, closed) = (inner.end(), inner.closed);
            let offset = inner.written.as_ref()?.offset;
            let pending = end.saturating_sub(offset);
            let hurry = std::mem::take(&mut inner.written.as_mut()?.hurry);
            let since = (pending > 0).then(|| *gathering.get_or_insert_with(Instant::now));
            let left = since.map(|since| FLUSH_AFTER.saturating_sub(since.elapsed()));
            let line = || inner.read(offset, CHUNK_BYTES).bytes.contains(&b'\n');
            let ready = hurry || closed || pending >= FLUSH_BYTES;
            if pending > 0 && (ready || left.is_some_and(|left| left.is_zero()) || line()) {
                let chunk = inner.read(offset, CHUNK_BYTES);
                inner.written.as_mut()?.state = State::Writing;
                return Some((chunk.offset - offset, chunk.bytes));
            }
            if closed {
                return None;
            }
            let state = if pending > 0 { State::Gathering } else { State::Idle };
            inner.written.as_mut()?.state = state;
            inner = match left {
                Some(left) => {
                    let waited = self.core.to_write.wait_timeout(inner, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.core.to_write.wait(inner).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Writes a chunk, after a word about what is missing before it.
    fn write(&mut self, missed: u64, bytes: &[u8]) -> io::Result<()> {
        if missed > 0 {
            let note = format!("\n[{missed} bytes are missing here: the disk was too slow]\n");
            self.append(note.as_bytes())?;
        }
        self.append(bytes)?;
        if let Some(written) = &mut self.core.lock().written {
            written.offset += missed + bytes.len() as u64;
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let limit = usize::try_from(self.log.limit_bytes).unwrap_or(usize::MAX).max(1);
        for part in bytes.chunks(limit) {
            if self.file_bytes.saturating_add(part.len() as u64) > self.log.limit_bytes {
                self.log.file.set_len(0)?;
                self.log.file.rewind()?;
                self.file_bytes = 0;
            }
            self.log.file.write_all(part)?;
            self.file_bytes += part.len() as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;
    use crate::legacy::log_ring::LogRing;

    const LIMIT: Duration = Duration::from_secs(30);

    fn log(file: impl Into<OwnedFd>) -> Option<LogFile> {
        Some(LogFile { file: File::from(file.into()), limit_bytes: u64::MAX })
    }

    #[test]
    fn a_line_is_one_write_and_not_one_for_each_byte() {
        // Each write to a datagram socket is one message.
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_read_timeout(Some(LIMIT)).unwrap();
        let ring = LogRing::new(4096, log(theirs));
        let line = b"a line that a guest prints byte by byte\n";
        let (mut writes, mut text) = (0, Vec::new());
        for _ in 0..20 {
            line.iter().for_each(|byte| ring.push(&[*byte]));
        }
        let mut buffer = [0; 4096];
        while text.len() < line.len() * 20 {
            let length = ours.recv(&mut buffer).unwrap();
            text.extend_from_slice(&buffer[..length]);
            writes += 1;
        }
        assert_eq!(text, line.repeat(20));
        assert!(writes <= 40, "{writes} writes for 20 lines of {} bytes", line.len());
    }

    #[test]
    fn what_waits_is_written_a_moment_later() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_read_timeout(Some(LIMIT)).unwrap();
        let ring = LogRing::new(4096, log(theirs));
        ring.push(b"login: ");
        let mut buffer = [0; 64];
        assert_eq!(ours.recv(&mut buffer).unwrap(), 7);
        ring.push(b"root");
        ring.flush(LIMIT);
        ours.set_nonblocking(true).unwrap();
        assert_eq!(ours.recv(&mut buffer).unwrap(), 4, "flushed when that returns");
        ring.push(b"$ ");
        ring.close();
        ring.flush(LIMIT);
        assert_eq!(ours.recv(&mut buffer).unwrap(), 2);
    }

    #[test]
    fn a_disk_that_stands_still_blocks_no_guest_and_the_log_says_what_is_missing() {
        let (mut reader, writer) = io::pipe().unwrap();
        let ring = LogRing::new(64 << 10, log(writer));
        let begin = Instant::now();
        // Much more than the pipe and the ring hold.
        (0..200_000).for_each(|_| ring.push(b"0123456789abcdef 0123456789abcdef"));
        ring.flush(Duration::from_millis(10));
        assert!(begin.elapsed() < LIMIT, "{:?}", begin.elapsed());
        ring.push(b"\nthe end\n");
        let printed = ring.end();
        ring.close();
        drop(ring);
        let mut text = Vec::new();
        reader.read_to_end(&mut text).unwrap();
        assert!((text.len() as u64) < printed / 2);
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains(" bytes are missing here") && text.ends_with("\nthe end\n"));
    }

    #[test]
    fn the_file_never_exceeds_its_limit() {
        let file = tempfile::tempfile().unwrap();
        let log = LogFile { file: file.try_clone().unwrap(), limit_bytes: 10 };
        let ring = LogRing::new(64, Some(log));
        for _ in 0..100 {
            ring.push(b"abc");
            ring.flush(LIMIT);
            assert!(file.metadata().unwrap().len() <= 10);
        }
        ring.push(&[b'x'; 40]);
        ring.flush(LIMIT);
        assert!((3..=10).contains(&file.metadata().unwrap().len()));
    }
}
