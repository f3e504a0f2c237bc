//! The last part of what a guest printed, for consoles that come later, and the log on disk.
//!
//! Invariant: memory and file are bounded however much the guest prints.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A file that the output is written to as well.
#[derive(Debug)]
pub struct LogFile {
    /// Open for writing.
    pub file: File,
    /// Bytes after which the file is cut and begun anew.
    pub limit_bytes: u64,
}

#[derive(Debug)]
struct Inner {
    bytes: VecDeque<u8>,
    /// Offset of the first byte in `bytes`, counted since the VM started.
    start: u64,
    file: Option<LogFile>,
    file_bytes: u64,
    closed: bool,
}

/// A bounded log of bytes with offsets that only grow. Clones are the same log.
#[derive(Debug, Clone)]
pub struct LogRing {
    inner: Arc<(Mutex<Inner>, Condvar)>,
    capacity: usize,
}

/// A part of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogChunk {
    /// Offset of the first byte: larger than asked for if older bytes are gone.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl LogChunk {
    /// Where to go on reading.
    #[must_use]
    pub fn next_offset(&self) -> u64 {
        self.offset + self.bytes.len() as u64
    }
}

impl LogRing {
    /// A log that keeps the last `capacity` bytes, and writes all to `file` if there is one.
    #[must_use]
    pub fn new(capacity: usize, file: Option<LogFile>) -> Self {
        let file_bytes =
            file.as_ref().and_then(|log| log.file.metadata().ok()).map_or(0, |meta| meta.len());
        let inner = Inner { bytes: VecDeque::new(), start: 0, file, file_bytes, closed: false };
        Self { inner: Arc::new((Mutex::new(inner), Condvar::new())), capacity: capacity.max(1) }
    }

    fn with<T>(&self, f: impl FnOnce(&mut Inner) -> T) -> T {
        f(&mut self.inner.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Adds what the guest printed. A log file that cannot be written is given up.
    pub fn push(&self, output: &[u8]) {
        self.with(|inner| {
            inner.bytes.extend(output);
            let excess = inner.bytes.len().saturating_sub(self.capacity);
            inner.bytes.drain(..excess);
            inner.start += excess as u64;
            if inner.file.is_some()
                && let Err(error) = inner.write_file(output)
            {
                tracing::warn!(%error, "the serial log cannot be written any more, giving it up");
                inner.file = None;
            }
        });
        self.inner.1.notify_all();
    }

    /// Wakes all readers for good: nothing more comes.
    pub fn close(&self) {
        self.with(|inner| inner.closed = true);
        self.inner.1.notify_all();
    }

    /// What is there from `offset` on, at most `max` bytes; empty if nothing is.
    #[must_use]
    pub fn read(&self, offset: u64, max: usize) -> LogChunk {
        self.with(|inner| inner.read(offset, max))
    }

    /// Waits until there is something from `offset` on, the log is closed, or `timeout` is over.
    #[must_use]
    pub fn wait(&self, offset: u64, max: usize, timeout: Duration) -> LogChunk {
        let deadline = Instant::now() + timeout;
        let mut inner = self.inner.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let chunk = inner.read(offset, max);
            if !chunk.bytes.is_empty() || inner.closed || left.is_zero() {
                return chunk;
            }
            let waited = self.inner.1.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Offset behind the last byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.with(|inner| inner.end())
    }

    /// Whether [`close`](Self::close) was called.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.with(|inner| inner.closed)
    }
}

impl Inner {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    fn read(&self, offset: u64, max: usize) -> LogChunk {
        let offset = offset.clamp(self.start, self.end());
        let skip = usize::try_from(offset - self.start).unwrap_or(usize::MAX);
        LogChunk { offset, bytes: self.bytes.iter().skip(skip).take(max).copied().collect() }
    }

    fn write_file(&mut self, output: &[u8]) -> io::Result<()> {
        let Some(log) = &mut self.file else { return Ok(()) };
        if self.file_bytes.saturating_add(output.len() as u64) > log.limit_bytes {
            log.file.set_len(0)?;
            log.file.rewind()?;
            self.file_bytes = 0;
        }
        log.file.write_all(output)?;
        self.file_bytes += output.len() as u64;
        Ok(())
    }
}

/// The log as the place where a serial line writes to.
impl Write for LogRing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_last_bytes_and_says_what_is_gone() {
        let ring = LogRing::new(4, None);
        ring.push(b"abcdef");
        assert_eq!(ring.read(0, 10), LogChunk { offset: 2, bytes: b"cdef".to_vec() });
        assert_eq!(ring.read(3, 2), LogChunk { offset: 3, bytes: b"de".to_vec() });
        assert_eq!(ring.read(99, 2), LogChunk { offset: 6, bytes: vec![] });
        assert_eq!(ring.end(), 6);
    }

    #[test]
    fn a_waiting_reader_is_woken() {
        let ring = LogRing::new(16, None);
        let writer = ring.clone();
        let reader = std::thread::spawn(move || ring.wait(0, 16, Duration::from_secs(60)));
        writer.push(b"x");
        assert_eq!(reader.join().unwrap().bytes, b"x");
        writer.close();
        assert!(writer.wait(1, 16, Duration::from_secs(60)).bytes.is_empty());
    }

    #[test]
    fn the_file_never_exceeds_its_limit() {
        let file = tempfile::tempfile().unwrap();
        let log = LogFile { file: file.try_clone().unwrap(), limit_bytes: 10 };
        let ring = LogRing::new(4, Some(log));
        for _ in 0..100 {
            ring.push(b"abc");
            assert!(file.metadata().unwrap().len() <= 10);
        }
        assert!(file.metadata().unwrap().len() >= 3);
    }
}
