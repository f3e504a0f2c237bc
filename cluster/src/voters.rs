//! Which members vote: a pure decision, one step at a time.
//!
//! Intuition: choose up to seven of the members that are well, an odd number of them, spread over
//! the zones; then go from the present voters to these in steps that each keep the quorum and
//! never lower the number of further failures that are survived.
//!
//! - Two voters where there are two members: with one, the other's copy would count for nothing.
//! - A voter that is silent for a short while stays: only one that is [`Health::Dead`] gives its
//!   seat to a learner. Nothing is made smoother while somebody is silent, so nothing flaps.
//! - Among equals, who votes already goes on voting: as few moves as the spread allows.
//! - A witness is a member to vote; it comes before the others of its zone.
//!
//! Never: reads a clock, knows Raft's log. The caller proposes the step, and asks again.

use std::collections::{BTreeMap, BTreeSet};

/// Most voters a cluster has.
pub(crate) const VOTERS_MAX: usize = 7;

/// How a member is, as its leader sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Health {
    /// Answers, and its log is close behind.
    Ready,
    /// Answers, and has log entries to catch up on, or answers only since a moment ago.
    Behind,
    /// Does not answer at present.
    Silent,
    /// Has not answered for so long that its seat is given away.
    Dead,
}

impl Health {
    fn answers(self) -> bool {
        match self {
            Self::Ready | Self::Behind => true,
            Self::Silent | Self::Dead => false,
        }
    }
}

/// A member, as far as its vote is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seat {
    pub(crate) id: u64,
    /// What fails together with it; empty: nothing else.
    pub(crate) zone: String,
    /// Here to vote, runs no VMs.
    pub(crate) witness: bool,
    pub(crate) voter: bool,
    pub(crate) health: Health,
}

impl Seat {
    /// Whether it may be among the voters that are aimed at.
    fn usable(&self) -> bool {
        match self.health {
            Health::Ready => true,
            Health::Behind | Health::Silent => self.voter,
            Health::Dead => false,
        }
    }

    /// The failure domain: an unlabelled member is one of its own.
    fn domain(&self) -> (&str, u64) {
        if self.zone.is_empty() { ("", self.id) } else { (&self.zone, 0) }
    }
}

/// The next set of voters to propose, if there is one better than the present. `leader` is the
/// member that asks; nobody gets a vote beyond `most`.
pub(crate) fn next_voters(leader: u64, seats: &[Seat], most: usize) -> Option<BTreeSet<u64>> {
    let present: BTreeSet<u64> = seats.iter().filter(|s| s.voter).map(|s| s.id).collect();
    let wanted = wanted(leader, seats, most);
    let next = step(seats, &present, &wanted)?;
    let room = |voters: &BTreeSet<u64>| spare(seats, voters);
    let kept = next.contains(&leader) && room(&present) >= Some(0) && room(&next) >= room(&present);
    (next != present && kept).then_some(next)
}

/// How many voters are best with so many that could be: odd, but two of two.
fn best_count(usable: usize, most: usize) -> usize {
    match usable.min(most).min(VOTERS_MAX) {
        0 | 1 => 1,
        2 => 2,
        more => more - (more + 1) % 2,
    }
}

/// The voters that are aimed at, in the order of their choice.
fn wanted(leader: u64, seats: &[Seat], most: usize) -> Vec<u64> {
    let mut left: Vec<&Seat> = seats.iter().filter(|seat| seat.usable()).collect();
    let count = best_count(left.len(), most);
    let mut taken: BTreeMap<(&str, u64), usize> = BTreeMap::new();
    let mut chosen = Vec::new();
    while chosen.len() < count && !left.is_empty() {
        // The leader comes first of all; then the emptiest domain counts.
        let rank = |seat: &Seat| {
            let in_domain = taken.get(&seat.domain()).copied().unwrap_or(0);
            (seat.id != leader, in_domain, !seat.witness, !seat.voter, seat.id)
        };
        let best = (0..left.len()).min_by_key(|place| rank(left[*place])).unwrap_or(0);
        let seat = left.swap_remove(best);
        *taken.entry(seat.domain()).or_default() += 1;
        chosen.push(seat.id);
    }
    chosen
}

/// One step from the present voters towards the wanted ones.
fn step(seats: &[Seat], present: &BTreeSet<u64>, wanted: &[u64]) -> Option<BTreeSet<u64>> {
    let health = |id: &u64| seats.iter().find(|seat| seat.id == *id).map(|seat| seat.health);
    let target: BTreeSet<u64> = wanted.iter().copied().collect();
    let coming: Vec<u64> = wanted.iter().copied().filter(|id| !present.contains(id)).collect();
    let dead = present.iter().find(|id| health(id) == Some(Health::Dead)).copied();
    let misplaced = present.difference(&target).next().copied();
    let all_answer = present.iter().all(|id| health(id).is_some_and(Health::answers));
    let mut next = present.clone();
    match (coming.first(), dead, misplaced) {
        (None, None, None) => return None,
        // One for one, the dead first.
        (Some(coming), Some(going), _) => {
            next.remove(&going);
            next.insert(*coming);
        }
        // An odd number grows by two, so that an even one is never passed through, but from 1.
        (Some(_), None, _) if target.len() > present.len() => {
            let by = if present.len() % 2 == 1 { 2 } else { 1 };
            next.extend(coming.into_iter().take(by));
        }
        // Merely misplaced: only while all is well.
        (Some(coming), None, Some(going)) if all_answer => {
            next.remove(&going);
            next.insert(*coming);
        }
        (Some(_), None, _) => return None,
        // Fewer voters: to drop dead ones where that helps, else to become odd. Never because of
        // one that is merely silent.
        (None, dead, _) => {
            let silent = present.iter().any(|id| health(id) == Some(Health::Silent));
            let helps = spare(seats, &target) > spare(seats, present);
            if silent || dead.is_some() && !helps {
                return None;
            }
            next = target;
        }
    }
    Some(next)
}

/// How many more of these voters may stop answering before the quorum is lost; `None`: it is.
fn spare(seats: &[Seat], voters: &BTreeSet<u64>) -> Option<usize> {
    let answering = |id: &&u64| seats.iter().any(|s| s.id == **id && s.health.answers());
    voters.iter().filter(answering).count().checked_sub(voters.len() / 2 + 1)
}

#[cfg(test)]
mod tests;
