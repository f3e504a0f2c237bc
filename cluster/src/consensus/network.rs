//! Raft's messages to other members, as gRPC over mutual TLS.
//!
//! Heartbeats, log entries and snapshots have a connection each, so that none waits behind another.
//! A node that cannot be reached is an error, always: silence must never count as consent.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{FutureExt, Stream, StreamExt};
use openraft::OptionalSend;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError,
    StreamAppendResult, TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use proto::NodeId;
use proto::v1::raft_client::RaftClient;
use proto::v1::{RaftMessage, RenewRequest, SnapshotChunk};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tonic::Status;
use tonic::transport::Channel;

use super::service::{Forward, Forwarded};
use super::snapshot::{Outgoing, SnapshotData};
use super::types::{LogId, MemberNode, Snapshot, TypeConfig, Vote};
use crate::host::{Host, blocking};
use crate::identity::node_host;
use crate::storage::Db;
use crate::tls::{Trust, channel};

/// The largest message that is taken from a member, bytes.
pub(super) const MESSAGE_MAX: usize = 64 << 20;

/// Channels to the other members, each pinned to one node's certificate. Where a node is may
/// change: each new connection goes where it is known to be then.
#[derive(Debug)]
pub(crate) struct Peers {
    host: Arc<dyn Host>,
    tls: Arc<rustls::ClientConfig>,
    trust: Arc<Trust>,
    cluster_id: String,
    addresses: Arc<Mutex<HashMap<u64, String>>>,
    shared: Mutex<HashMap<u64, Channel>>,
}

impl Peers {
    pub(crate) fn new(
        host: Arc<dyn Host>,
        tls: Arc<rustls::ClientConfig>,
        trust: Arc<Trust>,
        cluster_id: String,
    ) -> Self {
        Self { host, tls, trust, cluster_id, addresses: Arc::default(), shared: Mutex::default() }
    }

    /// A node is reached here from now on.
    pub(crate) fn note(&self, node: u64, address: &str) {
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        if addresses.get(&node).is_none_or(|known| known != address) {
            addresses.insert(node, address.to_owned());
        }
    }

    /// A connection of its own.
    pub(crate) fn dedicated(&self, node: u64) -> Option<Channel> {
        let expect = node_host(&self.cluster_id, NodeId(node))?;
        let addresses = self.addresses.clone();
        let address = move || {
            let addresses = addresses.lock().unwrap_or_else(PoisonError::into_inner);
            addresses.get(&node).cloned().unwrap_or_default()
        };
        let (tls, trust) = (self.tls.clone(), Some(self.trust.clone()));
        Some(channel(self.host.clone(), tls, trust, address, expect))
    }

    /// The connection that all callers share.
    pub(crate) fn shared(&self, node: u64, address: &str) -> Option<Channel> {
        self.note(node, address);
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = shared.get(&node) {
            return Some(channel.clone());
        }
        let channel = self.dedicated(node)?;
        shared.insert(node, channel.clone());
        Some(channel)
    }
}

/// A client for Raft's messages on a channel.
pub(super) fn raft_client(channel: Channel) -> RaftClient<Channel> {
    RaftClient::new(channel).max_decoding_message_size(MESSAGE_MAX)
}

/// Asks a member for what a leader does. Where the request may have reached it, the outcome of a
/// failed call is unknown.
pub(crate) async fn ask(
    channel: Channel,
    asked: &Forward,
    limit: Duration,
    removed: &tokio::sync::watch::Sender<bool>,
) -> Forwarded {
    let message = match to_message(asked) {
        Ok(message) => message,
        Err(status) => return Forwarded::Unavailable(status.message().to_owned()),
    };
    let mut client = raft_client(channel);
    let answer = match tokio::time::timeout(limit, client.forward(message)).await {
        Ok(answer) => answer,
        Err(_) => return Forwarded::Unknown("the leader did not answer in time".to_owned()),
    };
    match answer {
        Ok(answer) => from_message(answer.get_ref())
            .unwrap_or_else(|status| Forwarded::Unknown(status.message().to_owned())),
        Err(status) => {
            note_removal(removed, &status);
            let why = format!("the leader cannot be asked: {}", status.message());
            if nothing_was_sent(&status) {
                Forwarded::Unavailable(why)
            } else {
                Forwarded::Unknown(why)
            }
        }
    }
}

