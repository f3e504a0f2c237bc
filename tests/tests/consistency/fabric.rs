//! The simulated network: connections between hosts that carry bytes in order, as TCP does, with
//! delay, loss (which TCP turns into delay), links that are cut in one or both directions, and hosts
//! that fall silent. Time is counted in ticks; what is sent in one tick arrives in a later one.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use async_trait::async_trait;
use cluster::host::{Connection, Listen};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{mpsc, oneshot};

use super::rng::Rng;

/// A sender waits while this much of its data is on the way, bytes.
const WINDOW: usize = 512 << 10;
/// How long a lost segment is late, ticks; doubled with each loss in a row.
const RETRANSMIT: u64 = 40;

/// What happens to what one host sends to another.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Link {
    pub(crate) cut: bool,
    /// Shortest and longest delay, ticks; at least 1.
    pub(crate) delay: (u64, u64),
    /// Of a hundred segments.
    pub(crate) lost: u64,
}

impl Link {
    pub(crate) const GOOD: Self = Self { cut: false, delay: (1, 1), lost: 0 };
}

#[derive(Debug)]
enum Segment {
    Syn,
    SynAck,
    Data(Vec<u8>),
    Fin,
    Reset,
}

/// One end of a connection.
#[derive(Debug, Default)]
struct End {
    host: usize,
    /// Its stream exists.
    open: bool,
    /// On the way to it.
    coming: VecDeque<(u64, Segment)>,
    coming_bytes: usize,
    received: VecDeque<u8>,
    ended: bool,
    reset: bool,
    sent_fin: bool,
    reader: Option<Waker>,
    /// The other end's task that waits for room in `coming`.
    writer: Option<Waker>,
}

#[derive(Debug)]
struct Pair {
    address: String,
    ends: [End; 2],
    dialling: Option<oneshot::Sender<io::Result<()>>>,
}

type Arrival = (Connection, SocketAddr);

/// All of it.
#[derive(Debug)]
pub(crate) struct Fabric {
    now: u64,
    rng: Rng,
    hosts: usize,
    up: Vec<bool>,
    links: Vec<Link>,
    listeners: BTreeMap<String, (usize, mpsc::UnboundedSender<Arrival>)>,
    pairs: BTreeMap<u64, Pair>,
    next: u64,
}

/// Shared by everything of one simulation.
#[derive(Debug, Clone)]
pub(crate) struct Net(Arc<Mutex<Fabric>>);

