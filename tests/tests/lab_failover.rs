//! Nodes lose power, their network, or their wits: HA VMs come back elsewhere, never twice. One lab
//! and one HA guest for all: each scenario begins where the last one left the guest.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use proto::v1::ClusterStatus;
use tests::guest::client::Status;
use tests::lab::guest::Guest;
use tests::lab::handover::StartWatch;
use tests::lab::scenario::{Stage, play};
use tests::lab::{Lab, Options, wait_until};

const BOOT: Duration = Duration::from_secs(120);
/// A node with a hardware watchdog (i6300esb), and the one that has only the kernel's.
const HARDWARE_WATCHDOG: u32 = 2;
const SOFTDOG: u32 = 3;

#[test]
fn ha_vms_come_back_elsewhere_and_never_twice() -> anyhow::Result<()> {
    let lab = Lab::cluster(&Options { softdog: vec![SOFTDOG], ..Options::patient(3) })?;
    let web = Guest::new("web", 100);
    lab.create_guest(1, &web, None)?;
    let status = lab.await_guest(1, &web, BOOT)?;
    let mut stage = Failover { lab, web, status };
    play(
        &mut stage,
        &[
            ("a killed agent finds its VM again", a_killed_agent_finds_its_vm_again),
            ("a partitioned owner stops its VM before another node starts it", a_partition),
            ("a hung agent costs its node the VM", |stage| {
                a_hung_agent(stage, HARDWARE_WATCHDOG, "i6300ESB timer")
            }),
            ("softdog resets a node with a hung agent", |stage| {
                a_hung_agent(stage, SOFTDOG, "Software Watchdog")
            }),
            ("a hung node is reset or writes nothing more", a_hung_node),
            ("a power cut of the owner moves its VM", a_power_cut_of_the_owner),
            ("a power cut of the leader moves its VM", a_power_cut_of_the_leader),
            ("without a quorum changes are refused and other VMs run on", no_quorum),
        ],
    )?;
    stage.lab.down()
}

/// The lab, and its HA guest as it was last seen.
struct Failover {
    lab: Lab,
    web: Guest,
    status: Status,
}

/// Who does what in a scenario.
#[derive(Clone, Copy)]
struct Roles {
    /// Runs the guest.
    owner: u32,
    /// Asked, and spared.
    watcher: u32,
}

impl Stage for Failover {
    /// All nodes are up and online, and one copy of the guest runs.
    fn check_whole(&mut self) -> anyhow::Result<()> {
        for number in self.lab.numbers() {
            self.lab.wait_up(number, BOOT)?;
        }
        self.lab.wait_healthy(1)?;
        let now = self.lab.wait_single_copy(1, &self.web)?;
        ensure!(now.boot_id == self.status.boot_id, "the guest was restarted once more");
        Ok(())
    }
}

impl Failover {
    /// The guest is (or is not) on the Raft leader's node; it is moved there if need be.
    fn roles(&self, on_leader: bool) -> anyhow::Result<Roles> {
        let Self { lab, web, .. } = self;
        let leader = lab.leader(1)?;
        let other = |than: u32| {
            let mut numbers = lab.numbers().into_iter();
            numbers.find(|number| *number != than).context("a cluster of one")
        };
        let mut owner = lab.owner(1, &web.name)?;
        if (owner == leader) != on_leader {
            let target = if on_leader { leader } else { other(leader)? };
            lab.migrate(leader, &web.name, target)?;
            owner = target;
        }
        Ok(Roles { owner, watcher: if on_leader { other(leader)? } else { leader } })
    }

    /// The guest is on a node of our choice, which does not lead; both are moved if need be.
    fn owned_by(&self, owner: u32) -> anyhow::Result<Roles> {
        let Self { lab, web, .. } = self;
        let others = || lab.numbers().into_iter().filter(|number| *number != owner);
        let watcher = others().next().context("a cluster of one")?;
        if lab.leader(watcher)? == owner {
            lab.ctl(watcher, &["cluster", "transfer-leader", &format!("node{watcher}")])?;
            wait_until(BOOT, "another node leads", || Ok(lab.leader(watcher)? == watcher))?;
        }
        if lab.owner(watcher, &web.name)? != owner {
            lab.migrate(watcher, &web.name, owner)?;
        }
        Ok(Roles { owner, watcher })
    }

