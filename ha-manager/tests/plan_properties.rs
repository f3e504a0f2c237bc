//! Whatever the records and the verdicts are, a plan keeps the rules; and a world that carries
//! plans out, late ones too, never runs a VM twice.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Cluster, MIB};
use ha_manager::{Action, Explainer, Mobility, NodeState, Plan, Verdict, VmRef, edits};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proto::record::{Phase, Requested};
use proto::{Generation, Name, NodeId, Revision};

fn any_node() -> impl Strategy<Value = String> {
    let verdict = prop_oneof![4 => Just("alive"), 1 => Just("unknown"), 1 => Just("dead")];
    (verdict, prop::bool::weighted(0.2), prop::bool::weighted(0.2), 200u64..2000).prop_map(
        |(verdict, drained, fenced, mib)| {
            let drained = if drained { "drained" } else { "" };
            let fenced = if fenced { "fenced" } else { "" };
            format!("{verdict} {drained} {fenced} {mib}MiB")
        },
    )
}

fn any_vm() -> impl Strategy<Value = String> {
    let phases = vec![
        "stopped",
        "starting",
        "started",
        "stopping",
        "migrating->node1",
        "migrating->node3",
        "relocating->node2",
        "frozen",
        "recovering",
        "error",
        "unplaceable",
    ];
    let retry =
        prop_oneof![Just(String::new()), (0u64..20_000).prop_map(|at| format!("retry={at}"))];
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), 0u32..8, retry, 64u64..800);
    (1u64..6, prop::sample::select(phases), flags).prop_map(
        |(owner, phase, (ha, local, down, failed, retry, mib))| {
            let flag = |set: bool, word: &'static str| if set { word } else { "" };
            let (ha, local, down) = (flag(ha, "ha"), flag(local, "local"), flag(down, "down"));
            format!("on node{owner} {phase} {ha} {local} {down} failed={failed} {retry} {mib}MiB")
        },
    )
}

fn any_cluster() -> impl Strategy<Value = Cluster> {
    let nodes = prop::collection::vec(any_node(), 1..5);
    let vms = prop::collection::vec(any_vm(), 0..10);
    (nodes, vms, 0u64..20_000).prop_map(|(nodes, vms, unix_ms)| {
        let mut cluster = Cluster::default();
        cluster.now.unix_ms = unix_ms;
        nodes.iter().zip(1..).for_each(|(node, n)| cluster.add(&format!("node{n} {node}")));
        vms.iter().zip(1..).for_each(|(vm, n)| cluster.add(&format!("vm vm{n} {vm}")));
        cluster
    })
}

/// All VMs of an action, and whether it may give them to another node without migration.
fn refs(action: &Action) -> Vec<&VmRef> {
    match action {
        Action::Fence { vms, .. } => vms.iter().map(|fenced| &fenced.vm).collect(),
        Action::PowerOff { .. } => Vec::new(),
        Action::Start { vm, .. }
        | Action::Migrate { vm, .. }
        | Action::Relocate { vm, .. }
        | Action::Reassign { vm, .. }
        | Action::Remember { vm, .. }
        | Action::Stop { vm, .. }
        | Action::Freeze { vm, .. }
        | Action::Delay { vm, .. }
        | Action::MarkUnplaceable { vm, .. }
        | Action::MarkError { vm, .. } => vec![vm],
    }
}

