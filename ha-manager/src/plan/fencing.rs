//! Nodes that are dead, or that something outside can switch off at once.

use std::collections::BTreeMap;

use proto::NodeId;
use proto::record::{Phase, Placement, Requested};

use super::{Action, FencedVm, Planner, because, vm_ref};
use crate::detector::{NodeState, Verdict};
use crate::state::{NodeView, PowerFencing, VmView};

impl<'a> Planner<'a> {
    pub(super) fn plan_fencing(&mut self) {
        let mut owned: BTreeMap<NodeId, Vec<(&'a proto::Name, &'a VmView)>> = BTreeMap::new();
        let suspects: Vec<(&NodeId, &NodeView)> = self
            .state()
            .nodes
            .iter()
            .filter(|(node, _)| {
                let state = self.node_state(**node);
                !matches!(state, NodeState::Online | NodeState::Maintenance | NodeState::Gone)
            })
            .collect();
        if suspects.is_empty() {
            return;
        }
        for (name, vm) in &self.state().vms {
            if vm.managed() {
                owned.entry(vm.placement.owner).or_default().push((name, vm));
            }
        }
        for (node, view) in suspects {
            let vms = owned.remove(node).unwrap_or_default();
            self.plan_suspect(*node, view, &vms);
        }
    }

    /// Fences a dead node, and takes VMs from a fenced one that came to it as it was fenced.
    fn plan_suspect(
        &mut self,
        node: NodeId,
        view: &NodeView,
        owned: &[(&'a proto::Name, &'a VmView)],
    ) {
        let name = &view.record.name;
        let state = self.node_state(node);
        let verdict = self.placer.observations.verdicts.get(&node).copied();
        let age_ms = match verdict {
            Some(Verdict::Dead { age_ms } | Verdict::Unknown { age_ms }) => age_ms,
            Some(Verdict::Alive { .. } | Verdict::NotLeading) | None => 0,
        };
        let reason = match state {
            NodeState::Fenced => format!("{name} is fenced"),
            NodeState::Unknown => {
                // While nothing follows from its silence, nothing is waited for.
                self.plan.waits += usize::from(!view.unarmed);
                match self.switched_off(node, view, age_ms) {
                    true => format!("{name} was switched off, and that is confirmed"),
                    false => return,
                }
            }
            NodeState::Fencing => {
                let off = self.switched_off(node, view, age_ms);
                if !off && self.may_hang_with_vms(view, owned) {
                    return;
                }
                format!("{name} was not heard for {age_ms} ms")
            }
            NodeState::Online | NodeState::Maintenance | NodeState::Gone => return,
        };
        let mut vms = Vec::new();
        for (name, vm) in owned {
            if let Some(phase) = phase_after_fencing(state, &vm.placement) {
                vms.push(FencedVm { vm: vm_ref(name, vm), phase });
                self.busy.insert(name);
                let why = format!("{reason}: fencing it first, then {}", phase.word());
                self.plan.report.insert((*name).clone(), because(why));
            }
        }
        if state == NodeState::Fenced && vms.is_empty() {
            return;
        }
        let fenced = view.fenced.unwrap_or_default();
        self.plan.actions.push(Action::Fence { node, fenced, vms, reason });
    }
}

impl Planner<'_> {
    /// Whether a silent node is off, by the word of what can switch it off; asks for it, if it is
    /// time to.
    fn switched_off(&mut self, node: NodeId, view: &NodeView, age_ms: u64) -> bool {
        match self.placer.observations.power.get(&node) {
            Some(PowerFencing::Confirmed) => true,
            Some(PowerFencing::Asked | PowerFencing::Failed) => false,
            // It may be well, and heard in a moment.
            None if !view.power_fencing || age_ms < self.policy.power_fence_after_ms => false,
            None => {
                let name = &view.record.name;
                let reason =
                    format!("{name} was not heard for {age_ms} ms: switching it off from outside");
                self.plan.actions.push(Action::PowerOff { node, reason });
                false
            }
        }
    }

    /// Whether the silence of a dead node leaves open that it hangs, with VMs in it, and wakes again:
    /// nothing has reset it.
    fn may_hang_with_vms(&mut self, view: &NodeView, owned: &[(&proto::Name, &VmView)]) -> bool {
        let at_rest = |phase| {
            matches!(phase, Phase::Stopped | Phase::Error | Phase::Recovering | Phase::Unplaceable)
        };
        let has_vms = owned.iter().any(|(_, vm)| !at_rest(vm.placement.phase));
        let unguarded = self.policy.require_watchdog && view.record.watchdog.is_empty();
        if !(has_vms && (unguarded || view.unarmed)) {
            return false;
        }
        let name = &view.record.name;
        let why = match (view.unarmed, view.power_fencing) {
            (true, _) => "has not answered since HA was disarmed",
            (false, true) => "has no watchdog, and is not known to be switched off",
            (false, false) => "has neither a watchdog nor power fencing",
        };
        self.plan.degraded.insert(format!(
            "{name} is silent, and {why}: whether its VMs run cannot be known, so they are not started \
             elsewhere. Make sure that it is off, then `clusterctl node fence {name} --yes-it-is-off`"
        ));
        true
    }
}

/// The phase of a dead node's HA VM after fencing; `None`: it is left as it is.
pub(crate) fn phase_after_fencing(state: NodeState, placement: &Placement) -> Option<Phase> {
    let wanted = placement.requested == Requested::Started;
    match placement.phase {
        Phase::Starting
        | Phase::Started
        | Phase::Stopping
        | Phase::Migrating { .. }
        | Phase::Relocating { .. }
        | Phase::Frozen => Some(if wanted { Phase::Recovering } else { Phase::Stopped }),
        // They run nowhere, but the node may not know yet: at its death their generation rises
        // too. Once is enough.
        phase @ (Phase::Stopped | Phase::Error | Phase::Recovering | Phase::Unplaceable) => {
            (state != NodeState::Fenced).then_some(phase)
        }
    }
}
