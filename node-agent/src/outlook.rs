//! What would happen if one more node failed: for `cluster status`. Pure: it asks the plan itself.

use std::collections::BTreeSet;

use ha_manager::{Action, ClusterState, Now, Observations, Policy, Verdict, plan};
use proto::record::{Phase, Placement, Requested};
use proto::{Name, NodeId, Revision};

/// A member, as far as the quorum is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Voice {
    /// Who.
    pub id: NodeId,
    /// The label people see.
    pub name: String,
    /// Counts for quorum.
    pub voter: bool,
    /// Answers the leader.
    pub up: bool,
}

/// What the failure of one node would mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outlook {
    /// Who fails.
    pub node: String,
    /// Voters that would still answer.
    pub voters_left: usize,
    /// Voters in all.
    pub voters: usize,
    /// Its HA VMs that start elsewhere.
    pub restart: Vec<Name>,
    /// Its HA VMs that no other node can take.
    pub unplaceable: Vec<Name>,
    /// Its VMs without HA: they wait for it.
    pub wait: Vec<Name>,
}

impl Outlook {
    /// Whether the cluster could still decide.
    #[must_use]
    pub fn quorum(&self) -> bool {
        self.voters_left * 2 > self.voters
    }

    /// It in words.
    #[must_use]
    pub fn summary(&self) -> String {
        let (left, voters) = (self.voters_left, self.voters);
        if !self.quorum() {
            return format!(
                "if {} fails: quorum is lost ({left} of {voters} voters left): nothing can be \
                 changed, HA VMs stop everywhere and start nowhere; VMs without HA run on",
                self.node
            );
        }
        let mut text = format!("if {} fails: quorum stays ({left} of {voters})", self.node);
        let fates = [
            (&self.restart, "HA VMs that restart elsewhere"),
            (&self.unplaceable, "HA VMs that no other node can take"),
            (&self.wait, "other VMs that wait for it"),
        ];
        for (vms, fate) in fates.iter().filter(|(vms, _)| !vms.is_empty()) {
            text.push_str(&format!("; {fate}: {}", vms.len()));
        }
        text
    }
}

/// What the failure of each node that is up would mean, in the members' order.
#[must_use]
pub fn outlook(
    members: &[Voice],
    state: &ClusterState,
    observations: &Observations,
    policy: &Policy,
) -> Vec<Outlook> {
    let voters = members.iter().filter(|member| member.voter);
    let (all, up) = (voters.clone().count(), voters.filter(|member| member.up).count());
    let after = |member: &Voice| {
        let mut outlook = without(member, state, observations, policy);
        outlook.voters = all;
        outlook.voters_left = up - usize::from(member.voter);
        outlook
    };
    members.iter().filter(|member| member.up).map(after).collect()
}

fn runs(placement: &Placement) -> bool {
    match placement.phase {
        Phase::Starting | Phase::Started | Phase::Migrating { .. } | Phase::Relocating { .. } => {
            true
        }
        Phase::Stopping => placement.requested == Requested::Started,
        Phase::Stopped | Phase::Recovering | Phase::Error | Phase::Unplaceable | Phase::Frozen => {
            false
        }
    }
}

