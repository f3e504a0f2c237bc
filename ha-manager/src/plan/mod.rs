//! What to do now: `plan(state, observations, policy, now)`.
//!
//! Run on the Raft leader's node each second and on every change. The plan is a value; executors
//! carry it out and decide nothing.
//!
//! ```text
//!                      owner dead: Fence             Start
//! starting, started ─────────────────► recovering ────────► starting (new owner, generation + 1)
//! stopping, migrating    owner could     │  ▲ │
//! relocating             not start it ───┼──┘ └─► unplaceable, until a node can take it
//!               (Delay, then Start again) └─ too many failures ─► error
//!
//! started ─ Migrate ─► migrating ─► started       (the owner commits both)
//!         ─ Relocate ► relocating ─► starting     (the owner stops it, and gives it to the target)
//!         ─ Stop ────► stopping ─► recovering     (a node that goes down: failover)
//!         ─ Freeze ──► frozen ── Start ─► starting (it is back; or elsewhere, if it does not come)
//! ```
//!
//! In order: [`fencing`], [`down`] (what should run and does not), [`moves`] (away from nodes, back,
//! to where rules want it), [`balance`].
//!
//! Invariants:
//! - A VM that a node may be running is only ever given to another node by that node (migration,
//!   relocation), or by [`Action::Fence`] of a node that is dead by the detector, or confirmed to
//!   be off; never by [`Action::Start`].
//! - Each action carries the generation and revision it was decided on. An executor puts them
//!   into its transaction as a compare, so a plan made on old knowledge changes nothing.
//! - At most one action for a VM in a plan.
//! - A node that does not lead plans nothing, and nobody does while HA is disarmed.

mod balance;
mod down;
mod explain;
mod fencing;
mod moves;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use proto::record::Phase;
use proto::{Name, NodeId, Revision};
use serde::Serialize;

pub use explain::Explainer;
pub(crate) use fencing::phase_after_fencing;

use crate::detector::{NodeState, Verdict};
use crate::placement::{Denied, Placer};
use crate::policy::Policy;
use crate::state::{ClusterState, Now, Observations, VmRef, VmView};

/// A VM of a node that is fenced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FencedVm {
    /// The VM.
    pub vm: VmRef,
    /// The phase to put, together with generation + 1.
    pub phase: Phase,
}

/// One thing to do. What its transaction writes is in [`crate::edit`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// One transaction: compare `status/fenced/<node>` at `fenced` (0: absent) and each VM's
    /// placement and the HA leader record (a proposal of a leader that has been replaced must come
    /// to nothing: its verdict knows nothing of its successor's leases); put the fenced record; put each VM with generation + 1 and its new phase.
    Fence {
        /// Who.
        node: NodeId,
        /// The fenced record's `mod_revision` to compare.
        fenced: Revision,
        /// Its HA VMs.
        vms: Vec<FencedVm>,
        /// For the record, the log and people.
        reason: String,
    },
    /// Switch a silent node off from outside; the answer goes to [`Observations::power`].
    PowerOff {
        /// Who.
        node: NodeId,
        /// For the log and people.
        reason: String,
    },
    /// Owner := `to`, generation + 1, phase starting.
    Start {
        /// What.
        vm: VmRef,
        /// Where.
        to: NodeId,
        /// For its events.
        reason: String,
    },
    /// A live migration by the owner, to be counted in [`Observations::failed_migrations`] if it
    /// fails and removed from there if it succeeds.
    Migrate {
        /// What.
        vm: VmRef,
        /// The owner.
        from: NodeId,
        /// Where to.
        to: NodeId,
        /// Why it moves.
        cause: Cause,
        /// For its events.
        reason: String,
    },
    /// Phase relocating: the owner stops it and gives it to `to`.
    Relocate {
        /// What.
        vm: VmRef,
        /// The owner.
        from: NodeId,
        /// Where to.
        to: NodeId,
        /// Why it moves.
        cause: Cause,
        /// For its events.
        reason: String,
    },
    /// A VM that runs nowhere leaves a node in maintenance: owner := `to`, generation + 1, the phase
    /// as it is.
    Reassign {
        /// What.
        vm: VmRef,
        /// Where to.
        to: NodeId,
        /// For its events.
        reason: String,
    },
    /// Home := this: where it returns to.
    Remember {
        /// What.
        vm: VmRef,
        /// The node; `None`: it need not return.
        home: Option<NodeId>,
        /// For its events.
        reason: String,
    },
    /// Phase stopping, still to run: the owner, which goes down, stops it, and it is started elsewhere.
    Stop {
        /// What.
        vm: VmRef,
        /// For its events.
        reason: String,
    },
    /// Phase frozen: the owner, which goes down, stops it, and starts it when it is back.
    Freeze {
        /// What.
        vm: VmRef,
        /// For its events.
        reason: String,
    },
    /// Put `retry_at_unix_ms`: the VM is not started before.
    Delay {
        /// What.
        vm: VmRef,
        /// When it may be tried again, Unix milliseconds.
        until_unix_ms: u64,
        /// For its events.
        reason: String,
    },
    /// Put phase unplaceable with this message; the plan tries again by itself.
    MarkUnplaceable {
        /// What.
        vm: VmRef,
        /// Every node with its reason.
        message: String,
    },
    /// Put phase error with this message; only a person's `vm start` tries again.
    MarkError {
        /// What.
        vm: VmRef,
        /// Why.
        message: String,
    },
}

