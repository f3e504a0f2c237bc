//! Which node can take a VM, and why the others cannot.
//!
//! Strict rules, memory and the node's state say which nodes can. Among these: not one where it
//! just failed to start, then the heavier one by node affinity, the one with more VMs it should be
//! with, with fewer it should not, the one where it is, the least loaded, the first by name. No
//! preference is random, so the same cluster gives the same answer. What a VM takes is
//! [`proto::vm_needs_bytes`], by which its node's agent admits it as well.
//!
//! Never: overcommits memory, or chooses a node that is not known to be well.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;

use proto::{Name, NodeId};
use serde::Serialize;

use crate::detector::NodeState;
use crate::load::{Load, Share, Takes};
use crate::policy::Policy;
use crate::state::{ClusterState, NodeView, Observations, VmView};

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
    /// It goes down as planned, or has.
    #[error("the node is shut down")]
    Absent,
    /// It is there to vote.
    #[error("the node is a witness and runs no VMs")]
    Witness,
    /// Its VM storage is lost.
    #[error("the node has lost its VM storage")]
    StorageLost,
    /// Neither watchdog nor power fencing.
    #[error("the node has no watchdog and no power fencing, which HA VMs need")]
    Unprotected,
    /// Not enough memory is left.
    #[error(
        "the node has not enough free memory: {needed_mib} MiB are needed, {free_mib} MiB free"
    )]
    Full {
        /// By the VM, and those that must come with it.
        needed_mib: u64,
        /// Not reserved by other VMs.
        free_mib: u64,
    },
    /// Some disk or boot file is in a local pool.
    #[error("the VM uses a local storage pool; only VMs on shared pools can move")]
    NotShared,
    /// A strict rule names other nodes.
    #[error("a strict node-affinity rule names other nodes")]
    NodeAffinity,
    /// VMs it must be with are elsewhere.
    #[error("a strict affinity rule keeps the VM with others, which are elsewhere")]
    Affinity,
    /// A VM it must not be with is there.
    #[error("a strict anti-affinity rule keeps the VM apart from one that is there")]
    AntiAffinity,
}

/// No node can take the VM; each with its reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
pub struct NoPlace(pub BTreeMap<Name, Denied>);

impl fmt::Display for NoPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no node can take the VM")?;
        for (index, (node, denied)) in self.0.iter().enumerate() {
            write!(f, "{} {node}: ", if index == 0 { ":" } else { ";" })?;
            // Without the numbers: this is written down, and not anew with each VM that comes or goes.
            match denied {
                Denied::Full { .. } => f.write_str("the node has not enough free memory")?,
                denied => denied.fmt(f)?,
            }
        }
        Ok(())
    }
}

/// A VM that looks for a place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted<'a> {
    pub(crate) name: &'a Name,
    pub(crate) vm: &'a VmView,
    /// It leaves this node: those of its bundle that are there come with it.
    pub(crate) leaving: Option<NodeId>,
    /// A node that it would rather stay on than move for a lower load.
    pub(crate) stay: Option<NodeId>,
}

impl<'a> Wanted<'a> {
    /// A VM that runs nowhere.
    pub(crate) fn start(name: &'a Name, vm: &'a VmView) -> Self {
        Self { name, vm, leaving: None, stay: None }
    }

    /// A VM that is to leave its owner.
    pub(crate) fn moving(name: &'a Name, vm: &'a VmView) -> Self {
        Self { leaving: Some(vm.placement.owner), ..Self::start(name, vm) }
    }
}

/// A place, and why the other nodes are not it.
#[derive(Debug, Clone)]
pub(crate) struct Choice {
    pub(crate) node: NodeId,
    pub(crate) not_elsewhere: BTreeMap<Name, Denied>,
}

/// Smaller is better; the name comes last.
type Rank = (bool, Reverse<u32>, Reverse<usize>, usize, bool, (Share, Share));

pub(crate) struct Placer<'a> {
    pub(crate) state: &'a ClusterState,
    pub(crate) observations: &'a Observations,
    pub(crate) policy: &'a Policy,
    pub(crate) load: Load,
}

impl<'a> Placer<'a> {
    pub(crate) fn new(
        state: &'a ClusterState,
        observations: &'a Observations,
        policy: &'a Policy,
    ) -> Self {
        Self { state, observations, policy, load: Load::of(state, observations) }
    }

    pub(crate) fn node_state(&self, node: NodeId) -> NodeState {
        self.state.node_state(self.observations, node)
    }

    pub(crate) fn takes(&self, name: &Name, vm: &VmView) -> Takes {
        Takes::of(name, vm, self.observations)
    }

    /// Whether `node` can take the VM.
    pub(crate) fn check(&self, wanted: Wanted<'_>, node: NodeId) -> Result<(), Denied> {
        let Some(view) = self.state.nodes.get(&node) else { return Err(Denied::NoSuchNode) };
        if wanted.leaving == Some(node) {
            return Err(Denied::AlreadyThere);
        }
        if wanted.vm.bound_to().is_some_and(|bound_to| bound_to != node) {
            return Err(Denied::NotShared);
        }
        self.check_node(wanted.vm, view, node)?;
        if self.state.rules.mention(wanted.name) {
            self.check_rules(wanted, view, node)
        } else {
            self.check_memory(wanted, view, node, 0)
        }
    }

