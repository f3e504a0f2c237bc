//! Clusters in words, and what the plan makes of them.

mod common;

use common::{Cluster, name};
use ha_manager::{Attempts, Balance, Denied, NodeState, Now, Policy, check_target, place};

#[test]
fn a_quiet_cluster_needs_nothing() {
    let cluster = Cluster::new(
        "node1 alive\nnode2 alive\nvm web on node1 started ha\nvm db on node2 stopped down",
    );
    assert!(cluster.actions().is_empty());
    assert!(cluster.plan().report.is_empty(), "nothing is done, and nothing waits");
    assert_eq!(cluster.explain("web").to_string(), "runs on node1");
    assert_eq!(cluster.explain("db").to_string(), "stopped, as asked; its files belong to node2");
}

#[test]
fn a_silent_node_is_waited_for() {
    let cluster = Cluster::new("node1 unknown\nnode2 alive\nvm web on node1 started ha");
    assert!(cluster.actions().is_empty());
    let why = cluster.explain("web").to_string();
    assert_eq!(why, "its owner node1 is unknown; starts elsewhere once that node is fenced");
}

#[test]
fn a_dead_node_is_fenced_first_and_nothing_is_started_in_the_same_plan() {
    let cluster = Cluster::new(
        "node1 dead\nnode2 alive\nnode3 alive
         vm a on node1 started ha
         vm b on node1 migrating->node2 ha
         vm c on node1 stopping ha down
         vm d on node1 stopped ha down
         vm e on node1 recovering ha
         vm f on node1 starting ha
         vm non-ha on node1 started
         vm elsewhere on node2 started ha",
    );
    assert_eq!(
        cluster.actions(),
        ["fence node1 r0 [a g3 r40 recovering, b g3 r40 recovering, c g3 r40 stopped, \
          d g3 r40 stopped, e g3 r40 recovering, f g3 r40 recovering]"]
    );
    assert_eq!(cluster.plan().nodes[&name("node1")], NodeState::Fencing);
}

#[test]
fn vms_of_a_fenced_node_spread_over_the_least_loaded() {
    let cluster = Cluster::new(
        "node1 dead fenced\nnode2 alive\nnode3 alive
         vm a on node1 recovering ha
         vm b on node1 recovering ha
         vm c on node1 recovering ha
         vm old on node2 started",
    );
    assert_eq!(
        cluster.actions(),
        ["start a g3 r40 on node3", "start b g3 r40 on node2", "start c g3 r40 on node3"]
    );
    let report = &cluster.plan().report[&name("a")];
    assert_eq!(report.not_elsewhere[&name("node1")], Denied::Dead);
}

#[test]
fn a_vm_that_was_given_to_a_node_as_it_was_fenced_is_taken_from_it_again() {
    let cluster = Cluster::new("node1 dead fenced\nnode2 alive\nvm a on node1 starting ha");
    assert_eq!(cluster.actions(), ["fence node1 r77 [a g3 r40 recovering]"]);
    // The node answers again but has not cleaned up: still nothing may rest on it.
    let cluster = Cluster::new("node1 alive fenced\nnode2 alive\nvm a on node1 starting ha");
    assert_eq!(cluster.actions(), ["fence node1 r77 [a g3 r40 recovering]"]);
}

#[test]
fn who_does_not_lead_plans_nothing() {
    let cluster = Cluster::new("node1 following\nnode2 following\nvm a on node1 recovering ha");
    assert!(cluster.actions().is_empty());
}

#[test]
fn unplaceable_until_a_node_has_room() {
    let mut cluster = Cluster::new(
        "node1 dead fenced\nnode2 alive 300MiB\nnode3 unknown
         vm big on node1 recovering ha 512MiB",
    );
    let message = "no node can take the VM: node1: the node is dead; \
                   node2: the node has not enough free memory; node3: the node does not answer";
    assert_eq!(cluster.actions(), [format!("unplaceable big g3 r40: {message}")]);
    // Once said, it is not said again, but it is tried again.
    let vm = cluster.state.vms.get_mut(&name("big")).unwrap();
    vm.placement.phase = common::phase("unplaceable");
    vm.placement.message = Some(message.to_owned());
    assert!(cluster.actions().is_empty());
    cluster.add("node3 alive");
    assert_eq!(cluster.actions(), ["start big g3 r40 on node3"]);
}