/// Why the plan moves a VM that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// Its node is drained, goes down, or cannot run it well.
    Evacuation,
    /// It returns to a node that it prefers, or left for maintenance.
    Failback,
    /// A strict rule wants it elsewhere.
    Rule,
    /// To even the load out.
    Rebalance,
}

/// Why a VM is where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VmReport {
    /// Why it is where it is, or what is done about it.
    pub why: String,
    /// Why it is not, or could not be, on the other nodes. A node that is missing here could
    /// take it.
    pub not_elsewhere: BTreeMap<Name, Denied>,
}

impl fmt::Display for VmReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)?;
        for (node, denied) in &self.not_elsewhere {
            write!(f, "; not {node}: {denied}")?;
        }
        Ok(())
    }
}

/// What to do now, and why.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// In order of urgency: fencing, then VMs that are down, then moves.
    pub actions: Vec<Action>,
    /// Each node's state.
    pub nodes: BTreeMap<Name, NodeState>,
    /// Reasons of the VMs that something is done about, or that wait for something;
    /// [`Explainer`] gives those of all.
    pub report: BTreeMap<Name, VmReport>,
    /// What an operator should know: protection that is missing, rules that do not hold.
    pub degraded: BTreeSet<String>,
    /// VMs and nodes that only wait: for time to pass, for others, for a place among what may be
    /// done at once. While there are any, a later plan may do more by itself.
    pub waits: usize,
    /// The load is uneven beyond the policy's threshold: see [`Observations::imbalanced_since_ms`].
    pub imbalanced: bool,
}

/// Decides what to do now.
#[must_use]
pub fn plan(state: &ClusterState, observations: &Observations, policy: &Policy, now: Now) -> Plan {
    let mut plan = Plan::default();
    for (node, view) in &state.nodes {
        let node_state = state.node_state(observations, *node);
        plan.nodes.insert(view.record.name.clone(), node_state);
    }
    if observations.verdicts.values().any(|verdict| *verdict == Verdict::NotLeading) {
        return plan;
    }
    if state.disarmed.is_some() {
        plan.degraded.insert("HA is disarmed: nothing is fenced, started or moved".to_owned());
        return plan;
    }
    let placer = Placer::new(state, observations, policy);
    let mut planner = Planner { placer, policy, now, plan, busy: BTreeSet::new() };
    planner.plan_fencing();
    planner.plan_down();
    planner.plan_moves();
    planner.plan_balance();
    planner.plan
}

struct Planner<'a> {
    placer: Placer<'a>,
    policy: &'a Policy,
    now: Now,
    plan: Plan,
    /// VMs that the plan does something about.
    busy: BTreeSet<&'a Name>,
}

impl<'a> Planner<'a> {
    fn state(&self) -> &'a ClusterState {
        self.placer.state
    }

    fn act(&mut self, name: &'a Name, report: VmReport, action: Action) {
        self.busy.insert(name);
        self.plan.report.insert(name.clone(), report);
        self.plan.actions.push(action);
    }

    /// The VM waits: for time, for others, for its turn.
    fn wait(&mut self, name: &'a Name, why: String) {
        self.plan.waits += 1;
        self.note(name, why, BTreeMap::new());
    }

    fn note(&mut self, name: &'a Name, why: String, not_elsewhere: BTreeMap<Name, Denied>) {
        self.plan.report.insert(name.clone(), VmReport { why, not_elsewhere });
    }

    fn name_of(&self, node: NodeId) -> String {
        self.state().node_name(node)
    }

    fn node_state(&self, node: NodeId) -> NodeState {
        self.placer.node_state(node)
    }
}

fn because(why: String) -> VmReport {
    VmReport { why, not_elsewhere: BTreeMap::new() }
}

fn vm_ref(name: &Name, vm: &VmView) -> VmRef {
    VmRef::of(name, vm)
}
