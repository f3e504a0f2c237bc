//! What only a leader can do, and what any member can see of Raft's state.

use std::collections::BTreeSet;
use std::time::Duration;

use openraft::async_runtime::instant::Instant as _;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, LinearizableReadError, RaftError};
use openraft::{ChangeMembers, ReadPolicy};
use tokio::time::Instant;

use super::service::Forwarded;
use super::types::{MemberNode, Metrics, Raft, TypeConfig};
use crate::machine::Command;

/// Most voters a cluster has.
pub(crate) const VOTERS_MAX: usize = 7;
/// A learner this close behind becomes a voter, log entries.
const PROMOTE_LAG: u64 = 200;

/// A copy of Raft's state. openraft's own is never held: a borrow of it can block Raft.
pub(crate) fn current_metrics(raft: &Raft) -> Metrics {
    raft.metrics().borrow_watched().clone()
}

/// Calls `see` with Raft's state now and at each change, until Raft is gone.
pub(crate) async fn watch_metrics(raft: Raft, mut see: impl FnMut(&Metrics)) {
    let mut metrics = raft.metrics();
    loop {
        let now = metrics.borrow_watched().clone();
        see(&now);
        if now.running_state.is_err() || metrics.changed().await.is_err() {
            return;
        }
    }
}

/// Why Raft stopped, if it did.
pub(crate) fn fatal(metrics: &Metrics) -> Option<String> {
    metrics.running_state.as_ref().err().map(ToString::to_string)
}

/// Whether this state is a leader's.
pub(crate) fn leads(metrics: &Metrics) -> bool {
    metrics.state == openraft::ServerState::Leader
}

/// Resolves when all that was ever committed before the last stop is applied again.
pub(crate) async fn recovered(raft: Raft) -> bool {
    raft.wait_for_recovery(None).await.is_ok()
}

/// Index of the last log entry that is committed and known to be, for display.
pub(crate) fn last_index(metrics: &Metrics) -> u64 {
    metrics.last_log_index.unwrap_or(0)
}

/// Time since a quorum last answered this leader; None: not known.
fn quorum_silence(metrics: &Metrics) -> Option<Duration> {
    Some(metrics.last_quorum_acked?.elapsed())
}

/// Proposes a command and waits for it to be applied.
pub(crate) async fn propose(
    raft: &Raft,
    command: Command,
    limit: Duration,
    fresh: Duration,
) -> Forwarded {
    let until = Instant::now() + limit;
    let metrics = current_metrics(raft);
    if !leads(&metrics) {
        return Forwarded::NotLeader { leader: metrics.current_leader };
    }
    // A leader that lost its quorum would log the command and leave its outcome open. Better to
    // refuse it while nothing has happened.
    if quorum_silence(&metrics).is_none_or(|silence| silence > fresh) {
        // Half of the time: the caller hears that nothing was proposed before it stops waiting.
        match read_index(raft, limit / 2).await {
            Forwarded::ReadIndex(_) => {}
            other => return other,
        }
    }
    let left = until.saturating_duration_since(Instant::now());
    match tokio::time::timeout(left, raft.client_write(command)).await {
        Err(_) => Forwarded::Unknown("no majority confirmed the write in time".to_owned()),
        Ok(Ok(written)) => Forwarded::Reply(written.data),
        Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(to)))) => {
            Forwarded::NotLeader { leader: to.leader_id }
        }
        Ok(Err(RaftError::APIError(error))) => Forwarded::Unknown(error.to_string()),
        Ok(Err(RaftError::Fatal(error))) => Forwarded::Unknown(error.to_string()),
    }
}

/// Confirms leadership by messages sent after this call, and names the index a read needs.
pub(crate) async fn read_index(raft: &Raft, limit: Duration) -> Forwarded {
    let option = openraft::LinearizerOption::from(ReadPolicy::ReadIndex).with_wait_timeout(limit);
    match tokio::time::timeout(limit, raft.get_read_linearizer(option)).await {
        Err(_) => {
            Forwarded::Unavailable("no majority of the voters answered the leader".to_owned())
        }
        Ok(Ok(linearizer)) => Forwarded::ReadIndex(linearizer.read_log_id().index()),
        Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(to)))) => {
            Forwarded::NotLeader { leader: to.leader_id }
        }
        Ok(Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)))) => {
            Forwarded::Unavailable("no majority of the voters answered the leader".to_owned())
        }
        Ok(Err(RaftError::Fatal(error))) => Forwarded::Unavailable(error.to_string()),
    }
}

/// Takes a node in as a learner.
pub(crate) async fn add_learner(
    raft: &Raft,
    id: u64,
    node: MemberNode,
    limit: Duration,
) -> Forwarded {
    let metrics = current_metrics(raft);
    if metrics.membership_config.membership().get_node(&id).is_some() {
        return Forwarded::Done;
    }
    changed(tokio::time::timeout(limit, raft.add_learner(id, node, false)).await)
}

type Changed = Result<
    Result<
        openraft::raft::ClientWriteResponse<TypeConfig>,
        RaftError<TypeConfig, ClientWriteError<TypeConfig>>,
    >,
    tokio::time::error::Elapsed,
>;

fn changed(result: Changed) -> Forwarded {
    match result {
        Err(_) => Forwarded::Unknown("no majority confirmed the change in time".to_owned()),
        Ok(Ok(_)) => Forwarded::Done,
        Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(to)))) => {
            Forwarded::NotLeader { leader: to.leader_id }
        }
        Ok(Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(error)))) => {
            // Another change is on its way, most likely.
            Forwarded::Unavailable(error.to_string())
        }
        Ok(Err(error)) => Forwarded::Unknown(error.to_string()),
    }
}