#[test]
fn a_node_must_have_room_for_the_vms_process_too() {
    // 256 MiB for the guest and 48 MiB for its process: what the node's agent will ask for.
    let cluster = |node: u64| {
        Cluster::new(&format!("node1 alive {node}MiB\nvm a on node1 recovering ha 256MiB"))
            .actions()
    };
    assert_eq!(cluster(304), ["start a g3 r40 on node1"]);
    assert!(cluster(303)[0].starts_with("unplaceable a"), "{:?}", cluster(303));
    // And for that of each VM that is there already.
    let two = |node: u64| {
        Cluster::new(&format!(
            "node1 alive {node}MiB\nvm a on node1 started 256MiB\nvm b on node1 recovering ha 256MiB"
        ))
        .actions()
    };
    assert_eq!(two(608), ["start b g3 r40 on node1"]);
    assert!(two(607)[0].starts_with("unplaceable b"), "{:?}", two(607));
}

#[test]
fn a_failed_start_is_tried_again_there_then_elsewhere_then_given_up() {
    let cluster = |flags: &str| {
        Cluster::new(&format!(
            "node1 alive\nnode2 alive\nvm old on node2 started 512MiB
             vm a on node1 recovering ha retry=0 {flags}"
        ))
        .actions()
    };
    assert_eq!(cluster(""), ["start a g3 r40 on node1"]);
    assert_eq!(cluster("failed=1"), ["start a g3 r40 on node1"]);
    assert_eq!(cluster("failed=2"), ["start a g3 r40 on node2"]);
    let error = "error a g3 r40: it could not be started on 2 node(s), the last time: no such \
                 kernel. Mend that, then `clusterctl vm start a`";
    assert_eq!(cluster("failed=2 tried=1"), [error]);
    assert_eq!(cluster("failed=2 tried=1 relocations=2"), ["start a g3 r40 on node2"]);
    assert_eq!(cluster("failed=1 restarts=0"), ["start a g3 r40 on node2"]);
    assert!(cluster("failed=1 restarts=0 relocations=0")[0].starts_with("error a "));
    // With nowhere else to go, the same node is tried again, and that counts.
    let alone = Cluster::new("node1 alive\nvm a on node1 recovering ha failed=2 retry=0");
    assert_eq!(alone.actions(), ["start a g3 r40 on node1"]);
    let edit = ha_manager::edits(&alone.state, &alone.plan().actions[0]).remove(0);
    assert_eq!((edit.placement.start_failures, edit.placement.tried.len()), (0, 1));
}

#[test]
fn a_failed_start_backs_off_longer_each_time_and_every_leader_knows() {
    let at = |unix_ms: u64, flags: &str| {
        let mut cluster =
            Cluster::new(&format!("node1 alive\nnode2 alive\nvm a on node1 recovering ha {flags}"));
        cluster.now = Now { unix_ms, ..Now::default() };
        cluster
    };
    let actions = |unix_ms, flags: &str| at(unix_ms, flags).actions();
    assert_eq!(actions(1_000_000, "failed=1"), ["delay a g3 r40 until 1002000"]);
    assert_eq!(actions(1_000_000, "failed=2"), ["delay a g3 r40 until 1004000"]);
    assert_eq!(actions(1_000_000, "failed=5"), ["delay a g3 r40 until 1032000"]);
    // Whoever leads meanwhile reads the same moment, and says what is waited for.
    let waiting = at(1_000_500, "failed=2 retry=1004000");
    assert!(waiting.actions().is_empty());
    assert_eq!(
        waiting.plan().report[&name("a")].why,
        "failed to start (no such kernel), tried again in 4 s, try 3"
    );
    assert_eq!(actions(1_003_999, "failed=2 retry=1004000"), Vec::<String>::new());
    assert_eq!(actions(1_004_000, "failed=2 retry=1004000"), ["start a g3 r40 on node2"]);
    // Written by a leader whose clock is an hour ahead: one back-off more, not an hour.
    assert_eq!(actions(1_000_000, "failed=2 retry=4600000"), ["delay a g3 r40 until 1004000"]);
    // One whose clock is behind costs the wait, no more.
    assert_eq!(actions(4_600_000, "failed=2 retry=1004000"), ["start a g3 r40 on node2"]);
    // A VM that never failed waits for nothing.
    assert_eq!(actions(1_000_000, "retry=4600000"), ["start a g3 r40 on node1"]);
}

