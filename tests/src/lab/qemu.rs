//! A node's QEMU: its command line and its power button.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};

use super::assets::BootFiles;
use super::host::Accel;
use super::process::{Lifetime, ProcessId, spawn};
use super::state::{NodeState, State};

/// Size of a node's data disk, bytes; the file is sparse.
const DATA_SIZE: u64 = 4 << 30;
/// The largest packet on the lab's network, bytes; the nodes take it over from their NIC.
const MTU: u32 = 9000;

/// Makes a node's folder and its data disk, if they are not there.
///
/// # Errors
/// If the disk cannot be made.
pub fn prepare(folder: &Path, number: u32) -> anyhow::Result<()> {
    let own = folder.join(number.to_string());
    std::fs::create_dir_all(&own)?;
    let disk = own.join("data.raw");
    if disk.exists() {
        return Ok(());
    }
    let new = own.join("data.new");
    OpenOptions::new().write(true).create(true).truncate(true).open(&new)?.set_len(DATA_SIZE)?;
    let path = std::env::var("PATH").unwrap_or_default();
    let status = Command::new("mke2fs")
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .args(["-q", "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", "-F"])
        .arg(&new)
        .status();
    ensure!(status.context("mke2fs is missing: run deploy/setup")?.success(), "mke2fs failed");
    std::fs::rename(new, disk)?;
    Ok(())
}

/// The node's address in the lab's network.
#[must_use]
pub fn address(number: u32) -> String {
    format!("10.77.0.{number}")
}

/// Powers a node on.
///
/// # Errors
/// If QEMU does not start.
pub fn power_on(
    folder: &Path,
    state: &State,
    node: &NodeState,
    boot: &BootFiles,
    lifetime: Lifetime,
) -> anyhow::Result<(Child, ProcessId)> {
    let number = node.number;
    let own = folder.join(number.to_string());
    // A socket of a former life would make QEMU's own fail.
    let _ = std::fs::remove_file(own.join("qmp.sock"));
    let log = |name: &str| OpenOptions::new().append(true).create(true).open(own.join(name));
    writeln!(log("console.log")?, "--- power on")?;
    writeln!(log("agent.log")?, "--- power on")?;
    let watchdog: &[&str] =
        if node.softdog { &[] } else { &["-device", "i6300esb", "-action", "watchdog=reset"] };
    let mut command = Command::new("qemu-system-x86_64");
    command
        .current_dir(&own)
        .args(["-name", &format!("node{number}"), "-nodefaults", "-display", "none"])
        .args(Accel::detect().arguments())
        .args(["-smp", &state.cpus.to_string(), "-m", &state.memory_mib.to_string()])
        .arg("-kernel")
        .arg(&boot.kernel)
        .arg("-initrd")
        .arg(&boot.initrd)
        .arg("-append")
        .arg(format!(
            "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on \
             hf.node={number} hf.address={}/24 hf.agent={}",
            address(number),
            u8::from(state.agent)
        ))
        .args([
            "-chardev",
            "file,id=console,path=console.log,append=on",
            "-serial",
            "chardev:console",
        ])
        .args(["-qmp", "unix:qmp.sock,server=on,wait=off"])
        .args(watchdog)
        // Whether it was the watchdog or the CPU itself (a triple fault), should the node restart.
        .args(["-d", "cpu_reset", "-D", "resets.log"])
        .args(["-device", "virtio-rng-pci"])
        .args([
            "-device",
            "virtio-serial-pci",
            "-chardev",
            "file,id=agent,path=agent.log,append=on",
        ])
        .args(["-device", "virtserialport,chardev=agent,name=agent-log"])
        // The host's page cache survives a kill of QEMU, as a disk survives a power cut; what the
        // node had not yet written is lost, as there.
        .args(["-drive", "file=data.raw,format=raw,if=none,id=data,cache=unsafe"])
        .args(["-device", "virtio-blk-pci,drive=data"])
        .args(["-fsdev", "local,id=shared,path=../shared,security_model=none,multidevs=remap"])
        .args(["-device", "virtio-9p-pci,fsdev=shared,mount_tag=shared"])
        .args(["-fsdev", "local,id=programs,path=../programs,security_model=none,readonly=on"])
        .args(["-device", "virtio-9p-pci,fsdev=programs,mount_tag=programs"])
        .args([
            "-netdev",
            &format!("stream,id=lan,addr.type=unix,addr.path=../switch/{number}.sock"),
        ])
        // Jumbo frames: an emulated node's time goes with frames more than with bytes.
        .args([
            "-device",
            &format!("virtio-net-pci,netdev=lan,mac=52:54:00:77:01:{number:02x},host_mtu={MTU}"),
        ])
        .args([
            "-netdev",
            &format!(
                "user,id=host,restrict=on,hostfwd=tcp:{}-:{},hostfwd=tcp:{}-:7400",
                node.exec,
                super::exec::PORT,
                node.api
            ),
        ])
        .args(["-device", &format!("virtio-net-pci,netdev=host,mac=52:54:00:77:02:{number:02x}")])
        .stdin(Stdio::null())
        .stdout(log("qemu.log")?)
        .stderr(log("qemu.log")?);
    let started = spawn(&mut command, lifetime);
    started.context("qemu-system-x86_64 does not start: run deploy/setup")
}

/// Sends a command to QEMU's monitor: `system_reset`, `stop`, `cont`, `quit`…
///
/// # Errors
/// If QEMU is gone, hangs or refuses.
pub fn monitor(folder: &Path, number: u32, command: &str) -> anyhow::Result<()> {
    let socket = folder.join(number.to_string()).join("qmp.sock");
    let mut stream = UnixStream::connect(&socket)
        .with_context(|| format!("node {number}'s QEMU does not answer: is it powered on?"))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    lines.next().context("QEMU says nothing")??; // its greeting
    for command in ["qmp_capabilities", command] {
        writeln!(stream, "{}", serde_json::json!({ "execute": command }))?;
        loop {
            let line = lines.next().context("QEMU closed its monitor")??;
            let answer: serde_json::Value = serde_json::from_str(&line)?;
            if let Some(error) = answer.get("error") {
                anyhow::bail!("QEMU refused {command}: {error}");
            }
            if answer.get("return").is_some() {
                break; // what comes without it is an event
            }
        }
    }
    Ok(())
}