/// The node's VMs after its fencing, by the plan that would be made then.
fn without(
    member: &Voice,
    state: &ClusterState,
    observations: &Observations,
    policy: &Policy,
) -> Outlook {
    let (mut state, mut observations) = (state.clone(), observations.clone());
    if let Some(view) = state.nodes.get_mut(&member.id) {
        view.fenced = Some(Revision(1));
    }
    observations.verdicts.insert(member.id, Verdict::Dead { age_ms: 0 });
    let mut down = BTreeSet::new();
    let mut wait = Vec::new();
    for (name, vm) in &mut state.vms {
        if vm.placement.owner != member.id || !runs(&vm.placement) {
            continue;
        }
        if vm.placement.ha && vm.placement.requested == Requested::Started {
            vm.placement.phase = Phase::Recovering;
            ha_manager::owner::forget_failures(&mut vm.placement);
            down.insert(name.clone());
        } else if !vm.placement.ha {
            wait.push(name.clone());
        }
    }
    // In the end, not at once.
    let policy = Policy { parallel_starts: usize::MAX, node_starts: usize::MAX, ..*policy };
    let plan = plan(&state, &observations, &policy, Now::default());
    let started = plan.actions.iter().filter_map(|action| match action {
        Action::Start { vm, .. } => Some(vm.name.clone()),
        _ => None,
    });
    let restart: Vec<Name> = started.filter(|name| down.contains(name)).collect();
    Outlook {
        node: member.name.clone(),
        voters_left: 0,
        voters: 0,
        unplaceable: down.into_iter().filter(|name| !restart.contains(name)).collect(),
        restart,
        wait,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use std::sync::Arc;

    use ha_manager::{Mobility, NodeView, VmView};

    use super::*;

    fn node(id: u64, memory_mib: u64) -> (NodeId, NodeView) {
        let record = serde_json::from_value(serde_json::json!({
            "node_id": id, "name": format!("node{id}"), "api_address": "", "cpus": 4,
            "memory_bytes": memory_mib << 20, "watchdog": "softdog",
        }));
        let record = record.unwrap();
        (NodeId(id), NodeView { record, fenced: None, power_fencing: false, unarmed: false })
    }

    fn vm(name: &str, owner: u64, ha: bool, phase: Phase) -> (Name, VmView) {
        let placement = serde_json::from_value(serde_json::json!({
            "vm_id": "00000000-0000-4000-8000-000000000001", "owner": owner, "generation": 3,
            "phase": phase, "requested": "started", "ha": ha, "cpus": 1,
            "memory_bytes": 256 << 20,
        }));
        let view = VmView {
            placement: placement.unwrap(),
            mod_revision: Revision(4),
            mobility: Mobility::Live,
            wishes: Arc::default(),
        };
        (name.parse().unwrap(), view)
    }

    fn summaries(votes: &[(u64, bool, bool)], vms: Vec<(Name, VmView)>) -> Vec<String> {
        let nodes: BTreeMap<_, _> = votes.iter().map(|(id, _, _)| node(*id, 700)).collect();
        let verdict = |up: bool| {
            if up { Verdict::Alive { age_ms: 0 } } else { Verdict::Dead { age_ms: 20_000 } }
        };
        let verdicts = votes.iter().map(|(id, _, up)| (NodeId(*id), verdict(*up))).collect();
        let observations = Observations { verdicts, ..Observations::default() };
        let members: Vec<Voice> = votes
            .iter()
            .map(|(id, voter, up)| Voice {
                id: NodeId(*id),
                name: format!("node{id}"),
                voter: *voter,
                up: *up,
            })
            .collect();
        let vms = vms.into_iter().collect();
        let state = ClusterState { nodes, vms, ..ClusterState::default() };
        outlook(&members, &state, &observations, &Policy::default())
            .iter()
            .map(Outlook::summary)
            .collect()
    }

    #[test]
    fn three_voters_survive_one_and_the_vms_start_as_far_as_there_is_room() {
        let vms = vec![
            vm("a", 2, true, Phase::Started),
            vm("b", 2, true, Phase::Starting),
            vm("plain", 2, false, Phase::Started),
            vm("off", 2, true, Phase::Error),
            vm("c", 1, true, Phase::Started),
            vm("d", 3, true, Phase::Started),
            vm("e", 3, true, Phase::Started),
        ];
        assert_eq!(
            summaries(&[(1, true, true), (2, true, true), (3, true, true)], vms),
            [
                "if node1 fails: quorum stays (2 of 3); HA VMs that no other node can take: 1",
                "if node2 fails: quorum stays (2 of 3); HA VMs that restart elsewhere: 1; HA VMs \
                 that no other node can take: 1; other VMs that wait for it: 1",
                "if node3 fails: quorum stays (2 of 3); HA VMs that restart elsewhere: 1; HA VMs \
                 that no other node can take: 1",
            ]
        );
    }

    #[test]
    fn without_a_spare_voter_the_next_failure_ends_it_but_a_learners_does_not() {
        let vms = vec![vm("a", 4, true, Phase::Started)];
        let votes = [(1, true, true), (2, true, true), (3, true, false), (4, false, true)];
        let told = summaries(&votes, vms);
        // The node that is down already is not asked about.
        assert_eq!(told.len(), 3);
        assert!(told[0].starts_with("if node1 fails: quorum is lost (1 of 3"), "{told:?}");
        assert_eq!(
            told[2],
            "if node4 fails: quorum stays (2 of 3); HA VMs that restart elsewhere: 1"
        );
    }
}
