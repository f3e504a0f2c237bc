//! `deploy/lab`: a cluster on this machine, step by step or as one story.

mod demo;
#[cfg(test)]
mod page_tests;
mod ssh;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use tests::lab::process::{self, Lifetime};
use tests::lab::state::{Backend, State, default_folder};
use tests::lab::{Lab, Options, switch};

/// The page that `--help` prints here, and `deploy/lab` before anything is built. The tests keep
/// it and the command line together.
const HELP: &str = include_str!("help.txt");

#[derive(Debug, Parser)]
#[command(name = "lab", bin_name = "deploy/lab", disable_help_subcommand = true)]
struct Arguments {
    /// The lab's folder
    #[arg(long, global = true)]
    dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The whole story, with its times
    Demo {
        /// Print the figures as JSON
        #[arg(long)]
        json: bool,
        /// Memory of a node, MiB
        #[arg(long, default_value_t = 1536)]
        memory: u32,
    },
    /// Starts a lab that stays until `down`
    Up {
        /// How many nodes, 1 to 9
        #[arg(long, default_value_t = 3)]
        nodes: u32,
        /// What the nodes are
        #[arg(long, value_enum, default_value = "qemu")]
        backend: Backend,
        /// CPUs of a node
        #[arg(long, default_value_t = 1)]
        cpus: u32,
        /// Memory of a node, MiB
        #[arg(long, default_value_t = 1536)]
        memory: u32,
        /// Without the agents: bare nodes
        #[arg(long)]
        bare: bool,
    },
    /// Ends the lab and removes all it made
    Down,
    /// Shows the nodes and the network's cuts
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Cuts a node's power
    PowerOff {
        /// The node's number
        #[arg(value_parser = number)]
        node: u32,
    },
    /// Powers a node on; it keeps its disk
    PowerOn {
        /// The node's number
        #[arg(value_parser = number)]
        node: u32,
    },
    /// Cuts the link between two nodes, or one node off from all others
    Partition {
        /// A node's number
        #[arg(value_parser = number)]
        a: u32,
        /// Another one; without it: all others
        #[arg(value_parser = number)]
        b: Option<u32>,
    },
    /// Takes all cuts back
    Heal,
    /// Stops the agent of a node as it stands (with --node: the whole machine)
    Hang {
        /// The node's number
        #[arg(value_parser = number)]
        node: u32,
        /// The whole machine
        #[arg(long = "node")]
        whole: bool,
    },
    /// Lets it go on
    Thaw {
        /// The node's number
        #[arg(value_parser = number)]
        node: u32,
        /// The whole machine
        #[arg(long = "node")]
        whole: bool,
    },
    /// Runs a command in a node; without one: a shell
    Ssh {
        /// On a terminal
        #[arg(short)]
        terminal: bool,
        /// The node's number
        #[arg(value_parser = number)]
        node: u32,
        /// The command and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// The lab's network; started by `up`
    #[command(hide = true)]
    Switch { folder: PathBuf, nodes: u32 },
}

/// A node as people write it: `3`, or by its name, `node3`.
fn number(text: &str) -> Result<u32, String> {
    let number = text.strip_prefix("node").unwrap_or(text);
    number
        .parse()
        .map_err(|_| "a node is named by its number or its name, `3` or `node3`".to_owned())
}

fn main() -> std::process::ExitCode {
    let arguments = Arguments::from_arg_matches(&command_line().get_matches());
    match run(arguments.unwrap_or_else(|error| error.exit())) {
        Ok(code) => code,
        Err(_) if process::is_stopping() => std::process::ExitCode::from(130),
        Err(error) => {
            eprintln!("lab: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// One page of help for all of it.
fn command_line() -> clap::Command {
    Arguments::command().override_help(HELP).mut_subcommands(|verb| verb.override_help(HELP))
}

fn run(arguments: Arguments) -> anyhow::Result<std::process::ExitCode> {
    let chosen = arguments.dir;
    let folder = chosen.clone().unwrap_or_else(default_folder);
    let attach = || Lab::attach(&folder);
    match arguments.command {
        Command::Demo { json, memory } => demo::demo(json, memory, chosen)?,
        Command::Up { nodes, backend, cpus, memory, bare } => {
            let options = Options {
                folder: folder.clone(),
                nodes,
                cpus,
                memory_mib: memory,
                softdog: Vec::new(),
                agent: !bare,
                lease_ms: tests::lab::LEASE_MS,
                lifetime: Lifetime::Detached,
            };
            end_at_signal(folder)?;
            let mut say = progress(Instant::now());
            match backend {
                Backend::Qemu => Lab::up(&options, &mut say)?,
                Backend::Process => Lab::up_processes(&options, &mut say)?,
            };
            println!(
                "The lab is up, in no cluster yet: `deploy/lab --help` shows how to form one. \
                 `deploy/lab ssh 1` is a shell in node 1, `deploy/lab down` ends it."
            );
        }
        Command::Down => down(&folder)?,
        Command::Status { json } => status(&attach()?, json)?,
        Command::PowerOff { node } => attach()?.power_off(node)?,
        Command::PowerOn { node } => attach()?.power_on(node)?,
        Command::Partition { a, b: Some(b) } => attach()?.partition(a, b)?,
        Command::Partition { a, b: None } => attach()?.isolate(a)?,
        Command::Heal => attach()?.heal()?,
        Command::Hang { node, whole: false } => attach()?.hang_agent(node)?,
        Command::Hang { node, whole: true } => attach()?.freeze(node)?,
        Command::Thaw { node, whole: false } => attach()?.thaw_agent(node)?,
        Command::Thaw { node, whole: true } => attach()?.unfreeze(node)?,
        Command::Ssh { terminal, node, command } => {
            return ssh::ssh(&attach()?, node, &command, terminal);
        }
        Command::Switch { folder, nodes } => serve_switch(&folder, nodes)?,
    }
    Ok(std::process::ExitCode::SUCCESS)
}

/// Without a lab there is nothing to do, and nothing wrong.
fn down(folder: &Path) -> anyhow::Result<()> {
    if State::find(folder)?.is_none() {
        println!("no lab is running in {}", folder.display());
        return Ok(());
    }
    let lab = Lab::attach(folder)?;
    let all = lab.state().nodes.len();
    let on = lab.state().nodes.iter().filter_map(|node| node.process);
    let on = on.filter(process::ProcessId::is_alive).count();
    lab.down()?;
    println!("ended: {on} of {all} nodes were on; {} is removed", folder.display());
    Ok(())
}

/// Says each step on the terminal, with the time since the beginning.
fn progress(started: Instant) -> impl FnMut(&str) {
    move |text| eprintln!("[{:6.1} s] {text}", started.elapsed().as_secs_f64())
}

fn serve_switch(folder: &Path, nodes: u32) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(switch::server::serve(folder, 1..=nodes)).context("the lab's switch")
}

/// At Ctrl-C or SIGTERM the nodes of the lab in `folder` are killed and no process is started any
/// more: whatever the main thread does fails at once, and it takes the rest down on its way out.
fn end_at_signal(folder: PathBuf) -> anyhow::Result<()> {
    use nix::sys::signal::{SigSet, Signal};
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block()?;
    std::thread::spawn(move || {
        let Ok(signal) = signals.wait() else { return };
        eprintln!("\nlab: stopped by {signal}, taking everything down");
        process::begin_stop();
        // Without a state nothing runs yet. What is started this very moment is in the main thread's
        // books.
        if let Ok(state) = State::load(&folder) {
            state.processes().for_each(|process| process.signal(Signal::SIGKILL));
        }
    });
    Ok(())
}

fn status(lab: &Lab, json: bool) -> anyhow::Result<()> {
    let machines = lab.state().backend == Backend::Qemu;
    let cuts = if machines { lab.network_rules()?.cut } else { Default::default() };
    let mut nodes = Vec::new();
    for node in &lab.state().nodes {
        let on = lab.is_on(node.number)?;
        nodes.push(serde_json::json!({
            "node": format!("node{}", node.number),
            "power": if on { "on" } else { "off" },
            "address": if machines { tests::lab::qemu::address(node.number) } else { "127.0.0.1".into() },
            "api": node.api,
        }));
    }
    if json {
        println!("{}", serde_json::json!({ "nodes": nodes, "cuts": cuts }));
        return Ok(());
    }
    println!("{:8} {:6} {:12} API ON THIS MACHINE", "NODE", "POWER", "ADDRESS");
    for node in &nodes {
        let text = |key: &str| node[key].as_str().unwrap_or_default().to_owned();
        println!("{:8} {:6} {:12} {}", text("node"), text("power"), text("address"), text("api"));
    }
    for (a, b) in cuts {
        println!("cut: node{a} - node{b}");
    }
    Ok(())
}
