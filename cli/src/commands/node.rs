//! `clusterctl node`: the machines that VMs run on.

use clap::Subcommand;
use proto::v1;
use proto::v1::nodes_client::NodesClient;

use crate::connect::Session;
use crate::failure::Failure;
use crate::output::{self, or_dash, yes};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// All nodes
    #[command(visible_alias = "ls", after_help = "Examples:\n  clusterctl node list")]
    List,
    /// One node
    #[command(after_help = "Examples:\n  clusterctl node show node1 -o json")]
    Show {
        /// The node
        node: String,
    },
    /// Move a node's VMs away live, and keep it empty until `resume`
    #[command(after_help = "Examples:\n  clusterctl node drain node1")]
    Drain {
        /// The node
        node: String,
    },
    /// Release the VMs of a node that is lost for good
    ///
    /// Highly available VMs of a dead node start elsewhere by themselves. All others stay bound to it,
    /// because only a person can know that its machine is off and runs them no more. Refused while
    /// the cluster hears the node.
    #[command(after_help = "Examples:\n  clusterctl node fence node3 --yes-it-is-off")]
    Fence {
        /// The node
        node: String,
        /// The machine is off (not just cut off), and will not run these VMs again
        #[arg(long)]
        yes_it_is_off: bool,
    },
    /// Give a node another name; nothing is restarted
    #[command(after_help = "Examples:\n  clusterctl node rename node1 rack1-a")]
    Rename {
        /// The node
        node: String,
        /// Its new name
        name: String,
    },
    /// End `drain`: the node takes VMs again
    #[command(after_help = "Examples:\n  clusterctl node resume node1")]
    Resume {
        /// The node
        node: String,
    },
}

pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    let mut client = NodesClient::new(session.channel.clone());
    let format = session.global.output;
    match command {
        Command::List => {
            let nodes = session.call("list nodes", client.list(v1::ListNodesRequest {})).await?;
            output::print(format, &nodes, |nodes| list_table(&nodes.nodes))
        }
        Command::Show { node } => {
            let what = format!("show node {node}");
            let node = session.call(&what, client.show(v1::ShowNodeRequest { node })).await?;
            output::print(format, &node, node_table)
        }
        Command::Drain { node } => {
            let what = format!("drain node {node}");
            let task = session.call(&what, client.drain(v1::DrainNodeRequest { node })).await?;
            session.finish(&what, &task.task_id).await
        }
        Command::Fence { node, yes_it_is_off } => {
            let what = format!("fence node {node}");
            let request = v1::FenceNodeRequest { node, machine_is_off: yes_it_is_off };
            let done = session.call(&what, client.fence(request)).await?;
            output::print(format, &done, |done| released_table(&done.vms))
        }
        Command::Rename { node, name } => {
            let what = format!("rename node {node}");
            let request = v1::RenameNodeRequest { node, name };
            let node = session.call(&what, client.rename(request)).await?;
            output::print(format, &node, node_table)
        }
        Command::Resume { node } => {
            let what = format!("resume node {node}");
            let node = session.call(&what, client.resume(v1::ResumeNodeRequest { node })).await?;
            output::print(format, &node, node_table)
        }
    }
}

fn memory(node: &v1::Node) -> String {
    let reserved = output::size(node.memory_reserved_bytes);
    format!("{reserved} of {}", output::size(node.memory_bytes))
}

fn heard(node: &v1::Node) -> String {
    node.lease_age_ms
        .map_or_else(|| "-".to_owned(), |ms| format!("{} ago", output::duration_ms(ms)))
}

fn list_table(nodes: &[v1::Node]) -> String {
    let rows = nodes.iter().map(|node| {
        [
            node.name.clone(),
            if node.draining { format!("{} (draining)", node.state) } else { node.state.clone() },
            yes(node.leader),
            node.vms.len().to_string(),
            node.cpus.to_string(),
            memory(node),
            heard(node),
            or_dash(&node.kvm),
            or_dash(&node.watchdog),
            or_dash(&node.version),
        ]
    });
    let headings =
        ["NODE", "STATE", "LEADER", "VMS", "CPUS", "MEMORY", "HEARD", "KVM", "WATCHDOG", "VERSION"];
    output::columns(headings, rows)
}

fn released_table(vms: &[v1::ReleasedVm]) -> String {
    if vms.is_empty() {
        return "fenced; no VM was bound to it".to_owned();
    }
    let rows = vms.iter().map(|vm| {
        let next = match (vm.ha, vm.bound) {
            (_, true) => "its files are on that node: it can start nowhere else".to_owned(),
            (true, false) if vm.phase == "recovering" => "starts elsewhere by itself".to_owned(),
            (true, false) => "stays as it is".to_owned(),
            (false, false) => format!("clusterctl vm start {}", vm.vm),
        };
        [vm.vm.clone(), yes(vm.ha), vm.phase.clone(), next]
    });
    output::columns(["VM", "HA", "STATE", "NEXT"], rows)
}

fn node_table(node: &v1::Node) -> String {
    output::fields([
        ("name", node.name.clone()),
        ("id", node.node_id.to_string()),
        ("state", node.state.clone()),
        ("draining", yes(node.draining)),
        ("leader", yes(node.leader)),
        ("address", node.api_address.clone()),
        ("cpus", node.cpus.to_string()),
        ("memory", format!("{} reserved", memory(node))),
        ("heard", heard(node)),
        (
            "watchdog",
            if node.watchdog.is_empty() { "none".to_owned() } else { node.watchdog.clone() },
        ),
        ("kvm", node.kvm.clone()),
        ("version", node.version.clone()),
        ("vms", or_dash(&node.vms.join(", "))),
    ])
}
