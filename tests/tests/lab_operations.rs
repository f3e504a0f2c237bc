//! An operator's days: a cluster is formed and joined, mistakes are refused with a reason and a
//! remedy and leave everything as it was, a node is drained and comes back, a disk runs full. One lab
//! for all of it.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, ensure};
use proto::v1::{
    ClusterStatus, CreateTokenResponse, HaStatus, ListCertificatesResponse,
    RenewCertificatesResponse, Verification,
};
use tests::lab::guest::Guest;
use tests::lab::knock::Caller;
use tests::lab::scenario::{Stage, play};
use tests::lab::{Lab, Options, wait_until};

const BOOT: Duration = Duration::from_secs(120);
const SHORT: Duration = Duration::from_secs(20);

#[test]
fn an_operator_makes_mistakes_and_nothing_breaks() -> anyhow::Result<()> {
    let lab = Lab::up(&Options::patient(3), &mut |text| println!("{text}"))?;
    for number in lab.numbers() {
        lab.wait_agent(number)?;
    }
    let mut forming = Forming { lab };
    play(
        &mut forming,
        &[
            ("strangers get nothing from a node's API", strangers_get_nothing),
            ("joining takes a fresh token and a right clock", joining),
        ],
    )?;
    let lab = forming.lab;
    lab.prepare_guests()?;
    let web = Guest::new("web", 100);
    lab.create_guest(1, &web, Some(1))?;
    lab.await_guest(1, &web, BOOT)?;
    let mut stage = Operations { lab, web };
    play(
        &mut stage,
        &[
            ("documents that make no sense are refused", bad_documents),
            ("the configuration is edited as files", the_mounted_tree),
            ("copies are compared, and a backup holds all", copies_and_a_backup),
            ("certificates change while VMs move, and are revoked", certificates),
            ("migrations that cannot be are refused", impossible_migrations),
            ("files that are not what they should be are refused, or fail a start", bad_files),
            ("a member cannot join or form once more", joining_again),
            ("garbage on the listening ports changes nothing", garbage_on_ports),
            ("a second agent on the same data folder does not run", a_second_agent),
            ("a drained node gives its VMs away live and takes none", a_drained_node),
            ("a full disk takes one node out and loses nothing", a_full_disk),
        ],
    )?;
    stage.lab.stop_and_check(1, &stage.web)?;
    stage.lab.down()
}

/// Runs `clusterctl`, which must refuse with a message that has all these words.
fn refused(lab: &Lab, node: u32, arguments: &[&str], words: &[&str]) -> anyhow::Result<()> {
    let output = lab.ctl_output(node, arguments)?;
    let said = output.stderr.to_lowercase();
    println!("clusterctl {} -> {}: {}", arguments.join(" "), output.code, output.stderr.trim());
    ensure!(output.code != 0, "clusterctl {} was not refused", arguments.join(" "));
    for word in words {
        ensure!(said.contains(word), "the message does not name `{word}`: {}", output.stderr);
    }
    Ok(())
}

/// Nodes with agents, and a cluster of the first two at most.
struct Forming {
    lab: Lab,
}

impl Stage for Forming {
    fn check_whole(&mut self) -> anyhow::Result<()> {
        self.lab.numbers().into_iter().try_for_each(|number| self.lab.wait_agent(number))
    }
}

