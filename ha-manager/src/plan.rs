//! What to do now: `plan(state, observations, policy, now)`.
//!
//! Run on the Raft leader's node each second and on every change. The plan is a value; executors
//! carry it out and decide nothing.
//!
//! ```text
//!                      owner dead: Fence             Start
//! starting, started ─────────────────► recovering ────────► starting (new owner, generation + 1)
//! stopping, migrating    owner could     │  ▲ │
//!                     not start it ──────┼──┘ └─► unplaceable, until a node can take it
//!               (Delay, then Start again) └─ too many failures ─► error
//! ```
//!
//! Invariants:
//! - A VM that a node may be running is only ever given to another node by live migration, or by
//!   [`Action::Fence`] of a node that the detector calls dead, never by [`Action::Start`].
//! - Each action carries the generation and revision it was decided on. An executor puts them
//!   into its transaction as a compare, so a plan made on old knowledge changes nothing.
//! - A node that does not lead plans nothing.

use std::collections::BTreeMap;
use std::fmt;

use proto::record::{NodeRecord, Phase, Placement, Requested};
use proto::{Generation, Name, NodeId, Revision, VmId};
use serde::Serialize;

use crate::detector::{NodeState, Verdict};
use crate::placement::{Denied, Load, NoPlace, Placer, Wanted, moving};

/// What the replicated configuration says, read linearizably in one revision.
#[derive(Debug, Clone, Default)]
pub struct ClusterState {
    /// The members that run VMs.
    pub nodes: BTreeMap<NodeId, NodeView>,
    /// All VMs.
    pub vms: BTreeMap<Name, VmView>,
}

/// A node's records.
#[derive(Debug, Clone)]
pub struct NodeView {
    /// `status/nodes/<id>`.
    pub record: NodeRecord,
    /// The `mod_revision` of `status/fenced/<id>`, if there is one.
    pub fenced: Option<Revision>,
}

/// A VM's placement, and what the decisions need beside it.
#[derive(Debug, Clone)]
pub struct VmView {
    /// `status/vms/<name>`.
    pub placement: Placement,
    /// The record's `mod_revision`.
    pub mod_revision: Revision,
    /// All its disks and boot files are in shared pools: it can run anywhere.
    pub movable: bool,
}

/// What the leader knows that is not in the configuration.
#[derive(Debug, Clone, Default)]
pub struct Observations {
    /// The detector's verdicts; a node without one counts as [`Verdict::Unknown`].
    pub verdicts: BTreeMap<NodeId, Verdict>,
    /// Migrations that the plan asked for and that failed: they back off.
    pub failed_migrations: BTreeMap<Name, Attempts>,
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

/// What an operator can choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Live migrations under way at once in the whole cluster, those of people included.
    pub parallel_migrations: usize,
    /// After this many failed starts in a row the VM goes to `error`.
    pub start_failures_max: u32,
    /// Wait after a failed start; doubled by each further one, at most 64 times it. The owner
    /// forgets the failures when the VM has run for a while.
    pub start_backoff_ms: u64,
    /// Wait after a failed migration of a drain; doubled by each further one, at most 64 times it.
    pub migration_backoff_ms: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            parallel_migrations: 2,
            start_failures_max: 6,
            start_backoff_ms: 2_000,
            migration_backoff_ms: 5_000,
        }
    }
}

impl Policy {
    /// How long to wait after so many failed starts in a row, 1 or more.
    #[must_use]
    pub fn start_backoff_ms(&self, failures: u32) -> u64 {
        doubled(self.start_backoff_ms, failures)
    }
}

/// `first_ms`, doubled by each failure after the first, at most 64 times it.
fn doubled(first_ms: u64, failures: u32) -> u64 {
    first_ms.saturating_mul(1 << failures.saturating_sub(1).min(6))
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

/// A VM of a node that is fenced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FencedVm {
    /// The VM.
    pub vm: VmRef,
    /// The phase to put, together with generation + 1.
    pub phase: Phase,
}

/// One thing to do.
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
    /// One transaction: compare the placement, and `status/fenced/<to>` absent; put owner := `to`,
    /// generation + 1, phase starting.
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
        /// For its events.
        reason: String,
    },
    /// A VM that runs nowhere leaves a node in maintenance. One transaction: compare the
    /// placement, and `status/fenced/<to>` absent; put owner := `to`, generation + 1, the phase
    /// as it is.
    Reassign {
        /// What.
        vm: VmRef,
        /// Where to.
        to: NodeId,
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

/// What to do now, and why everything is as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// In order of urgency: fencing, then VMs that are down, then moves.
    pub actions: Vec<Action>,
    /// Each node's state.
    pub nodes: BTreeMap<Name, NodeState>,
    /// Each VM's reasons.
    pub report: BTreeMap<Name, VmReport>,
}

