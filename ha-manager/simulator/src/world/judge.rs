//! Knows the truth, and says when a promise is broken.
//!
//! - I1 a resource runs on at most one powered node;
//! - I2 it starts on a second node only after the first was reset, is off, or has stopped it;
//! - I3 nothing is written without a majority;
//! - I4 strict rules hold at each start and each finished move;
//! - I5 ignored, stopped and frozen resources are left alone;
//! - I6 what should run, and could, runs again within [`BOUND_MS`];
//! - I7 no healthy node resets itself, or ends its VMs.

use ha_manager::Action;
use ha_manager::rules::Kind;
use proto::record::{Phase, Requested};
use proto::{Name, vm_needs_bytes};

use super::agent::State;
use super::{Index, World, index, node_id};

/// I6: within three minutes, beside waiting for a lease.
pub(crate) const BOUND_MS: u64 = 180_000;

/// A node is healthy that nothing was wrong with for longer than its lease lasts.
const HEALTHY_MS: u64 = 12_000;

impl World {
    pub(super) fn running_on(&self, name: &Name) -> impl Iterator<Item = Index> {
        let runs = |index: &Index| {
            let machine = &self.machines[*index];
            let process = machine.processes.get(name);
            machine.power && process.is_some_and(|process| process.state == State::Runs)
        };
        let on: Vec<Index> = (0..self.machines.len()).filter(runs).collect();
        on.into_iter()
    }

    fn violated(&mut self, text: String) {
        self.outcome.violated(self.now_ms, text);
        self.over = true;
    }

    /// A process of the VM is about to run on `node`, which did not run it before.
    pub(super) fn judge_arrival(&mut self, node: Index, name: &Name) {
        self.judge_start(node, name);
        self.judge_move(node, name);
    }

    /// A process of the VM is about to run on `node`.
    pub(super) fn judge_start(&mut self, node: Index, name: &Name) {
        let id = self.id_of(name);
        let here = self.machines[node].name.clone();
        let others: Vec<Index> = self.running_on(name).filter(|other| *other != node).collect();
        for other in others {
            let there = self.machines[other].name.clone();
            let hangs = self.machines[other].hangs_until_ms > self.now_ms;
            self.violated(match hangs {
                true => format!(
                    "I2: {id} starts on {here}, while {there}, which hangs, has not been reset and still holds it"
                ),
                false => format!("I1: {id} starts on {here}, and runs on {there}"),
            });
        }
    }

    /// I4.
    pub(super) fn judge_move(&mut self, node: Index, name: &Name) {
        if self.now_ms == 0 {
            return;
        }
        let (id, here) = (self.id_of(name), self.machines[node].name.clone());
        let rules = self.store.rules.clone();
        if let Some(rule) = rules.node_affinity(name)
            && rule.strict
            && !rule.nodes.contains_key(&here)
        {
            self.violated(format!("I4: {id} runs on {here}, which a strict rule does not name"));
        }
        for rule in rules.list().iter().filter(|rule| rule.strict && rule.resources.contains(name))
        {
            for other in rule.resources.iter().filter(|other| *other != name) {
                let on: Vec<Index> = self.running_on(other).collect();
                let other_id = self.id_of(other);
                match rule.kind {
                    Kind::AntiAffinity if on.contains(&node) => {
                        self.violated(format!(
                            "I4: {id} runs on {here} with {other_id}, which a strict rule keeps apart"
                        ));
                    }
                    // A bundle moves one by one: see [`Self::judge_company`].
                    Kind::NodeAffinity | Kind::Affinity | Kind::AntiAffinity => {}
                }
            }
        }
    }

    /// I4 for strict affinity: a VM is started where those are that it must be with, if they run.
    fn judge_company(&mut self, name: &Name, to: proto::NodeId) {
        let rules = self.store.rules.clone();
        let mates = rules.bundle(name).iter().filter(|mate| *mate != name);
        let settled: Vec<proto::NodeId> =
            mates.filter_map(|mate| self.store.vms.get(mate)?.view().places().goes_to()).collect();
        if !settled.is_empty() && !settled.contains(&to) {
            let (id, to) = (self.id_of(name), self.machines[index(to)].name.clone());
            self.violated(format!(
                "I4: {id} starts on {to} without those that a strict rule keeps with it"
            ));
        }
    }

