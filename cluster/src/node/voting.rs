//! The leader's share in who votes: watches how the members are, and carries out what
//! [`crate::voters`] decides, a step at a time.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::Node;
use crate::consensus::{Forwarded, Metrics, Seen, change};
use crate::voters::{Health, Seat, next_voters};

/// A learner is ready once it has kept up for so long.
const SETTLE: Duration = Duration::from_millis(900);

/// What one leadership remembers.
#[derive(Debug)]
pub(super) struct Voting {
    term: u64,
    /// No member's silence counts from before this: the election, or the end of the last stall.
    since: Instant,
    /// The last look.
    looked: Instant,
    /// Since when members have answered and kept up.
    ready: BTreeMap<u64, Instant>,
    /// Since when a change is under way.
    unsettled: Option<Instant>,
}

impl Voting {
    pub(super) fn new(term: u64) -> Self {
        Self::at(term, Instant::now())
    }

    fn at(term: u64, now: Instant) -> Self {
        Self { term, since: now, looked: now, ready: BTreeMap::new(), unsettled: None }
    }

    /// To be called at each look. A leader that itself stood still (a stopped process, a machine
    /// that slept) has heard nobody: everyone gets the full patience again.
    fn looks(&mut self, term: u64, now: Instant, patience: Duration) {
        if self.term != term || now.saturating_duration_since(self.looked) > patience / 2 {
            *self = Self::at(term, now);
        }
        self.looked = now;
    }

    /// One look, and one step where one is to be taken.
    pub(super) async fn tend(&mut self, node: &Node) {
        let metrics = node.metrics();
        let limit = node.config().request_timeout;
        self.looks(metrics.current_term, Instant::now(), node.config().voter_patience);
        if !change::settled(&metrics) {
            // Whoever began it may be about to end it.
            if self.unsettled.get_or_insert_with(Instant::now).elapsed() > limit * 2 {
                change::finish_joint(node.raft(), limit).await;
            }
            return;
        }
        self.unsettled = None;
        let seen = change::seen(&metrics);
        let silent_after = node.silence_limit();
        let patience = node.config().voter_patience.max(silent_after);
        let now = Instant::now();
        let seats: Vec<Seat> =
            seen.iter().map(|seen| self.seat(seen, silent_after, patience, now)).collect();
        if let Some(voters) = next_voters(metrics.id, &seats, node.config().voters_max) {
            tracing::info!(?voters, "changing who votes");
            let answer = change::set_voters(node.raft(), &metrics, voters, limit).await;
            if !matches!(answer, Forwarded::Done) {
                tracing::warn!(?answer, "the voters were not changed");
            }
        } else if node.config().witness {
            leave_to_others(node, &metrics, &seen).await;
        }
    }

    /// `silent_after`: how long an answer counts. `patience`: after how much more silence a seat is
    /// given away.
    fn seat(
        &mut self,
        seen: &Seen,
        silent_after: Duration,
        patience: Duration,
        now: Instant,
    ) -> Seat {
        let answers = seen.silence.is_some_and(|silence| silence <= silent_after);
        let health = if answers && seen.caught_up {
            let since = *self.ready.entry(seen.id).or_insert(now);
            let kept_up = now.saturating_duration_since(since) >= SETTLE;
            if seen.voter || kept_up { Health::Ready } else { Health::Behind }
        } else {
            self.ready.remove(&seen.id);
            // Only what this leadership has watched counts.
            let watched = now.saturating_duration_since(self.since);
            let silence = seen.silence.unwrap_or(watched).min(watched);
            match answers {
                true => Health::Behind,
                false if silence <= patience => Health::Silent,
                false => Health::Dead,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consensus::MemberNode;

    const ANSWERS: Duration = Duration::from_secs(2);
    const PATIENCE: Duration = Duration::from_secs(30);

    fn member(voter: bool, silence_s: Option<u64>, caught_up: bool) -> Seen {
        let node = MemberNode {
            name: "n2".to_owned(),
            api_address: String::new(),
            enrol_address: String::new(),
            zone: String::new(),
            witness: false,
        };
        Seen { id: 2, node, voter, silence: silence_s.map(Duration::from_secs), caught_up }
    }

    /// A leadership that looks each second, and what it makes of a member.
    struct Watch(Voting, Instant);

    impl Watch {
        fn begin() -> Self {
            let now = Instant::now();
            Self(Voting::at(1, now), now)
        }
        fn pass(&mut self, seconds: u64) -> &mut Self {
            (0..seconds).for_each(|_| self.jump(1));
            self
        }
        fn jump(&mut self, seconds: u64) {
            self.1 += Duration::from_secs(seconds);
            self.0.looks(1, self.1, PATIENCE);
        }
        fn health(&mut self, seen: &Seen) -> Health {
            self.0.seat(seen, ANSWERS, PATIENCE, self.1).health
        }
    }

    #[test]
    fn a_voter_is_dead_after_the_patience_and_no_sooner() {
        let mut watch = Watch::begin();
        assert_eq!(watch.pass(40).health(&member(true, Some(1), true)), Health::Ready);
        assert_eq!(watch.health(&member(true, Some(3), true)), Health::Silent);
        assert_eq!(watch.health(&member(true, Some(30), true)), Health::Silent);
        assert_eq!(watch.health(&member(true, Some(31), true)), Health::Dead);
        assert_eq!(watch.health(&member(true, Some(1), false)), Health::Behind);
    }

    #[test]
    fn whom_a_new_leader_has_not_heard_yet_does_not_count_as_up() {
        let mut watch = Watch::begin();
        assert_eq!(watch.health(&member(true, None, false)), Health::Silent);
        assert_eq!(watch.pass(30).health(&member(true, None, false)), Health::Silent);
        assert_eq!(watch.pass(1).health(&member(true, None, false)), Health::Dead);
    }

    #[test]
    fn a_leader_that_stood_still_calls_nobody_dead() {
        let mut watch = Watch::begin();
        watch.pass(100).jump(60);
        // The last answer is from before it stood still.
        assert_eq!(watch.health(&member(true, Some(60), true)), Health::Silent);
        assert_eq!(watch.pass(30).health(&member(true, Some(90), true)), Health::Silent);
        assert_eq!(watch.pass(1).health(&member(true, Some(91), true)), Health::Dead);
        // A learner proves itself anew.
        let mut watch = Watch::begin();
        let learner = member(false, Some(0), true);
        assert_eq!(watch.health(&learner), Health::Behind);
        assert_eq!(watch.pass(1).health(&learner), Health::Ready);
        watch.jump(60);
        assert_eq!(watch.health(&learner), Health::Behind);
    }
}
