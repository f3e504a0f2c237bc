//! `Peer`, between agents only: heartbeats to the leader, and a migration's target side.

use cluster::Consistency;
use proto::NodeId;
use proto::record::Phase;
use proto::v1::peer_server::Peer;
use proto::v1::{
    AbortMigrationRequest, AbortMigrationResponse, FinishMigrationRequest, FinishMigrationResponse,
    HeartbeatRequest, HeartbeatResponse, PrepareMigrationRequest, PrepareMigrationResponse,
};
use tonic::{Request, Response, Status};

use super::{Api, parse_name};
use crate::migration::{Incoming, MigrationError};
use crate::node::Node;
use crate::storage::Pools;

impl From<MigrationError> for Status {
    fn from(error: MigrationError) -> Self {
        let text = error.to_string();
        match error {
            MigrationError::Request(_) => Self::invalid_argument(text),
            MigrationError::UnknownIncoming { .. } => Self::not_found(text),
            MigrationError::Cancelled(_) => Self::cancelled(text),
            MigrationError::Vm(_)
            | MigrationError::State { .. }
            | MigrationError::Target { .. }
            | MigrationError::Failed { .. }
            | MigrationError::Refused { .. }
            | MigrationError::Lost { .. }
            | MigrationError::Resolve(_)
            | MigrationError::Start(_) => Self::failed_precondition(text),
        }
    }
}

fn incoming(node: &Node) -> Incoming {
    let advertise = node.config.advertised_migration();
    let listen = node.config.migration_listen();
    Incoming::new(node.supervisor.clone(), listen, advertise)
}

#[tonic::async_trait]
impl Peer for Api {
    async fn heartbeat(
        &self,
        request: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatResponse>, Status> {
        let node = self.node()?;
        let from = node.cluster().require_member(&request)?;
        let message = request.into_inner();
        if message.node_id != from.0 {
            return Err(Status::permission_denied("a node sends heartbeats for itself only"));
        }
        node.leader.heartbeat(&node, from, message).await.map(Response::new)
    }

    async fn prepare_migration(
        &self,
        request: Request<PrepareMigrationRequest>,
    ) -> Result<Response<PrepareMigrationResponse>, Status> {
        let node = self.node()?;
        let from = node.cluster().require_member(&request)?;
        let message = request.into_inner();
        let vm = parse_name(&message.vm)?;
        let _job = node.jobs.begin(&vm).await;
        expected(&node, &vm, from, message.generation).await?;
        let pools = Pools::new(node.store.pools(Consistency::Linearizable).await?);
        let networks = node.store.networks(Consistency::Linearizable).await?;
        let deadline_ns = node.lease.deadline_ns();
        let prepared = incoming(&node).prepare(&message, &pools, &networks, deadline_ns).await?;
        tracing::info!(%vm, from = %node.name_of(from), "receiving by live migration");
        Ok(Response::new(prepared))
    }

    async fn finish_migration(
        &self,
        request: Request<FinishMigrationRequest>,
    ) -> Result<Response<FinishMigrationResponse>, Status> {
        let node = self.node()?;
        node.cluster().require_member(&request)?;
        let message = request.into_inner();
        let vm = parse_name(&message.vm)?;
        let _job = node.jobs.begin(&vm).await;
        // Before the placement is read: until then nobody else is given what it says is ours.
        let deadline_ns = node.lease.deadline_ns();
        // The source's word is a hint: the commit itself is read, confirmed with a quorum.
        let placement = node.store.placement(&vm).await?;
        let committed = placement.filter(|placement| {
            let value = &placement.value;
            value.owner == node.id
                && value.generation.0 == message.generation
                && value.phase == Phase::Started
        });
        let Some(committed) = committed else {
            return Err(Status::failed_precondition(format!(
                "VM `{vm}` does not belong to node {} at generation {}",
                node.name(),
                message.generation
            )));
        };
        let (id, generation) = (&message.migration_id, committed.value.generation);
        let done = incoming(&node).run(&vm, id, generation, deadline_ns).await?;
        tracing::info!(%vm, %generation, "runs here after a live migration");
        Ok(Response::new(done))
    }

    async fn abort_migration(
        &self,
        request: Request<AbortMigrationRequest>,
    ) -> Result<Response<AbortMigrationResponse>, Status> {
        let node = self.node()?;
        node.cluster().require_member(&request)?;
        let message = request.into_inner();
        let vm = parse_name(&message.vm)?;
        let _job = node.jobs.begin(&vm).await;
        // Never against the placement: a commit that the source does not know of counts.
        let placement = node.store.placement(&vm).await?;
        if placement.is_some_and(|placement| placement.value.owner == node.id) {
            return Err(Status::failed_precondition(format!("VM `{vm}` belongs to this node now")));
        }
        incoming(&node).abort(&vm, &message.migration_id, &message.reason).await?;
        Ok(Response::new(AbortMigrationResponse {}))
    }
}

/// Whether the placement says that `from` is moving this VM to this node.
async fn expected(
    node: &Node,
    vm: &proto::Name,
    from: NodeId,
    generation: u64,
) -> Result<(), Status> {
    let placement = node.store.placement(vm).await?;
    let placement = placement.ok_or_else(|| super::super::vms::unknown_vm(vm))?.value;
    let moving = placement.phase == Phase::Migrating { target: node.id };
    crate::reconcile::may_run(node, &placement)
        .map_err(|error| Status::failed_precondition(error.to_string()))?;
    if placement.owner == from && placement.generation.0 == generation && moving {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "VM `{vm}` is not being moved from {} to {}: it is {} at {}, generation {}",
        node.name_of(from),
        node.name(),
        placement.phase.word(),
        node.name_of(placement.owner),
        placement.generation
    )))
}