/// Greets a member. The error says what came instead of its greeting.
pub(crate) async fn hello(
    channel: Channel,
    removed: &tokio::sync::watch::Sender<bool>,
) -> Result<(), String> {
    let message = to_message(&Forward::Hello).map_err(|status| status.message().to_owned())?;
    match raft_client(channel).forward(message).await {
        Ok(_) => Ok(()),
        Err(status) => {
            note_removal(removed, &status);
            Err(in_full(&status))
        }
    }
}

/// A call's failure with its causes: "transport error" says nothing.
fn in_full(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text
}

/// Asks the leader for a certificate. The error says why there is none.
pub(crate) async fn renew(
    channel: Channel,
    request: RenewRequest,
    limit: Duration,
    removed: &tokio::sync::watch::Sender<bool>,
) -> Result<String, String> {
    let mut client = raft_client(channel);
    match tokio::time::timeout(limit, client.renew(request)).await {
        Ok(Ok(answer)) => Ok(answer.into_inner().certificate_pem),
        Ok(Err(status)) => {
            note_removal(removed, &status);
            Err(status.message().to_owned())
        }
        Err(_) => Err("the leader did not answer in time".to_owned()),
    }
}

/// Whether a call failed before a connection was there to send it on, or was refused unread.
fn nothing_was_sent(status: &Status) -> bool {
    let refused =
        matches!(status.code(), tonic::Code::PermissionDenied | tonic::Code::Unauthenticated);
    refused || never_connected(status)
}

/// Whether a call to a member failed before there was a connection to send it on: it was not done.
#[must_use]
pub fn never_connected(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Makes openraft's clients.
#[derive(Debug, Clone)]
pub(crate) struct Network {
    pub(crate) peers: Arc<Peers>,
    /// How long an append may stay unanswered while the connection looks alive.
    pub(crate) append_limit: Duration,
    /// Called when a member says that this node was removed.
    pub(crate) removed: Arc<tokio::sync::watch::Sender<bool>>,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Link;

    async fn new_client(&mut self, target: u64, node: &MemberNode) -> Link {
        self.peers.note(target, &node.api_address);
        Link {
            host: self.peers.host.clone(),
            client: self.peers.dedicated(target).map(raft_client),
            append_limit: self.append_limit,
            removed: self.removed.clone(),
        }
    }
}

/// One of openraft's connections to one member.
#[derive(Debug)]
pub(crate) struct Link {
    host: Arc<dyn Host>,
    client: Option<RaftClient<Channel>>,
    append_limit: Duration,
    removed: Arc<tokio::sync::watch::Sender<bool>>,
}

/// The status message by which a member tells a node that it was removed.
pub(crate) const REMOVED: &str = "this node was removed from the cluster";

type Rpc<T> = Result<T, RPCError<TypeConfig>>;

fn unreachable(detail: impl ToString) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::from_string(detail))
}

pub(super) fn to_message<T: Serialize>(value: &T) -> Result<RaftMessage, Status> {
    let payload =
        postcard::to_stdvec(value).map_err(|error| Status::internal(error.to_string()))?;
    Ok(RaftMessage { payload })
}

pub(super) fn from_message<T: DeserializeOwned>(message: &RaftMessage) -> Result<T, Status> {
    postcard::from_bytes(&message.payload)
        .map_err(|error| Status::invalid_argument(format!("not a Raft message: {error}")))
}

impl Link {
    fn client(&self) -> Rpc<RaftClient<Channel>> {
        self.client.clone().ok_or_else(|| unreachable("the member's name is not a valid host name"))
    }

    fn failed(&self, status: &Status) -> RPCError<TypeConfig> {
        note_removal(&self.removed, status);
        unreachable(format!("{}: {}", status.code(), status.message()))
    }

