//! Starting and stopping vCPU threads.
//!
//! ```text
//!            run()                 run()
//!  Paused ──────────► Running ◄──────────► Paused      (request_pause, wait_paused)
//!     └───────────────── exit() ─────────► Exiting     (for good)
//! ```
//!
//! A thread in KVM_RUN is got out by a signal whose handler sets `immediate_exit` in the kvm_run
//! page of the thread that it hits. A thread clears that byte, then looks at the goal, then enters:
//! a signal before the look is answered by the look, one after it by the byte. None is lost.

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::kvm_ext::signal_thread;

/// How long vCPUs may take to leave the guest.
const PAUSE_LIMIT: Duration = Duration::from_secs(30);
/// After this long a thread that did not stop is signalled again.
const SIGNAL_AGAIN: Duration = Duration::from_millis(20);

thread_local! {
    /// The `immediate_exit` byte of the vCPU that this thread runs; null when it runs none.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

extern "C" fn handle_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    IMMEDIATE_EXIT.with(|byte| {
        let byte = byte.get();
        if !byte.is_null() {
            // SAFETY: while it is not null it points into the kvm_run page that this very thread
            // has mapped, see `KickTarget`.
            unsafe { byte.write_volatile(1) };
        }
    });
}

/// While it lives, a kick of this thread ends KVM_RUN of one vCPU.
#[derive(Debug)]
pub(super) struct KickTarget(());

impl KickTarget {
    /// # Safety
    /// `immediate_exit` must stay valid, on this thread, until the returned value is dropped.
    pub(super) unsafe fn new(immediate_exit: *mut u8) -> Self {
        IMMEDIATE_EXIT.with(|byte| byte.set(immediate_exit));
        Self(())
    }
}

impl Drop for KickTarget {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.with(|byte| byte.set(std::ptr::null_mut()));
    }
}

fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Installs the handler of the kick signal, once in a process.
pub(super) fn install_kick_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Err(error) = register_signal_handler(kick_signal(), handle_kick) {
            tracing::error!(%error, "cannot install the handler that stops vCPUs");
        }
    });
}

/// What the vCPUs shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Goal {
    Paused = 0,
    Running = 1,
    Exiting = 2,
}

/// Rounds of one vCPU's thread, on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Rounds(AtomicU64);

#[derive(Debug)]
struct Inner {
    /// Threads of the vCPUs, in order; each registers itself.
    threads: Vec<libc::pthread_t>,
    /// How many threads are outside the guest and wait.
    parked: usize,
}

/// vCPU threads did not leave the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{running} of {vcpus} vCPUs did not stop within 30 s; the host may be overloaded")]
pub struct PauseTimeout {
    /// vCPUs that still run.
    pub running: usize,
    /// All vCPUs.
    pub vcpus: usize,
}

/// Shared by the vCPU threads and those who command them.
#[derive(Debug, Clone)]
pub struct VcpuControl {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    goal: AtomicU8,
    inner: Mutex<Inner>,
    changed: Condvar,
    vcpus: usize,
    rounds: Box<[Rounds]>,
}

impl VcpuControl {
    /// Control of `vcpus` threads that will be paused at first.
    #[must_use]
    pub fn new(vcpus: usize) -> Self {
        let inner = Mutex::new(Inner { threads: Vec::new(), parked: 0 });
        let goal = AtomicU8::new(Goal::Paused as u8);
        let rounds = (0..vcpus).map(|_| Rounds::default()).collect();
        Self { shared: Arc::new(Shared { goal, inner, changed: Condvar::new(), vcpus, rounds }) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn goal(&self) -> Goal {
        match self.shared.goal.load(Ordering::SeqCst) {
            0 => Goal::Paused,
            1 => Goal::Running,
            _ => Goal::Exiting,
        }
    }

    /// Whether vCPUs are meant to run.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.goal() == Goal::Running
    }

    /// Whether the vCPU threads were told to end.
    #[must_use]
    pub fn is_exiting(&self) -> bool {
        self.goal() == Goal::Exiting
    }

    fn set_goal(&self, goal: Goal) {
        let inner = self.inner();
        if self.goal() == Goal::Exiting {
            return;
        }
        self.shared.goal.store(goal as u8, Ordering::SeqCst);
        if goal != Goal::Running {
            kick(&inner);
        }
        drop(inner);
        self.shared.changed.notify_all();
    }

    /// Counts one round of a vCPU's thread, which alone calls this for its number.
    pub(super) fn count_round(&self, index: u8) {
        if let Some(Rounds(rounds)) = self.shared.rounds.get(usize::from(index)) {
            rounds.store(rounds.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        }
    }

    /// The rounds that each vCPU's thread has made.
    #[must_use]
    pub fn rounds(&self) -> Vec<u64> {
        self.shared.rounds.iter().map(|Rounds(rounds)| rounds.load(Ordering::Relaxed)).collect()
    }

    /// Makes each vCPU leave the guest and, where it is meant to run, enter again.
    pub fn kick(&self) {
        kick(&self.inner());
    }

    /// Lets all vCPUs enter the guest.
    pub fn run(&self) {
        self.set_goal(Goal::Running);
    }

    /// Tells all vCPUs to leave the guest, and does not wait. A vCPU thread may call this.
    pub fn request_pause(&self) {
        self.set_goal(Goal::Paused);
    }

    /// Tells all vCPU threads to end.
    pub fn exit(&self) {
        self.set_goal(Goal::Exiting);
    }

    /// Waits until no vCPU is in the guest. Never call it on a vCPU's thread.
    ///
    /// # Errors
    /// [`PauseTimeout`] after 30 s.
    pub fn wait_paused(&self) -> Result<(), PauseTimeout> {
        let deadline = Instant::now() + PAUSE_LIMIT;
        let vcpus = self.shared.vcpus;
        let mut inner = self.inner();
        while inner.parked < vcpus {
            if Instant::now() >= deadline {
                return Err(PauseTimeout { running: vcpus - inner.parked, vcpus });
            }
            if self.goal() != Goal::Running {
                kick(&inner);
            }
            let waited = self.shared.changed.wait_timeout(inner, SIGNAL_AGAIN);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Called by a vCPU's thread when it begins.
    pub(super) fn register_this_thread(&self) {
        // SAFETY: pthread_self has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        self.inner().threads.push(thread);
    }

    /// Called by a vCPU's thread that is outside the guest: waits until it shall enter; false if it
    /// shall end.
    pub(super) fn park(&self) -> bool {
        let mut inner = self.inner();
        inner.parked += 1;
        self.shared.changed.notify_all();
        while self.goal() == Goal::Paused {
            inner = self.shared.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        if self.goal() == Goal::Exiting {
            // A thread that ends stays counted as parked, and is not signalled any more.
            // SAFETY: pthread_self has no preconditions.
            let this = unsafe { libc::pthread_self() };
            inner.threads.retain(|thread| *thread != this);
            return false;
        }
        inner.parked -= 1;
        true
    }
}

fn kick(inner: &Inner) {
    for thread in &inner.threads {
        // Threads take themselves off the list, under the lock that is held here, before they end.
        if let Err(error) = signal_thread(*thread, kick_signal()) {
            debug_kick(&error);
        }
    }
}

fn debug_kick(error: &io::Error) {
    tracing::debug!(%error, "cannot signal a vCPU thread");
}