impl ClusterState {
    /// A node's state as people see it.
    #[must_use]
    pub fn node_state(&self, observations: &Observations, node: NodeId) -> NodeState {
        let view = self.nodes.get(&node);
        let unheard = Verdict::Unknown { age_ms: 0 };
        let verdict = observations.verdicts.get(&node).copied().unwrap_or(unheard);
        let maintenance = view.map(|view| view.record.maintenance);
        NodeState::of(maintenance, view.is_some_and(|view| view.fenced.is_some()), verdict)
    }

    pub(crate) fn node_name(&self, node: NodeId) -> String {
        self.nodes
            .get(&node)
            .map_or_else(|| format!("node id {node}"), |v| v.record.name.to_string())
    }
}

/// Decides what to do now.
#[must_use]
pub fn plan(state: &ClusterState, observations: &Observations, policy: &Policy, now: Now) -> Plan {
    let placer = Placer { state, observations, load: Load::of(state) };
    let mut planner = Planner { placer, policy, now, plan: Plan::default() };
    for (node, view) in &state.nodes {
        let node_state = state.node_state(observations, *node);
        planner.plan.nodes.insert(view.record.name.clone(), node_state);
    }
    if observations.verdicts.values().any(|verdict| *verdict == Verdict::NotLeading) {
        return planner.plan;
    }
    for (node, view) in &state.nodes {
        planner.plan_fencing(*node, view);
    }
    for (name, vm) in &state.vms {
        planner.plan_down(name, vm);
    }
    let migrating = |vm: &&VmView| matches!(vm.placement.phase, Phase::Migrating { .. });
    let mut slots =
        policy.parallel_migrations.saturating_sub(state.vms.values().filter(migrating).count());
    for (name, vm) in &state.vms {
        planner.plan_drain(name, vm, &mut slots);
    }
    for (name, vm) in &state.vms {
        planner.report_rest(name, vm);
    }
    planner.plan
}

struct Planner<'a> {
    placer: Placer<'a>,
    policy: &'a Policy,
    now: Now,
    plan: Plan,
}

