//! `vm create`, on the leader: all checks first, then one transaction.

use std::sync::Arc;

use cluster::{Consistency, KeyValue, Txn, TxnOutcome};
use ha_manager::{Observations, VmView, check_target, place};
use proto::record::{DiskClaim, NetworkRecord, Phase, Placement, PoolKind, Requested};
use proto::v1::storage_client::StorageClient;
use proto::v1::{CreateVmRequest, CreateVmResponse, ListImagesRequest};
use proto::{
    ByteSize, Generation, Name, NodeId, Revision, ValidatedVmSpec, VmId, VmSpec, keys, parse_image,
};
use tonic::Status;

use super::{ImageUse, image_uses, show, start};
use crate::api::forward::{Caller, channel, unreachable};
use crate::events::stamped;
use crate::ha::{Snapshot, movable, observe};
use crate::node::Node;
use crate::storage::{ImageKind, Pools, StorageError};
use crate::store::{giving_to, json, store_status};

/// Checks everything and creates the VM; starts it where asked.
///
/// # Errors
/// `INVALID_ARGUMENT`, `ALREADY_EXISTS`, `NOT_FOUND`, `FAILED_PRECONDITION`: nothing was changed.
pub async fn create(
    node: &Arc<Node>,
    caller: &Caller,
    request: CreateVmRequest,
) -> Result<CreateVmResponse, Status> {
    let spec = VmSpec::parse(&request.document)
        .map_err(|error| Status::invalid_argument(error.to_string()))?;
    let snapshot = observe(node).await?;
    let observations = node.leader.observations(snapshot.state.nodes.keys().copied());
    check_name(&snapshot, &spec.name)?;
    check_pools(&snapshot, &spec)?;
    check_networks(&node.store.networks(Consistency::Linearizable).await?, &spec)?;
    check_claims(node, &spec).await?;
    let others = super::specs(node).await?;
    super::check_sharing(&spec, others.values())
        .map_err(|error| Status::failed_precondition(error.to_string()))?;
    let owner = choose(node, &snapshot, &observations, &spec, &request.node)?;
    check_images(node, caller, &snapshot, &spec, owner).await?;
    let placement = Placement {
        vm_id: VmId(uuid::Uuid::new_v4()),
        owner,
        generation: Generation(1),
        phase: Phase::Stopped,
        requested: Requested::Stopped,
        ha: spec.ha.enabled,
        cpus: spec.cpus,
        memory_bytes: spec.memory.0,
        message: None,
        events: vec![stamped(&format!("created by {} on {}", caller.user, node.name_of(owner)))],
        start_failures: 0,
        retry_at_unix_ms: None,
    };
    if request.dry_run {
        let vm = proto::v1::Vm {
            name: spec.name.to_string(),
            node: node.name_of(owner),
            phase: placement.phase.word().to_owned(),
            ha: placement.ha,
            cpus: placement.cpus,
            memory_bytes: placement.memory_bytes,
            document: request.document,
            message: "checked only, nothing was created".to_owned(),
            ..proto::v1::Vm::default()
        };
        return Ok(CreateVmResponse { vm: Some(vm), task_id: String::new() });
    }
    commit(node, &spec, &request.document, &placement).await?;
    tracing::info!(vm = %spec.name, user = %caller.user, "created");
    let task_id = match request.start {
        true => start(node, caller, &spec.name).await?,
        false => String::new(),
    };
    Ok(CreateVmResponse { vm: Some(show(node, &spec.name).await?), task_id })
}

fn name_taken(name: &Name) -> Status {
    Status::already_exists(format!(
        "VM `{name}` already exists: choose another name, or delete it with `clusterctl vm delete {name}`"
    ))
}

fn disk_taken(image: &str, owner: &str) -> Status {
    Status::failed_precondition(format!(
        "disk `{image}` belongs to VM `{owner}`: use another image, delete that VM, or give both \
         `readonly = true`"
    ))
}

fn check_name(snapshot: &Snapshot, name: &Name) -> Result<(), Status> {
    let taken = snapshot.state.vms.contains_key(name) || snapshot.documents.contains_key(name);
    if taken { Err(name_taken(name)) } else { Ok(()) }
}

fn check_pools(snapshot: &Snapshot, spec: &VmSpec) -> Result<(), Status> {
    for ImageUse { image, .. } in image_uses(spec) {
        let (pool, _) = parse_image(image).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let record = snapshot.pools.iter().find(|record| record.name == pool);
        let record = record.ok_or_else(|| Status::from(StorageError::UnknownPool(pool.clone())))?;
        if spec.ha.enabled && record.kind == PoolKind::LocalDir {
            return Err(Status::failed_precondition(format!(
                "`{image}` is in pool `{pool}`, which is local to each node: a highly available VM \
                 needs all its files in shared pools; move it, or set [ha] enabled = false"
            )));
        }
    }
    Ok(())
}

fn check_networks(networks: &[NetworkRecord], spec: &VmSpec) -> Result<(), Status> {
    for nic in &spec.nics {
        if !networks.iter().any(|network| network.name == nic.network) {
            return Err(Status::not_found(format!(
                "network `{0}` does not exist: create it with `clusterctl network create {0}`, or \
                 change the VM's [[nics]]",
                nic.network
            )));
        }
    }
    Ok(())
}

async fn check_claims(node: &Node, spec: &VmSpec) -> Result<(), Status> {
    for disk in &spec.disks {
        if let Some(claim) = node.store.claim(&disk.image).await? {
            return Err(disk_taken(&disk.image, claim.value.vm.as_str()));
        }
    }
    Ok(())
}

