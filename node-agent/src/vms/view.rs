//! How a VM looks to a client.

use std::collections::BTreeMap;

use cluster::Consistency;
use proto::record::{Phase, Placement};
use proto::{Name, keys, v1};
use tonic::Status;

use super::unknown_vm;
use crate::clock::unix_ms;
use crate::node::Node;
use crate::store::{RecordError, Versioned};
use crate::supervisor::VmState;

/// A VM from its records. `paused` is known at its owner only.
fn view(node: &Node, name: &Name, placement: &Versioned<Placement>, document: String) -> v1::Vm {
    let value = &placement.value;
    let here = node.supervisor.get(name).filter(|_| value.owner == node.id);
    v1::Vm {
        name: name.to_string(),
        id: value.vm_id.to_string(),
        node: node.name_of(value.owner),
        generation: value.generation.0,
        phase: value.phase.word().to_owned(),
        requested: value.requested.word().to_owned(),
        ha: value.ha,
        cpus: value.cpus,
        memory_bytes: value.memory_bytes,
        document,
        message: message(value, unix_ms()),
        revision: placement.revision.0,
        paused: here.is_some_and(|vm| vm.state == VmState::Paused),
        events: value.events.clone(),
    }
}

/// Why the VM is in its phase, and when a start that failed is tried again.
fn message(placement: &Placement, now_unix_ms: u64) -> String {
    let message = placement.message.clone().unwrap_or_default();
    let left_ms = placement.retry_at_unix_ms.map(|at| at.saturating_sub(now_unix_ms));
    match (placement.phase, left_ms) {
        (Phase::Recovering | Phase::Unplaceable, Some(left_ms)) => {
            let failures = placement.start_failures;
            let left_s = left_ms.div_ceil(1_000);
            format!("{message}; {failures} starts failed, tried again in {left_s} s")
        }
        _ => message,
    }
}

/// All VMs by name; what this node has applied where there is no quorum.
///
/// # Errors
/// The store's.
pub async fn list(node: &Node) -> Result<Vec<v1::Vm>, Status> {
    match list_at(node, Consistency::Linearizable).await {
        Ok(vms) => Ok(vms),
        Err(_) => Ok(list_at(node, Consistency::Stale).await?),
    }
}

async fn list_at(node: &Node, consistency: Consistency) -> Result<Vec<v1::Vm>, RecordError> {
    let documents = node.cluster().range(keys::VMS, "", 0, consistency).await?;
    let mut documents: BTreeMap<String, String> = documents
        .kvs
        .into_iter()
        .map(|kv| (kv.key, String::from_utf8_lossy(&kv.value).into_owned()))
        .collect();
    let placements = node.store.placements(consistency).await?;
    Ok(placements
        .iter()
        .map(|(name, placement)| {
            let document = documents.remove(&keys::vm_document(name)).unwrap_or_default();
            view(node, name, placement, document)
        })
        .collect())
}

/// One VM; what this node has applied where there is no quorum.
///
/// # Errors
/// `NOT_FOUND`, or the store's.
pub async fn show(node: &Node, name: &Name) -> Result<v1::Vm, Status> {
    match show_at(node, name, Consistency::Linearizable).await {
        Ok(vm) => vm.ok_or_else(|| unknown_vm(name)),
        Err(_) => show_at(node, name, Consistency::Stale).await?.ok_or_else(|| unknown_vm(name)),
    }
}

async fn show_at(
    node: &Node,
    name: &Name,
    consistency: Consistency,
) -> Result<Option<v1::Vm>, RecordError> {
    let placement = node.store.record(&keys::placement(name), consistency).await?;
    let Some(placement) = placement else { return Ok(None) };
    let document = node.store.document(name, consistency).await?;
    let document = document.map(|document| document.value).unwrap_or_default();
    Ok(Some(view(node, name, &placement, document)))
}