    fn check_node(&self, vm: &VmView, view: &NodeView, node: NodeId) -> Result<(), Denied> {
        match self.node_state(node) {
            NodeState::Online => {}
            NodeState::Maintenance if view.record.absence.is_some() => return Err(Denied::Absent),
            NodeState::Maintenance => return Err(Denied::Draining),
            NodeState::Unknown => return Err(Denied::Unknown),
            NodeState::Fencing | NodeState::Fenced => return Err(Denied::Dead),
            NodeState::Gone => return Err(Denied::NoSuchNode),
        }
        if view.record.witness {
            return Err(Denied::Witness);
        }
        if self.observations.storage_lost.contains(&node) {
            return Err(Denied::StorageLost);
        }
        if vm.placement.ha && self.policy.require_watchdog && !view.protected() {
            return Err(Denied::Unprotected);
        }
        Ok(())
    }

    fn check_memory(
        &self,
        wanted: Wanted<'_>,
        view: &NodeView,
        node: NodeId,
        mates_bytes: u64,
    ) -> Result<(), Denied> {
        let takes = self.takes(wanted.name, wanted.vm).memory_bytes();
        let needed_bytes = takes.saturating_add(mates_bytes);
        let taken_bytes = self.load.get(node).memory_bytes;
        let free_bytes = view.record.memory_bytes.saturating_sub(taken_bytes);
        if needed_bytes <= free_bytes {
            return Ok(());
        }
        Err(Denied::Full { needed_mib: needed_bytes.div_ceil(1 << 20), free_mib: free_bytes >> 20 })
    }

    fn check_rules(&self, wanted: Wanted<'_>, view: &NodeView, node: NodeId) -> Result<(), Denied> {
        let mates = self.mates(wanted);
        let along: Vec<&Name> = mates.along.iter().copied().chain([wanted.name]).collect();
        for name in &along {
            self.check_node_affinity(name, view)?;
        }
        let gathering = self.gathering(self.state.rules.bundle(wanted.name));
        let elsewhere = match gathering.filter(|to| wanted.leaving != Some(*to)) {
            Some(gathering) => gathering != node,
            None => !mates.fixed.is_empty() && !mates.fixed.contains(&node),
        };
        if elsewhere {
            return Err(Denied::Affinity);
        }
        for name in &along {
            self.check_apart(name, node)?;
        }
        self.check_memory(wanted, view, node, mates.bytes)
    }

    /// Whether a strict rule lets the VM be on the node.
    fn check_node_affinity(&self, name: &Name, view: &NodeView) -> Result<(), Denied> {
        match self.state.rules.node_affinity(name) {
            Some(rule) if rule.strict && !rule.nodes.contains_key(&view.record.name) => {
                Err(Denied::NodeAffinity)
            }
            _ => Ok(()),
        }
    }

    fn check_apart(&self, name: &Name, node: NodeId) -> Result<(), Denied> {
        let there = |other: &Name| {
            let places = self.load.places(other);
            other != name && (places.at == Some(node) || places.to == Some(node))
        };
        let strict = self.state.rules.apart(name).filter(|rule| rule.strict);
        match strict.flat_map(|rule| &rule.resources).any(there) {
            true => Err(Denied::AntiAffinity),
            false => Ok(()),
        }
    }

