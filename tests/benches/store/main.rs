//! `tests/bench store`: the replicated configuration beside another store. Three members each, as
//! processes on this machine, mutual TLS 1.3, fsync on, the same load from the same clients; ours,
//! theirs, ours, theirs, so that what changes on the machine meanwhile touches both.

mod etcd;
mod figures;
mod holdfast;
mod load;
mod member;
mod tls;

use std::path::PathBuf;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use tokio::runtime::Runtime;

use figures::Figures;
use load::Size;

/// The replicated configuration beside another store: three members each, mutual TLS, fsync
#[derive(Parser)]
#[command(
    bin_name = "tests/bench store",
    after_help = "Examples:\n  tests/bench store --vs etcd\n  tests/bench store --vs etcd --quick -o json"
)]
struct Arguments {
    /// Whom to compare with
    #[arg(long, value_enum)]
    vs: Rival,
    /// How to print the result
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
    /// A tenth of the keys and one round, for a first look
    #[arg(long)]
    quick: bool,
    /// Where the data folders lie, on a real disk [default: the folder for temporary files]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Rival {
    /// Debian's etcd-server
    Etcd,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Output {
    Table,
    Json,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let Rival::Etcd = arguments.vs;
    let size = if arguments.quick { Size::QUICK } else { Size::FULL };
    let (ours, theirs) = Runtime::new()?.block_on(compare(size, arguments.dir))?;
    match arguments.output {
        Output::Table => print!("{}", figures::table(&ours, &theirs)),
        Output::Json => println!("{}", figures::json(&ours, &theirs)?),
    }
    Ok(())
}

async fn compare(size: Size, dir: Option<PathBuf>) -> anyhow::Result<(Figures, Figures)> {
    etcd::present()?;
    let dir = dir.unwrap_or_else(std::env::temp_dir);
    let folder = || tempfile::tempdir_in(&dir).context("no folder for the members");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 1..=size.rounds {
        eprintln!("round {round} of {}: holdfast", size.rounds);
        let own = folder()?;
        let mut members = holdfast::start(own.path()).await?;
        ours.push(load::measure(&mut members, size).await?);
        drop(members);
        eprintln!("round {round} of {}: etcd", size.rounds);
        let own = folder()?;
        let mut members = etcd::start(own.path()).await?;
        theirs.push(load::measure(&mut members, size).await?);
    }
    Ok((Figures::median(&ours), Figures::median(&theirs)))
}
