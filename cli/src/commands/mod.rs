//! One module for each noun; `run` sends a command line to its own.

pub(crate) mod cluster;
pub(crate) mod config;
mod console;
pub(crate) mod context;
pub(crate) mod ha;
pub(crate) mod image;
pub(crate) mod network;
pub(crate) mod node;
pub(crate) mod storage;
pub(crate) mod task;
pub(crate) mod vm;

use clap::CommandFactory;

use crate::args::{Cli, Noun};
use crate::connect::Session;
use crate::failure::Failure;
use crate::output;

/// Carries a command line out.
pub(crate) async fn run(cli: Cli) -> Result<(), Failure> {
    let global = cli.global;
    match cli.noun {
        Noun::Cluster(command) => cluster::run(&Session::open(&global).await?, command).await,
        Noun::Node(command) => node::run(&Session::open(&global).await?, command).await,
        Noun::Vm(command) => vm::run(&Session::open(&global).await?, command).await,
        Noun::Image(command) => image::run(&Session::open(&global).await?, command).await,
        Noun::Storage(command) => storage::run(&Session::open(&global).await?, command).await,
        Noun::Network(command) => network::run(&Session::open(&global).await?, command).await,
        // The schema is known here: no cluster is asked.
        Noun::Config(config::Command::Explain { key, recursive }) => {
            config::explain(global.output, &key, recursive)
        }
        Noun::Config(command) => config::run(&Session::open(&global).await?, command).await,
        // A model is asked, not a cluster.
        Noun::Ha(ha::Command::Simulate(command)) => ha::simulate::simulate(global.output, &command),
        Noun::Ha(command) => ha::run(&Session::open(&global).await?, command).await,
        Noun::Task(command) => task::run(&Session::open(&global).await?, command).await,
        Noun::Context(command) => context::run(&global, command).await,
        Noun::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "clusterctl", &mut script);
            output::bytes(&script)
        }
        Noun::Version => {
            let version =
                std::collections::BTreeMap::from([("version", env!("CARGO_PKG_VERSION"))]);
            output::print(global.output, &version, |_| {
                format!("clusterctl {}", env!("CARGO_PKG_VERSION"))
            })
        }
    }
}
