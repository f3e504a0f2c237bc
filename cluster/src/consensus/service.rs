//! The gRPC service `Raft`: for the cluster's nodes alone.

use std::io::Write;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::{Stream, StreamExt};
use openraft::raft::AppendEntriesRequest;
use proto::NodeId;
use proto::v1::raft_server::Raft as RaftApi;
use proto::v1::{RaftMessage, RenewRequest, RenewResponse, SnapshotChunk};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};

use super::checksum::Checked;
use super::network::{from_message, to_message};
use super::snapshot::{SnapshotData, SnapshotFile};
use super::types::{MemberNode, Snapshot, SnapshotMeta, TypeConfig, Vote};
use crate::certificates;
use crate::host::blocking;
use crate::machine::{Judged, Reply};
use crate::membership::check_described;
use crate::node::Node;
use crate::storage::Db;
use crate::tls::require_node;

/// What a member asks the leader for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Forward {
    /// Nothing: is this node still known?
    Hello,
    /// Propose a transaction.
    Txn(Judged),
    /// Confirm leadership with a quorum, then say which log index a read must have applied.
    ReadIndex,
    /// Take a node in as a learner.
    AddLearner { id: u64, node: MemberNode },
    /// Take a node out.
    Remove { id: u64 },
    /// How the others are doing.
    Progress,
    /// Hand leadership over, if `from` leads.
    Transfer { from: u64, to: Option<u64> },
    /// What the asking node says of itself (all but its name) goes into the membership.
    Describe { id: u64, node: MemberNode },
    /// Change the label that people see.
    Rename { id: u64, name: String },
    /// Have every member compute a checksum at one place of the log.
    Check,
    /// What came of that on the member that is asked, leader or not.
    Checked { index: u64 },
    /// Propose transactions, each for itself.
    Txns(Vec<Judged>),
}

/// What the leader answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Forwarded {
    /// Done.
    Done,
    /// A transaction's reply.
    Reply(Reply),
    /// A read is good once this index is applied.
    ReadIndex(u64),
    /// Not done: this node does not lead.
    NotLeader { leader: Option<u64> },
    /// Not done, and trying again may help.
    Unavailable(String),
    /// Perhaps done.
    Unknown(String),
    /// Not done: the leader's disk is full.
    DiskFull { folder: String, free_bytes: u64 },
    /// Not done: the members that would be left are no quorum.
    QuorumAtRisk { left: usize, voters: usize },
    /// Not done: there is no such node.
    UnknownNode,
    /// Not done: it is the only one.
    LastNode,
    /// Lag (log entries) and milliseconds since the last contact, by node.
    Progress(Vec<(u64, Option<u64>, Option<u64>)>),
    /// Who leads now.
    Leader(u64),
    /// Not done, and trying again will not help: why.
    Refused(String),
    /// A member's checksum.
    Checked(Checked),
    /// What became of each.
    Each(Vec<Forwarded>),
}

/// Serves Raft's messages.
#[derive(Debug, Clone)]
pub struct RaftService {
    node: Arc<Node>,
    /// When entries that cannot be read were last mentioned in the log.
    mentioned: Arc<Mutex<Option<Instant>>>,
}

/// How often they are.
const MENTION_EVERY: Duration = Duration::from_secs(60);

