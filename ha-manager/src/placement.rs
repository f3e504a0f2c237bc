//! Which node can take a VM, and why the others cannot.
//!
//! Least loaded first: the share of memory that would be reserved, then the number of VMs, then
//! the node's name. What a VM takes is [`proto::vm_needs_bytes`], by which its node's agent admits it
//! as well. No preference is random, so the same cluster gives the same answer.
//!
//! Never: overcommits memory, or chooses a node that is not known to be well.

use std::collections::BTreeMap;
use std::fmt;

use proto::record::{Phase, Placement};
use proto::{Name, NodeId, vm_needs_bytes};
use serde::Serialize;

use crate::detector::NodeState;
use crate::plan::{ClusterState, Observations, VmView};

/// Why a node cannot take a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Denied {
    /// No such member.
    #[error("no such node in the cluster")]
    NoSuchNode,
    /// It owns the VM.
    #[error("the VM is already there")]
    AlreadyThere,
    /// Declared dead, or about to be.
    #[error("the node is dead")]
    Dead,
    /// Not heard lately: it may be well or not.
    #[error("the node does not answer")]
    Unknown,
    /// `node drain` is in force.
    #[error("the node is draining or in maintenance; `clusterctl node resume` ends that")]
    Draining,
    /// It is there to vote.
    #[error("the node is a witness and runs no VMs")]
    Witness,
    /// Not enough memory is left.
    #[error("the node has not enough free memory")]
    Full,
    /// Some disk or boot file is in a local pool.
    #[error("the VM uses a local storage pool; only VMs on shared pools can move")]
    NotShared,
}

/// No node can take the VM; each with its reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
pub struct NoPlace(pub BTreeMap<Name, Denied>);

impl fmt::Display for NoPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no node can take the VM")?;
        for (index, (node, denied)) in self.0.iter().enumerate() {
            write!(f, "{} {node}: {denied}", if index == 0 { ":" } else { ";" })?;
        }
        Ok(())
    }
}

/// What VMs reserve on each node: the plan adds to it as it decides.
#[derive(Debug, Clone, Default)]
pub(crate) struct Load(BTreeMap<NodeId, Reserved>);

#[derive(Debug, Clone, Copy, Default)]
struct Reserved {
    memory_bytes: u64,
    vms: u64,
}

impl Load {
    /// What the placements reserve: a VM that runs or is to run counts at its owner, a migrating
    /// one at both ends, one that runs nowhere not at all.
    pub(crate) fn of(state: &ClusterState) -> Self {
        let mut load = Self::default();
        for vm in state.vms.values() {
            load.add_placement(&vm.placement);
        }
        load
    }

    fn add_placement(&mut self, placement: &Placement) {
        match placement.phase {
            Phase::Starting | Phase::Started | Phase::Stopping => {
                self.add(placement.owner, placement.memory_bytes);
            }
            Phase::Migrating { target } => {
                self.add(placement.owner, placement.memory_bytes);
                self.add(target, placement.memory_bytes);
            }
            Phase::Stopped | Phase::Recovering | Phase::Error | Phase::Unplaceable => {}
        }
    }

    /// Counts a VM with this guest memory at `node`.
    pub(crate) fn add(&mut self, node: NodeId, memory_bytes: u64) {
        let reserved = self.0.entry(node).or_default();
        reserved.memory_bytes = reserved.memory_bytes.saturating_add(vm_needs_bytes(memory_bytes));
        reserved.vms += 1;
    }

    fn get(&self, node: NodeId) -> Reserved {
        self.0.get(&node).copied().unwrap_or_default()
    }
}

/// A VM that looks for a place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    /// Of the guest; what its process takes beside it is counted here.
    pub(crate) memory_bytes: u64,
    /// Only this node may take it: its disks are there.
    pub(crate) bound_to: Option<NodeId>,
    /// A node that must not be chosen, with the reason to report.
    pub(crate) except: Option<(NodeId, Denied)>,
    /// A node chosen only if no other can: the VM just failed to start there.
    pub(crate) avoid: Option<NodeId>,
}

/// A place, and why the other nodes are not it.
#[derive(Debug, Clone)]
pub(crate) struct Choice {
    pub(crate) node: NodeId,
    pub(crate) not_elsewhere: BTreeMap<Name, Denied>,
}

