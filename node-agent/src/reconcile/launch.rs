//! From a placement and its document to the launch description of a VM process on this node.

use cluster::Consistency;
use proto::record::{CpuidRecord, Placement};
use proto::{CpuModel, Name, VmSpec};

use crate::node::Node;
use crate::storage::Pools;
use crate::store::RecordError;
use crate::supervisor::{CpuidLeaf, Launch, ResolveError};

/// Why no launch description could be made.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The configuration could not be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The VM has no document.
    #[error("VM `{0}` has no document")]
    NoDocument(Name),
    /// The document is not valid (any more).
    #[error("the document of VM `{0}`: {1}")]
    Document(Name, proto::DocumentError),
    /// A file, pool or network is missing on this node.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// The nodes' processors have no common model.
    #[error(
        "no CPU model fits all nodes: {0}; set cpu = \"host\" in the VM's document to keep it on one kind of node"
    )]
    Baseline(String),
    /// Nothing resets this machine if it hangs with an HA VM.
    #[error(
        "node {0} has no watchdog, so it runs no HA VMs: load one (softdog at least) or set allow_ha_without_watchdog in its node-agent.toml"
    )]
    NoWatchdog(Name),
    /// The node is here to vote.
    #[error("node {0} is a witness: it votes and runs no VMs")]
    Witness(Name),
    /// A bug or a panic in a blocking thread.
    #[error("internal error: {0}")]
    Internal(String),
}

/// Resolves a VM to this node's files and bridges, with the CPU model. `deadline_ns`: the lease's
/// deadline as it was *before* `placement` was read. However long this takes (storage hangs when
/// networks do), the VM is then never started on a placement that fencing has overtaken.
///
/// # Errors
/// [`LaunchError`]: what is missing, and where.
pub async fn make_launch(
    node: &Node,
    vm: &Name,
    placement: &Placement,
    deadline_ns: Option<u64>,
) -> Result<Launch, LaunchError> {
    may_run(node, placement)?;
    let document = node
        .store
        .document(vm, Consistency::Linearizable)
        .await?
        .ok_or_else(|| LaunchError::NoDocument(vm.clone()))?;
    let spec = VmSpec::parse(&document.value)
        .map_err(|error| LaunchError::Document(vm.clone(), error))?
        .get()
        .clone();
    let pools = Pools::new(node.store.pools(Consistency::Linearizable).await?);
    let networks = node.store.networks(Consistency::Linearizable).await?;
    let cpuid = match spec.cpu {
        CpuModel::Baseline => baseline(node).await?,
        CpuModel::Host => Vec::new(),
    };
    let (vm_id, generation) = (placement.vm_id, placement.generation);
    let resolved = tokio::task::spawn_blocking(move || {
        Launch::resolve(&spec, vm_id, generation, &pools, &networks, true)
    });
    let mut launch = resolved.await.map_err(|e| LaunchError::Internal(e.to_string()))??;
    launch.ha = placement.ha;
    launch.cpuid = cpuid;
    launch.deadline_ns = deadline_ns.filter(|_| placement.ha);
    Ok(launch)
}

/// Whether this node runs such a VM at all, wherever it was decided.
///
/// # Errors
/// [`LaunchError::Witness`], [`LaunchError::NoWatchdog`].
pub fn may_run(node: &Node, placement: &Placement) -> Result<(), LaunchError> {
    if node.config.node.witness {
        return Err(LaunchError::Witness(node.name()));
    }
    if placement.ha && !node.may_run_ha() {
        return Err(LaunchError::NoWatchdog(node.name()));
    }
    Ok(())
}

/// The CPU features that all nodes share; empty where no node reports any.
async fn baseline(node: &Node) -> Result<Vec<CpuidLeaf>, LaunchError> {
    let nodes = node.store.nodes(Consistency::Linearizable).await?;
    let reports: Vec<Vec<CpuidRecord>> = nodes
        .into_values()
        .map(|record| record.value.cpuid)
        .filter(|cpuid| !cpuid.is_empty())
        .collect();
    crate::hardware::intersect(&reports).map_err(LaunchError::Baseline)
}