fn reserved_mib(cluster: &Cluster, plan: &Plan) -> BTreeMap<NodeId, (u64, u64)> {
    let mut reserved: BTreeMap<NodeId, (u64, u64)> = BTreeMap::new();
    for vm in cluster.state.vms.values() {
        let at = vm.placement.owner;
        let mib = proto::vm_needs_bytes(vm.placement.memory_bytes) / MIB;
        match vm.placement.phase {
            Phase::Starting | Phase::Started | Phase::Stopping => {
                reserved.entry(at).or_default().0 += mib
            }
            Phase::Migrating { target } | Phase::Relocating { target } => {
                reserved.entry(at).or_default().0 += mib;
                reserved.entry(target).or_default().0 += mib;
            }
            Phase::Stopped
            | Phase::Recovering
            | Phase::Error
            | Phase::Unplaceable
            | Phase::Frozen => {}
        }
    }
    for action in &plan.actions {
        if let Action::Start { vm, to, .. }
        | Action::Migrate { vm, to, .. }
        | Action::Relocate { vm, to, .. } = action
        {
            let memory_bytes = cluster.state.vms[&vm.name].placement.memory_bytes;
            reserved.entry(*to).or_default().1 += proto::vm_needs_bytes(memory_bytes) / MIB;
        }
    }
    reserved
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2_000) })]

    #[test]
    fn every_plan_keeps_the_rules(cluster in any_cluster()) {
        let plan = cluster.plan();
        prop_assert_eq!(&plan, &cluster.plan(), "the same inputs give the same plan");
        let mut seen = BTreeSet::new();
        for action in &plan.actions {
            for vm in refs(action) {
                let view = &cluster.state.vms[&vm.name];
                prop_assert!(seen.insert(vm.name.clone()), "two actions for {}", vm.name);
                prop_assert_eq!(vm.generation, view.placement.generation);
                prop_assert_eq!(vm.mod_revision, view.mod_revision);
            }
            check_action(&cluster, &plan, action)?;
        }
        for (node, (before_mib, added_mib)) in reserved_mib(&cluster, &plan) {
            let memory_mib = cluster.state.nodes.get(&node).map_or(0, |v| v.record.memory_bytes / MIB);
            prop_assert!(added_mib == 0 || before_mib + added_mib <= memory_mib, "node{node} overcommitted");
        }
        let explainer = Explainer::new(
            &cluster.state, &cluster.observations, &cluster.policy, &plan,
        );
        let explained = cluster.state.vms.keys().filter(|vm| explainer.explain(vm).is_some());
        prop_assert_eq!(explained.count(), cluster.state.vms.len(), "each VM has its reason");
    }
}

fn check_action(cluster: &Cluster, plan: &Plan, action: &Action) -> Result<(), TestCaseError> {
    let online = |node: &NodeId| {
        let name = &cluster.state.nodes[node].record.name;
        plan.nodes[name] == NodeState::Online
    };
    match action {
        Action::Start { vm, to, .. } => {
            let view = &cluster.state.vms[&vm.name];
            prop_assert!(online(to));
            prop_assert!((view.mobility != Mobility::Bound) || *to == view.placement.owner);
            let due = view.placement.retry_at_unix_ms.is_some_and(|at| at <= cluster.now.unix_ms);
            prop_assert!(
                view.placement.start_failures == 0 || due,
                "started before its back-off is over"
            );
            // Only what runs nowhere by its record: nothing of a node that is not fenced.
            prop_assert!(matches!(
                view.placement.phase,
                Phase::Recovering | Phase::Unplaceable | Phase::Stopped | Phase::Frozen
            ));
            prop_assert!(
                view.placement.phase != Phase::Stopped
                    || view.placement.requested == Requested::Started
            );
        }
        Action::Reassign { vm, to, .. } => {
            let view = &cluster.state.vms[&vm.name];
            prop_assert!(online(to) && (view.mobility != Mobility::Bound));
            prop_assert!(matches!(view.placement.phase, Phase::Stopped | Phase::Error));
        }
        Action::Migrate { vm, from, to, .. } | Action::Relocate { vm, from, to, .. } => {
            let view = &cluster.state.vms[&vm.name];
            prop_assert!(online(to) && (view.mobility != Mobility::Bound) && from != to);
            prop_assert_eq!(*from, view.placement.owner);
            prop_assert_eq!(view.placement.phase, Phase::Started);
        }
        Action::Fence { node, vms, fenced, .. } => {
            let view = &cluster.state.nodes[node];
            let dead = matches!(cluster.observations.verdicts[node], Verdict::Dead { .. });
            prop_assert!(dead || view.fenced.is_some());
            prop_assert_eq!(*fenced, view.fenced.unwrap_or_default());
            for vm in vms {
                let placement = &cluster.state.vms[&vm.vm.name].placement;
                prop_assert!(placement.ha && placement.owner == *node);
            }
        }
        Action::Delay { vm, until_unix_ms, .. } => {
            let placement = &cluster.state.vms[&vm.name].placement;
            prop_assert!(placement.start_failures > 0);
            let wait_ms = until_unix_ms - cluster.now.unix_ms;
            prop_assert_eq!(wait_ms, cluster.policy.start_backoff_ms(placement.start_failures));
        }
        Action::Stop { .. } | Action::Freeze { .. } => prop_assert!(false, "no node goes down"),
        Action::PowerOff { .. } => prop_assert!(false, "no node can be switched off from outside"),
        Action::Remember { .. } | Action::MarkUnplaceable { .. } | Action::MarkError { .. } => {}
    }
    Ok(())
}

