//! Agents as plain processes on this machine's loopback address and its own `/dev/kvm`: the quick
//! lab, without power, watchdog or a network of its own.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context;

use super::assets::program;
use super::exec::{ExecError, Output};
use super::process::{Lifetime, ProcessId, spawn};

/// Said when such a lab is started.
pub const LIMITS: &str = "the nodes are plain processes with this machine's own /dev/kvm: \
    no power cut, no watchdog, no partitions here";

/// Starts a node's agent.
///
/// # Errors
/// If it is not built or does not start.
pub fn start(
    folder: &Path,
    number: u32,
    api: SocketAddr,
    enrol: SocketAddr,
    lifetime: Lifetime,
    witness: bool,
) -> anyhow::Result<ProcessId> {
    let own = folder.join(number.to_string());
    std::fs::create_dir_all(own.join("data"))?;
    std::fs::create_dir_all(own.join("run"))?;
    let path = |name: &str| toml::Value::String(own.join(name).to_string_lossy().into_owned());
    let uid_base = 900_000 + 1000 * number;
    let config = format!(
        "node_name = \"node{number}\"\nlisten = \"{api}\"\nenrol_listen = \"{enrol}\"\n\
         advertise = \"{api}\"\nenrol_advertise = \"{enrol}\"\nmigration_address = \"127.0.0.1\"\n\
         data_dir = {}\nrun_dir = {}\nsocket = {}\nwatchdog = \"none\"\n\
         allow_ha_without_watchdog = true\nuid_base = {uid_base}\n[tree]\nmount = \"off\"\n",
        path("data"),
        path("run"),
        path("run/agent.sock"),
    );
    let file = own.join("node-agent.toml");
    std::fs::write(&file, config)?;
    let log = std::fs::File::create(own.join("agent.log"))?;
    let mut command = Command::new(program("node-agent")?);
    if witness {
        command.arg("--witness");
    }
    command.arg("--config").arg(file).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let (_child, id) = spawn(&mut command, lifetime).context("the agent does not start")?;
    Ok(id)
}

/// A command that finds `clusterctl` and this node's agent.
///
/// # Errors
/// If `clusterctl` is not built.
pub fn command(folder: &Path, number: u32, argv: &[&str]) -> anyhow::Result<Command> {
    let (name, arguments) = argv.split_first().context("no program was named")?;
    let ours = program("clusterctl")?;
    let folder_of_ours = ours.parent().map(PathBuf::from).unwrap_or_default();
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command =
        Command::new(if *name == "clusterctl" { ours.as_os_str() } else { name.as_ref() });
    command
        .args(arguments)
        .env("PATH", format!("{}:{path}", folder_of_ours.display()))
        .env("HOLDFAST_SOCKET", folder.join(number.to_string()).join("run/agent.sock"));
    Ok(command)
}

/// Runs a command to its end.
///
/// # Errors
/// If it cannot be started.
pub fn run(folder: &Path, number: u32, argv: &[&str], stdin: &[u8]) -> Result<Output, ExecError> {
    let mut command =
        command(folder, number, argv).map_err(|error| ExecError::Refused(format!("{error:#}")))?;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    if let Some(mut to) = child.stdin.take() {
        match to.write_all(stdin) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error.into()),
            _ => {}
        }
    }
    let output = child.wait_with_output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Output {
        code: output.status.code().unwrap_or(128),
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
    })
}
