//! Guests of several shapes on one node.

use std::time::Duration;

use anyhow::{Context, ensure};
use tests::lab::Lab;
use tests::lab::cluster::Guest;

const BOOT: Duration = Duration::from_secs(240);

#[test]
fn one_and_four_cpus_eight_small_vms_and_the_power_button() -> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    for cpus in [1, 4] {
        let guest = Guest { cpus, ha: false, ..Guest::new(&format!("cpus{cpus}"), 100) };
        lab.create_guest(1, &guest, None)?;
        assert_eq!(lab.await_guest(1, &guest, BOOT)?.cpus, u64::from(cpus));
        lab.ctl(1, &["vm", "shutdown", &guest.name])?;
        assert_eq!(lab.vm(1, &guest.name)?.phase, "stopped");
        assert!(!lab.records(&guest)?.is_empty());
        lab.ctl(1, &["vm", "delete", &guest.name])?;
    }

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
    assert_eq!(boots.len(), 8);
    assert_eq!(lab.vm_processes()?.len(), 8);
    lab.down()
}

/// The VMM by itself, in a node: a stock guest is saved by one process and goes on in another.
#[test]
fn a_saved_guest_goes_on_where_it_stopped() -> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    let boot = std::env::current_exe()?
        .ancestors()
        .nth(2)
        .map(|release| release.join("examples/boot"))
        .context("the test's own path has no folders")?;
    std::fs::copy(&boot, lab.shared().join("boot"))
        .with_context(|| format!("copying {}", boot.display()))?;
    let run = |more: &str| {
        let command = format!(
            "cd /tmp && timeout 200 /shared/boot --kernel /shared/pool/vmlinuz \
             --initrd /shared/pool/guest.cpio --cpus 2 --memory 160 \
             --cmdline 'console=ttyS0 quiet panic=-1 probe.memory-mib=8 probe.count-ms=200' {more} </dev/null 2>&1"
        );
        lab.run(1, &["sh", "-c", &command], b"", Duration::from_secs(240))
    };
    let counts = |text: &str| -> Vec<u64> {
        text.lines().filter_map(|line| line.trim().strip_prefix("COUNT ")?.parse().ok()).collect()
    };
    let saved = run("--save /tmp/saved --save-after 45")?;
    let first = counts(&saved.stdout);
    let last = *first.last().with_context(|| format!("the guest did not count: {saved:?}"))?;
    let restored = run("--restore /tmp/saved --power-button-after 20")?;
    let second = counts(&restored.stdout);
    println!("counted to {last}, then {second:?}");
    ensure!(restored.code == 0, "the restored guest did not shut down: {restored:?}");
    ensure!(!restored.stdout.contains("Linux version"), "it booted again");
    let next = *second.first().with_context(|| format!("it does not go on: {restored:?}"))?;
    // A line that was in the serial port's queue may be printed by either.
    ensure!(next == last + 1 || next == last, "it went on with {next} after {last}");
    ensure!(second.windows(2).all(|pair| pair[1] == pair[0] + 1), "it lost count: {second:?}");
    lab.down()
}