/// What happens in the world of [`World`].
#[derive(Debug, Clone, Copy)]
enum Event {
    /// The leader loses sight of a node, which runs on.
    CutOff(u64),
    /// The node's lease has ended its HA VMs, and the leader's L has passed.
    LeaseEnds(u64),
    /// It is heard again: kills old generations, removes its fenced record.
    Return(u64),
    Drain(u64, bool),
    /// A plan is made and kept.
    Plan,
    /// The kept plan, perhaps old by now, is carried out.
    Execute,
    /// A node looks at its placements.
    Reconcile(u64),
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        (1u64..4).prop_map(Event::CutOff),
        (1u64..4).prop_map(Event::LeaseEnds),
        (1u64..4).prop_map(Event::Return),
        (1u64..4, any::<bool>()).prop_map(|(node, on)| Event::Drain(node, on)),
        Just(Event::Plan),
        Just(Event::Execute),
        (1u64..4).prop_map(Event::Reconcile),
    ]
}

/// Three nodes, their VMs, the records, and an executor. `compares` off is the mistake that the
/// test must catch: to carry a plan out without its compares.
struct World {
    cluster: Cluster,
    running: BTreeMap<NodeId, BTreeMap<Name, Generation>>,
    revision: u64,
    kept: Plan,
    compares: bool,
}

impl World {
    fn new(compares: bool) -> Self {
        let mut cluster = Cluster::new("node1 alive\nnode2 alive\nnode3 alive");
        let mut running: BTreeMap<NodeId, BTreeMap<Name, Generation>> = BTreeMap::new();
        for n in 1..=3 {
            cluster.add(&format!("vm vm{n} on node{n} started ha 128MiB"));
            let vm = common::name(&format!("vm{n}"));
            running.entry(NodeId(n)).or_default().insert(vm, Generation(3));
        }
        Self { cluster, running, revision: 100, kept: Plan::default(), compares }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::CutOff(n) => self.set_verdict(n, Verdict::Unknown { age_ms: 5_000 }),
            Event::LeaseEnds(n) => {
                if matches!(self.cluster.observations.verdicts[&NodeId(n)], Verdict::Unknown { .. })
                {
                    self.running.entry(NodeId(n)).or_default().clear();
                    self.set_verdict(n, Verdict::Dead { age_ms: 10_000 });
                }
            }
            Event::Return(n) => {
                self.set_verdict(n, Verdict::Alive { age_ms: 0 });
                self.kill_old_generations(NodeId(n));
                self.cluster.state.nodes.get_mut(&NodeId(n)).unwrap().fenced = None;
            }
            Event::Drain(n, on) => {
                let node = self.cluster.state.nodes.get_mut(&NodeId(n)).unwrap();
                node.record.maintenance = on;
            }
            Event::Plan => self.kept = self.cluster.plan(),
            Event::Execute => {
                for action in std::mem::take(&mut self.kept).actions {
                    self.execute(&action);
                }
            }
            Event::Reconcile(n) => self.reconcile(NodeId(n)),
        }
    }

    fn set_verdict(&mut self, n: u64, verdict: Verdict) {
        self.cluster.observations.verdicts.insert(NodeId(n), verdict);
    }

    fn kill_old_generations(&mut self, node: NodeId) {
        let vms = &self.cluster.state.vms;
        self.running.entry(node).or_default().retain(|vm, generation| {
            let placement = &vms[vm].placement;
            placement.owner == node && placement.generation == *generation
        });
    }

    /// An agent with a fresh lease: starts what is its own and is to be started.
    fn reconcile(&mut self, node: NodeId) {
        let alive = matches!(self.cluster.observations.verdicts[&node], Verdict::Alive { .. });
        if !alive || self.cluster.state.nodes[&node].fenced.is_some() {
            return;
        }
        self.kill_old_generations(node);
        self.revision += 1;
        for (name, vm) in &mut self.cluster.state.vms {
            let running = self.running.entry(node).or_default();
            let placement = &mut vm.placement;
            if placement.owner == node && !running.contains_key(name) {
                match placement.phase {
                    Phase::Starting => {
                        running.insert(name.clone(), placement.generation);
                        placement.phase = Phase::Started;
                    }
                    Phase::Started => placement.phase = Phase::Recovering,
                    _ => continue,
                }
                vm.mod_revision = Revision(self.revision);
            }
        }
    }

    fn execute(&mut self, action: &Action) {
        let holds = refs(action)
            .iter()
            .all(|vm| self.cluster.state.vms[&vm.name].mod_revision == vm.mod_revision);
        if self.compares && !holds {
            return;
        }
        let edits = edits(&self.cluster.state, action);
        let given_to_fenced = edits
            .iter()
            .filter_map(|edit| edit.gives_to)
            .any(|to| self.cluster.state.nodes[&to].fenced.is_some());
        if self.compares && given_to_fenced {
            return;
        }
        self.revision += 1;
        let revision = Revision(self.revision);
        match action {
            Action::Fence { node, fenced: expected, .. } => {
                let view = self.cluster.state.nodes.get_mut(node).unwrap();
                if self.compares && view.fenced.unwrap_or_default() != *expected {
                    return;
                }
                view.fenced = Some(revision);
            }
            // A live migration that succeeds at once: its commit compares too. Where the target's
            // lease has ended meanwhile, so has its VM process: nothing runs at either end.
            Action::Migrate { vm, from, to, .. } => {
                let source_runs = self.running.entry(*from).or_default().remove(&vm.name);
                if source_runs.is_some() {
                    let view = self.cluster.state.vms.get_mut(&vm.name).unwrap();
                    ha_manager::owner::committed(&mut view.placement, *to, "the target");
                    view.mod_revision = revision;
                    let generation = view.placement.generation;
                    let verdict = self.cluster.observations.verdicts[to];
                    if !matches!(verdict, Verdict::Dead { .. }) {
                        self.running.entry(*to).or_default().insert(vm.name.clone(), generation);
                    }
                }
            }
            _ => {}
        }
        for edit in edits {
            let vm = self.cluster.state.vms.get_mut(&edit.vm).unwrap();
            vm.placement = edit.placement;
            vm.mod_revision = revision;
        }
    }

    fn copies(&self, vm: &Name) -> usize {
        self.running.values().filter(|running| running.contains_key(vm)).count()
    }

    /// Runs the events; whether no VM ever ran twice.
    fn run(mut self, events: &[Event]) -> Result<(), String> {
        for (at, event) in events.iter().enumerate() {
            self.happen(*event);
            if let Some(vm) = self.cluster.state.vms.keys().find(|vm| self.copies(vm) > 1) {
                return Err(format!("{vm} runs twice after event {at} {event:?}"));
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1_000) })]

    #[test]
    fn no_vm_ever_runs_twice(events in prop::collection::vec(any_event(), 0..120)) {
        prop_assert_eq!(World::new(true).run(&events), Ok(()));
    }
}

