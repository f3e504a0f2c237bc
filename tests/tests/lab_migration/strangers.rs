//! Strangers call at the port where a node waits for an incoming VM, before its source does, and
//! while it sends. The migration goes on, or fails cleanly; the VM runs either way.

use std::time::Duration;

use anyhow::{Context, ensure};
use tests::lab::exec::{ExecError, Output};
use tests::lab::knock::{Caller, Knock};
use tests::lab::scenario::Scenario;
use tests::lab::{Lab, wait_until};

use super::{BOOT, Moves, Roles};

pub(super) const SCENARIOS: &[Scenario<Moves>] = &[
    ("strangers call before the source does", |stage| {
        let callers =
            [Caller::Garbage, Caller::HalfHello, Caller::NoCertificate, Caller::StrangeCertificate];
        let (knocks, outcome) = called_on(stage, &callers)?;
        ensure!(knocks.len() == callers.len(), "{knocks:?}");
        let outcome = outcome?.ok();
        ensure!(outcome.is_ok(), "the migration did not go on: {outcome:?}");
        Ok(())
    }),
    ("silent callers hold connections before the source calls", |stage| {
        let (knocks, outcome) = called_on(stage, &[Caller::Silence; 3])?;
        ensure!(knocks.iter().all(|knock| knock.end != "left waiting"), "{knocks:?}");
        let output = outcome?;
        ensure!(output.code == 0 || output.stderr.len() > 20, "no reason was given: {output:?}");
        Ok(())
    }),
    ("strangers call while memory is sent", strangers_while_memory_is_sent),
];

/// So long frames between source and target are held back: the source's first word comes that much
/// later than the target begins to wait for it.
const HOLD_MS: u64 = 1_500;

/// Migrates, with callers at the target's port before the source reaches it. What they got, and
/// what `clusterctl` said.
fn called_on(
    stage: &Moves,
    callers: &[Caller],
) -> anyhow::Result<(Vec<Knock>, Result<Output, ExecError>)> {
    let roles = stage.roles()?;
    let Moves { lab, .. } = stage;
    let Roles { source, target, watcher } = roles;
    let known = listeners(lab, target)?;
    lab.network(|rules| rules.delay_pair(source, target, HOLD_MS))?;
    let (knocks, outcome) = std::thread::scope(|scope| -> anyhow::Result<_> {
        let migration = scope.spawn(move || {
            lab.ctl_output(watcher, &["vm", "migrate", "web", &format!("node{target}")])
        });
        let address = wait_listener(lab, target, &known)?;
        let knocks = lab.knock(target, &address, callers, None);
        lab.heal()?;
        let outcome = migration.join();
        Ok((knocks?, outcome.map_err(|_| anyhow::anyhow!("the migration's watcher broke"))?))
    })?;
    println!("the callers got {knocks:?}; clusterctl said: {outcome:?}");
    check(stage, roles, &knocks, outcome.as_ref().is_ok_and(|output| output.code == 0))?;
    Ok((knocks, outcome))
}

/// Nobody was told anything, the guest runs on, and where it should.
fn check(stage: &Moves, roles: Roles, knocks: &[Knock], moved: bool) -> anyhow::Result<()> {
    let Moves { lab, web, status: before } = stage;
    for knock in knocks {
        // A TLS server says in an alert why it hangs up; that is no more than it owes a stranger.
        let alert_only = knock.caller == Caller::Garbage && knock.answered <= 7;
        ensure!(knock.answered == 0 || alert_only, "a stranger was answered: {knock:?}");
    }
    let expected = if moved { roles.target } else { roles.source };
    let owner = lab.owner(roles.watcher, &web.name)?;
    ensure!(owner == expected, "moved: {moved}, but it is on node{owner} ({roles:?})");
    let after = lab.wait_single_copy(roles.watcher, web)?;
    ensure!(after.boot_id == before.boot_id, "the guest was restarted");
    Ok(())
}

fn strangers_while_memory_is_sent(stage: &mut Moves) -> anyhow::Result<()> {
    let roles = stage.roles()?;
    let Moves { lab, web, .. } = &*stage;
    let Roles { target, watcher, .. } = roles;
    let known = listeners(lab, target)?;
    let target_name = format!("node{target}");
    let arguments = ["vm", "migrate", &web.name, &target_name, "--bandwidth-limit-mib-s", "6"];
    let (knocks, outcome) = std::thread::scope(|scope| -> anyhow::Result<_> {
        let migration = scope.spawn(|| lab.ctl_output(watcher, &arguments));
        let address = wait_listener(lab, target, &known)?;
        lab.wait_precopy(watcher, &web.name)?;
        let callers = [Caller::Garbage, Caller::HalfHello, Caller::StrangeCertificate];
        // Nobody attends to the port any more; it may be gone already if the migration was quick.
        let knocks = lab.knock(watcher, &address, &callers, None);
        let outcome = migration.join();
        Ok((knocks, outcome.map_err(|_| anyhow::anyhow!("the migration's watcher broke"))?))
    })?;
    println!("the callers got {knocks:?}");
    outcome?.ok().context("the migration did not go on")?;
    check(stage, roles, &knocks.unwrap_or_default(), true)
}

/// The ports that a node's kernel listens on (`/proc/net/tcp`: address, port, state 0A), as
/// `10.77.0.N:PORT`.
fn listeners(lab: &Lab, node: u32) -> anyhow::Result<Vec<String>> {
    let table = lab.exec(node, &["cat", "/proc/net/tcp"])?;
    let port = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, state) = (fields.next()?, fields.nth(1)?);
        let (_, port) = local.split_once(':').filter(|_| state == "0A")?;
        u16::from_str_radix(port, 16).ok()
    };
    let address = tests::lab::qemu::address(node);
    Ok(table.lines().filter_map(port).map(|port| format!("{address}:{port}")).collect())
}

/// Waits until a node listens on a port that it did not listen on before.
fn wait_listener(lab: &Lab, node: u32, known: &[String]) -> anyhow::Result<String> {
    let mut found = None;
    wait_until(Duration::from_secs(60).min(BOOT), "the target listens for its VM", || {
        found = listeners(lab, node)?.into_iter().find(|address| !known.contains(address));
        Ok(found.is_some())
    })?;
    found.context("no port was found")
}
