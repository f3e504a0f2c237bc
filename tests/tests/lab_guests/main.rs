//! Guests of several shapes on one node, and what holds their processes in.

mod confinement;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use tests::guest::client::SecondDisk;
use tests::lab::guest::Guest;
use tests::lab::scenario::{Stage, play};
use tests::lab::{Lab, Options};

const BOOT: Duration = Duration::from_secs(240);

#[test]
fn guests_of_several_shapes_run_on_one_node() -> anyhow::Result<()> {
    let lab = Lab::cluster(&Options::patient(1))?;
    let mut stage = OneNode { lab };
    play(
        &mut stage,
        &[
            (
                "guests with one, four and eight CPUs, a bzImage and PVH, two disks, the power button",
                one_to_eight_cpus,
            ),
            ("eight small VMs", eight_small_vms),
            ("VM processes are confined", |stage| confinement::check(&stage.lab)),
            ("a saved guest goes on where it stopped", a_saved_guest),
            ("the VMM's own tests pass on a node's KVM", the_vmms_own_tests),
        ],
    )?;
    stage.lab.down()
}

/// A node without VMs.
struct OneNode {
    lab: Lab,
}

impl Stage for OneNode {
    fn check_whole(&mut self) -> anyhow::Result<()> {
        self.lab.wait_healthy(1)?;
        let left = self.lab.vm_pids(1)?;
        ensure!(left.is_empty(), "VM processes are left: {left:?}");
        Ok(())
    }
}

fn one_to_eight_cpus(stage: &mut OneNode) -> anyhow::Result<()> {
    let OneNode { lab } = stage;
    lab.import_unpacked_kernel()?;
    let content: Vec<u8> =
        (0..1_u32 << 17).flat_map(|n| n.wrapping_mul(n | 1).to_le_bytes()).collect();
    lab.import_disk("second.raw", &content)?;
    let written = SecondDisk {
        bytes: content.len().try_into()?,
        crc: crc32fast::hash(&content),
        readonly: true,
        write_error: String::new(),
    };
    for (cpus, kernel, second_disk) in
        [(1, "vmlinuz", None), (4, "vmlinux", None), (8, "vmlinuz", Some("second.raw"))]
    {
        let name = format!("cpus{cpus}");
        let guest = Guest { cpus, kernel, second_disk, ha: false, ..Guest::new(&name, 100) };
        lab.create_guest(1, &guest, None)?;
        let status = lab.await_guest(1, &guest, BOOT)?;
        ensure!(status.cpus == u64::from(cpus), "it sees {} CPUs of {cpus}", status.cpus);
        let found = status.second_disk;
        ensure!(found.is_some() == second_disk.is_some(), "its second disk: {found:?}");
        if let Some(found) = found {
            ensure!(found.write_error.contains("not permitted"), "it can be written: {found:?}");
            ensure!(
                SecondDisk { write_error: String::new(), ..found.clone() } == written,
                "{found:?}"
            );
        }
        lab.ctl(1, &["vm", "shutdown", &guest.name])?;
        let phase = lab.vm(1, &guest.name)?.phase;
        ensure!(phase == "stopped", "it is {phase}");
        ensure!(!lab.records(&guest)?.is_empty(), "it has written nothing");
        lab.ctl(1, &["vm", "delete", &guest.name])?;
    }
    Ok(())
}

fn eight_small_vms(stage: &mut OneNode) -> anyhow::Result<()> {
    let OneNode { lab } = stage;
    let small = |index: u8| Guest {
        memory_mib: 96,
        checked_mib: 8,
        ha: false,
        disk: false,
        ..Guest::new(&format!("small{index}"), 120 + index)
    };
    for index in 0..8 {
        lab.create_guest(1, &small(index), None)?;
    }
    let mut boots = std::collections::BTreeSet::new();
    for index in 0..8 {
        boots.insert(lab.await_guest(1, &small(index), BOOT)?.boot_id);
    }
    ensure!(boots.len() == 8, "some answer for others: {boots:?}");
    ensure!(lab.vm_processes()?.len() == 8, "not a process each");
    for index in 0..8 {
        lab.ctl(1, &["vm", "stop", &small(index).name])?;
        lab.ctl(1, &["vm", "delete", &small(index).name])?;
    }
    Ok(())
}

