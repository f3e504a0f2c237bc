//! Raft as far as HA is concerned (who leads), and the leader: hears heartbeats, plans, proposes.

use std::collections::{BTreeMap, BTreeSet};

use ha_manager::{
    Action, Attempts, ClusterState, NodeState, Now, Observations, Plan, PowerFencing, Verdict, plan,
};
use proto::record::Phase;
use proto::{Name, NodeId, Revision};

use super::store::{Proposal, What};
use super::{Event, Index, Mistake, World, index, node_id};
use crate::outcome::Kind;

#[derive(Debug, Default)]
pub(super) struct Raft {
    pub(super) leader: Option<Index>,
    term: u64,
    /// Since when there is none that works, and how long the followers wait.
    lost: Option<(u64, u64)>,
}

/// What a leader knows, and forgets when it leads no more.
#[derive(Debug)]
pub(super) struct Leadership {
    pub(super) term: u64,
    epoch: Option<Revision>,
    opening: bool,
    fencing: BTreeSet<NodeId>,
    failed_migrations: BTreeMap<Name, Attempts>,
    moving: BTreeSet<Name>,
    power: BTreeMap<NodeId, PowerFencing>,
    storage_lost: BTreeSet<NodeId>,
    imbalanced_since_ms: Option<u64>,
    plan: Plan,
    planned_ms: Option<u64>,
}

impl World {
    pub(super) fn look_at_raft(&mut self) {
        self.push(100, Event::Raft);
        self.judge_health();
        for node in 0..self.machines.len() {
            if self.machines[node].runs(self.now_ms) && self.machines[node].leads.is_some() {
                let clock_ms = self.machines[node].clock(self.now_ms);
                self.machines[node].detector.tick(clock_ms);
                // Whoever hears of a later term leads no more.
                let later = (0..self.machines.len()).any(|other| {
                    self.machines[other].runs(self.now_ms)
                        && self.connected(node, other)
                        && self.machines[other].term > self.machines[node].term
                });
                if later {
                    self.follow(node);
                }
            }
        }
        let works = self.raft.leader.is_some_and(|leader| {
            self.machines[leader].leads.is_some() && self.has_majority(leader)
        });
        if works {
            self.raft.lost = None;
            return;
        }
        let patience_ms = self.random.between(1_000, 1_800);
        let (since_ms, patience_ms) = *self.raft.lost.get_or_insert((self.now_ms, patience_ms));
        if self.now_ms >= since_ms + patience_ms {
            self.elect();
        }
    }

    fn elect(&mut self) {
        let electable: Vec<Index> =
            self.voters().filter(|voter| self.has_majority(*voter)).collect();
        let Some(leader) = self.random.pick(&electable).copied() else { return };
        self.raft.term += 1;
        self.raft.lost = None;
        self.raft.leader = Some(leader);
        let term = self.raft.term;
        for node in 0..self.machines.len() {
            let hears = self.machines[node].runs(self.now_ms) && self.connected(leader, node);
            if hears {
                self.machines[node].term = term;
                if node != leader {
                    self.follow(node);
                }
            }
        }
        self.machines[leader].leads = Some(Leadership {
            term,
            epoch: None,
            opening: false,
            fencing: BTreeSet::new(),
            failed_migrations: BTreeMap::new(),
            moving: BTreeSet::new(),
            power: BTreeMap::new(),
            storage_lost: BTreeSet::new(),
            imbalanced_since_ms: None,
            plan: Plan::default(),
            planned_ms: None,
        });
        let name = self.machines[leader].name.clone();
        self.tell(format!("{name} leads the cluster"));
        self.changed();
        self.push(0, Event::Plan(leader));
    }

    fn follow(&mut self, node: Index) {
        let machine = &mut self.machines[node];
        machine.leads = None;
        machine.detector.follow();
    }

    /// Whether a quorum confirms now that `leader` leads in `term`.
    fn confirmed(&self, leader: Index, term: u64) -> bool {
        let leads = self.machines[leader].leads.as_ref().is_some_and(|leads| leads.term == term);
        let known_over = self.voters().any(|voter| {
            self.machines[voter].runs(self.now_ms)
                && self.connected(leader, voter)
                && self.machines[voter].term > term
        });
        leads && !known_over && self.has_majority(leader)
    }

