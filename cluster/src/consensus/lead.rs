//! What only a leader can do, and what any member can see of Raft's state.

use std::time::Duration;

use futures::StreamExt;
use openraft::ReadPolicy;
use openraft::async_runtime::instant::Instant as _;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, Fatal, LinearizableReadError, RaftError};
use openraft::raft::WriteResult;
use tokio::time::Instant;

use super::service::Forwarded;
use super::types::{LogId, MemberNode, Metrics, Raft, TypeConfig};
use crate::machine::Command;
use crate::types::Confirmed;

/// A copy of Raft's state. openraft's own is never held: a borrow of it can block Raft.
pub(crate) fn current_metrics(raft: &Raft) -> Metrics {
    raft.metrics().borrow_watched().clone()
}

/// What `see`, which must not wait, makes of Raft's state now: for what is asked at each request,
/// where a copy of all of it would be most of the work.
pub(crate) fn look<T>(raft: &Raft, see: impl FnOnce(&Metrics) -> T) -> T {
    let metrics = raft.metrics();
    let now = metrics.borrow_watched();
    see(&now)
}

/// Calls `see` with Raft's state now and whenever there is another leader, term or membership, or
/// Raft has failed; until it is gone. (Its state changes with each entry of the log.)
pub(crate) async fn watch_metrics(raft: Raft, mut see: impl FnMut(&Metrics)) {
    let mut metrics = raft.metrics();
    let mut last = None;
    loop {
        let seen = {
            let now = metrics.borrow_watched();
            let (leader, term, failed) =
                (now.current_leader, now.current_term, now.running_state.is_err());
            let this = (leader, term, leads(&now), failed, *now.membership_config.log_id());
            (last != Some(this)).then(|| {
                last = Some(this);
                now.clone()
            })
        };
        if let Some(now) = seen {
            see(&now);
            if now.running_state.is_err() {
                return;
            }
        }
        if metrics.changed().await.is_err() {
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
pub(super) fn last_index(metrics: &Metrics) -> u64 {
    metrics.last_log_index.unwrap_or(0)
}

/// Log entries that were applied since the log was last cut off, which left `kept` before that.
pub(crate) fn since_cut(metrics: &Metrics, kept: u64) -> u64 {
    let index = |log_id: Option<LogId>| log_id.map_or(0, |id| id.index);
    let cut = metrics.purged.map_or(0, |purged| purged.index.saturating_add(kept));
    // Another one must hold more than the last, or Raft makes nothing of it.
    let since_last = index(metrics.last_applied).saturating_sub(index(metrics.snapshot));
    if since_last == 0 { 0 } else { index(metrics.last_applied).saturating_sub(cut) }
}

/// Time since a quorum last answered this leader; None: not known.
fn quorum_silence(metrics: &Metrics) -> Option<Duration> {
    Some(metrics.last_quorum_acked?.elapsed())
}

/// Whether this state is one without contact: no leader is known, or it leads and a quorum has been
/// silent for longer than a limit.
pub(crate) fn out_of_touch(metrics: &Metrics, limit: Duration) -> bool {
    if !leads(metrics) {
        return metrics.current_leader.is_none();
    }
    let alone = metrics.membership_config.membership().voter_ids().count() <= 1;
    !alone && quorum_silence(metrics).is_none_or(|silence| silence > limit)
}

/// Whether this node counts for the quorum.
pub(crate) fn is_voter(metrics: &Metrics) -> bool {
    metrics.membership_config.membership().voter_ids().any(|voter| voter == metrics.id)
}

/// Proposes a command and waits for it to be applied.
pub(crate) async fn propose(
    raft: &Raft,
    command: Command,
    limit: Duration,
    fresh: Duration,
) -> Forwarded {
    let within = Within { asked: limit / 2, confirmed: limit };
    let mut answers = propose_all(raft, vec![command], within, fresh).await;
    answers.pop().unwrap_or_else(unconfirmed)
}

fn unconfirmed() -> Forwarded {
    Forwarded::Unknown("no majority confirmed the write in time".to_owned())
}

/// How long what is proposed may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Within {
    /// Until a quorum that was silent has answered; nothing was proposed before. Less than `confirmed`:
    /// callers hear of that before they stop waiting.
    pub(crate) asked: Duration,
    /// Until all of it is applied.
    pub(crate) confirmed: Duration,
}

/// Proposes commands in their order, with one message to Raft, and waits for them to be applied: an
/// answer to each.
pub(crate) async fn propose_all(
    raft: &Raft,
    commands: Vec<Command>,
    within: Within,
    fresh: Duration,
) -> Vec<Forwarded> {
    let (count, until) = (commands.len(), Instant::now() + within.confirmed);
    let (here, leader, silence) =
        look(raft, |now| (leads(now), now.current_leader, quorum_silence(now)));
    if !here {
        return vec![Forwarded::NotLeader { leader }; count];
    }
    // A leader that lost its quorum would log the commands and leave their outcome open. Better to
    // refuse them while nothing has happened.
    if silence.is_none_or(|silence| silence > fresh)
        && let Err(other) = confirm(raft, within.asked).await
    {
        return vec![other; count];
    }
    let mut answers = Vec::with_capacity(count);
    let proposing = async {
        match raft.client_write_many(commands).await {
            Ok(mut written) => {
                while let Some(one) = written.next().await {
                    answers.push(proposed(one));
                }
            }
            Err(error) => answers.resize(count, Forwarded::Unknown(error.to_string())),
        }
    };
    // Those that were answered in time are kept.
    let _ = tokio::time::timeout_at(until, proposing).await;
    answers.resize_with(count, unconfirmed);
    answers
}

fn proposed(written: Result<WriteResult<TypeConfig>, Fatal<TypeConfig>>) -> Forwarded {
    match written {
        Ok(Ok(written)) => Forwarded::Reply(written.response),
        Ok(Err(ClientWriteError::ForwardToLeader(to))) => {
            Forwarded::NotLeader { leader: to.leader_id }
        }
        Ok(Err(error)) => Forwarded::Unknown(error.to_string()),
        Err(error) => Forwarded::Unknown(error.to_string()),
    }
}

/// Confirms leadership by messages sent after this call began, and names its term and the index that
/// a read needs.
pub(crate) async fn confirm(raft: &Raft, limit: Duration) -> Result<Confirmed, Forwarded> {
    let silent =
        || Forwarded::Unavailable("no majority of the voters answered the leader".to_owned());
    let option = openraft::LinearizerOption::from(ReadPolicy::ReadIndex).with_wait_timeout(limit);
    let asked = tokio::time::timeout(limit, raft.get_read_linearizer(option)).await;
    let linearizer = asked.map_err(|_| silent())?.map_err(|error| match error {
        RaftError::APIError(LinearizableReadError::ForwardToLeader(to)) => {
            Forwarded::NotLeader { leader: to.leader_id }
        }
        RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)) => silent(),
        RaftError::Fatal(error) => Forwarded::Unavailable(error.to_string()),
    })?;
    // The index is of the leadership that was asked: its term stands in it.
    let read = linearizer.read_log_id();
    let confirmed = Confirmed { term: read.committed_leader_id().term, index: read.index() };
    // Where there is a later term by now, it may be that one that the quorum confirmed.
    let (term, leader) = look(raft, |now| (now.current_term, now.current_leader));
    if term > confirmed.term {
        return Err(Forwarded::NotLeader { leader });
    }
    Ok(confirmed)
}

/// How many members there are, learners too.
pub(crate) fn member_count(metrics: &Metrics) -> usize {
    metrics.membership_config.membership().nodes().count()
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