#[test]
fn back_offs_are_bounded() {
    let policy = Policy::default();
    let waits: Vec<u64> = (1..=8).map(|failures| policy.start_backoff_ms(failures)).collect();
    assert_eq!(waits, [2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000, 128_000]);
    assert_eq!(policy.start_backoff_ms(u32::MAX), 128_000);
    let endless = Policy { start_backoff_ms: u64::MAX, ..policy };
    assert_eq!(endless.start_backoff_ms(3), u64::MAX);
}

#[test]
fn a_vm_on_local_storage_waits_for_its_node() {
    let cluster = Cluster::new("node1 dead fenced\nnode2 alive\nvm a on node1 recovering ha local");
    assert_eq!(
        cluster.actions(),
        ["unplaceable a g3 r40: no node can take the VM: node1: the node is dead; node2: the VM \
          uses a local storage pool; only VMs on shared pools can move"]
    );
}

#[test]
fn a_drain_moves_so_many_at_once() {
    let mut cluster = Cluster::new(
        "node1 alive drained\nnode2 alive\nnode3 alive
         vm a on node1 started ha
         vm b on node1 started
         vm c on node1 started
         vm local on node1 started local
         vm off on node1 stopped down
         vm soon on node1 starting
         vm other on node2 started",
    );
    assert_eq!(
        cluster.actions(),
        [
            // HA notes first where it brings it back to.
            "remember a g3 r40 of node1",
            "migrate b g3 r40 node1 -> node3",
            "migrate c g3 r40 node1 -> node2",
            "reassign off g3 r40 to node3"
        ]
    );
    cluster.add("vm a on node1 started ha home=node1");
    assert_eq!(
        cluster.actions(),
        [
            "migrate a g3 r40 node1 -> node3",
            "migrate b g3 r40 node1 -> node2",
            "reassign off g3 r40 to node3"
        ]
    );
    let why = |vm: &str| cluster.explain(vm).why;
    assert_eq!(why("c"), "node1 is drained: moves when fewer migrations are under way");
    assert_eq!(why("soon"), "node1 is starting it");
    let local = cluster.explain("local").not_elsewhere;
    assert_eq!(local[&name("node2")], Denied::NotShared);
    // A migration under way takes one of the two places.
    cluster.add("vm a on node1 migrating->node3 ha");
    assert_eq!(
        cluster.actions(),
        ["migrate b g3 r40 node1 -> node2", "reassign off g3 r40 to node3"]
    );
}

#[test]
fn what_cannot_move_while_it_runs_is_stopped_for_it_only_by_ha() {
    let cluster = Cluster::new(
        "node1 alive drained\nnode2 alive
         vm a on node1 started ha cold home=node1
         vm b on node1 started cold",
    );
    assert_eq!(cluster.actions(), ["relocate a g3 r40 node1 -> node2"]);
    assert_eq!(
        cluster.explain("b").why,
        "node1 is drained, but it cannot move while it runs: stop it, or move it by hand"
    );
}

#[test]
fn what_runs_nowhere_leaves_a_drained_node_that_is_gone() {
    let cluster = Cluster::new(
        "node1 dead drained fenced\nnode2 alive\nnode3 unknown drained
         vm off on node1 stopped down ha
         vm plain on node3 stopped down
         vm bad on node3 error
         vm local on node3 stopped down local
         vm runs on node3 started",
    );
    assert_eq!(
        cluster.actions(),
        [
            "reassign bad g3 r40 to node2",
            "reassign off g3 r40 to node2",
            "reassign plain g3 r40 to node2"
        ]
    );
}

#[test]
fn a_witness_runs_no_vms() {
    let cluster = Cluster::new(
        "node1 dead fenced\nnode2 alive 255MiB\nnode3 alive witness
         vm a on node1 recovering ha",
    );
    let full = "node2: the node has not enough free memory";
    let witness = "node3: the node is a witness and runs no VMs";
    let action = cluster.actions().remove(0);
    assert!(action.starts_with("unplaceable a"), "{action}");
    assert!(action.contains(full) && action.contains(witness), "{action}");
}

#[test]
fn vms_leave_a_node_that_has_become_a_witness() {
    let cluster = Cluster::new(
        "node1 alive witness\nnode2 alive
         vm a on node1 started\nvm b on node1 stopped",
    );
    let actions = cluster.actions();
    assert!(
        actions[0].starts_with("migrate a ") && actions[0].ends_with("-> node2"),
        "{actions:?}"
    );
    assert!(
        actions[1].starts_with("reassign b ") && actions[1].ends_with("to node2"),
        "{actions:?}"
    );
    let why = &cluster.plan().report[&name("a")].why;
    assert_eq!(why, "node1 is a witness: moving to node2");
}