/// Node 3 forms a cluster of its own, whose certificates are worth nothing at node 1; then it
/// forgets that.
fn strangers_get_nothing(stage: &mut Forming) -> anyhow::Result<()> {
    let Forming { lab } = stage;
    lab.ctl(1, &["cluster", "init", "--name", "lab"])?;
    lab.ctl(3, &["cluster", "init", "--name", "foreign"])?;
    lab.ctl(3, &["context", "create-admin", "foreign"])?;
    lab.ctl(1, &["context", "create-admin", "own"])?;
    let folder = |name: &str| format!("/root/.config/holdfast/{name}");
    let (certificate, key) = (folder("foreign/cert.pem"), folder("foreign/key.pem"));
    let files = Some((certificate.as_str(), key.as_str()));

    // The certificate is good where it belongs, so that this proves something.
    let at_home = lab.knock(3, "10.77.0.3:7400", &[Caller::Certificate], files)?;
    ensure!(at_home[0].answered > 0, "its own cluster does not answer: {at_home:?}");
    let callers = [
        Caller::Certificate,
        Caller::NoCertificate,
        Caller::StrangeCertificate,
        Caller::Garbage,
        Caller::HalfHello,
    ];
    let knocks = lab.knock(3, "10.77.0.1:7400", &callers, files)?;
    println!("at node1's API: {knocks:?}");
    for knock in knocks {
        // A TLS server says in an alert why it hangs up; that is no more than it owes a stranger.
        let alert_only = !matches!(
            knock.caller,
            Caller::Certificate | Caller::NoCertificate | Caller::StrangeCertificate
        ) && knock.answered <= 7;
        ensure!(knock.answered == 0 || alert_only, "a stranger was answered: {knock:?}");
        ensure!(knock.end != "left waiting", "a stranger was not turned away: {knock:?}");
    }

    // As a person would try it: everything right but who it is.
    let ca = lab.exec(1, &["cat", &folder("own/ca.pem")])?;
    lab.run(3, &["sh", "-c", "cat >/tmp/ca.pem"], ca.as_bytes(), SHORT)?.ok()?;
    let add = ["context", "add", "thief", "--address", "10.77.0.1:7400", "--ca", "/tmp/ca.pem"];
    let files = ["--certificate", certificate.as_str(), "--key", key.as_str()];
    lab.ctl(3, &[&add[..], &files].concat())?;
    refused(lab, 3, &["--context", "thief", "vm", "list"], &["certificate"])?;

    // Its data folder is emptied behind its agent's back, and it boots anew: a node like any.
    lab.hang_agent(3)?;
    lab.sh(3, "rm -rf /var/lib/holdfast/* && sync")?;
    lab.power_off(3)?;
    lab.power_on(3)?;
    lab.wait_up(3, BOOT)?;
    lab.wait_agent(3)?;
    // 4: it belongs to no cluster.
    let status = lab.ctl_output(3, &["cluster", "status"])?;
    ensure!(status.code == 4, "node3 remembers: {status:?}");
    Ok(())
}

fn joining(stage: &mut Forming) -> anyhow::Result<()> {
    let Forming { lab } = stage;
    let token = |arguments: &[&str]| {
        let create = [&["cluster", "token", "create"], arguments].concat();
        lab.ctl_json::<CreateTokenResponse>(1, &create).map(|answer| answer.token)
    };
    let expired = token(&["--ttl", "1s"])?;
    let created = std::time::Instant::now();
    let used = token(&[])?;
    lab.ctl(2, &["cluster", "join", &used])?;

    refused(lab, 3, &["cluster", "join", &used], &["token"])?;
    refused(lab, 3, &["cluster", "join", "nonsense"], &["token"])?;
    let mut forged = token(&[])?;
    let last = forged.pop().unwrap_or('a');
    forged.push(if last == 'a' { 'b' } else { 'a' });
    refused(lab, 3, &["cluster", "join", &forged], &["token"])?;
    wait_until(SHORT, "a second and a bit", || Ok(created.elapsed().as_secs() >= 3))?;
    refused(lab, 3, &["cluster", "join", &expired], &["token", "expired"])?;

    let fresh = token(&[])?;
    lab.sh(3, "date -s @$(($(date +%s) + 3600))")?;
    refused(lab, 3, &["cluster", "join", &fresh], &["clock"])?;
    lab.sh(3, "date -s @$(($(date +%s) - 3600))")?;
    refused(lab, 3, &["cluster", "join", &token(&[])?, "--node-name", "node1"], &["node1"])?;

    lab.ctl(3, &["cluster", "join", &token(&[])?])?;
    lab.wait_healthy(3)
}

/// A cluster of three, and a guest that runs on node 1 unless a scenario says otherwise.
struct Operations {
    lab: Lab,
    web: Guest,
}

impl Stage for Operations {
    fn check_whole(&mut self) -> anyhow::Result<()> {
        let Self { lab, web } = self;
        lab.wait_healthy(1)?;
        lab.wait_single_copy(1, web)?;
        lab.pause_and_check(1, web).map(drop)
    }
}

fn refused_document(lab: &Lab, document: &str, words: &[&str]) -> anyhow::Result<()> {
    let write = ["sh", "-c", "cat >/tmp/bad.toml"];
    lab.run(1, &write, document.as_bytes(), SHORT)?.ok()?;
    refused(lab, 1, &["vm", "create", "-f", "/tmp/bad.toml"], words)
}

