//! VMs that run nowhere and should run.

use std::cmp::Reverse;

use proto::record::{Phase, Requested};
use proto::{Name, NodeId};

use super::{Action, Planner, VmReport, because, vm_ref};
use crate::detector::{NodeState, Verdict};
use crate::placement::{NoPlace, Wanted};
use crate::state::VmView;

impl<'a> Planner<'a> {
    /// The more important first, so that it is theirs what there is too little of.
    pub(super) fn plan_down(&mut self) {
        let mut down: Vec<(Reverse<i32>, &'a Name, &'a VmView)> = self
            .state()
            .vms
            .iter()
            .filter(|(name, vm)| is_down(vm) && !self.busy.contains(name))
            .map(|(name, vm)| (Reverse(vm.wishes.priority), name, vm))
            .collect();
        down.sort_unstable_by_key(|(priority, name, _)| (*priority, *name));
        for (_, name, vm) in down {
            self.plan_start(name, vm);
        }
    }

    fn plan_start(&mut self, name: &'a Name, vm: &'a VmView) {
        let placement = &vm.placement;
        if placement.phase == Phase::Frozen && !self.thaws(name, vm) {
            return;
        }
        if placement.start_failures > 0 && self.waits_after_failure(name, vm) {
            return;
        }
        if let Some(before) = self.first(vm) {
            let why = format!("waits for {before}, which is started before it");
            return self.wait(name, why);
        }
        let again = again_here(vm);
        let wanted = Wanted { stay: self.stays(vm), ..Wanted::start(name, vm) };
        let choice = match again.filter(|node| self.placer.check(wanted, *node).is_ok()) {
            Some(node) => Ok((node, std::collections::BTreeMap::new())),
            None => self.placer.choose(wanted).map(|choice| (choice.node, choice.not_elsewhere)),
        };
        let (to, not_elsewhere) = match choice {
            Ok(choice) => choice,
            Err(no_place) => return self.mark_unplaceable(name, vm, no_place),
        };
        // Those that have their place keep it, though they wait for their turn.
        let takes = self.placer.takes(name, vm);
        self.placer.load.take(to, takes);
        self.placer.load.place(name, |places| places.at = Some(to));
        let to_name = self.name_of(to);
        if !self.placer.load.may_start(self.policy, to) {
            let why = format!("starts on {to_name} when fewer starts are under way");
            return self.wait(name, why);
        }
        self.placer.load.begin_start(to);
        let how = match (again == Some(to), to == placement.owner) {
            (true, _) => format!("again on {to_name}{}", tries(vm)),
            (false, true) => format!("on {to_name}, where it was{}", tries(vm)),
            (false, false) => format!("on {to_name}, the best node for it{}", tries(vm)),
        };
        let reason = format!("{}: starting {how}", placement.phase.word());
        let report = VmReport { why: reason.clone(), not_elsewhere };
        self.act(name, report, Action::Start { vm: vm_ref(name, vm), to, reason });
    }

    /// A frozen VM starts when its node is back, or has been away for too long.
    fn thaws(&mut self, name: &'a Name, vm: &VmView) -> bool {
        let owner = vm.placement.owner;
        let owner_name = self.name_of(owner);
        let verdict = self.placer.observations.verdicts.get(&owner);
        let view = self.state().nodes.get(&owner);
        let absence = view.and_then(|view| view.record.absence);
        match (self.node_state(owner), absence, verdict) {
            (NodeState::Online | NodeState::Maintenance, None, _) => true,
            (
                NodeState::Maintenance,
                Some(absence),
                Some(Verdict::Dead { age_ms } | Verdict::Unknown { age_ms }),
            ) if absence.clear && *age_ms >= self.policy.frozen_limit_ms => true,
            _ => {
                let limit_s = self.policy.frozen_limit_ms / 1000;
                let why = format!(
                    "frozen: starts when {owner_name} is back, or elsewhere when that has been away for {limit_s} s"
                );
                self.note(name, why, std::collections::BTreeMap::new());
                false
            }
        }
    }

