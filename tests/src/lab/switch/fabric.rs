//! Who gets a frame: learned addresses, flooding, and the rules that cut and slow links. No I/O, no
//! clock: the time is passed in.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// A node's number, and its port on the switch.
pub type Port = u32;
type Mac = [u8; 6];
/// Addresses that are remembered at most: a node that invents them cannot fill our memory.
const LEARNED_MAX: usize = 4096;

/// What is done to the traffic. Default: nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// Pairs that cannot reach each other, smaller port first.
    pub cut: BTreeSet<(Port, Port)>,
    /// Milliseconds each frame to a port is held back.
    pub delay_ms: BTreeMap<Port, u64>,
    /// Milliseconds each frame between two nodes is held back, smaller port first.
    pub pair_delay_ms: BTreeSet<(Port, Port, u64)>,
    /// Bits per second that a port takes.
    pub rate_bits_s: BTreeMap<Port, u64>,
}

impl Rules {
    /// Cuts the link between two nodes.
    pub fn cut_pair(&mut self, a: Port, b: Port) {
        self.cut.insert((a.min(b), a.max(b)));
    }

    /// Holds all frames between two nodes back.
    pub fn delay_pair(&mut self, a: Port, b: Port, delay_ms: u64) {
        self.pair_delay_ms.insert((a.min(b), a.max(b), delay_ms));
    }

    /// Cuts `port` off from all of `others`.
    pub fn isolate(&mut self, port: Port, others: impl IntoIterator<Item = Port>) {
        for other in others.into_iter().filter(|other| *other != port) {
            self.cut_pair(port, other);
        }
    }

    fn delay_us(&self, from: Port, to: Port) -> u64 {
        let pair = (from.min(to), from.max(to));
        let of_pair = self.pair_delay_ms.iter().filter(|(a, b, _)| (*a, *b) == pair);
        let of_pair_ms = of_pair.map(|(_, _, delay_ms)| *delay_ms).max().unwrap_or(0);
        let of_port_ms = self.delay_ms.get(&to).copied().unwrap_or(0);
        of_pair_ms.saturating_add(of_port_ms).saturating_mul(1000)
    }

    fn lets_through(&self, from: Port, to: Port) -> bool {
        !self.cut.contains(&(from.min(to), from.max(to)))
    }
}

/// The switch's memory.
#[derive(Debug, Default)]
pub struct Fabric {
    /// The rules in force.
    pub rules: Rules,
    learned: BTreeMap<Mac, Port>,
    /// When each slowed port is free again, microseconds.
    busy_until_us: BTreeMap<Port, u64>,
}

/// A copy of a frame: for whom, and when (same clock as `now_us`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivery {
    /// The port it goes out of.
    pub to: Port,
    /// The earliest moment, microseconds.
    pub at_us: u64,
}

impl Fabric {
    /// Takes a frame that came in on `from`, and says which of `ports` get it. A frame too short to
    /// have addresses goes nowhere.
    pub fn handle_frame(
        &mut self,
        from: Port,
        frame: &[u8],
        ports: impl Iterator<Item = Port>,
        now_us: u64,
    ) -> Vec<Delivery> {
        let Some(([destination, source], _)) =
            frame.split_first_chunk::<12>().map(|(head, rest)| {
                let mut macs = [[0; 6]; 2];
                macs[0].copy_from_slice(&head[..6]);
                macs[1].copy_from_slice(&head[6..]);
                (macs, rest)
            })
        else {
            return Vec::new();
        };
        if source[0] & 1 == 0
            && (self.learned.len() < LEARNED_MAX || self.learned.contains_key(&source))
        {
            self.learned.insert(source, from);
        }
        let known =
            (destination[0] & 1 == 0).then(|| self.learned.get(&destination).copied()).flatten();
        let targets: Vec<Port> = ports
            .filter(|port| *port != from && known.is_none_or(|only| only == *port))
            .filter(|port| self.rules.lets_through(from, *port))
            .collect();
        targets
            .into_iter()
            .map(|to| Delivery { to, at_us: self.departure_us((from, to), frame.len(), now_us) })
            .collect()
    }