fn bad_documents(stage: &mut Operations) -> anyhow::Result<()> {
    let Operations { lab, web } = stage;
    let good = Guest::new("other", 101).document();
    let state = || anyhow::Ok((lab.ctl(1, &["config", "ls"])?, lab.sh(1, "ls /shared/pool")?));
    let before = state()?;
    refused_document(lab, &good.replace("cpus =", "cpuss ="), &["cpuss", "line 2"])?;
    refused_document(lab, &good.replace("cpus = 1", "cpus = 0"), &["line 2", "`cpus`", "1 to 8"])?;
    refused_document(lab, &good.replace("\"128MiB\"", "\"64GiB\""), &["memory"])?;
    refused_document(lab, &good.replace("shared/vmlinuz", "shared/missing"), &["missing"])?;
    refused_document(lab, &good.replace("shared/other.raw", "shared/web.raw"), &["web"])?;
    refused_document(lab, &web.document(), &["web"])?;
    refused_document(lab, &good.replace("\"lan\"", "\"nowhere\""), &["nowhere"])?;
    refused(lab, 1, &["vm", "show", "other"], &["other"])?;
    ensure!(state()? == before, "something was left: {before:?}, {:?}", state()?);
    Ok(())
}

fn copies_and_a_backup(stage: &mut Operations) -> anyhow::Result<()> {
    let lab = &stage.lab;
    let verified: Verification = lab.ctl_json(2, &["cluster", "verify"])?;
    let same = verified.members.iter().filter(|member| member.outcome == "same").count();
    ensure!(same == 3 && !verified.differs && !verified.faulty, "{verified:?}");

    let file = "/root/lab.hfb";
    lab.ctl(2, &["cluster", "backup", file])?;
    let made = lab.sh(2, &format!("stat -c %a {file}; grep -c 'vms/web.toml' {file}"))?;
    ensure!(made.lines().eq(["600", "1"]), "mode and documents of the backup: {made}");
    refused(lab, 2, &["cluster", "backup", file], &["already", "--force"])?;
    // It makes a cluster, but not out of a member.
    refused(lab, 2, &["cluster", "restore", file, "--yes"], &["already belongs"])?;
    // It holds the cluster's secrets: root on a node gets it, and no client from afar.
    refused(lab, 1, &["--context", "own", "cluster", "backup", "/root/far.hfb"], &["root"])?;
    ensure!(lab.sh(1, "ls /root/far.hfb").is_err(), "a backup from afar");
    lab.sh(2, &format!("rm {file}")).map(drop)
}

fn certificates(stage: &mut Operations) -> anyhow::Result<()> {
    let Operations { lab, web } = stage;
    let before = lab.await_guest(1, web, BOOT)?;
    let shown = |lab: &Lab| -> anyhow::Result<BTreeMap<u64, String>> {
        let list: ListCertificatesResponse = lab.ctl_json(3, &["cluster", "cert", "list"])?;
        let valid = list.certificates.into_iter();
        let valid = valid.filter(|one| one.kind == "node" && one.state == "valid");
        Ok(valid.map(|one| (one.node_id, one.serial)).collect())
    };
    let old = shown(lab)?;
    ensure!(old.len() == 3, "not every node has a certificate: {old:?}");
    let renewed: RenewCertificatesResponse = lab.ctl_json(1, &["cluster", "cert", "renew"])?;
    ensure!(renewed.renewed.len() == 3, "{renewed:?}");
    for one in &renewed.renewed {
        let serial = one.certificate.as_ref().map(|certificate| &certificate.serial);
        ensure!(one.error.is_empty() && serial != old.get(&one.node_id), "{one:?}");
    }
    wait_until(SHORT, "each node shows another certificate", || {
        let new = shown(lab)?;
        Ok(new.len() == 3 && new.iter().all(|(node, serial)| old.get(node) != Some(serial)))
    })?;
    // The agents were not restarted, their VMs neither; new connections are made with the new ones.
    let home = lab.owner(1, &web.name)?;
    for target in [if home == 2 { 3 } else { 2 }, home] {
        lab.migrate(1, &web.name, target)?;
    }
    let after = lab.await_guest(1, web, BOOT)?;
    ensure!(after.boot_id == before.boot_id, "the guest was restarted");

    lab.ctl(1, &["context", "create-admin", "ann", "--client-name", "ann"])?;
    let ann = ["--context", "ann", "vm", "list"];
    lab.ctl(1, &ann)?;
    lab.ctl(2, &["cluster", "cert", "revoke", "ann"])?;
    wait_until(SHORT, "no node takes it any more", || Ok(lab.ctl(1, &ann).is_err()))?;
    refused(lab, 1, &ann, &["revoked"])?;
    lab.ctl(1, &["--context", "own", "vm", "list"])?;
    // What a node works with is not taken from it.
    let node = shown(lab)?.remove(&2).context("node2 has no certificate")?;
    refused(lab, 1, &["cluster", "cert", "revoke", &node], &["node2", "renew"])
}

