//! clusterctl: the command line of a Holdfast cluster.
//!
//! `clusterctl NOUN VERB` is found in `commands/NOUN.rs`. [`connect`] finds a node to talk to,
//! [`wait`] follows tasks, [`files`] reads and commits people's files, [`output`] prints,
//! [`failure`] says what went wrong and with which exit code. Nothing is decided here: every rule lives in the agents.

mod args;
mod commands;
mod connect;
mod contexts;
mod diffs;
mod failure;
mod files;
mod output;
mod paths;
mod refusal;
mod terminal;
mod wait;

use std::process::ExitCode;

use clap::Parser;

use crate::args::Cli;
use crate::failure::{Exit, Failure};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::from(Exit::Ok.code()),
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(failure.exit.code())
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    // A second installation in one process is the only way this fails; there is none.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Failed, "cannot start").why(error.to_string()))?;
    let outcome = runtime.block_on(commands::run(cli));
    // A thread that still reads the keyboard must not hold the process up.
    runtime.shutdown_background();
    outcome
}