impl RaftService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node, mentioned: Arc::default() }
    }

    /// The caller is a node, was not removed, and its certificate was not revoked.
    fn admit<T>(&self, request: &Request<T>) -> Result<NodeId, Status> {
        self.node.admit(request)?;
        require_node(request)
    }

    /// The leader, which knows all members, does nothing for who is none, whatever it shows. (What
    /// Raft's own messages come from is not asked: a copy that is behind does not know the member yet
    /// that is to bring it up to date.)
    fn member(&self, from: NodeId) -> Result<(), Status> {
        if !self.node.leads() || self.node.is_member(from) {
            return Ok(());
        }
        // One that joins may be a moment early.
        Err(Status::permission_denied(format!("node {from} is no member of this cluster (yet)")))
    }

    /// Entries from a leader. Those that cannot be read are not taken, and this member stays behind.
    fn entries(
        &self,
        from: NodeId,
        message: &RaftMessage,
    ) -> Result<AppendEntriesRequest<TypeConfig>, Status> {
        from_message(message).map_err(|status| {
            let version = env!("CARGO_PKG_VERSION");
            let why = format!(
                "this agent, version {version}, cannot read the log entries of node {from} ({}) and takes none; all nodes of a cluster run the same version",
                status.message()
            );
            if is_due(&self.mentioned, Instant::now()) {
                tracing::error!("{why}");
            }
            Status::failed_precondition(why)
        })
    }

    /// Refuses what would have to be written, while there is no room for it.
    fn room(&self) -> Result<(), Status> {
        if self.node.db().disk_low() {
            return Err(no_room());
        }
        Ok(())
    }
}

/// Whether it is time to say something again.
fn is_due(last: &Mutex<Option<Instant>>, now: Instant) -> bool {
    let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
    let due = last.is_none_or(|last| now.duration_since(last) >= MENTION_EVERY);
    if due {
        *last = Some(now);
    }
    due
}

fn no_room() -> Status {
    Status::resource_exhausted("this node's disk is full")
}

fn failed(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("Raft stopped on this node: {error}"))
}

/// A full disk takes no entries, but answers heartbeats while it can: the leader's reads, and with
/// them all node leases, must not end because disks run full.
fn has_room(db: &Db, request: &AppendEntriesRequest<TypeConfig>) -> bool {
    !db.disk_exhausted() && (request.entries.is_empty() || !db.disk_low())
}

type Messages = Pin<Box<dyn Stream<Item = Result<RaftMessage, Status>> + Send>>;

#[tonic::async_trait]
impl RaftApi for RaftService {
    type AppendStream = Messages;

    async fn append(
        &self,
        request: Request<Streaming<RaftMessage>>,
    ) -> Result<Response<Messages>, Status> {
        let from = self.admit(&request)?;
        let (db, service) = (self.node.db().clone(), self.clone());
        let input = request.into_inner();
        // Ends at the first thing that is wrong; the leader then begins anew.
        let requests = futures::stream::unfold(Some(input), move |input| {
            let (db, service) = (db.clone(), service.clone());
            async move {
                let mut input = input?;
                let message = input.message().await.ok()??;
                let request = service.entries(from, &message).ok()?;
                has_room(&db, &request).then_some((request, Some(input)))
            }
        });
        let answers = self.node.raft().stream_append(requests);
        let messages = answers.map(|answer| to_message(&answer.map_err(failed)?));
        Ok(Response::new(Box::pin(messages)))
    }

    async fn append_once(
        &self,
        request: Request<RaftMessage>,
    ) -> Result<Response<RaftMessage>, Status> {
        let from = self.admit(&request)?;
        let request = self.entries(from, request.get_ref())?;
        if !has_room(self.node.db(), &request) {
            return Err(no_room());
        }
        let answer = self.node.raft().append_entries(request).await.map_err(failed)?;
        Ok(Response::new(to_message(&answer)?))
    }

    async fn vote(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        self.admit(&request)?;
        if self.node.db().disk_exhausted() {
            self.room()?;
        }
        let vote = from_message(request.get_ref())?;
        let answer = self.node.raft().vote(vote).await.map_err(failed)?;
        Ok(Response::new(to_message(&answer)?))
    }

    async fn pre_vote(
        &self,
        request: Request<RaftMessage>,
    ) -> Result<Response<RaftMessage>, Status> {
        self.admit(&request)?;
        let vote = from_message(request.get_ref())?;
        let answer = self.node.raft().pre_vote(vote).await.map_err(failed)?;
        Ok(Response::new(to_message(&answer)?))
    }