    /// Those that strict affinity keeps the VM with.
    fn mates(&self, wanted: Wanted<'_>) -> Mates<'a> {
        let mut mates = Mates::default();
        for name in self.state.rules.bundle(wanted.name) {
            let Some(vm) = self.state.vms.get(name).filter(|_| name != wanted.name) else {
                continue;
            };
            let places = self.load.places(name);
            let now = places.goes_to();
            match now {
                Some(node) if wanted.leaving != Some(node) => mates.fixed.push(node),
                Some(_) => mates.come_along(name, self.takes(name, vm)),
                // It runs nowhere: if it is to run, it must fit as well.
                None if vm.wanted() && wanted.leaving.is_none() => {
                    mates.come_along(name, self.takes(name, vm));
                }
                None => {}
            }
        }
        if !mates.fixed.is_empty() {
            mates.along.clear();
            mates.bytes = 0;
        }
        mates
    }

    /// Where a bundle that is on several nodes comes together.
    pub(crate) fn gathering(&self, bundle: &[Name]) -> Option<NodeId> {
        let mut at: BTreeMap<NodeId, (usize, u32, usize)> = BTreeMap::new();
        let placed = |name: &Name| self.load.places(name).goes_to();
        for node in bundle.iter().filter_map(placed) {
            at.entry(node).or_default().2 += 1;
        }
        if at.len() < 2 {
            return None;
        }
        for (node, (homes, weight, _)) in &mut at {
            let Some(view) = self.state.nodes.get(node) else { continue };
            for name in bundle {
                let home = self.state.vms.get(name).and_then(|vm| vm.placement.home);
                *homes += usize::from(home == Some(*node));
                *weight += self.weight(name, view);
            }
        }
        at.into_iter()
            .filter(|(node, _)| self.node_state(*node) == NodeState::Online)
            .max_by_key(|(node, rank)| (*rank, Reverse(*node)))
            .map(|(node, _)| node)
    }

    /// The best node for the VM.
    pub(crate) fn choose(&self, wanted: Wanted<'_>) -> Result<Choice, NoPlace> {
        let mut not_elsewhere = BTreeMap::new();
        let mut best: Option<(Rank, &Name, NodeId)> = None;
        for (node, view) in &self.state.nodes {
            match self.check(wanted, *node) {
                Ok(()) => {
                    let ranked = (self.rank(wanted, *node, view), &view.record.name, *node);
                    if best.as_ref().is_none_or(|best| ranked < *best) {
                        best = Some(ranked);
                    }
                }
                Err(denied) => {
                    not_elsewhere.insert(view.record.name.clone(), denied);
                }
            }
        }
        match best {
            Some((_, _, node)) => Ok(Choice { node, not_elsewhere }),
            None => Err(NoPlace(not_elsewhere)),
        }
    }

    fn rank(&self, wanted: Wanted<'_>, node: NodeId, view: &NodeView) -> Rank {
        let placement = &wanted.vm.placement;
        let failed_here = wanted.vm.exhausted_here() && placement.owner == node;
        let tried = failed_here || placement.tried.contains(&node);
        let (together, apart) = self.company(wanted.name, node);
        let takes = self.takes(wanted.name, wanted.vm);
        (
            tried,
            Reverse(self.weight(wanted.name, view)),
            Reverse(together),
            apart,
            wanted.stay != Some(node),
            self.load.get(node).plus(takes).load(view, self.policy.balance),
        )
    }

    /// By node affinity: 0 for a node that the VM's rule does not name.
    pub(crate) fn weight(&self, vm: &Name, view: &NodeView) -> u32 {
        let rule = self.state.rules.node_affinity(vm);
        let weight = rule.and_then(|rule| rule.nodes.get(&view.record.name));
        weight.map_or(0, |weight| weight.saturating_add(1))
    }

    /// How many VMs are there that it should be with, and how many that it should not.
    fn company(&self, vm: &Name, node: NodeId) -> (usize, usize) {
        if !self.state.rules.mention(vm) {
            return (0, 0);
        }
        let there = |other: &&Name| {
            let places = self.load.places(other);
            *other != vm && places.goes_to() == Some(node)
        };
        let together = self.state.rules.together(vm).flat_map(|rule| &rule.resources);
        let soft = self.state.rules.apart(vm).filter(|rule| !rule.strict);
        (
            together.filter(there).count(),
            soft.flat_map(|rule| &rule.resources).filter(there).count(),
        )
    }
}

/// A VM's bundle, without the VM.
#[derive(Debug, Default)]
struct Mates<'a> {
    /// Where some of them are, and stay.
    fixed: Vec<NodeId>,
    /// Those that go with the VM.
    along: Vec<&'a Name>,
    /// What those take.
    bytes: u64,
}

impl<'a> Mates<'a> {
    fn come_along(&mut self, name: &'a Name, takes: Takes) {
        self.along.push(name);
        self.bytes = self.bytes.saturating_add(takes.memory_bytes());
    }
}

/// Whether `node` can take a VM that runs elsewhere (`vm migrate VM NODE`).
///
/// # Errors
/// The reason why not.
pub fn check_target(
    state: &ClusterState,
    observations: &Observations,
    policy: &Policy,
    name: &Name,
    vm: &VmView,
    node: NodeId,
) -> Result<(), Denied> {
    Placer::new(state, observations, policy).check(Wanted::moving(name, vm), node)
}

/// Whether `node` can take a VM that runs nowhere (`vm start`).
///
/// # Errors
/// The reason why not.
pub fn check_start(
    state: &ClusterState,
    observations: &Observations,
    policy: &Policy,
    name: &Name,
    vm: &VmView,
    node: NodeId,
) -> Result<(), Denied> {
    Placer::new(state, observations, policy).check(Wanted::start(name, vm), node)
}

/// Chooses a node for a VM that runs nowhere (`vm create`, `vm start`), or, `leaving`, for one that
/// is to leave its owner (`vm migrate` without a target).
///
/// # Errors
/// Every node with its reason.
pub fn place(
    state: &ClusterState,
    observations: &Observations,
    policy: &Policy,
    name: &Name,
    vm: &VmView,
    leaving: bool,
) -> Result<NodeId, NoPlace> {
    let wanted = if leaving { Wanted::moving(name, vm) } else { Wanted::start(name, vm) };
    Placer::new(state, observations, policy).choose(wanted).map(|choice| choice.node)
}
