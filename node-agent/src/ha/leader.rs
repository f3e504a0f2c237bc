//! What the leader knows and says: heartbeats in, verdicts and the last plan out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cluster::{Confirmed, Consistency, Txn};
use ha_manager::{
    Attempts, ClusterState, Detector, Now, Observations, Plan, Timing, Verdict, plan,
};
use proto::record::{FencedRecord, HaLeaderRecord};
use proto::v1::{HeartbeatRequest, HeartbeatResponse, NodeReport};
use proto::{Name, NodeId, Revision, keys};
use tonic::Status;

use super::execute::execute;
use super::fencing::FencingClaim;
use super::observe::Seen;
use crate::clock::unix_ms;
use crate::lease::boottime_ms;
use crate::node::Node;
use crate::store::RecordError;
use crate::store::json;

/// The leader's knowledge; on a node that does not lead it is empty. Clones share it.
#[derive(Debug, Clone)]
pub struct Leader {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    detector: Detector,
    /// Set once this leadership is written: before, no heartbeat is acknowledged.
    epoch: Option<Epoch>,
    /// Nodes whose fencing was begun and whose outcome is not known, and in which leadership.
    fencing: BTreeMap<NodeId, Epoch>,
    reports: BTreeMap<NodeId, NodeReport>,
    failed_migrations: BTreeMap<Name, Attempts>,
    moving: BTreeSet<Name>,
    imbalanced_since_ms: Option<u64>,
    plan: Plan,
}

/// One leadership that may act.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Epoch {
    /// Raft's term.
    pub(super) term: u64,
    /// The `mod_revision` of [`keys::HA_LEADER`], compared by every transaction of HA.
    pub(super) revision: Revision,
}

/// What the leader knows of a node beyond the configuration.
#[derive(Debug, Clone, Default)]
pub struct NodeLook {
    /// Since its last heartbeat.
    pub age_ms: Option<u64>,
    /// What it said of itself.
    pub report: Option<NodeReport>,
}

