//! `node-agent`: the Holdfast daemon, and (`node-agent vm`) the process of one VM.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use node_agent::agent::{EXIT_REMOVED, Ended};
use node_agent::config::{Config, Flags};

/// Also RocksDB's. Of the allocators that were measured under the store's benchmark it was the fastest.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

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
    /// Make this node, the survivor of a lost majority, a cluster again; its agent must be stopped
    #[command(
        after_help = "It says what is lost and asks, before it changes anything. It is refused while another\nmember of the cluster answers. Run again after an interruption, it finishes what it began.\n\nExamples:\n  systemctl stop holdfast-node-agent\n  node-agent recover\n  node-agent recover --confirm prod/node3\n  systemctl start holdfast-node-agent"
    )]
    Recover {
        /// The new cluster's name; the old one's where absent
        #[arg(long, default_value = "", hide_default_value = true)]
        name: String,
        /// The machines of all other members are off and stay off: do not ask
        #[arg(long, value_name = "CLUSTER/NODE")]
        confirm: Option<String>,
        #[command(flatten)]
        flags: Box<Flags>,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.command {
        Some(Command::Vm { launch }) => node_agent::vm_process::main(&launch),
        Some(Command::Recover { name, confirm, flags }) => {
            run(&flags, |config| node_agent::recover::run(config, &name, confirm.as_deref()))
        }
        None => run(&arguments.flags, node_agent::agent::run),
    }
}

/// Runs something with the agent's configuration.
fn run(flags: &Flags, work: impl FnOnce(Config) -> anyhow::Result<()>) -> ExitCode {
    let ended = Config::load(flags).map_err(anyhow::Error::from).and_then(|config| {
        node_agent::telemetry::install(&config.log);
        // Fails only if a provider was installed before, which is as good.
        drop(rustls::crypto::ring::default_provider().install_default());
        work(config)
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