/// The node that will own the VM: the wanted one if it can, else the one that `ha-manager` picks.
fn choose(
    node: &Node,
    snapshot: &Snapshot,
    observations: &Observations,
    spec: &VmSpec,
    wanted: &str,
) -> Result<NodeId, Status> {
    let nodes = || snapshot.state.nodes.values().map(|view| &view.record);
    if let Some(largest) = nodes().max_by_key(|record| record.memory_bytes)
        && largest.memory_bytes < spec.memory.0
    {
        return Err(Status::invalid_argument(format!(
            "memory = \"{}\" is more than any node has: the largest, {}, has {} for VMs",
            spec.memory,
            largest.name,
            ByteSize(largest.memory_bytes >> 20 << 20)
        )));
    }
    if wanted.is_empty() {
        return place(&snapshot.state, observations, spec.memory.0, None)
            .map_err(|none| Status::failed_precondition(none.to_string()));
    }
    let id = node.find(wanted).ok_or_else(|| unknown_node(wanted))?;
    fits(snapshot, observations, spec.memory.0, id).map_err(|denied| {
        Status::failed_precondition(format!("node `{wanted}` cannot take the VM: {denied}"))
    })?;
    Ok(id)
}

/// Whether `node` can take a VM of this size that runs nowhere.
pub(super) fn fits(
    snapshot: &Snapshot,
    observations: &Observations,
    memory_bytes: u64,
    node: NodeId,
) -> Result<(), ha_manager::Denied> {
    let nowhere = VmView {
        placement: Placement {
            vm_id: VmId(uuid::Uuid::nil()),
            // No node has this id: it is nowhere yet.
            owner: NodeId(0),
            generation: Generation(0),
            phase: Phase::Stopped,
            requested: Requested::Stopped,
            ha: false,
            cpus: 0,
            memory_bytes,
            message: None,
            events: Vec::new(),
            start_failures: 0,
            retry_at_unix_ms: None,
        },
        mod_revision: Revision(0),
        movable: true,
    };
    check_target(&snapshot.state, observations, &nowhere, node)
}

pub(super) fn unknown_node(name: &str) -> Status {
    Status::not_found(format!("no node `{name}` in this cluster: see `clusterctl node list`"))
}

/// Boot files, and disks that are not to be made, must be there and be what they are used as: in a
/// shared pool for this node, in a local one at the owner.
async fn check_images(
    node: &Node,
    caller: &Caller,
    snapshot: &Snapshot,
    spec: &ValidatedVmSpec,
    owner: NodeId,
) -> Result<(), Status> {
    let made =
        |image: &str| spec.disks.iter().any(|disk| disk.image == image && disk.size.is_some());
    let uses = image_uses(spec).map(|used| (used.image.to_owned(), used.kind, made(used.image)));
    let uses: Vec<(String, ImageKind, bool)> = uses.collect();
    if owner == node.id || movable(spec, &snapshot.pools) {
        let pools = Pools::new(snapshot.pools.clone());
        let check = move || {
            uses.iter().try_for_each(|(image, kind, made)| match pools.existing_as(image, *kind) {
                Err(StorageError::MissingImage { .. }) if *made => Ok(()),
                found => found.map(drop),
            })
        };
        let checked = tokio::task::spawn_blocking(check).await;
        return Ok(checked.map_err(|e| Status::internal(format!("internal error: {e}")))??);
    }
    let request = caller.request(ListImagesRequest::default())?;
    let answer = StorageClient::new(channel(node, owner)?).list_images(request).await;
    let images = answer.map_err(|status| unreachable(node, owner, &status))?.into_inner().images;
    for (image, kind, made) in uses {
        let found = images.iter().find(|found| format!("{}/{}", found.pool, found.name) == image);
        match found {
            Some(found) if found.kind.is_empty() || found.kind == kind.word() => {}
            Some(found) => {
                let reason = format!("it is {} on node {}", found.kind, node.name_of(owner));
                return Err(StorageError::WrongKind { image, used_as: kind, reason }.into());
            }
            None if made => {}
            None => {
                return Err(Status::not_found(format!(
                    "image `{image}` is missing on node {}; import it there with `clusterctl image import`",
                    node.name_of(owner)
                )));
            }
        }
    }
    Ok(())
}

async fn commit(
    node: &Node,
    spec: &VmSpec,
    document: &str,
    placement: &Placement,
) -> Result<(), Status> {
    let (document_key, placement_key) =
        (keys::vm_document(&spec.name), keys::placement(&spec.name));
    let claim = json(&DiskClaim { vm_id: placement.vm_id, vm: spec.name.clone() });
    let mut txn = giving_to(Txn::new(), placement.owner)
        .if_absent(document_key.clone())
        .if_absent(placement_key.clone())
        .put(document_key, document)
        .put(placement_key, json(placement));
    for disk in &spec.disks {
        let key = keys::disk_claim(&disk.image);
        txn = txn.if_absent(key.clone());
        if !disk.readonly {
            txn = txn.put(key, claim.clone());
        }
    }
    match node.cluster().txn(txn).await.map_err(|error| store_status(&error))? {
        TxnOutcome::Committed { .. } => Ok(()),
        TxnOutcome::Conflict { conflicts, .. } => {
            let claim = conflicts.iter().find_map(|kv| {
                let image = kv.key.strip_prefix(keys::DISKS)?;
                let claim: DiskClaim = serde_json::from_slice(&kv.value).ok()?;
                Some((image, claim))
            });
            let lost = |prefix| conflicts.iter().any(|kv: &KeyValue| kv.key.starts_with(prefix));
            Err(match claim {
                Some((image, claim)) => disk_taken(image, claim.vm.as_str()),
                None if lost(keys::FENCED) || lost(keys::REMOVALS) => Status::aborted(format!(
                    "node {} was fenced, or is being removed, meanwhile; try again",
                    node.name_of(placement.owner)
                )),
                None => name_taken(&spec.name),
            })
        }
    }
}
