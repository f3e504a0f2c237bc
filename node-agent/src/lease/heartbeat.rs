//! A member's share of the lease's thread: sends heartbeats, ends HA VMs when the lease runs out,
//! says when the watchdog may be petted.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cluster::{Consistency, MembershipError, Txn};
use ha_manager::owner::{Step, decide};
use proto::record::FencedRecord;
use proto::v1::peer_client::PeerClient;
use proto::v1::{HeartbeatRequest, HeartbeatResponse};
use proto::{Name, NodeId, keys};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::guard::{Allowed, Guard, Source};
use super::memory::{FormerLease, LeaseMemory};
use crate::clock::boottime_ns;
use crate::node::Node;
use crate::supervisor::RunningVm;

/// How often the lease is looked at. The self-stop is late by at most this much.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How often a fenced node that is back looks whether it is clean.
const STRANGERS_EVERY: Duration = Duration::from_millis(200);

/// What a member works with.
#[derive(Debug)]
pub(super) struct Beat {
    node: Arc<Node>,
    /// Counts until this node has had a lease of its own.
    former: FormerLease,
    had_lease: Arc<AtomicBool>,
    /// Set while this node cleans up after it was fenced.
    cleaning: Arc<AtomicBool>,
    memory: Arc<LeaseMemory>,
    link: Arc<LeaderLink>,
}

/// The connection to the leader that only heartbeats use. The lease's real-time thread does its work
/// and no other connection's, and it does not wait for what the rest of the agent sends.
#[derive(Debug, Default)]
struct LeaderLink(Mutex<Option<(NodeId, Channel)>>);

impl LeaderLink {
    fn to(&self, node: &Node, leader: NodeId) -> Result<Channel, MembershipError> {
        let mut link = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((to, channel)) = link.as_ref()
            && *to == leader
        {
            return Ok(channel.clone());
        }
        let channel = node.cluster().own_peer_channel(leader)?;
        *link = Some((leader, channel.clone()));
        Ok(channel)
    }
}

impl Beat {
    /// Of a member that has no lease yet.
    pub(super) fn new(node: Arc<Node>, memory: LeaseMemory, former: FormerLease) -> Self {
        Self {
            node,
            former,
            had_lease: Arc::default(),
            cleaning: Arc::default(),
            memory: Arc::new(memory),
            link: Arc::default(),
        }
    }

    /// Runs until `stop` is cancelled. The watchdog is left running then, unless no HA VM process
    /// exists.
    pub(super) async fn run<S: Source>(&self, mut guard: Guard<S>, stop: CancellationToken) {
        let timing = self.node.lease.timing();
        let beat_every = Duration::from_millis(timing.heartbeat_interval_ms());
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut next_beat = Instant::now();
        let mut stopped_ha = false;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = look.tick() => {}
            }
            stopped_ha = self.self_stop(stopped_ha);
            let now = Instant::now();
            guard.look(self.allowed(), now);
            if now >= next_beat {
                next_beat = now + beat_every;
                self.send(Duration::from_millis(timing.self_stop_ms()));
            }
        }
        guard.end(self.allowed());
    }

    fn allowed(&self) -> Allowed {
        let alive = self.ha_processes();
        let of_former = !self.had_lease() && self.former.may_pet(boottime_ns());
        Allowed { pet: self.node.lease.may_pet(alive) || of_former, stop: alive == 0 }
    }

    fn had_lease(&self) -> bool {
        self.had_lease.load(Ordering::Acquire)
    }

    fn ha_processes(&self) -> usize {
        self.node.supervisor.ha_count()
    }

    /// Ends HA VMs without a fresh lease. An agent that just came up leaves the VMs it adopted to
    /// their own deadlines, until the lease that those come from has ended.
    fn self_stop(&self, told: bool) -> bool {
        let lease = &self.node.lease;
        if lease.is_fresh() {
            return false;
        }
        let due = self.had_lease() || self.former.has_ended(boottime_ns());
        if !due || self.ha_processes() == 0 {
            return told;
        }
        let ended = self.node.supervisor.kill_all_ha();
        if !told {
            let names: Vec<String> = ended.iter().map(ToString::to_string).collect();
            tracing::warn!(
                "the node lease ran out ({} ms without an acknowledged heartbeat): ending HA VMs {}",
                lease.age_ms().unwrap_or(0),
                names.join(", ")
            );
        }
        true
    }

    /// Sends one heartbeat without waiting for the answer.
    fn send(&self, limit: Duration) {
        let node = self.node.clone();
        let had_lease = self.had_lease.clone();
        let cleaning = self.cleaning.clone();
        let memory = self.memory.clone();
        let link = self.link.clone();
        tokio::spawn(async move {
            let sequence = node.lease.begin_heartbeat();
            let answer = tokio::time::timeout(limit, ask_leader(&node, &link, sequence)).await;
            match answer {
                Ok(Ok(answer)) if answer.sequence != sequence => {
                    tracing::warn!("the leader answered another heartbeat than was sent");
                }
                Ok(Ok(answer)) if answer.fenced => {
                    if node.lease.revoke(sequence) && !cleaning.swap(true, Ordering::AcqRel) {
                        come_back(&node).await;
                        cleaning.store(false, Ordering::Release);
                    }
                }
                Ok(Ok(answer)) => {
                    if let Some(deadline_ns) = node.lease.acknowledged(sequence, answer.term) {
                        had_lease.store(true, Ordering::Release);
                        memory.renewed(deadline_ns);
                        node.supervisor.renew_deadlines(deadline_ns);
                    }
                }
                Ok(Err(status)) => tracing::debug!("heartbeat: {}", status.message()),
                Err(_) => tracing::debug!("heartbeat: no answer within {limit:?}"),
            }
        });
    }
}

