//! Who reaches whom, and how long messages take.

use std::collections::BTreeSet;

use super::{Event, Index, World};

#[derive(Debug, Default)]
pub(super) struct Network {
    /// From the first to the second nothing arrives.
    pub(super) cuts: BTreeSet<(Index, Index)>,
    pub(super) loss_per_mille: u64,
    pub(super) delay_ms: u64,
}

/// Members beyond these have no vote.
const VOTERS_MAX: usize = 7;

impl World {
    /// Whether messages from `a` reach `b`, as far as the network is concerned.
    fn reaches(&self, a: Index, b: Index) -> bool {
        a == b
            || self.machines[a].network
                && self.machines[b].network
                && !self.network.cuts.contains(&(a, b))
    }

    pub(super) fn connected(&self, a: Index, b: Index) -> bool {
        self.reaches(a, b) && self.reaches(b, a)
    }

    pub(super) fn voters(&self) -> impl Iterator<Item = Index> {
        (0..self.machines.len()).filter(|node| !self.machines[*node].removed).take(VOTERS_MAX)
    }

    /// Whether it and those it reaches, who answer, are a majority.
    pub(super) fn has_majority(&self, node: Index) -> bool {
        let answers = |other: &Index| {
            *other == node
                || self.machines[*other].runs(self.now_ms) && self.connected(node, *other)
        };
        let voters: Vec<Index> = self.voters().collect();
        self.machines[node].runs(self.now_ms)
            && voters.iter().filter(|voter| answers(voter)).count() * 2 > voters.len()
    }

    fn delay(&mut self) -> u64 {
        let (jitter_ms, more_ms) = (self.random.between(1, 15), self.network.delay_ms);
        jitter_ms + self.random.between(0, more_ms)
    }

    /// Sends a message, which may be lost.
    pub(super) fn send(&mut self, from: Index, to: Index, message: Event) {
        let lost = self.random.chance(self.network.loss_per_mille);
        if from == to {
            self.push(0, message);
        } else if self.reaches(from, to) && !lost {
            let delay_ms = self.delay();
            self.push(delay_ms, message);
        }
    }
}