    async fn transfer_leader(
        &self,
        request: Request<RaftMessage>,
    ) -> Result<Response<RaftMessage>, Status> {
        self.admit(&request)?;
        self.room()?;
        let transfer = from_message(request.get_ref())?;
        let answer = self.node.raft().handle_transfer_leader(transfer).await.map_err(failed)?;
        Ok(Response::new(to_message(&answer)?))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<SnapshotChunk>>,
    ) -> Result<Response<RaftMessage>, Status> {
        self.admit(&request)?;
        self.room()?;
        let mut chunks = request.into_inner();
        let first =
            chunks.message().await?.ok_or_else(|| Status::invalid_argument("no snapshot"))?;
        let (vote, meta): (Vote, SnapshotMeta) = postcard::from_bytes(&first.header)
            .map_err(|_| Status::invalid_argument("the snapshot's header is damaged"))?;
        // Raft takes for granted what every leader that follows the protocol keeps to.
        if meta
            .last_log_id
            .is_some_and(|last| last.committed_leader_id().term > vote.leader_id.term)
        {
            return Err(Status::invalid_argument(
                "the snapshot is of a later term than its leader",
            ));
        }
        let disk = |error: std::io::Error| Status::resource_exhausted(error.to_string());
        let folder = self.node.db().folder().join("snapshots");
        let (snapshot, mut file) = SnapshotFile::receive(&folder).map_err(disk)?;
        let mut chunk = Some(first);
        while let Some(piece) = chunk {
            self.room()?;
            let written = blocking(self.node.db().host(), move || {
                file.write_all(&piece.data)?;
                Ok::<_, std::io::Error>(file)
            });
            file = written.await.map_err(failed)?.map_err(disk)?;
            chunk = chunks.message().await?;
        }
        let (snapshot, verified) = blocking(self.node.db().host(), move || {
            let verified = file.sync_all().and_then(|()| snapshot.verify());
            (snapshot, verified)
        })
        .await
        .map_err(failed)?;
        // Checked before Raft sees it: a damaged snapshot must not stop this node.
        let found = verified.map_err(|error| Status::data_loss(error.to_string()))?;
        if found != meta {
            return Err(Status::invalid_argument("the snapshot is not the one its header names"));
        }
        let answer = self
            .node
            .raft()
            .install_full_snapshot(
                vote,
                Snapshot { meta, snapshot: SnapshotData::Received(snapshot) },
            )
            .await
            .map_err(failed)?;
        Ok(Response::new(to_message(&answer)?))
    }

    async fn forward(
        &self,
        request: Request<RaftMessage>,
    ) -> Result<Response<RaftMessage>, Status> {
        let from = self.admit(&request)?;
        let asked = from_message(request.get_ref())?;
        self.member(from)?;
        if let Forward::Describe { id, node } = &asked {
            if *id != from.0 {
                return Err(Status::permission_denied("a node describes itself only"));
            }
            check_described(&node.api_address, &node.enrol_address, &node.zone)
                .map_err(Status::invalid_argument)?;
        }
        // Less than the asking member waits: it is to hear what became of it.
        let limit = self.node.config().request_timeout / 2;
        Ok(Response::new(to_message(&self.node.lead(asked, limit).await)?))
    }

    async fn renew(
        &self,
        request: Request<RenewRequest>,
    ) -> Result<Response<RenewResponse>, Status> {
        let from = self.admit(&request)?;
        self.member(from)?;
        let request = request.into_inner();
        if request.node_id != from.0 {
            return Err(Status::permission_denied(format!(
                "node {from} asks for node {}'s certificate; a node gets its own only",
                request.node_id
            )));
        }
        let certificate_pem = certificates::issue_next(&self.node, &request).await?;
        Ok(Response::new(RenewResponse { certificate_pem }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_on_is_mentioned_once_a_minute() {
        let (last, now) = (Mutex::default(), Instant::now());
        assert!(is_due(&last, now));
        assert!(!is_due(&last, now + MENTION_EVERY / 2));
        assert!(is_due(&last, now + MENTION_EVERY));
        assert!(!is_due(&last, now + MENTION_EVERY));
    }
}
