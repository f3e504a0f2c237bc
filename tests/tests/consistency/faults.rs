//! What goes wrong, and when: one fault after the other at random times, some of them at once.

use serde::{Deserialize, Serialize};

use super::fabric::Link;
use super::rng::Rng;
use super::world::{Outcome, TICK_MS, World};

/// Kinds of faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Fault {
    KillLeader,
    KillAny,
    CutPowerOfLeader,
    CutPowerOfAny,
    CutPowerOfAll,
    IsolateLeader,
    IsolateAny,
    LeaderHearsNothing,
    LeaderIsNotHeard,
    SlowNetwork,
    LossyNetwork,
    StallDisk,
    FullDisk,
    /// No fault: somebody has another member lead.
    HandOver,
}

impl Fault {
    pub(crate) const ALL: [Self; 14] = [
        Self::KillLeader,
        Self::KillAny,
        Self::CutPowerOfLeader,
        Self::CutPowerOfAny,
        Self::CutPowerOfAll,
        Self::IsolateLeader,
        Self::IsolateAny,
        Self::LeaderHearsNothing,
        Self::LeaderIsNotHeard,
        Self::SlowNetwork,
        Self::LossyNetwork,
        Self::StallDisk,
        Self::FullDisk,
        Self::HandOver,
    ];
}

/// Something that ends a fault, at its tick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Repair {
    Start(usize),
    Network,
    Disk(usize),
}

/// Brings the faults about.
pub(crate) struct Nemesis {
    rng: Rng,
    kinds: Vec<Fault>,
    next: u64,
    repairs: Vec<(u64, Repair)>,
    /// How often each fault was there.
    pub(crate) done: Vec<Fault>,
}

fn ticks(ms: u64) -> u64 {
    ms / TICK_MS
}

impl Nemesis {
    pub(crate) fn new(rng: Rng, kinds: Vec<Fault>, now: u64) -> Self {
        Self { rng, kinds, next: now + ticks(300), repairs: Vec::new(), done: Vec::new() }
    }

    pub(crate) fn turn(&mut self, world: &mut World) -> Outcome {
        let now = world.now;
        let (due, later) = self.repairs.iter().partition::<Vec<_>, _>(|(at, _)| *at <= now);
        self.repairs = later;
        for (_, repair) in due {
            Self::repair(world, repair)?;
        }
        if now >= self.next && !self.kinds.is_empty() {
            let fault = self.kinds[self.rng.index(self.kinds.len())];
            self.next = now + ticks(self.rng.between(200, 2500));
            self.done.push(fault);
            self.bring(world, fault);
        }
        Ok(())
    }

    /// Ends all faults.
    pub(crate) fn end(&mut self, world: &mut World) -> Outcome {
        self.repairs.clear();
        Self::repair(world, Repair::Network)?;
        for index in 0..world.nodes.len() {
            Self::repair(world, Repair::Disk(index))?;
            Self::repair(world, Repair::Start(index))?;
        }
        Ok(())
    }

    fn repair(world: &mut World, repair: Repair) -> Outcome {
        match repair {
            Repair::Start(index) => world.restart(index)?,
            Repair::Network => world.net.heal(),
            Repair::Disk(index) => {
                world.nodes[index].machine.set_free(None);
                world.nodes[index].machine.set_stall(0);
            }
        }
        Ok(())
    }

    fn later(&mut self, now: u64, from_ms: u64, to_ms: u64, repair: Repair) {
        self.repairs.push((now + ticks(self.rng.between(from_ms, to_ms)), repair));
    }

    fn bring(&mut self, world: &mut World, fault: Fault) {
        let now = world.now;
        let any = self.rng.index(world.nodes.len());
        let leader = world.leader().unwrap_or(any);
        match fault {
            Fault::KillLeader => self.kill(world, leader),
            Fault::KillAny => self.kill(world, any),
            Fault::CutPowerOfLeader => self.cut_power(world, leader),
            Fault::CutPowerOfAny => self.cut_power(world, any),
            Fault::CutPowerOfAll => {
                (0..world.nodes.len()).for_each(|index| self.cut_power(world, index));
            }
            Fault::IsolateLeader => self.isolate(world, leader, true, true),
            Fault::IsolateAny => self.isolate(world, any, true, true),
            Fault::LeaderHearsNothing => self.isolate(world, leader, true, false),
            Fault::LeaderIsNotHeard => self.isolate(world, leader, false, true),
            Fault::SlowNetwork => {
                let slowest = self.rng.between(2, 60);
                self.every_link(world, Link { delay: (1, slowest), ..Link::GOOD });
            }
            Fault::LossyNetwork => {
                let lost = self.rng.between(1, 30);
                self.every_link(world, Link { lost, ..Link::GOOD });
            }
            Fault::StallDisk => {
                world.nodes[any].machine.set_stall(self.rng.between(50, 3000));
                self.later(now, 500, 3000, Repair::Disk(any));
            }
            Fault::FullDisk => {
                // Too little for log entries, or too little for anything.
                let free = if self.rng.chance(50) { 16 << 20 } else { 1 << 20 };
                world.nodes[any].machine.set_free(Some(free));
                self.later(now, 1000, 4000, Repair::Disk(any));
            }
            Fault::HandOver => {
                if let Some(cluster) = world.cluster(leader) {
                    world.spawn(leader, async move { cluster.hand_over().await });
                }
            }
        }
    }

    fn kill(&mut self, world: &mut World, index: usize) {
        world.kill(index);
        self.later(world.now, 50, 3000, Repair::Start(index));
    }

    fn cut_power(&mut self, world: &mut World, index: usize) {
        world.cut_power(index);
        self.later(world.now, 500, 4000, Repair::Start(index));
    }

    fn isolate(&mut self, world: &World, index: usize, inwards: bool, outwards: bool) {
        let cut = Link { cut: true, ..Link::GOOD };
        for other in (0..world.nodes.len()).filter(|other| *other != index) {
            if inwards {
                world.net.set_link(other, index, cut);
            }
            if outwards {
                world.net.set_link(index, other, cut);
            }
        }
        self.later(world.now, 300, 5000, Repair::Network);
    }

    fn every_link(&mut self, world: &World, link: Link) {
        for from in 0..world.nodes.len() {
            for to in (0..world.nodes.len()).filter(|to| *to != from) {
                world.net.set_link(from, to, link);
            }
        }
        self.later(world.now, 500, 4000, Repair::Network);
    }
}