    fn departure_us(&mut self, (from, to): (Port, Port), length: usize, now_us: u64) -> u64 {
        let delay_us = self.rules.delay_us(from, to);
        let Some(rate) = self.rules.rate_bits_s.get(&to).filter(|rate| **rate > 0) else {
            return now_us.saturating_add(delay_us);
        };
        let bits = u64::try_from(length).unwrap_or(u64::MAX).saturating_mul(8);
        let takes_us = bits.saturating_mul(1_000_000) / rate;
        let free_us = self.busy_until_us.get(&to).copied().unwrap_or(0).max(now_us);
        self.busy_until_us.insert(to, free_us.saturating_add(takes_us));
        free_us.saturating_add(takes_us).saturating_add(delay_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(to: u8, from: u8) -> Vec<u8> {
        let mut frame =
            vec![if to == 0xff { 0xff } else { 2 }, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from];
        frame.resize(60, 0);
        frame
    }
    fn ports(deliveries: &[Delivery]) -> Vec<Port> {
        deliveries.iter().map(|delivery| delivery.to).collect()
    }

    #[test]
    fn an_unknown_address_is_flooded_and_a_known_one_is_not() {
        let mut fabric = Fabric::default();
        assert_eq!(ports(&fabric.handle_frame(1, &frame(9, 1), 1..=3, 0)), [2, 3]);
        assert_eq!(ports(&fabric.handle_frame(3, &frame(1, 3), 1..=3, 0)), [1]);
        assert_eq!(ports(&fabric.handle_frame(1, &frame(0xff, 1), 1..=3, 0)), [2, 3]);
        // The address moves, as a guest's does in a migration.
        fabric.handle_frame(2, &frame(0xff, 1), 1..=3, 0);
        assert_eq!(ports(&fabric.handle_frame(3, &frame(1, 3), 1..=3, 0)), [2]);
    }

    #[test]
    fn a_cut_holds_in_both_directions_and_for_broadcasts() {
        let mut fabric = Fabric::default();
        fabric.rules.isolate(2, 1..=3);
        assert_eq!(ports(&fabric.handle_frame(1, &frame(0xff, 1), 1..=3, 0)), [3]);
        assert!(ports(&fabric.handle_frame(2, &frame(0xff, 2), 1..=3, 0)).is_empty());
        fabric.rules = Rules::default();
        assert_eq!(ports(&fabric.handle_frame(2, &frame(1, 2), 1..=3, 0)), [1]);
    }

    #[test]
    fn a_slow_port_takes_frames_one_after_the_other() {
        let mut fabric = Fabric::default();
        fabric.rules.rate_bits_s.insert(2, 480_000); // a 60-byte frame a millisecond
        fabric.rules.delay_ms.insert(2, 5);
        let at = |deliveries: Vec<Delivery>| deliveries[0].at_us;
        assert_eq!(at(fabric.handle_frame(1, &frame(9, 1), [2].into_iter(), 0)), 6_000);
        assert_eq!(at(fabric.handle_frame(1, &frame(9, 1), [2].into_iter(), 0)), 7_000);
        assert_eq!(at(fabric.handle_frame(1, &frame(9, 1), [2].into_iter(), 50_000)), 56_000);
    }

    #[test]
    fn a_slow_link_is_slow_in_both_directions_and_slows_no_other() {
        let mut fabric = Fabric::default();
        fabric.rules.delay_pair(2, 1, 300);
        let at = |deliveries: Vec<Delivery>| deliveries[0].at_us;
        assert_eq!(at(fabric.handle_frame(1, &frame(9, 1), [2].into_iter(), 5)), 300_005);
        assert_eq!(at(fabric.handle_frame(2, &frame(9, 2), [1].into_iter(), 5)), 300_005);
        assert_eq!(at(fabric.handle_frame(3, &frame(9, 3), [1].into_iter(), 5)), 5);
    }

    #[test]
    fn a_runt_goes_nowhere() {
        assert_eq!(Fabric::default().handle_frame(1, &[0xff; 11], 1..=3, 0), []);
    }
}