    /// I5: of what the plan decides.
    pub(super) fn judge_action(&mut self, action: &Action) {
        let vm = match action {
            Action::Start { vm, .. }
            | Action::Migrate { vm, .. }
            | Action::Relocate { vm, .. }
            | Action::Stop { vm, .. }
            | Action::Freeze { vm, .. } => vm,
            _ => return,
        };
        let Some(present) = self.store.vms.get(&vm.name) else { return };
        let (requested, phase) = (present.placement.requested, present.placement.phase);
        let current = present.revision == vm.mod_revision;
        let left_alone = match requested {
            Requested::Ignored | Requested::Stopped => true,
            Requested::Started => phase == Phase::Frozen && !matches!(action, Action::Start { .. }),
        };
        if let Action::Start { vm, to, .. } = action
            && current
        {
            self.judge_company(&vm.name, *to);
        }
        if left_alone && current {
            let id = self.id_of(&vm.name);
            self.violated(format!(
                "I5: {id}, asked to be {}, is not left alone: {action:?}",
                match requested {
                    Requested::Ignored => "ignored",
                    Requested::Stopped => "stopped",
                    Requested::Started => "frozen",
                }
            ));
        }
    }

    /// I3.
    pub(super) fn judge_majority(&mut self) {
        let majority = self.voters().any(|voter| self.has_majority(voter));
        if !majority {
            self.violated("I3: something is written without a majority".to_owned());
        }
    }

    /// What is wrong with nodes now, for I7.
    pub(super) fn judge_health(&mut self) {
        // Who cannot write cannot be elected either, nor say that it is the one that acts.
        let headless = !self.store.up && !self.leader_acts();
        for node in 0..self.machines.len() {
            let machine = &self.machines[node];
            let cut = self.network.cuts.iter().any(|(a, b)| *a == node || *b == node);
            let stuck = machine.processes.values().any(|process| process.stuck);
            let slow = !(900..=1100).contains(&machine.rate());
            let fenced = self.store.fenced.contains_key(&machine.id);
            let unwell = headless
                || !machine.runs(self.now_ms)
                || !machine.network
                || cut
                || stuck
                || slow
                || fenced
                || machine.leaving.is_some()
                || !self.store.nodes.contains_key(&machine.id)
                || !self.has_majority(node)
                || self.network.loss_per_mille > 10
                || self.network.delay_ms > 50;
            if unwell {
                self.machines[node].unwell_ms = self.now_ms;
            }
        }
    }

    fn is_healthy(&self, node: Index) -> bool {
        self.now_ms >= self.machines[node].unwell_ms + HEALTHY_MS
    }

    pub(super) fn judge_reset(&mut self, node: Index) {
        if self.is_healthy(node) {
            let name = self.machines[node].name.clone();
            self.violated(format!("I7: {name} is healthy, and is reset"));
        }
    }

    pub(super) fn judge_self_stop(&mut self, node: Index, name: &Name) {
        if self.is_healthy(node) {
            let (node, id) = (self.machines[node].name.clone(), self.id_of(name));
            self.violated(format!("I7: {node} is healthy, and ends {id}"));
        }
    }

    /// The VM's processes may have changed: its downtime begins or ends.
    pub(super) fn note_running(&mut self, name: &Name) {
        self.settle_downtime(name);
        let down = self.is_down(name);
        let now_ms = self.now_ms;
        if let Some(body) = self.bodies.get_mut(name) {
            body.down_since_ms = down.then_some(now_ms);
        }
    }

    fn is_down(&self, name: &Name) -> bool {
        let wanted =
            self.store.vms.get(name).is_some_and(|vm| vm.placement.requested == Requested::Started);
        wanted && self.running_on(name).next().is_none()
    }

    pub(super) fn settle_downtime(&mut self, name: &Name) {
        let now_ms = self.now_ms;
        if let Some(body) = self.bodies.get_mut(name)
            && let Some(since_ms) = body.down_since_ms.replace(now_ms)
        {
            body.down_ms += now_ms - since_ms;
        }
    }

    /// I6, each second; and the downtime of what was asked for or not since.
    pub(super) fn judge_time(&mut self) {
        let names: Vec<Name> = self.bodies.keys().cloned().collect();
        for name in names {
            self.note_running(&name);
            let due = self.is_due(&name);
            let now_ms = self.now_ms;
            let Some(body) = self.bodies.get_mut(&name) else { continue };
            if !due {
                body.due_since_ms = None;
                continue;
            }
            let since_ms = *body.due_since_ms.get_or_insert(now_ms);
            if now_ms >= since_ms + BOUND_MS {
                let id = body.id.clone();
                let phase = self.store.vms.get(&name).map(|vm| vm.placement.phase.word());
                let phase = phase.unwrap_or("gone");
                self.violated(format!(
                    "I6: {id} should run and could, and has been {phase} for {} s",
                    BOUND_MS / 1000
                ));
            }
        }
    }