/// Edited on one node, seen on the others at once; refused with the reason beside the file. The VM
/// is at rest: one that runs keeps its document.
fn the_mounted_tree(stage: &mut Operations) -> anyhow::Result<()> {
    let Operations { lab, .. } = stage;
    let file = "/etc/holdfast/cluster/vms/paper.toml";
    let seen = |node: u32, line: &str| {
        wait_until(SHORT, "the other node's mount shows it", || {
            Ok(lab.sh(node, &format!("grep -qx '{line}' {file}")).is_ok())
        })
    };
    let document = Guest { disk: false, ..Guest::new("paper", 102) }.document();
    lab.run(1, &["sh", "-c", &format!("cat >{file}")], document.as_bytes(), SHORT)?.ok()?;
    lab.sh(1, &format!("sed -i 's/^cpus = .*/cpus = 2/' {file}"))?;
    seen(2, "cpus = 2")?;
    let shown = lab.ctl(3, &["config", "get", "vms/paper"])?;
    ensure!(shown.contains("cpus = 2"), "clusterctl does not show it: {shown}");
    lab.sh(2, &format!("text=$(sed 's/^cpus = .*/cpus = 3/' {file}); echo \"$text\" >{file}"))?;
    seen(1, "cpus = 3")?;
    let id = lab.vm(1, "paper")?.id;

    lab.sh(2, &format!("sed 's/^cpus = .*/cpus = 99/' {file} >/tmp/bad.toml"))?;
    let save = format!("dd if=/tmp/bad.toml of={file} conv=fsync");
    let refused = lab.run(2, &["sh", "-c", &save], b"", SHORT)?;
    ensure!(refused.code != 0, "a broken document was saved: {refused:?}");
    ensure!(refused.stderr.contains("Invalid argument"), "{refused:?}");
    let why = lab.exec(2, &["cat", &format!("{file}.error")])?;
    println!("{file}.error: {why}");
    ensure!(why.contains("cpus") && why.contains("1 to 8"), "no reason: {why}");
    seen(1, "cpus = 3")?;
    let backup = lab.run(1, &["mv", file, &format!("{file}~")], b"", SHORT)?;
    ensure!(backup.code != 0 && lab.vm(1, "paper")?.id == id, "a backup took the VM: {backup:?}");

    lab.sh(2, &format!("rm {file}"))?;
    wait_until(SHORT, "the VM is gone", || {
        Ok(lab.ctl_output(1, &["vm", "show", "paper"])?.code != 0)
    })
}

fn impossible_migrations(stage: &mut Operations) -> anyhow::Result<()> {
    let Operations { lab, web } = stage;
    let before = lab.vm(1, &web.name)?;
    let boot_id = lab.await_guest(1, web, BOOT)?.boot_id;
    refused(lab, 2, &["vm", "migrate", "web", "node1"], &["node1", "already there"])?;
    refused(lab, 2, &["vm", "migrate", "web", "node9"], &["node9"])?;
    lab.ctl(1, &["node", "drain", "node3"])?;
    refused(lab, 2, &["vm", "migrate", "web", "node3"], &["node3", "drain"])?;
    lab.ctl(1, &["node", "resume", "node3"])?;
    lab.wait_healthy(1)?;

    // Node 3 has no room beside a big VM.
    let big =
        Guest { memory_mib: 1150, ha: false, disk: false, host: None, ..Guest::new("big", 0) };
    lab.create_guest(1, &big, Some(3))?;
    refused(lab, 2, &["vm", "migrate", "web", "node3"], &["node3", "memory"])?;
    lab.ctl(1, &["vm", "stop", &big.name])?;
    lab.ctl(1, &["vm", "delete", &big.name])?;

    lab.ctl(1, &["vm", "pause", "web"])?;
    refused(lab, 2, &["vm", "migrate", "web", "node2"], &["web", "paused"])?;
    lab.ctl(1, &["vm", "resume", "web"])?;
    let after = lab.vm(1, &web.name)?;
    ensure!(after.generation == before.generation && after.node == before.node, "{after:?}");
    ensure!(after.phase == "started", "it is {}", after.phase);
    ensure!(lab.await_guest(1, web, BOOT)?.boot_id == boot_id, "the guest was restarted");

    lab.ctl(1, &["vm", "stop", "web"])?;
    refused(lab, 2, &["vm", "migrate", "web", "node2"], &["web", "start it first"])?;
    lab.ctl(1, &["vm", "start", "web"]).map(drop)
}

