//! Evening out the load of nodes by moving VMs that run: one bundle at a time, only after the load
//! was uneven for a while, only where it is worth it, never against a rule.

use std::collections::BTreeMap;

use proto::record::{Phase, Requested};
use proto::{Name, NodeId};

use super::{Cause, Planner};
use crate::detector::NodeState;
use crate::load::{Share, Taken, WHOLE};
use crate::placement::Wanted;
use crate::policy::Balance;
use crate::state::{Mobility, VmView};

/// A move that would even the load out.
struct Gain<'a> {
    /// The highest load after it.
    highest: Share,
    members: Vec<(&'a Name, &'a VmView)>,
    to: NodeId,
}

impl<'a> Planner<'a> {
    pub(super) fn plan_balance(&mut self) {
        if !self.policy.auto_rebalance {
            return;
        }
        let loads = self.loads();
        let highest = loads.iter().max_by_key(|(node, load)| (**load, std::cmp::Reverse(**node)));
        let lowest = loads.values().min();
        let (Some((from, high)), Some(low)) = (highest, lowest) else { return };
        if high - low < self.percent(self.policy.rebalance_threshold_percent, 2) {
            return;
        }
        self.plan.imbalanced = true;
        let settled =
            self.plan.actions.is_empty() && self.plan.waits == 0 && self.placer.load.moving() == 0;
        if !settled {
            return;
        }
        let since_ms = self.placer.observations.imbalanced_since_ms;
        let held = since_ms.is_some_and(|since_ms| {
            self.now.boottime_ms.saturating_sub(since_ms) >= self.policy.rebalance_hold_ms
        });
        let Some(gain) = self.best_gain(*from, *high, &loads) else { return };
        if !held {
            self.plan.waits += 1;
            return;
        }
        let why = format!("{} is the most loaded", self.name_of(*from));
        for (name, vm) in gain.members {
            self.begin_move(name, vm, Cause::Rebalance, &why, gain.to, BTreeMap::new());
        }
    }

    /// The load of each node that can take VMs.
    fn loads(&self) -> BTreeMap<NodeId, Share> {
        let online = |node: &NodeId| self.node_state(*node) == NodeState::Online;
        let nodes = self.state().nodes.iter();
        nodes
            .filter(|(node, view)| online(node) && !view.record.witness)
            .map(|(node, _)| (*node, self.load_of(*node, self.placer.load.get(*node))))
            .collect()
    }

    fn load_of(&self, node: NodeId, taken: Taken) -> Share {
        let view = self.state().nodes.get(&node);
        view.map_or(0, |view| taken.load(view, self.policy.balance).0)
    }

    /// So many percent of a node; so many VMs where VMs are counted.
    fn percent(&self, percent: u64, vms: Share) -> Share {
        match self.policy.balance {
            Balance::Count => vms,
            Balance::Static | Balance::Dynamic => WHOLE * Share::from(percent) / 100,
        }
    }

    /// The move from the most loaded node that leaves the lower of both loads highest.
    fn best_gain(
        &self,
        from: NodeId,
        high: Share,
        loads: &BTreeMap<NodeId, Share>,
    ) -> Option<Gain<'a>> {
        let mut best: Option<Gain<'a>> = None;
        for (name, vm) in &self.state().vms {
            let first = self.state().rules.bundle(name).first().is_none_or(|first| first == name);
            if vm.placement.owner != from || !first {
                continue;
            }
            let Some(members) = self.members(name, vm, from) else { continue };
            for node in loads.keys().filter(|node| **node != from) {
                if self.placer.check(Wanted::moving(name, vm), *node).is_err() {
                    continue;
                }
                let highest = self.highest_after(&members, from, *node);
                let worth = highest + self.percent(self.policy.rebalance_gain_percent, 1) <= high;
                if worth && best.as_ref().is_none_or(|best| highest < best.highest) {
                    best = Some(Gain { highest, members: members.clone(), to: *node });
                }
            }
        }
        best
    }

    /// The VM's bundle, if all of it may be moved now.
    fn members(
        &self,
        name: &'a Name,
        vm: &'a VmView,
        from: NodeId,
    ) -> Option<Vec<(&'a Name, &'a VmView)>> {
        let bundle = self.state().rules.bundle(name);
        let members: Vec<(&'a Name, &'a VmView)> = match bundle {
            [] => vec![(name, vm)],
            names => names
                .iter()
                .filter_map(|name| Some((name, self.state().vms.get(name)?)))
                .filter(|(_, vm)| vm.places().at.is_some())
                .collect(),
        };
        let may_move = |(name, vm): &(&Name, &VmView)| {
            // What node affinity prefers it for would only bring it back.
            let prefers = self.state().rules.node_affinity(name).is_some();
            vm.managed()
                && vm.placement.requested == Requested::Started
                && vm.placement.phase == Phase::Started
                && vm.placement.owner == from
                && vm.placement.lock.is_none()
                && vm.placement.home.is_none()
                && vm.mobility == Mobility::Live
                && !self.placer.observations.failed_migrations.contains_key(*name)
                && !(prefers && vm.wishes.failback)
        };
        members.iter().all(may_move).then_some(members)
    }

    fn highest_after(&self, members: &[(&Name, &VmView)], from: NodeId, to: NodeId) -> Share {
        let (mut left, mut taken) = (self.placer.load.get(from), self.placer.load.get(to));
        for (name, vm) in members {
            let takes = self.placer.takes(name, vm);
            (left, taken) = (left.minus(takes), taken.plus(takes));
        }
        self.load_of(from, left).max(self.load_of(to, taken))
    }
}
