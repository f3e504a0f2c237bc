//! Whose certificates count no more, and the open connections to their holders.
//!
//! ```text
//!   replicated state ──► Denied ──► Trust ── judges ──► each handshake, each request
//!                                     └───── cuts ────► the connections that are open
//! ```
//!
//! Invariant: a connection is entered before it is judged, and a new list (or the CAs that are trusted
//! now) is stored before the connections are looked through; so none slips between the two.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll};

use arc_swap::ArcSwap;
use futures::task::AtomicWaker;
use proto::NodeId;
use proto::record::CertificateHolder;
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{PeerIdentity, Roots};
use crate::consensus::REMOVED;
use crate::identity::Certificate;

/// Why a certificate that TLS takes is refused all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Its node was removed from the cluster.
    Removed,
    /// It was revoked.
    Revoked,
    /// Its CA is not trusted any more.
    Untrusted,
    /// It is of the CA before, and the cluster has no record of it: who has that CA's key signed it.
    Unrecorded,
    /// Its node is none any more, and the removal is not finished yet.
    Leaving,
}

impl Refusal {
    /// For the holder. A node knows by the first that it is no member any more.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Removed => REMOVED,
            Self::Revoked => {
                "this certificate was revoked (see `clusterctl cluster cert list`); get a new one from an administrator"
            }
            Self::Unrecorded => {
                "the cluster has no record of this certificate, and its CA signs no more; a node that signed it itself is removed and joins again"
            }
            Self::Leaving => {
                "this node is being removed from the cluster: it is no member any more; remove it once more from another node (`clusterctl cluster remove NODE`) to finish that"
            }
            Self::Untrusted => {
                "the CA that signed this certificate was replaced; get a new one from an administrator"
            }
        }
    }
}

/// Whose a recorded certificate is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Recorded {
    pub(crate) holder: CertificateHolder,
    /// SHA-256 of its public key. A number alone can be copied.
    pub(crate) key_hash: String,
}

impl Recorded {
    fn is(&self, certificate: &Certificate) -> bool {
        let holder = match (&self.holder, &certificate.holder) {
            (CertificateHolder::Node(one), PeerIdentity::Node(other)) => one == other,
            (CertificateHolder::Client(one), PeerIdentity::Client(other)) => one == other,
            _ => false,
        };
        holder && self.key_hash == certificate.key_hash
    }
}

/// What the replicated state says of certificates that count no more.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Denied {
    /// Removed nodes: their ids are never given again.
    pub(crate) nodes: BTreeSet<NodeId>,
    /// Revoked certificates, also those that have expired.
    pub(crate) serials: BTreeSet<String>,
    /// Those that are recorded and count, by serial number: of the CA before these alone count.
    pub(crate) recorded: BTreeMap<String, Recorded>,
}

impl Denied {
    pub(crate) fn refuses(&self, holder: &PeerIdentity, serial: &str) -> Option<Refusal> {
        match holder {
            PeerIdentity::Node(id) if self.nodes.contains(id) => Some(Refusal::Removed),
            _ if self.serials.contains(serial) => Some(Refusal::Revoked),
            _ => None,
        }
    }

    fn knows(&self, certificate: &Certificate) -> bool {
        self.recorded.get(&certificate.serial).is_some_and(|recorded| recorded.is(certificate))
    }
}

/// The list, and the connections that it is held against.
#[derive(Debug, Default)]
pub(crate) struct Trust {
    denied: ArcSwap<Denied>,
    /// None: whoever shook hands is taken.
    roots: Option<Arc<Roots>>,
    open: Mutex<Vec<Weak<Open>>>,
}

/// An open connection.
#[derive(Debug)]
pub(crate) struct Open {
    certificate: Certificate,
    /// All that the other end showed, its own certificate first.
    chain: Vec<CertificateDer<'static>>,
    /// It lives only for its holder to be told why.
    told: AtomicBool,
    over: AtomicBool,
    reader: AtomicWaker,
}

impl Open {
    /// Ends the connection at its next read or write, which comes at once.
    pub(crate) fn cut(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.reader.wake();
    }

    /// Instead of being cut with the others it is cut by whoever told its holder.
    pub(crate) fn keep_to_tell(&self) {
        self.told.store(true, Ordering::SeqCst);
    }
}

impl Trust {
    /// As these CAs say.
    pub(crate) fn of(roots: Arc<Roots>) -> Self {
        Self { roots: Some(roots), ..Self::default() }
    }

