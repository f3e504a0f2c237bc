//! `vm create`, on the leader: writes the document; and where a new VM can be.

use std::sync::Arc;

use cluster::FileChange;
use ha_manager::{Mobility, Observations, VmView, check_start, place};
use proto::record::{Phase, Placement, PoolRecord, Requested};
use proto::v1::storage_client::StorageClient;
use proto::v1::{CreateVmRequest, CreateVmResponse, ListImagesRequest};
use proto::{Generation, Name, NodeId, Revision, ValidatedVmSpec, VmId, VmSpec, keys};
use tonic::Status;

use super::{image_uses, show, start};
use crate::api::forward::{Caller, channel, unreachable};
use crate::documents::{self, Refusal, Wanted};
use crate::ha::{Snapshot, movable};
use crate::node::Node;
use crate::storage::{ImageKind, Pools, StorageError};

/// Checks everything and creates the VM; starts it where asked.
///
/// # Errors
/// `INVALID_ARGUMENT`, `ALREADY_EXISTS`, `NOT_FOUND`, `FAILED_PRECONDITION`: nothing was changed.
pub async fn create(
    node: &Arc<Node>,
    caller: &Caller,
    request: CreateVmRequest,
) -> Result<CreateVmResponse, Status> {
    let invalid = |error: proto::DocumentError| Status::invalid_argument(error.to_string());
    let spec = VmSpec::parse(&request.document).map_err(invalid)?;
    let path = keys::vm_document(&spec.name);
    let change = FileChange::write(path, request.document.clone()).if_revision(Revision(0));
    let wanted =
        Wanted { node: request.node.clone(), dry_run: request.dry_run, make_folders: false };
    let done = match documents::commit(node, caller, &[change], &wanted).await? {
        Ok(done) => done,
        Err(refusals) => {
            let taken = |refusal: &&Refusal| refusal.present.is_some();
            return Err(match (refusals.iter().find(taken), refusals.first()) {
                (Some(_), _) | (None, None) => name_taken(&spec.name),
                (None, Some(refusal)) => refusal.status(),
            });
        }
    };
    if request.dry_run {
        let owner = done.owner.map(|owner| node.name_of(owner)).unwrap_or_default();
        let vm = checked(&spec, owner, request.document);
        return Ok(CreateVmResponse { vm: Some(vm), task_id: String::new() });
    }
    tracing::info!(vm = %spec.name, user = %caller.user, "created");
    let task_id = match request.start {
        true => start(node, caller, &spec.name).await?,
        false => String::new(),
    };
    Ok(CreateVmResponse { vm: Some(show(node, &spec.name).await?), task_id })
}

/// What a VM that was only checked looks like.
fn checked(spec: &VmSpec, node: String, document: String) -> proto::v1::Vm {
    proto::v1::Vm {
        name: spec.name.to_string(),
        node,
        phase: Phase::Stopped.word().to_owned(),
        ha: spec.ha.enabled,
        cpus: spec.cpus,
        memory_bytes: spec.memory.0,
        document,
        message: "checked only, nothing was created".to_owned(),
        ..proto::v1::Vm::default()
    }
}

fn name_taken(name: &Name) -> Status {
    Status::already_exists(format!(
        "VM `{name}` already exists: choose another name, or delete it with `clusterctl vm delete {name}`"
    ))
}

/// The node that will own the VM: the wanted one if it can, else the one that `ha-manager` picks.
pub(crate) fn choose(
    node: &Node,
    snapshot: &Snapshot,
    observations: &Observations,
    spec: &VmSpec,
    wanted: &str,
) -> Result<NodeId, Status> {
    if wanted.is_empty() {
        let nowhere = nowhere(spec);
        return place(&snapshot.state, observations, &snapshot.policy, &spec.name, &nowhere, false)
            .map_err(|none| Status::failed_precondition(none.to_string()));
    }
    let id = node.find(wanted).ok_or_else(|| unknown_node(wanted))?;
    fits(snapshot, observations, spec, id).map_err(|denied| {
        Status::failed_precondition(format!("node `{wanted}` cannot take the VM: {denied}"))
    })?;
    Ok(id)
}

/// Whether `node` can take a VM of this size that runs nowhere.
fn fits(
    snapshot: &Snapshot,
    observations: &Observations,
    spec: &VmSpec,
    node: NodeId,
) -> Result<(), ha_manager::Denied> {
    let (state, policy) = (&snapshot.state, &snapshot.policy);
    check_start(state, observations, policy, &spec.name, &nowhere(spec), node)
}

/// A VM that is to be made.
fn nowhere(spec: &VmSpec) -> VmView {
    VmView {
        placement: Placement {
            vm_id: VmId(uuid::Uuid::nil()),
            // No node has this id: it is nowhere yet.
            owner: NodeId(0),
            generation: Generation(0),
            phase: Phase::Stopped,
            requested: Requested::Stopped,
            ha: spec.ha.enabled,
            cpus: spec.cpus,
            memory_bytes: spec.memory.0,
            message: None,
            events: Vec::new(),
            start_failures: 0,
            tried: Vec::new(),
            home: None,
            lock: None,
            retry_at_unix_ms: None,
        },
        mod_revision: Revision(0),
        mobility: Mobility::Live,
        wishes: Arc::default(),
    }
}

pub(super) fn unknown_node(name: &str) -> Status {
    Status::not_found(format!("no node `{name}` in this cluster: see `clusterctl node list`"))
}

/// Boot files, and disks that are not to be made, must be there and be what they are used as: in a
/// shared pool for this node, in a local one at the owner.
pub(crate) async fn check_images(
    node: &Node,
    caller: &Caller,
    pools: &[PoolRecord],
    spec: &ValidatedVmSpec,
    owner: NodeId,
) -> Result<(), Status> {
    let made =
        |image: &str| spec.disks.iter().any(|disk| disk.image == image && disk.size.is_some());
    let uses = image_uses(spec).map(|used| (used.image.to_owned(), used.kind, made(used.image)));
    let uses: Vec<(String, ImageKind, bool)> = uses.collect();
    if owner == node.id || movable(spec, pools) {
        let pools = Pools::new(pools.to_vec());
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