/// Found by the property: an old plan's migration is carried out once the target's lease is over.
#[test]
fn a_vm_that_was_moved_to_a_node_without_a_lease_runs_once() {
    use Event::{CutOff, Drain, Execute, LeaseEnds, Plan, Reconcile, Return};
    let story = [
        CutOff(3),
        Drain(2, true),
        CutOff(1),
        Return(3),
        Plan, // to move vm2 to node3: kept
        CutOff(3),
        LeaseEnds(3),
        Execute,
        Plan,
        Execute, // node3 is fenced
        Return(1),
        Plan,
        Execute,
        Reconcile(1), // vm2 runs on node1
    ];
    let mut world = World::new(true);
    story.iter().for_each(|event| world.happen(*event));
    let vm2 = common::name("vm2");
    assert_eq!(world.copies(&vm2), 1);
    assert!(world.running[&NodeId(1)].contains_key(&vm2));
    assert_eq!(World::new(true).run(&story), Ok(()));
}

/// The property bites: an executor that leaves the compares out is caught.
#[test]
fn an_executor_without_compares_is_caught() {
    use Event::{CutOff, Execute, LeaseEnds, Plan, Reconcile, Return};
    // The plan to start vm1 elsewhere is kept while another copy of the same plan was carried
    // out; then it is carried out again, late, for another node.
    let story = [
        CutOff(1),
        LeaseEnds(1),
        Plan,
        Execute, // fenced
        Plan,
        Execute,
        Reconcile(2),
        Reconcile(3), // vm1 runs on node2
        CutOff(2),
        LeaseEnds(2),
        Plan, // to fence node2: kept
        Return(2),
        Reconcile(2), // but it is back
        Return(1),
        Execute,
        Plan,
        Execute,
        Reconcile(1),
        Reconcile(3),
        Return(2),
        Reconcile(2),
    ];
    assert_eq!(World::new(true).run(&story), Ok(()));
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let events = prop::collection::vec(any_event(), 60..200);
    let caught = (0..4_000).any(|_| {
        let events = events.new_tree(&mut runner).unwrap().current();
        World::new(false).run(&events).is_err()
    });
    assert!(caught, "4,000 histories without compares, and none was caught");
}
