//! `clusterctl network`: what VMs' network cards plug into.

use clap::Subcommand;
use proto::v1;
use proto::v1::storage_client::StorageClient;

use crate::connect::Session;
use crate::failure::Failure;
use crate::output;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// All networks
    #[command(visible_alias = "ls", after_help = "Examples:\n  clusterctl network list")]
    List,
    /// Make a network: a bridge of one name on every node, made there when the first VM needs it
    #[command(
        after_help = "Examples:\n  clusterctl network create lan --bridge hfbr0 --uplink eth1"
    )]
    Create {
        /// Its name
        name: String,
        /// The bridge interface; made where missing
        #[arg(long)]
        bridge: String,
        /// A network card of that name on every node, to put into the bridge. An address that it has
        /// answers no more: not one that you reach a node by
        #[arg(long, default_value = "", hide_default_value = true)]
        uplink: String,
    },
    /// Forget a network that no VM uses; bridges that are there stay
    #[command(visible_alias = "rm", after_help = "Examples:\n  clusterctl network delete lan")]
    Delete {
        /// The network
        name: String,
    },
}

pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    let mut client = StorageClient::new(session.channel.clone());
    let format = session.global.output;
    match command {
        Command::List => {
            let networks = client.list_networks(v1::ListNetworksRequest {});
            let networks = session.call("list networks", networks).await?;
            output::print(format, &networks, |networks| table(&networks.networks))
        }
        Command::Create { name, bridge, uplink } => {
            let what = format!("create network {name}");
            let network = Some(v1::Network { name, bridge, uplink });
            let request = v1::CreateNetworkRequest { network };
            let network = session.call(&what, client.create_network(request)).await?;
            output::print(format, &network, |network| table(std::slice::from_ref(network)))
        }
        Command::Delete { name } => {
            let what = format!("delete network {name}");
            let deleted = client.delete_network(v1::DeleteNetworkRequest { name });
            let deleted = session.call(&what, deleted).await?;
            output::print(format, &deleted, |_| format!("done: {what}"))
        }
    }
}

fn table(networks: &[v1::Network]) -> String {
    let rows = networks.iter().map(|network| {
        [network.name.clone(), network.bridge.clone(), output::or_dash(&network.uplink)]
    });
    output::columns(["NETWORK", "BRIDGE", "UPLINK"], rows)
}
