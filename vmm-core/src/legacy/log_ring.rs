//! The last part of what a guest printed, for consoles that come later and for the log on disk.
//!
//! A vCPU's thread prints into memory alone. Whatever takes long (a reader, a disk) reads from
//! there, each at its own pace, and misses what it is too slow for.
//!
//! Invariant: memory and file are bounded however much the guest prints, and printing never waits
//! for a reader or a disk.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::log_writer::{self, Written};

/// A file that the output is written to as well.
#[derive(Debug)]
pub struct LogFile {
    /// Open for writing.
    pub file: File,
    /// Bytes after which the file is cut and begun anew.
    pub limit_bytes: u64,
}

#[derive(Debug)]
pub(super) struct Inner {
    bytes: VecDeque<u8>,
    /// Offset of the first byte in `bytes`, counted since the VM started.
    start: u64,
    /// Readers that wait for more: nobody is woken where nobody waits.
    waiting: usize,
    pub(super) closed: bool,
    /// How far the file is; `None`: there is none, or it was given up.
    pub(super) written: Option<Written>,
}

/// What a ring and the thread that writes its file share.
#[derive(Debug)]
pub(super) struct Core {
    inner: Mutex<Inner>,
    /// More was printed, or it is closed: for readers.
    printed: Condvar,
    /// There is something to do for the writer.
    pub(super) to_write: Condvar,
    /// The writer has written: for those who wait in [`LogRing::flush`].
    pub(super) flushed: Condvar,
    capacity: usize,
}

impl Core {
    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.lock().closed = true;
        self.printed.notify_all();
        self.to_write.notify_all();
    }
}

/// The last handle that goes closes the ring, which ends the writer.
#[derive(Debug)]
struct Handle(Arc<Core>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A bounded log of bytes with offsets that only grow. Clones are the same log.
#[derive(Debug, Clone)]
pub struct LogRing {
    handle: Arc<Handle>,
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
    /// A log that keeps the last `capacity` bytes. A thread of its own writes all to `file`, if
    /// there is one: at the end of a line, when much has gathered, and a moment after the last byte.
    #[must_use]
    pub fn new(capacity: usize, file: Option<LogFile>) -> Self {
        let inner = Inner {
            bytes: VecDeque::new(),
            start: 0,
            waiting: 0,
            closed: false,
            written: file.as_ref().map(|_| Written::default()),
        };
        let core = Arc::new(Core {
            inner: Mutex::new(inner),
            printed: Condvar::new(),
            to_write: Condvar::new(),
            flushed: Condvar::new(),
            capacity: capacity.max(1),
        });
        if let Some(file) = file {
            log_writer::start(&core, file);
        }
        Self { handle: Arc::new(Handle(core)) }
    }

    fn core(&self) -> &Core {
        &self.handle.0
    }

    /// Adds what the guest printed.
    pub fn push(&self, output: &[u8]) {
        let core = self.core();
        let mut inner = core.lock();
        inner.bytes.extend(output);
        let excess = inner.bytes.len().saturating_sub(core.capacity);
        inner.bytes.drain(..excess);
        inner.start += excess as u64;
        let end = inner.end();
        let wake = inner.written.as_ref().is_some_and(|written| written.wants(output, end));
        let waiting = inner.waiting > 0;
        drop(inner);
        if wake {
            core.to_write.notify_one();
        }
        if waiting {
            core.printed.notify_all();
        }
    }

    /// Waits until what was printed so far is in the file, at most `limit`.
    pub fn flush(&self, limit: Duration) {
        let core = self.core();
        let deadline = Instant::now() + limit;
        let mut inner = core.lock();
        let end = inner.end();
        loop {
            let Some(written) = &mut inner.written else { return };
            let left = deadline.saturating_duration_since(Instant::now());
            if written.offset >= end || left.is_zero() {
                return;
            }
            written.hurry = true;
            core.to_write.notify_one();
            inner =
                core.flushed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Wakes all readers for good: nothing more comes. What is there still goes to the file.
    pub fn close(&self) {
        self.core().close();
    }

    /// What is there from `offset` on, at most `max` bytes; empty if nothing is.
    #[must_use]
    pub fn read(&self, offset: u64, max: usize) -> LogChunk {
        self.core().lock().read(offset, max)
    }

    /// Waits until there is something from `offset` on, the log is closed, or `timeout` is over.
    #[must_use]
    pub fn wait(&self, offset: u64, max: usize, timeout: Duration) -> LogChunk {
        let deadline = Instant::now() + timeout;
        let core = self.core();
        let mut inner = core.lock();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let chunk = inner.read(offset, max);
            if !chunk.bytes.is_empty() || inner.closed || left.is_zero() {
                return chunk;
            }
            inner.waiting += 1;
            let waited = core.printed.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
            inner.waiting -= 1;
        }
    }

    /// Offset behind the last byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.core().lock().end()
    }

    /// Whether [`close`](Self::close) was called.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.core().lock().closed
    }
}

impl Inner {
    pub(super) fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    pub(super) fn read(&self, offset: u64, max: usize) -> LogChunk {
        let offset = offset.clamp(self.start, self.end());
        let skip = usize::try_from(offset - self.start).unwrap_or(usize::MAX);
        let to = self.bytes.len().min(skip.saturating_add(max));
        LogChunk { offset, bytes: self.bytes.range(skip..to).copied().collect() }
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
}
