//! Makes this node's VM processes what the placements say: starts what it owns, stops what it
//! should not run, and says what became of both.
//!
//! The loop looks whenever a placement, a process or the lease changes, and each second. What it
//! finds is decided by [`ha_manager::owner::decide`], and decided again on a placement that is confirmed with a quorum
//! before anything is done: without a quorum nothing is started and nothing is killed (the lease
//! and the VM processes' own deadlines do that).
//!
//! Never: chooses a node, works on a VM whose job a task holds.

mod act;
mod launch;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ha_manager::owner::{self, Step};
use proto::{Generation, Name};
use tokio::sync::mpsc;

pub use launch::{LaunchError, make_launch, may_run};

use crate::node::Node;
use crate::supervisor::{ExitReason, RunningVm, VmExited};

/// After running this long, a VM's failed starts are forgotten.
const STEADY_AFTER: Duration = Duration::from_secs(300);

/// What the loop remembers between two looks.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// Why processes ended, until it is written down.
    exits: Mutex<BTreeMap<Name, (Generation, ExitReason)>>,
    /// Since when VMs were seen running, for [`STEADY_AFTER`].
    steady: Mutex<BTreeMap<Name, Instant>>,
}

impl Memory {
    fn take_exit(&self, vm: &Name, generation: Generation) -> Option<ExitReason> {
        let mut exits = self.exits.lock().unwrap_or_else(PoisonError::into_inner);
        let (of, reason) = exits.remove(vm)?;
        (of == generation).then_some(reason)
    }

    fn note_exit(&self, exited: VmExited) {
        tracing::info!(vm = %exited.name, generation = %exited.generation, "VM process ended: {}", exited.reason);
        let mut exits = self.exits.lock().unwrap_or_else(PoisonError::into_inner);
        exits.insert(exited.name, (exited.generation, exited.reason));
    }

    /// Whether the VM has run for long enough that its failed starts are history.
    fn is_steady(&self, vm: &Name, runs: bool) -> bool {
        let mut steady = self.steady.lock().unwrap_or_else(PoisonError::into_inner);
        if !runs {
            steady.remove(vm);
            return false;
        }
        steady.entry(vm.clone()).or_insert_with(Instant::now).elapsed() > STEADY_AFTER
    }
}

/// Runs for the agent's life.
pub async fn run(node: Arc<Node>, mut exits: mpsc::UnboundedReceiver<VmExited>) {
    let memory = Arc::new(Memory::default());
    let mut board = node.board.subscribe();
    let mut lease = node.lease.subscribe();
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            changed = board.changed() => if changed.is_err() { return },
            changed = lease.changed() => if changed.is_err() { return },
            () = node.kick.notified() => {}
            () = node.jobs.freed() => {}
            exited = exits.recv() => match exited {
                Some(exited) => memory.note_exit(exited),
                None => return,
            },
        }
        look(&node, &memory, &mut exits);
    }
}

/// Looks at every VM that concerns this node, and begins what is to be done.
fn look(node: &Arc<Node>, memory: &Arc<Memory>, exits: &mut mpsc::UnboundedReceiver<VmExited>) {
    let view = node.board.view();
    if view.revision.0 == 0 {
        // Nothing has been read yet.
        return;
    }
    let processes: BTreeMap<Name, _> =
        node.supervisor.running().into_iter().map(|vm| (vm.name.clone(), vm)).collect();
    // After the processes: why one ended is told as it leaves them. A VM that is missing without a
    // reason would be taken for one that a power loss ended, and started again whatever it did.
    while let Ok(exited) = exits.try_recv() {
        memory.note_exit(exited);
    }
    let mine = view.placements.iter().filter(|(_, p)| p.value.owner == node.id);
    let names: BTreeSet<&Name> = mine.map(|(name, _)| name).chain(processes.keys()).collect();
    for name in names {
        let placement = view.placements.get(name).map(|placement| &placement.value);
        let process = processes.get(name);
        let starting = process.is_none() && node.supervisor.is_busy(name);
        let seen = process.map(RunningVm::seen);
        let may_start = node.lease.may_start();
        let step = owner::decide(node.id, placement, seen.as_ref(), starting, may_start);
        let steady = memory.is_steady(name, process.is_some());
        let forget = steady
            && placement.is_some_and(|placement| {
                placement.owner == node.id && owner::has_failures(placement)
            });
        if step == Step::Leave && !forget {
            continue;
        }
        let Some(job) = node.jobs.try_begin(name) else { continue };
        let known = process.is_some();
        let (node, memory, name) = (node.clone(), memory.clone(), name.clone());
        tokio::spawn(async move {
            let done = act::act(&node, &memory, &name, known, forget).await;
            if let Err(error) = &done {
                tracing::debug!(vm = %name, "reconciling: {error}");
                // The next look is the tick's: whatever is in the way is given a second.
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            drop(job);
        });
    }
}