/// Voters that answered within a time, this node among them.
fn reachable(metrics: &Metrics, within: Duration) -> BTreeSet<u64> {
    let recent = metrics
        .heartbeat
        .iter()
        .flatten()
        .filter(|(_, acked)| acked.as_ref().is_some_and(|acked| acked.elapsed() <= within));
    recent.map(|(id, _)| *id).chain([metrics.id]).collect()
}

/// Takes a node out, unless too few reachable voters would be left. A leader that is itself to go
/// hands leadership over first: ask again.
pub(crate) async fn remove(raft: &Raft, id: u64, limit: Duration, within: Duration) -> Forwarded {
    if !leads(&current_metrics(raft)) {
        return Forwarded::NotLeader { leader: current_metrics(raft).current_leader };
    }
    // Only who answers from now on counts: a voter that died a moment ago must not be relied on, or
    // the change itself would wait for it for ever.
    let begin = Instant::now();
    let (metrics, membership, voters, alive) = loop {
        let metrics = current_metrics(raft);
        let membership = metrics.membership_config.membership().clone();
        if membership.get_node(&id).is_none() {
            return Forwarded::UnknownNode;
        }
        let voters: BTreeSet<u64> = membership.voter_ids().filter(|voter| *voter != id).collect();
        if voters.is_empty() {
            return Forwarded::LastNode;
        }
        let alive = reachable(&metrics, begin.elapsed());
        let left = voters.intersection(&alive).count();
        if left * 2 > voters.len() {
            break (metrics, membership, voters, alive);
        }
        if begin.elapsed() >= within {
            return Forwarded::QuorumAtRisk { left, voters: voters.len() };
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    if id == metrics.id {
        let heir = voters.intersection(&alive).next().copied();
        return match heir {
            Some(heir) => match raft.trigger().transfer_leader(heir).await {
                Ok(()) => Forwarded::NotLeader { leader: None },
                Err(error) => Forwarded::Unavailable(error.to_string()),
            },
            None => Forwarded::QuorumAtRisk { left: 0, voters: voters.len() },
        };
    }
    let is_voter = membership.voter_ids().any(|voter| voter == id);
    let ids = BTreeSet::from([id]);
    let change =
        if is_voter { ChangeMembers::RemoveVoters(ids) } else { ChangeMembers::RemoveNodes(ids) };
    // `false`: a removed voter does not stay as a learner.
    changed(tokio::time::timeout(limit, raft.change_membership(change, false)).await)
}

/// Lag and time since the last contact, by node.
pub(crate) fn progress(metrics: &Metrics) -> Vec<(u64, Option<u64>, Option<u64>)> {
    let last = last_index(metrics);
    let contact = |id: &u64| {
        let acked = metrics.heartbeat.as_ref()?.get(id)?.as_ref()?;
        u64::try_from(acked.elapsed().as_millis()).ok()
    };
    let followers = metrics.replication.iter().flatten();
    followers
        .map(|(id, matched)| {
            let matched = matched.as_ref().map_or(0, |log_id| log_id.index);
            let own = *id == metrics.id;
            (*id, Some(last.saturating_sub(matched)), if own { Some(0) } else { contact(id) })
        })
        .collect()
}

/// Makes a learner that has caught up a voter, while there is room for voters.
pub(crate) async fn promote(raft: &Raft, within: Duration) {
    let metrics = current_metrics(raft);
    let membership = metrics.membership_config.membership();
    // One change at a time, and none while the last is still on its way.
    if membership.get_joint_config().len() != 1
        || metrics.membership_config.log_id() != metrics.committed_membership_config.log_id()
        || membership.voter_ids().count() >= VOTERS_MAX
    {
        return;
    }
    let (alive, last) = (reachable(&metrics, within), last_index(&metrics));
    let ready = membership.learner_ids().find(|id| {
        let matched = metrics.replication.as_ref().and_then(|r| r.get(id).copied().flatten());
        alive.contains(id)
            && matched.is_some_and(|log_id| last.saturating_sub(log_id.index) <= PROMOTE_LAG)
    });
    let Some(id) = ready else { return };
    let change = ChangeMembers::AddVoterIds(BTreeSet::from([id]));
    match raft.change_membership(change, true).await {
        Ok(_) => tracing::info!(node = id, "a learner has caught up and is a voter now"),
        Err(error) => tracing::warn!(node = id, %error, "a learner could not be made a voter"),
    }
}

/// Hands leadership to another reachable voter.
pub(crate) async fn step_aside(raft: &Raft, within: Duration) {
    let metrics = current_metrics(raft);
    let voters: BTreeSet<u64> = metrics.membership_config.membership().voter_ids().collect();
    let heir =
        reachable(&metrics, within).into_iter().find(|id| *id != metrics.id && voters.contains(id));
    if let Some(heir) = heir
        && let Err(error) = raft.trigger().transfer_leader(heir).await
    {
        tracing::warn!(%error, "leadership could not be handed over");
    }
}

/// Makes this node the only member of a new cluster.
pub(crate) async fn initialize(raft: &Raft, id: u64, node: MemberNode) -> Result<(), String> {
    let members = std::collections::BTreeMap::from([(id, node)]);
    raft.initialize(members).await.map_err(|error| error.to_string())
}

/// Ends Raft on this node.
pub(crate) async fn stop(raft: &Raft) {
    if let Err(error) = raft.shutdown().await {
        tracing::error!(%error, "Raft ended badly");
    }
}