impl Leader {
    /// Of a node that does not lead yet.
    #[must_use]
    pub fn new(me: NodeId, timing: Timing) -> Self {
        let inner = Inner {
            detector: Detector::new(me, timing),
            epoch: None,
            fencing: BTreeMap::new(),
            reports: BTreeMap::new(),
            failed_migrations: BTreeMap::new(),
            moving: BTreeSet::new(),
            imbalanced_since_ms: None,
            plan: Plan::default(),
        };
        Self { inner: Arc::new(Mutex::new(inner)) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers a heartbeat of `from`, after a quorum confirmed this node's leadership by messages
    /// sent after the heartbeat came in.
    ///
    /// # Errors
    /// `UNAVAILABLE`: not acknowledged, for whatever reason.
    pub async fn heartbeat(
        &self,
        node: &Node,
        from: NodeId,
        request: HeartbeatRequest,
    ) -> Result<HeartbeatResponse, Status> {
        {
            let mut inner = self.lock();
            // Looked at now and again at the end: a fencing that ends in between may have been
            // committed after the record was read.
            if inner.fencing.contains_key(&from) {
                return Err(Status::unavailable("this node is being fenced"));
            }
            inner.detector.heard(from, boottime_ms());
            if let Some(report) = request.report {
                inner.reports.insert(from, report);
            }
        }
        let confirmed = node.cluster().confirm_leadership().await;
        let confirmed = confirmed.map_err(|error| Status::unavailable(error.to_string()))?;
        let (term, key) = (confirmed.term, keys::fenced(from));
        let only_just = || Status::unavailable("this leader was only just elected; ask again");
        // Once it is open, no fencing of an earlier leadership is committed any more.
        let epoch = self.epoch().filter(|epoch| epoch.term == term).ok_or_else(only_just)?;
        // Sees all that was committed before the confirmation began, and before the epoch. What comes
        // later is of this leadership, which has its eye on it here; or of a later one, which waits.
        let fenced = node.store.record::<FencedRecord>(&key, Consistency::Since(confirmed)).await?;
        let inner = self.lock();
        if inner.epoch != Some(epoch) {
            return Err(only_just());
        }
        if inner.fencing.contains_key(&from) {
            return Err(Status::unavailable("this node is being fenced"));
        }
        Ok(HeartbeatResponse {
            sequence: request.sequence,
            leader: node.id.0,
            term,
            fenced: fenced.is_some(),
        })
    }

    /// What is known of a node; nothing where this node does not lead.
    #[must_use]
    pub fn look(&self, node: NodeId) -> NodeLook {
        let inner = self.lock();
        NodeLook {
            age_ms: inner.detector.age_ms(node, boottime_ms()),
            report: inner.reports.get(&node).cloned(),
        }
    }

    /// The last plan; empty where this node does not lead.
    #[must_use]
    pub fn last_plan(&self) -> Plan {
        self.lock().plan.clone()
    }

    /// The verdicts on these nodes now, and what else the plan needs to know.
    #[must_use]
    pub fn observations(&self, nodes: impl IntoIterator<Item = NodeId>) -> Observations {
        let inner = self.lock();
        let now_ms = boottime_ms();
        let verdict = |node| (node, inner.detector.verdict(node, now_ms));
        Observations {
            verdicts: nodes.into_iter().map(verdict).collect(),
            failed_migrations: inner.failed_migrations.clone(),
            imbalanced_since_ms: inner.imbalanced_since_ms,
            ..Observations::default()
        }
    }

    fn follow(&self) {
        let mut inner = self.lock();
        inner.detector.follow();
        inner.epoch = None;
        inner.fencing.clear();
        inner.reports.clear();
        inner.failed_migrations.clear();
        inner.imbalanced_since_ms = None;
        inner.plan = Plan::default();
    }

    pub(super) fn epoch(&self) -> Option<Epoch> {
        self.lock().epoch
    }

    /// A new leadership may act from now on. Fencings of an earlier one can no longer be committed.
    pub(super) fn open(&self, epoch: Epoch) {
        let mut inner = self.lock();
        inner.fencing.clear();
        inner.epoch = Some(epoch);
    }

    /// Begins the fencing of a node: from now on its heartbeats are not acknowledged. `None`: it
    /// was heard in the meantime, is being fenced already, or that leadership is over.
    pub(super) fn begin_fencing(
        &self,
        node: NodeId,
        epoch: Epoch,
        known_fenced: bool,
    ) -> Option<FencingClaim> {
        let mut inner = self.lock();
        let dead = matches!(inner.detector.verdict(node, boottime_ms()), Verdict::Dead { .. });
        let may = inner.epoch == Some(epoch) && (dead || known_fenced);
        if !may || inner.fencing.contains_key(&node) {
            return None;
        }
        inner.fencing.insert(node, epoch);
        Some(FencingClaim::new(self.clone(), node, epoch))
    }

    /// The outcome of the fencing that this leadership began is known.
    pub(super) fn end_fencing(&self, node: NodeId, epoch: Epoch) {
        let mut inner = self.lock();
        if inner.fencing.get(&node) == Some(&epoch) {
            inner.fencing.remove(&node);
        }
    }

    #[cfg(test)]
    pub(super) fn is_being_fenced(&self, node: NodeId) -> bool {
        self.lock().fencing.contains_key(&node)
    }

    /// Begins a move that the plan asked for. `false`: it is under way.
    pub(super) fn begin_move(&self, vm: &Name) -> bool {
        self.lock().moving.insert(vm.clone())
    }

    /// Tells the detector whose silence means something, by the configuration as it was just read.
    fn follow_bindings(&self, state: &ClusterState) {
        let mut inner = self.lock();
        for (id, view) in &state.nodes {
            inner.detector.binds(*id, view.lease_binds(state.disarmed), boottime_ms());
        }
    }

    fn planned(&self, plan: Plan, now: Now) {
        let mut inner = self.lock();
        let since_ms = inner.imbalanced_since_ms.unwrap_or(now.boottime_ms);
        inner.imbalanced_since_ms = plan.imbalanced.then_some(since_ms);
        inner.plan = plan;
    }

    /// A move has ended.
    pub(super) fn end_move(&self, vm: &Name, succeeded: bool) {
        let mut inner = self.lock();
        inner.moving.remove(vm);
        if succeeded {
            inner.failed_migrations.remove(vm);
            return;
        }
        let attempts = inner
            .failed_migrations
            .entry(vm.clone())
            .or_insert(Attempts { failures: 0, last_ms: 0 });
        attempts.failures = attempts.failures.saturating_add(1);
        attempts.last_ms = boottime_ms();
    }
}

/// Runs for the agent's life: does nothing while this node does not lead, else plans at least each
/// second and whenever a placement changes.
pub async fn run(node: Arc<Node>) {
    let ticker = node.leader.clone();
    // Beside the planning, on the runtime that serves the heartbeats: if that stands still, so
    // does this, and the detector notices.
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_millis(250));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            ticker.lock().detector.tick(boottime_ms());
        }
    });
    let mut seen = Seen::default();
    let mut leadership = node.cluster().leadership();
    let mut board = node.board.subscribe();
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            changed = board.changed() => {
                if changed.is_err() { return }
                // Changes come in bursts; one plan serves them all.
                tokio::time::sleep(Duration::from_millis(50)).await;
                board.borrow_and_update();
            }
            changed = leadership.changed() => if changed.is_err() { return },
        }
        let leads = leadership.borrow_and_update().is_leader;
        if !leads {
            node.leader.follow();
            seen = Seen::default();
            continue;
        }
        if let Err(error) = lead_once(&node, &mut seen).await {
            tracing::debug!("HA: {error}");
        }
    }
}

