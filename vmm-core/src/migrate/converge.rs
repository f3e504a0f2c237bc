//! When to stop copying and pause: a pure function of the rounds so far.
//!
//! The intuition: what is left after a round is what the guest dirtied while it was copied. If
//! that, the device state and the fixed steps fit the downtime limit, pausing is allowed. It is not yet
//! wise while another round would still halve the downtime, so such rounds are made ("polishing"):
//! each costs at most half of what the last one cost. If the guest dirties as fast as the connection
//! carries, rounds stop helping: then the larger, forced limit decides whether to pause anyway
//! or to give up. QEMU tries for ever there; Cloud Hypervisor's rounds end by count alone.
//!
//! No clock, no I/O, no randomness: durations come in as arguments.

use std::fmt;
use std::time::Duration;

/// What one round did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// Bytes of guest memory that the round covered (zero pages too).
    pub covered_bytes: u64,
    /// Bytes that went over the connections.
    pub sent_bytes: u64,
    /// How long it took, to the target's acknowledgement.
    pub elapsed: Duration,
    /// Bytes of guest memory that were dirty at its end: what the next round would cover.
    pub dirty_bytes: u64,
}

/// What the caller asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Pause as soon as the expected downtime is at most this.
    pub downtime: Duration,
    /// When rounds no longer help: pause if the expected downtime is at most this, else give up.
    pub forced_downtime: Duration,
    /// Most precopy rounds.
    pub rounds: u32,
    /// Expected size of the device state.
    pub state_bytes: u64,
    /// Time that the pause costs apart from sending: saving, restoring, committing, resuming.
    pub fixed: Duration,
}

/// What to do next, with the figures that led to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Copy what is dirty while the VM runs on.
    AnotherRound(Estimate),
    /// Pause and copy the rest.
    StopAndCopy(StopReason, Estimate),
    /// Leave the VM here.
    GiveUp(GaveUp),
}

/// Why stopping is right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// Nothing, or nearly nothing, is left.
    Small,
    /// The downtime limit is met, and another round would not shorten it by much.
    WithinLimit,
    /// Rounds no longer help; the forced limit is met.
    Forced,
}

/// What the rounds so far say about the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes a second that the connections carry.
    pub bandwidth_bytes_s: u64,
    /// Whether that was measured; too few bytes were sent otherwise, and it is assumed.
    pub is_measured: bool,
    /// Bytes a second that the guest dirties.
    pub dirty_bytes_s: u64,
    /// The downtime if the VM were paused now.
    pub downtime: Duration,
}

/// Why a migration was given up, in figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GaveUp {
    /// Rounds made.
    pub rounds: u32,
    /// What they showed.
    pub estimate: Estimate,
    /// The limit that the estimate is over.
    pub forced_downtime: Duration,
}

impl fmt::Display for GaveUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes >> 20;
        write!(
            f,
            "after {} rounds the guest writes {} MiB/s, the connection carries {} MiB/s, and the pause would take {} ms (at most {} ms)",
            self.rounds,
            mib(self.estimate.dirty_bytes_s),
            mib(self.estimate.bandwidth_bytes_s),
            self.estimate.downtime.as_millis(),
            self.forced_downtime.as_millis(),
        )
    }
}

/// Bytes that a bandwidth measurement should rest on.
const MEASURED_BYTES: u64 = 8 << 20;
/// Fewer bytes than this measure the latency alone; the bandwidth counts as unknown then.
const MEASURABLE_BYTES: u64 = 1 << 20;
/// What is assumed of an unknown bandwidth: half of what Gigabit Ethernet carries.
const ASSUMED_BYTES_S: u64 = 64 << 20;
/// A rest that sends faster than this is not worth another round.
const SMALL: Duration = Duration::from_millis(2);
/// Rounds without progress after which more rounds are taken to be useless.
const STALLED_ROUNDS: usize = 3;

