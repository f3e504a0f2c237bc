//! The lab proves itself, without any part of Holdfast: nodes, network, power, watchdog, disks.

use std::process::{Command, Stdio};
use std::time::Duration;

use tests::lab::{Lab, Options, assets, wait_until};

#[test]
fn nodes_network_power_watchdog_and_disks_are_real() -> anyhow::Result<()> {
    let mut lab = Lab::up(&Options { agent: false, ..Options::temporary(2) }, &mut |text| {
        println!("{text}")
    })?;
    let folder = lab.folder().to_owned();

    // Real KVM, a hardware watchdog, the shared folder.
    lab.exec(1, &["test", "-c", "/dev/kvm"])?;
    assert_eq!(lab.sh(1, "cat /sys/class/watchdog/*/identity")?.trim(), "i6300ESB timer");
    lab.sh(1, "echo from-1 >/shared/note")?;
    assert_eq!(lab.exec(2, &["cat", "/shared/note"])?.trim(), "from-1");

    // Exit codes and both outputs come back.
    let output =
        lab.run(1, &["sh", "-c", "cat; echo bad >&2; exit 7"], b"in", Duration::from_secs(20))?;
    assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (7, "in", "bad\n"));

    // The network can be cut, and healed.
    let reaches = |lab: &Lab| lab.exec(1, &["ping", "-c", "1", "-W", "2", "10.77.0.2"]).is_ok();
    assert!(reaches(&lab));
    lab.isolate(2)?;
    assert!(!reaches(&lab));
    lab.heal()?;
    assert!(reaches(&lab));

    // What was synced survives a power cut.
    lab.sh(2, "echo kept >/var/lib/holdfast/note && sync")?;
    lab.power_off(2)?;
    assert!(!lab.is_on(2)?);
    assert!(lab.exec(2, &["true"]).is_err());
    lab.power_on(2)?;
    lab.wait_up(2, Duration::from_secs(120))?;
    assert_eq!(lab.exec(2, &["cat", "/var/lib/holdfast/note"])?.trim(), "kept");

    // A watchdog that nobody pets resets the node.
    let boot_id = |lab: &Lab| lab.exec(2, &["cat", "/proc/sys/kernel/random/boot_id"]);
    let before = boot_id(&lab)?;
    lab.sh(2, "(setsid watchdog -F -T 5 -t 3600 /dev/watchdog >/dev/null 2>&1 </dev/null &)")?;
    wait_until(Duration::from_secs(120), "the watchdog resets node 2", || {
        Ok(boot_id(&lab).is_ok_and(|now| now != before))
    })?;

    // A frozen node does not answer; it goes on afterwards.
    lab.freeze(2)?;
    assert!(lab.run(2, &["true"], b"", Duration::from_secs(2)).is_err());
    lab.unfreeze(2)?;
    lab.wait_up(2, Duration::from_secs(30))?;

    unknown_nodes_are_errors(&lab)?;
    lab.down()?;
    assert!(!folder.exists(), "the lab left {}", folder.display());
    Ok(())
}

#[test]
fn plain_processes_form_a_cluster_and_say_what_they_lack() -> anyhow::Result<()> {
    let mut said = String::new();
    let mut lab = Lab::up_processes(&Options::temporary(3), &mut |text| {
        println!("{text}");
        said.push_str(text);
    })?;
    assert!(said.contains("no power cut, no watchdog"), "{said}");
    lab.form_cluster(&mut |text| println!("{text}"))?;
    assert!(lab.power_off(2).is_err());
    // A process that is killed comes to the others' notice like a dead node.
    lab.kill_agent(3)?;
    let status = |lab: &Lab| lab.ctl(1, &["cluster", "status"]);
    wait_until(Duration::from_secs(60), "two of three still have a quorum", || {
        Ok(status(&lab).is_ok())
    })?;
    unknown_nodes_are_errors(&lab)?;
    lab.down()
}

/// `lab ssh` to a node that there is not says so; to one that there is, it gives its exit code on.
fn unknown_nodes_are_errors(lab: &Lab) -> anyhow::Result<()> {
    let ssh = |node: &str, code: &str| {
        let mut command = Command::new(assets::program("lab")?);
        command.arg("--dir").arg(lab.folder()).args(["ssh", node, "sh", "-c"]);
        let command = command.arg(format!("exit {code}")).stdin(Stdio::null());
        anyhow::Ok(command.output()?)
    };
    assert_eq!(ssh("1", "0")?.status.code(), Some(0));
    assert_eq!(ssh("1", "7")?.status.code(), Some(7));
    let unknown = ssh("9", "0")?;
    let said = String::from_utf8_lossy(&unknown.stderr);
    assert!(!unknown.status.success() && said.contains("no node 9"), "{unknown:?}");
    assert!(lab.exec(9, &["true"]).is_err());
    Ok(())
}
