//! VMs that run where they should not: away from nodes that are drained, go down or cannot run them
//! well; back to where they left; to where rules want them.
//!
//! Those of one bundle each get a move of their own, to the node that the first of them chose: a
//! move that has begun is what the others must follow.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use proto::record::{Absence, AbsenceKind, Phase};
use proto::{Name, NodeId};

use super::{Action, Cause, Planner, VmReport, because, vm_ref};
use crate::detector::NodeState;
use crate::placement::{Choice, NoPlace, Wanted};
use crate::policy::Shutdown;
use crate::state::{Mobility, NodeView, VmView};

/// After so many failed migrations, a VM whose node goes down or has lost its storage is stopped and
/// moved.
const MIGRATIONS_MAX: u32 = 3;

/// A move that is wanted.
struct Move<'a> {
    name: &'a Name,
    vm: &'a VmView,
    cause: Cause,
    why: String,
    /// Where to; else the best node.
    to: Option<NodeId>,
}

impl<'a> Planner<'a> {
    pub(super) fn plan_moves(&mut self) {
        let (mut moves, mut at_rest) = (Vec::new(), Vec::new());
        for (name, vm) in &self.state().vms {
            if self.busy.contains(name) || !may_be_touched(vm) {
                continue;
            }
            match vm.placement.phase {
                Phase::Started => moves.extend(self.wanted_move(name, vm)),
                Phase::Stopped | Phase::Error => at_rest.push((name, vm)),
                Phase::Starting
                | Phase::Stopping
                | Phase::Migrating { .. }
                | Phase::Relocating { .. }
                | Phase::Recovering
                | Phase::Unplaceable
                | Phase::Frozen => {}
            }
        }
        let urgency = |wanted: &Move<'_>| match wanted.cause {
            Cause::Evacuation => 0,
            Cause::Rule => 1,
            Cause::Failback | Cause::Rebalance => 2,
        };
        moves.sort_by_key(|wanted| (urgency(wanted), Reverse(wanted.vm.wishes.priority)));
        for wanted in moves {
            self.plan_move(wanted);
        }
        for (name, vm) in at_rest {
            self.plan_reassign(name, vm);
        }
    }

    /// Why a running VM is to move, if it is.
    fn wanted_move(&mut self, name: &'a Name, vm: &'a VmView) -> Option<Move<'a>> {
        let owner = vm.placement.owner;
        let view = self.state().nodes.get(&owner)?;
        let reachable =
            matches!(self.node_state(owner), NodeState::Online | NodeState::Maintenance);
        if !reachable {
            return None;
        }
        let make = |cause, why, to| Some(Move { name, vm, cause, why, to });
        if let Some(absence) = view.record.absence {
            return self.leave_for_absence(name, vm, view, absence);
        }
        if let Some(why) = self.reason_to_leave(vm, owner, view) {
            if view.record.maintenance && self.remembers_home(name, vm) {
                return None;
            }
            return make(Cause::Evacuation, why, None);
        }
        match vm.placement.home {
            Some(home) if home == owner => {
                let reason = format!("{} is back on {}", name, view.record.name);
                let action = Action::Remember { vm: vm_ref(name, vm), home: None, reason };
                self.act(name, because(format!("runs on {}", view.record.name)), action);
                return None;
            }
            Some(home) if self.node_state(home) == NodeState::Online => {
                let why = format!("{}, which it left, is back", self.name_of(home));
                return make(Cause::Failback, why, Some(home));
            }
            Some(_) | None => {}
        }
        if self.state().rules.mention(name) {
            if let Some((why, to)) = self.broken_rule(name, vm, view) {
                return make(Cause::Rule, why, to);
            }
            return self.failback(name, vm, view);
        }
        None
    }

    fn reason_to_leave(&self, vm: &VmView, owner: NodeId, view: &NodeView) -> Option<String> {
        let name = &view.record.name;
        if view.record.maintenance {
            return Some(format!("{name} is drained"));
        }
        if view.record.witness {
            return Some(format!("{name} is a witness"));
        }
        if self.placer.observations.storage_lost.contains(&owner) {
            return Some(format!("{name} has lost its VM storage"));
        }
        let unprotected = vm.placement.ha && self.policy.require_watchdog && !view.protected();
        unprotected.then(|| format!("{name} has neither a watchdog nor power fencing"))
    }

    /// Notes where a VM of HA leaves from, so that it returns; true if that is this plan's work.
    fn remembers_home(&mut self, name: &'a Name, vm: &VmView) -> bool {
        if !vm.managed() || vm.placement.home.is_some() || vm.mobility == Mobility::Bound {
            return false;
        }
        let home = vm.placement.owner;
        let why = format!("leaves {}, and returns", self.name_of(home));
        let action =
            Action::Remember { vm: vm_ref(name, vm), home: Some(home), reason: why.clone() };
        self.act(name, because(why), action);
        true
    }

    /// The owner goes down as planned: what the policy says. VMs without HA are the node's own matter.
    fn leave_for_absence(
        &mut self,
        name: &'a Name,
        vm: &'a VmView,
        view: &NodeView,
        absence: Absence,
    ) -> Option<Move<'a>> {
        if !vm.managed() {
            return None;
        }
        if let Some(lock) = &vm.placement.lock {
            self.wait(name, format!("stays while {lock} holds it"));
            return None;
        }
        let node = &view.record.name;
        let doing = match absence.kind {
            AbsenceKind::Shutdown => "is shut down",
            AbsenceKind::Reboot => "reboots",
        };
        let stop = |planner: &mut Self| {
            let reason = format!("{node} {doing}: stopping it, to start it elsewhere");
            let action = Action::Stop { vm: vm_ref(name, vm), reason: reason.clone() };
            planner.act(name, because(reason), action);
        };
        let movable = match self.placer.choose(Wanted::moving(name, vm)) {
            Ok(_) => true,
            Err(NoPlace(_)) => false,
        };
        match (self.policy.shutdown, absence.kind) {
            (Shutdown::Migrate, _) if movable => {
                if self.remembers_home(name, vm) {
                    return None;
                }
                let why = format!("{node} {doing}");
                return Some(Move { name, vm, cause: Cause::Evacuation, why, to: None });
            }
            (Shutdown::Failover, _) | (Shutdown::Conditional, AbsenceKind::Shutdown) if movable => {
                stop(self);
            }
            // Where nobody else can take it, it waits for its node.
            (Shutdown::Migrate | Shutdown::Failover | Shutdown::Conditional, _)
            | (Shutdown::Freeze, _) => {
                let reason = format!("{node} {doing}: frozen until it is back");
                let action = Action::Freeze { vm: vm_ref(name, vm), reason: reason.clone() };
                self.act(name, because(reason), action);
            }
        }
        None
    }

    /// A strict rule that does not hold where the VM runs, if moving this VM mends it.
    fn broken_rule(
        &self,
        name: &'a Name,
        vm: &'a VmView,
        view: &NodeView,
    ) -> Option<(String, Option<NodeId>)> {
        let (rules, owner) = (&self.state().rules, vm.placement.owner);
        if let Some(rule) = rules.node_affinity(name)
            && rule.strict
            && !rule.nodes.contains_key(&view.record.name)
        {
            return Some((format!("a strict rule keeps it off {}", view.record.name), None));
        }
        let mine = (vm.wishes.priority, Reverse(name));
        let outranks = |other: &&Name| {
            let Some(other_vm) = self.state().vms.get(*other) else { return false };
            let there = self.placer.load.places(other);
            *other != name
                && there.at == Some(owner)
                && there.to.is_none()
                && (other_vm.wishes.priority, Reverse(*other)) > mine
        };
        let strict = rules.apart(name).filter(|rule| rule.strict);
        if let Some(other) = strict.flat_map(|rule| &rule.resources).find(outranks) {
            return Some((format!("a strict rule keeps it apart from {other}"), None));
        }
        let gather = self.placer.gathering(rules.bundle(name))?;
        (gather != owner).then(|| {
            let why = "a strict rule keeps it with others, which are elsewhere".to_owned();
            (why, Some(gather))
        })
    }

    /// Back to a node that the VM prefers.
    fn failback(&mut self, name: &'a Name, vm: &'a VmView, view: &NodeView) -> Option<Move<'a>> {
        if !(vm.managed() && vm.wishes.failback) {
            return None;
        }
        self.state().rules.node_affinity(name)?;
        let here = self.placer.weight(name, view);
        let choice = self.placer.choose(Wanted::moving(name, vm)).ok()?;
        let better = self.state().nodes.get(&choice.node)?;
        if self.placer.weight(name, better) <= here {
            return None;
        }
        let why = format!("it prefers {}", better.record.name);
        Some(Move { name, vm, cause: Cause::Failback, why, to: Some(choice.node) })
    }

    fn plan_move(&mut self, wanted: Move<'a>) {
        let Move { name, vm, cause, why, to } = wanted;
        let from = vm.placement.owner;
        if let Some(lock) = &vm.placement.lock {
            return self.wait(name, format!("{why}: moves when {lock} lets go of it"));
        }
        if vm.mobility == Mobility::Cold && !vm.managed() {
            // Nobody has asked for it to be stopped.
            let why =
                format!("{why}, but it cannot move while it runs: stop it, or move it by hand");
            return self.note(name, why, BTreeMap::new());
        }
        let moving = Wanted::moving(name, vm);
        let choice = match to {
            None => self.placer.choose(moving),
            Some(node) => match self.placer.check(moving, node) {
                Ok(()) => Ok(Choice { node, not_elsewhere: BTreeMap::new() }),
                Err(denied) => {
                    let view = self.state().nodes.get(&node);
                    let name = view.map(|view| view.record.name.clone());
                    Err(NoPlace(name.map(|name| (name, denied)).into_iter().collect()))
                }
            },
        };
        let Choice { node: to, not_elsewhere } = match choice {
            Ok(choice) => choice,
            Err(NoPlace(denied)) => {
                let from = self.name_of(from);
                return self.note(name, format!("{why}, but it cannot leave {from}"), denied);
            }
        };
        if let Some(wait_ms) = self.backoff_ms(name) {
            let wait_s = wait_ms.div_ceil(1000);
            return self.wait(name, format!("{why}: the last try failed, again in {wait_s} s"));
        }
        if !self.placer.load.may_move(self.policy, from, to) {
            return self.wait(name, format!("{why}: moves when fewer migrations are under way"));
        }
        self.begin_move(name, vm, cause, &why, to, not_elsewhere);
    }

    pub(super) fn begin_move(
        &mut self,
        name: &'a Name,
        vm: &'a VmView,
        cause: Cause,
        why: &str,
        to: NodeId,
        not_elsewhere: BTreeMap<Name, crate::placement::Denied>,
    ) {
        let from = vm.placement.owner;
        self.placer.load.begin_move(from, to);
        self.placer.load.take(to, self.placer.takes(name, vm));
        self.placer.load.place(name, |places| places.to = Some(to));
        let to_name = self.name_of(to);
        let live = vm.mobility == Mobility::Live && !self.migrations_are_hopeless(name, vm);
        let vm = vm_ref(name, vm);
        let (reason, action);
        if live {
            reason = format!("{why}: moving to {to_name}");
            action = Action::Migrate { vm, from, to, cause, reason: reason.clone() };
        } else {
            reason = format!("{why}: stopping it, to start it on {to_name}");
            action = Action::Relocate { vm, from, to, cause, reason: reason.clone() };
        }
        self.act(name, VmReport { why: reason, not_elsewhere }, action);
    }

    /// Its node cannot wait, and it has not moved while it runs.
    fn migrations_are_hopeless(&self, name: &Name, vm: &VmView) -> bool {
        let owner = vm.placement.owner;
        let view = self.state().nodes.get(&owner);
        let urgent = view.is_some_and(|view| view.record.absence.is_some())
            || self.placer.observations.storage_lost.contains(&owner);
        let failed = self.placer.observations.failed_migrations.get(name);
        urgent && vm.managed() && failed.is_some_and(|failed| failed.failures >= MIGRATIONS_MAX)
    }

    /// How long a VM whose migration failed still waits.
    fn backoff_ms(&self, name: &Name) -> Option<u64> {
        let attempts = self.placer.observations.failed_migrations.get(name)?;
        let backoff_ms = self.policy.migration_backoff_ms(attempts.failures);
        let until_ms = attempts.last_ms.saturating_add(backoff_ms);
        until_ms.checked_sub(self.now.boottime_ms).filter(|wait_ms| *wait_ms > 0)
    }

    /// What runs nowhere leaves a drained node also when that does not answer: it is drained to be
    /// removed, most likely.
    fn plan_reassign(&mut self, name: &'a Name, vm: &'a VmView) {
        let from = vm.placement.owner;
        let Some(view) = self.state().nodes.get(&from) else { return };
        let why = match (view.record.maintenance, view.record.witness) {
            (true, _) => "drained",
            (false, true) => "a witness",
            (false, false) => return,
        };
        let from_name = view.record.name.clone();
        match self.placer.choose(Wanted::moving(name, vm)) {
            Ok(Choice { node: to, not_elsewhere }) => {
                let to_name = self.name_of(to);
                let reason = format!("{from_name} is {why}: moving to {to_name}");
                let report = VmReport { why: reason.clone(), not_elsewhere };
                self.act(name, report, Action::Reassign { vm: vm_ref(name, vm), to, reason });
            }
            Err(NoPlace(denied)) => self.note(name, format!("cannot leave {from_name}"), denied),
        }
    }
}

/// People asked HA to leave it alone, or it is not asked to run by HA but may be moved all the same.
fn may_be_touched(vm: &VmView) -> bool {
    vm.placement.requested != proto::record::Requested::Ignored
}
