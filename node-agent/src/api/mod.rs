//! The gRPC services, one file each. Any node takes any request of a client and passes it to the
//! node that can answer: a VM's owner, a task's node, the leader.
//!
//! Owns: where a request goes, how records look to a client. Never: says who may ask (`access`
//! does), changes a VM itself (`vms` does), decides where one runs (`ha-manager` does).

mod config;
mod fence;
pub mod forward;
mod ha;
pub mod leader;
mod membership;
mod named;
mod node;
mod peer;
mod server;
mod storage;
mod task;
mod vm;
mod whoami;

use std::sync::Arc;

use tonic::Status;

pub(crate) use ha::status_of;
pub use membership::Former;
pub(crate) use membership::{init_status, join_status, restore_status};
pub use named::Named;
pub use server::{SocketError, bind_local, serve_enrolment, serve_local, serve_members};

use crate::node::{Node, Slot};

/// Shared by all services: the node, once it belongs to a cluster.
#[derive(Debug, Clone)]
pub struct Api {
    slot: Slot,
}

impl Api {
    /// Over a slot that is filled by `cluster init` or `join`.
    #[must_use]
    pub fn new(slot: Slot) -> Self {
        Self { slot }
    }

    /// The node.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION` before it belongs to a cluster.
    pub(crate) fn node(&self) -> Result<Arc<Node>, Status> {
        self.slot.load_full().ok_or_else(|| {
            Status::failed_precondition(
                "this node belongs to no cluster yet; run `clusterctl cluster init` or \
                 `clusterctl cluster join`",
            )
        })
    }
}

/// A boxed stream of answers.
pub(crate) type Answers<T> = futures::stream::BoxStream<'static, Result<T, Status>>;

/// Parses a name a client gave.
pub(crate) fn parse_name(text: &str) -> Result<proto::Name, Status> {
    text.parse().map_err(|error: proto::InvalidName| Status::invalid_argument(error.to_string()))
}
