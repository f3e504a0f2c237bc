//! The lab's tools inside a node: `serve` runs programs for the host (see `tests::lab::exec`),
//! `talk` keeps a TCP connection to a guest and reports what a client of that guest would notice,
//! `knock` calls at a port as somebody who does not belong there.

mod knock;
mod serve;
mod talk;

use clap::Parser;

#[derive(Parser)]
#[command(about = "The lab's tools inside a node")]
enum Arguments {
    /// Runs programs for the lab's host.
    Serve {
        /// File that holds the lab's secret.
        #[arg(long)]
        token_file: std::path::PathBuf,
    },
    /// Keeps talking to a guest; prints a JSON report at the end, or at SIGTERM or SIGINT.
    Talk(talk::Options),
    /// Calls at a port as somebody who does not belong there; prints what came of it (JSON).
    Knock(knock::Options),
    /// Waits until a guest's probe answers and prints what it says of itself (JSON).
    Await {
        /// The guest's probe, host:port.
        address: std::net::SocketAddr,
        /// Give up after this many seconds.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse() {
        Arguments::Serve { token_file } => serve::serve(&token_file),
        Arguments::Talk(options) => talk::talk(&options),
        Arguments::Knock(options) => knock::knock(&options),
        Arguments::Await { address, seconds } => talk::await_status(address, seconds),
    }
}
