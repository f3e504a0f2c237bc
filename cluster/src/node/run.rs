//! Starting and ending a member.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use super::renewal::{self, Renewal};
use super::{Node, authorities, confirm, denied, housekeeping, pass_on, propose, removals, rounds};
use crate::consensus::{self, Network, Peers, Raft, StateMachine, lead};
use crate::host::blocking;
use crate::identity::{CA_FILE, Identity};
use crate::service::Rate;
use crate::storage::Db;
use crate::tls::{Credentials, Trust, member_client};
use crate::{ClusterConfig, Leadership, OpenError};

/// Starts Raft and the member's own tasks.
pub(crate) async fn start(
    config: ClusterConfig,
    identity: Identity,
    db: Arc<Db>,
) -> Result<Arc<Node>, OpenError> {
    let unusable = |detail: String| OpenError::Unusable { path: config.data_dir.clone(), detail };
    let mut identity = identity;
    identity.trusted = authorities::at_start(&identity, &db, &config.data_dir);
    renewal::replace_if_useless(&config, &mut identity, &db).map_err(&unusable)?;
    let credentials = Credentials::new(&identity.pair, &identity.trusted)
        .map_err(|error| unusable(error.to_string()))?;
    let renewal = Renewal::of(&identity)
        .ok_or_else(|| unusable("its certificate names no node".to_owned()))?;
    let tls = member_client(&credentials).map_err(|error| unusable(error.to_string()))?;
    if identity.trusted.signer_fingerprint().is_empty() {
        return Err(unusable(format!("{CA_FILE} is not a certificate")));
    }
    let trust = Arc::new(Trust::of(credentials.roots().clone()));
    let io = |source| OpenError::Io { path: config.data_dir.clone(), source };
    // Before the first connection.
    trust.deny(denied::denied(&db).map_err(io)?);
    let cluster_id = identity.record.cluster_id.clone();
    let peers = Arc::new(Peers::new(config.host.clone(), tls, trust.clone(), cluster_id));
    let removed = Arc::new(watch::channel(false).0);
    consensus::clean_up(&config.data_dir.join("snapshots")).map_err(io)?;
    let machine = StateMachine::open(db.clone()).map_err(io)?;
    let network = Network {
        peers: peers.clone(),
        append_limit: Duration::from_millis(config.timings.election_max_ms.max(1000)),
        removed: removed.clone(),
    };
    db.measure(config.min_free_bytes);
    let id = identity.record.node_id;
    let raft = consensus::start(id.0, &config, db.clone(), machine.clone(), network).await?;
    // Of an end without closing, Raft has applied again what the state did not hold yet.
    trust.deny(denied::denied(&db).map_err(io)?);
    let mut nonce = [0; 8];
    getrandom::fill(&mut nonce).map_err(|error| unusable(error.to_string()))?;
    let proposals = propose::Proposals::new(raft.clone(), config.timings.silence_limit());
    let (confirm, reads) = confirm::queue();
    let (rounds, unconfirmed) = rounds::queue();
    let (pass_on, txns) = pass_on::queue();
    let node = Arc::new(Node {
        client: format!("node-{id}-{:016x}", u64::from_ne_bytes(nonce)),
        raft,
        machine,
        peers,
        leadership: watch::channel(Leadership {
            is_leader: false,
            term: 0,
            since: Instant::now().into_std(),
        })
        .0,
        known_leader: watch::channel(None).0,
        label: watch::channel(identity.record.node_name.clone()).0,
        removed,
        failure: watch::channel(None).0,
        recovered: watch::channel(!db.lost_tail).0,
        sequence: AtomicU64::new(0),
        stopping: AtomicBool::new(false),
        watch_slots: Arc::new(Semaphore::new(config.limits.client_watches)),
        rate: Mutex::new(Rate::new(config.limits.client_requests_per_s)),
        backup_slots: Arc::new(Semaphore::new(crate::backup::AT_ONCE)),
        confirm,
        rounds,
        proposals,
        pass_on,
        check_turn: tokio::sync::Mutex::new(()),
        removals: removals::Removals::default(),
        tasks: Mutex::new(Vec::new()),
        config,
        identity: identity.record,
        trusted: ArcSwap::from_pointee(identity.trusted),
        credentials,
        renewal,
        trust,
        db,
    });
    node.follow_members(&node.metrics());
    let mut tasks = housekeeping::spawn(&node);
    tasks.push(tokio::spawn(confirm::serve(node.clone(), reads)));
    tasks.push(tokio::spawn(confirm_leadership(node.raft.clone(), unconfirmed)));
    tasks.push(tokio::spawn(pass_on::serve(node.clone(), txns)));
    *node.tasks.lock().unwrap_or_else(PoisonError::into_inner) = tasks;
    Ok(node)
}

async fn confirm_leadership(raft: Raft, waiting: UnboundedReceiver<rounds::Waiting>) {
    let pause = || rounds::pause(lead::look(&raft, lead::member_count));
    let round = |limit| {
        let raft = raft.clone();
        async move { lead::confirm(&raft, limit).await }
    };
    rounds::serve(waiting, rounds::OVERTAKE, pause, round).await;
}

impl Node {
    /// Hands leadership over, ends Raft, then the database.
    pub(crate) async fn shutdown(&self) {
        if self.stopping.swap(true, Ordering::SeqCst) {
            return;
        }
        self.hand_over().await;
        lead::stop(&self.raft).await;
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        for task in tasks {
            task.abort();
        }
        let db = self.db.clone();
        if blocking(self.db.host(), move || db.close()).await.is_err() {
            tracing::error!("the database could not be closed");
        }
        // Watches and waiting callers look again, and find the end.
        self.failure.send_if_modified(|failure| {
            failure.get_or_insert(crate::StoreError::Shutdown);
            true
        });
    }
}
