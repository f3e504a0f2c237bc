//! What the decisions look at: the configuration, what the leader observes, and its clocks.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proto::record::{NodeRecord, Phase, Placement, Requested};
use proto::{Generation, Name, NodeId, Revision, VmId};

use crate::detector::{NodeState, Verdict};
use crate::rules::Rules;

/// What the replicated configuration says, read linearizably in one revision.
#[derive(Debug, Clone, Default)]
pub struct ClusterState {
    /// The members that run VMs.
    pub nodes: BTreeMap<NodeId, NodeView>,
    /// All VMs.
    pub vms: BTreeMap<Name, VmView>,
    /// Which of them belong together, apart, or on which nodes.
    pub rules: Arc<Rules>,
    /// HA does nothing by itself.
    pub disarmed: Option<Disarm>,
}

/// What becomes of HA VMs while HA is disarmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Disarm {
    /// They stay as they are, whatever happens; what people ask for is done.
    Freeze,
    /// As if they were not highly available.
    Ignore,
}

/// A node's records.
#[derive(Debug, Clone)]
pub struct NodeView {
    /// `status/nodes/<id>`.
    pub record: NodeRecord,
    /// The `mod_revision` of `status/fenced/<id>`, if there is one.
    pub fenced: Option<Revision>,
    /// Something outside can cut its power, and confirm it.
    pub power_fencing: bool,
    /// HA was disarmed, and this node has not said since that its lease binds its VMs again: its
    /// silence proves nothing.
    pub unarmed: bool,
}

impl NodeView {
    /// A machine that hangs is certainly reset, or can be switched off from outside.
    #[must_use]
    pub fn protected(&self) -> bool {
        !self.record.watchdog.is_empty() || self.power_fencing
    }

    /// Its silence means something: not after it went down as planned, nor while HA is disarmed.
    /// For [`crate::Detector::binds`].
    #[must_use]
    pub fn lease_binds(&self, disarmed: Option<Disarm>) -> bool {
        let away = self.record.absence.is_some_and(|absence| absence.clear);
        disarmed.is_none() && !self.unarmed && !away
    }
}

/// A VM's placement, and what the decisions need beside it.
#[derive(Debug, Clone)]
pub struct VmView {
    /// `status/vms/<name>`.
    pub placement: Placement,
    /// The record's `mod_revision`.
    pub mod_revision: Revision,
    /// How it can leave its owner.
    pub mobility: Mobility,
    /// What its document asks of HA.
    pub wishes: Arc<Wishes>,
}

/// How a VM can leave its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mobility {
    /// While it runs.
    Live,
    /// When it is stopped.
    Cold,
    /// Not at all: some of its files are on that node alone.
    Bound,
}

/// What a VM's document asks of HA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wishes {
    /// Higher first, when capacity or time is short.
    pub priority: i32,
    /// VMs that are started before it, as long as they can be.
    pub after: Vec<Name>,
    /// Failed starts that are tried again on the same node.
    pub max_restarts: u32,
    /// Nodes it is given to after that.
    pub max_relocations: u32,
    /// It returns to a node that it prefers, once that can take it.
    pub failback: bool,
}

impl Default for Wishes {
    fn default() -> Self {
        Self { priority: 0, after: Vec::new(), max_restarts: 1, max_relocations: 1, failback: true }
    }
}

/// What the leader knows that is not in the configuration.
#[derive(Debug, Clone, Default)]
pub struct Observations {
    /// The detector's verdicts; a node without one counts as [`Verdict::Unknown`].
    pub verdicts: BTreeMap<NodeId, Verdict>,
    /// Migrations that the plan asked for and that failed: they back off.
    pub failed_migrations: BTreeMap<Name, Attempts>,
    /// Nodes that were asked to be switched off from outside.
    pub power: BTreeMap<NodeId, PowerFencing>,
    /// Nodes that say that their VM storage is lost.
    pub storage_lost: BTreeSet<NodeId>,
    /// What VMs take of their nodes, where it is known.
    pub usage: BTreeMap<Name, Usage>,
    /// Since when, on the leader's clock, each plan has found the cluster out of balance.
    pub imbalanced_since_ms: Option<u64>,
}

