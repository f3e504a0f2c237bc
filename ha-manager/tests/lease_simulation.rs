//! Lease and detector in a simulated world: clocks that run 10 % fast or slow, slow messages,
//! partitions, elections, machines that hang for a while and wake.
//!
//! Property (never two copies): at the moment that a leader commits a node's death, that node's
//! HA VMs have ended by its own lease, and its watchdog would have reset it had it hung.
//!
//! The world is the judge and knows true time; nodes see their own clocks only. The rules that
//! keep the property can be broken one at a time, in the world's model of the node or leader, and
//! the judge must see it.

use std::collections::{BTreeMap, BTreeSet};

use ha_manager::{Detector, LeaseState, NodeLease, Timing, Verdict};
use proto::NodeId;

/// splitmix64 (Steele, Lea, Flood 2014): enough for choices, the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.next() % len as u64).unwrap()
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }
}

/// Which rules the model keeps, and how far clock rates differ, in thousandths.
#[derive(Clone, Copy)]
struct Rules {
    new_leader_waits: bool,
    lease_counts_from_sending: bool,
    ack_needs_quorum: bool,
    rate_spread: u64,
}

const KEPT: Rules = Rules {
    new_leader_waits: true,
    lease_counts_from_sending: true,
    ack_needs_quorum: true,
    rate_spread: 100,
};

struct Node {
    rate: u64,
    offset_ms: u64,
    group: u64,
    hangs_until: u64,
    term: u64,
    leads: bool,
    lease: NodeLease,
    detector: Detector,
}

impl Node {
    fn clock(&self, world_ms: u64) -> u64 {
        self.offset_ms + world_ms * self.rate / 1000
    }
}

#[derive(Debug, Clone, Copy)]
enum Event {
    Beat { node: usize },
    Arrive { leader: usize, from: usize, sequence: u64 },
    Confirm { leader: usize, from: usize, sequence: u64, term: u64 },
    Ack { node: usize, sequence: u64, term: u64, fenced: bool },
    Tick { node: usize },
    Chaos,
}

impl Event {
    /// Whose machine must run for the event to be handled.
    fn at(self) -> Option<usize> {
        match self {
            Self::Beat { node } | Self::Ack { node, .. } | Self::Tick { node } => Some(node),
            Self::Arrive { leader, .. } | Self::Confirm { leader, .. } => Some(leader),
            Self::Chaos => None,
        }
    }
}

struct World {
    rules: Rules,
    timing: Timing,
    random: Random,
    now_ms: u64,
    queue: BTreeMap<(u64, u64), Event>,
    queued: u64,
    nodes: Vec<Node>,
    fenced: BTreeSet<usize>,
    deaths: usize,
    violation: Option<String>,
}

const END_MS: u64 = 240_000;

impl World {
    fn new(seed: u64, rules: Rules) -> Self {
        let mut random = Random(seed);
        let timing = Timing::default();
        let count = if random.chance(50) { 3 } else { 5 };
        let nodes = (0..count)
            .map(|n| Node {
                rate: random.between(1000 - rules.rate_spread, 1000 + rules.rate_spread),
                offset_ms: random.between(100_000, 100_000_000),
                group: 0,
                hangs_until: 0,
                term: 0,
                leads: false,
                lease: NodeLease::new(timing),
                detector: Detector::new(NodeId(n), timing),
            })
            .collect();
        let mut world = Self {
            rules,
            timing,
            random,
            now_ms: 0,
            queue: BTreeMap::new(),
            queued: 0,
            nodes,
            fenced: BTreeSet::new(),
            deaths: 0,
            violation: None,
        };
        for node in 0..world.nodes.len() {
            let at = world.random.between(0, 1_000);
            world.push(at, Event::Beat { node });
            world.push(at, Event::Tick { node });
        }
        world.push(5, Event::Chaos);
        world
    }

    fn push(&mut self, after_ms: u64, event: Event) {
        self.queued += 1;
        self.queue.insert((self.now_ms + after_ms, self.queued), event);
    }

    /// Mostly a network's delay, sometimes that of a retransmission or a full queue.
    fn delay(&mut self) -> u64 {
        if self.random.chance(8) {
            self.random.between(50, 4_500)
        } else {
            self.random.between(1, 50)
        }
    }

