//! `Nodes`: what the members are and have, and maintenance.

use cluster::Consistency;
use ha_manager::{ClusterState, NodeView};
use proto::NodeId;
use proto::record::{NodeRecord, Phase, Placement};
use proto::v1::nodes_client::NodesClient;
use proto::v1::nodes_server::Nodes;
use proto::v1::{
    DrainNodeRequest, FenceNodeRequest, FenceNodeResponse, ListNodesRequest, ListNodesResponse,
    RenameNodeRequest, ResumeNodeRequest, ShowNodeRequest, TaskRef,
};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::forward::Caller;
use super::{Api, leader};
use crate::node::Node;

pub(super) fn unknown(name: &str) -> Status {
    Status::not_found(format!("no node `{name}` in this cluster: see `clusterctl node list`"))
}

#[tonic::async_trait]
impl Nodes for Api {
    async fn list(
        &self,
        request: Request<ListNodesRequest>,
    ) -> Result<Response<ListNodesResponse>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        // The leader knows the leases; without one, this node tells what it has applied.
        if !caller.is_forwarded()
            && let Ok(Some(answer)) = leader::ask(&node, |channel| list_of(channel, &caller)).await
        {
            return Ok(answer);
        }
        Ok(Response::new(ListNodesResponse { nodes: list(&node).await? }))
    }

    async fn show(
        &self,
        request: Request<ShowNodeRequest>,
    ) -> Result<Response<proto::v1::Node>, Status> {
        let mut list = Request::new(ListNodesRequest {});
        *list.extensions_mut() = request.extensions().clone();
        *list.metadata_mut() = request.metadata().clone();
        let wanted = request.into_inner().node;
        let nodes = self.list(list).await?.into_inner().nodes;
        let found = nodes
            .into_iter()
            .find(|node| node.name == wanted || node.node_id.to_string() == wanted);
        found.map(Response::new).ok_or_else(|| unknown(&wanted))
    }

    async fn drain(&self, request: Request<DrainNodeRequest>) -> Result<Response<TaskRef>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let wanted = request.into_inner().node;
        let id = node.find(&wanted).ok_or_else(|| unknown(&wanted))?;
        set_maintenance(&node, id, &wanted, true).await?;
        tracing::info!(node = %wanted, user = %caller.user, "draining");
        crate::leading::leave_if_drained(&node, id).await;
        let node_ = node.clone();
        let caller_ = caller.clone();
        let task_id = node
            .tasks
            .spawn("node.drain", &wanted, &caller.user, move |task| async move {
                crate::drain::run(&node_, &caller_, &task, id).await
            })
            .map_err(crate::vms::no_task)?;
        Ok(Response::new(TaskRef { task_id }))
    }

    async fn resume(
        &self,
        request: Request<ResumeNodeRequest>,
    ) -> Result<Response<proto::v1::Node>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let wanted = request.get_ref().node.clone();
        let id = node.find(&wanted).ok_or_else(|| unknown(&wanted))?;
        set_maintenance(&node, id, &wanted, false).await?;
        tracing::info!(node = %wanted, user = %caller.user, "resumed");
        let mut show = Request::new(ShowNodeRequest { node: wanted });
        *show.extensions_mut() = request.extensions().clone();
        *show.metadata_mut() = request.metadata().clone();
        self.show(show).await
    }

    async fn rename(
        &self,
        request: Request<RenameNodeRequest>,
    ) -> Result<Response<proto::v1::Node>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let mut show = Request::new(ShowNodeRequest::default());
        *show.extensions_mut() = request.extensions().clone();
        *show.metadata_mut() = request.metadata().clone();
        let RenameNodeRequest { node: wanted, name } = request.into_inner();
        let id = node.find(&wanted).ok_or_else(|| unknown(&wanted))?;
        let name = super::parse_name(&name)?;
        node.cluster().rename_node(id, &name).await?;
        // The node does it too; one that is down does not.
        let renamed = |record: Option<NodeRecord>| {
            record.map(|record| NodeRecord { name: name.clone(), ..record })
        };
        node.store.update_node(id, renamed).await?;
        tracing::info!(from = %wanted, to = %name, user = %caller.user, "renamed");
        // By id: the node that answers may not have applied the new name yet.
        show.get_mut().node = id.to_string();
        let mut shown = self.show(show).await?;
        shown.get_mut().name = name.to_string();
        Ok(shown)
    }

    async fn fence(
        &self,
        request: Request<FenceNodeRequest>,
    ) -> Result<Response<FenceNodeResponse>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        super::fence::fence(&node, &caller, request.into_inner()).await
    }
}

