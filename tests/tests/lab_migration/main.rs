//! A guest moves between nodes while it works and a client talks to it; strangers call at the port
//! it comes in by; things break on the way. Whatever happens, one copy runs, its disk is in order,
//! and it was not restarted unless its node was lost.

mod faults;
mod strangers;

use std::time::Duration;

use anyhow::{Context, ensure};
use tests::guest::client::Status;
use tests::lab::guest::Guest;
use tests::lab::scenario::{Scenario, Stage, play};
use tests::lab::{Lab, Options, wait_until};

const BOOT: Duration = Duration::from_secs(120);

#[test]
fn a_guest_moves_ten_times_and_strangers_get_nothing() -> anyhow::Result<()> {
    let lab = Lab::cluster(&Options::patient(3))?;
    // Much to send, for the moves that count; the others look at what goes wrong, with less.
    let big = Guest { memory_mib: 192, checked_mib: 64, ..Guest::new("big", 101) };
    let mut stage = stage(lab, big)?;
    play(
        &mut stage,
        &[
            ("a move that is cancelled leaves the guest where it is", a_cancelled_move),
            ("ten moves, there and back, lose nothing", ten_moves),
        ],
    )?;
    let Moves { lab, web: big, .. } = stage;
    lab.stop_and_check(1, &big)?;
    lab.ctl(1, &["vm", "delete", &big.name])?;
    play_and_end(lab, strangers::SCENARIOS)
}

#[test]
fn a_guest_moves_whatever_breaks_on_the_way() -> anyhow::Result<()> {
    play_and_end(Lab::cluster(&Options::patient(3))?, faults::SCENARIOS)
}

/// Plays with one guest, whose disk is in order in the end.
fn play_and_end(lab: Lab, scenarios: &[Scenario<Moves>]) -> anyhow::Result<()> {
    let mut stage = stage(lab, Guest::new("web", 100))?;
    play(&mut stage, scenarios)?;
    let records = stage.lab.stop_and_check(1, &stage.web)?;
    println!("{} records, all in order", records.len());
    stage.lab.down()
}

/// The guest is made, and serves from node 1.
fn stage(lab: Lab, web: Guest) -> anyhow::Result<Moves> {
    lab.create_guest(1, &web, Some(1))?;
    let status = lab.await_guest(1, &web, BOOT)?;
    Ok(Moves { lab, web, status })
}

/// The lab, and its guest as it was last seen.
struct Moves {
    lab: Lab,
    web: Guest,
    status: Status,
}

/// Who does what in a scenario.
#[derive(Debug, Clone, Copy)]
struct Roles {
    source: u32,
    target: u32,
    /// Neither of both, and the Raft leader; it is asked.
    watcher: u32,
}

impl Stage for Moves {
    /// All nodes are up and online, and one copy of the guest runs, with its disk in order.
    fn check_whole(&mut self) -> anyhow::Result<()> {
        for number in self.lab.numbers() {
            self.lab.wait_up(number, BOOT)?;
        }
        self.lab.heal()?;
        self.lab.wait_healthy(1)?;
        self.status = self.lab.wait_single_copy(1, &self.web)?;
        ensure!(self.status.memory_errors == 0, "the guest lost memory: {:?}", self.status);
        ensure!(self.status.disk_error.is_empty(), "the guest lost its disk: {:?}", self.status);
        self.lab.pause_and_check(1, &self.web).map(drop)
    }
}

impl Moves {
    /// The guest is on a node that does not lead; it is moved there if need be.
    fn roles(&self) -> anyhow::Result<Roles> {
        let Self { lab, web, .. } = self;
        let leader = lab.leader(1)?;
        let others: Vec<u32> =
            lab.numbers().into_iter().filter(|number| *number != leader).collect();
        let [one, another] = others[..] else { anyhow::bail!("three nodes are needed") };
        let mut source = lab.owner(leader, &web.name)?;
        if source == leader {
            lab.migrate(leader, &web.name, one)?;
            source = one;
        }
        let target = if source == one { another } else { one };
        Ok(Roles { source, target, watcher: leader })
    }
}

fn a_cancelled_move(stage: &mut Moves) -> anyhow::Result<()> {
    let Roles { source, target, watcher } = stage.roles()?;
    let Moves { lab, web, status: before } = stage;
    let (pids, target) = (lab.vm_pids(source)?, format!("node{target}"));
    let arguments = [&["vm", "migrate", &web.name, &target], &faults::SLOW[..]].concat();
    let output = std::thread::scope(|scope| {
        let migration = scope.spawn(|| lab.ctl_output(watcher, &arguments));
        lab.wait_precopy(watcher, &web.name)?;
        let task = lab.migration_task(watcher, &web.name)?.context("it is over already")?;
        lab.ctl(watcher, &["task", "cancel", &task.task_id])?;
        let output = migration.join().map_err(|_| anyhow::anyhow!("its watcher broke"))?;
        anyhow::Ok(output?)
    })?;
    println!("clusterctl said: {output:?}");
    ensure!(output.code != 0 && output.stderr.contains("cancel"), "{output:?}");
    let after = lab.wait_single_copy(watcher, web)?;
    ensure!(after.boot_id == before.boot_id, "the guest was restarted");
    ensure!(lab.owner(watcher, &web.name)? == source, "it has another owner");
    ensure!(lab.vm_pids(source)? == pids, "it is another process");
    Ok(())
}

fn ten_moves(stage: &mut Moves) -> anyhow::Result<()> {
    let Moves { lab, web, status: first } = stage;
    let home = lab.owner(3, &web.name)?;
    let away = lab.numbers().into_iter().find(|n| *n != home && *n != 3);
    let away = away.context("three nodes are needed")?;
    let talk = lab.talk(3, web)?;
    for round in 1..=5 {
        for target in [away, home] {
            let figures = lab.migrate(3, &web.name, target)?;
            println!("round {round}, to node{target}: {figures:?}");
            ensure!(lab.owner(3, &web.name)? == target, "it has another owner");
            ensure!(figures.bytes > 0 && figures.rounds >= 1, "{figures:?}");
        }
    }
    // All of it is looked at after the last move: by the second round that ends after it.
    let moved = lab.await_guest(3, web, BOOT)?;
    wait_until(3 * BOOT, "the guest has checked the memory that moved", || {
        Ok(lab.await_guest(3, web, BOOT)?.memory_rounds > moved.memory_rounds + 1)
    })?;
    let last = lab.wait_single_copy(3, web)?;
    println!("memory: {} rounds, {} errors", last.memory_rounds, last.memory_errors);
    ensure!(last.memory_errors == 0, "the guest lost memory: {last:?}");
    ensure!(last.boot_id == first.boot_id, "the guest was restarted");
    ensure!(last.last_record > first.last_record, "no record was written meanwhile");
    let report = talk.finish()?;
    println!("the client: {report:?}");
    ensure!(report.connections == 1 && report.wrong_answers == 0, "{report:?}");

    let records = lab.pause_and_check(3, web)?;
    let boots = records.last().map(|record| record.boots_before);
    ensure!(boots == Some(0), "more than one boot wrote");
    ensure!(u64::try_from(records.len())? >= last.last_record, "a record that was synced is gone");
    Ok(())
}