    fn connected(&self, a: usize, b: usize) -> bool {
        self.nodes[a].group == self.nodes[b].group
    }

    fn runs(&self, node: usize) -> bool {
        self.nodes[node].hangs_until <= self.now_ms
    }

    /// The nodes that `node` reaches, itself included, if they are a majority.
    fn majority(&self, node: usize) -> Option<Vec<usize>> {
        let reached: Vec<usize> = (0..self.nodes.len())
            .filter(|other| self.connected(node, *other) && self.runs(*other))
            .collect();
        (reached.len() * 2 > self.nodes.len()).then_some(reached)
    }

    /// Whether a quorum confirms now that `leader` leads; it steps down if someone knows better.
    fn confirmed(&mut self, leader: usize, term: u64) -> bool {
        let node = &self.nodes[leader];
        if !node.leads || node.term != term {
            return false;
        }
        let Some(reached) = self.majority(leader) else { return false };
        if reached.iter().any(|other| self.nodes[*other].term > term) {
            self.nodes[leader].leads = false;
            self.nodes[leader].detector.follow();
            return false;
        }
        true
    }

    fn run(mut self) -> Self {
        while let Some(((at_ms, _), event)) = self.queue.pop_first() {
            self.now_ms = at_ms;
            if at_ms > END_MS || self.violation.is_some() {
                break;
            }
            match event.at().filter(|node| !self.runs(*node)) {
                // Its messages and timers wait until it wakes.
                Some(node) => self.push(self.nodes[node].hangs_until - at_ms, event),
                None => self.handle(event),
            }
        }
        self
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Beat { node } => self.beat(node),
            Event::Arrive { leader, from, sequence } => {
                let clock = self.nodes[leader].clock(self.now_ms);
                self.nodes[leader].detector.heard(NodeId(from as u64), clock);
                let (after, term) = (self.delay(), self.nodes[leader].term);
                if self.nodes[leader].leads {
                    self.push(after, Event::Confirm { leader, from, sequence, term });
                }
            }
            Event::Confirm { leader, from, sequence, term } => {
                let confirmed = !self.rules.ack_needs_quorum || self.confirmed(leader, term);
                if confirmed && self.connected(leader, from) {
                    let (after, fenced) = (self.delay(), self.fenced.contains(&from));
                    self.push(after, Event::Ack { node: from, sequence, term, fenced });
                }
            }
            Event::Ack { node, sequence, term, fenced } => self.ack(node, sequence, term, fenced),
            Event::Tick { node } => self.tick(node),
            Event::Chaos => self.chaos(),
        }
    }

    fn beat(&mut self, node: usize) {
        let clock = self.nodes[node].clock(self.now_ms);
        let sequence = self.nodes[node].lease.begin_heartbeat(clock);
        // It asks whoever claims to lead: a node cannot know which of two claims is stale.
        for leader in 0..self.nodes.len() {
            if self.nodes[leader].leads && self.connected(node, leader) {
                let after = if leader == node { 0 } else { self.delay() };
                self.push(after, Event::Arrive { leader, from: node, sequence });
            }
        }
        self.push(self.timing.heartbeat_interval_ms(), Event::Beat { node });
    }

    fn ack(&mut self, node: usize, sequence: u64, term: u64, fenced: bool) {
        let clock = self.nodes[node].clock(self.now_ms);
        if fenced {
            if self.nodes[node].lease.revoke(sequence) && self.majority(node).is_some() {
                self.fenced.remove(&node);
            }
        } else if self.rules.lease_counts_from_sending {
            self.nodes[node].lease.acknowledged(sequence, term);
        } else {
            let sequence = self.nodes[node].lease.begin_heartbeat(clock);
            self.nodes[node].lease.acknowledged(sequence, term);
        }
    }

    fn tick(&mut self, leader: usize) {
        self.push(900, Event::Tick { node: leader });
        let clock = self.nodes[leader].clock(self.now_ms);
        self.nodes[leader].detector.tick(clock);
        for node in 0..self.nodes.len() {
            let verdict = self.nodes[leader].detector.verdict(NodeId(node as u64), clock);
            let dead = matches!(verdict, Verdict::Dead { .. }) && !self.fenced.contains(&node);
            if dead && self.confirmed(leader, self.nodes[leader].term) {
                self.fenced.insert(node);
                self.deaths += 1;
                self.judge(leader, node);
            }
        }
    }

    fn judge(&mut self, leader: usize, dead: usize) {
        let node = &self.nodes[dead];
        let clock = node.clock(self.now_ms);
        let age_ms = node.lease.age_ms(clock);
        let reset = age_ms.is_none_or(|age_ms| age_ms >= self.timing.reset_by_ms());
        if node.lease.state(clock) != LeaseState::Expired || !reset {
            self.violation = Some(format!(
                "at {} ms node {leader} declared node {dead} dead, whose lease was {age_ms:?} ms old",
                self.now_ms
            ));
        }
    }

    fn chaos(&mut self) {
        let count = self.nodes.len();
        match self.random.between(0, 9) {
            0..=1 => {
                let groups: Vec<u64> = (0..count).map(|_| self.random.between(0, 1)).collect();
                self.nodes.iter_mut().zip(groups).for_each(|(node, group)| node.group = group);
            }
            2 => {
                let cut_off = self.random.index(count);
                self.nodes.iter_mut().for_each(|node| node.group = 0);
                self.nodes[cut_off].group = 1;
            }
            3..=4 => self.nodes.iter_mut().for_each(|node| node.group = 0),
            5 => {
                let hangs = self.random.index(count);
                self.nodes[hangs].hangs_until = self.now_ms + self.random.between(500, 20_000);
            }
            _ => self.elect(),
        }
        let after = self.random.between(500, 9_000);
        self.push(after, Event::Chaos);
    }

    fn elect(&mut self) {
        let candidate = self.random.index(self.nodes.len());
        if !self.runs(candidate) {
            return;
        }
        let Some(reached) = self.majority(candidate) else { return };
        let term = 1 + reached.iter().map(|node| self.nodes[*node].term).max().unwrap_or(0);
        for voter in reached {
            self.nodes[voter].term = term;
            if self.nodes[voter].leads && voter != candidate {
                self.nodes[voter].leads = false;
                self.nodes[voter].detector.follow();
            }
        }
        let clock = self.nodes[candidate].clock(self.now_ms);
        let node = &mut self.nodes[candidate];
        node.leads = true;
        if self.rules.new_leader_waits {
            node.detector.lead(term, clock);
        } else {
            let since = clock - self.timing.lease_ms();
            node.detector.lead(term, since);
            (since..=clock).step_by(1_000).for_each(|at| node.detector.tick(at));
        }
    }
}