/// How far switching a node off from outside is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerFencing {
    /// Under way.
    Asked,
    /// It is off, or was: nothing of it runs on from before.
    Confirmed,
    /// It could not be confirmed; the lease decides.
    Failed,
}

/// What a VM takes of its node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Thousandths of a CPU.
    pub cpu_milli: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
}

/// The leader's clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Now {
    /// `CLOCK_BOOTTIME`, milliseconds: the clock of [`Attempts::last_ms`].
    pub boottime_ms: u64,
    /// Unix milliseconds: the clock of [`Placement::retry_at_unix_ms`], which outlives a
    /// leadership. May be wrong, or jump; nothing that must not go wrong looks at it.
    pub unix_ms: u64,
}

/// Failures in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempts {
    /// How many, 1 or more.
    pub failures: u32,
    /// When the last one failed, on the leader's clock.
    pub last_ms: u64,
}

/// The VM and the knowledge about it that an action was decided on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmRef {
    /// Name: the key of its placement.
    pub name: Name,
    /// A VM that was deleted and made again under the same name is another one.
    pub vm_id: VmId,
    /// Generation at the decision.
    pub generation: Generation,
    /// The placement's `mod_revision` at the decision: compare it in the transaction.
    pub mod_revision: Revision,
}

impl VmRef {
    pub(crate) fn of(name: &Name, vm: &VmView) -> Self {
        Self {
            name: name.clone(),
            vm_id: vm.placement.vm_id,
            generation: vm.placement.generation,
            mod_revision: vm.mod_revision,
        }
    }
}

impl ClusterState {
    /// A node's state as people see it.
    #[must_use]
    pub fn node_state(&self, observations: &Observations, node: NodeId) -> NodeState {
        let unheard = Verdict::Unknown { age_ms: 0 };
        let verdict = observations.verdicts.get(&node).copied().unwrap_or(unheard);
        match self.nodes.get(&node) {
            None => NodeState::Gone,
            Some(view) => NodeState::of(&view.record, view.fenced.is_some(), verdict),
        }
    }

    pub(crate) fn node_name(&self, node: NodeId) -> String {
        self.nodes
            .get(&node)
            .map_or_else(|| format!("node id {node}"), |v| v.record.name.to_string())
    }
}

impl VmView {
    /// HA acts for it.
    #[must_use]
    pub fn managed(&self) -> bool {
        self.placement.ha && self.placement.requested != Requested::Ignored
    }

    /// HA is to keep it running.
    #[must_use]
    pub fn wanted(&self) -> bool {
        self.placement.ha && self.placement.requested == Requested::Started
    }

    /// It failed to start at its owner as often as it may.
    #[must_use]
    pub fn exhausted_here(&self) -> bool {
        self.placement.start_failures > self.wishes.max_restarts
    }

    /// The node whose local storage it needs, if it does.
    pub(crate) fn bound_to(&self) -> Option<NodeId> {
        (self.mobility == Mobility::Bound).then_some(self.placement.owner)
    }

    /// Where a process of it may be, or is to be: owner, and target of a migration.
    #[must_use]
    pub fn places(&self) -> Places {
        let owner = self.placement.owner;
        match self.placement.phase {
            Phase::Starting | Phase::Started | Phase::Stopping => {
                Places { at: Some(owner), to: None }
            }
            Phase::Migrating { target } | Phase::Relocating { target } => {
                Places { at: Some(owner), to: Some(target) }
            }
            Phase::Stopped
            | Phase::Recovering
            | Phase::Error
            | Phase::Unplaceable
            | Phase::Frozen => Places::default(),
        }
    }
}

/// Where a VM is, and where it is going.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Places {
    /// Runs here, or is about to.
    pub at: Option<NodeId>,
    /// Is moving here.
    pub to: Option<NodeId>,
}

impl Places {
    /// Where it is when what is under way is done.
    #[must_use]
    pub fn goes_to(self) -> Option<NodeId> {
        self.to.or(self.at)
    }
}
