//! The handle that the agent works with.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use futures::stream::BoxStream;
use proto::v1::enrolment_server::EnrolmentServer;
use proto::v1::raft_server::RaftServer;
use proto::{Name, NodeId, Revision, keys, v1};
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::consensus::{Forwarded, RaftService};
use crate::host::Listen;
use crate::machine::ANSWER_BYTES;
use crate::node::Node;
use crate::service::EnrolmentService;
use crate::tls::{self, Admit, TlsConnection};
use crate::{
    Confirmed, Consistency, History, KeyValue, Leadership, Member, MembershipError, NotLeader,
    OpenError, RangeResult, ReadAtError, StoreError, Txn, TxnOutcome, WatchBatch, WatchError,
    authority, backup, certificates, membership, removal, rename, verify,
};

/// The largest gRPC message taken from clients and nodes, bytes.
const MESSAGE_MAX: usize = 64 << 20;

/// Refuses private keys.
fn public(key: &str) -> Result<(), StoreError> {
    if key.starts_with(keys::PRIV) { Err(StoreError::Private(key.to_owned())) } else { Ok(()) }
}

/// A member of a cluster; cheap to clone.
#[derive(Debug, Clone)]
pub struct Cluster {
    node: Arc<Node>,
}

impl Cluster {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }

    pub(crate) fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// This node's id.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        self.node.id()
    }
    /// This node's name, and each new one.
    #[must_use]
    pub fn node_name(&self) -> watch::Receiver<String> {
        self.node.label()
    }
    /// The cluster's id, which stands in every certificate.
    #[must_use]
    pub fn cluster_id(&self) -> &str {
        &self.node.identity().cluster_id
    }
    /// The cluster's name.
    #[must_use]
    pub fn cluster_name(&self) -> &str {
        &self.node.identity().cluster_name
    }
    /// SHA-256, hexadecimal, of the DER of the certificate of the CA that signs.
    #[must_use]
    pub fn ca_fingerprint(&self) -> String {
        self.node.trusted().signer_fingerprint()
    }

    /// One key, and the store's revision that the answer belongs to.
    ///
    /// # Errors
    /// [`StoreError`]; within the request timeout.
    pub async fn get(
        &self,
        key: &str,
        consistency: Consistency,
    ) -> Result<(Option<KeyValue>, Revision), StoreError> {
        public(key)?;
        self.node.get(key, consistency).await
    }
    /// Keys with a prefix, in order, after `after` (empty: from the first), at most `limit` (0: all).
    ///
    /// # Errors
    /// [`StoreError`]; within the request timeout.
    pub async fn range(
        &self,
        prefix: &str,
        after: &str,
        limit: usize,
        consistency: Consistency,
    ) -> Result<RangeResult, StoreError> {
        self.node.range(prefix, after, limit, consistency, false).await
    }
    /// One key as it was right after a revision. That is the same wherever it is read; a revision
    /// that this node has not applied yet is waited for, within the request timeout.
    ///
    /// # Errors
    /// [`ReadAtError::Compacted`]: it is too long ago.
    pub async fn get_at(
        &self,
        key: &str,
        revision: Revision,
    ) -> Result<Option<KeyValue>, ReadAtError> {
        public(key)?;
        self.node.get_at(key, revision).await
    }
    /// As [`Cluster::range`], right after a revision.
    ///
    /// # Errors
    /// [`ReadAtError::Compacted`]: it is too long ago.
    pub async fn range_at(
        &self,
        prefix: &str,
        after: &str,
        limit: usize,
        revision: Revision,
    ) -> Result<RangeResult, ReadAtError> {
        self.node.range_at(prefix, after, limit, revision).await
    }
    /// Who changed what, the newest first: of one key (`exact`) or of all keys with a prefix.
    /// Before a revision (0: up to now); about `limit` changes (0: 100, at most 1000), fewer where
    /// they are large. As fresh as a quorum confirms; without one, what this node has applied.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn history(
        &self,
        prefix: &str,
        exact: bool,
        before: Revision,
        limit: usize,
    ) -> Result<History, StoreError> {
        public(prefix)?;
        self.node.history(prefix, exact, before, limit).await
    }
    /// As [`Cluster::range`], but not more than fits into one message: for clients, who go on after
    /// the last key where there is more.
    ///
    /// # Errors
    /// [`StoreError`]; within the request timeout.
    pub async fn range_page(
        &self,
        prefix: &str,
        after: &str,
        limit: usize,
        consistency: Consistency,
    ) -> Result<RangeResult, StoreError> {
        self.node.range_within(prefix, after, limit, ANSWER_BYTES, consistency, false).await
    }
    /// Counts a client's request.
    ///
    /// # Errors
    /// [`StoreError::TooOften`]
    pub fn take_turn(&self, client: &str) -> Result<(), StoreError> {
        self.node.take_turn(client)
    }
    /// Proposes a transaction wherever the leader is, and repeats it safely until its outcome is
    /// known or the request timeout (5 s) is over.
    ///
    /// # Errors
    /// [`StoreError::NoQuorum`]: nothing was written. [`StoreError::UnknownOutcome`]: repeat with
    /// the same name ([`Txn::named`]).
    pub async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.keys().try_for_each(public)?;
        self.node.txn(txn).await
    }
    /// Every change of keys with a prefix from a revision on (0: from now on), as this node
    /// applies them: in revision order, none lost, none doubled.
    ///
    /// # Errors
    /// [`WatchError::Compacted`]; the stream ends with an error when it cannot go on.
    pub fn watch(
        &self,
        prefix: &str,
        from: Revision,
    ) -> Result<BoxStream<'static, Result<WatchBatch, WatchError>>, WatchError> {
        self.node.watch(prefix, from)
    }
    /// As [`Cluster::watch`], for a client: counted against this node's limit, and with a batch
    /// without events where nothing else was to say for a while, to tell how far the watch is.
    ///
    /// # Errors
    /// [`WatchError::TooMany`], and as [`Cluster::watch`].
    pub fn watch_for_client(
        &self,
        prefix: &str,
        from: Revision,
    ) -> Result<BoxStream<'static, Result<WatchBatch, WatchError>>, WatchError> {
        self.node.watch_for_client(prefix, from)
    }

    /// The leader, as this node knows.
    #[must_use]
    pub fn leader(&self) -> Option<NodeId> {
        self.node.leader().map(NodeId)
    }
    /// Whether another node that led gives a sign of life within a limit, before a third one leads.
    pub async fn leader_alive(&self, leader: NodeId, limit: Duration) -> bool {
        self.node.leader_alive(leader.0, limit).await
    }
    /// Resolves once there is no use in waiting for an answer of another node that led: somebody
    /// else leads, or it gave no sign of life for so long. One that lost its power refuses nothing.
    pub async fn leader_lost(&self, leader: NodeId, patience: Duration) {
        self.node.leader_lost(leader.0, patience).await;
    }
    /// The Raft term, as this node knows.
    #[must_use]
    pub fn term(&self) -> u64 {
        self.node.term()
    }
    /// Whether this node leads, and since when; changes are seen at once.
    #[must_use]
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.node.leadership()
    }
    /// Confirms with a quorum, by messages sent after this call began, that this node leads. Calls
    /// at the same time share these messages; in large clusters one waits for up to 100 ms for others.
    ///
    /// # Errors
    /// [`NotLeader`]
    pub async fn confirm_leadership(&self) -> Result<Confirmed, NotLeader> {
        self.node.alive().map_err(|error| NotLeader::Unconfirmed(error.to_string()))?;
        match self.node.confirm(self.node.config().request_timeout).await {
            Ok(confirmed) => Ok(confirmed),
            Err(Forwarded::NotLeader { leader }) => {
                Err(NotLeader::Elsewhere { leader: leader.map(NodeId) })
            }
            Err(Forwarded::Unavailable(why) | Forwarded::Unknown(why)) => {
                Err(NotLeader::Unconfirmed(why))
            }
            Err(other) => Err(NotLeader::Unconfirmed(format!("{other:?}"))),
        }
    }

    /// All members, as this node knows.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        self.node.members()
    }
    /// What `cluster status` shows; `quorum` is confirmed for this answer.
    pub async fn status(&self) -> v1::ClusterStatus {
        membership::status(&self.node).await
    }
    /// Has all members compute a checksum of their copies at one place of the log, and compares.
    ///
    /// # Errors
    /// [`StoreError`]: there is no quorum to begin it with.
    pub async fn verify(&self) -> Result<v1::Verification, StoreError> {
        verify::verify(&self.node).await.map(verify::to_api)
    }
    /// The bytes of a backup ([`proto::backup`]) of the present state, piece by piece, while writes
    /// go on. Memory does not grow with the state; a reader that is too slow is given up.
    ///
    /// # Errors
    /// [`StoreError`]; two backups at once are sent by one node at most.
    pub async fn backup(
        &self,
        consistency: Consistency,
    ) -> Result<BoxStream<'static, Result<Vec<u8>, StoreError>>, StoreError> {
        backup::backup(&self.node, consistency).await
    }
    /// A one-time join token. 0: valid for an hour.
    ///
    /// # Errors
    /// [`MembershipError`]
    pub async fn create_token(
        &self,
        ttl_s: u32,
    ) -> Result<v1::CreateTokenResponse, MembershipError> {
        membership::create_token(&self.node, ttl_s).await
    }
    /// Takes a node (name or id) out of the cluster, unless it owns VMs. It learns so and stops
    /// serving. What interrupted it, asking again ends it.
    ///
    /// # Errors
    /// [`MembershipError`]
    pub async fn remove_node(&self, node: &str) -> Result<(), MembershipError> {
        removal::remove_node(&self.node, node).await
    }
    /// Has another voter lead: `to`, else the one whose log is furthest. The answer is who leads.
    ///
    /// # Errors
    /// [`MembershipError`]; `Invalid` where `to` cannot lead, or nobody else can.
    pub async fn transfer_leader(&self, to: Option<NodeId>) -> Result<NodeId, MembershipError> {
        membership::transfer_leader(&self.node, to).await
    }
    /// Hands leadership over where this node leads, before a planned end; waits for it at most 2 s.
    pub async fn hand_over(&self) {
        self.node.hand_over().await;
    }
    /// Changes a node's name, which is only a label.
    ///
    /// # Errors
    /// [`MembershipError`]
    pub async fn rename_node(&self, node: NodeId, name: &Name) -> Result<(), MembershipError> {
        rename::rename_node(&self.node, node, name).await
    }
    /// A client certificate for a PEM certificate request.
    ///
    /// # Errors
    /// [`MembershipError`]
    pub async fn issue_client(
        &self,
        name: &str,
        csr_pem: &str,
        caller: Option<&str>,
    ) -> Result<v1::IssueClientResponse, MembershipError> {
        membership::issue_client(&self.node, name, csr_pem, caller).await
    }

    /// The CA's certificate and all that it signed, with their states.
    ///
    /// # Errors
    /// [`MembershipError`]
    pub async fn certificates(&self) -> Result<Vec<v1::Certificate>, MembershipError> {
        Ok(certificates::list(&self.node).await?)
    }
    /// The clients that a certificate lets in now, as this node has applied it: neither revoked, nor
    /// over, nor of a CA that was dropped.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn certified_clients(&self) -> Result<BTreeSet<String>, StoreError> {
        certificates::clients(&self.node).await
    }
    /// The certificate that this node shows in handshakes.
    #[must_use]
    pub fn certificate(&self) -> v1::Certificate {
        certificates::shown_own(&self.node, &self.node.certificate()).unwrap_or_default()
    }
    /// Gets this node a new certificate on a new key now; it is shown from the next handshake on.
    /// What was begun is ended, also where nobody waits for it any more.
    ///
    /// # Errors
    /// [`MembershipError::NotRenewed`]
    pub async fn renew_certificate(&self) -> Result<v1::Certificate, MembershipError> {
        self.node.renew().await?;
        Ok(self.certificate())
    }
    /// Has all certificates of a client, or the one with this serial number, count no more, for ever:
    /// new connections and requests are refused, open connections are cut. `by`: who asked for it.
    ///
    /// # Errors
    /// [`MembershipError::UnknownCertificate`]; `Invalid` for what a member works with.
    pub async fn revoke_certificates(
        &self,
        what: &str,
        by: &str,
    ) -> Result<Vec<v1::Certificate>, MembershipError> {
        certificates::revoke(&self.node, what, by).await
    }

    /// Begins to replace the cluster's CA, or answers how far that is. It goes on by itself until all
    /// nodes have certificates of the new one; the old one is trusted until
    /// [`Cluster::finish_ca_rotation`]. `by`: who asked for it.
    ///
    /// # Errors
    /// [`MembershipError`]; `CannotSign` where this node cannot use the CA's key.
    pub async fn rotate_ca(&self, by: &str) -> Result<v1::CaStatus, MembershipError> {
        authority::rotation::begin(&self.node, by).await
    }
    /// Drops the CA that was replaced: what it signed is refused, and connections of those who
    /// showed that are cut.
    ///
    /// # Errors
    /// [`MembershipError`]; `Invalid` where a node still needs it, without `force`
    /// `NoAdministratorLeft` where all administrators by documents do.
    pub async fn finish_ca_rotation(
        &self,
        by: &str,
        force: bool,
    ) -> Result<v1::CaStatus, MembershipError> {
        authority::rotation::finish(&self.node, by, force).await
    }
    /// Which CA signs, and how far its rotation is.
    ///
    /// # Errors
    /// [`MembershipError`]
    pub async fn ca_status(&self) -> Result<v1::CaStatus, MembershipError> {
        authority::rotation::status(&self.node, Consistency::Linearizable).await
    }

    /// A gRPC channel to a member: mTLS, accepted only from that very node, shared and kept.
    /// It connects at its first use, and again after a failure.
    ///
    /// # Errors
    /// [`MembershipError::UnknownNode`]
    pub fn peer_channel(&self, node: NodeId) -> Result<Channel, MembershipError> {
        let members = self.node.members();
        let member = members.iter().find(|member| member.node_id == node);
        let channel =
            member.and_then(|member| self.node.peers().shared(node.0, &member.api_address));
        channel.ok_or_else(|| MembershipError::UnknownNode(node.to_string()))
    }
    /// The same, but a connection of its own, whose work is done by the runtime that asks for it.
    ///
    /// # Errors
    /// [`MembershipError::UnknownNode`]
    pub fn own_peer_channel(&self, node: NodeId) -> Result<Channel, MembershipError> {
        let members = self.node.members();
        let channel = members.iter().find(|member| member.node_id == node).and_then(|member| {
            self.node.peers().note(node.0, &member.api_address);
            self.node.peers().dedicated(node.0)
        });
        channel.ok_or_else(|| MembershipError::UnknownNode(node.to_string()))
    }
    /// Whether the other end of a connection may still ask for anything: it is no removed node, and
    /// its certificate was not revoked.
    ///
    /// # Errors
    /// `PERMISSION_DENIED`, in words by which a node learns that it was removed.
    pub fn admit<T>(&self, request: &Request<T>) -> Result<(), Status> {
        self.node.admit(request)
    }
    /// The calling node's id, if it is a present member.
    ///
    /// # Errors
    /// `PERMISSION_DENIED`, `UNAUTHENTICATED`
    pub fn require_member<T>(&self, request: &Request<T>) -> Result<NodeId, Status> {
        let id = tls::require_node(request)?;
        self.node.admit(request)?;
        if self.node.was_removed(id) || !self.members().iter().any(|m| m.node_id == id) {
            return Err(Status::permission_denied(format!(
                "node {id} is no member of this cluster"
            )));
        }
        Ok(id)
    }

    /// Resolves when this member can take no part any more, with the reason: its database failed,
    /// it was removed from the cluster, or it was shut down. The agent stops its HA VMs and ends.
    pub async fn failed(&self) -> StoreError {
        let mut failure = self.node.failure();
        match failure.wait_for(Option::is_some).await {
            Ok(failure) => failure.clone().unwrap_or(StoreError::Shutdown),
            Err(_) => StoreError::Shutdown,
        }
    }
    /// Stops Raft and closes the database. The data folder can be opened again afterwards.
    pub async fn shutdown(&self) {
        self.node.shutdown().await;
    }
}