    /// Waits until the guest runs on another node, booted anew.
    fn wait_recovered(&mut self, Roles { owner, watcher }: Roles) -> anyhow::Result<()> {
        let Self { lab, web, .. } = self;
        let elsewhere = format!("it runs on another node than node{owner}");
        let owner_name = format!("node{owner}");
        lab.wait_vm(watcher, &web.name, BOOT, &elsewhere, |vm| {
            vm.phase == "started" && vm.node != owner_name && !vm.node.is_empty()
        })?;
        let after = lab.await_guest(watcher, web, BOOT)?;
        ensure!(after.boot_id != self.status.boot_id, "the old copy answers");
        self.status = after;
        Ok(())
    }

    /// The node that lost the guest is well again, and has no copy of it.
    fn wait_back(&self, Roles { owner, watcher }: Roles) -> anyhow::Result<()> {
        self.lab.wait_up(owner, BOOT)?;
        self.lab.wait_healthy(watcher)?;
        self.lab.wait_single_copy(watcher, &self.web).map(drop)
    }

    /// Looks for another node than the owner that starts the guest.
    fn watch(&self, Roles { owner, .. }: Roles) -> anyhow::Result<StartWatch> {
        let others: Vec<u32> = self.lab.numbers().into_iter().filter(|n| *n != owner).collect();
        self.lab.watch_start(&self.web, &others)
    }

    /// The former copy had written its last record when another node began to start the guest; all
    /// records are in order.
    fn check_handover(&self, watcher: u32, watch: StartWatch) -> anyhow::Result<()> {
        let start = watch.seen()?;
        let records = self.lab.pause_and_check(watcher, &self.web)?;
        let (last, first) = start.check(&records, boot_id(&self.status)?)?;
        ensure!(first.wall_ns > last.wall_ns, "both wrote at once: {last:?}, {first:?}");
        println!(
            "{} records when node{} began to start it, none of the former copy after; {} ms \
             between its last and the new copy's first",
            start.records,
            start.node,
            (first.wall_ns - last.wall_ns) / 1_000_000
        );
        Ok(())
    }

    /// Tells one start of a node's machine from another.
    fn machine_boot(&self, number: u32) -> anyhow::Result<String> {
        self.lab.exec(number, &["cat", "/proc/sys/kernel/random/boot_id"])
    }
}

/// A boot id as records have it.
fn boot_id(status: &Status) -> anyhow::Result<[u8; 16]> {
    let digits: String = status.boot_id.chars().filter(|c| *c != '-').collect();
    Ok(u128::from_str_radix(&digits, 16)?.to_be_bytes())
}

fn a_killed_agent_finds_its_vm_again(stage: &mut Failover) -> anyhow::Result<()> {
    let Roles { owner, watcher } = stage.roles(false)?;
    let Failover { lab, web, .. } = stage;
    let pids = lab.vm_pids(owner)?;
    let talk = lab.talk(watcher, web)?;
    let since = lab.log_length(owner)?;
    lab.kill_agent(owner)?;
    lab.wait_log(owner, since, "member of")?;
    lab.wait_agent(owner)?;
    lab.wait_healthy(watcher)?;
    ensure!(lab.vm_pids(owner)? == pids, "the VM's process is another one");
    let report = talk.finish()?;
    ensure!(report.connections == 1, "{report:?}");
    // The mount that the killed agent left is replaced by the new one's.
    let document = "/etc/holdfast/cluster/vms/web.toml";
    wait_until(BOOT, "the configuration is mounted again", || {
        Ok(lab.exec(owner, &["cat", document]).is_ok_and(|text| text.contains("web")))
    })?;
    // It is the agent's again: it can be moved.
    let target = lab.numbers().into_iter().find(|n| *n != owner && *n != watcher);
    lab.migrate(watcher, &web.name, target.context("three nodes are needed")?)?;
    lab.pause_and_check(watcher, web).map(drop)
}

