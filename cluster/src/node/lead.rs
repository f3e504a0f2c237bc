//! Doing, as the leader, what a member asked for; and finding the leader to ask.

use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::Instant;

use super::Node;
use crate::StoreError;
use crate::consensus::{Checked, Forward, Forwarded, MemberNode, ask, change, lead, says_damage};
use crate::machine::{Command, Judged, Reply, Unfit, validate};
use crate::types::Confirmed;

/// How long a member that is not known to lead may take to say who does.
const ELSEWHERE: Duration = Duration::from_millis(500);
/// What this node does itself, as the leader, may end so much late.
const LATE: Duration = Duration::from_millis(100);
/// Between two looks whether a leader whose answer is waited for is alive.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(50);

/// Why a transaction that a member passed on must not be logged: that member should not have.
fn unfit(asked: &Forward) -> Option<String> {
    let txns = match asked {
        Forward::Txn(txn) => std::slice::from_ref(txn),
        Forward::Txns(txns) => txns.as_slice(),
        _ => return None,
    };
    txns.iter().find_map(|judged| match validate(&judged.txn) {
        Ok(()) => None,
        Err(Unfit::Invalid(why) | Unfit::TooLarge(why)) => Some(why),
    })
}

impl Node {
    /// Confirms this node's leadership, by messages sent after this call began.
    pub(crate) async fn confirm(&self, limit: Duration) -> Result<Confirmed, Forwarded> {
        self.rounds.confirm(limit).await
    }

