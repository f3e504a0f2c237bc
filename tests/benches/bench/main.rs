//! `tests/bench`. `store`: the replicated configuration beside another store. Three members each, as
//! processes on this machine, mutual TLS 1.3, fsync on, the same load from the same clients; ours,
//! theirs, ours, theirs, so that what changes on the machine meanwhile touches both. `idle`: what our
//! three members take while nothing happens. `scale`: what a leader does for many learners.

mod etcd;
mod figures;
mod holdfast;
mod idle;
mod load;
mod member;
mod scale;
#[path = "../../tests/scale/sim/mod.rs"]
mod sim;
mod tls;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use tokio::runtime::Runtime;

use figures::Figures;
use idle::Idle;
use load::Size;

/// Benchmarks on this machine
#[derive(Parser)]
#[command(
    bin_name = "tests/bench",
    after_help = "Examples:\n  tests/bench store --vs etcd\n  tests/bench store --vs etcd --quick -o json\n  tests/bench idle --vms 1000 --seconds 600\n  tests/bench scale --voters 5 --learners 300"
)]
struct Arguments {
    #[command(subcommand)]
    what: What,
    /// How to print the result
    #[arg(short, long, value_enum, default_value = "table", global = true)]
    output: Output,
    /// Where the data folders lie, on a real disk [default: the folder for temporary files]
    #[arg(long, global = true)]
    dir: Option<PathBuf>,
    /// Given by `cargo bench`
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum What {
    /// The replicated configuration beside another store: mutual TLS, fsync
    Store {
        /// Whom to compare with
        #[arg(long, value_enum)]
        vs: Rival,
        /// A tenth of the keys and one round, for a first look
        #[arg(long)]
        quick: bool,
    },
    /// What a cluster takes that does nothing, with many VMs configured and none running
    Idle {
        /// VMs that are configured
        #[arg(long, default_value_t = 1000)]
        vms: usize,
        /// How long it does nothing; the hourly comparison of the copies is among it from 3600 on
        #[arg(long, default_value_t = 300)]
        seconds: u64,
    },
    /// What a leader does for many learners: messages, bytes, processor time, and its failover. The
    /// voters are real, in one process; the learners are stand-ins that count
    Scale {
        /// Members that vote
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(2..=7))]
        voters: u16,
        /// Members that do not
        #[arg(long, default_value_t = 1000)]
        learners: u16,
        /// Writes a second, in the second half
        #[arg(long, default_value_t = 100)]
        writes: u32,
    },
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
    let Arguments { what, output, dir, bench: _ } = Arguments::parse();
    let dir = dir.unwrap_or_else(std::env::temp_dir);
    let runtime = Runtime::new()?;
    match what {
        What::Scale { voters, learners, writes } => {
            scale::measure(usize::from(voters), usize::from(learners), writes)?;
        }
        What::Store { vs: Rival::Etcd, quick } => {
            let size = if quick { Size::QUICK } else { Size::FULL };
            let (ours, theirs) = runtime.block_on(compare(size, &dir))?;
            match output {
                Output::Table => print!("{}", figures::table(&ours, &theirs)),
                Output::Json => println!("{}", figures::json(&ours, &theirs)?),
            }
        }
        What::Idle { vms, seconds } => {
            let folder = tempfile::tempdir_in(&dir).context("no folder for the members")?;
            let idle = Idle { vms, during: Duration::from_secs(seconds) };
            let costs = runtime.block_on(idle::measure(folder.path(), idle))?;
            match output {
                Output::Table => print!("{}", idle::table(&costs)),
                Output::Json => println!("{}", serde_json::to_string_pretty(&costs)?),
            }
        }
    }
    Ok(())
}

async fn compare(size: Size, dir: &Path) -> anyhow::Result<(Figures, Figures)> {
    etcd::present()?;
    let folder = || tempfile::tempdir_in(dir).context("no folder for the members");
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
