//! What an action's transaction writes: pure, so that whoever carries it out decides nothing.

use proto::record::{Phase, Placement, Requested};
use proto::{Name, NodeId, Revision};

use crate::plan::Action;
use crate::state::{ClusterState, VmRef, VmView};

/// One placement to put, if it is still at the revision that was decided on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    /// Whose.
    pub vm: Name,
    /// Compare the record's `mod_revision` with this.
    pub at: Revision,
    /// What to put.
    pub placement: Placement,
    /// A node that is given the VM: compare that it is not fenced, and not being removed.
    pub gives_to: Option<NodeId>,
    /// For the placement's events, with the time before it.
    pub note: String,
}

/// The placements that an action puts, all in one transaction; none for what another does
/// (a migration's are its owner's to write) or a VM that is not in `state`.
#[must_use]
pub fn edits(state: &ClusterState, action: &Action) -> Vec<Edit> {
    let one = |vm: &VmRef, note: &str, gives_to: Option<NodeId>, change: Change<'_>| {
        let view = state.vms.get(&vm.name).filter(|view| view.placement.vm_id == vm.vm_id);
        let edit = view.map(|view| {
            let mut placement = view.placement.clone();
            change(&mut placement, view);
            let at = vm.mod_revision;
            Edit { vm: vm.name.clone(), at, placement, gives_to, note: note.to_owned() }
        });
        edit.into_iter().collect()
    };
    match action {
        Action::Fence { vms, reason, .. } => vms
            .iter()
            .flat_map(|fenced| {
                let note = format!("{reason}: fenced; generation {}", fenced.vm.generation.next());
                one(&fenced.vm, &note, None, &|placement, _| fence(placement, fenced.phase))
            })
            .collect(),
        Action::Start { vm, to, reason } => {
            one(vm, reason, Some(*to), &|placement, view| start(placement, view, *to))
        }
        Action::Relocate { vm, to, reason, .. } => one(vm, reason, Some(*to), &|placement, _| {
            placement.phase = Phase::Relocating { target: *to };
        }),
        Action::Reassign { vm, to, reason } => one(vm, reason, Some(*to), &|placement, _| {
            placement.owner = *to;
            placement.generation = placement.generation.next();
        }),
        Action::Remember { vm, home, reason } => {
            one(vm, reason, None, &|placement, _| placement.home = *home)
        }
        Action::Stop { vm, reason } => {
            one(vm, reason, None, &|placement, _| placement.phase = Phase::Stopping)
        }
        Action::Freeze { vm, reason } => {
            one(vm, reason, None, &|placement, _| placement.phase = Phase::Frozen)
        }
        Action::Delay { vm, until_unix_ms, reason } => one(vm, reason, None, &|placement, _| {
            placement.retry_at_unix_ms = Some(*until_unix_ms);
        }),
        Action::MarkUnplaceable { vm, message } => one(vm, message, None, &|placement, _| {
            placement.phase = Phase::Unplaceable;
            placement.message = Some(message.clone());
        }),
        Action::MarkError { vm, message } => one(vm, message, None, &|placement, _| {
            placement.phase = Phase::Error;
            placement.retry_at_unix_ms = None;
            placement.message = Some(message.clone());
        }),
        Action::PowerOff { .. } | Action::Migrate { .. } => Vec::new(),
    }
}

type Change<'a> = &'a dyn Fn(&mut Placement, &VmView);

fn fence(placement: &mut Placement, phase: Phase) {
    placement.generation = placement.generation.next();
    placement.phase = phase;
    // What held it has died with the node.
    placement.lock = None;
    // One without HA is not started by itself: a person does, where it can run.
    if phase == Phase::Stopped && !placement.ha {
        placement.requested = Requested::Stopped;
    }
}

fn start(placement: &mut Placement, view: &VmView, to: NodeId) {
    if view.exhausted_here() {
        placement.tried.push(placement.owner);
        placement.start_failures = 0;
    } else if placement.owner != to {
        placement.start_failures = 0;
    }
    placement.owner = to;
    placement.generation = placement.generation.next();
    placement.phase = Phase::Starting;
    placement.message = None;
    placement.retry_at_unix_ms = None;
}