/// Another node's answer, as the leader.
async fn list_of(channel: Channel, caller: &Caller) -> Result<Response<ListNodesResponse>, Status> {
    NodesClient::new(channel).list(caller.request(ListNodesRequest {})?).await
}

async fn set_maintenance(
    node: &Node,
    id: NodeId,
    name: &str,
    maintenance: bool,
) -> Result<(), Status> {
    let changed = node
        .store
        .update_node(id, |record| record.map(|record| NodeRecord { maintenance, ..record }))
        .await?;
    changed.map(drop).ok_or_else(|| {
        Status::failed_precondition(format!("node `{name}` has not come up yet: it has no record"))
    })
}

/// All nodes as this node knows them; the leader knows the leases too.
async fn list(node: &Node) -> Result<Vec<proto::v1::Node>, Status> {
    let consistency = match node.store.nodes(Consistency::Linearizable).await {
        Ok(_) => Consistency::Linearizable,
        Err(_) => Consistency::Stale,
    };
    let records = node.store.nodes(consistency).await?;
    let fenced = node.store.fenced(consistency).await?;
    let placements = node.store.placements(consistency).await?;
    let documents = node.store.node_documents(consistency).await?;
    let view = |(id, record): (&NodeId, &crate::store::Versioned<NodeRecord>)| {
        let fenced = fenced.get(id).map(|fenced| fenced.revision);
        let view =
            NodeView { record: record.value.clone(), fenced, power_fencing: false, unarmed: false };
        (*id, view)
    };
    let nodes = records.iter().map(view).collect();
    let state = ClusterState { nodes, ..ClusterState::default() };
    let members = node.cluster().members();
    let observations = node.leader.observations(members.iter().map(|member| member.node_id));
    let leader = node.cluster().leader();
    let nodes = members.into_iter().map(|member| {
        let id = member.node_id;
        let record = state.nodes.get(&id).map(|view| view.record.clone());
        let owned = || placements.iter().filter(|(_, p)| p.value.owner == id);
        let look = node.leader.look(id);
        let told = look.report.unwrap_or_default();
        let said = documents.iter().find(|(name, _)| name.as_str() == member.name);
        let said = said.map(|(_, document)| document.clone()).unwrap_or_default();
        proto::v1::Node {
            node_id: id.0,
            name: member.name,
            state: state.node_state(&observations, id).word().to_owned(),
            api_address: member.api_address,
            cpus: record.as_ref().map_or(told.cpus, |record| record.cpus),
            memory_bytes: record.as_ref().map_or(told.memory_bytes, |record| record.memory_bytes),
            memory_reserved_bytes: owned()
                .filter(|(_, p)| reserves(&p.value))
                .map(|(_, p)| proto::vm_needs_bytes(p.value.memory_bytes))
                .fold(0, u64::saturating_add),
            vms: owned().map(|(name, _)| name.to_string()).collect(),
            lease_age_ms: look.age_ms,
            watchdog: record.as_ref().map(|record| record.watchdog.clone()).unwrap_or_default(),
            kvm: record.as_ref().map(|record| record.kvm.clone()).unwrap_or_default(),
            leader: leader == Some(id),
            version: record.as_ref().map(|record| record.version.clone()).unwrap_or_default(),
            draining: record.is_some_and(|record| record.maintenance),
            labels: said.labels.into_iter().map(|(key, value)| (key.to_string(), value)).collect(),
            notes: said.notes,
        }
    });
    Ok(nodes.collect())
}

fn reserves(placement: &Placement) -> bool {
    match placement.phase {
        Phase::Starting
        | Phase::Started
        | Phase::Stopping
        | Phase::Migrating { .. }
        | Phase::Relocating { .. } => true,
        Phase::Stopped | Phase::Recovering | Phase::Error | Phase::Unplaceable | Phase::Frozen => {
            false
        }
    }
}
