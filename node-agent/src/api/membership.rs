//! `Membership`: forming, joining and changing the cluster. Init and Join are for root on this
//! machine alone, over the local socket.

use std::sync::Arc;
use std::time::Duration;

use cluster::tls::{PeerIdentity, client_serial, peer};
use cluster::{Consistency, InitError, JoinError, RestoreError};
use futures::StreamExt as _;
use proto::backup::BackupError;
use proto::v1::membership_client::MembershipClient;
use proto::v1::membership_server::Membership;
use proto::v1::{
    BackupChunk, BackupRequest, CaStatus, CaStatusRequest, ClusterStatus, ClusterStatusRequest,
    CreateTokenRequest, CreateTokenResponse, InitRequest, InitResponse, IssueClientRequest,
    IssueClientResponse, JoinRequest, JoinResponse, ListCertificatesRequest,
    ListCertificatesResponse, NodeFailure, RemoveNodeRequest, RemoveNodeResponse,
    RenewCertificatesRequest, RenewCertificatesResponse, RenewedCertificate, RestoreRequest,
    RestoreResponse, RevokeCertificatesRequest, RevokeCertificatesResponse, RotateCaRequest,
    TransferLeaderRequest, TransferLeaderResponse, Verification, VerifyRequest, WhoAmIRequest,
    WhoAmIResponse,
};
use proto::{Name, NodeId};
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

use super::forward::{Caller, channel};
use super::node::unknown;
use super::{Answers, Api};
use crate::access::may_issue;
use crate::ha::observe;
use crate::node::Node;
use crate::outlook::{Voice, outlook};
use crate::store::store_status;

/// Makes this node a member: implemented by the agent, which owns the data folder.
#[tonic::async_trait]
pub trait Former: Send + Sync + std::fmt::Debug {
    /// `cluster init`.
    async fn init(&self, request: InitRequest) -> Result<InitResponse, Status>;
    /// `cluster join`.
    async fn join(&self, request: JoinRequest) -> Result<JoinResponse, Status>;
    /// `cluster restore`.
    async fn restore(&self, chunks: Streaming<RestoreRequest>) -> Result<RestoreResponse, Status>;
}

/// How long another node may take to get its new certificate.
const RENEWAL_LIMIT: Duration = Duration::from_secs(15);

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

