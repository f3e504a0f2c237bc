//! What a guest that breaks out of its VMM would find, as the node's `/proc` and cgroups show it.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, ensure};
use tests::lab::Lab;
use tests::lab::guest::Guest;

use super::BOOT;

/// Where the agent's users for VMs begin.
const UID_BASE: u32 = 900_000;

/// Two VMs beside each other: neither has anything of the other's, or of the node's.
pub(super) fn check(lab: &Lab) -> anyhow::Result<()> {
    let guest = |name: &str, host| Guest {
        memory_mib: 128,
        checked_mib: 8,
        ha: false,
        ..Guest::new(name, host)
    };
    let (one, two) = (guest("one", 130), guest("two", 131));
    let mut pids = Vec::new();
    for guest in [&one, &two] {
        lab.create_guest(1, guest, None)?;
        let new = lab.vm_pids(1)?.into_iter().find(|pid| !pids.contains(pid));
        pids.push(new.context("it has no process")?);
    }
    for guest in [&one, &two] {
        lab.await_guest(1, guest, BOOT)?;
    }
    let uids = [check_process(lab, &pids[0], &one)?, check_process(lab, &pids[1], &two)?];
    ensure!(uids[0] != uids[1], "both VMs run as user {}", uids[0]);
    check_disks(lab, &pids[0], &one, &two)?;
    check_disks(lab, &pids[1], &two, &one)?;
    check_user(lab, uids[0], &two)?;
    for guest in [&one, &two] {
        lab.stop_and_check(1, guest)?;
        lab.ctl(1, &["vm", "delete", &guest.name])?;
    }
    Ok(())
}

/// Checks one process; gives its user's id.
fn check_process(lab: &Lab, pid: &str, guest: &Guest) -> anyhow::Result<u32> {
    let name = &guest.name;
    let text = lab.exec(1, &["cat", &format!("/proc/{pid}/status")])?;
    let status: BTreeMap<&str, &str> =
        text.lines().filter_map(|line| line.split_once(':')).map(|(k, v)| (k, v.trim())).collect();
    let field = |key: &str| status.get(key).copied().with_context(|| format!("no {key} in {text}"));

    let uid: u32 = field("Uid")?.split_whitespace().next().context("no user")?.parse()?;
    ensure!((UID_BASE..UID_BASE + 50_000).contains(&uid), "{name} runs as user {uid}");
    for kind in ["Uid", "Gid"] {
        let ids: Vec<&str> = field(kind)?.split_whitespace().collect();
        ensure!(ids == [uid.to_string().as_str(); 4], "{name}: {kind} is {ids:?}");
    }
    ensure!(field("Groups")?.is_empty(), "{name} is in groups {}", field("Groups")?);
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let none = u64::from_str_radix(field(set)?, 16)? == 0;
        ensure!(none, "{name} has capabilities: {set} is {}", field(set)?);
    }
    ensure!(field("NoNewPrivs")? == "1", "{name} may gain privileges");
    ensure!(field("Seccomp")? == "2", "{name} has no seccomp filter");
    // Every thread has the filters, not only the first.
    let threads = lab.sh(1, &format!("grep -h Seccomp: /proc/{pid}/task/*/status"))?;
    ensure!(threads.lines().all(|line| line.ends_with('2')), "{name}: {threads}");
    check_limits(lab, pid, name)?;
    check_cgroup(lab, pid, guest)?;

    let root = lab.sh(1, &format!("ls -A /proc/{pid}/root/"))?;
    ensure!(root.trim().is_empty(), "{name} sees files: {root}");
    let namespace = |of: &str| lab.exec(1, &["readlink", &format!("/proc/{of}/ns/mnt")]);
    ensure!(namespace(pid)? != namespace("1")?, "{name} shares the node's mounts");
    Ok(uid)
}

fn check_limits(lab: &Lab, pid: &str, name: &str) -> anyhow::Result<()> {
    let limits = lab.exec(1, &["cat", &format!("/proc/{pid}/limits")])?;
    let expected = [
        ("Max core file size", "0"),
        ("Max open files", "1024"),
        ("Max msgqueue size", "0"),
        ("Max pending signals", "1024"),
    ];
    for (limit, value) in expected {
        let line = limits.lines().find_map(|line| line.strip_prefix(limit));
        let line = line.with_context(|| format!("no `{limit}` in {limits}"))?;
        let found: Vec<&str> = line.split_whitespace().take(2).collect();
        ensure!(found == [value; 2], "{name}: {limit} is {found:?}, not {value}");
    }
    Ok(())
}

/// The lab's nodes have cgroup v2.
fn check_cgroup(lab: &Lab, pid: &str, guest: &Guest) -> anyhow::Result<()> {
    let text = lab.exec(1, &["cat", &format!("/proc/{pid}/cgroup")])?;
    let path = text.trim().strip_prefix("0::").context("no cgroup v2")?;
    let ends = format!("/{}", guest.name);
    ensure!(path.starts_with("/holdfast/") && path.ends_with(&ends), "it is in {path}");
    let read = |file: &str| -> anyhow::Result<String> {
        let file = format!("/sys/fs/cgroup{path}/{file}");
        Ok(lab.exec(1, &["cat", &file])?.trim().to_owned())
    };
    let memory_max: u64 = read("memory.max")?.parse().context("its memory has no limit")?;
    let own = u64::from(guest.memory_mib) << 20;
    ensure!((own..=own + (512 << 20)).contains(&memory_max), "memory.max is {memory_max}");
    let pids_max: u64 = read("pids.max")?.parse().context("its threads have no limit")?;
    ensure!((8..=1024).contains(&pids_max), "pids.max is {pids_max}");
    // KVM's own kernel threads of a VM are put beside its process; they have no command line.
    let members = lab.sh(
        1,
        &format!(
            "while read -r p; do [ -z \"$(tr -d '\\0' </proc/$p/cmdline)\" ] || echo $p; done \
             </sys/fs/cgroup{path}/cgroup.procs"
        ),
    )?;
    ensure!(members.trim() == pid, "in the cgroup of process {pid} are {members}");
    Ok(())
}

/// It has its own disk open, and no file of the other's.
fn check_disks(lab: &Lab, pid: &str, own: &Guest, other: &Guest) -> anyhow::Result<()> {
    let open = lab.sh(1, &format!("for f in /proc/{pid}/fd/*; do readlink $f; done; true"))?;
    let disk = |guest: &Guest| format!("/{}.raw", guest.name);
    ensure!(open.lines().any(|file| file.ends_with(&disk(own))), "its disk is not open: {open}");
    let of_other = open.lines().find(|file| {
        file.ends_with(&disk(other)) || file.contains(&format!("/vms/{}/", other.name))
    });
    ensure!(of_other.is_none(), "{} has {of_other:?} open", own.name);
    Ok(())
}

/// Even outside of its empty root, its user could not read the other's disk.
fn check_user(lab: &Lab, uid: u32, other: &Guest) -> anyhow::Result<()> {
    let disk = format!("/shared/pool/{}.raw", other.name);
    lab.exec(1, &["head", "-c", "1", &disk])?;
    let script = format!(
        "grep -q '^broken:' /etc/passwd || echo 'broken:x:{uid}:{uid}::/:/bin/sh' >>/etc/passwd; \
         su broken -c 'id -u; head -c 1 {disk}'"
    );
    let output = lab.run(1, &["sh", "-c", &script], b"", Duration::from_secs(20))?;
    ensure!(output.stdout.trim() == uid.to_string(), "user {uid} read {disk}: {output:?}");
    ensure!(output.stderr.contains("ermission denied"), "{output:?}");
    Ok(())
}