/// Decides after each round. `rounds` is what was done so far, oldest first; without any, the answer
/// is another round.
#[must_use]
pub fn decide(rounds: &[Round], limits: &Limits) -> Decision {
    let estimate = estimate(rounds, limits);
    let Some(last) = rounds.last() else { return Decision::AnotherRound(estimate) };
    let made = u32::try_from(rounds.len()).unwrap_or(u32::MAX);
    let exhausted = made >= limits.rounds;
    if !exhausted && !estimate.is_measured && last.dirty_bytes > MEASURABLE_BYTES {
        return Decision::AnotherRound(estimate); // it measures the bandwidth
    }
    let rest = transfer_time(last.dirty_bytes, estimate.bandwidth_bytes_s);
    if estimate.downtime <= limits.downtime {
        if rest <= SMALL {
            return Decision::StopAndCopy(StopReason::Small, estimate);
        }
        let halves = last.dirty_bytes <= last.covered_bytes / 2;
        if !exhausted && halves && estimate.dirty_bytes_s <= estimate.bandwidth_bytes_s / 2 {
            return Decision::AnotherRound(estimate);
        }
        return Decision::StopAndCopy(StopReason::WithinLimit, estimate);
    }
    if !exhausted && !is_stalled(rounds) {
        return Decision::AnotherRound(estimate);
    }
    if estimate.downtime <= limits.forced_downtime {
        return Decision::StopAndCopy(StopReason::Forced, estimate);
    }
    let forced_downtime = limits.forced_downtime.max(limits.downtime);
    Decision::GiveUp(GaveUp { rounds: made, estimate, forced_downtime })
}

/// What the rounds so far show. The bandwidth rests on the newest rounds that together sent
/// enough bytes to measure it. Without any round, the downtime is 0.
#[must_use]
pub fn estimate(rounds: &[Round], limits: &Limits) -> Estimate {
    let (mut bytes, mut elapsed) = (0_u64, Duration::ZERO);
    for round in rounds.iter().rev() {
        bytes = bytes.saturating_add(round.sent_bytes);
        elapsed = elapsed.saturating_add(round.elapsed);
        if bytes >= MEASURED_BYTES {
            break;
        }
    }
    let is_measured = bytes >= MEASURABLE_BYTES;
    let bandwidth_bytes_s = if is_measured { rate(bytes, elapsed) } else { ASSUMED_BYTES_S };
    let last = rounds.last();
    let dirty_bytes = last.map_or(0, |round| round.dirty_bytes);
    let rest = dirty_bytes.saturating_add(limits.state_bytes);
    let downtime = match rounds {
        [] => Duration::ZERO,
        _ => transfer_time(rest, bandwidth_bytes_s).saturating_add(limits.fixed),
    };
    let dirty_bytes_s = last.map_or(0, |round| rate(round.dirty_bytes, round.elapsed));
    Estimate { bandwidth_bytes_s, is_measured, dirty_bytes_s, downtime }
}

/// Whether none of the newest rounds left clearly less than the round before it.
fn is_stalled(rounds: &[Round]) -> bool {
    let Some(newest) =
        rounds.len().checked_sub(STALLED_ROUNDS + 1).and_then(|from| rounds.get(from..))
    else {
        return false;
    };
    newest.windows(2).all(|pair| match pair {
        [before, after] => after.dirty_bytes >= before.dirty_bytes - before.dirty_bytes / 10,
        _ => true,
    })
}

/// Bytes a second; a time under a microsecond counts as one.
fn rate(bytes: u64, elapsed: Duration) -> u64 {
    let micros = elapsed.as_micros().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000 / micros).unwrap_or(u64::MAX)
}

/// How long `bytes` take; a day where nothing moves.
fn transfer_time(bytes: u64, bytes_s: u64) -> Duration {
    const FOREVER: Duration = Duration::from_secs(86_400);
    if bytes == 0 {
        return Duration::ZERO;
    }
    let micros = u128::from(bytes) * 1_000_000 / u128::from(bytes_s.max(1));
    u64::try_from(micros).map_or(FOREVER, Duration::from_micros).min(FOREVER)
}

#[cfg(test)]
#[path = "converge_tests.rs"]
mod tests;