impl Net {
    pub(crate) fn new(hosts: usize, rng: Rng) -> Self {
        Self(Arc::new(Mutex::new(Fabric {
            now: 0,
            rng,
            hosts,
            up: vec![true; hosts],
            links: vec![Link::GOOD; hosts * hosts],
            listeners: BTreeMap::new(),
            pairs: BTreeMap::new(),
            next: 0,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Fabric> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Delivers what is due.
    pub(crate) fn tick(&self, now: u64) {
        let mut wakers = Vec::new();
        {
            let mut fabric = self.lock();
            fabric.now = now;
            let ids: Vec<u64> = fabric.pairs.keys().copied().collect();
            for id in ids {
                for side in 0..2 {
                    fabric.deliver(self, id, side, &mut wakers);
                }
            }
            fabric.pairs.retain(|_, pair| {
                let quiet = |end: &End| !end.open && end.coming.is_empty();
                pair.dialling.is_some() || !pair.ends.iter().all(quiet)
            });
        }
        // Outside of the lock: a waker may end a task, and that may close a stream.
        wakers.into_iter().for_each(Waker::wake);
    }

    pub(crate) fn set_link(&self, from: usize, to: usize, link: Link) {
        let mut fabric = self.lock();
        let at = from * fabric.hosts + to;
        fabric.links[at] = link;
    }

    pub(crate) fn heal(&self) {
        self.lock().links.fill(Link::GOOD);
    }

    /// The host sends and takes nothing any more; what it sent is still on the way.
    pub(crate) fn switch_off(&self, host: usize) {
        self.lock().up[host] = false;
    }

    /// A host without listeners or connections; those that others still have are answered by resets.
    pub(crate) fn switch_on(&self, host: usize) {
        let mut fabric = self.lock();
        fabric.up[host] = true;
        fabric.listeners.retain(|_, (owner, _)| *owner != host);
    }

    pub(crate) fn listen(&self, host: usize, address: &str) -> Listener {
        let (sender, arrivals) = mpsc::unbounded_channel();
        self.lock().listeners.insert(address.to_owned(), (host, sender));
        Listener(arrivals)
    }

    pub(crate) async fn dial(&self, host: usize, address: &str) -> io::Result<Connection> {
        let (sender, answered) = oneshot::channel();
        let id = self.lock().begin(host, address, sender)?;
        // From here on: a caller that gives up drops the stream.
        let stream = Stream { net: self.clone(), id, side: 0 };
        match answered.await {
            Ok(Ok(())) => Ok(Box::new(stream)),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl Fabric {
    fn begin(
        &mut self,
        host: usize,
        address: &str,
        dialling: oneshot::Sender<io::Result<()>>,
    ) -> io::Result<u64> {
        let target = self.listeners.get(address).map(|(owner, _)| *owner);
        // Addresses are `host-N:port`: a host that is down still has one.
        let named = address.strip_prefix("host-").and_then(|rest| rest.split(':').next());
        let target = target.or_else(|| named.and_then(|name| name.parse().ok()));
        let target = target.ok_or(io::ErrorKind::NotFound)?;
        let id = self.next;
        self.next += 1;
        let ends =
            [End { host, open: true, ..End::default() }, End { host: target, ..End::default() }];
        self.pairs.insert(id, Pair { address: address.to_owned(), ends, dialling: Some(dialling) });
        self.send(id, 1, Segment::Syn);
        Ok(id)
    }

    /// Puts a segment on the way to one end.
    fn send(&mut self, id: u64, side: usize, segment: Segment) {
        let Some(pair) = self.pairs.get_mut(&id) else { return };
        let (from, to) = (pair.ends[1 - side].host, pair.ends[side].host);
        let link = self.links[from * self.hosts + to];
        let mut late = self.rng.between(link.delay.0, link.delay.1);
        let mut again = RETRANSMIT;
        while link.lost > 0 && self.rng.chance(link.lost) && again < RETRANSMIT * 8 {
            late += again;
            again *= 2;
        }
        let end = &mut pair.ends[side];
        let after = end.coming.back().map_or(0, |(ready, _)| *ready);
        if let Segment::Data(bytes) = &segment {
            end.coming_bytes += bytes.len();
        }
        end.coming.push_back(((self.now + late).max(after), segment));
    }

    fn deliver(&mut self, net: &Net, id: u64, side: usize, wakers: &mut Vec<Waker>) {
        loop {
            let Some(pair) = self.pairs.get_mut(&id) else { return };
            let (from, to) = (pair.ends[1 - side].host, pair.ends[side].host);
            if self.links[from * self.hosts + to].cut {
                return;
            }
            let end = &mut pair.ends[side];
            if end.coming.front().is_none_or(|(ready, _)| *ready > self.now) {
                return;
            }
            let Some((_, segment)) = end.coming.pop_front() else { return };
            if let Segment::Data(bytes) = &segment {
                end.coming_bytes -= bytes.len();
                wakers.extend(end.writer.take());
            }
            if self.up[to] {
                self.arrive(net, id, side, segment, wakers);
            }
        }
    }

    fn arrive(
        &mut self,
        net: &Net,
        id: u64,
        side: usize,
        segment: Segment,
        wakers: &mut Vec<Waker>,
    ) {
        let Some(pair) = self.pairs.get_mut(&id) else { return };
        let end = &mut pair.ends[side];
        match segment {
            Segment::Syn => return self.accept(net, id),
            Segment::SynAck => {
                if let Some(dialling) = pair.dialling.take() {
                    let _ = dialling.send(Ok(()));
                }
                return;
            }
            Segment::Data(bytes) if end.open => end.received.extend(bytes),
            Segment::Data(_) => return self.send(id, 1 - side, Segment::Reset),
            Segment::Fin => end.ended = true,
            Segment::Reset => {
                end.reset = true;
                if let Some(dialling) = pair.dialling.take() {
                    let _ = dialling.send(Err(io::ErrorKind::ConnectionRefused.into()));
                }
            }
        }
        let [a, b] = &mut pair.ends;
        let (end, other) = if side == 0 { (a, b) } else { (b, a) };
        wakers.extend(end.reader.take());
        if end.reset {
            wakers.extend(other.writer.take());
        }
    }

    fn accept(&mut self, net: &Net, id: u64) {
        let Some(pair) = self.pairs.get_mut(&id) else { return };
        let from = u8::try_from(pair.ends[0].host).unwrap_or(u8::MAX);
        let remote = SocketAddr::from((Ipv4Addr::new(10, 0, 0, from), 1024));
        // Looked at first: a stream that comes back would be closed here, under the lock it needs.
        match self.listeners.get(&pair.address) {
            Some((_, listener)) if !listener.is_closed() => {
                let stream = Stream { net: net.clone(), id, side: 1 };
                pair.ends[1].open = true;
                let _ = listener.send((Box::new(stream), remote));
                self.send(id, 0, Segment::SynAck);
            }
            _ => self.send(id, 0, Segment::Reset),
        }
    }

    fn close(&mut self, id: u64, side: usize) {
        let Some(pair) = self.pairs.get_mut(&id) else { return };
        let end = &mut pair.ends[side];
        (end.open, end.reader) = (false, None);
        let host = end.host;
        let said = std::mem::replace(&mut end.sent_fin, true);
        pair.ends[1 - side].writer = None;
        if side == 0 {
            pair.dialling = None;
        }
        // A host that lost power says nothing.
        if !said && self.up[host] {
            self.send(id, 1 - side, Segment::Fin);
        }
    }
}

/// One end of a connection, as its user sees it.
#[derive(Debug)]
struct Stream {
    net: Net,
    id: u64,
    side: usize,
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut fabric = self.net.lock();
        let Some(pair) = fabric.pairs.get_mut(&self.id) else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        };
        let end = &mut pair.ends[self.side];
        if end.received.is_empty() {
            if end.reset {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            if end.ended {
                return Poll::Ready(Ok(()));
            }
            end.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let (front, _) = end.received.as_slices();
        let count = front.len().min(buffer.remaining());
        buffer.put_slice(&front[..count]);
        end.received.drain(..count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut fabric = self.net.lock();
        let Some(pair) = fabric.pairs.get_mut(&self.id) else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        };
        if pair.ends[self.side].reset {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let other = &mut pair.ends[1 - self.side];
        if other.coming_bytes >= WINDOW {
            other.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        fabric.send(self.id, 1 - self.side, Segment::Data(bytes.to_vec()));
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut fabric = self.net.lock();
        let end = fabric.pairs.get_mut(&self.id).map(|pair| &mut pair.ends[self.side]);
        if end.is_some_and(|end| !std::mem::replace(&mut end.sent_fin, true)) {
            fabric.send(self.id, 1 - self.side, Segment::Fin);
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.net.lock().close(self.id, self.side);
    }
}

/// Connections to one address.
#[derive(Debug)]
pub(crate) struct Listener(mpsc::UnboundedReceiver<Arrival>);

#[async_trait]
impl Listen for Listener {
    async fn accept(&mut self) -> io::Result<(Connection, SocketAddr)> {
        match self.0.recv().await {
            Some(arrival) => Ok(arrival),
            // Replaced by a later listener; nobody comes here any more.
            None => std::future::pending().await,
        }
    }
}
