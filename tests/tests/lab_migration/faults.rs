//! Nodes, agents and links break while the guest moves.

use anyhow::{Context, ensure};
use tests::guest::client::Status;
use tests::lab::Lab;
use tests::lab::exec::{ExecError, Output};
use tests::lab::scenario::Scenario;

use super::{BOOT, Moves, Roles};

/// Slow enough that a fault hits a round of precopy: what the guest holds takes several seconds.
pub(super) const SLOW: [&str; 2] = ["--bandwidth-limit-mib-s", "8"];

/// What breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    SourceLosesPower,
    TargetLosesPower,
    LeaderLosesPower,
    SourceAndTargetCutApart,
    /// The agent's process is killed; its node and its VMs run on.
    SourceAgentKilled,
    TargetAgentKilled,
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

pub(super) const SCENARIOS: &[Scenario<Moves>] = &[
    ("the target loses power in precopy", |stage| {
        break_migration(stage, Fault::TargetLosesPower, Moment::Precopy)
    }),
    ("source and target are cut apart in precopy", |stage| {
        break_migration(stage, Fault::SourceAndTargetCutApart, Moment::Precopy)
    }),
    ("the source loses power in precopy", |stage| {
        break_migration(stage, Fault::SourceLosesPower, Moment::Precopy)
    }),
    ("the leader loses power in precopy", |stage| {
        break_migration(stage, Fault::LeaderLosesPower, Moment::Precopy)
    }),
    ("the source's agent is killed in precopy", |stage| {
        break_migration(stage, Fault::SourceAgentKilled, Moment::Precopy)
    }),
    ("the target's agent is killed in precopy", |stage| {
        break_migration(stage, Fault::TargetAgentKilled, Moment::Precopy)
    }),
    ("the source's agent is killed at the commit", |stage| {
        break_migration(stage, Fault::SourceAgentKilled, Moment::Commit)
    }),
    ("the target's agent is killed at the commit", |stage| {
        break_migration(stage, Fault::TargetAgentKilled, Moment::Commit)
    }),
    ("the source loses power in stop-and-copy", |stage| {
        break_migration(stage, Fault::SourceLosesPower, Moment::StopAndCopy)
    }),
    ("the source loses power at the commit", |stage| {
        break_migration(stage, Fault::SourceLosesPower, Moment::Commit)
    }),
    ("the target loses power at the commit", |stage| {
        break_migration(stage, Fault::TargetLosesPower, Moment::Commit)
    }),
    ("source and target are cut apart at the commit", |stage| {
        break_migration(stage, Fault::SourceAndTargetCutApart, Moment::Commit)
    }),
    ("the leader loses power at the commit", |stage| {
        break_migration(stage, Fault::LeaderLosesPower, Moment::Commit)
    }),
];

impl Fault {
    /// The node without power.
    fn dead_node(self, roles: Roles) -> Option<u32> {
        match self {
            Self::SourceLosesPower => Some(roles.source),
            Self::TargetLosesPower => Some(roles.target),
            Self::LeaderLosesPower => Some(roles.watcher),
            Self::SourceAndTargetCutApart | Self::SourceAgentKilled | Self::TargetAgentKilled => {
                None
            }
        }
    }

    /// Whom to ask meanwhile.
    fn asked(self, roles: Roles) -> u32 {
        if self == Self::LeaderLosesPower { roles.source } else { roles.watcher }
    }

    /// Only the loss of the node that ran it may restart the guest.
    fn may_restart_guest(self, moment: Moment) -> bool {
        match self {
            Self::SourceLosesPower => true,
            // It may have been the owner by then.
            Self::TargetLosesPower => moment != Moment::Precopy,
            Self::LeaderLosesPower
            | Self::SourceAndTargetCutApart
            | Self::SourceAgentKilled
            | Self::TargetAgentKilled => false,
        }
    }

    /// Before the commit, with an end of it gone, there is nothing to commit.
    fn must_fail(self, moment: Moment) -> bool {
        moment == Moment::Precopy
            && !matches!(self, Self::LeaderLosesPower | Self::TargetAgentKilled)
    }
}