impl Planner<'_> {
    fn node_state(&self, node: NodeId) -> NodeState {
        self.placer.state.node_state(self.placer.observations, node)
    }

    fn explain(&mut self, name: &Name, why: String, not_elsewhere: BTreeMap<Name, Denied>) {
        self.plan.report.insert(name.clone(), VmReport { why, not_elsewhere });
    }

    /// Fences a dead node, and takes VMs from a fenced one that came to it as it was fenced.
    fn plan_fencing(&mut self, node: NodeId, view: &NodeView) {
        let state = self.node_state(node);
        let reason = match state {
            NodeState::Fencing => {
                let verdict = self.placer.observations.verdicts.get(&node);
                let silent_ms = match verdict {
                    Some(Verdict::Dead { age_ms }) => *age_ms,
                    Some(_) | None => 0,
                };
                format!("{} was not heard for {silent_ms} ms", view.record.name)
            }
            NodeState::Fenced => format!("{} is fenced", view.record.name),
            NodeState::Online | NodeState::Maintenance | NodeState::Unknown | NodeState::Gone => {
                return;
            }
        };
        let mut vms = Vec::new();
        for (name, vm) in &self.placer.state.vms {
            if vm.placement.owner != node || !vm.placement.ha {
                continue;
            }
            if let Some(phase) = phase_after_fencing(state, &vm.placement) {
                vms.push(FencedVm { vm: vm_ref(name, vm), phase });
            }
        }
        if state == NodeState::Fenced && vms.is_empty() {
            return;
        }
        for FencedVm { vm, phase } in &vms {
            let why = format!("{reason}: fencing it first, then {}", phase.word());
            self.plan
                .report
                .insert(vm.name.clone(), VmReport { why, not_elsewhere: BTreeMap::new() });
        }
        let fenced = view.fenced.unwrap_or_default();
        self.plan.actions.push(Action::Fence { node, fenced, vms, reason });
    }

    /// Starts what runs nowhere and should run.
    fn plan_down(&mut self, name: &Name, vm: &VmView) {
        let placement = &vm.placement;
        let down = match placement.phase {
            Phase::Recovering | Phase::Unplaceable => true,
            Phase::Stopped => placement.ha && placement.requested == Requested::Started,
            Phase::Starting
            | Phase::Started
            | Phase::Stopping
            | Phase::Migrating { .. }
            | Phase::Error => false,
        };
        // A VM that is being fenced in this very plan has another revision by the time.
        if !down || self.plan.report.contains_key(name) {
            return;
        }
        if placement.start_failures > 0 && self.plan_failed(name, vm) {
            return;
        }
        let retried = match placement.start_failures {
            0 => String::new(),
            failures => format!(", try {} of {}", failures + 1, self.policy.start_failures_max),
        };
        let wanted = Wanted {
            memory_bytes: placement.memory_bytes,
            bound_to: vm.bound_to(),
            except: None,
            avoid: (placement.start_failures > 0).then_some(placement.owner),
        };
        match self.placer.choose(wanted) {
            Ok(choice) => {
                self.placer.load.add(choice.node, placement.memory_bytes);
                let to = self.placer.state.node_name(choice.node);
                let reason = format!(
                    "{}: starting on {to}, the least loaded{retried}",
                    placement.phase.word()
                );
                self.explain(name, reason.clone(), choice.not_elsewhere);
                let vm = vm_ref(name, vm);
                self.plan.actions.push(Action::Start { vm, to: choice.node, reason });
            }
            Err(no_place) => self.mark_unplaceable(name, vm, no_place),
        }
    }

    /// A VM whose starts failed: gives it up after too many, else lets it wait. `false`: its wait
    /// is over.
    fn plan_failed(&mut self, name: &Name, vm: &VmView) -> bool {
        let placement = &vm.placement;
        let failures = placement.start_failures;
        let cause = placement.message.as_deref().unwrap_or("see its log");
        if failures >= self.policy.start_failures_max {
            let message = format!(
                "{failures} starts failed, the last: {cause}. Mend that, then `clusterctl vm start {name}`"
            );
            self.explain(name, message.clone(), BTreeMap::new());
            self.plan.actions.push(Action::MarkError { vm: vm_ref(name, vm), message });
            return true;
        }
        let backoff_ms = self.policy.start_backoff_ms(failures);
        let left_ms = placement.retry_at_unix_ms.map(|at| at.saturating_sub(self.now.unix_ms));
        match left_ms {
            Some(0) => false,
            Some(left_ms) if left_ms <= backoff_ms => {
                let why = format!(
                    "failed to start ({cause}), tried again in {} s, try {} of {}",
                    left_ms.div_ceil(1_000),
                    failures + 1,
                    self.policy.start_failures_max
                );
                self.explain(name, why, BTreeMap::new());
                true
            }
            // Not written yet, or by a leader whose clock is ahead: of this one's, it is right.
            None | Some(_) => {
                let reason = format!(
                    "tried again in {} s: {failures} of at most {} starts failed",
                    backoff_ms.div_ceil(1_000),
                    self.policy.start_failures_max
                );
                self.explain(name, reason.clone(), BTreeMap::new());
                let until_unix_ms = self.now.unix_ms.saturating_add(backoff_ms);
                let vm = vm_ref(name, vm);
                self.plan.actions.push(Action::Delay { vm, until_unix_ms, reason });
                true
            }
        }
    }

    fn mark_unplaceable(&mut self, name: &Name, vm: &VmView, no_place: NoPlace) {
        let message = no_place.to_string();
        let told = vm.placement.phase == Phase::Unplaceable
            && vm.placement.message.as_ref() == Some(&message);
        if !told {
            let vm = vm_ref(name, vm);
            self.plan.actions.push(Action::MarkUnplaceable { vm, message });
        }
        self.explain(name, "no node can take it".to_owned(), no_place.0);
    }

    /// Moves VMs away from a node in maintenance, and from one that has become a witness. Those that
    /// run nowhere leave it also when it does not answer: it is drained to be removed, most likely.
    fn plan_drain(&mut self, name: &Name, vm: &VmView, slots: &mut usize) {
        let from = vm.placement.owner;
        let view = self.placer.state.nodes.get(&from);
        let Some(record) = view.map(|view| &view.record) else { return };
        let (drained, witness) = (record.maintenance, record.witness);
        if !(drained || witness) || self.plan.report.contains_key(name) {
            return;
        }
        let runs = match vm.placement.phase {
            Phase::Started
                if matches!(self.node_state(from), NodeState::Maintenance | NodeState::Online) =>
            {
                true
            }
            Phase::Stopped | Phase::Error => false,
            Phase::Started
            | Phase::Starting
            | Phase::Stopping
            | Phase::Migrating { .. }
            | Phase::Recovering
            | Phase::Unplaceable => return,
        };
        let from_name = self.placer.state.node_name(from);
        let choice = match self.placer.choose(moving(vm)) {
            Ok(choice) => choice,
            Err(NoPlace(denied)) => {
                return self.explain(name, format!("cannot leave {from_name}"), denied);
            }
        };
        let (vm_ref, to) = (vm_ref(name, vm), choice.node);
        let to_name = self.placer.state.node_name(to);
        let why = if drained { "drained" } else { "a witness" };
        let reason = format!("{from_name} is {why}: moving to {to_name}, the least loaded");
        if !runs {
            self.explain(name, reason.clone(), choice.not_elsewhere);
            return self.plan.actions.push(Action::Reassign { vm: vm_ref, to, reason });
        }
        if let Some(wait_ms) = self.backoff_ms(name) {
            let why = format!("leaves {from_name}: the last try failed, again in {wait_ms} ms");
            return self.explain(name, why, choice.not_elsewhere);
        }
        if *slots == 0 {
            let why = format!("leaves {from_name} when fewer migrations are under way");
            return self.explain(name, why, choice.not_elsewhere);
        }
        *slots -= 1;
        self.placer.load.add(to, vm.placement.memory_bytes);
        self.explain(name, reason.clone(), choice.not_elsewhere);
        self.plan.actions.push(Action::Migrate { vm: vm_ref, from, to, reason });
    }

    /// How long a VM whose migration failed still waits.
    fn backoff_ms(&self, name: &Name) -> Option<u64> {
        let attempts = self.placer.observations.failed_migrations.get(name)?;
        let backoff_ms = doubled(self.policy.migration_backoff_ms, attempts.failures);
        let until_ms = attempts.last_ms.saturating_add(backoff_ms);
        until_ms.checked_sub(self.now.boottime_ms).filter(|wait_ms| *wait_ms > 0)
    }

    /// The reasons of VMs that nothing is done about.
    fn report_rest(&mut self, name: &Name, vm: &VmView) {
        if self.plan.report.contains_key(name) {
            return;
        }
        let owner = self.placer.state.node_name(vm.placement.owner);
        let owner_state = self.node_state(vm.placement.owner);
        let lost = !matches!(owner_state, NodeState::Online | NodeState::Maintenance);
        let why = match vm.placement.phase {
            Phase::Stopped => format!("stopped, as asked; its files belong to {owner}"),
            Phase::Error => format!("in error: {}", vm.placement.message.as_deref().unwrap_or("?")),
            Phase::Starting if !lost => format!("{owner} is starting it"),
            Phase::Started if !lost => format!("runs on {owner}"),
            Phase::Stopping if !lost => format!("{owner} is stopping it"),
            Phase::Migrating { target } if !lost => {
                format!("migrating from {owner} to {}", self.placer.state.node_name(target))
            }
            Phase::Starting | Phase::Started | Phase::Stopping | Phase::Migrating { .. } => {
                let then = match (vm.placement.ha, owner_state) {
                    (true, NodeState::Unknown) => "starts elsewhere once that node is fenced",
                    (true, _) => "its owner is no member: move it by hand",
                    (false, _) => {
                        "not highly available: waits for that node (`clusterctl node fence` if it is lost for good)"
                    }
                };
                format!("its owner {owner} is {}; {then}", owner_state.word())
            }
            Phase::Recovering | Phase::Unplaceable => "waits for a node".to_owned(),
        };
        let mut not_elsewhere = BTreeMap::new();
        for (node, view) in &self.placer.state.nodes {
            if *node != vm.placement.owner
                && let Err(denied) = self.placer.check(moving(vm), *node)
            {
                not_elsewhere.insert(view.record.name.clone(), denied);
            }
        }
        self.explain(name, why, not_elsewhere);
    }
}

/// The phase of a dead node's HA VM after fencing; `None`: it is left as it is.
pub(crate) fn phase_after_fencing(state: NodeState, placement: &Placement) -> Option<Phase> {
    let wanted = placement.requested == Requested::Started;
    match placement.phase {
        Phase::Starting | Phase::Started | Phase::Stopping | Phase::Migrating { .. } => {
            Some(if wanted { Phase::Recovering } else { Phase::Stopped })
        }
        // They run nowhere, but the node may not know yet: at its death their generation rises
        // too. Once is enough.
        phase @ (Phase::Stopped | Phase::Error | Phase::Recovering | Phase::Unplaceable) => {
            (state == NodeState::Fencing).then_some(phase)
        }
    }
}

pub(crate) fn vm_ref(name: &Name, vm: &VmView) -> VmRef {
    VmRef {
        name: name.clone(),
        vm_id: vm.placement.vm_id,
        generation: vm.placement.generation,
        mod_revision: vm.mod_revision,
    }
}