fn a_partition(stage: &mut Failover) -> anyhow::Result<()> {
    let roles = stage.roles(false)?;
    let watch = stage.watch(roles)?;
    stage.lab.isolate(roles.owner)?;
    stage.wait_recovered(roles)?;
    stage.lab.heal()?;
    stage.wait_back(roles)?;
    stage.check_handover(roles.watcher, watch)
}

fn a_hung_agent(stage: &mut Failover, node: u32, watchdog: &str) -> anyhow::Result<()> {
    let roles = stage.owned_by(node)?;
    let identity = stage.lab.sh(node, "cat /sys/class/watchdog/watchdog0/identity")?;
    ensure!(identity.trim() == watchdog, "node{node}'s watchdog is {identity}");
    let watch = stage.watch(roles)?;
    let machine = stage.machine_boot(roles.owner)?;
    stage.lab.hang_agent(roles.owner)?;
    stage.wait_recovered(roles)?;
    stage.wait_back(roles)?;
    stage.check_handover(roles.watcher, watch)?;
    // Nobody petted the watchdog.
    ensure!(stage.machine_boot(roles.owner)? != machine, "the watchdog did not reset the node");
    Ok(())
}

fn a_hung_node(stage: &mut Failover) -> anyhow::Result<()> {
    let roles = stage.roles(false)?;
    let watch = stage.watch(roles)?;
    stage.lab.freeze(roles.owner)?;
    stage.wait_recovered(roles)?;
    stage.lab.unfreeze(roles.owner)?;
    stage.wait_back(roles)?;
    stage.check_handover(roles.watcher, watch)
}

fn a_power_cut_of_the_owner(stage: &mut Failover) -> anyhow::Result<()> {
    let roles = stage.roles(false)?;
    let watch = stage.watch(roles)?;
    stage.lab.power_off(roles.owner)?;
    stage.wait_recovered(roles)?;
    // Nothing is moved to a node that is known to be dead.
    let dead = format!("node{}", roles.owner);
    let refused = stage.lab.ctl_output(roles.watcher, &["vm", "migrate", "web", &dead])?;
    ensure!(refused.code != 0, "a VM was moved to a dead node");
    ensure!(refused.stderr.contains(&dead) && refused.stderr.contains("dead"), "{refused:?}");
    // It comes back clean: online again, without the VM.
    stage.lab.power_on(roles.owner)?;
    stage.wait_back(roles)?;
    stage.check_handover(roles.watcher, watch)
}

fn a_power_cut_of_the_leader(stage: &mut Failover) -> anyhow::Result<()> {
    let roles = stage.roles(true)?;
    let watch = stage.watch(roles)?;
    stage.lab.power_off(roles.owner)?;
    stage.wait_recovered(roles)?;
    stage.check_handover(roles.watcher, watch)?;
    stage.lab.power_on(roles.owner)?;
    stage.wait_back(roles)
}

fn no_quorum(stage: &mut Failover) -> anyhow::Result<()> {
    if stage.lab.owner(1, &stage.web.name)? != 1 {
        stage.lab.migrate(1, &stage.web.name, 1)?;
    }
    let Failover { lab, web, .. } = stage;
    let plain = Guest { ha: false, ..Guest::new("plain", 101) };
    lab.create_guest(1, &plain, Some(1))?;
    let before = lab.await_guest(1, &plain, BOOT)?;
    let web_before = lab.vm(1, &web.name)?;

    // The harder case: with its power, the leader is gone whom node 1 asks.
    lab.ctl(1, &["cluster", "transfer-leader", "node2"])?;
    wait_until(BOOT, "node2 leads", || Ok(lab.leader(1)? == 2))?;
    lab.power_off(2)?;
    to_a_node_that_has_just_died(lab, &plain, &before)?;
    lab.power_off(3)?;
    minority_refuses(lab)?;
    let during = lab.await_guest(1, &plain, BOOT)?;
    ensure!(during.boot_id == before.boot_id, "the VM did not run on");
    // The HA VM may be started by others, for all that this node knows: it must not run here.
    wait_until(BOOT, "the HA VM has ended, the other runs", || Ok(lab.vm_pids(1)?.len() == 1))?;

    for number in [2, 3] {
        lab.power_on(number)?;
    }
    for number in [2, 3] {
        lab.wait_up(number, BOOT)?;
    }
    lab.wait_healthy(1)?;
    lab.ctl(1, &["network", "create", "late0", "--bridge", "late0"])?;
    let after = lab.await_guest(1, &plain, BOOT)?;
    ensure!(after.boot_id == before.boot_id, "the VM did not run on");
    lab.stop_and_check(1, &plain)?;
    lab.ctl(1, &["vm", "delete", &plain.name])?;
    lab.wait_vm(1, &web.name, BOOT, "the HA VM runs again", |vm| {
        vm.phase == "started" && vm.generation > web_before.generation
    })?;
    let again = lab.await_guest(1, web, BOOT)?;
    ensure!(again.boot_id != stage.status.boot_id, "the HA VM was not ended");
    stage.status = again;
    stage.lab.pause_and_check(1, &stage.web).map(drop)
}

