//! The thread that works for a running device.
//!
//! An [`Engine`] owns queues and backend; a [`Worker`] moves it into a thread, waits on its file
//! descriptors, and moves it back out when it is stopped. Between two calls of [`Engine::handle`]
//! an engine has nothing in flight, so stopping drains it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The token of the eventfd that ends a worker.
const STOP: u64 = u64::MAX;
/// Events taken with one epoll_wait.
const BATCH: usize = 16;

/// A file descriptor that wakes an engine while it can be read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source {
    pub(crate) fd: RawFd,
    /// Handed to [`Engine::handle`]; not [`u64::MAX`].
    pub(crate) token: u64,
}

/// The running half of a device.
pub(crate) trait Engine: Send + 'static {
    /// What wakes it, now. Asked again after each wake-up when [`Self::sources_changed`].
    fn sources(&self) -> Vec<Source>;
    /// Whether [`Self::sources`] gives something else than before; asked after each wake-up.
    fn sources_changed(&mut self) -> bool {
        false
    }
    /// Works on what `token` brought, a bounded amount; completes all that it begins.
    fn handle(&mut self, token: u64);
}

/// A running engine.
pub(crate) struct Worker<E> {
    stop: EventFd,
    thread: Option<JoinHandle<Box<E>>>,
}

impl<E> std::fmt::Debug for Worker<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

impl<E: Engine> Worker<E> {
    /// Starts a thread called `name` (15 bytes of it are visible) for `engine`.
    pub(crate) fn start(name: &str, engine: E) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, STOP);
        epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), event)?;
        let mut watched = Watched::default();
        watched.update(&epoll, &engine.sources())?;
        let engine = Box::new(engine);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(&epoll, watched, engine))?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Ends the thread after what it is at and gives the engine back. `None` when the thread
    /// panicked, which is a bug in this crate.
    pub(crate) fn stop(mut self) -> Option<Box<E>> {
        let thread = self.thread.take()?;
        if let Err(error) = self.stop.write(1) {
            tracing::error!(%error, "a device's worker cannot be told to stop");
        }
        thread.join().ok()
    }
}

impl<E> Drop for Worker<E> {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = self.stop.write(1);
            let _ = thread.join();
        }
    }
}

/// File descriptors that an epoll instance watches.
#[derive(Default)]
struct Watched(Vec<Source>);

impl Watched {
    fn update(&mut self, epoll: &Epoll, sources: &[Source]) -> io::Result<()> {
        for old in std::mem::take(&mut self.0) {
            epoll.ctl(ControlOperation::Delete, old.fd, EpollEvent::default())?;
        }
        for source in sources {
            let event = EpollEvent::new(EventSet::IN, source.token);
            epoll.ctl(ControlOperation::Add, source.fd, event)?;
            self.0.push(*source);
        }
        Ok(())
    }
}

fn run<E: Engine>(epoll: &Epoll, mut watched: Watched, mut engine: Box<E>) -> Box<E> {
    let mut events = [EpollEvent::default(); BATCH];
    loop {
        let count = match epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::error!(%error, "a device's worker cannot wait; it ends");
                return engine;
            }
        };
        // To stop comes first: what else there is waits in the rings.
        if events[..count].iter().any(|event| event.data() == STOP) {
            return engine;
        }
        for event in &events[..count] {
            engine.handle(event.data());
        }
        if engine.sources_changed()
            && let Err(error) = watched.update(epoll, &engine.sources())
        {
            tracing::error!(%error, "a device's worker cannot wait; it ends");
            return engine;
        }
    }
}