    /// Enters a connection, and judges what its other end showed.
    pub(crate) fn enter(
        &self,
        certificate: Certificate,
        chain: &[CertificateDer<'_>],
    ) -> (Arc<Open>, Option<Refusal>) {
        let open = Arc::new(Open {
            certificate,
            chain: chain.iter().map(|der| der.clone().into_owned()).collect(),
            told: AtomicBool::new(false),
            over: AtomicBool::new(false),
            reader: AtomicWaker::new(),
        });
        {
            let mut all = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            if all.len() == all.capacity() {
                all.retain(|open| open.strong_count() > 0);
            }
            all.push(Arc::downgrade(&open));
        }
        let refusal = self.judge(&open.certificate.holder, &open.certificate.serial);
        // The CAs may have changed since the handshake asked.
        let refusal = refusal.or_else(|| self.unvouched(&open));
        (open, refusal)
    }

    /// Why no CA vouches for what the other end showed, if none does.
    fn unvouched(&self, open: &Open) -> Option<Refusal> {
        if !self.issued(open) {
            return Some(Refusal::Untrusted);
        }
        self.unrecorded(open)
    }

    /// Of the CA before, what is recorded counts alone.
    fn unrecorded(&self, open: &Open) -> Option<Refusal> {
        let Open { certificate, chain, .. } = open;
        let before = |roots: &Arc<Roots>| roots.issued_before(chain, certificate.issued_unix_s);
        let unrecorded =
            !self.denied.load().knows(certificate) && self.roots.as_ref().is_some_and(before);
        unrecorded.then_some(Refusal::Unrecorded)
    }

    fn issued(&self, open: &Open) -> bool {
        let at = open.certificate.issued_unix_s;
        self.roots.as_ref().is_none_or(|roots| roots.issued(&open.chain, at))
    }

    /// The CAs have changed: what none of them signed is cut.
    pub(crate) fn recheck(&self) {
        let all = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        for open in all.iter().filter_map(Weak::upgrade) {
            if let Some(refusal) = self.unvouched(&open) {
                let Certificate { holder, serial, .. } = &open.certificate;
                tracing::warn!(%holder, serial, ?refusal, "its CA was replaced: its connection is cut");
                open.cut();
            }
        }
    }

    /// Whether a certificate is refused now.
    pub(crate) fn judge(&self, holder: &PeerIdentity, serial: &str) -> Option<Refusal> {
        self.denied.load().refuses(holder, serial)
    }

    /// Another list from now on; what it refuses is cut.
    pub(crate) fn deny(&self, denied: Denied) {
        if **self.denied.load() == denied {
            return;
        }
        self.denied.store(Arc::new(denied));
        let all = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        for open in all.iter().filter_map(Weak::upgrade) {
            let Certificate { holder, serial, .. } = &open.certificate;
            // Its signature was checked when it was opened, and is when the CAs change.
            let refused = self.judge(holder, serial).or_else(|| self.unrecorded(&open));
            if refused.is_some() && !open.told.load(Ordering::SeqCst) {
                tracing::warn!(%holder, serial, ?refused, "its connection is cut");
                open.cut();
            }
        }
    }
}

/// A connection that ends when its other end's certificate is refused.
#[derive(Debug)]
pub(crate) struct Guarded<S> {
    stream: S,
    open: Option<Arc<Open>>,
}

impl<S> Guarded<S> {
    pub(crate) fn new(stream: S, open: Option<Arc<Open>>) -> Self {
        Self { stream, open }
    }

    fn is_over(&self) -> io::Result<()> {
        match &self.open {
            Some(open) if open.over.load(Ordering::SeqCst) => Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the other end's certificate counts no more",
            )),
            _ => Ok(()),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(open) = &self.open {
            // Before the look: a cut in between wakes.
            open.reader.register(cx.waker());
        }
        self.is_over()?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.is_over()?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.is_over()?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.is_over()?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    fn certificate(holder: PeerIdentity, serial: &str) -> Certificate {
        Certificate {
            holder,
            serial: serial.to_owned(),
            issued_unix_s: 0,
            expires_unix_s: 1,
            key_hash: String::new(),
            authority: String::new(),
        }
    }

    #[tokio::test]
    async fn whoever_waits_on_a_connection_that_is_cut_learns_it() {
        let trust = Trust::default();
        let ann = || PeerIdentity::Client("ann".to_owned());
        let (near, _far) = tokio::io::duplex(64);
        let (open, refused) = trust.enter(certificate(ann(), "aa"), &[]);
        assert_eq!(refused, None);
        let mut reading = tokio::spawn(async move {
            Guarded::new(near, Some(open)).read_u8().await.map_err(|error| error.kind())
        });
        let (near, _other) = tokio::io::duplex(64);
        let (open, _) = trust.enter(certificate(ann(), "bb"), &[]);
        let mut other = Guarded::new(near, Some(open));
        assert!(futures::poll!(&mut reading).is_pending());
        trust.deny(Denied { serials: ["aa".to_owned()].into(), ..Denied::default() });
        let ended = tokio::time::timeout(std::time::Duration::from_secs(5), reading).await;
        assert_eq!(ended.unwrap().unwrap(), Err(io::ErrorKind::ConnectionAborted));
        assert!(futures::poll!(std::pin::pin!(other.read_u8())).is_pending(), "it is another's");
        assert_eq!(trust.enter(certificate(ann(), "aa"), &[]).1, Some(Refusal::Revoked));
        assert_eq!(trust.enter(certificate(ann(), "bb"), &[]).1, None);
    }

    #[test]
    fn a_removed_node_is_refused_whatever_certificate_it_shows() {
        let denied = Denied { nodes: [NodeId(3)].into(), ..Denied::default() };
        let node = |id| PeerIdentity::Node(NodeId(id));
        assert_eq!(denied.refuses(&node(3), "any"), Some(Refusal::Removed));
        assert_eq!(denied.refuses(&node(4), "any"), None);
        assert_eq!(denied.refuses(&PeerIdentity::Client("3".to_owned()), "any"), None);
    }

    #[test]
    fn connections_that_are_closed_are_forgotten() {
        let trust = Trust::default();
        for _ in 0..10_000 {
            trust.enter(certificate(PeerIdentity::Node(NodeId(1)), "aa"), &[]);
        }
        assert!(trust.open.lock().unwrap().len() < 100);
    }
}
