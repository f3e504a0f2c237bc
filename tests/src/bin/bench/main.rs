//! `tests/bench`: figures beside those of others, on the same machine, in the same run.

mod etcd;
mod figures;
mod load;
mod member;
mod ours;
mod process;
mod store;
mod tls;

use std::path::PathBuf;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use tokio::runtime::Runtime;

use figures::Figures;
use load::Size;

/// Benchmarks.
#[derive(Parser)]
#[command(name = "bench", bin_name = "tests/bench")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The replicated store: three members, mutual TLS, fsync
    Store {
        /// Whom to compare with
        #[arg(long, value_enum)]
        vs: Rival,
        /// How to print the result
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
        /// A tenth of the keys, one round: for a first look
        #[arg(long)]
        quick: bool,
        /// Where the data folders lie; must be a real disk [default: the folder for temporary files]
        #[arg(long)]
        dir: Option<PathBuf>,
    },
    /// One member of the store (started by `store`)
    #[command(hide = true)]
    Member(member::Options),
}

#[derive(Clone, Copy, ValueEnum)]
enum Rival {
    Etcd,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Output {
    Table,
    Json,
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Member(options) => Runtime::new()?.block_on(member::run(options)),
        Command::Store { vs: Rival::Etcd, output, quick, dir } => {
            let size = if quick { Size::QUICK } else { Size::FULL };
            let (ours, theirs) = Runtime::new()?.block_on(compare(size, dir))?;
            match output {
                Output::Table => print!("{}", figures::table(&ours, &theirs)),
                Output::Json => println!("{}", figures::json(&ours, &theirs)?),
            }
            Ok(())
        }
    }
}

/// Ours, theirs, ours, theirs: what changes on the machine meanwhile touches both.
async fn compare(size: Size, dir: Option<PathBuf>) -> anyhow::Result<(Figures, Figures)> {
    etcd::present()?;
    let dir = dir.unwrap_or_else(std::env::temp_dir);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 1..=size.rounds {
        for is_ours in [true, false] {
            let folder = tempfile::tempdir_in(&dir).context("no folder for the members")?;
            let name = if is_ours { "holdfast" } else { "etcd" };
            eprintln!("round {round}: {name}");
            if is_ours {
                let mut members = ours::start(folder.path()).await?;
                ours.push(load::measure(&mut members, size).await?);
            } else {
                let mut members = etcd::start(folder.path()).await?;
                theirs.push(load::measure(&mut members, size).await?);
            }
        }
    }
    Ok((Figures::median(&ours), Figures::median(&theirs)))
}
