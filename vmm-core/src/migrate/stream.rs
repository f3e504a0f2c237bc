//! Byte streams that never block for long, and reading and writing them with a limit.
//!
//! A [`Stream`] returns `WouldBlock` or `TimedOut` after a short tick without progress. The functions
//! here turn ticks into deadlines and look at the [`CancelToken`] on each, so that no peer can hold a
//! thread longer than its [`Patience`].

use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use super::{CancelToken, StreamError};

/// How long a stream may block before it must return `WouldBlock` or `TimedOut`.
pub(crate) const TICK: Duration = Duration::from_millis(100);

/// One connection of a migration.
///
/// `read` and `write` return `WouldBlock` or `TimedOut` when nothing moved for about 100 ms, having
/// consumed nothing, and can then be called again. `flush` too, until all that was written is sent.
pub trait Stream: Read + Write + Send {}

impl<T: Read + Write + Send> Stream for T {}

/// Opens the source's connections: the control connection first, then each data connection.
pub trait Connector {
    /// Opens the next connection.
    ///
    /// # Errors
    /// [`StreamError`] if the target can't be reached or is not the expected one.
    fn connect(&mut self, cancel: &CancelToken) -> Result<Box<dyn Stream>, StreamError>;
}

/// Gives the target's connections. Those that the source opens without waiting for an answer in
/// between may come in any order.
pub trait Acceptor {
    /// Waits for the next connection, at most `limit`.
    ///
    /// # Errors
    /// [`StreamError`] if none came in time, or the listener failed.
    fn accept(
        &mut self,
        limit: Duration,
        cancel: &CancelToken,
    ) -> Result<Box<dyn Stream>, StreamError>;
}

/// How long to wait for the peer, and what else ends the wait.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience<'a> {
    pub(crate) limit: Duration,
    pub(crate) cancel: &'a CancelToken,
}

impl Patience<'_> {
    fn check(&self, begin: Instant, doing: &'static str) -> Result<(), StreamError> {
        if self.cancel.is_cancelled() {
            return Err(StreamError::Cancelled);
        }
        if begin.elapsed() > self.limit {
            return Err(StreamError::Stalled { doing, limit: self.limit });
        }
        Ok(())
    }
}

fn is_tick(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

/// Fills `buffer` within the limit.
pub(crate) fn read_exact(
    stream: &mut (impl Stream + ?Sized),
    buffer: &mut [u8],
    patience: Patience<'_>,
    doing: &'static str,
) -> Result<(), StreamError> {
    let begin = Instant::now();
    let mut done = 0;
    while done < buffer.len() {
        match stream.read(&mut buffer[done..]) {
            Ok(0) => return Err(StreamError::Closed { doing }),
            Ok(count) => done += count,
            Err(error) if is_tick(error.kind()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                return Err(StreamError::Closed { doing });
            }
            Err(source) => return Err(StreamError::Io { doing, source }),
        }
        patience.check(begin, doing)?;
    }
    Ok(())
}

/// Writes all of `bytes` within the limit.
pub(crate) fn write_all(
    stream: &mut (impl Stream + ?Sized),
    bytes: &[u8],
    patience: Patience<'_>,
    doing: &'static str,
) -> Result<(), StreamError> {
    let begin = Instant::now();
    let mut done = 0;
    while done < bytes.len() {
        match stream.write(&bytes[done..]) {
            Ok(0) => return Err(StreamError::Closed { doing }),
            Ok(count) => done += count,
            Err(error) if is_tick(error.kind()) => {}
            Err(source) => return Err(StreamError::Io { doing, source }),
        }
        patience.check(begin, doing)?;
    }
    Ok(())
}

/// Sends what was written, within the limit.
pub(crate) fn flush(
    stream: &mut (impl Stream + ?Sized),
    patience: Patience<'_>,
    doing: &'static str,
) -> Result<(), StreamError> {
    let begin = Instant::now();
    loop {
        match stream.flush() {
            Ok(()) => return Ok(()),
            Err(error) if is_tick(error.kind()) => {}
            Err(source) => return Err(StreamError::Io { doing, source }),
        }
        patience.check(begin, doing)?;
    }
}