async fn confirm(node: &Node) -> Result<Confirmed, Status> {
    let confirmed = node.cluster().confirm_leadership().await;
    confirmed.map_err(|error| Status::unavailable(error.to_string()))
}

async fn lead_once(node: &Arc<Node>, seen: &mut Seen) -> Result<(), Status> {
    let mut confirmed = confirm(node).await?;
    let term = confirmed.term;
    node.leader.lock().detector.lead(term, boottime_ms());
    if node.leader.epoch().is_none_or(|epoch| epoch.term != term) {
        let epoch = open_epoch(node, term).await?;
        // Another node may have committed it for this one, which leads no more.
        confirmed = confirm(node).await?;
        if confirmed.term != term {
            return Err(overtaken());
        }
        node.leader.open(epoch);
        tracing::info!(term, "this node leads the cluster and its HA");
    }
    let snapshot = seen.observe(node, confirmed).await?;
    node.leader.follow_bindings(&snapshot.state);
    let observations = node.leader.observations(snapshot.state.nodes.keys().copied());
    let now = Now { boottime_ms: boottime_ms(), unix_ms: unix_ms() };
    let plan = plan(&snapshot.state, &observations, &snapshot.policy, now);
    let actions = plan.actions.clone();
    node.leader.planned(plan, now);
    for action in actions {
        execute(node, &snapshot, action).await;
    }
    Ok(())
}

fn overtaken() -> Status {
    Status::unavailable("another node leads by now")
}

/// Writes that this leadership is the one that acts, unless that of a later term is written already.
pub(super) async fn open_epoch(node: &Node, term: u64) -> Result<Epoch, Status> {
    let record = HaLeaderRecord { node: node.id, term };
    loop {
        let present =
            node.store.record::<HaLeaderRecord>(keys::HA_LEADER, Consistency::Linearizable).await?;
        // Written anew even where it says this node and term already: what this node proposed
        // before it lost sight of its leadership must not be committed any more either.
        if present.as_ref().is_some_and(|present| present.value.term > term) {
            return Err(overtaken());
        }
        let revision = present.map_or(Revision(0), |present| present.revision);
        let txn =
            Txn::new().if_revision(keys::HA_LEADER, revision).put(keys::HA_LEADER, json(&record));
        let outcome = node.cluster().txn(txn).await.map_err(RecordError::from)?;
        if outcome.committed() {
            return Ok(Epoch { term, revision: outcome.revision() });
        }
    }
}