/// Node 2 has lost its power a moment ago; nobody can know that yet.
fn to_a_node_that_has_just_died(lab: &Lab, plain: &Guest, before: &Status) -> anyhow::Result<()> {
    let started = Instant::now();
    let output = lab.ctl_output(1, &["vm", "migrate", &plain.name, "node2"])?;
    println!("after {:?}, {}: {}", started.elapsed(), output.code, output.stderr.trim());
    ensure!(output.code != 0, "a VM was moved to a node without power");
    // By what the other nodes see, or by the attempt to reach it.
    let said = output.stderr.contains("node2") && output.stderr.contains("does not answer");
    ensure!(said, "that is not why: {}", output.stderr);
    ensure!(lab.owner(1, &plain.name)? == 1, "the VM has another owner");
    lab.wait_vm(1, &plain.name, BOOT, "it is started, not migrating", |vm| vm.phase == "started")?;
    let after = lab.await_guest(1, plain, BOOT)?;
    ensure!(after.boot_id == before.boot_id, "the VM did not run on");
    Ok(())
}

/// A write that is under way as the majority goes may have reached it: its outcome is unknown, and
/// that is said in time. Once the leader has noticed, writes are refused before they begin.
fn minority_refuses(lab: &Lab) -> anyhow::Result<()> {
    let refused = |bridge: &str, words: &[&str]| -> anyhow::Result<i32> {
        let started = Instant::now();
        let output = lab.ctl_output(1, &["network", "create", bridge, "--bridge", bridge])?;
        let took = started.elapsed();
        println!("answered after {took:?} with {}: {}", output.code, output.stderr);
        ensure!(output.code != 0, "a minority accepted a change");
        ensure!(took < Duration::from_secs(5), "it took {took:?}");
        let said = &output.stderr;
        ensure!(words.iter().any(|word| said.contains(word)), "it does not say why: {said}");
        Ok(output.code)
    };
    refused("early0", &["majority", "quorum", "outcome is unknown"])?;
    wait_until(BOOT, "the node knows that there is no quorum", || {
        let status = lab.ctl_json::<ClusterStatus>(1, &["cluster", "status"]);
        Ok(status.is_ok_and(|status| !status.quorum))
    })?;
    let code = refused("late0", &["majority", "quorum"])?;
    ensure!(code == 5, "the exit code for no quorum is 5, not {code}");

    // So are the files: they can be read, and are a read-only file system to who writes.
    let file = "/etc/holdfast/cluster/vms/plain.toml";
    let save = format!("cat {file} >/tmp/plain.toml && dd if=/tmp/plain.toml of={file} conv=fsync");
    let started = Instant::now();
    let output = lab.run(1, &["sh", "-c", &save], b"", Duration::from_secs(20))?;
    println!("the file: after {:?}, {output:?}", started.elapsed());
    ensure!(output.code != 0, "a minority saved a file");
    ensure!(output.stderr.contains("Read-only file system"), "{output:?}");
    ensure!(started.elapsed() < Duration::from_secs(5), "it took too long");
    Ok(())
}
