//! This node's own certificate: gets the next one in time, shows it from then on, keeps it on disk.
//!
//! ```text
//!   due, asked for ──► new key ──► the leader signs ──► claimed ──► on disk ──► in each new handshake
//!                         │ fails: again, later and later; why is in the record, for the list
//!                         └ its own is over, or not good yet: it helps itself (`alone.rs`)
//! ```
//!
//! Invariant: wherever a renewal stops, the node goes on with a certificate that it has claimed. One
//! that it claimed and does not show is given back when it settles; one that it never claimed stays
//! in the records as unused.

mod alone;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::NodeId;
use proto::v1::RenewRequest;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Node;
use super::denied::denied;
use crate::certificates::{self, ClaimError};
use crate::consensus::renew;
use crate::host::blocking;
use crate::identity::{Certificate, Identity, Pair, Standing, Trusted, renewal_request};
use crate::membership::unix_now_s;
use crate::storage::Db;
use crate::tls::{Credentials, PeerIdentity, Refusal};
use crate::{ClusterConfig, MembershipError, StoreError};

/// Between two looks at most.
const LOOK_MAX: Duration = Duration::from_secs(60);
const LOOK_MIN: Duration = Duration::from_millis(100);
/// Between two attempts at most.
const PAUSE_MAX: Duration = Duration::from_secs(600);
/// Between two attempts where the certificate is of no use, or about to be.
const PAUSE_URGENT: Duration = Duration::from_secs(5);

/// What this node knows of its own certificate.
#[derive(Debug)]
pub(super) struct Renewal {
    held: Mutex<Held>,
    /// The next pair, whose use failed: it is tried again before another is asked for.
    next: Mutex<Option<Pair>>,
    /// The records say which certificate this node shows.
    settled: AtomicBool,
    /// One renewal of this node at a time.
    one: tokio::sync::Mutex<()>,
    /// One signature for others at a time.
    issuing: tokio::sync::Mutex<()>,
    /// The CA is another one: look at once.
    woken: Notify,
}

/// The pair that a node shows, and the one before.
#[derive(Debug, Clone)]
struct Held {
    certificate: Certificate,
    pair: Pair,
    previous: Option<Pair>,
}

impl Held {
    /// Refuses what is no certificate of this node.
    fn of(id: NodeId, pair: &Pair, previous: Option<Pair>) -> Result<Self, String> {
        let certificate = pair.certificate().ok_or("it is no certificate of a node")?;
        if certificate.holder != PeerIdentity::Node(id) {
            return Err(format!("it is a certificate of {}", certificate.holder));
        }
        Ok(Self { certificate, pair: pair.clone(), previous })
    }
}

/// Whose certificates these are.
#[derive(Debug, Clone, Copy)]
struct Owner<'a> {
    cluster_id: &'a str,
    id: NodeId,
    trusted: &'a Trusted,
    /// Where the sealing key is.
    folder: &'a Path,
    /// How long one lasts that the node signs itself.
    life: Duration,
}

impl Renewal {
    /// None where the certificate is none of this node.
    pub(super) fn of(identity: &Identity) -> Option<Self> {
        let previous = identity.previous.clone();
        let held = Held::of(identity.record.node_id, &identity.pair, previous).ok()?;
        Some(Self {
            held: Mutex::new(held),
            next: Mutex::default(),
            settled: AtomicBool::new(false),
            one: tokio::sync::Mutex::default(),
            issuing: tokio::sync::Mutex::default(),
            woken: Notify::new(),
        })
    }

    /// Has the node look at its certificate now.
    pub(super) fn wake(&self) {
        self.woken.notify_one();
    }

