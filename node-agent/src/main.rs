//! `node-agent`: the Holdfast daemon, and (`node-agent vm`) the process of one VM.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use node_agent::agent::{EXIT_REMOVED, Ended};
use node_agent::config::{Config, Flags};

/// The Holdfast node agent: one per node, supervising one process per VM
#[derive(Debug, Parser)]
#[command(name = "node-agent", version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    flags: Flags,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs one VM; started by the agent, not by people
    #[command(hide = true)]
    Vm {
        /// Launch description
        #[arg(long, value_name = "FILE")]
        launch: PathBuf,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.command {
        Some(Command::Vm { launch }) => node_agent::vm_process::main(&launch),
        None => agent(&arguments.flags),
    }
}

fn agent(flags: &Flags) -> ExitCode {
    let ended = Config::load(flags).map_err(anyhow::Error::from).and_then(|config| {
        node_agent::telemetry::install(&config.log);
        // Fails only if a provider was installed before, which is as good.
        drop(rustls::crypto::ring::default_provider().install_default());
        node_agent::agent::run(config)
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("node-agent: {error:#}");
            match error.downcast_ref() {
                Some(Ended::Removed(_)) => ExitCode::from(EXIT_REMOVED),
                Some(Ended::Failed(_)) | None => ExitCode::FAILURE,
            }
        }
    }
}