fn bad_files(stage: &mut Operations) -> anyhow::Result<()> {
    let Operations { lab, .. } = stage;
    lab.sh(1, "head -c 3000000 /dev/urandom >/shared/import/rubbish")?;
    let import = ["image", "import", "/shared/import/rubbish", "--pool", "shared", "--kind"];
    refused(lab, 1, &[&import[..], &["kernel"]].concat(), &["not a kernel"])?;
    // One that was damaged behind the cluster's back.
    lab.sh(1, "head -c 100000 /shared/import/vmlinuz >/shared/pool/rubbish")?;
    let broken = Guest { ha: false, disk: false, ..Guest::new("broken", 102) };
    let document = broken.document().replace("shared/vmlinuz", "shared/rubbish");
    lab.run(1, &["sh", "-c", "cat >/tmp/broken.toml"], document.as_bytes(), SHORT)?.ok()?;
    lab.ctl(1, &["vm", "create", "-f", "/tmp/broken.toml"])?;
    refused(lab, 1, &["vm", "start", "broken"], &["kernel"])?;
    ensure!(lab.vm(1, "broken")?.phase != "started", "a VM without a kernel runs");
    lab.ctl(1, &["vm", "delete", "broken"])?;

    // A disk that was cut to an odd length behind the cluster's back.
    lab.ctl(1, &["vm", "stop", "web"])?;
    lab.sh(1, "cp /shared/pool/web.raw /shared/web.copy && truncate -s 1000 /shared/pool/web.raw")?;
    refused(lab, 1, &["vm", "start", "web"], &["web.raw"])?;
    lab.sh(1, "cat /shared/web.copy >/shared/pool/web.raw && rm /shared/web.copy")?;
    lab.ctl(1, &["vm", "start", "web"]).map(drop)
}

fn joining_again(stage: &mut Operations) -> anyhow::Result<()> {
    let Operations { lab, .. } = stage;
    let token: CreateTokenResponse = lab.ctl_json(1, &["cluster", "token", "create"])?;
    refused(lab, 2, &["cluster", "join", &token.token], &["already"])?;
    refused(lab, 1, &["cluster", "init", "--name", "again"], &["already"])
}

fn garbage_on_ports(stage: &mut Operations) -> anyhow::Result<()> {
    let Operations { lab, .. } = stage;
    for address in ["10.77.0.1:7400", "10.77.0.1:7401"] {
        let knocks = lab.knock(2, address, &[Caller::Garbage, Caller::HalfHello], None)?;
        println!("{address}: {knocks:?}");
        ensure!(knocks.iter().all(|knock| knock.end != "left waiting"), "{address}: {knocks:?}");
        let http = format!(
            "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | timeout 5 nc {}",
            address.replace(':', " ")
        );
        lab.sh(2, &format!("{http} || true"))?;
    }
    Ok(())
}

fn a_second_agent(stage: &mut Operations) -> anyhow::Result<()> {
    let Operations { lab, .. } = stage;
    let second = ["timeout", "20", "node-agent", "--config", "/etc/holdfast/node-agent.toml"];
    let output = lab.run(1, &second, b"", BOOT)?;
    ensure!(output.code != 0 && output.code != 143, "a second agent ran: {output:?}");
    ensure!(output.stderr.contains("another node-agent"), "it does not say why: {output:?}");
    Ok(())
}