    fn held(&self) -> Held {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn next(&self) -> Option<Pair> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_next(&self, next: Option<Pair>) {
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = next;
    }
}

/// Between two looks at whether it is time: often enough for the shortest life.
fn look_every(config: &ClusterConfig) -> Duration {
    (config.certificates.node / 50).clamp(LOOK_MIN, LOOK_MAX)
}

/// Until the next look, after so many failures in a row; `left`: how long the certificate is still
/// good. Many attempts come before its end, and they go on after it.
fn pause(look: Duration, failures: u32, left: Duration) -> Duration {
    let later = look.saturating_mul(1u32.checked_shl(failures.min(16)).unwrap_or(u32::MAX));
    later.min(PAUSE_MAX).min(left / 10).max(look.min(PAUSE_URGENT))
}

/// At the start: a certificate that is over, or not good yet, is of no use to anybody.
pub(super) fn replace_if_useless(
    config: &ClusterConfig,
    identity: &mut Identity,
    db: &Db,
) -> Result<(), String> {
    let (id, previous) = (identity.record.node_id, identity.previous.clone());
    let held = Held::of(id, &identity.pair, previous).map_err(|why| {
        format!("node.pem: {why}; remove this node from the cluster, empty its data folder and join again")
    })?;
    let now_unix_s = unix_now_s();
    let standing = held.certificate.standing(now_unix_s);
    let denied = denied(db).map_err(|error| error.to_string())?;
    let refused = denied.refuses(&held.certificate.holder, &held.certificate.serial);
    if standing == Standing::Good && refused != Some(Refusal::Revoked) {
        return Ok(());
    }
    let owner = Owner {
        cluster_id: &identity.record.cluster_id,
        id,
        trusted: &identity.trusted,
        folder: &config.data_dir,
        life: config.certificates.node,
    };
    match alone::replacement(&owner, &held, db, now_unix_s) {
        Ok(next) => {
            tracing::warn!(?standing, serial = %next.certificate.serial, "this node's certificate was of no use at this time; it goes on with another one");
            let stored = next.pair.store(&config.data_dir, next.previous.as_ref());
            stored.map_err(|error| error.to_string())?;
            (identity.pair, identity.previous) = (next.pair, next.previous);
        }
        Err(why) => {
            tracing::error!(?standing, %why, "this node's certificate is of no use at this time; the other members will not talk to it: set the clock (`timedatectl set-ntp true`), or else remove the node from the cluster, empty its data folder and join again");
        }
    }
    Ok(())
}

/// Runs for as long as the member does.
pub(super) async fn keep(node: Arc<Node>) {
    let look = look_every(&node.config);
    let mut failures = 0u32;
    loop {
        if node.alive().is_err() {
            return;
        }
        match node.renew_if_due().await {
            Ok(()) => failures = 0,
            Err(why) => {
                failures = failures.saturating_add(1);
                tracing::warn!(%why, failures, "this node did not get its next certificate");
                let _ = certificates::note_trouble(&node, &node.certificate(), &why).await;
            }
        }
        if let Err(error) = node.settle().await {
            tracing::debug!(%error, "which certificate this node shows is not recorded yet");
        }
        if node.leads()
            && let Err(error) = certificates::forget(&node).await
        {
            tracing::debug!(%error, "old certificates are not forgotten yet");
        }
        let left = node.certificate().left(unix_now_s());
        let settled = node.renewal.settled.load(Ordering::SeqCst);
        let urgent = !settled || node.is_outdated(&node.certificate());
        let wait = pause(if urgent { look.min(PAUSE_URGENT) } else { look }, failures, left);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = node.renewal.woken.notified() => failures = 0,
        }
    }
}

impl Node {
    /// The certificate that this node shows now.
    pub(crate) fn certificate(&self) -> Certificate {
        self.renewal.held().certificate
    }

    /// Held while a certificate is judged, signed and recorded.
    pub(crate) async fn issuing(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.renewal.issuing.lock().await
    }

    async fn renew_if_due(self: &Arc<Self>) -> Result<(), String> {
        let (present, now_unix_s) = (self.certificate(), unix_now_s());
        let good = !self.is_useless(&present, now_unix_s) && !self.is_outdated(&present);
        if good && now_unix_s < present.due_unix_s() {
            return Ok(());
        }
        self.renew().await.map(drop).map_err(|error| error.to_string())
    }

    /// Whether nobody talks to who shows a certificate. (One that a node shows is not revoked, but
    /// for the moment between its start and its first word to the others.)
    fn is_useless(&self, shown: &Certificate, now_unix_s: u64) -> bool {
        shown.standing(now_unix_s) != Standing::Good
            || self.trust.judge(&shown.holder, &shown.serial) == Some(Refusal::Revoked)
    }

    /// Whether a certificate is of another CA than the one that signs now.
    fn is_outdated(&self, shown: &Certificate) -> bool {
        shown.authority != self.trusted().signer_key_id()
    }

    /// Waits until this node shows a certificate of a CA (its key's identifier), as long as that takes
    /// at most: whoever is told to trust that one alone can speak to this node then.
    pub(crate) async fn shows(&self, authority: &str) {
        let deadline = self.deadline();
        while self.certificate().authority != authority && Instant::now() < deadline {
            tokio::time::sleep(LOOK_MIN).await;
        }
    }

