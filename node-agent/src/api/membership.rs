//! `Membership`: forming, joining and changing the cluster. Init and Join are for root on this
//! machine alone, over the local socket.

use std::sync::Arc;

use cluster::tls::{PeerIdentity, peer};
use cluster::{InitError, JoinError, MembershipError};
use proto::v1::membership_server::Membership;
use proto::v1::{
    ClusterStatus, ClusterStatusRequest, CreateTokenRequest, CreateTokenResponse, InitRequest,
    InitResponse, IssueClientRequest, IssueClientResponse, JoinRequest, JoinResponse,
    RemoveNodeRequest, RemoveNodeResponse,
};
use tonic::{Request, Response, Status};

use super::Api;
use super::forward::Caller;
use crate::store::store_status;

/// Makes this node a member: implemented by the agent, which owns the data folder.
#[tonic::async_trait]
pub trait Former: Send + Sync + std::fmt::Debug {
    /// `cluster init`.
    async fn init(&self, request: InitRequest) -> Result<InitResponse, Status>;
    /// `cluster join`.
    async fn join(&self, request: JoinRequest) -> Result<JoinResponse, Status>;
}

/// The service: with a [`Former`] on the local socket, without one elsewhere.
#[derive(Debug, Clone)]
pub(super) struct MembershipService {
    pub(super) api: Api,
    pub(super) former: Option<Arc<dyn Former>>,
}

/// The status of a failed `cluster init`.
#[must_use]
pub(crate) fn init_status(error: &InitError) -> Status {
    let text = error.to_string();
    match error {
        InitError::Name(_) => Status::invalid_argument(text),
        InitError::Identity(_) | InitError::Open(_) => Status::internal(text),
        InitError::Store(error) => store_status(error),
    }
}

/// The status of a failed `cluster join`.
#[must_use]
pub(crate) fn join_status(error: &JoinError) -> Status {
    let text = error.to_string();
    match error {
        JoinError::Name(_) | JoinError::Malformed(_) => Status::invalid_argument(text),
        JoinError::Refused(_) | JoinError::WrongCluster { .. } => Status::permission_denied(text),
        JoinError::Unreachable(_) => Status::unavailable(text),
        JoinError::Identity(_) | JoinError::Open(_) => Status::internal(text),
    }
}

fn status_of(error: &MembershipError) -> Status {
    let text = error.to_string();
    match error {
        MembershipError::UnknownNode(_) => Status::not_found(text),
        MembershipError::QuorumAtRisk { .. }
        | MembershipError::LastNode(_)
        | MembershipError::Itself(_) => Status::failed_precondition(text),
        MembershipError::Invalid(_) => Status::invalid_argument(text),
        MembershipError::Timeout(_) => Status::deadline_exceeded(text),
        MembershipError::Store(error) => store_status(error),
    }
}

impl MembershipService {
    fn former<T>(&self, request: &Request<T>) -> Result<Arc<dyn Former>, Status> {
        match (&self.former, peer(request)) {
            (Some(former), Some(PeerIdentity::LocalRoot)) => Ok(former.clone()),
            _ => Err(Status::permission_denied(
                "a cluster is formed or joined by root on the node itself, over its local socket",
            )),
        }
    }
}

#[tonic::async_trait]
impl Membership for MembershipService {
    async fn init(&self, request: Request<InitRequest>) -> Result<Response<InitResponse>, Status> {
        let former = self.former(&request)?;
        former.init(request.into_inner()).await.map(Response::new)
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let former = self.former(&request)?;
        former.join(request.into_inner()).await.map(Response::new)
    }

    async fn create_token(
        &self,
        request: Request<CreateTokenRequest>,
    ) -> Result<Response<CreateTokenResponse>, Status> {
        let (node, caller) = (self.api.node()?, Caller::of(&request)?);
        let created = node.cluster().create_token(request.into_inner().ttl_s).await;
        let token = created.map_err(|error| status_of(&error))?;
        tracing::info!(user = %caller.user, expires = token.expires_unix_s, "join token made");
        Ok(Response::new(token))
    }

    async fn status(
        &self,
        request: Request<ClusterStatusRequest>,
    ) -> Result<Response<ClusterStatus>, Status> {
        Caller::of(&request)?;
        let Ok(node) = self.api.node() else {
            return Ok(Response::new(ClusterStatus::default()));
        };
        Ok(Response::new(node.cluster().status().await))
    }

    async fn remove_node(
        &self,
        request: Request<RemoveNodeRequest>,
    ) -> Result<Response<RemoveNodeResponse>, Status> {
        let (node, caller) = (self.api.node()?, Caller::of(&request)?);
        let name = request.into_inner().node;
        let id = node
            .find(&name)
            .ok_or_else(|| status_of(&MembershipError::UnknownNode(name.clone())))?;
        let placements = node.store.placements(cluster::Consistency::Linearizable).await?;
        let owned: Vec<&str> = placements
            .iter()
            .filter(|(_, placement)| placement.value.owner == id)
            .map(|(vm, _)| vm.as_str())
            .collect();
        if !owned.is_empty() {
            return Err(Status::failed_precondition(format!(
                "node `{name}` still owns VMs: {}; drain it (`clusterctl node drain {name}`) or \
                 delete them first",
                owned.join(", ")
            )));
        }
        node.cluster().remove_node(id).await.map_err(|error| status_of(&error))?;
        tracing::warn!(node = %name, user = %caller.user, "removed from the cluster");
        let txn = cluster::Txn::new().delete(proto::keys::node(id)).delete(proto::keys::fenced(id));
        if let Err(error) = node.cluster().txn(txn).await {
            tracing::warn!(node = %name, "its records are not removed yet: {error}");
        }
        Ok(Response::new(RemoveNodeResponse {}))
    }

    async fn issue_client(
        &self,
        request: Request<IssueClientRequest>,
    ) -> Result<Response<IssueClientResponse>, Status> {
        let (node, caller) = (self.api.node()?, Caller::of(&request)?);
        let message = request.into_inner();
        let issued = node.cluster().issue_client(&message.name, &message.csr_pem).await;
        let issued = issued.map_err(|error| status_of(&error))?;
        tracing::info!(client = %message.name, user = %caller.user, "client certificate issued");
        Ok(Response::new(issued))
    }
}
