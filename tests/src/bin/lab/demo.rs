//! The story that `deploy/lab demo` tells: a VM boots, moves live while a client talks to it, and
//! comes back after its node has lost power.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use proto::v1::HaStatus;
use serde::Serialize;
use tests::lab::guest::Guest;
use tests::lab::migration::Migration;
use tests::lab::state::{State, default_folder};
use tests::lab::{Lab, Options};

/// A guest in a node that is emulated, inside a machine that does other things too.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// The figures, as `--json` prints them.
#[derive(Debug, Serialize)]
struct Figures {
    /// From the command to the guest's first answer.
    boot_ms: u64,
    migration: Migration,
    failover: Failover,
}

/// All counted from the power cut.
#[derive(Debug, Serialize)]
struct Failover {
    /// Declared dead: the node's state is fenced.
    dead_ms: u64,
    /// The VM's process runs on another node.
    started_ms: u64,
    /// The guest answers again.
    serving_ms: u64,
}

/// Tells it.
pub(crate) fn demo(json: bool, memory_mib: u32, folder: Option<PathBuf>) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut say = super::progress(started);
    let mut options = Options { memory_mib, ..Options::temporary(3) };
    options.folder = folder.unwrap_or(options.folder);
    if State::find(&default_folder()).is_ok_and(|lab| lab.is_some_and(|lab| lab.is_alive())) {
        say("the lab that is up stays as it is; it shares this machine's CPUs: all takes longer");
    }
    super::end_at_signal(options.folder.clone())?;
    let mut lab = Lab::up(&options, &mut say)?;
    let told = tell(&mut lab, &mut say);
    if told.is_err() && !tests::lab::process::is_stopping() {
        say("it failed; the agents' last words:");
        for number in lab.numbers() {
            let log = std::fs::read_to_string(lab.folder().join(format!("{number}/agent.log")));
            let log = log.unwrap_or_default();
            let last: Vec<_> = log.lines().rev().take(15).collect();
            last.iter().rev().for_each(|line| eprintln!("  node{number}: {line}"));
        }
    }
    let figures = told?;
    lab.down()?;
    if json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        print_table(&figures);
    }
    Ok(())
}

fn tell(lab: &mut Lab, say: &mut dyn FnMut(&str)) -> anyhow::Result<Figures> {
    lab.form_cluster(say)?;
    say("three voters, all online; importing the guest");
    lab.prepare_guests()?;

    let web = Guest { memory_mib: 256, checked_mib: 64, ..Guest::new("web", 100) };
    say("creating the HA VM `web`: Debian's cloud kernel, 256 MiB, on shared storage");
    let created = Instant::now();
    lab.create_guest(1, &web, None)?;
    let first = lab.await_guest(1, &web, BOOT_LIMIT)?;
    let boot_ms = ms(created.elapsed());
    let source = lab.owner(1, "web")?;
    say(&format!("`web` serves, on node{source} ({boot_ms} ms)"));

    let others: Vec<u32> = lab.numbers().into_iter().filter(|number| *number != source).collect();
    let [target, watcher] = others[..] else { anyhow::bail!("the story needs three nodes") };
    let talk = lab.talk(watcher, &web)?;
    std::thread::sleep(Duration::from_secs(2)); // some talk before the move, for the report
    say(&format!("a client on node{watcher} talks to it; moving it live to node{target}"));
    let migration = migrate(lab, watcher, target, say)?;
    let after = lab.await_guest(watcher, &web, BOOT_LIMIT)?;
    let report = talk.finish()?;
    ensure!(after.boot_id == first.boot_id, "the guest was restarted, not moved");
    ensure!(
        report.connections == 1 && report.wrong_answers == 0,
        "the client was cut off: {report:?}"
    );
    ensure!(after.memory_errors == 0, "the guest lost memory: {after:?}");
    say(&format!(
        "moved in {} ms, {} ms of them standing still; {} answers to the client, the longest silence {} ms",
        migration.total_ms, migration.downtime_ms, report.answers, report.longest_silence_ms
    ));

    let before = lab.vm(watcher, "web")?;
    say(&format!("cutting node{target}'s power"));
    let cut = Instant::now();
    lab.power_off(target)?;
    let failover = watch_failover(lab, watcher, target, &web, before.generation, cut, say)?;

    let end = lab.vm(watcher, "web")?;
    lab.ctl(watcher, &["vm", "stop", "web"])?;
    let records = lab.records(&web)?;
    say(&format!(
        "`web` is on {} now (generation {}); its {} disk records are in order, none lost or doubled",
        end.node,
        end.generation,
        records.len()
    ));
    Ok(Figures { boot_ms, migration, failover })
}