    async fn unary<Q: Serialize, A: DeserializeOwned, F>(
        &self,
        request: &Q,
        limit: Duration,
        call: impl FnOnce(RaftClient<Channel>, RaftMessage) -> F,
    ) -> Rpc<A>
    where
        F: Future<Output = Result<tonic::Response<RaftMessage>, Status>>,
    {
        let message = to_message(request).map_err(|status| self.failed(&status))?;
        let answer = tokio::time::timeout(limit, call(self.client()?, message))
            .await
            .map_err(|_| unreachable("no answer in time"))?
            .map_err(|status| self.failed(&status))?;
        from_message(answer.get_ref()).map_err(|status| self.failed(&status))
    }
}

/// Whether a member's answer says that this node was removed from the cluster.
#[must_use]
pub fn says_removed(status: &Status) -> bool {
    status.code() == tonic::Code::PermissionDenied && status.message() == REMOVED
}

fn note_removal(removed: &tokio::sync::watch::Sender<bool>, status: &Status) {
    if says_removed(status) {
        removed.send_replace(true);
    }
}

impl RaftNetworkV2<TypeConfig> for Link {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Rpc<AppendEntriesResponse<TypeConfig>> {
        self.unary(&rpc, self.append_limit, |mut client, message| async move {
            client.append_once(message).await
        })
        .await
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> Pin<
        Box<
            dyn Future<Output = Rpc<BoxStream<'s, Rpc<StreamAppendResult<TypeConfig>>>>>
                + Send
                + 's,
        >,
    >
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        Box::pin(async move {
            // After a failure openraft holds the next request back for a while. A connection that is
            // opened before it is there would be dialled without a pause as long as it is refused.
            let mut input = input.fuse();
            let Some(first) = input.next().await else {
                return Ok(futures::stream::empty().boxed());
            };
            // A heartbeat comes as a stream of one request.
            let second = input.next().now_or_never();
            if let Some(None) = second {
                let (prev, last) = (first.prev_log_id, first.entries.last().map(|e| e.log_id));
                let answer = self.append_entries(first, option).await?;
                let answer = as_of_a_stream(answer, prev, last);
                return Ok(futures::stream::iter([answer]).boxed());
            }
            let begun = std::iter::once(first).chain(second.flatten());
            let input = futures::stream::iter(begun).chain(input);

            let mut client = self.client()?;
            // Requests sent less answers received: only a debt makes silence an error.
            let sent = Arc::new(AtomicU64::new(0));
            let counter = sent.clone();
            let requests = input.filter_map(move |request| {
                counter.fetch_add(1, Ordering::SeqCst);
                // What cannot be encoded is left out; its answer is then missed and time runs out.
                futures::future::ready(to_message(&request).ok())
            });
            let opened = tokio::time::timeout(self.append_limit, client.append(requests));
            let answers = opened
                .await
                .map_err(|_| unreachable("no answer in time"))?
                .map_err(|status| self.failed(&status))?
                .into_inner();
            let removed = self.removed.clone();
            let limit = self.append_limit;
            let state = (answers, sent, 0u64, false);
            let stream = futures::stream::unfold(state, move |(mut answers, sent, got, over)| {
                let removed = removed.clone();
                async move {
                    if over {
                        return None;
                    }
                    let answer = next_answer(&mut answers, &sent, got, limit).await;
                    let item = match answer {
                        Ok(None) => return None,
                        Ok(Some(message)) => from_message(&message).map_err(unreachable),
                        Err(status) => {
                            note_removal(&removed, &status);
                            Err(unreachable(format!("{}: {}", status.code(), status.message())))
                        }
                    };
                    let over = item.is_err();
                    Some((item, (answers, sent, got + 1, over)))
                }
            });
            Ok(stream.boxed())
        })
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Rpc<VoteResponse<TypeConfig>> {
        self.unary(&rpc, option.soft_ttl(), |mut client, m| async move { client.vote(m).await })
            .await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Rpc<VoteResponse<TypeConfig>> {
        self.unary(&rpc, option.soft_ttl(), |mut client, m| async move { client.pre_vote(m).await })
            .await
    }

    async fn transfer_leader(
        &mut self,
        rpc: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Rpc<TransferLeaderResponse<TypeConfig>> {
        self.unary(&rpc, option.soft_ttl(), |mut client, m| async move {
            client.transfer_leader(m).await
        })
        .await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let network = |error: &dyn std::fmt::Display| {
            StreamingError::Network(NetworkError::from_string(error.to_string()))
        };
        let SnapshotData::Own(db) = snapshot.snapshot else {
            return Err(network(&"only what this member holds itself is sent"));
        };
        let mut client = self.client().map_err(StreamingError::from)?;
        let answer = client.install_snapshot(chunks(self.host.clone(), vote, db));
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            answer = tokio::time::timeout(option.soft_ttl(), answer) => {
                let answer = answer.map_err(|_| network(&"the snapshot took too long"))?;
                let message = answer.map_err(|status| StreamingError::from(self.failed(&status)))?;
                from_message(message.get_ref()).map_err(|status| network(&status))
            }
        }
    }
}

/// The answer to one request as a stream of them has it; `prev` and `last` are the request's log ids.
fn as_of_a_stream(
    answer: AppendEntriesResponse<TypeConfig>,
    prev: Option<LogId>,
    last: Option<LogId>,
) -> Rpc<StreamAppendResult<TypeConfig>> {
    Ok(match answer {
        AppendEntriesResponse::Success => Ok(last.or(prev)),
        AppendEntriesResponse::PartialSuccess(matching) => Ok(matching),
        AppendEntriesResponse::HigherVote(vote) => Err(StreamAppendError::HigherVote(vote)),
        AppendEntriesResponse::Conflict => {
            let conflict = prev.ok_or_else(|| unreachable("a conflict with nothing"))?;
            Err(StreamAppendError::Conflict(conflict))
        }
    })
}

/// The next answer. Silence is an error only while a request is unanswered.
async fn next_answer(
    answers: &mut tonic::Streaming<RaftMessage>,
    sent: &AtomicU64,
    got: u64,
    limit: Duration,
) -> Result<Option<RaftMessage>, Status> {
    let mut owed_before = sent.load(Ordering::SeqCst) > got;
    let message = answers.message();
    tokio::pin!(message);
    loop {
        match tokio::time::timeout(limit, &mut message).await {
            Ok(answer) => return answer,
            Err(_) if owed_before => return Err(Status::deadline_exceeded("no answer in time")),
            Err(_) => owed_before = sent.load(Ordering::SeqCst) > got,
        }
    }
}

/// The present state in pieces; the first carries the header, of which the vote is part. It is taken
/// when there is a connection that asks for the first piece: who is away costs nothing.
fn chunks(
    host: Arc<dyn Host>,
    vote: Vote,
    db: Arc<Db>,
) -> impl Stream<Item = SnapshotChunk> + Send {
    futures::stream::unfold((None, db), move |(begun, db)| {
        let host = host.clone();
        async move {
            let (of, vote) = (db.clone(), vote);
            let read = blocking(host.as_ref(), move || piece(begun, &of, &vote)).await;
            match read.and_then(|read| read) {
                Ok(Some((chunk, outgoing))) => Some((chunk, (Some(outgoing), db))),
                Ok(None) => None,
                // The receiver sees a snapshot that is too short and refuses it.
                Err(error) => {
                    tracing::error!(%error, "the snapshot that is being sent cannot be read");
                    None
                }
            }
        }
    })
}

/// The first piece, or the next one of what was begun; None after the last. Blocks.
fn piece(
    begun: Option<Outgoing>,
    of: &Db,
    vote: &Vote,
) -> io::Result<Option<(SnapshotChunk, Outgoing)>> {
    let (mut outgoing, header) = match begun {
        Some(outgoing) => (outgoing, Vec::new()),
        None => {
            let outgoing = Outgoing::of(of)?;
            let header = postcard::to_stdvec(&(vote, outgoing.meta())).map_err(io::Error::other)?;
            (outgoing, header)
        }
    };
    Ok(outgoing.next()?.map(|data| (SnapshotChunk { header, data }, outgoing)))
}
