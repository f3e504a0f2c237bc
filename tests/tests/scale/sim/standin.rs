//! Stand-ins for learners: one service answers for all of them as learners would that have what they
//! are sent on their disks at once, and keeps none of it. TLS, gRPC and the messages are the real
//! ones; each has the certificate that the cluster's CA gave it.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use futures::{Stream, StreamExt};
use proto::v1::raft_server::Raft;
use proto::v1::{RaftMessage, RenewRequest, RenewResponse, SnapshotChunk};
use tokio::sync::watch;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};

use super::count::{Counts, Kind, Link, Wire};
use super::wire::{self, Append, Appended, LogId, SnapshotHeader};

/// One learner.
#[derive(Debug)]
pub(crate) struct StandIn {
    /// The last entry of its log.
    last: Mutex<Option<LogId>>,
    /// The highest term it heard of, and who leads in it.
    leader: watch::Sender<(u64, u64)>,
}

impl StandIn {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { last: Mutex::default(), leader: watch::channel((0, 0)).0 })
    }

    /// Who leads, for all it knows: a node's id.
    pub(crate) fn leader(&self) -> Option<u64> {
        let (term, leader) = *self.leader.borrow();
        (term > 0).then_some(leader)
    }

    fn heard(&self, term: u64, leader: u64) {
        self.leader.send_if_modified(|known| {
            let newer = term > known.0;
            if newer {
                *known = (term, leader);
            }
            newer
        });
    }

    /// Takes entries as a learner does.
    fn append(&self, append: &Append) -> Appended {
        self.heard(append.term, append.leader);
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(prev) = append.prev {
            let differs = match *last {
                None => true,
                Some(last) => prev.index > last.index || (prev.index == last.index && prev != last),
            };
            if differs {
                return Err(prev);
            }
        }
        let Some(first) = append.first else { return Ok(append.prev) };
        // Each entry's term stands before its content, which is not read here. Where the first is of
        // the leader's term, so are the others; where it is not, only the first is taken.
        let taken = if first.term == append.term {
            LogId { term: first.term, index: first.index + append.entries - 1 }
        } else {
            first
        };
        *last = Some(taken);
        Ok(Some(taken))
    }
}

/// A connection that a voter opened.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) stream: tokio_rustls::server::TlsStream<Wire>,
    pub(crate) to: Arc<StandIn>,
    pub(crate) link: Arc<Link>,
}

/// Whom it is to.
#[derive(Debug, Clone)]
pub(crate) struct To(Arc<StandIn>, Arc<Link>);

impl Connected for Incoming {
    type ConnectInfo = To;
    fn connect_info(&self) -> To {
        To(self.to.clone(), self.link.clone())
    }
}

impl tokio::io::AsyncRead for Incoming {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl tokio::io::AsyncWrite for Incoming {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }
    fn poll_flush(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Answers for all stand-ins.
#[derive(Debug, Clone)]
pub(crate) struct Responder(pub(crate) Arc<Counts>);

fn to_whom<T>(request: &Request<T>) -> Result<To, Status> {
    let to = request.extensions().get::<To>().cloned();
    to.ok_or_else(|| Status::internal("the connection is to nobody"))
}

fn read(message: &RaftMessage) -> Result<Append, Status> {
    Append::read(&message.payload).ok_or_else(|| Status::invalid_argument("not entries"))
}

fn not_for_learners<T>() -> Result<T, Status> {
    Err(Status::failed_precondition("a learner was asked what only voters are"))
}

type Messages = Pin<Box<dyn Stream<Item = Result<RaftMessage, Status>> + Send>>;

#[tonic::async_trait]
impl Raft for Responder {
    type AppendStream = Messages;

    async fn append(
        &self,
        request: Request<Streaming<RaftMessage>>,
    ) -> Result<Response<Messages>, Status> {
        let To(to, link) = to_whom(&request)?;
        link.carries(Kind::Entries);
        let counts = self.0.clone();
        let answers = request.into_inner().map(move |message| {
            let message = message?;
            let append = read(&message)?;
            let payload = wire::of_a_stream(to.append(&append));
            let kind = if append.entries == 0 { Kind::Commit } else { Kind::Entries };
            counts.message(kind, message.payload.len(), payload.len());
            counts.entries(append.entries);
            Ok(RaftMessage { payload })
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn append_once(
        &self,
        request: Request<RaftMessage>,
    ) -> Result<Response<RaftMessage>, Status> {
        let To(to, link) = to_whom(&request)?;
        let message = request.into_inner();
        let append = read(&message)?;
        let payload = wire::alone(&append, to.append(&append));
        // Alone come heartbeats, and the search for the place where a log differs.
        let kind = if append.entries == 0 { Kind::Heartbeat } else { Kind::Entries };
        link.carries(kind);
        self.0.message(kind, message.payload.len(), payload.len());
        self.0.entries(append.entries);
        Ok(Response::new(RaftMessage { payload }))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<SnapshotChunk>>,
    ) -> Result<Response<RaftMessage>, Status> {
        let To(to, link) = to_whom(&request)?;
        link.carries(Kind::Other);
        let mut chunks = request.into_inner();
        let mut header = None;
        while let Some(chunk) = chunks.message().await? {
            self.0.message(Kind::Other, chunk.header.len() + chunk.data.len(), 0);
            header = header.or_else(|| SnapshotHeader::read(&chunk.header));
        }
        let header = header.ok_or_else(|| Status::invalid_argument("not a snapshot"))?;
        *to.last.lock().unwrap_or_else(PoisonError::into_inner) = header.last;
        Ok(Response::new(RaftMessage { payload: header.vote }))
    }

    async fn vote(&self, _: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        not_for_learners()
    }
    async fn pre_vote(&self, _: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        not_for_learners()
    }
    async fn transfer_leader(
        &self,
        _: Request<RaftMessage>,
    ) -> Result<Response<RaftMessage>, Status> {
        not_for_learners()
    }
    async fn forward(&self, _: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        not_for_learners()
    }
    async fn renew(&self, _: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        not_for_learners()
    }
}