/// One migration, one fault; the lab is whole again afterwards.
fn break_migration(stage: &mut Moves, fault: Fault, moment: Moment) -> anyhow::Result<()> {
    let roles = stage.roles()?;
    let asked = fault.asked(roles);
    println!("{fault:?}, {moment:?}, {roles:?}");
    let lab = &stage.lab;
    let before = lab.await_guest(asked, &stage.web, BOOT)?;
    let events_before = lab.vm(asked, "web")?.events;
    let said = meet(lab, roles, fault, moment)??;
    println!("clusterctl said: {said:?}");
    ensure!(!fault.must_fail(moment) || said.code != 0, "the migration cannot have succeeded");
    ensure!(said.code == 0 || said.stderr.len() > 20, "no reason was given: {}", said.stderr);

    if let Some(node) = fault.dead_node(roles) {
        stage.lab.power_off(node)?; // for the books: it has none already
    }
    let after = stage.lab.wait_single_copy(asked, &stage.web)?;
    check_continuity(fault, moment, &before, &after)?;
    let moved = stage.lab.owner(asked, "web")? == roles.target;
    // What it was told to be is so, unless a node that was lost later took it away.
    let lost = fault == Fault::TargetLosesPower;
    ensure!(said.code != 0 || moved || lost, "it was said to be moved, and is not: {said:?}");
    if let Some(node) = fault.dead_node(roles) {
        stage.lab.power_on(node)?;
        stage.lab.wait_up(node, BOOT)?;
    }
    stage.lab.heal()?;
    stage.lab.wait_healthy(asked)?;
    let events = stage.lab.vm(asked, "web")?.events;
    println!("the last events: {:#?}", events.iter().rev().take(3).collect::<Vec<_>>());
    let told = |text: &str| !events_before.iter().any(|event| event == text);
    ensure!(
        events.iter().any(|event| told(event) && !event.contains("asked by")),
        "`vm show` does not say what happened"
    );
    if matches!(fault, Fault::SourceAgentKilled | Fault::TargetAgentKilled) {
        check_adopted(stage, asked, &before)?;
    }
    Ok(())
}

/// Migrates, and breaks it at the moment; what `clusterctl` said in the end.
fn meet(
    lab: &Lab,
    roles: Roles,
    fault: Fault,
    moment: Moment,
) -> anyhow::Result<Result<Output, ExecError>> {
    let Roles { source, target, .. } = roles;
    let asked = fault.asked(roles);
    let agents = (lab.agent_pid(source)?, lab.agent_pid(target)?);
    let target_name = format!("node{target}");
    let mut arguments = vec!["vm", "migrate", "web", &target_name];
    if moment == Moment::Precopy {
        arguments.extend(SLOW);
    }
    let arguments = arguments;
    let since = lab.log_length(source)?;
    std::thread::scope(|scope| {
        let migration = scope.spawn(move || lab.ctl_output(asked, &arguments));
        match moment {
            Moment::Precopy => lab.wait_precopy(asked, "web")?,
            Moment::StopAndCopy => lab.wait_log(source, since, "stop-and-copy, round")?,
            Moment::Commit => lab.wait_log(source, since, "committing")?,
        }
        match fault {
            Fault::SourceLosesPower | Fault::TargetLosesPower | Fault::LeaderLosesPower => {
                lab.cut_power(fault.dead_node(roles).context("whose power?")?)?;
            }
            Fault::SourceAndTargetCutApart => lab.partition(source, target)?,
            Fault::SourceAgentKilled => {
                lab.exec(source, &["kill", "-KILL", &agents.0]).map(drop)?
            }
            Fault::TargetAgentKilled => {
                lab.exec(target, &["kill", "-KILL", &agents.1]).map(drop)?
            }
        }
        migration.join().map_err(|_| anyhow::anyhow!("the migration's watcher broke"))
    })
}

fn check_continuity(
    fault: Fault,
    moment: Moment,
    before: &Status,
    after: &Status,
) -> anyhow::Result<()> {
    let restarted = before.boot_id != after.boot_id;
    ensure!(!restarted || fault.may_restart_guest(moment), "{fault:?} restarted the guest");
    ensure!(after.memory_errors == 0 && after.disk_error.is_empty(), "{after:?}");
    Ok(())
}

/// The agents know their VMs again: the guest can be moved, from whichever has it to the other.
fn check_adopted(stage: &Moves, asked: u32, before: &Status) -> anyhow::Result<()> {
    let Moves { lab, web, .. } = stage;
    let owner = lab.owner(asked, &web.name)?;
    let elsewhere = lab.numbers().into_iter().find(|number| *number != owner && *number != asked);
    lab.migrate(asked, &web.name, elsewhere.context("three nodes are needed")?)?;
    let after = lab.await_guest(asked, web, BOOT)?;
    ensure!(after.boot_id == before.boot_id, "the guest was restarted");
    Ok(())
}
