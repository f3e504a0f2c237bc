//! Why a VM is where it is, and why not elsewhere: asked for one VM, of a plan and what it was
//! decided on.

use std::collections::BTreeMap;

use proto::Name;
use proto::record::{Phase, Requested};

use super::{Plan, VmReport};
use crate::detector::NodeState;
use crate::placement::{Placer, Wanted};
use crate::policy::Policy;
use crate::state::{ClusterState, Observations, VmView};

/// A plan, and what it was decided on: to be asked about any number of VMs.
#[expect(missing_debug_implementations, reason = "it borrows all of the cluster's state")]
pub struct Explainer<'a> {
    placer: Placer<'a>,
    plan: &'a Plan,
}

impl<'a> Explainer<'a> {
    /// For this plan.
    #[must_use]
    pub fn new(
        state: &'a ClusterState,
        observations: &'a Observations,
        policy: &'a Policy,
        plan: &'a Plan,
    ) -> Self {
        Self { placer: Placer::new(state, observations, policy), plan }
    }

    /// Explains one VM; `None`: there is none of this name.
    #[must_use]
    pub fn explain(&self, name: &Name) -> Option<VmReport> {
        let vm = self.placer.state.vms.get(name)?;
        let mut report = self.plan.report.get(name).cloned().unwrap_or_else(|| VmReport {
            why: why(&self.placer, vm),
            not_elsewhere: BTreeMap::new(),
        });
        if report.not_elsewhere.is_empty() {
            for (node, view) in &self.placer.state.nodes {
                if *node != vm.placement.owner
                    && let Err(denied) = self.placer.check(Wanted::moving(name, vm), *node)
                {
                    report.not_elsewhere.insert(view.record.name.clone(), denied);
                }
            }
        }
        Some(report)
    }
}

fn why(placer: &Placer<'_>, vm: &VmView) -> String {
    let placement = &vm.placement;
    let owner = placer.state.node_name(placement.owner);
    let owner_state = placer.node_state(placement.owner);
    let lost = !matches!(owner_state, NodeState::Online | NodeState::Maintenance);
    let left_alone = if placement.requested == Requested::Ignored { "left alone: " } else { "" };
    let why = match placement.phase {
        Phase::Stopped => format!("stopped, as asked; its files belong to {owner}"),
        Phase::Error => format!("in error: {}", placement.message.as_deref().unwrap_or("?")),
        Phase::Starting if !lost => format!("{owner} is starting it"),
        Phase::Started if !lost => format!("runs on {owner}"),
        Phase::Stopping if !lost => format!("{owner} is stopping it"),
        Phase::Migrating { target } if !lost => {
            format!("migrating from {owner} to {}", placer.state.node_name(target))
        }
        Phase::Relocating { target } if !lost => {
            format!("{owner} is stopping it, to start it on {}", placer.state.node_name(target))
        }
        Phase::Starting
        | Phase::Started
        | Phase::Stopping
        | Phase::Migrating { .. }
        | Phase::Relocating { .. } => {
            let then = match (placement.ha, owner_state) {
                (true, NodeState::Unknown) => "starts elsewhere once that node is fenced",
                (true, NodeState::Fencing | NodeState::Fenced) => {
                    "starts elsewhere when that is done"
                }
                (true, _) => "its owner is no member: move it by hand",
                (false, _) => {
                    "not highly available: waits for that node (`clusterctl node fence` if it is lost for good)"
                }
            };
            format!("its owner {owner} is {}; {then}", owner_state.word())
        }
        Phase::Frozen => format!("frozen: starts when {owner} is back"),
        Phase::Recovering | Phase::Unplaceable => "waits for a node".to_owned(),
    };
    format!("{left_alone}{why}")
}
