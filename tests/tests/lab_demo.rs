//! `deploy/lab demo` as a person runs it, by its program: the story to its end, and a Ctrl-C in it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use tests::lab::assets::program;
use tests::lab::migration::Migration;
use tests::lab::state::{State, cache};

/// What is promised for the whole story, on two cores of its own.
const PROMISED: Duration = Duration::from_secs(300);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Figures {
    boot_ms: u64,
    migration: Migration,
    failover: Failover,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Failover {
    dead_ms: u64,
    started_ms: u64,
    serving_ms: u64,
}

#[test]
fn the_demo_tells_its_story_and_leaves_nothing_behind() -> anyhow::Result<()> {
    interrupted_while_nodes_boot()?;
    let started = Instant::now();
    let output = demo()?.wait_with_output()?;
    let took = started.elapsed();
    let (figures, progress) =
        (String::from_utf8(output.stdout)?, String::from_utf8_lossy(&output.stderr).into_owned());
    println!("{progress}{figures}\nafter {took:?}");
    ensure!(output.status.success(), "it failed: {}", output.status);
    ensure!(took < PROMISED, "it took {took:?}");
    let Figures { boot_ms, migration, failover } = serde_json::from_str(&figures)?;
    let Migration { total_ms, downtime_ms, bytes, rounds } = migration;
    ensure!(boot_ms > 0 && downtime_ms > 0 && downtime_ms <= total_ms, "{figures}");
    // More than the 64 MiB that the guest keeps busy; a round of precopy and the last one.
    ensure!(bytes > 64 << 20 && rounds >= 2, "{figures}");
    // No sooner than the lease allows, counted from a heartbeat that may have come 0.1 L before.
    let Failover { dead_ms, started_ms, serving_ms } = failover;
    ensure!(dead_ms >= tests::lab::LEASE_MS / 10 * 9, "{figures}");
    ensure!(dead_ms <= started_ms && started_ms < serving_ms, "{figures}");
    Ok(())
}

/// Three nodes boot, and somebody presses Ctrl-C.
fn interrupted_while_nodes_boot() -> anyhow::Result<()> {
    let mut demo = demo()?;
    let folder = folder_of(&demo);
    let progress = demo.stderr.take().context("it says nothing")?;
    let mut lines = BufReader::new(progress).lines();
    let powered = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("powered on")));
    powered.context("it ended before its nodes were powered on")??;
    let processes: Vec<_> = State::load(&folder)?.processes().collect();
    ensure!(processes.len() >= 3, "nothing runs: {processes:?}");
    kill(Pid::from_raw(i32::try_from(demo.id())?), Signal::SIGINT)?;
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    let status: ExitStatus = demo.wait()?;
    println!("after Ctrl-C: {status}, {rest:?}");
    ensure!(status.code() == Some(130), "it ended with {status}");
    ensure!(!folder.exists(), "{} is left", folder.display());
    ensure!(!processes.iter().any(|process| process.is_alive()), "processes are left");
    Ok(())
}

fn demo() -> anyhow::Result<Child> {
    let mut command = Command::new(program("lab")?);
    command.args(["demo", "--json"]).stdin(Stdio::null());
    Ok(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

/// A story's lab is named after its process.
fn folder_of(demo: &Child) -> PathBuf {
    let labs: &Path = &cache().join("labs");
    labs.join(demo.id().to_string())
}
