//! What VMs reserve and use on each node, and where those are that rules speak of. The plan adds to
//! it as it decides.

use std::collections::BTreeMap;

use proto::record::Phase;
use proto::{Name, NodeId, vm_needs_bytes};

use crate::policy::{Balance, Policy};
use crate::state::{ClusterState, NodeView, Observations, Places, VmView};

/// A share of a node, in parts of 2^32: it orders exactly enough and without floating point.
pub(crate) type Share = u128;
pub(crate) const WHOLE: Share = 1 << 32;

/// What VMs take of one node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    /// By configuration; this is what admission counts.
    pub(crate) memory_bytes: u64,
    pub(crate) cpus: u64,
    pub(crate) vms: u64,
    used_cpu_milli: u64,
    used_memory_bytes: u64,
}

/// What one VM takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Takes(Taken);

impl Takes {
    pub(crate) fn of(name: &Name, vm: &VmView, observations: &Observations) -> Self {
        let memory_bytes = vm_needs_bytes(vm.placement.memory_bytes);
        let cpus = u64::from(vm.placement.cpus);
        let used = observations.usage.get(name);
        Self(Taken {
            memory_bytes,
            cpus,
            vms: 1,
            used_cpu_milli: used.map_or(cpus.saturating_mul(1000), |used| used.cpu_milli),
            used_memory_bytes: used.map_or(memory_bytes, |used| used.memory_bytes),
        })
    }

    pub(crate) fn memory_bytes(self) -> u64 {
        self.0.memory_bytes
    }
}

impl Taken {
    pub(crate) fn plus(mut self, takes: Takes) -> Self {
        let Takes(more) = takes;
        self.memory_bytes = self.memory_bytes.saturating_add(more.memory_bytes);
        self.cpus = self.cpus.saturating_add(more.cpus);
        self.vms += more.vms;
        self.used_cpu_milli = self.used_cpu_milli.saturating_add(more.used_cpu_milli);
        self.used_memory_bytes = self.used_memory_bytes.saturating_add(more.used_memory_bytes);
        self
    }

    pub(crate) fn minus(mut self, takes: Takes) -> Self {
        let Takes(less) = takes;
        self.memory_bytes = self.memory_bytes.saturating_sub(less.memory_bytes);
        self.cpus = self.cpus.saturating_sub(less.cpus);
        self.vms = self.vms.saturating_sub(less.vms);
        self.used_cpu_milli = self.used_cpu_milli.saturating_sub(less.used_cpu_milli);
        self.used_memory_bytes = self.used_memory_bytes.saturating_sub(less.used_memory_bytes);
        self
    }

    /// How loaded the node is with this, by what balance counts first; then the other way.
    pub(crate) fn load(&self, node: &NodeView, balance: Balance) -> (Share, Share) {
        let vms = Share::from(self.vms);
        match balance {
            Balance::Count => (vms, self.configured(node)),
            Balance::Static => (self.configured(node), vms),
            Balance::Dynamic => (self.used(node), vms),
        }
    }

    fn configured(&self, node: &NodeView) -> Share {
        share(self.cpus, node.record.cpus.into())
            .max(share(self.memory_bytes, node.record.memory_bytes))
    }

    fn used(&self, node: &NodeView) -> Share {
        share(self.used_cpu_milli, u64::from(node.record.cpus).saturating_mul(1000))
            .max(share(self.used_memory_bytes, node.record.memory_bytes))
    }
}

fn share(part: u64, whole: u64) -> Share {
    (Share::from(part) * WHOLE) / Share::from(whole.max(1))
}

/// What is taken everywhere, and what is under way.
#[derive(Debug, Clone, Default)]
pub(crate) struct Load {
    taken: BTreeMap<NodeId, Taken>,
    /// Of the VMs that some rule names.
    places: BTreeMap<Name, Places>,
    starting: BTreeMap<NodeId, usize>,
    starting_all: usize,
    moving: BTreeMap<NodeId, usize>,
    moving_all: usize,
}

impl Load {
    /// What the placements say: a VM that runs or is to run counts at its owner, one that moves at
    /// both ends, one that runs nowhere not at all.
    pub(crate) fn of(state: &ClusterState, observations: &Observations) -> Self {
        let mut load = Self::default();
        for (name, vm) in &state.vms {
            let places = vm.places();
            let takes = Takes::of(name, vm, observations);
            for node in [places.at, places.to].into_iter().flatten() {
                load.take(node, takes);
            }
            if state.rules.mention(name) {
                load.places.insert(name.clone(), places);
            }
            match vm.placement.phase {
                Phase::Starting => load.begin_start(vm.placement.owner),
                Phase::Migrating { target } | Phase::Relocating { target } => {
                    load.begin_move(vm.placement.owner, target);
                }
                _ => {}
            }
        }
        load
    }

    pub(crate) fn take(&mut self, node: NodeId, takes: Takes) {
        let taken = self.taken.entry(node).or_default();
        *taken = taken.plus(takes);
    }

    pub(crate) fn get(&self, node: NodeId) -> Taken {
        self.taken.get(&node).copied().unwrap_or_default()
    }

    /// Where a VM is that some rule names.
    pub(crate) fn places(&self, vm: &Name) -> Places {
        self.places.get(vm).copied().unwrap_or_default()
    }

    /// Notes where the plan starts or moves a VM that some rule names.
    pub(crate) fn place(&mut self, vm: &Name, change: impl FnOnce(&mut Places)) {
        if let Some(places) = self.places.get_mut(vm) {
            change(places);
        }
    }

    pub(crate) fn begin_start(&mut self, node: NodeId) {
        *self.starting.entry(node).or_default() += 1;
        self.starting_all += 1;
    }

    pub(crate) fn begin_move(&mut self, from: NodeId, to: NodeId) {
        *self.moving.entry(from).or_default() += 1;
        *self.moving.entry(to).or_default() += 1;
        self.moving_all += 1;
    }

    pub(crate) fn moving(&self) -> usize {
        self.moving_all
    }

    pub(crate) fn may_start(&self, policy: &Policy, node: NodeId) -> bool {
        let here = self.starting.get(&node).copied().unwrap_or_default();
        self.starting_all < policy.parallel_starts && here < policy.node_starts
    }

    pub(crate) fn may_move(&self, policy: &Policy, from: NodeId, to: NodeId) -> bool {
        let at = |node| self.moving.get(&node).copied().unwrap_or_default();
        self.moving_all < policy.parallel_migrations
            && at(from) < policy.node_migrations
            && at(to) < policy.node_migrations
    }
}
