//! The thread of the lease and the watchdog, from the agent's first moment to its last.
//!
//! ```text
//!            ┌─ before: no lease of its own ─┐   Member   ┌─ Beat: heartbeats ─┐
//!  start ───►│ the earlier agent's bounds    ├───────────►│ the node lease     ├──► end
//!            └──▲────────────────────────────┘            └────────────────────┘
//!               └ Release (no cluster), Guard (becomes a member)
//! ```
//!
//! An agent that crashed, was killed or upgraded may have left two things: a watchdog that runs, and
//! HA VM processes with the deadline of the last acknowledged heartbeat. The next agent needs some
//! time until it has a lease of its own: it opens the database (which may take longer than the
//! watchdog's 0.4 L), becomes part of Raft again, and finds the leader. Or it finds that this node
//! belongs to no cluster any more, and never has one.
//!
//! What must hold, whatever happens, is that nothing here writes to a disk later than 0.8 L after
//! the last acknowledged heartbeat was sent: the leader gives the VMs away at L. A VM process
//! ends itself at 0.6 L and submits no write after it. What that leaves is a machine that hangs with
//! a process in it, or a write under way: those only a reset ends. So, counted from that heartbeat:
//!
//! - **While an HA VM process may be alive**, the watchdog is petted (to open it is to pet it) up to
//!   0.4 L, as the earlier agent would have: with a timeout of 0.4 L it resets by 0.8 L. The note in
//!   the run folder says when that is; without a note of this boot there is no petting.
//! - **At 0.6 L** the processes are killed, should their own deadline not have ended them. Without a
//!   note, at 0.6 L after this agent's start: every heartbeat of the earlier agent was sent before.
//! - **When no HA VM process is alive** nothing can write, and none is started without a lease: the
//!   watchdog is petted freely, however long the opening takes. "Alive" is what the process's own
//!   pidfd says: one that was killed and hangs in a disk write is alive, and gets the machine reset.
//! - **No cluster**: the same bounds until no process is left, then the watchdog is stopped (or
//!   petted for ever where the driver knows no stop). A healthy machine is not reset because somebody
//!   emptied its data folder; one with a hung process is. The VM processes of the former life are
//!   left to their deadlines: HA VMs end by 0.6 L; others know none, and run until a person ends them.
//! - A **state file that cannot be read** stands for a process that is alive.
//!
//! The node's own lease, once it has one, takes the place of all this: it is later than the note.
//!
//! Not covered: when the process that holds a watchdog dies, Linux gives it another timeout
//! (watchdog_release in drivers/watchdog/watchdog_dev.c). An agent that is cut off from the leader
//! for more than 0.4 L, *and* is killed before 0.8 L, *and* leaves a process that hangs in a disk
//! write, is on a machine that is reset up to 0.4 L too late. Locks on the storage's side, and power
//! fencing, cover that.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ha_manager::Timing;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::guard::{Allowed, Configured, Duty, Guard, Source};
use super::heartbeat::{Beat, LOOK_EVERY};
use super::memory::{FormerLease, LeaseMemory};
use crate::clock::boottime_ns;
use crate::config::Config;
use crate::node::Node;
use crate::supervisor::LeftRunning;

/// What the agent learns on its way.
#[derive(Debug)]
enum Command {
    Release,
    Guard(oneshot::Sender<()>),
    Member(Arc<Node>),
}

