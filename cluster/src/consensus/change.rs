//! Changes of the membership, and of who leads: by the leader, one at a time.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use openraft::ChangeMembers;
use openraft::async_runtime::instant::Instant as _;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::raft::Precondition;
use tokio::time::Instant;

use super::lead::{current_metrics, last_index, leads};
use super::service::Forwarded;
use super::types::{MemberNode, Metrics, Raft, TypeConfig};

/// A learner this close behind is ready to vote, log entries.
const READY_LAG: u64 = 200;

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
        // Another change was faster: nothing was proposed.
        Ok(Err(RaftError::APIError(ClientWriteError::PreconditionFailed(error)))) => {
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
    let (metrics, membership) = loop {
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
            break (metrics, membership);
        }
        if begin.elapsed() >= within {
            return Forwarded::QuorumAtRisk { left, voters: voters.len() };
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    if id == metrics.id {
        return match transfer(raft, metrics.id, None, limit, within).await {
            Forwarded::Leader(_) => Forwarded::NotLeader { leader: None },
            other => other,
        };
    }
    let is_voter = membership.voter_ids().any(|voter| voter == id);
    let ids = BTreeSet::from([id]);
    let change =
        if is_voter { ChangeMembers::RemoveVoters(ids) } else { ChangeMembers::RemoveNodes(ids) };
    // Only if who votes is still what it was judged by. `false`: a removed voter does not stay as a
    // learner.
    propose(raft, &metrics, change, false, limit).await
}

/// What the leader sees of one member.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) id: u64,
    pub(crate) node: MemberNode,
    pub(crate) voter: bool,
    /// Since it last answered this leader; `None`: it has not yet.
    pub(crate) silence: Option<Duration>,
    /// Its log is close behind.
    pub(crate) caught_up: bool,
}

/// All members as this leader sees them.
pub(crate) fn seen(metrics: &Metrics) -> Vec<Seen> {
    let membership = metrics.membership_config.membership();
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let last = last_index(metrics);
    membership
        .nodes()
        .map(|(id, node)| {
            let own = *id == metrics.id;
            let acked = metrics.heartbeat.as_ref().and_then(|beats| beats.get(id)?.as_ref());
            let matched = metrics.replication.as_ref().and_then(|r| r.get(id).copied().flatten());
            let lag = matched.map(|log_id| last.saturating_sub(log_id.index));
            Seen {
                id: *id,
                node: node.clone(),
                voter: voters.contains(id),
                silence: if own { Some(Duration::ZERO) } else { acked.map(|at| at.elapsed()) },
                caught_up: own || lag.is_some_and(|lag| lag <= READY_LAG),
            }
        })
        .collect()
}

/// Whether the last change of the membership is committed, and its voters are one set.
pub(crate) fn settled(metrics: &Metrics) -> bool {
    metrics.membership_config.log_id() == metrics.committed_membership_config.log_id()
        && metrics.membership_config.membership().get_joint_config().len() == 1
}

/// Ends a change of the voters that an earlier leader began and did not end.
pub(crate) async fn finish_joint(raft: &Raft, limit: Duration) {
    let metrics = current_metrics(raft);
    let committed =
        metrics.membership_config.log_id() == metrics.committed_membership_config.log_id();
    let joint = metrics.membership_config.membership().get_joint_config();
    if committed && let [_, .., last] = joint.as_slice() {
        tracing::info!(voters = ?last, "ending the change of voters that an earlier leader began");
        let answer = set_voters(raft, &metrics, last.clone(), limit).await;
        tracing::debug!(?answer, "the change of voters");
    }
}

/// Proposes a set of voters, if the membership is still the one of `seen`. Who is left out stays
/// as a learner.
pub(crate) async fn set_voters(
    raft: &Raft,
    seen: &Metrics,
    voters: BTreeSet<u64>,
    limit: Duration,
) -> Forwarded {
    propose(raft, seen, ChangeMembers::ReplaceAllVoters(voters), true, limit).await
}

async fn propose(
    raft: &Raft,
    seen: &Metrics,
    change: ChangeMembers<u64, MemberNode>,
    retain: bool,
    limit: Duration,
) -> Forwarded {
    let same = Precondition::LastMembershipLogId {
        last_membership_log_id: *seen.membership_config.log_id(),
    };
    changed(tokio::time::timeout(limit, raft.change_membership_if(change, retain, [same])).await)
}

