//! Whether vCPU threads still live: each counts its rounds, and is kicked between two looks.
//!
//! A guest that idles or computes does not leave KVM_RUN by itself, so that no round says nothing.
//! After a kick one does: the thread comes out, looks around and enters again.
//!
//! Invariant: silence is counted in looks, not by the clock alone: a process that was stopped for
//! an hour has not been silent for longer than one look.

use std::time::Duration;

/// Most that one look adds to a silence.
const LOOK_MAX: Duration = Duration::from_secs(10);

/// What was seen of each vCPU. Pure: times are handed in.
#[derive(Debug, Default)]
pub struct Pulse {
    vcpus: Vec<Seen>,
    looked_at: Option<Duration>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    rounds: u64,
    silent: Duration,
}

impl Pulse {
    /// Looks at the rounds that each vCPU has made, at `now` of any clock that goes on; says for how
    /// long the most silent one has made none. `running`: they are meant to run. Kick them after.
    pub fn look(&mut self, rounds: &[u64], running: bool, now: Duration) -> Duration {
        let passed = self.looked_at.map_or(Duration::ZERO, |at| now.saturating_sub(at));
        self.looked_at = Some(now);
        self.vcpus.resize(rounds.len(), Seen::default());
        for (seen, rounds) in self.vcpus.iter_mut().zip(rounds) {
            let lives = !running || seen.rounds != *rounds;
            seen.silent = if lives { Duration::ZERO } else { seen.silent + passed.min(LOOK_MAX) };
            seen.rounds = *rounds;
        }
        self.vcpus.iter().map(|seen| seen.silent).max().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_counted_in_looks() {
        let mut pulse = Pulse::default();
        let mut look = |rounds: &[u64], running, seconds| {
            pulse.look(rounds, running, Duration::from_secs(seconds)).as_secs()
        };
        assert_eq!(look(&[1, 1], true, 100), 0);
        assert_eq!(look(&[2, 1], true, 105), 5);
        assert_eq!(look(&[3, 1], true, 110), 10);
        assert_eq!(look(&[4, 2], true, 115), 0, "it was slow, no more");
        assert_eq!(look(&[4, 2], true, 3_715), 10, "this process did not run for an hour");
        assert_eq!(look(&[4, 2], false, 3_720), 0, "paused");
        assert_eq!(look(&[4, 2], true, 3_725), 5);
    }
}