pub(crate) struct Placer<'a> {
    pub(crate) state: &'a ClusterState,
    pub(crate) observations: &'a Observations,
    pub(crate) load: Load,
}

impl Placer<'_> {
    /// Whether `node` can take the VM.
    pub(crate) fn check(&self, wanted: Wanted, node: NodeId) -> Result<(), Denied> {
        let Some(view) = self.state.nodes.get(&node) else { return Err(Denied::NoSuchNode) };
        if let Some((_, denied)) = wanted.except.filter(|(except, _)| *except == node) {
            return Err(denied);
        }
        match self.state.node_state(self.observations, node) {
            NodeState::Online => {}
            NodeState::Maintenance => return Err(Denied::Draining),
            NodeState::Unknown => return Err(Denied::Unknown),
            NodeState::Fencing | NodeState::Fenced => return Err(Denied::Dead),
            NodeState::Gone => return Err(Denied::NoSuchNode),
        }
        if view.record.witness {
            return Err(Denied::Witness);
        }
        if wanted.bound_to.is_some_and(|bound_to| bound_to != node) {
            return Err(Denied::NotShared);
        }
        let reserved_bytes = self.load.get(node).memory_bytes;
        let needed_bytes = reserved_bytes.checked_add(vm_needs_bytes(wanted.memory_bytes));
        if needed_bytes.is_none_or(|needed_bytes| needed_bytes > view.record.memory_bytes) {
            return Err(Denied::Full);
        }
        Ok(())
    }

    /// The best node for the VM.
    pub(crate) fn choose(&self, wanted: Wanted) -> Result<Choice, NoPlace> {
        let mut not_elsewhere = BTreeMap::new();
        let mut fitting = Vec::new();
        for (node, view) in &self.state.nodes {
            match self.check(wanted, *node) {
                Ok(()) => fitting.push((self.rank(wanted, *node), view.record.name.clone(), *node)),
                Err(denied) => {
                    not_elsewhere.insert(view.record.name.clone(), denied);
                }
            }
        }
        match fitting.into_iter().min() {
            Some((_, _, node)) => Ok(Choice { node, not_elsewhere }),
            None => Err(NoPlace(not_elsewhere)),
        }
    }

    /// Smaller is better. The share of memory is in parts of 2^32, so that it orders exactly
    /// enough and without floating point.
    fn rank(&self, wanted: Wanted, node: NodeId) -> (bool, u128, u64) {
        let reserved = self.load.get(node);
        let capacity_bytes = self.state.nodes.get(&node).map_or(0, |view| view.record.memory_bytes);
        let used_bytes =
            u128::from(reserved.memory_bytes) + u128::from(vm_needs_bytes(wanted.memory_bytes));
        let share = (used_bytes << 32) / u128::from(capacity_bytes.max(1));
        (wanted.avoid == Some(node), share, reserved.vms)
    }
}

impl VmView {
    /// The node whose local storage the VM needs, if it does.
    pub(crate) fn bound_to(&self) -> Option<NodeId> {
        (!self.movable).then_some(self.placement.owner)
    }
}

/// Whether `node` can take a VM that runs elsewhere (`vm migrate VM NODE`).
///
/// # Errors
/// The reason why not.
pub fn check_target(
    state: &ClusterState,
    observations: &Observations,
    vm: &VmView,
    node: NodeId,
) -> Result<(), Denied> {
    Placer { state, observations, load: Load::of(state) }.check(moving(vm), node)
}

/// A VM that is to leave its owner.
pub(crate) fn moving(vm: &VmView) -> Wanted {
    Wanted {
        memory_bytes: vm.placement.memory_bytes,
        bound_to: vm.bound_to(),
        except: Some((vm.placement.owner, Denied::AlreadyThere)),
        avoid: None,
    }
}

/// Chooses a node for a VM that runs nowhere (`vm create`), or with `leaving` for one that is to
/// leave that node (`vm migrate` without a target; check `movable` first).
///
/// # Errors
/// Every node with its reason.
pub fn place(
    state: &ClusterState,
    observations: &Observations,
    memory_bytes: u64,
    leaving: Option<NodeId>,
) -> Result<NodeId, NoPlace> {
    let except = leaving.map(|node| (node, Denied::AlreadyThere));
    let wanted = Wanted { memory_bytes, bound_to: None, except, avoid: None };
    Placer { state, observations, load: Load::of(state) }.choose(wanted).map(|choice| choice.node)
}
