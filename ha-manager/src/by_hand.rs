//! Fencing by hand: a person says that a node is lost for good and its machine is off.
//!
//! The leader fences dead nodes by itself, which releases their highly available VMs: those have
//! ended by their lease. All others run on without a lease and without a deadline, so nothing but
//! the machine's end ends them, and nobody but a person can know that. This plan step releases
//! them on that word, and only of a node that is dead by the detector as well.
//!
//! Never: takes a VM from a node that may still be heard, or whose lease may still run.

use std::collections::{BTreeMap, BTreeSet};

use proto::record::{Phase, Placement};
use proto::{Name, NodeId, Revision};

use crate::detector::Verdict;
use crate::plan::{Action, FencedVm, phase_after_fencing};
use crate::state::{ClusterState, Mobility, Observations, VmRef};
use crate::{NodeState, Timing};

/// Why a node is not fenced by hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FenceDenied {
    /// No such member, or it has never come up.
    #[error("no such node in the cluster, or it has never come up")]
    NoSuchNode,
    /// Asked where it is not known.
    #[error("this node does not lead the cluster; ask again")]
    NotLeading,
    /// Its heartbeats come in.
    #[error(
        "the node is alive: its last heartbeat came in {age_ms} ms ago; shut its VMs down there, or `clusterctl node drain` it"
    )]
    Heard {
        /// Since its last heartbeat.
        age_ms: u64,
    },
    /// Its lease may still run.
    #[error(
        "its lease may still run: it has not been heard for {age_ms} ms, and must be silent to this leader for {lease_ms} ms; try again then"
    )]
    LeaseMayRun {
        /// Since its last heartbeat, or since this leader began to count.
        age_ms: u64,
        /// The lease time.
        lease_ms: u64,
    },
    /// The person did not say that the machine is off.
    #[error(
        "VMs that are not highly available have no deadline and run on while their machine does: make sure that the machine is off, then say so (--yes-it-is-off)"
    )]
    Unconfirmed,
}

/// What is to be done, and what becomes of each VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ByHand {
    /// [`Action::Fence`], with the VMs that are not highly available too.
    pub action: Action,
    /// Of these VMs, the ones whose files are on that node alone: they can start nowhere else.
    pub bound: BTreeSet<Name>,
}

/// Decides whether `node` may be fenced on the word of `user`, and what that does.
///
/// # Errors
/// [`FenceDenied`]: nothing is to be done.
pub fn plan_by_hand(
    state: &ClusterState,
    observations: &Observations,
    timing: Timing,
    node: NodeId,
    machine_is_off: bool,
    user: &str,
) -> Result<ByHand, FenceDenied> {
    let view = state.nodes.get(&node).ok_or(FenceDenied::NoSuchNode)?;
    let unheard = Verdict::Unknown { age_ms: 0 };
    match observations.verdicts.get(&node).copied().unwrap_or(unheard) {
        Verdict::NotLeading => return Err(FenceDenied::NotLeading),
        Verdict::Alive { age_ms } => return Err(FenceDenied::Heard { age_ms }),
        Verdict::Unknown { age_ms } => {
            return Err(FenceDenied::LeaseMayRun { age_ms, lease_ms: timing.lease_ms() });
        }
        Verdict::Dead { .. } => {}
    }
    if !machine_is_off {
        return Err(FenceDenied::Unconfirmed);
    }
    let node_state = state.node_state(observations, node);
    let mut vms = Vec::new();
    let mut bound = BTreeSet::new();
    for (name, vm) in state.vms.iter().filter(|(_, vm)| vm.placement.owner == node) {
        let Some(phase) = phase_by_hand(node_state, &vm.placement) else { continue };
        vms.push(FencedVm { vm: VmRef::of(name, vm), phase });
        if vm.mobility == Mobility::Bound {
            bound.insert(name.clone());
        }
    }
    let reason = format!("{} was fenced by hand by {user}", view.record.name);
    let fenced = view.fenced.unwrap_or(Revision(0));
    Ok(ByHand { action: Action::Fence { node, fenced, vms, reason }, bound })
}

/// A VM that is not highly available is not started by itself: it is stopped, for a person to
/// start where it can run.
fn phase_by_hand(node_state: NodeState, placement: &Placement) -> Option<Phase> {
    if placement.ha {
        return phase_after_fencing(node_state, placement);
    }
    match placement.phase {
        Phase::Starting
        | Phase::Started
        | Phase::Stopping
        | Phase::Migrating { .. }
        | Phase::Relocating { .. } => Some(Phase::Stopped),
        Phase::Stopped | Phase::Recovering | Phase::Error | Phase::Unplaceable | Phase::Frozen => {
            None
        }
    }
}

/// What [`plan_by_hand`] made of each VM: its phase from now on, and whether it is bound.
impl ByHand {
    /// By name.
    #[must_use]
    pub fn released(&self) -> BTreeMap<Name, (Phase, bool)> {
        let Action::Fence { vms, .. } = &self.action else { return BTreeMap::new() };
        let of = |fenced: &FencedVm| {
            let name = fenced.vm.name.clone();
            let bound = self.bound.contains(&name);
            (name, (fenced.phase, bound))
        };
        vms.iter().map(of).collect()
    }
}
