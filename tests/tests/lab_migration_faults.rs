//! Things break while a guest moves: afterwards exactly one copy runs, its disk is in order, and
//! the cluster says what happened.

use std::time::Duration;

use anyhow::ensure;
use tests::guest::client::Status;
use tests::lab::Lab;
use tests::lab::cluster::Guest;

const BOOT: Duration = Duration::from_secs(120);
/// Slow enough that a fault hits a round of precopy: 256 MiB take a quarter of a minute.
const SLOW: [&str; 2] = ["--bandwidth-limit-mib-s", "8"];

/// What breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    SourceLosesPower,
    TargetLosesPower,
    LeaderLosesPower,
    SourceAndTargetCutApart,
}

/// When it breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    Precopy,
    /// The source has paused the VM and sends the rest.
    StopAndCopy,
    /// The target has everything; the commit is under way.
    Commit,
}

#[test]
fn faults_in_precopy_leave_one_copy() -> anyhow::Result<()> {
    let mut lab = Lab::cluster(3)?;
    for fault in [
        Fault::TargetLosesPower,
        Fault::SourceAndTargetCutApart,
        Fault::SourceLosesPower,
        Fault::LeaderLosesPower,
    ] {
        break_migration(&mut lab, fault, Moment::Precopy)?;
    }
    lab.down()
}

#[test]
fn faults_around_the_commit_leave_one_copy() -> anyhow::Result<()> {
    let mut lab = Lab::cluster(3)?;
    for (fault, moment) in [
        (Fault::SourceLosesPower, Moment::StopAndCopy),
        (Fault::SourceLosesPower, Moment::Commit),
        (Fault::TargetLosesPower, Moment::Commit),
        (Fault::SourceAndTargetCutApart, Moment::Commit),
        (Fault::LeaderLosesPower, Moment::Commit),
    ] {
        break_migration(&mut lab, fault, moment)?;
    }
    lab.down()
}

/// One guest, one migration, one fault; the lab is whole again afterwards.
fn break_migration(lab: &mut Lab, fault: Fault, moment: Moment) -> anyhow::Result<()> {
    println!("--- {fault:?}, {moment:?}");
    // The leader is source, target or neither, as the fault needs it.
    let leader = lab.leader(1)?;
    let others: Vec<u32> = lab.numbers().into_iter().filter(|number| *number != leader).collect();
    let [other, another] = others[..] else { anyhow::bail!("three nodes are needed") };
    let (source, target, watcher) = match fault {
        Fault::LeaderLosesPower => (other, another, other),
        Fault::SourceLosesPower | Fault::TargetLosesPower | Fault::SourceAndTargetCutApart => {
            (other, another, leader)
        }
    };
    let web = Guest::new("web", 100);
    lab.create_guest(watcher, &web, Some(source))?;
    let before = lab.await_guest(watcher, &web, BOOT)?;

    let victim = match fault {
        Fault::SourceLosesPower => Some(source),
        Fault::TargetLosesPower => Some(target),
        Fault::LeaderLosesPower => Some(leader),
        Fault::SourceAndTargetCutApart => None,
    };
    let target_name = format!("node{target}");
    let mut arguments = vec!["vm", "migrate", "web", &target_name];
    if moment == Moment::Precopy {
        arguments.extend(SLOW);
    }
    let arguments = arguments;
    let since = lab.log_length(source)?;
    let outcome = std::thread::scope(|scope| -> anyhow::Result<_> {
        let watched = &*lab;
        let migration = scope.spawn(move || watched.ctl_output(watcher, &arguments));
        match moment {
            Moment::Precopy => lab.wait_precopy(watcher, "web")?,
            Moment::StopAndCopy => lab.wait_log(source, since, "stop-and-copy, round")?,
            Moment::Commit => lab.wait_log(source, since, "committing")?,
        }
        match victim {
            Some(node) => lab.cut_power(node)?,
            None => lab.partition(source, target)?,
        }
        migration.join().map_err(|_| anyhow::anyhow!("the migration's watcher broke"))
    })?;
    println!("clusterctl said: {outcome:?}");
    if moment == Moment::Precopy && fault != Fault::LeaderLosesPower {
        let output = outcome?;
        ensure!(output.code != 0, "the migration cannot have succeeded");
        ensure!(output.stderr.len() > 20, "no reason was given: {}", output.stderr);
    }

    if let Some(node) = victim {
        lab.power_off(node)?; // for the books: it has none already
    }
    let after = lab.wait_single_copy(watcher, &web)?;
    check_continuity(fault, moment, &before, &after)?;
    if let Some(node) = victim {
        lab.power_on(node)?;
        lab.wait_up(node, BOOT)?;
    }
    lab.heal()?;
    lab.wait_healthy(watcher)?;
    lab.wait_single_copy(watcher, &web)?;
    let vm = lab.vm(watcher, "web")?;
    println!("events: {:#?}", vm.events);
    ensure!(!vm.events.is_empty(), "`vm show` does not say what happened");
    lab.stop_and_check(watcher, &web)?;
    lab.ctl(watcher, &["vm", "delete", "web"])?;
    std::fs::remove_file(lab.shared().join("pool/web.raw")).or_else(|error| {
        if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
    })?;
    Ok(())
}

/// Only the loss of the node that ran it may restart the guest.
fn check_continuity(
    fault: Fault,
    moment: Moment,
    before: &Status,
    after: &Status,
) -> anyhow::Result<()> {
    let may_restart = match (fault, moment) {
        (Fault::SourceLosesPower, _) => true,
        // It may have been the owner by then.
        (Fault::TargetLosesPower, Moment::StopAndCopy | Moment::Commit) => true,
        _ => false,
    };
    ensure!(may_restart || before.boot_id == after.boot_id, "{fault:?} restarted the guest");
    ensure!(after.memory_errors == 0 && after.disk_error.is_empty(), "{after:?}");
    Ok(())
}
