//! The leader's share in who votes: watches how the members are, and carries out what
//! [`crate::voters`] decides, a step at a time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::Node;
use crate::consensus::{Forwarded, Metrics, Seen, change};
use crate::voters::{Health, Seat, next_voters};

/// A learner is ready once it has kept up for so long.
const SETTLE: Duration = Duration::from_millis(900);

/// What one leadership remembers.
#[derive(Debug)]
pub(super) struct Voting {
    term: u64,
    since: Instant,
    /// Since when members have answered and kept up.
    ready: BTreeMap<u64, Instant>,
    /// Since when a change is under way.
    unsettled: Option<Instant>,
}

impl Voting {
    pub(super) fn new(term: u64) -> Self {
        Self { term, since: Instant::now(), ready: BTreeMap::new(), unsettled: None }
    }

    /// One look, and one step where one is to be taken.
    pub(super) async fn tend(&mut self, node: &Node) {
        let metrics = node.metrics();
        if self.term != metrics.current_term {
            *self = Self::new(metrics.current_term);
        }
        let limit = node.config().request_timeout;
        if !change::settled(&metrics) {
            // Whoever began it may be about to end it.
            if self.unsettled.get_or_insert_with(Instant::now).elapsed() > limit * 2 {
                change::finish_joint(node.raft(), limit).await;
            }
            return;
        }
        self.unsettled = None;
        let seen = change::seen(&metrics);
        let seats: Vec<Seat> = seen.iter().map(|seen| self.seat(node, seen)).collect();
        if let Some(voters) = next_voters(metrics.id, &seats) {
            tracing::info!(?voters, "changing who votes");
            let answer = change::set_voters(node.raft(), &metrics, voters, limit).await;
            if !matches!(answer, Forwarded::Done) {
                tracing::warn!(?answer, "the voters were not changed");
            }
        } else if node.config().witness {
            leave_to_others(node, &metrics, &seen).await;
        }
    }

    fn seat(&mut self, node: &Node, seen: &Seen) -> Seat {
        let limit = node.silence_limit();
        let silence = seen.silence.unwrap_or_else(|| self.since.elapsed());
        let health = if silence <= limit && seen.caught_up {
            let since = self.ready.entry(seen.id).or_insert_with(Instant::now);
            if seen.voter || since.elapsed() >= SETTLE { Health::Ready } else { Health::Behind }
        } else {
            self.ready.remove(&seen.id);
            match silence {
                silence if silence <= limit => Health::Behind,
                silence if silence <= node.config().voter_patience.max(limit) => Health::Silent,
                _ => Health::Dead,
            }
        };
        let (id, voter) = (seen.id, seen.voter);
        Seat { id, zone: seen.node.zone.clone(), witness: seen.node.witness, voter, health }
    }
}

/// A witness leads only where nobody else can.
async fn leave_to_others(node: &Node, metrics: &Metrics, seen: &[Seen]) {
    let limit = node.silence_limit();
    let fit = |seen: &&Seen| {
        seen.voter
            && !seen.node.witness
            && seen.caught_up
            && seen.silence.is_some_and(|silence| silence <= limit)
    };
    if let Some(heir) = seen.iter().find(fit) {
        let (heir, patience) = (Some(heir.id), node.config().request_timeout);
        let answer = change::transfer(node.raft(), metrics.id, heir, patience, limit).await;
        tracing::info!(?answer, "a witness leaves the lead to another voter");
    }
}
