//! What is done to VMs on request: create, start, stop, move, delete. The gRPC side is `api/vm.rs`.
//!
//! Each change that takes time is a task. Placements change only by transactions that compare
//! them; the owner's reconciler does what they say, except where a task holds the VM's job.
//!
//! Never: chooses a node by itself (`ha-manager` does).

mod create;
mod images;
mod lifecycle;
mod migrate;
mod shutdowns;
mod start;
mod view;

use std::collections::BTreeMap;

use cluster::Consistency;
use proto::{Name, VmSpec, keys};

pub use create::create;
pub(crate) use create::{check_images, choose};
pub use images::{ImageShared, ImageUse, check_sharing, image_uses};
pub use lifecycle::{delete, pause, reset, resume, shutdown, stop};
pub use migrate::migrate;
pub use shutdowns::Shutdowns;
pub use start::start;
pub use view::{list, show};

use crate::node::Node;
use crate::store::RecordError;

/// All VMs' documents.
///
/// # Errors
/// [`RecordError`].
pub async fn specs(node: &Node) -> Result<BTreeMap<Name, VmSpec>, RecordError> {
    let range = node.cluster().range(keys::VMS, "", 0, Consistency::Linearizable).await?;
    let spec = |kv: &cluster::KeyValue| {
        let spec = VmSpec::parse(&String::from_utf8_lossy(&kv.value)).ok()?;
        Some((spec.name.clone(), spec.get().clone()))
    };
    Ok(range.kvs.iter().filter_map(spec).collect())
}

/// The status of a VM that does not exist.
pub(crate) fn unknown_vm(vm: &Name) -> tonic::Status {
    tonic::Status::not_found(format!("no VM `{vm}` in this cluster: see `clusterctl vm list`"))
}

/// A task that cannot be made for want of its number.
pub(crate) fn no_task(error: std::io::Error) -> tonic::Status {
    tonic::Status::internal(format!("cannot write the task counter in the data folder: {error}"))
}