    /// Does it here within `limit`, if this node leads.
    pub(crate) fn lead(&self, asked: Forward, limit: Duration) -> BoxFuture<'_, Forwarded> {
        Box::pin(self.lead_here(asked, limit))
    }

    async fn lead_here(&self, asked: Forward, limit: Duration) -> Forwarded {
        let silence = self.silence_limit();
        let writes = !matches!(
            asked,
            Forward::Hello
                | Forward::ReadIndex
                | Forward::Progress
                | Forward::Transfer { .. }
                | Forward::Checked { .. }
        );
        if writes && self.db.disk_low() {
            return Forwarded::DiskFull {
                folder: self.db.folder().display().to_string(),
                free_bytes: self.db.free_bytes().unwrap_or(0),
            };
        }
        if let Some(why) = unfit(&asked) {
            return Forwarded::Refused(why);
        }
        match asked {
            Forward::Hello => Forwarded::Done,
            Forward::Txn(txn) => {
                let answers = self.proposals.propose(vec![txn.command()], limit).await;
                answers.into_iter().next().unwrap_or(Forwarded::Unavailable(String::new()))
            }
            Forward::Txns(txns) => {
                let commands = txns.into_iter().map(Judged::command).collect();
                Forwarded::Each(self.proposals.propose(commands, limit).await)
            }
            Forward::ReadIndex => match self.rounds.confirm(limit).await {
                Ok(confirmed) => Forwarded::ReadIndex(confirmed.index),
                Err(other) => other,
            },
            Forward::AddLearner { id, .. } if self.is_leaving(proto::NodeId(id)) => {
                Forwarded::Refused(
                    "it was removed from the cluster, or is being removed".to_owned(),
                )
            }
            Forward::AddLearner { id, node } => {
                change::add_learner(&self.raft, id, node, limit).await
            }
            Forward::Remove { id } => change::remove(&self.raft, id, limit, silence).await,
            Forward::Transfer { from, to } => {
                change::transfer(&self.raft, from, to, limit, silence).await
            }
            Forward::Describe { id, node } => {
                let described = |present: &mut MemberNode| {
                    *present = MemberNode { name: present.name.clone(), ..node };
                };
                change::update_node(&self.raft, id, limit, described).await
            }
            Forward::Rename { id, name } => {
                change::update_node(&self.raft, id, limit, |node| node.name = name).await
            }
            Forward::Check => self.propose_check(limit).await,
            Forward::Checked { index } => Forwarded::Checked(self.checked(index)),
            Forward::Progress => {
                let metrics = self.metrics();
                if lead::leads(&metrics) {
                    Forwarded::Progress(lead::progress(&metrics))
                } else {
                    Forwarded::NotLeader { leader: metrics.current_leader }
                }
            }
        }
    }

    /// Has the leader do it, wherever it is, until an answer or the deadline. The request must be
    /// one that may be done twice.
    /// Boxed: callers' futures stay small.
    pub(crate) fn ask_leader(
        &self,
        asked: Forward,
        deadline: Instant,
    ) -> BoxFuture<'_, Result<Forwarded, StoreError>> {
        Box::pin(self.ask_until(asked, deadline))
    }

    async fn ask_until(&self, asked: Forward, deadline: Instant) -> Result<Forwarded, StoreError> {
        let (mut perhaps_done, mut turn) = (false, 0);
        let mut why = "no leader is known".to_owned();
        let mut hint = None;
        loop {
            self.alive()?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(if perhaps_done {
                    StoreError::UnknownOutcome { why }
                } else {
                    StoreError::NoQuorum { why }
                });
            }
            let known = self.leader();
            let leader = hint.take().or(known);
            let answer = match leader {
                None => {
                    turn += 1;
                    let leader = self.ask_who_leads(turn, left.min(ELSEWHERE)).await;
                    Forwarded::NotLeader { leader }
                }
                Some(id) if id == self.id().0 => {
                    // It ends by itself, and knows then whether anything was proposed.
                    let limit = left + LATE;
                    match tokio::time::timeout(limit, self.lead(asked.clone(), left)).await {
                        Ok(answer) => answer,
                        Err(_) => Forwarded::Unknown("no majority answered in time".to_owned()),
                    }
                }
                // One that lost its power does not answer, and refuses nothing either: whoever is
                // elected meanwhile is asked instead.
                Some(id) => tokio::select! {
                    answer = self.ask_other(id, &asked, left) => answer,
                    () = self.another_leads([Some(id), known]) => {
                        Forwarded::Unknown(format!("node {id} led no more before it answered"))
                    }
                },
            };
            match answer {
                Forwarded::NotLeader { leader } => {
                    // Its word is followed once; after that this node's own knowledge counts again.
                    hint = leader.filter(|id| Some(*id) != known);
                    if leader.is_none() {
                        "no leader is known (an election is under way, or no majority is up)"
                            .clone_into(&mut why);
                    }
                }
                Forwarded::Unavailable(reason) => why = reason,
                Forwarded::Unknown(reason) => {
                    perhaps_done = true;
                    why = reason;
                }
                // Only this attempt was refused: an earlier one may be in the log all the same.
                Forwarded::DiskFull { folder, .. } if perhaps_done => {
                    return Err(StoreError::UnknownOutcome {
                        why: format!("{why}; then the leader's disk was full ({folder})"),
                    });
                }
                Forwarded::Reply(Reply::Full(_) | Reply::Oversized(_)) if perhaps_done => {
                    return Err(StoreError::UnknownOutcome {
                        why: format!("{why}; then there was no space for it any more"),
                    });
                }
                refusal @ (Forwarded::Refused(_)
                | Forwarded::QuorumAtRisk { .. }
                | Forwarded::LastNode)
                    if perhaps_done =>
                {
                    return Err(StoreError::UnknownOutcome {
                        why: format!("{why}; asked again, it was refused ({refusal:?})"),
                    });
                }
                answer => return Ok(answer),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            tokio::time::sleep(PAUSE.min(left)).await;
        }
    }

    /// Somebody else may know who leads: the leader does not reach a node whose address changed. The
    /// request itself is not sent there: one that does not answer would leave its outcome open.
    async fn ask_who_leads(&self, turn: usize, left: Duration) -> Option<u64> {
        let id = self.other(turn)?;
        match self.ask_member(id, &Forward::Progress, left).await {
            Forwarded::Progress(_) => Some(id),
            Forwarded::NotLeader { leader } => leader,
            _ => None,
        }
    }

    /// Proposes a check, unless one is under way here: that one serves as well.
    async fn propose_check(&self, limit: Duration) -> Forwarded {
        let _one = self.check_turn.lock().await;
        if let Some(index) = self.machine.checksums().running()
            && self.leads()
        {
            // The reply of its own proposal said the same.
            return Forwarded::Reply(Reply::CheckAt { index, revision: self.revision() });
        }
        lead::propose(&self.raft, Command::Check, limit, self.silence_limit()).await
    }

    /// What this member's checksum at a place of the log is.
    pub(crate) fn checked(&self, index: u64) -> Checked {
        if let Some(StoreError::Failed { why }) = &*self.failure.borrow() {
            let why = format!("its database failed: {why}");
            return if says_damage(&why) { Checked::Faulty(why) } else { Checked::Failed(why) };
        }
        let applied = self.machine.applied().borrow().index;
        self.machine.checksums().get(index).unwrap_or(Checked::Absent { applied })
    }

    /// Has another member, as the leader, do it.
    async fn ask_other(&self, id: u64, asked: &Forward, left: Duration) -> Forwarded {
        match asked {
            Forward::Txn(txn) => self.pass_on.ask(id, txn.clone(), left).await,
            asked => self.ask_member(id, asked, left).await,
        }
    }

    pub(crate) async fn ask_member(&self, id: u64, asked: &Forward, left: Duration) -> Forwarded {
        let address = lead::look(&self.raft, |now| {
            let node = now.membership_config.membership().get_node(&id);
            node.map(|node| node.api_address.clone())
        });
        let channel = address.and_then(|address| self.peers.shared(id, &address));
        let Some(channel) = channel else {
            return Forwarded::Unavailable(format!(
                "node {id} leads, and its address is not known"
            ));
        };
        ask(channel, asked, left, &self.removed).await
    }

    /// Whether the leader, another node, cannot be reached. One that is only slow can.
    pub(crate) async fn leader_unreachable(&self, limit: Duration) -> bool {
        self.leader_answers(limit).await == Some(false)
    }

    /// Whether the leader, another node, does not answer within a limit, and nobody else has come to
    /// lead meanwhile. With pre-vote a voter that finds no majority remembers its last leader for
    /// ever, and one that lost its power refuses no connection: it is silent.
    pub(crate) async fn leader_silent(&self, limit: Duration) -> bool {
        let leader = self.leader();
        match self.leader_answers(limit).await {
            Some(answers) => !answers,
            None => self.leader() == leader,
        }
    }

    /// Asks the leader, another node, for a sign of life. `None`: nothing was heard so long.
    async fn leader_answers(&self, limit: Duration) -> Option<bool> {
        let leader = self.leader().filter(|id| *id != self.id().0);
        let Some(leader) = leader else { return Some(true) };
        let asked = self.ask_member(leader, &Forward::Hello, limit * 10);
        let answer = tokio::time::timeout(limit, asked).await.ok()?;
        Some(matches!(answer, Forwarded::Done))
    }

    /// Whether a member that led gives a sign of life within a limit, before another one leads.
    pub(crate) async fn leader_alive(&self, leader: u64, limit: Duration) -> bool {
        let hello = self.ask_member(leader, &Forward::Hello, limit);
        tokio::select! {
            answer = hello => matches!(answer, Forwarded::Done),
            () = self.another_leads([Some(leader); 2]) => false,
        }
    }

    /// Resolves once there is no use in waiting for a leader's answer: another one leads, or it was
    /// silent for so long.
    pub(crate) async fn leader_lost(&self, leader: u64, patience: Duration) {
        while self.leader_alive(leader, patience).await {
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = self.another_leads([Some(leader); 2]) => return,
            }
        }
    }

    /// Some other member, another one each turn.
    fn other(&self, turn: usize) -> Option<u64> {
        let me = self.id();
        let others: Vec<_> = self.members().into_iter().filter(|m| m.node_id != me).collect();
        others.get(turn % others.len().max(1)).map(|member| member.node_id.0)
    }

    /// Asks some other member whether this node is still one.
    pub(super) async fn say_hello(&self, turn: usize) {
        if let Some(other) = self.other(turn) {
            let _ = self.ask_member(other, &Forward::Hello, Duration::from_secs(2)).await;
        }
    }
}