    /// It should run, and nothing but the manager is in the way.
    fn is_due(&self, name: &Name) -> bool {
        let Some(vm) = self.store.vms.get(name) else { return false };
        let placement = &vm.placement;
        let manager_works = self.store.up
            && self.store.disarmed.is_none()
            && self.store.unarmed.is_empty()
            && self.now_ms >= self.paused_until_ms
            && self.network.cuts.is_empty()
            && self.network.loss_per_mille <= 100
            && self.network.delay_ms <= 500
            && self.raft.leader.is_some_and(|leader| self.has_majority(leader));
        let failing = placement.start_failures > 0 || !placement.tried.is_empty();
        let first = vm.wishes.after.iter().any(|before| self.is_down(before));
        manager_works
            && self.is_down(name)
            && !failing
            && !first
            && !matches!(placement.phase, Phase::Error | Phase::Frozen)
            && !self.is_stuck_with_its_owner(placement.owner)
            && !self.more_important_are_down(name)
            && (0..self.machines.len()).any(|node| self.could_run(name, node))
    }

    /// Nobody can know whether a silent node without protection runs it.
    fn is_stuck_with_its_owner(&self, owner: proto::NodeId) -> bool {
        let machine = &self.machines[index(owner)];
        let record = self.store.nodes.get(&owner);
        let protected = record.is_some_and(|record| !record.watchdog.is_empty());
        let stuck = machine.processes.values().any(|process| process.stuck);
        stuck || !machine.runs(self.now_ms) && !protected || record.is_none()
    }

    /// The place that it could have may be theirs.
    fn more_important_are_down(&self, name: &Name) -> bool {
        self.bodies.keys().any(|other| other != name && self.is_down(other)) && self.is_tight(name)
    }

    /// Not every node could take all that is down.
    fn is_tight(&self, name: &Name) -> bool {
        let all: u64 = self
            .store
            .vms
            .iter()
            .filter(|(other, _)| self.is_down(other))
            .map(|(_, vm)| vm_needs_bytes(vm.placement.memory_bytes))
            .sum();
        let ruled = self.store.rules.list().iter().any(|rule| rule.resources.contains(name));
        ruled || (0..self.machines.len()).any(|node| self.free_bytes(node) < all)
    }

    fn free_bytes(&self, node: Index) -> u64 {
        let taken: u64 = self
            .store
            .vms
            .values()
            .filter(|vm| {
                let places = vm.view().places();
                places.at == Some(node_id(node)) || places.to == Some(node_id(node))
            })
            .map(|vm| vm_needs_bytes(vm.placement.memory_bytes))
            .sum();
        self.machines[node].memory_bytes.saturating_sub(taken)
    }

    /// By the truth, not by what the manager believes.
    fn could_run(&self, name: &Name, node: Index) -> bool {
        let machine = &self.machines[node];
        let Some(record) = self.store.nodes.get(&machine.id) else { return false };
        let Some(vm) = self.store.vms.get(name) else { return false };
        let protected = !self.policy.require_watchdog
            || machine.watchdog && !record.watchdog.is_empty()
            || machine.power_fencing;
        let well = self.is_healthy(node)
            && protected
            && machine.storage
            && !record.maintenance
            && record.absence.is_none()
            && !self.store.fenced.contains_key(&machine.id);
        let mut rules = self.store.rules.list().iter().filter(|rule| rule.strict);
        let allowed = rules.all(|rule| match rule.kind {
            _ if !rule.resources.contains(name) => true,
            Kind::NodeAffinity => rule.nodes.contains_key(&machine.name),
            // Where the others are, or will be, is the manager's puzzle: only the clear cases count.
            Kind::AntiAffinity => rule.resources.iter().all(|other| {
                let at = self.store.vms.get(other).map(|vm| vm.view().places());
                other == name
                    || at.is_none_or(|at| at.at != Some(machine.id) && at.to != Some(machine.id))
            }),
            Kind::Affinity => false,
        });
        well && allowed && self.free_bytes(node) >= vm_needs_bytes(vm.placement.memory_bytes)
    }
}