    /// Has the records say which certificate this node shows.
    async fn settle(&self) -> Result<(), StoreError> {
        let _one = self.renewal.one.lock().await;
        if !self.renewal.settled.load(Ordering::SeqCst)
            && certificates::settle(self, &self.certificate()).await?
        {
            self.renewal.settled.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Gets this node its next certificate now. In a task of its own: whoever asked for it may go.
    pub(crate) async fn renew(self: &Arc<Self>) -> Result<Certificate, MembershipError> {
        let node = self.clone();
        let renewing = tokio::spawn(async move {
            let renewed = node.renew_to_the_end().await?;
            // From here on the one before can be revoked. Where this fails, it is done later.
            if let Err(error) = node.settle().await {
                tracing::debug!(%error, "which certificate this node shows is not recorded yet");
            }
            Ok(renewed)
        });
        let renewed = renewing.await.unwrap_or_else(|error| Err(error.to_string()));
        renewed.map_err(MembershipError::NotRenewed)
    }

    async fn renew_to_the_end(&self) -> Result<Certificate, String> {
        let _one = self.renewal.one.lock().await;
        let Err(why) = self.renew_by_leader().await else { return Ok(self.certificate()) };
        let (held, now_unix_s) = (self.renewal.held(), unix_now_s());
        if !self.is_useless(&held.certificate, now_unix_s) {
            return Err(why);
        }
        tracing::warn!(%why, "this node's certificate is of no use at this time; it helps itself");
        let trusted = self.trusted();
        let owner = Owner {
            cluster_id: &self.identity.cluster_id,
            id: self.id(),
            trusted: &trusted,
            folder: &self.config.data_dir,
            life: self.config.certificates.node,
        };
        let next = alone::replacement(&owner, &held, &self.db, now_unix_s);
        let next = next.map_err(|alone| format!("{why}; and alone: {alone}"))?;
        self.show(next).await?;
        Ok(self.certificate())
    }

    async fn renew_by_leader(&self) -> Result<(), String> {
        let now_unix_s = unix_now_s();
        let fresh = |pair: &Pair| {
            let certificate = pair.certificate();
            certificate.is_some_and(|next| {
                let good = next.standing(now_unix_s) == Standing::Good;
                good && now_unix_s < next.due_unix_s() && !self.is_outdated(&next)
            })
        };
        let pair = match self.renewal.next().filter(fresh) {
            Some(pair) => pair,
            None => self.ask_for_next().await?,
        };
        self.renewal.set_next(Some(pair.clone()));
        self.exchange(&pair).await?;
        self.renewal.set_next(None);
        Ok(())
    }

    async fn ask_for_next(&self) -> Result<Pair, String> {
        let id = self.id();
        let (key, csr_pem) = renewal_request(&self.identity.cluster_id, id)
            .map_err(|error| format!("no key could be made: {error}"))?;
        let request = RenewRequest { node_id: id.0, csr_pem, now_unix_s: unix_now_s() };
        let leader = self.leader().ok_or("no leader is known")?;
        let limit = self.config.request_timeout;
        let signed = if leader == id.0 {
            let signed = tokio::time::timeout(limit, certificates::issue_next(self, &request));
            let signed = signed.await.map_err(|_| "no majority answered in time")?;
            signed.map_err(|status| status.message().to_owned())?
        } else {
            let members = self.members();
            let member = members.iter().find(|member| member.node_id.0 == leader);
            let channel = member.and_then(|member| self.peers.shared(leader, &member.api_address));
            let channel = channel.ok_or("the leader's address is not known")?;
            renew(channel, request, limit, &self.removed).await?
        };
        Ok(Pair::new(&key, &signed))
    }

    /// Works with a pair that the leader signed: first it is looked at, then it is claimed, then it is
    /// on disk, then it is shown.
    async fn exchange(&self, pair: &Pair) -> Result<(), String> {
        let next = Held::of(self.id(), pair, Some(self.renewal.held().pair))?;
        Credentials::new(pair, &self.trusted()).map_err(|error| error.to_string())?;
        let standing = next.certificate.standing(unix_now_s());
        if standing != Standing::Good {
            self.renewal.set_next(None);
            return Err(format!(
                "the leader's certificate is of no use by this node's clock ({standing:?}): set the clock of the one that is wrong (`timedatectl set-ntp true`)"
            ));
        }
        // Whatever becomes of it, the records are looked at afterwards.
        self.renewal.settled.store(false, Ordering::SeqCst);
        let claimed = certificates::claim(self, &next.certificate.serial).await;
        if matches!(claimed, Err(ClaimError::Revoked | ClaimError::Unknown)) {
            self.renewal.set_next(None);
        }
        claimed.map_err(|error| error.to_string())?;
        self.show(next).await
    }

    /// Shows a pair from now on, once it is on disk. Connections that are open go on with the old one.
    async fn show(&self, next: Held) -> Result<(), String> {
        self.alive().map_err(|error| error.to_string())?;
        let (folder, stored) = (self.config.data_dir.clone(), next.clone());
        blocking(self.db.host(), move || stored.pair.store(&folder, stored.previous.as_ref()))
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("it cannot be kept: {error}"))?;
        self.renewal.settled.store(false, Ordering::SeqCst);
        self.credentials.replace(&next.pair).map_err(|error| error.to_string())?;
        let certificate = &next.certificate;
        tracing::info!(serial = %certificate.serial, expires = certificate.expires_unix_s, "this node has a new certificate");
        *self.renewal.held.lock().unwrap_or_else(PoisonError::into_inner) = next;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
