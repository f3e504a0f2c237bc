//! What the stand-ins count: messages and their payload by kind, and what the wire carried for them
//! (TLS records, HTTP/2 frames and headers included; TCP and IP are not, there are none here).

use std::array;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

/// What a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Raft's heartbeat: by the clock, or a round that confirms leadership.
    Heartbeat,
    /// Log entries.
    Entries,
    /// How far the log is committed, where no entries came with it.
    Commit,
    /// "Am I still a member?", each second.
    Hello,
    /// The node's lease.
    Lease,
    /// Snapshots.
    Other,
}

pub(crate) const KINDS: [Kind; 6] =
    [Kind::Heartbeat, Kind::Entries, Kind::Commit, Kind::Hello, Kind::Lease, Kind::Other];

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Heartbeat => "heartbeats",
            Self::Entries => "log entries",
            Self::Commit => "commits",
            Self::Hello => "membership",
            Self::Lease => "lease",
            Self::Other => "other",
        }
    }
}

/// A connection carries one kind only, but entries and commits share theirs.
const LINKS: usize = 6;

fn link_of(kind: Kind) -> usize {
    if kind == Kind::Commit { Kind::Entries as usize } else { kind as usize }
}

/// Counters of all stand-ins.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    messages: [AtomicU64; LINKS],
    payload: [AtomicU64; LINKS],
    wire: [AtomicU64; LINKS],
    /// In all messages of [`Kind::Entries`].
    entries: AtomicU64,
    /// Leases that were acknowledged, and heartbeats for it that were refused or had no answer.
    pub(crate) acknowledged: AtomicU64,
    pub(crate) refused: AtomicU64,
    /// From sending to the acknowledgement, microseconds in all.
    pub(crate) waited_us: AtomicU64,
}

/// What was counted up to a moment, or between two.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counted {
    messages: [u64; LINKS],
    payload: [u64; LINKS],
    wire: [u64; LINKS],
    pub(crate) entries: u64,
    pub(crate) acknowledged: u64,
    pub(crate) refused: u64,
    pub(crate) waited_us: u64,
}

impl Counts {
    /// One message and its answer.
    pub(crate) fn message(&self, kind: Kind, request: usize, answer: usize) {
        self.messages[kind as usize].fetch_add(1, Ordering::Relaxed);
        let bytes = u64::try_from(request + answer).unwrap_or(u64::MAX);
        self.payload[kind as usize].fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn entries(&self, entries: u64) {
        self.entries.fetch_add(entries, Ordering::Relaxed);
    }

    pub(crate) fn now(&self) -> Counted {
        let of = |counters: &[AtomicU64; LINKS]| {
            array::from_fn(|place| counters[place].load(Ordering::Relaxed))
        };
        let one = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counted {
            messages: of(&self.messages),
            payload: of(&self.payload),
            wire: of(&self.wire),
            entries: one(&self.entries),
            acknowledged: one(&self.acknowledged),
            refused: one(&self.refused),
            waited_us: one(&self.waited_us),
        }
    }
}

impl Counted {
    pub(crate) fn since(self, before: Self) -> Self {
        let of = |now: [u64; LINKS], then: [u64; LINKS]| {
            array::from_fn(|place| now[place].saturating_sub(then[place]))
        };
        Self {
            messages: of(self.messages, before.messages),
            payload: of(self.payload, before.payload),
            wire: of(self.wire, before.wire),
            entries: self.entries - before.entries,
            acknowledged: self.acknowledged - before.acknowledged,
            refused: self.refused - before.refused,
            waited_us: self.waited_us - before.waited_us,
        }
    }

    pub(crate) fn messages(&self, kind: Kind) -> u64 {
        self.messages[kind as usize]
    }
    /// Of all kinds.
    pub(crate) fn all_messages(&self) -> u64 {
        self.messages.iter().sum()
    }
    /// Requests and answers as they are before gRPC, bytes.
    pub(crate) fn payload(&self, kind: Kind) -> u64 {
        self.payload[kind as usize]
    }
    /// What the connections for a kind carried, both ways, bytes.
    pub(crate) fn wire(&self, kind: Kind) -> u64 {
        self.wire[link_of(kind)]
    }
    pub(crate) fn all_wire(&self) -> u64 {
        self.wire.iter().sum()
    }
}

/// Which kind a connection is for; unknown until the first message.
#[derive(Debug)]
pub(crate) struct Link(AtomicUsize);

const UNKNOWN: usize = usize::MAX;

impl Link {
    pub(crate) fn of(kind: Option<Kind>) -> Arc<Self> {
        Arc::new(Self(AtomicUsize::new(kind.map_or(UNKNOWN, link_of))))
    }
    pub(crate) fn carries(&self, kind: Kind) {
        self.0.store(link_of(kind), Ordering::Relaxed);
    }
}

/// A connection whose bytes are counted.
#[derive(Debug)]
pub(crate) struct Wire {
    stream: DuplexStream,
    link: Arc<Link>,
    counts: Arc<Counts>,
}

impl Wire {
    pub(crate) fn new(stream: DuplexStream, link: Arc<Link>, counts: Arc<Counts>) -> Self {
        Self { stream, link, counts }
    }

    fn passed(&self, bytes: usize) {
        // What comes before the first message is the handshake: it is of no kind.
        if let Some(counter) = self.counts.wire.get(self.link.0.load(Ordering::Relaxed)) {
            counter.fetch_add(u64::try_from(bytes).unwrap_or(0), Ordering::Relaxed);
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        self.passed(buffer.filled().len() - before);
        polled
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if let Poll::Ready(Ok(count)) = &polled {
            self.passed(*count);
        }
        polled
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