/// The status of a failed `cluster restore`.
#[must_use]
pub(crate) fn restore_status(error: &RestoreError) -> Status {
    let text = error.to_string();
    match error {
        RestoreError::Backup(BackupError::Version(_)) => Status::failed_precondition(text),
        RestoreError::Backup(_) | RestoreError::Content { .. } => Status::invalid_argument(text),
        RestoreError::Read(_) => Status::internal(text),
        RestoreError::Init(error) => init_status(error),
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

impl MembershipService {
    fn former<T>(&self, request: &Request<T>) -> Result<Arc<dyn Former>, Status> {
        match (&self.former, peer(request)) {
            (Some(former), Some(PeerIdentity::LocalRoot)) => Ok(former.clone()),
            _ => Err(Status::permission_denied(
                "a cluster is formed, joined or restored by root on the node itself: run clusterctl there as root, over the agent's local socket (`--socket`)",
            )),
        }
    }
}

/// What the failure of each node would mean.
async fn if_fails(
    node: &Node,
    caller: &Caller,
    status: &ClusterStatus,
) -> Result<Vec<NodeFailure>, Status> {
    let snapshot = observe(node).await?;
    let observations = crate::ha::observations(node, caller, &snapshot).await?;
    let voices: Vec<Voice> = status
        .members
        .iter()
        .filter_map(|of| {
            let member = of.member.as_ref()?;
            let up = matches!(of.health.as_str(), "leader" | "well" | "behind");
            let (id, name) = (NodeId(member.node_id), member.name.clone());
            Some(Voice { id, name, voter: member.voter, up })
        })
        .collect();
    let texts = |names: &[Name]| names.iter().map(ToString::to_string).collect();
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let outlook = outlook(&voices, &snapshot.state, &observations, &snapshot.policy);
    Ok(outlook
        .into_iter()
        .map(|outlook| NodeFailure {
            quorum: outlook.quorum(),
            voters_left: count(outlook.voters_left),
            voters: count(outlook.voters),
            restart: texts(&outlook.restart),
            unplaceable: texts(&outlook.unplaceable),
            wait: texts(&outlook.wait),
            summary: outlook.summary(),
            node: outlook.node,
        })
        .collect())
}

/// A channel to another member, the leader where it is one; `None` where this node is alone.
fn another(node: &Node) -> Result<Option<Channel>, Status> {
    let others = || node.cluster().members().into_iter().filter(|member| member.node_id != node.id);
    let leader = node.cluster().leader();
    let chosen = others().find(|member| Some(member.node_id) == leader);
    let chosen = chosen.or_else(|| others().find(|member| member.voter));
    let Some(chosen) = chosen.or_else(|| others().next()) else { return Ok(None) };
    channel(node, chosen.node_id).map(Some)
}

/// Has one node get a new certificate. That it gets none is part of the answer.
async fn renew_one(node: &Node, caller: &Caller, id: NodeId) -> RenewedCertificate {
    let answer = |certificate, error: String| RenewedCertificate {
        node: node.name_of(id),
        node_id: id.0,
        certificate,
        error,
    };
    if id == node.id {
        return match node.cluster().renew_certificate().await {
            Ok(certificate) => answer(Some(certificate), String::new()),
            Err(error) => answer(None, error.to_string()),
        };
    }
    let asked = async {
        let request = caller.request(RenewCertificatesRequest { node: id.to_string() })?;
        let mut client = MembershipClient::new(channel(node, id)?);
        let renewed = tokio::time::timeout(RENEWAL_LIMIT, client.renew_certificates(request));
        let late = |_| Status::deadline_exceeded("it did not answer in time");
        Ok::<_, Status>(renewed.await.map_err(late)??.into_inner().renewed)
    };
    match asked.await {
        Ok(renewed) => renewed
            .into_iter()
            .find(|of| of.node_id == id.0)
            .unwrap_or_else(|| answer(None, "it gave no answer for itself".to_owned())),
        Err(status) => answer(None, format!("it cannot be asked: {}", status.message())),
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
        let token = created?;
        tracing::info!(user = %caller.user, expires = token.expires_unix_s, "join token made");
        Ok(Response::new(token))
    }

    async fn status(
        &self,
        request: Request<ClusterStatusRequest>,
    ) -> Result<Response<ClusterStatus>, Status> {
        let caller = Caller::of(&request)?;
        let Ok(node) = self.api.node() else {
            return Ok(Response::new(ClusterStatus::default()));
        };
        let mut status = node.cluster().status().await;
        if status.quorum {
            match if_fails(&node, &caller, &status).await {
                Ok(outlook) => status.if_fails = outlook,
                Err(error) => tracing::debug!("what a failure would mean: {}", error.message()),
            }
        }
        Ok(Response::new(status))
    }

    async fn remove_node(
        &self,
        request: Request<RemoveNodeRequest>,
    ) -> Result<Response<RemoveNodeResponse>, Status> {
        let (node, caller) = (self.api.node()?, Caller::of(&request)?);
        let message = request.into_inner();
        let wanted = message.node.clone();
        if node.find(&wanted) == Some(node.id)
            && let Some(channel) = another(&node)?
        {
            // Once it is no member it could not finish: another node does it.
            let mut other = MembershipClient::new(channel);
            let answer = other.remove_node(caller.request(message.clone())?).await;
            // The connections of one that is removed are cut, perhaps before the answer: ask again.
            let answer = match answer {
                Err(cut) if std::error::Error::source(&cut).is_some() => {
                    other.remove_node(caller.request(message)?).await
                }
                answer => answer,
            };
            return match answer {
                Err(status) if cluster::says_removed(&status) => {
                    Ok(Response::new(RemoveNodeResponse {}))
                }
                answer => answer,
            };
        }
        node.cluster().remove_node(&wanted).await?;
        tracing::warn!(node = %wanted, user = %caller.user, "removed from the cluster");
        Ok(Response::new(RemoveNodeResponse {}))
    }

    async fn transfer_leader(
        &self,
        request: Request<TransferLeaderRequest>,
    ) -> Result<Response<TransferLeaderResponse>, Status> {
        let (node, caller) = (self.api.node()?, Caller::of(&request)?);
        let wanted = request.into_inner().node;
        let to = match wanted.as_str() {
            "" => None,
            name => Some(node.find(name).ok_or_else(|| unknown(name))?),
        };
        let leader = node.cluster().transfer_leader(to).await?;
        tracing::info!(leader = %node.name_of(leader), user = %caller.user, "leadership moved");
        Ok(Response::new(TransferLeaderResponse { leader: node.name_of(leader) }))
    }

    async fn verify(
        &self,
        request: Request<VerifyRequest>,
    ) -> Result<Response<Verification>, Status> {
        let (node, caller) = (self.api.node()?, Caller::of(&request)?);
        node.cluster().take_turn(&caller.user)?;
        tracing::info!(user = %caller.user, "comparing the members' copies");
        Ok(Response::new(node.cluster().verify().await?))
    }

    async fn restore(
        &self,
        request: Request<Streaming<RestoreRequest>>,
    ) -> Result<Response<RestoreResponse>, Status> {
        let former = self.former(&request)?;
        former.restore(request.into_inner()).await.map(Response::new)
    }

    type BackupStream = Answers<BackupChunk>;

    async fn backup(
        &self,
        request: Request<BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        let (node, caller) = (self.api.node()?, Caller::of(&request)?);
        let consistency = match request.into_inner().stale {
            true => Consistency::Stale,
            false => Consistency::Linearizable,
        };
        let pieces = node.cluster().backup(consistency).await?;
        tracing::warn!(user = %caller.user, "a backup of the configuration, secrets included, is taken");
        let chunks = pieces.map(|piece| match piece {
            Ok(data) => Ok(BackupChunk { data }),
            Err(error) => Err(Status::from(error)),
        });
        Ok(Response::new(chunks.boxed()))
    }

    async fn issue_client(
        &self,
        request: Request<IssueClientRequest>,
    ) -> Result<Response<IssueClientResponse>, Status> {
        let (node, caller) = (self.api.node()?, Caller::of(&request)?);
        let serial = client_serial(&request);
        let message = request.into_inner();
        may_issue(&caller, &message.name)?;
        if serial.is_some() {
            let counted = node.cluster().take_turn(&caller.user);
            counted.map_err(|error| store_status(&error))?;
            // It is good for long: nobody gets it by a role that this node has not heard the end of.
            node.access.catch_up(&node.store).await.map_err(|error| store_status(&error))?;
            let now = node.access.of(&caller.user).role();
            may_issue(&caller.with_role(now)?, &message.name)?;
        }
        let (name, csr_pem) = (&message.name, &message.csr_pem);
        let issued = node.cluster().issue_client(name, csr_pem, serial.as_deref()).await;
        let mut issued = issued?;
        let role = node.access.of(&message.name).role();
        issued.role = role.map(|role| role.word().to_owned()).unwrap_or_default();
        tracing::info!(client = %message.name, user = %caller.user, "client certificate issued");
        Ok(Response::new(issued))
    }

    async fn who_am_i(
        &self,
        request: Request<WhoAmIRequest>,
    ) -> Result<Response<WhoAmIResponse>, Status> {
        super::whoami::answer(&self.api, &request).map(Response::new)
    }

    async fn list_certificates(
        &self,
        request: Request<ListCertificatesRequest>,
    ) -> Result<Response<ListCertificatesResponse>, Status> {
        Caller::of(&request)?;
        let certificates = self.api.node()?.cluster().certificates().await?;
        Ok(Response::new(ListCertificatesResponse { certificates }))
    }

    async fn renew_certificates(
        &self,
        request: Request<RenewCertificatesRequest>,
    ) -> Result<Response<RenewCertificatesResponse>, Status> {
        let (node, caller) = (self.api.node()?, Caller::of(&request)?);
        let wanted = request.into_inner().node;
        let mut ids: Vec<NodeId> = match wanted.as_str() {
            "" => node.cluster().members().into_iter().map(|member| member.node_id).collect(),
            name => vec![node.find(name).ok_or_else(|| unknown(name))?],
        };
        ids.sort();
        // One after the other: what goes wrong with one is not done to all.
        let mut renewed = Vec::with_capacity(ids.len());
        for id in ids {
            renewed.push(renew_one(&node, &caller, id).await);
        }
        tracing::info!(user = %caller.user, node = %wanted, "certificates renewed on request");
        Ok(Response::new(RenewCertificatesResponse { renewed }))
    }

    async fn rotate_ca(
        &self,
        request: Request<RotateCaRequest>,
    ) -> Result<Response<CaStatus>, Status> {
        let (node, caller) = (self.api.node()?, Caller::of(&request)?);
        let RotateCaRequest { finish, force } = request.into_inner();
        let status = match finish {
            false => node.cluster().rotate_ca(&caller.user).await?,
            true => node.cluster().finish_ca_rotation(&caller.user, force).await?,
        };
        Ok(Response::new(status))
    }

    async fn get_ca_status(
        &self,
        request: Request<CaStatusRequest>,
    ) -> Result<Response<CaStatus>, Status> {
        Caller::of(&request)?;
        Ok(Response::new(self.api.node()?.cluster().ca_status().await?))
    }

    async fn revoke_certificates(
        &self,
        request: Request<RevokeCertificatesRequest>,
    ) -> Result<Response<RevokeCertificatesResponse>, Status> {
        let (node, caller) = (self.api.node()?, Caller::of(&request)?);
        let what = request.into_inner().what;
        let revoked = node.cluster().revoke_certificates(&what, &caller.user).await?;
        tracing::warn!(%what, user = %caller.user, count = revoked.len(), "certificates revoked");
        Ok(Response::new(RevokeCertificatesResponse { revoked }))
    }
}