/// Moves `web`, and says how far it is every other second.
fn migrate(
    lab: &Lab,
    watcher: u32,
    target: u32,
    say: &mut dyn FnMut(&str),
) -> anyhow::Result<Migration> {
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| lab.migrate(watcher, "web", target));
        while !moving.is_finished() {
            std::thread::sleep(Duration::from_secs(2)); // the interval of what is said
            if let Ok(Some(progress)) = lab.migration_progress(watcher, "web") {
                say(&format!("  {}", progress.text));
            }
        }
        moving.join().map_err(|_| anyhow::anyhow!("the migration's watcher broke"))?
    })
}

fn watch_failover(
    lab: &Lab,
    watcher: u32,
    dead: u32,
    guest: &Guest,
    generation: u64,
    cut: Instant,
    say: &mut dyn FnMut(&str),
) -> anyhow::Result<Failover> {
    let dead_name = format!("node{dead}");
    let since = |at: Instant| ms(at.duration_since(cut));
    std::thread::scope(|scope| {
        let serving =
            scope.spawn(|| lab.await_guest(watcher, guest, BOOT_LIMIT).map(|_| Instant::now()));
        let mut dead_at = None;
        tests::lab::wait_until(BOOT_LIMIT, "the node is declared dead", || {
            let Ok(status) = lab.ctl_json::<HaStatus>(watcher, &["ha", "status"]) else {
                return Ok(false); // a new leader is being elected
            };
            let fenced = |state: &str| matches!(state, "fencing" | "fenced");
            let found =
                status.nodes.iter().any(|node| node.name == dead_name && fenced(&node.state));
            dead_at = found.then(Instant::now);
            Ok(found)
        })?;
        let dead_ms = since(dead_at.context("the node was not declared dead")?);
        say(&format!("{dead_name} is declared dead ({dead_ms} ms)"));
        let (vm, started_at) =
            lab.wait_vm(watcher, &guest.name, BOOT_LIMIT, "it is started elsewhere", |vm| {
                vm.generation > generation && vm.phase == "started" && vm.node != dead_name
            })?;
        say(&format!("`{}` is started on {} ({} ms)", guest.name, vm.node, since(started_at)));
        let serving_at = serving.join().map_err(|_| anyhow::anyhow!("the watcher broke"))??;
        say(&format!("`{}` serves again ({} ms)", guest.name, since(serving_at)));
        Ok(Failover { dead_ms, started_ms: since(started_at), serving_ms: since(serving_at) })
    })
}

fn print_table(figures: &Figures) {
    let Figures { boot_ms, migration, failover } = figures;
    let line = |what: &str, ms: u64, meaning: &str| println!("{what:18}{ms:>8} ms  {meaning}");
    line("boot", *boot_ms, "from `vm create` to the guest's first answer");
    line("live migration", migration.total_ms, "from the command to its end");
    line("  downtime", migration.downtime_ms, "of these the guest stood still");
    let (mib, rounds) = (migration.bytes >> 20, migration.rounds);
    println!("{:18}{mib:>7} MiB  sent, in {rounds} rounds", "  moved");
    println!("power cut, after which");
    line("  declared dead", failover.dead_ms, "the node's lease (10 s) had run out");
    line("  process started", failover.started_ms, "the VM was started on another node");
    line("  serving", failover.serving_ms, "its guest answered again");
    println!(
        "\nAll on this one machine: emulated nodes (see the first line) take many times as long \
         as hardware.\nNext: `deploy/lab up` starts three nodes to play with; `deploy/lab --help` \
         shows what to do with them."
    );
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