    /// Gives the VM up after too many failures, else lets it wait. `false`: its wait is over.
    fn waits_after_failure(&mut self, name: &'a Name, vm: &'a VmView) -> bool {
        let placement = &vm.placement;
        if vm.exhausted_here() && self.is_given_up(name, vm) {
            return true;
        }
        let cause = placement.message.as_deref().unwrap_or("see its log");
        let failures = failures(vm);
        let backoff_ms = self.policy.start_backoff_ms(failures);
        let left_ms = placement.retry_at_unix_ms.map(|at| at.saturating_sub(self.now.unix_ms));
        match left_ms {
            Some(0) => false,
            Some(left_ms) if left_ms <= backoff_ms => {
                let left_s = left_ms.div_ceil(1_000);
                let why =
                    format!("failed to start ({cause}), tried again in {left_s} s{}", tries(vm));
                self.wait(name, why);
                true
            }
            // Not written yet, or by a leader whose clock is ahead: of this one's, it is right.
            None | Some(_) => {
                let wait_s = backoff_ms.div_ceil(1_000);
                let reason = format!("tried again in {wait_s} s{}", tries(vm));
                let until_unix_ms = self.now.unix_ms.saturating_add(backoff_ms);
                let vm = vm_ref(name, vm);
                self.plan.waits += 1;
                self.act(
                    name,
                    because(reason.clone()),
                    Action::Delay { vm, until_unix_ms, reason },
                );
                true
            }
        }
    }

    /// Whether it has been to as many nodes as it may; then it goes to `error`.
    fn is_given_up(&mut self, name: &'a Name, vm: &'a VmView) -> bool {
        let placement = &vm.placement;
        let relocations = u32::try_from(placement.tried.len()).unwrap_or(u32::MAX);
        if relocations < vm.wishes.max_relocations {
            return false;
        }
        let cause = placement.message.as_deref().unwrap_or("see its log");
        let message = format!(
            "it could not be started on {} node(s), the last time: {cause}. Mend that, then `clusterctl vm start {name}`",
            relocations + 1
        );
        let action = Action::MarkError { vm: vm_ref(name, vm), message: message.clone() };
        self.act(name, because(message), action);
        true
    }

    /// A VM that must be started first, and is on its way.
    fn first(&self, vm: &'a VmView) -> Option<&'a Name> {
        vm.wishes.after.iter().find(|before| {
            self.state().vms.get(*before).is_some_and(|before| {
                before.placement.requested == Requested::Started
                    && match before.placement.phase {
                        Phase::Starting | Phase::Recovering => true,
                        Phase::Stopped => before.placement.ha,
                        Phase::Started
                        | Phase::Stopping
                        | Phase::Migrating { .. }
                        | Phase::Relocating { .. }
                        | Phase::Error
                        | Phase::Unplaceable
                        | Phase::Frozen => false,
                    }
            })
        })
    }

    /// The node that it stays on, all else being equal: not one that just lost it.
    fn stays(&self, vm: &VmView) -> Option<NodeId> {
        let stays = match vm.placement.phase {
            Phase::Stopped => !self.policy.rebalance_on_start,
            Phase::Frozen => true,
            _ => false,
        };
        stays.then_some(vm.placement.owner)
    }

    fn mark_unplaceable(&mut self, name: &'a Name, vm: &'a VmView, no_place: NoPlace) {
        let message = no_place.to_string();
        let told = vm.placement.phase == Phase::Unplaceable
            && vm.placement.message.as_ref() == Some(&message);
        if told {
            return self.note(name, "no node can take it".to_owned(), no_place.0);
        }
        let report = VmReport { why: "no node can take it".to_owned(), not_elsewhere: no_place.0 };
        self.act(name, report, Action::MarkUnplaceable { vm: vm_ref(name, vm), message });
    }
}

fn is_down(vm: &VmView) -> bool {
    match vm.placement.phase {
        Phase::Recovering | Phase::Unplaceable => vm.placement.requested != Requested::Ignored,
        Phase::Stopped | Phase::Frozen => vm.wanted(),
        Phase::Starting
        | Phase::Started
        | Phase::Stopping
        | Phase::Migrating { .. }
        | Phase::Relocating { .. }
        | Phase::Error => false,
    }
}

/// The node where a VM that failed to start is tried again, as long as its restarts last.
fn again_here(vm: &VmView) -> Option<NodeId> {
    (vm.placement.start_failures > 0 && !vm.exhausted_here()).then_some(vm.placement.owner)
}

/// Failed starts since it last ran: those here, and one for each node it left.
fn failures(vm: &VmView) -> u32 {
    let left = u32::try_from(vm.placement.tried.len()).unwrap_or(u32::MAX);
    vm.placement.start_failures.saturating_add(left)
}

fn tries(vm: &VmView) -> String {
    match failures(vm) {
        0 => String::new(),
        failures => format!(", try {}", failures + 1),
    }
}
