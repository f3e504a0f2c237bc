//! A running member: Raft with everything around it. The public handle is [`crate::Cluster`].

mod authorities;
mod confirm;
mod denied;
mod housekeeping;
mod lead;
mod members;
mod pass_on;
mod past;
mod propose;
mod read;
mod removals;
mod renewal;
mod retention;
mod rounds;
mod run;
mod settings;
mod snapshots;
mod voting;
mod watches;
mod write;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use arc_swap::ArcSwap;
use proto::NodeId;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::consensus::lead::{is_voter, leads, look, out_of_touch};
use crate::consensus::{Metrics, Peers, Raft, StateMachine, current_metrics};
use crate::identity::{NodeIdentity, Trusted};
use crate::service::Rate;
use crate::storage::Db;
use crate::tls::{Credentials, Trust};
use crate::{ClusterConfig, Leadership, Member, StoreError};

pub(crate) use run::start;
pub(crate) use write::unix_now_ms;

use renewal::Renewal;

/// The parts of a running member.
pub(crate) struct Node {
    config: ClusterConfig,
    identity: NodeIdentity,
    /// The CAs that this node trusts; the one that signs comes first.
    trusted: ArcSwap<Trusted>,
    /// What this node shows of itself in each new handshake.
    credentials: Arc<Credentials>,
    renewal: Renewal,
    /// Which certificates are refused, and the connections that this is held against.
    trust: Arc<Trust>,
    db: Arc<Db>,
    raft: Raft,
    machine: StateMachine,
    peers: Arc<Peers>,
    leadership: watch::Sender<Leadership>,
    /// Who leads, for all this node knows.
    known_leader: watch::Sender<Option<u64>>,
    /// The name that people see; it can change.
    label: watch::Sender<String>,
    removed: Arc<watch::Sender<bool>>,
    /// Why this member takes no part any more.
    failure: watch::Sender<Option<StoreError>>,
    /// False while answers could be older than some given before a power loss.
    recovered: watch::Sender<bool>,
    /// Names this process's own transactions.
    client: String,
    sequence: AtomicU64,
    stopping: AtomicBool,
    /// One permit for each watch that a client may have.
    watch_slots: Arc<tokio::sync::Semaphore>,
    rate: std::sync::Mutex<Rate>,
    /// One permit for each backup that is being sent.
    backup_slots: Arc<tokio::sync::Semaphore>,
    /// Where linearizable reads are confirmed.
    confirm: confirm::Confirm,
    /// Where those wait that need this node's leadership confirmed.
    rounds: rounds::Rounds,
    /// Where commands wait that this node proposes.
    proposals: propose::Proposals,
    /// Where transactions wait that another node leads.
    pass_on: pass_on::PassOn,
    /// One at a time asks for checksums.
    check_turn: tokio::sync::Mutex<()>,
    removals: removals::Removals,
    tasks: std::sync::Mutex<Vec<tokio::task::JoinHandle<()>>>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl Node {
    pub(crate) fn config(&self) -> &ClusterConfig {
        &self.config
    }
    pub(crate) fn identity(&self) -> &NodeIdentity {
        &self.identity
    }
    pub(crate) fn trusted(&self) -> Arc<Trusted> {
        self.trusted.load_full()
    }
    pub(crate) fn trust(&self) -> &Arc<Trust> {
        &self.trust
    }
    pub(crate) fn credentials(&self) -> &Arc<Credentials> {
        &self.credentials
    }
    pub(crate) fn id(&self) -> NodeId {
        self.identity.node_id
    }
    pub(crate) fn db(&self) -> &Arc<Db> {
        &self.db
    }
    pub(crate) fn raft(&self) -> &Raft {
        &self.raft
    }
    pub(crate) fn peers(&self) -> &Arc<Peers> {
        &self.peers
    }
    pub(crate) fn backup_slots(&self) -> &Arc<tokio::sync::Semaphore> {
        &self.backup_slots
    }
    pub(crate) fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.subscribe()
    }
    pub(crate) fn label(&self) -> watch::Receiver<String> {
        self.label.subscribe()
    }
    pub(crate) fn failure(&self) -> watch::Receiver<Option<StoreError>> {
        self.failure.subscribe()
    }

    /// Raft's state now. Never hold on to a borrow of openraft's own: it can block Raft.
    pub(crate) fn metrics(&self) -> Metrics {
        current_metrics(&self.raft)
    }

    /// Who leads, for all this node knows.
    pub(crate) fn leader(&self) -> Option<u64> {
        look(&self.raft, |now| now.current_leader)
    }

    /// Raft's present term.
    pub(crate) fn term(&self) -> u64 {
        look(&self.raft, |now| now.current_term)
    }

    /// Whether this node leads, for all it knows.
    pub(crate) fn leads(&self) -> bool {
        look(&self.raft, leads)
    }

    /// Resolves when a node leads that is none of those given.
    async fn another_leads(&self, than: [Option<u64>; 2]) {
        let mut known = self.known_leader.subscribe();
        let other = |leader: &Option<u64>| leader.is_some() && !than.contains(leader);
        if known.wait_for(other).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Whether this node counts for the quorum.
    pub(crate) fn is_voter(&self) -> bool {
        look(&self.raft, is_voter)
    }

    /// Whether this node has no leader, or as one no quorum, for all it knows without asking.
    pub(crate) fn out_of_touch(&self, limit: Duration) -> bool {
        look(&self.raft, |now| out_of_touch(now, limit))
    }

    /// Refuses work on a member that is at its end.
    pub(crate) fn alive(&self) -> Result<(), StoreError> {
        if self.stopping.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(StoreError::Shutdown);
        }
        match &*self.failure.borrow() {
            Some(failure) => Err(failure.clone()),
            None => Ok(()),
        }
    }

    /// Whether a client may ask now.
    pub(crate) fn take_turn(&self, client: &str) -> Result<(), StoreError> {
        let mut rate = self.rate.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if rate.take(client, Instant::now()) {
            return Ok(());
        }
        let per_s = self.config.limits.client_requests_per_s;
        Err(StoreError::TooOften { client: client.to_owned(), per_s })
    }

    /// Members, by id.
    pub(crate) fn members(&self) -> Vec<Member> {
        look(&self.raft, members::of)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.config.request_timeout
    }

    /// How long a member may be silent before it does not count as reachable.
    fn silence_limit(&self) -> Duration {
        self.config.timings.silence_limit()
    }
}