    pub(super) fn arrive(&mut self, leader: Index, from: Index, sequence: u64, storage: bool) {
        let (now_ms, from_id) = (self.now_ms, node_id(from));
        let machine = &mut self.machines[leader];
        let clock_ms = machine.clock(now_ms);
        let Some(leads) = machine.leads.as_mut().filter(|_| machine.power && machine.agent) else {
            return;
        };
        if leads.fencing.contains(&from_id) {
            return;
        }
        leads.power.remove(&from_id);
        if storage {
            leads.storage_lost.remove(&from_id);
        } else {
            leads.storage_lost.insert(from_id);
        }
        let term = leads.term;
        machine.detector.heard(from_id, clock_ms);
        let after_ms = self.random.between(1, 20);
        self.push(after_ms, Event::Confirm { leader, from, sequence, term });
    }

    pub(super) fn confirm(&mut self, leader: Index, from: Index, sequence: u64, term: u64) {
        if !self.confirmed(leader, term) {
            return;
        }
        let from_id = node_id(from);
        let Some(leads) = &self.machines[leader].leads else { return };
        if leads.epoch.is_none() || leads.fencing.contains(&from_id) {
            return;
        }
        let fenced = self.store.fenced.contains_key(&from_id);
        self.send(leader, from, Event::Ack { node: from, sequence, term, fenced });
    }

    /// There is a leader that works and has said that it is the one that acts.
    pub(super) fn leader_acts(&self) -> bool {
        self.raft.leader.is_some_and(|leader| {
            let leads = self.machines[leader].leads.as_ref();
            self.has_majority(leader) && leads.is_some_and(|leads| leads.epoch.is_some())
        })
    }

    pub(super) fn epoch_opened(&mut self, by: Index, term: u64, done: bool) {
        let revision = self.store.ha_leader.1;
        let ours = self.store.ha_leader.0 == term;
        if let Some(leads) = self.machines[by].leads.as_mut().filter(|leads| leads.term == term) {
            leads.opening = false;
            if done && ours {
                leads.epoch = Some(revision);
                leads.fencing.clear();
            }
        }
    }

    pub(super) fn fencing_settled(&mut self, by: Index, term: u64, node: NodeId) {
        if let Some(leads) = self.machines[by].leads.as_mut().filter(|leads| leads.term == term) {
            leads.fencing.remove(&node);
        }
    }

    pub(super) fn switched_off(&mut self, by: Index, term: u64, node: Index) {
        self.switching_off.remove(&node);
        self.judge_reset(node);
        self.set_power(node, false);
        if let Some(leads) = self.machines[by].leads.as_mut().filter(|leads| leads.term == term) {
            leads.power.insert(node_id(node), PowerFencing::Confirmed);
        }
        if self.machines[by].runs(self.now_ms) {
            self.push(10, Event::Plan(by));
        }
    }

    /// The agent on the leader plans, and carries the plan out.
    pub(super) fn plan(&mut self, node: Index) {
        let Some(term) = self.machines[node].leads.as_ref().map(|leads| leads.term) else { return };
        self.wake_plan(node, 1_000);
        if !self.confirmed(node, term) {
            return;
        }
        let clock_ms = self.machines[node].clock(self.now_ms);
        self.lead_detector(node, term, clock_ms);
        let Some(leads) = &mut self.machines[node].leads else { return };
        let Some(epoch) = leads.epoch else {
            if !leads.opening {
                leads.opening = true;
                let what = What::OpenEpoch { term };
                self.propose(Proposal { by: Some(node), what }, false);
            }
            return;
        };
        if self.now_ms < self.paused_until_ms {
            return;
        }
        let mut state = self.cluster_state();
        for (id, view) in &state.nodes {
            let binds = view.lease_binds(state.disarmed);
            if binds && self.mistake == Some(Mistake::NoNewLeaderWait) {
                continue;
            }
            self.machines[node].detector.binds(*id, binds, clock_ms);
        }
        let observations = self.observations(node);
        if self.mistake == Some(Mistake::NoFence) {
            release_silent(&mut state, &observations);
        }
        let now = Now { boottime_ms: clock_ms, unix_ms: self.unix_ms(node) };
        let plan = plan(&state, &observations, &self.policy, now);
        for action in &plan.actions {
            self.carry_out(node, term, epoch, &state, action);
        }
        if let Some(leads) = &mut self.machines[node].leads {
            let since_ms = leads.imbalanced_since_ms.unwrap_or(clock_ms);
            leads.imbalanced_since_ms = plan.imbalanced.then_some(since_ms);
            leads.plan = plan;
            leads.planned_ms = Some(self.now_ms);
        }
    }

