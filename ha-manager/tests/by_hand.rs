//! `node fence NODE` in words: when it is refused, and what it does.

mod common;

use common::{Cluster, id, name, words};
use ha_manager::{ByHand, FenceDenied, Timing, Verdict, plan_by_hand};
use proptest::prelude::*;
use proto::record::Phase;

fn by_hand(cluster: &Cluster, node: &str, off: bool) -> Result<ByHand, FenceDenied> {
    let timing = Timing::default();
    plan_by_hand(&cluster.state, &cluster.observations, timing, id(node), off, "ann")
}

#[test]
fn it_is_refused_while_the_node_may_still_act() {
    let cluster = Cluster::new("node1 alive\nnode2 unknown\nnode3 dead\nnode4 following");
    let refused = |node: &str, off: bool| by_hand(&cluster, node, off).unwrap_err();
    assert_eq!(refused("node1", true), FenceDenied::Heard { age_ms: 0 });
    let lease = FenceDenied::LeaseMayRun { age_ms: 5_000, lease_ms: 10_000 };
    assert_eq!(refused("node2", true), lease);
    assert_eq!(refused("node3", false), FenceDenied::Unconfirmed);
    assert_eq!(refused("node4", true), FenceDenied::NotLeading);
    assert_eq!(refused("node9", true), FenceDenied::NoSuchNode);
    // It came back after it was fenced: it is heard, so it cleans up by itself.
    let back = Cluster::new("node1 alive fenced\nvm a on node1 started");
    assert_eq!(by_hand(&back, "node1", true), Err(FenceDenied::Heard { age_ms: 0 }));
}

#[test]
fn the_vms_of_a_lost_node_are_released() {
    let cluster = Cluster::new(
        "node1 dead\nnode2 alive
         vm ha on node1 started ha
         vm shared on node1 started
         vm local on node1 starting local
         vm moving on node1 migrating->node2
         vm ending on node1 stopping down
         vm off on node1 stopped down
         vm broken on node1 error
         vm elsewhere on node2 started
         vm coming on node2 migrating->node1",
    );
    let done = by_hand(&cluster, "node1", true).unwrap();
    assert_eq!(
        words(&done.action),
        "fence node1 r0 [ending g3 r40 stopped, ha g3 r40 recovering, local g3 r40 stopped, \
         moving g3 r40 stopped, shared g3 r40 stopped]"
    );
    assert_eq!(done.bound, [name("local")].into());
    assert_eq!(done.released()[&name("local")], (Phase::Stopped, true));
    assert_eq!(done.released()[&name("shared")], (Phase::Stopped, false));
}

#[test]
fn a_node_that_was_fenced_already_gives_up_the_rest() {
    let cluster = Cluster::new(
        "node1 dead fenced\nnode2 alive
         vm ha on node1 recovering ha
         vm shared on node1 started",
    );
    let done = by_hand(&cluster, "node1", true).unwrap();
    assert_eq!(words(&done.action), "fence node1 r77 [shared g3 r40 stopped]");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    /// Whatever else holds: only of a node that is dead, and on the person's word.
    #[test]
    fn never_of_a_node_that_may_live(
        verdict in prop::sample::select(vec!["alive", "unknown", "dead", "following"]),
        fenced: bool, drained: bool, off: bool, ha: bool,
        phase in prop::sample::select(vec!["started", "starting", "stopped", "error", "recovering"]),
    ) {
        let flag = |set: bool, word: &'static str| if set { word } else { "" };
        let cluster = Cluster::new(&format!(
            "node1 {verdict} {} {}\nnode2 alive\nvm a on node1 {phase} {}",
            flag(fenced, "fenced"), flag(drained, "drained"), flag(ha, "ha"),
        ));
        let done = by_hand(&cluster, "node1", off);
        let dead = matches!(cluster.observations.verdicts[&id("node1")], Verdict::Dead { .. });
        prop_assert_eq!(done.is_ok(), dead && off);
        for (vm, (phase, _)) in done.iter().flat_map(ByHand::released) {
            prop_assert_eq!(cluster.state.vms[&vm].placement.owner, id("node1"));
            prop_assert!(matches!(phase, Phase::Stopped | Phase::Recovering | Phase::Error));
            prop_assert!(ha || phase == Phase::Stopped, "not started by itself");
        }
    }
}