fn a_drained_node(stage: &mut Operations) -> anyhow::Result<()> {
    let Operations { lab, web } = stage;
    let web = &*web;
    let db = Guest::new("db", 101);
    lab.create_guest(1, &db, Some(2))?;
    if lab.owner(1, &web.name)? != 2 {
        lab.migrate(1, &web.name, 2)?;
    }
    let before = [lab.await_guest(1, web, BOOT)?, lab.await_guest(1, &db, BOOT)?];

    lab.ctl(1, &["node", "drain", "node2"])?;
    for (guest, before) in [web, &db].into_iter().zip(&before) {
        ensure!(lab.owner(1, &guest.name)? != 2, "{} is still on node2", guest.name);
        let after = lab.await_guest(1, guest, BOOT)?;
        ensure!(after.boot_id == before.boot_id, "{} was restarted", guest.name);
        ensure!(after.memory_errors == 0, "{} lost memory", guest.name);
    }
    let ha: HaStatus = lab.ctl_json(1, &["ha", "status"])?;
    let node2 = ha.nodes.iter().find(|node| node.name == "node2").map(|node| node.state.as_str());
    ensure!(node2 == Some("maintenance"), "node2 is {node2:?}");
    let found = lab.vm_processes()?;
    ensure!(found.len() == 2 && !found.contains(&2), "VM processes are on {found:?}");

    // Nothing new comes to it, until it is taken back.
    let other = Guest { disk: false, ..Guest::new("other", 102) };
    lab.create_guest(1, &other, None)?;
    ensure!(lab.owner(1, "other")? != 2, "a drained node was given a VM");
    lab.ctl(1, &["node", "resume", "node2"])?;
    lab.wait_healthy(1)?;
    // What left it for the drain comes back by itself, as it went.
    wait_until(BOOT, "its VMs return to node2", || {
        Ok(lab.owner(1, &web.name)? == 2 && lab.owner(1, &db.name)? == 2)
    })?;
    for (guest, before) in [web, &db].into_iter().zip(&before) {
        let after = lab.await_guest(1, guest, BOOT)?;
        ensure!(after.boot_id == before.boot_id, "{} was restarted", guest.name);
    }
    lab.stop_and_check(1, &db)?;
    lab.ctl(1, &["vm", "stop", &other.name])?;
    for guest in [&db, &other] {
        lab.ctl(1, &["vm", "delete", &guest.name])?;
    }
    Ok(())
}

fn a_full_disk(stage: &mut Operations) -> anyhow::Result<()> {
    let Operations { lab, .. } = stage;
    lab.ctl(1, &["network", "create", "before", "--bridge", "before0"])?;
    let victim = lab.leader(1)?;
    let others = lab.numbers().into_iter().find(|number| *number != victim);
    let other = others.context("a cluster of one")?;
    // Nearly all of it is taken at once; dd takes the rest, and ends with an error: that is the point.
    let filled = lab.sh(
        victim,
        "cd /var/lib/holdfast && set -- $(df -k . | tail -1) && fallocate -l $4k filler; \
         dd if=/dev/zero of=filler2 bs=64k 2>&1; df -k .",
    )?;
    println!("filled: {filled}");

    // The others go on without it; what was written is there.
    wait_until(BOOT, "the cluster writes on without the full node", || {
        let name = "during";
        let _ = lab.ctl_output(other, &["network", "create", name, "--bridge", "during0"])?;
        let networks = lab.ctl_output(other, &["-o", "json", "network", "list"])?;
        Ok(networks.code == 0 && networks.stdout.contains(name))
    })?;
    let networks = lab.ctl(other, &["-o", "json", "network", "list"])?;
    ensure!(networks.contains("before0"), "an acknowledged write is gone: {networks}");

    // With room again all heals by itself.
    lab.sh(victim, "cd /var/lib/holdfast && rm filler filler2 && sync")?;
    lab.wait_healthy(other)?;
    wait_until(BOOT, "the node has caught up and knows both", || {
        let networks = lab.ctl_output(victim, &["-o", "json", "network", "list"])?;
        Ok(networks.code == 0
            && networks.stdout.contains("during0")
            && networks.stdout.contains("before0"))
    })?;
    let status: ClusterStatus = lab.ctl_json(victim, &["cluster", "status"])?;
    ensure!(status.quorum, "no quorum");
    Ok(())
}
