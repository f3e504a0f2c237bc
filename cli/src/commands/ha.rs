//! `clusterctl ha`: high availability.

pub(crate) mod simulate;

use clap::Subcommand;
use proto::v1;
use proto::v1::ha_client::HaClient;

use crate::connect::Session;
use crate::failure::Failure;
use crate::output::{self, or_dash};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Nodes with their protection, VMs with the reason why each is where it is
    #[command(after_help = "Examples:\n  clusterctl ha status")]
    Status,
    /// Play a scenario: what happens if a node dies, hangs, is cut off? No cluster is asked
    ///
    /// The decisions are the real ones; nodes, network, store, watchdogs and VM processes are a model
    /// in simulated time. Prints what happens, and checks at each instant that no VM runs twice. Exit
    /// status 1: a promise was broken, or what the scenario expects did not come out.
    #[command(after_help = "Examples:\n  clusterctl ha simulate node-dies.toml\n  \
        clusterctl ha simulate node-dies.toml -o json | jq .moves")]
    Simulate(simulate::Simulate),
}

pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    let mut client = HaClient::new(session.channel.clone());
    match command {
        Command::Simulate(command) => simulate::simulate(session.global.output, &command),
        Command::Status => {
            let status = client.status(v1::HaStatusRequest {});
            let status = session.call("see the HA status", status).await?;
            output::print(session.global.output, &status, table)
        }
    }
}

fn table(status: &v1::HaStatus) -> String {
    let quorum = if status.quorum { "yes" } else { "NO: HA VMs stop when their leases end" };
    let head = output::fields([
        ("quorum", quorum.to_owned()),
        ("leader", or_dash(&status.leader)),
        ("lease", output::duration_ms(status.lease_ms.into())),
    ]);
    let nodes = status.nodes.iter().map(|node| {
        let heard = node.lease_age_ms.map(|ms| format!("{} ago", output::duration_ms(ms)));
        let heard = heard.unwrap_or_else(|| "-".to_owned());
        [node.name.clone(), node.state.clone(), heard, or_dash(&node.protection)]
    });
    let nodes = output::columns(["NODE", "STATE", "HEARD", "PROTECTION"], nodes);
    let resources = status.resources.iter().map(|resource| {
        [
            resource.vm.clone(),
            resource.state.clone(),
            resource.requested.clone(),
            or_dash(&resource.node),
            resource.generation.to_string(),
            or_dash(&resource.reason),
        ]
    });
    let headings = ["VM", "STATE", "REQUESTED", "NODE", "GENERATION", "REASON"];
    let resources = output::columns(headings, resources);
    [head, nodes, resources, status.report.join("\n")].join("\n\n").trim_end().to_owned()
}