    fn lead_detector(&mut self, node: Index, term: u64, clock_ms: u64) {
        let detector = &mut self.machines[node].detector;
        if self.mistake != Some(Mistake::NoNewLeaderWait) || detector.term() == Some(term) {
            return detector.lead(term, clock_ms);
        }
        let since_ms = clock_ms.saturating_sub(self.timing.lease_ms());
        detector.lead(term, since_ms);
        (since_ms..=clock_ms).step_by(1_000).for_each(|at_ms| detector.tick(at_ms));
    }

    fn unix_ms(&self, node: Index) -> u64 {
        self.now_ms.saturating_add_signed(self.machines[node].unix_offset_ms)
    }

    /// The next plan, at the latest in so long. Plans that were thought of before come first.
    fn wake_plan(&mut self, node: Index, after_ms: u64) {
        let planned = self
            .queue
            .range(..(self.now_ms + after_ms, u64::MAX))
            .any(|(_, (event, _))| matches!(event, Event::Plan(of) if *of == node));
        if !planned {
            self.push(after_ms, Event::Plan(node));
        }
    }

    /// Something has changed: the node looks soon, and plans if it leads.
    pub(super) fn wake(&mut self, node: Index) {
        if self.machines[node].leads.is_some() {
            self.wake_plan(node, 50);
        }
        let looks = self
            .queue
            .range(..(self.now_ms + 10, u64::MAX))
            .any(|(_, (event, _))| matches!(event, Event::Reconcile(of) if *of == node));
        if !looks {
            self.push(5, Event::Reconcile(node));
        }
    }

    pub(super) fn cluster_state(&self) -> ClusterState {
        let nodes = self
            .machines
            .iter()
            .filter_map(|machine| {
                let view = self.store.node_view(machine.id, machine.power_fencing)?;
                Some((machine.id, view))
            })
            .collect();
        let vms = self.store.vms.iter().map(|(name, vm)| (name.clone(), vm.view())).collect();
        ClusterState { nodes, vms, rules: self.store.rules.clone(), disarmed: self.store.disarmed }
    }

    pub(super) fn observations(&self, node: Index) -> Observations {
        let machine = &self.machines[node];
        let clock_ms = machine.clock(self.now_ms);
        let Some(leads) = &machine.leads else { return Observations::default() };
        let verdict = |id: &NodeId| (*id, machine.detector.verdict(*id, clock_ms));
        Observations {
            verdicts: self.store.nodes.keys().map(verdict).collect(),
            failed_migrations: leads.failed_migrations.clone(),
            power: leads.power.clone(),
            storage_lost: leads.storage_lost.clone(),
            usage: self.usage.clone(),
            imbalanced_since_ms: leads.imbalanced_since_ms,
        }
    }

    fn carry_out(
        &mut self,
        node: Index,
        term: u64,
        epoch: Revision,
        state: &ClusterState,
        action: &Action,
    ) {
        let clock_ms = self.machines[node].clock(self.now_ms);
        let verdict = |world: &Self, id| world.machines[node].detector.verdict(id, clock_ms);
        match action {
            Action::Fence { node: dead, fenced, .. } => {
                let is_dead = matches!(verdict(self, *dead), Verdict::Dead { .. });
                let Some(leads) = &mut self.machines[node].leads else { return };
                let off = leads.power.get(dead) == Some(&PowerFencing::Confirmed);
                let known = *fenced != Revision(0);
                if !(is_dead || off || known) || leads.fencing.contains(dead) {
                    return;
                }
                leads.fencing.insert(*dead);
            }
            Action::PowerOff { node: silent, reason } => {
                let Some(leads) = &mut self.machines[node].leads else { return };
                leads.power.insert(*silent, PowerFencing::Asked);
                self.tell(reason.clone());
                let node_off = index(*silent);
                self.switching_off.insert(node_off);
                let after_ms = self.random.between(500, 1_500);
                self.push(after_ms, Event::SwitchedOff { by: node, term, node: node_off });
                return;
            }
            Action::Migrate { vm, from, to, cause, reason } => {
                let Some(leads) = &mut self.machines[node].leads else { return };
                if !leads.moving.insert(vm.name.clone()) {
                    return;
                }
                let id = self.id_of(&vm.name);
                self.tell(format!("{id}: {reason}"));
                self.judge_action(action);
                let kind = Kind::of(*cause, true);
                self.ask_to_migrate(node, term, &vm.name, index(*from), index(*to), kind);
                return;
            }
            Action::Start { vm, .. } => self.note_next_kind(state, &vm.name),
            Action::Relocate { vm, cause, .. } => {
                if let Some(body) = self.bodies.get_mut(&vm.name) {
                    body.next = Kind::of(*cause, false);
                }
            }
            _ => {}
        }
        let edits = self.edits_of(action, state);
        let what = What::Ha { epoch, term, action: action.clone(), edits };
        self.propose(Proposal { by: Some(node), what }, true);
    }