/// Services to mount, and connections to serve them on: the first (with the agent's own) on
/// [`Cluster::incoming`], the last on [`Cluster::enrol_incoming`].
impl Cluster {
    /// Raft's messages. For nodes only; it checks that itself.
    #[must_use]
    pub fn raft_service(&self) -> RaftServer<RaftService> {
        RaftServer::new(RaftService::new(self.node.clone())).max_decoding_message_size(MESSAGE_MAX)
    }
    /// For joining nodes.
    #[must_use]
    pub fn enrolment_service(&self) -> EnrolmentServer<EnrolmentService> {
        EnrolmentServer::new(EnrolmentService::new(self.node.clone()))
    }

    /// Accepts mTLS connections on the api port, for `serve_with_incoming`. Handshakes run side by
    /// side, each with a time limit; what is not TLS, or without a certificate of this cluster, is
    /// logged and dropped.
    ///
    /// # Errors
    /// [`OpenError`]: the node's key and certificates do not work.
    pub fn incoming<L: Listen>(
        &self,
        listener: L,
    ) -> Result<
        impl Stream<Item = std::io::Result<TlsConnection>> + Send + 'static + use<L>,
        OpenError,
    > {
        let tls =
            tls::member_server(self.node.credentials()).map_err(|error| self.unusable(&error))?;
        let admit = Admit::Members(self.cluster_id().to_owned(), self.node.trust().clone());
        Ok(tls::incoming(listener, tls, admit))
    }
    /// Accepts server-authenticated TLS connections on the enrolment port.
    ///
    /// # Errors
    /// [`OpenError`]: the node's key and certificates do not work.
    pub fn enrol_incoming<L: Listen>(
        &self,
        listener: L,
    ) -> Result<
        impl Stream<Item = std::io::Result<TlsConnection>> + Send + 'static + use<L>,
        OpenError,
    > {
        let tls =
            tls::enrol_server(self.node.credentials()).map_err(|error| self.unusable(&error))?;
        Ok(tls::incoming(listener, tls, Admit::Anyone))
    }

    fn unusable(&self, error: &dyn std::fmt::Display) -> OpenError {
        OpenError::Unusable { path: self.node.config().data_dir.clone(), detail: error.to_string() }
    }
}