/// Handle on the thread. Dropped, it ends the thread and waits for that.
#[derive(Debug)]
pub struct Keeper {
    commands: mpsc::UnboundedSender<Command>,
    identity: watch::Receiver<String>,
    stop: CancellationToken,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Keeper {
    /// Starts the thread, which takes over what an earlier agent left. To be called before anything
    /// that takes long, by the one agent that holds the run folder.
    ///
    /// # Errors
    /// If the thread, or the note for the next agent, cannot be made.
    pub fn start(config: &Config, timing: Timing) -> io::Result<Self> {
        let timeout = Duration::from_secs(timing.watchdog_timeout_s());
        let source = Configured { choice: config.watchdog.clone(), timeout };
        Self::start_with(source, &config.run_dir, timing)
    }

    fn start_with<S>(source: S, run_dir: &Path, timing: Timing) -> io::Result<Self>
    where
        S: Source<Device: Send> + Send + 'static,
    {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let pet_every = Duration::from_millis(timing.pet_interval_ms());
        let guard = Guard::new(source, pet_every, Instant::now());
        let identity = guard.identity();
        let before = Before {
            guard,
            former: FormerLease::read(run_dir, timing),
            left: LeftRunning::find(run_dir),
            told: false,
        };
        let memory = LeaseMemory::open(run_dir)?;
        let (commands, commanded) = mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let ended = stop.clone();
        let thread = std::thread::Builder::new().name("lease".to_owned()).spawn(move || {
            super::urgent::make_urgent();
            runtime.block_on(keep(before, memory, commanded, ended));
        })?;
        Ok(Self { commands, identity, stop, thread: Mutex::new(Some(thread)) })
    }

    /// This node belongs to no cluster.
    pub fn release(&self) {
        self.tell(Command::Release);
    }

    /// This node becomes a member. Returns when the watchdog guards it, or cannot, or may not yet:
    /// then it does as soon as it may.
    pub async fn guard(&self) {
        let (looked, answer) = oneshot::channel();
        self.tell(Command::Guard(looked));
        // No answer means that the agent is ending.
        let _ = answer.await;
    }

    /// This node is a member: from now on its own lease counts. Its supervisor has adopted what was
    /// left here.
    pub fn member(&self, node: Arc<Node>) {
        self.tell(Command::Member(node));
    }

    /// The identity of the watchdog that guards this node as a member; empty: none (yet).
    #[must_use]
    pub fn watchdog(&self) -> watch::Receiver<String> {
        self.identity.clone()
    }

    fn tell(&self, command: Command) {
        // Nobody listens any more where the agent is ending.
        drop(self.commands.send(command));
    }

    /// Ends the thread, and waits for that. The watchdog is left running, unless no HA VM process is
    /// alive.
    pub fn end(&self) {
        self.stop.cancel();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic there was reported when it happened.
            drop(thread.join());
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.end();
    }
}

async fn keep<S: Source>(
    mut before: Before<S>,
    memory: LeaseMemory,
    mut commands: mpsc::UnboundedReceiver<Command>,
    stop: CancellationToken,
) {
    match before.run(&mut commands, &stop).await {
        Some(node) => Beat::new(node, memory, before.former).run(before.guard, stop).await,
        None => {
            let allowed = before.allowed();
            before.guard.end(allowed);
        }
    }
}

/// An agent that has no lease of its own.
struct Before<S: Source> {
    guard: Guard<S>,
    former: FormerLease,
    left: LeftRunning,
    told: bool,
}

impl<S: Source> Before<S> {
    /// Runs until this node is a member; `None`: until the agent ends.
    async fn run(
        &mut self,
        commands: &mut mpsc::UnboundedReceiver<Command>,
        stop: &CancellationToken,
    ) -> Option<Arc<Node>> {
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let mut looked = None;
            tokio::select! {
                () = stop.cancelled() => return None,
                _ = look.tick() => {}
                Some(command) = commands.recv() => match command {
                    Command::Release => self.guard.set_duty(Duty::Release),
                    Command::Guard(answer) => {
                        self.guard.set_duty(Duty::Guard);
                        looked = Some(answer);
                    }
                    Command::Member(node) => return Some(node),
                },
            }
            self.look();
            if let Some(looked) = looked {
                // Whoever asked may be gone.
                let _ = looked.send(());
            }
        }
    }

    fn look(&mut self) {
        let alive = self.left.alive() > 0;
        if alive && self.former.has_ended(boottime_ns()) {
            let killed = self.left.kill();
            if !std::mem::replace(&mut self.told, true) {
                let names: Vec<String> = killed.iter().map(ToString::to_string).collect();
                tracing::warn!(
                    "the lease of an earlier agent ran out: ending its HA VMs {}",
                    names.join(", ")
                );
            }
        }
        let allowed = self.allowed();
        self.guard.look(allowed, Instant::now());
    }