    /// What a start on another node is called.
    fn note_next_kind(&mut self, state: &ClusterState, name: &Name) {
        let Some(vm) = state.vms.get(name) else { return };
        let owner = index(vm.placement.owner);
        let kind = if vm.placement.start_failures > 0 {
            Kind::Relocate
        } else if vm.placement.phase == Phase::Stopped {
            Kind::Rebalance
        } else {
            Kind::Recover
        };
        if let Some(body) = self.bodies.get_mut(name) {
            body.next = kind;
            body.was_on.get_or_insert(owner);
        }
    }

    /// A migration that the plan asked for has ended.
    pub(super) fn migration_ended(&mut self, leader: Index, term: u64, name: &Name, done: bool) {
        let clock_ms = self.machines[leader].clock(self.now_ms);
        let Some(leads) = self.machines[leader].leads.as_mut().filter(|leads| leads.term == term)
        else {
            return;
        };
        leads.moving.remove(name);
        if done {
            leads.failed_migrations.remove(name);
            return;
        }
        let none = Attempts { failures: 0, last_ms: 0 };
        let attempts = leads.failed_migrations.entry(name.clone()).or_insert(none);
        attempts.failures = attempts.failures.saturating_add(1);
        attempts.last_ms = clock_ms;
    }

    /// The leader has planned since the last change, and waits for nothing; or there is no leader
    /// and will be none.
    pub(super) fn leader_at_rest(&self) -> bool {
        let electable = || self.voters().any(|voter| self.has_majority(voter));
        let Some(leader) = self.raft.leader.filter(|leader| self.has_majority(*leader)) else {
            return !electable();
        };
        let Some(leads) = &self.machines[leader].leads else { return false };
        let planned = leads.epoch.is_some() || !self.store.up;
        let since = leads.planned_ms.is_some_and(|at_ms| at_ms >= self.changed_ms);
        let settled = |vm: &super::store::Vm| {
            !matches!(
                vm.placement.phase,
                Phase::Starting
                    | Phase::Stopping
                    | Phase::Migrating { .. }
                    | Phase::Relocating { .. }
            ) || !self.machines[index(vm.placement.owner)].runs(self.now_ms)
        };
        // Silent, and not called dead yet.
        let state = self.cluster_state();
        let missed = |id: &NodeId| {
            let clock_ms = self.machines[leader].clock(self.now_ms);
            let silent =
                !self.machines[index(*id)].runs(self.now_ms) || !self.connected(leader, index(*id));
            let verdict = self.machines[leader].detector.verdict(*id, clock_ms);
            let view = state.nodes.get(id);
            let binds = view.is_some_and(|view| view.lease_binds(state.disarmed));
            let fenced = self.store.fenced.contains_key(id);
            !silent || fenced || !binds || matches!(verdict, Verdict::Dead { .. })
        };
        let cleaned = |id: &NodeId| !self.reads(index(*id));
        let armed = self.store.disarmed.is_some()
            || self.store.unarmed.iter().all(|id| !self.reads(index(*id)));
        let idle = !self.store.up
            || leads.plan.actions.is_empty()
                && self.store.vms.values().all(settled)
                && self.store.fenced.keys().all(cleaned)
                && armed;
        planned
            && self.store.nodes.keys().all(missed)
            && (since || !self.store.up)
            && leads.plan.waits == 0
            && idle
    }

    pub(super) fn state_of(&self, id: NodeId) -> NodeState {
        let observations =
            self.raft.leader.map(|leader| self.observations(leader)).unwrap_or_default();
        self.cluster_state().node_state(&observations, id)
    }
}

/// [`Mistake::NoFence`].
fn release_silent(state: &mut ClusterState, observations: &Observations) {
    let silent = |owner| {
        let verdict = observations.verdicts.get(owner);
        matches!(verdict, Some(Verdict::Unknown { age_ms } | Verdict::Dead { age_ms }) if *age_ms > 3_000)
    };
    let runs = |phase| matches!(phase, Phase::Started | Phase::Starting);
    for vm in state.vms.values_mut().filter(|vm| vm.wanted() && runs(vm.placement.phase)) {
        if silent(&vm.placement.owner) {
            vm.placement.phase = Phase::Recovering;
        }
    }
}
