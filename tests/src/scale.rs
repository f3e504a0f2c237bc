//! How much a leader sends and hears, by the size of its cluster: the model behind the README's
//! section on scale. `tests/tests/scale/` compares it with what real voters send to stand-ins for
//! learners.
//!
//! Units: messages a second, bytes a second, seconds. A message is a request; the answer that each
//! gets is not counted as one more, but its bytes are.
//!
//! What a member gets from the leader:
//!
//! - heartbeats by the clock, at the first tick after the interval: half a tick later on average;
//! - heartbeats of the rounds that confirm leadership (`cluster/src/node/rounds.rs`). Each node's
//!   lease heartbeat needs one; those that wait share it. A round takes `round_s`, or the pause between
//!   two where that is longer; if nobody waits at its end, the next one begins when somebody comes:
//!   with `a` who come a second by chance, on average `exp(-a·c) / a` later, `c` being that time;
//! - for each batch of writes, the entries, and how far the log is committed once a quorum has them.
//!
//! What it asks the leader for: its lease, and each second whether it is a member still.

/// Between the beginnings of two rounds, for each member above [`SMALL`], seconds.
const PAUSE_EACH: f64 = 0.000_5;
const SMALL: f64 = 16.0;
const PAUSE_MAX: f64 = 0.1;
/// How often a member asks whether it is one still, each second.
const HELLOS: f64 = 1.0;

/// A cluster and what it does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Members that vote, the leader among them.
    pub voters: f64,
    /// Members that do not.
    pub learners: f64,
    /// Between two heartbeats of the leader.
    pub heartbeat_s: f64,
    /// Shortest and longest time without one after which a follower stands for election.
    pub election_s: (f64, f64),
    /// Between two lease heartbeats of a node.
    pub lease_every_s: f64,
    /// A lease, and what a new leader waits for before it declares a node dead.
    pub lease_s: f64,
    /// How long a quorum takes to answer a heartbeat.
    pub round_s: f64,
    /// Writes a second, and how many of them go to the members in one message.
    pub writes: f64,
    /// At least 1.
    pub batch: f64,
    /// What a write's log entry takes in a message, bytes.
    pub entry_bytes: f64,
}

/// Between the leader and one member, messages a second.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Exchange {
    /// By the clock and of rounds.
    pub heartbeats: f64,
    /// With log entries.
    pub entries: f64,
    /// How far the log is committed.
    pub commits: f64,
    /// Is this node a member still?
    pub hellos: f64,
    /// Of the node's lease.
    pub leases: f64,
}

/// What a message takes with its answer, bytes: payload, gRPC, HTTP/2 and TLS, but not TCP and IP. As
/// measured; a large cluster's log indexes and ids make a heartbeat some bytes longer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sizes {
    /// A heartbeat.
    pub heartbeat: f64,
    /// A message with entries, less these.
    pub entries: f64,
    /// One without.
    pub commit: f64,
    /// Is this node a member still?
    pub hello: f64,
    /// A lease heartbeat of a node without VMs; each VM adds its name and some bytes.
    pub lease: f64,
}

/// As measured by `tests/bench scale`.
pub const SIZES: Sizes =
    Sizes { heartbeat: 182.0, entries: 94.0, commit: 94.0, hello: 190.0, lease: 243.0 };

/// How long it takes until somebody else leads, seconds since the leader died.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Failover {
    /// At best, on average and at worst, until a write is taken. Without split votes, each of which adds
    /// an election timeout.
    pub write_s: (f64, f64, f64),
    /// Until a node that died with it can be declared dead, at worst: what HA waits for.
    pub verdict_s: f64,
}

impl Shape {
    fn members(&self) -> f64 {
        self.voters + self.learners
    }

    /// Rounds of confirmations a second.
    #[must_use]
    pub fn rounds(&self) -> f64 {
        let pause = ((self.members() - SMALL).max(0.0) * PAUSE_EACH).min(PAUSE_MAX);
        let busy = self.round_s.max(pause);
        let come = self.members() / self.lease_every_s;
        1.0 / (busy + (-come * busy).exp() / come)
    }

    /// Raft's clock, by which heartbeats go out: 13/64 of their interval, whole milliseconds.
    fn tick_s(&self) -> f64 {
        (self.heartbeat_s * 1000.0 * 13.0 / 64.0).floor() / 1000.0
    }