/// Changes what the membership says of a node; its vote stays as it is.
pub(crate) async fn update_node(
    raft: &Raft,
    id: u64,
    limit: Duration,
    change: impl FnOnce(&mut MemberNode),
) -> Forwarded {
    let metrics = current_metrics(raft);
    if !leads(&metrics) {
        return Forwarded::NotLeader { leader: metrics.current_leader };
    }
    let Some(present) = metrics.membership_config.membership().get_node(&id) else {
        return Forwarded::UnknownNode;
    };
    let mut node = present.clone();
    change(&mut node);
    if node == *present {
        return Forwarded::Done;
    }
    // The id stays, and with it the certificate that the others demand at the new address: a wrong
    // address makes the node unreachable, never another node in its place.
    let change = ChangeMembers::SetNodes(BTreeMap::from([(id, node)]));
    propose(raft, &metrics, change, true, limit).await
}

/// Hands leadership over: to the voter that is asked for, else to the one whose log is furthest, a
/// witness last; never to one whose log is far behind. Done where `from` does not lead (any more).
///
/// A change of the voters is ended first. Until then the voters before it must agree, too: they may be
/// this node alone, which is about to go perhaps.
pub(crate) async fn transfer(
    raft: &Raft,
    from: u64,
    to: Option<u64>,
    limit: Duration,
    within: Duration,
) -> Forwarded {
    let until = Instant::now() + limit;
    let mut metrics = current_metrics(raft);
    while leads(&metrics) && !settled(&metrics) {
        if until.saturating_duration_since(Instant::now()) < limit / 2 {
            let why = "the voters are being changed, and that comes to no end; look at `clusterctl cluster status`";
            return Forwarded::Refused(why.to_owned());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        metrics = current_metrics(raft);
    }
    if !leads(&metrics) {
        return Forwarded::NotLeader { leader: metrics.current_leader };
    }
    if metrics.id != from || to == Some(from) {
        return Forwarded::Leader(metrics.id);
    }
    let heir = match heir(&metrics, to, within) {
        Ok(heir) => heir,
        Err(why) => return Forwarded::Refused(why),
    };
    let asked = tokio::time::timeout_at(until, raft.trigger().transfer_leader(heir)).await;
    if let Ok(Err(error)) = asked {
        return Forwarded::Unavailable(error.to_string());
    }
    while Instant::now() < until {
        if let Some(leader) = current_metrics(raft).current_leader.filter(|id| *id != from) {
            return Forwarded::Leader(leader);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Forwarded::Unknown("no other node was elected in time".to_owned())
}

fn heir(metrics: &Metrics, to: Option<u64>, within: Duration) -> Result<u64, String> {
    let answers = |seen: &Seen| seen.silence.is_some_and(|silence| silence <= within);
    let others: Vec<Seen> = seen(metrics).into_iter().filter(|s| s.id != metrics.id).collect();
    if let Some(to) = to {
        let Some(seen) = others.iter().find(|seen| seen.id == to) else {
            return Err(format!("node {to} is no member"));
        };
        return match (seen.voter, answers(seen) && seen.caught_up) {
            (true, true) => Ok(to),
            (false, _) => Err(format!("node `{}` has no vote, so it cannot lead", seen.node.name)),
            (true, false) => Err(format!(
                "node `{}` does not answer, or its log is behind; look at `clusterctl cluster status`",
                seen.node.name
            )),
        };
    }
    let matched =
        |id: u64| metrics.replication.as_ref().and_then(|r| r.get(&id).copied().flatten());
    // While the lead is handed over nobody leads: not to one that has much of the log to fetch first.
    let fit = others.iter().filter(|seen| seen.voter && answers(seen) && seen.caught_up);
    let best = fit.min_by_key(|s| (s.node.witness, Reverse(matched(s.id).map(|m| m.index)), s.id));
    best.map(|seen| seen.id).ok_or_else(|| {
        "no other voter answers and has the whole log; look at `clusterctl cluster status`"
            .to_owned()
    })
}