#[test]
fn a_failed_migration_of_a_drain_backs_off() {
    let mut cluster = Cluster::new("node1 alive drained\nnode2 alive\nvm a on node1 started");
    let attempts = Attempts { failures: 2, last_ms: 1_000 };
    cluster.observations.failed_migrations.insert(name("a"), attempts);
    cluster.now.boottime_ms = 10_999;
    assert!(cluster.actions().is_empty());
    cluster.now.boottime_ms = 11_000;
    assert_eq!(cluster.actions(), ["migrate a g3 r40 node1 -> node2"]);
}

#[test]
fn nothing_is_drained_to_a_node_that_is_drained_dead_or_full() {
    let cluster = Cluster::new(
        "node1 alive drained\nnode2 alive drained\nnode3 dead fenced\nnode4 unknown\n\
         node5 alive 303MiB\nvm a on node1 started",
    );
    assert!(cluster.actions().is_empty());
    let plan = cluster.plan();
    let denied: Vec<_> = plan.report[&name("a")].not_elsewhere.values().copied().collect();
    use Denied::{AlreadyThere, Dead, Draining, Full, Unknown};
    let full = Full { needed_mib: 304, free_mib: 303 };
    assert_eq!(denied, [AlreadyThere, Draining, Dead, Unknown, full]);
}

#[test]
fn targets_that_people_name_are_checked() {
    let cluster = Cluster::new(
        "node1 alive\nnode2 alive\nnode3 alive drained\nnode4 dead\nnode5 unknown\n\
         node6 alive 200MiB\nvm a on node1 started\nvm local on node1 started local",
    );
    let check = |vm: &str, node: &str| {
        let (vm, name) = (&cluster.state.vms[&name(vm)], name(vm));
        let policy = Policy::default();
        check_target(&cluster.state, &cluster.observations, &policy, &name, vm, common::id(node))
    };
    assert_eq!(check("a", "node1"), Err(Denied::AlreadyThere));
    assert_eq!(check("a", "node2"), Ok(()));
    assert_eq!(check("a", "node3"), Err(Denied::Draining));
    assert_eq!(check("a", "node4"), Err(Denied::Dead));
    assert_eq!(check("a", "node5"), Err(Denied::Unknown));
    assert_eq!(check("a", "node6"), Err(Denied::Full { needed_mib: 304, free_mib: 200 }));
    assert_eq!(check("a", "node9"), Err(Denied::NoSuchNode));
    assert_eq!(check("local", "node2"), Err(Denied::NotShared));
}

#[test]
fn new_vms_go_to_the_least_loaded_then_by_name() {
    let mut cluster = Cluster::new(
        "node1 alive\nnode2 alive\nnode3 alive 2048MiB\nvm new on node9 stopped 256MiB",
    );
    let place = |cluster: &Cluster, mib: u64, leaving: Option<&str>| {
        let mut vm = cluster.state.vms[&name("new")].clone();
        vm.placement.memory_bytes = mib * common::MIB;
        vm.placement.owner = leaving.map_or(proto::NodeId(0), common::id);
        let (state, observations) = (&cluster.state, &cluster.observations);
        let policy = &cluster.policy;
        place(state, observations, policy, &name("new"), &vm, leaving.is_some())
            .map(|node| node.0)
            .map_err(|no_place| no_place.to_string())
    };
    assert_eq!(place(&cluster, 256, None), Ok(3), "as many VMs: the share of memory decides");
    cluster.add("vm a on node3 started 128MiB");
    assert_eq!(place(&cluster, 256, None), Ok(1), "fewer VMs, then the name");
    assert_eq!(place(&cluster, 256, Some("node1")), Ok(2));
    assert_eq!(place(&cluster, 512, None), Ok(1));
    cluster.policy.balance = Balance::Static;
    assert_eq!(
        place(&cluster, 512, None),
        Ok(3),
        "half of its CPUs, and less than half its memory"
    );
    let full = place(&cluster, 4096, None).unwrap_err();
    assert!(full.contains("node3: the node has not enough free memory"), "{full}");
    assert!(place(&cluster, u64::MAX / common::MIB, None).is_err());
}