const SEEDS: u64 = 400;

/// The first violation over all seeds, with its seed, and how many deaths were declared.
fn search(rules: Rules) -> (Option<String>, usize) {
    let mut deaths = 0;
    for seed in 0..SEEDS {
        let world = World::new(seed, rules).run();
        deaths += world.deaths;
        if let Some(violation) = world.violation {
            return (Some(format!("seed {seed}: {violation}")), deaths);
        }
    }
    (None, deaths)
}

#[test]
fn no_node_is_called_dead_before_it_has_stopped_itself() {
    let (violation, deaths) = search(KEPT);
    assert_eq!(violation, None);
    assert!(deaths > 400, "only {deaths} deaths: the worlds are too quiet to show it");
}

#[test]
fn a_new_leader_that_does_not_wait_is_caught() {
    assert!(search(Rules { new_leader_waits: false, ..KEPT }).0.is_some());
}

#[test]
fn a_lease_that_counts_from_the_answer_is_caught() {
    assert!(search(Rules { lease_counts_from_sending: false, ..KEPT }).0.is_some());
}

#[test]
fn an_answer_without_a_quorum_is_caught() {
    assert!(search(Rules { ack_needs_quorum: false, ..KEPT }).0.is_some());
}

#[test]
fn clocks_beyond_the_margin_are_caught() {
    assert!(search(Rules { rate_spread: 250, ..KEPT }).0.is_some());
}
