//! An operator's days: a node is drained and comes back, a node's disk runs full.

use std::time::Duration;

use anyhow::ensure;
use proto::v1::{ClusterStatus, HaStatus};
use tests::lab::cluster::Guest;
use tests::lab::{Lab, wait_until};

const BOOT: Duration = Duration::from_secs(120);

#[test]
fn a_drained_node_gives_its_vms_away_live_and_takes_none() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    let web = Guest::new("web", 100);
    let db = Guest::new("db", 101);
    for guest in [&web, &db] {
        lab.create_guest(1, guest, Some(2))?;
    }
    let before = [lab.await_guest(1, &web, BOOT)?, lab.await_guest(1, &db, BOOT)?];

    lab.ctl(1, &["node", "drain", "node2"])?;
    for (guest, before) in [&web, &db].into_iter().zip(&before) {
        ensure!(lab.owner(1, &guest.name)? != 2, "{} is still on node2", guest.name);
        let after = lab.await_guest(1, guest, BOOT)?;
        assert_eq!(after.boot_id, before.boot_id, "{} was restarted", guest.name);
        assert_eq!(after.memory_errors, 0);
    }
    let ha: HaStatus = lab.ctl_json(1, &["ha", "status"])?;
    let node2 = ha.nodes.iter().find(|node| node.name == "node2").map(|node| node.state.as_str());
    assert_eq!(node2, Some("maintenance"));
    let found = lab.vm_processes()?;
    ensure!(found.len() == 2 && !found.contains(&2), "VM processes are on {found:?}");

    // Nothing new comes to it, until it is taken back.
    let other = Guest { disk: false, ..Guest::new("other", 102) };
    lab.create_guest(1, &other, None)?;
    ensure!(lab.owner(1, "other")? != 2, "a drained node was given a VM");
    lab.ctl(1, &["node", "resume", "node2"])?;
    lab.wait_healthy(1)?;
    lab.migrate(1, "web", 2)?;
    assert_eq!(lab.await_guest(1, &web, BOOT)?.boot_id, before[0].boot_id);
    for guest in [&web, &db] {
        lab.stop_and_check(1, guest)?;
    }
    lab.down()
}

#[test]
fn a_full_disk_takes_one_node_out_and_loses_nothing() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    lab.ctl(1, &["network", "create", "before", "--bridge", "before0"])?;
    let victim = lab.leader(1)?;
    let other = if victim == 1 { 2 } else { 1 };
    // dd ends with an error when the disk is full: that is the point.
    let filled = lab.sh(
        victim,
        "dd if=/dev/zero of=/var/lib/holdfast/filler bs=1M 2>&1; df -k /var/lib/holdfast | tail -1",
    )?;
    println!("filled: {filled}");

    // The others go on without it; what was written is there.
    wait_until(BOOT, "the cluster writes on without the full node", || {
        let name = "during";
        let _ = lab.ctl_output(other, &["network", "create", name, "--bridge", "during0"])?;
        let networks = lab.ctl(other, &["-o", "json", "network", "list"])?;
        Ok(networks.contains(name))
    })?;
    let networks = lab.ctl(other, &["-o", "json", "network", "list"])?;
    ensure!(networks.contains("before0"), "an acknowledged write is gone: {networks}");

    // With room again all heals by itself.
    lab.sh(victim, "rm /var/lib/holdfast/filler && sync")?;
    lab.wait_healthy(other)?;
    wait_until(BOOT, "the node has caught up and knows both", || {
        let networks = lab.ctl_output(victim, &["-o", "json", "network", "list"])?;
        Ok(networks.code == 0
            && networks.stdout.contains("during0")
            && networks.stdout.contains("before0"))
    })?;
    let status: ClusterStatus = lab.ctl_json(victim, &["cluster", "status"])?;
    assert!(status.quorum);
    lab.down()
}
