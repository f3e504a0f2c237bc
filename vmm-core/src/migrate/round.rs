//! One round on the source: reads pages, sends them, and ends the round on every data connection.
//!
//! ```text
//! reader thread ── full batches ──► one sender thread per data connection ──► TLS
//!       ▲───────── empty batches ───────┘
//! ```
//!
//! A fixed set of batches circulates, so that the next is read while the last is encrypted, and memory
//! is bounded. The calling thread reports progress meanwhile. Whoever fails raises a flag that
//! all the others see within a tick.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::batch::Batch;
use super::pace::Pace;
use super::stream::{Patience, Stream, TICK, flush, write_all};
use super::wire::{self, Kind, RoundEnd};
use super::{DirtyPages, PAGE_SIZE, PageRun, StreamError};
use crate::memory::GuestMemory;

/// How often progress is reported.
const REPORT_INTERVAL: Duration = Duration::from_millis(200);

/// What a round copies, and over what.
pub(super) struct RoundJob<'a> {
    pub(super) memory: &'a GuestMemory,
    pub(super) pages: &'a DirtyPages,
    /// Pages that are known to be zero without reading them.
    pub(super) untouched: Option<&'a DirtyPages>,
    pub(super) round: u32,
    pub(super) is_last: bool,
    pub(super) pace: &'a Mutex<Pace>,
    /// The migration's begin: the clock of `pace`.
    pub(super) epoch: Instant,
    pub(super) patience: Patience<'a>,
}

/// What a round has done so far.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RoundCount {
    pub(super) pages: u64,
    pub(super) sent_bytes: u64,
}

/// Shared by the threads of one round.
struct Shared<'a> {
    job: &'a RoundJob<'a>,
    full: Mutex<Receiver<Batch>>,
    empty: Sender<Batch>,
    failed: AtomicBool,
    pages: AtomicU64,
    sent_bytes: AtomicU64,
}

impl RoundJob<'_> {
    /// Sends the round, calling `report` now and then.
    pub(super) fn send(
        &self,
        streams: &mut [Box<dyn Stream>],
        report: &mut dyn FnMut(RoundCount),
    ) -> Result<RoundCount, StreamError> {
        let (full_sender, full) = channel();
        let (empty, empty_receiver) = channel();
        for _ in 0..=streams.len() * 2 {
            // Both ends live until the round's end, so this can't fail.
            let _ = empty.send(Batch::new());
        }
        let shared = &Shared {
            job: self,
            full: Mutex::new(full),
            empty,
            failed: AtomicBool::new(false),
            pages: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
        };
        thread::scope(|scope| {
            let (done, results) = channel();
            for stream in streams.iter_mut() {
                let done = done.clone();
                scope.spawn(move || done.send(shared.mark(shared.send_batches(stream.as_mut()))));
            }
            scope.spawn(move || {
                done.send(shared.mark(shared.read_pages(&empty_receiver, &full_sender)))
            });
            let mut outcome = Ok(());
            loop {
                match results.recv_timeout(REPORT_INTERVAL) {
                    Ok(result) => outcome = outcome.and(result),
                    Err(RecvTimeoutError::Timeout) => report(shared.count()),
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            outcome.map(|()| shared.count())
        })
    }
}

impl Shared<'_> {
    fn count(&self) -> RoundCount {
        RoundCount {
            pages: self.pages.load(Ordering::Relaxed),
            sent_bytes: self.sent_bytes.load(Ordering::Relaxed),
        }
    }

    /// Raises the flag if a thread failed. Those that stop because of the flag return `Ok`.
    fn mark(&self, result: Result<(), StreamError>) -> Result<(), StreamError> {
        if result.is_err() {
            self.failed.store(true, Ordering::Release);
        }
        result
    }

    fn is_over(&self) -> Result<bool, StreamError> {
        if self.job.patience.cancel.is_cancelled() {
            return Err(StreamError::Cancelled);
        }
        Ok(self.failed.load(Ordering::Acquire))
    }

    /// The reader thread: fills batches with the round's pages.
    fn read_pages(&self, empty: &Receiver<Batch>, full: &Sender<Batch>) -> Result<(), StreamError> {
        let Some(mut batch) = self.take_empty(empty)? else { return Ok(()) };
        for run in self.job.pages.runs() {
            for frame in run.first..run.end() {
                if batch.is_full() {
                    let Some(next) = self.take_empty(empty)? else { return Ok(()) };
                    // Fails only if every sender is gone, and then the flag is up.
                    let _ = full.send(std::mem::replace(&mut batch, next));
                }
                self.add_page(&mut batch, frame)?;
            }
        }
        if !batch.is_empty() {
            let _ = full.send(batch);
        }
        Ok(())
    }

    fn add_page(&self, batch: &mut Batch, frame: u64) -> Result<(), StreamError> {
        if self.job.untouched.is_some_and(|untouched| untouched.contains(frame)) {
            batch.add_zero_run(PageRun { first: frame, count: 1 });
            return Ok(());
        }
        let address = GuestAddress(frame.saturating_mul(PAGE_SIZE));
        batch.add_page(frame, |page| {
            // The guest may write the page meanwhile: a volatile copy, which may be torn. Its dirty bit
            // is set then, and a later round copies it again.
            let slice = self.job.memory.get_slice(address, page.len());
            let slice = slice.map_err(|error| {
                StreamError::protocol(format!("page {frame:#x} is not guest memory: {error}"))
            })?;
            slice.copy_to(page);
            Ok(())
        })
    }

    fn take_empty(&self, empty: &Receiver<Batch>) -> Result<Option<Batch>, StreamError> {
        loop {
            match empty.recv_timeout(TICK) {
                Ok(mut batch) => {
                    batch.clear();
                    return Ok(Some(batch));
                }
                Err(RecvTimeoutError::Timeout) if !self.is_over()? => {}
                Err(_) => return Ok(None),
            }
        }
    }

    /// A sender thread: sends batches until there are no more, then the round's end.
    fn send_batches(&self, stream: &mut dyn Stream) -> Result<(), StreamError> {
        let patience = self.job.patience;
        let mut carried = 0;
        while !self.is_over()? {
            let next = self.full.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(TICK);
            match next {
                Ok(mut batch) => {
                    self.send_batch(stream, &mut batch)?;
                    carried += batch.pages();
                    let _ = self.empty.send(batch);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    if self.is_over()? {
                        return Ok(());
                    }
                    let RoundJob { round, is_last, .. } = *self.job;
                    let end = RoundEnd { round, is_last, pages: carried };
                    return wire::send(stream, Kind::RoundEnd, &end.encode(), patience);
                }
            }
        }
        Ok(())
    }

    fn send_batch(&self, stream: &mut dyn Stream, batch: &mut Batch) -> Result<(), StreamError> {
        let (pages, doing) = (batch.pages(), "sending memory");
        let frame = batch.seal()?;
        write_all(stream, frame, self.job.patience, doing)?;
        flush(stream, self.job.patience, doing)?;
        let bytes = frame.len() as u64;
        self.pages.fetch_add(pages, Ordering::Relaxed);
        self.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
        let mut pace = self.job.pace.lock().unwrap_or_else(PoisonError::into_inner);
        let mut wait = pace.book(self.job.epoch.elapsed(), bytes);
        drop(pace);
        while !wait.is_zero() && !self.is_over()? {
            let step = wait.min(TICK);
            thread::sleep(step);
            wait -= step;
        }
        Ok(())
    }
}