async fn ask_leader(
    node: &Node,
    link: &LeaderLink,
    sequence: u64,
) -> Result<HeartbeatResponse, tonic::Status> {
    let leader = node.cluster().leader();
    let leader = leader.ok_or_else(|| tonic::Status::unavailable("no leader is known"))?;
    let request = HeartbeatRequest { node_id: node.id.0, sequence, report: Some(node.report()) };
    if leader == node.id {
        return node.leader.heartbeat(node, node.id, request).await;
    }
    let channel =
        link.to(node, leader).map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    Ok(PeerClient::new(channel).heartbeat(request).await?.into_inner())
}

/// This node was fenced: everything HA that it may still run is of an old generation. Ends it,
/// and only when all of it is gone deletes the record, which makes the node online again. The same
/// goes for VMs without HA that were taken from it by hand.
async fn come_back(node: &Node) {
    tracing::warn!("this node was declared dead and fenced; ending what it still runs for HA");
    node.supervisor.end_all_ha().await;
    loop {
        match strangers(node).await {
            Ok(strangers) if strangers.is_empty() => break,
            // The reconciler ends them: it alone starts and stops VMs that no lease binds.
            Ok(_) => tokio::time::sleep(STRANGERS_EVERY).await,
            Err(error) => {
                tracing::warn!("cannot tell yet which VMs were taken from this node: {error}");
                return;
            }
        }
    }
    match delete_fenced_record(node).await {
        Ok(()) => tracing::info!("clean again after having been fenced"),
        Err(error) => tracing::warn!("cannot report that this node is clean again: {error}"),
    }
}

/// The processes here whose VMs another node may run by now.
async fn strangers(node: &Node) -> Result<Vec<Name>, crate::store::RecordError> {
    let mut strangers = Vec::new();
    for process in node.supervisor.running() {
        let placement = node.store.placement(&process.name).await?;
        let placement = placement.as_ref().map(|placement| &placement.value);
        let step = decide(node.id, placement, Some(&RunningVm::seen(&process)), false, false);
        if step == Step::Kill {
            strangers.push(process.name);
        }
    }
    Ok(strangers)
}

async fn delete_fenced_record(node: &Node) -> Result<(), crate::store::RecordError> {
    let key = keys::fenced(node.id);
    let record = node.store.record::<FencedRecord>(&key, Consistency::Linearizable).await?;
    if let Some(record) = record {
        let txn = Txn::new().if_revision(key.clone(), record.revision).delete(key);
        node.cluster().txn(txn).await?;
    }
    Ok(())
}