    /// Between the leader and one learner, a second.
    #[must_use]
    pub fn exchange(&self) -> Exchange {
        let batches = self.writes / self.batch.max(1.0);
        let by_clock = 1.0 / (self.heartbeat_s + self.tick_s() / 2.0);
        Exchange {
            heartbeats: by_clock + self.rounds(),
            entries: batches,
            commits: batches,
            hellos: HELLOS,
            leases: 1.0 / self.lease_every_s,
        }
    }

    /// Messages a second that the leader sends or hears, answers not counted; its own lease is its
    /// own affair.
    #[must_use]
    pub fn messages(&self) -> f64 {
        self.exchange().all() * (self.members() - 1.0)
    }

    /// Bytes a second between the leader and one learner, both ways.
    #[must_use]
    pub fn learner_bytes(&self, sizes: &Sizes) -> f64 {
        let Exchange { heartbeats, entries, commits, hellos, leases } = self.exchange();
        heartbeats * sizes.heartbeat
            + entries * sizes.entries
            + self.writes * self.entry_bytes
            + commits * sizes.commit
            + hellos * sizes.hello
            + leases * sizes.lease
    }

    /// Bytes a second that the leader sends and hears.
    #[must_use]
    pub fn bytes(&self, sizes: &Sizes) -> f64 {
        self.learner_bytes(sizes) * (self.members() - 1.0)
    }

    /// The end of a leader.
    #[must_use]
    pub fn failover(&self) -> Failover {
        // A follower counts from the last heartbeat, which came up to an interval before the end. It
        // keeps to its leader for the longest election timeout, and then waits for one by chance. The
        // first of those that are left stands.
        let (shortest, longest) = self.election_s;
        let left = (self.voters - 1.0).max(1.0);
        let first = shortest + (longest - shortest) / (left + 1.0);
        let tick = self.tick_s();
        // Pre-vote, vote, and the entry that opens the term.
        let votes = 3.0 * self.round_s;
        let best = longest + shortest - self.heartbeat_s + votes;
        let mean = longest + first - self.heartbeat_s / 2.0 + tick / 2.0 + votes;
        let worst = longest + longest + tick + votes;
        Failover { write_s: (best, mean, worst), verdict_s: worst + self.lease_s }
    }
}

impl Exchange {
    /// Messages a second.
    #[must_use]
    pub fn all(&self) -> f64 {
        self.heartbeats + self.entries + self.commits + self.hellos + self.leases
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        voters: 3.0,
        learners: 997.0,
        heartbeat_s: 0.2,
        election_s: (0.5, 1.0),
        lease_every_s: 1.0,
        lease_s: 10.0,
        round_s: 0.002,
        writes: 0.0,
        batch: 1.0,
        entry_bytes: 200.0,
    };

    fn about(value: f64, expected: f64) -> bool {
        (value / expected - 1.0).abs() < 0.01
    }

    #[test]
    fn rounds_are_as_many_as_ask_or_as_the_pause_lets() {
        let of = |learners: f64| Shape { learners, ..SHAPE }.rounds();
        assert!(about(of(0.0), 3.0), "{}", of(0.0));
        assert!(about(of(7.0), 10.0), "{}", of(7.0));
        assert!(about(of(213.0), 10.0), "{}", of(213.0));
        assert!(about(of(5000.0), 10.0), "{}", of(5000.0));
    }

    #[test]
    fn messages_grow_with_the_members_and_not_with_their_square() {
        let of = |learners: f64| Shape { learners, ..SHAPE }.messages();
        assert!(of(2000.0) < 2.1 * of(1000.0));
        assert!(of(997.0) < 17.0 * 1000.0);
    }

    #[test]
    fn a_batch_is_two_messages_to_each() {
        let writes = Shape { writes: 100.0, batch: 5.0, ..SHAPE };
        assert!(about(writes.exchange().all() - SHAPE.exchange().all(), 40.0));
        let bytes = writes.learner_bytes(&SIZES) - SHAPE.learner_bytes(&SIZES);
        assert!(about(bytes, 20.0 * (SIZES.entries + SIZES.commit) + 100.0 * 200.0));
    }

    #[test]
    fn a_failover_takes_the_lease_of_the_old_vote_and_an_election() {
        let (best, mean, worst) = SHAPE.failover().write_s;
        assert!(best > 1.3 && best < mean && mean < worst && worst < 2.1, "{best} {mean} {worst}");
        assert!(Shape { voters: 7.0, ..SHAPE }.failover().write_s.1 < mean);
    }
}
