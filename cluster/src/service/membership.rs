//! `Membership`, on an agent that is a member.

use std::sync::Arc;

use proto::v1;
use proto::v1::membership_server::Membership;
use tonic::{Request, Response, Status};

use crate::membership::{self, membership_status};
use crate::node::Node;
use crate::tls::require_any;

/// Changes and shows the membership.
#[derive(Debug, Clone)]
pub struct MembershipService {
    node: Arc<Node>,
}

impl MembershipService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }

    fn member_already(&self) -> Status {
        let record = &self.node.identity().record;
        Status::failed_precondition(format!(
            "this agent is node `{}` of cluster `{}` already; a node belongs to one cluster",
            record.node_name, record.cluster_name
        ))
    }
}

#[tonic::async_trait]
impl Membership for MembershipService {
    async fn init(
        &self,
        request: Request<v1::InitRequest>,
    ) -> Result<Response<v1::InitResponse>, Status> {
        require_any(&request)?;
        Err(self.member_already())
    }

    async fn join(
        &self,
        request: Request<v1::JoinRequest>,
    ) -> Result<Response<v1::JoinResponse>, Status> {
        require_any(&request)?;
        Err(self.member_already())
    }

    async fn create_token(
        &self,
        request: Request<v1::CreateTokenRequest>,
    ) -> Result<Response<v1::CreateTokenResponse>, Status> {
        require_any(&request)?;
        let made = membership::create_token(&self.node, request.into_inner().ttl_s).await;
        made.map(Response::new).map_err(membership_status)
    }

    async fn status(
        &self,
        request: Request<v1::ClusterStatusRequest>,
    ) -> Result<Response<v1::ClusterStatus>, Status> {
        require_any(&request)?;
        Ok(Response::new(membership::status(&self.node).await))
    }

    async fn remove_node(
        &self,
        request: Request<v1::RemoveNodeRequest>,
    ) -> Result<Response<v1::RemoveNodeResponse>, Status> {
        require_any(&request)?;
        let wanted = request.into_inner().node;
        let by_name = self.node.members().into_iter().find(|member| member.name == wanted);
        let by_id = || wanted.parse().ok().map(proto::NodeId);
        let id = by_name.map(|member| member.node_id).or_else(by_id).ok_or_else(|| {
            membership_status(crate::MembershipError::UnknownNode(wanted.clone()))
        })?;
        refuse_owner(&self.node, id).await?;
        let removed = membership::remove_node(&self.node, id).await;
        removed.map(|()| Response::new(v1::RemoveNodeResponse {})).map_err(membership_status)
    }

    async fn issue_client(
        &self,
        request: Request<v1::IssueClientRequest>,
    ) -> Result<Response<v1::IssueClientResponse>, Status> {
        require_any(&request)?;
        let request = request.into_inner();
        let issued = membership::issue_client(&self.node, &request.name, &request.csr_pem).await;
        issued.map(Response::new).map_err(membership_status)
    }
}

/// A node that owns VMs is not removed: they would be nobody's.
async fn refuse_owner(node: &Node, id: proto::NodeId) -> Result<(), Status> {
    let linearizable = crate::Consistency::Linearizable;
    let placements = node.range(proto::keys::PLACEMENTS, "", 0, linearizable, false).await;
    let mut owned = Vec::new();
    for kv in placements.map_err(membership::status_of)?.kvs {
        let placement: proto::record::Placement = serde_json::from_slice(&kv.value)
            .map_err(|error| Status::data_loss(format!("the record `{}`: {error}", kv.key)))?;
        if placement.owner == id {
            owned.push(kv.key.trim_start_matches(proto::keys::PLACEMENTS).to_owned());
        }
    }
    if owned.is_empty() {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "the node still owns VMs ({}); move them away with `clusterctl node drain`, or delete them, first",
        owned.join(", ")
    )))
}