/// The VMM by itself, in a node: a stock guest is saved by one process and goes on in another.
fn a_saved_guest(stage: &mut OneNode) -> anyhow::Result<()> {
    let OneNode { lab } = stage;
    let own = std::env::current_exe()?;
    let boot = own.ancestors().nth(2).map(|release| release.join("examples/boot"));
    let boot = boot.context("the test's own path has no folders")?;
    std::fs::copy(&boot, lab.shared().join("boot"))
        .with_context(|| format!("copying {}", boot.display()))?;
    let run = |more: &str| {
        let command = format!(
            "cd /tmp && timeout 200 /shared/boot --kernel /shared/pool/vmlinuz \
             --initrd /shared/pool/guest.cpio --cpus 2 --memory 160 \
             --cmdline 'console=ttyS0 quiet panic=-1 probe.memory-mib=8 probe.count-ms=200' {more} </dev/null 2>&1"
        );
        lab.run(1, &["sh", "-c", &command], b"", BOOT)
    };
    // What the process says itself may follow on the line that the guest was printing.
    let count = |line: &str| -> Option<u64> {
        let rest = line.trim().strip_prefix("COUNT ")?;
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        rest[..digits].parse().ok()
    };
    let counts = |text: &str| -> Vec<u64> { text.lines().filter_map(count).collect() };
    let saved = run("--save /tmp/saved --save-at 'COUNT 10'")?;
    let first = counts(&saved.stdout);
    let last =
        *first.iter().max().with_context(|| format!("the guest did not count: {saved:?}"))?;
    let restored = run("--restore /tmp/saved --power-button-at 'COUNT 30'")?;
    let second = counts(&restored.stdout);
    println!("counted to {last}, then {second:?}");
    ensure!(restored.code == 0, "the restored guest did not shut down: {restored:?}");
    ensure!(!restored.stdout.contains("Linux version"), "it booted again");
    let next = *second.first().with_context(|| format!("it does not go on: {restored:?}"))?;
    // A line that was in the serial port's queue may be printed by either, or in part by both.
    ensure!((last..=last + 2).contains(&next), "it went on with {next} after {last}");
    ensure!(second.windows(2).all(|pair| pair[1] == pair[0] + 1), "it lost count: {second:?}");
    lab.sh(1, "rm /tmp/saved").map(drop)
}

/// What `vmm-core` tests on this host's `/dev/kvm`, if it has one, holds on a node's as well.
fn the_vmms_own_tests(stage: &mut OneNode) -> anyhow::Result<()> {
    let OneNode { lab } = stage;
    for suite in ["machine", "migrate_kvm"] {
        std::fs::copy(test_program(suite)?, lab.shared().join(suite))?;
        let command = format!("cd /tmp && RUST_BACKTRACE=0 /shared/{suite} --test-threads 1 2>&1");
        let output = lab.run(1, &["sh", "-c", &command], b"", BOOT)?;
        println!("{}", output.stdout);
        ensure!(output.code == 0, "{suite} failed");
        // They say so where they find no KVM, and pass.
        ensure!(!output.stdout.contains("SKIPPED"), "{suite} did not find the node's KVM");
        ensure!(output.stdout.contains("test result: ok"), "{suite} ran no tests");
    }
    Ok(())
}

/// A test program of the workspace, which is built beside this one; the newest, where builds with
/// other settings have left theirs.
fn test_program(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let folder = own.parent().context("this program has no folder")?;
    let mut found = Vec::new();
    for entry in folder.read_dir()? {
        let entry = entry?;
        let file = entry.file_name();
        let hash = file.to_str().and_then(|file| file.strip_prefix(name)?.strip_prefix('-'));
        if hash.is_some_and(|hash| hash.bytes().all(|byte| byte.is_ascii_hexdigit())) {
            found.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    let newest = found.into_iter().max();
    Ok(newest.with_context(|| format!("{name} is not built in {}", folder.display()))?.1)
}