    fn allowed(&mut self) -> Allowed {
        let none_alive = self.left.alive() == 0;
        Allowed { pet: none_alive || self.former.may_pet(boottime_ns()), stop: none_alive }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::guard::tests::Fake;
    use crate::supervisor::test_strangers::Stranger;

    /// L = 3 s: the former lease pets up to 1.2 s, its VMs end at 1.8 s; a pet each 250 ms.
    fn timing() -> Timing {
        Timing::new(Timing::LEASE_MIN_MS).unwrap()
    }

    fn left_armed() -> Fake {
        Fake { armed: true, ..Fake::default() }
    }

    /// An earlier agent that sent its last acknowledged heartbeat so long ago.
    fn note(run_dir: &Path, ago_ms: u64) {
        let deadline_ns = boottime_ns() + (timing().self_stop_ms() - ago_ms) * 1_000_000;
        LeaseMemory::open(run_dir).unwrap().renewed(deadline_ns);
    }

    fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) -> Duration {
        let begin = Instant::now();
        while !is_so() {
            assert!(begin.elapsed() < Duration::from_secs(30), "waited too long: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
        begin.elapsed()
    }

    #[test]
    fn an_opening_that_takes_long_resets_no_machine_without_ha_vms() {
        let folder = tempfile::tempdir().unwrap();
        let _not_ha = Stranger::leave(folder.path(), "web", false);
        let fake = left_armed();
        let keeper = Keeper::start_with(fake.clone(), folder.path(), timing()).unwrap();
        // Nothing was heard from the opening: longer than the watchdog's whole second.
        wait_until("pets", || fake.done().len() > 6);
        assert!(fake.done().iter().skip(1).all(|done| *done == "pet"), "{:?}", fake.done());
        // It fails, or is asked to end.
        drop(keeper);
        assert_eq!(fake.done().last(), Some(&"disarm"));
    }

    #[test]
    fn while_an_ha_vm_may_run_the_earlier_lease_bounds_the_petting_and_the_vm() {
        let folder = tempfile::tempdir().unwrap();
        let vm = Stranger::leave(folder.path(), "web", true);
        let fake = left_armed();
        note(folder.path(), 0);
        let begin = boottime_ns();
        let keeper = Keeper::start_with(fake.clone(), folder.path(), timing()).unwrap();
        wait_until("it is taken over", || !fake.done().is_empty());
        wait_until("the earlier agent's last pet", || boottime_ns() - begin > 1_250_000_000);
        let pets = fake.done().len();
        wait_until("its VM is ended", || {
            let done = fake.done().len();
            // Looked at after: a pet that came with the end is none before it.
            vm.is_gone() || {
                assert_eq!(done, pets, "petted beyond 0.4 L");
                false
            }
        });
        assert!(boottime_ns() - begin >= 1_800_000_000, "ended before its time");
        wait_until("petted again: nothing can write", || fake.done().len() > pets + 1);
        drop(keeper);
    }

    #[test]
    fn without_a_note_nothing_is_petted_until_the_vm_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let vm = Stranger::leave(folder.path(), "web", true);
        let fake = left_armed();
        let keeper = Keeper::start_with(fake.clone(), folder.path(), timing()).unwrap();
        keeper.release();
        let taken = wait_until("its VM is ended", || {
            vm.is_gone() || {
                assert!(fake.done().is_empty(), "{:?}", fake.done());
                false
            }
        });
        assert!(taken >= Duration::from_millis(1_700), "ended before its time: {taken:?}");
        // A node without a cluster: taken over and stopped, once.
        wait_until("stopped", || fake.done() == ["open", "stop", "disarm"]);
        drop(keeper);
        assert_eq!(fake.done().len(), 3);
    }

    #[test]
    fn a_vm_that_ends_by_itself_frees_the_watchdog_at_once() {
        let folder = tempfile::tempdir().unwrap();
        note(folder.path(), 1_300);
        let vm = Stranger::leave(folder.path(), "web", true);
        let fake = left_armed();
        let _keeper = Keeper::start_with(fake.clone(), folder.path(), timing()).unwrap();
        assert!(fake.done().is_empty(), "the earlier agent could not have petted any more");
        vm.end();
        wait_until("taken over", || fake.done().first() == Some(&"open"));
    }

    #[test]
    fn what_is_not_known_to_be_gone_is_not_petted_for() {
        let folder = tempfile::tempdir().unwrap();
        let vm = Stranger::leave(folder.path(), "web", true);
        vm.damage();
        let fake = left_armed();
        let keeper = Keeper::start_with(fake.clone(), folder.path(), timing()).unwrap();
        let ended = FormerLease::read(folder.path(), timing());
        wait_until("the end of any earlier lease", || ended.has_ended(boottime_ns()));
        drop(keeper);
        assert!(fake.done().is_empty(), "{:?}", fake.done());
    }

    #[tokio::test]
    async fn a_member_is_told_what_guards_it() {
        let folder = tempfile::tempdir().unwrap();
        let keeper = Keeper::start_with(Fake::default(), folder.path(), timing()).unwrap();
        assert_eq!(*keeper.watchdog().borrow(), "");
        keeper.guard().await;
        assert_eq!(*keeper.watchdog().borrow(), "fake");
        // Where an HA VM of an earlier lease may run, a member does not wait for it to end.
        let vm = Stranger::leave(folder.path(), "web", true);
        let keeper = Keeper::start_with(Fake::default(), folder.path(), timing()).unwrap();
        keeper.guard().await;
        let mut watchdog = keeper.watchdog();
        assert_eq!(*watchdog.borrow_and_update(), "");
        vm.end();
        let limit = Duration::from_secs(30);
        tokio::time::timeout(limit, watchdog.changed()).await.unwrap().unwrap();
        assert_eq!(*watchdog.borrow(), "fake");
    }
}
