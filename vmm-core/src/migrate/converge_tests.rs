use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

fn limits() -> Limits {
    Limits {
        downtime: Duration::from_millis(300),
        forced_downtime: Duration::from_secs(3),
        rounds: 30,
        state_bytes: 256 << 10,
        fixed: Duration::from_millis(10),
    }
}

fn round(covered: u64, elapsed_ms: u64, dirty: u64) -> Round {
    Round {
        covered_bytes: covered,
        sent_bytes: covered,
        elapsed: Duration::from_millis(elapsed_ms),
        dirty_bytes: dirty,
    }
}

/// Runs a guest that rewrites `working_set` bytes at `dirty_bytes_s` over a link of `bandwidth`
/// bytes a second, round by round, to the decision that ends precopy.
fn simulate(
    memory: u64,
    working_set: u64,
    dirty_bytes_s: u64,
    bandwidth: u64,
    limits: &Limits,
) -> (u32, Decision) {
    let mut rounds: Vec<Round> = Vec::new();
    loop {
        match decide(&rounds, limits) {
            Decision::AnotherRound(_) => {}
            end => return (u32::try_from(rounds.len()).unwrap(), end),
        }
        let covered = rounds.last().map_or(memory, |last| last.dirty_bytes);
        let elapsed = transfer_time(covered, bandwidth) + Duration::from_micros(200);
        let written = u128::from(dirty_bytes_s) * elapsed.as_micros() / 1_000_000;
        let dirty = u64::try_from(written).unwrap_or(u64::MAX).min(working_set) & !4095;
        rounds.push(Round {
            covered_bytes: covered,
            sent_bytes: covered,
            elapsed,
            dirty_bytes: dirty,
        });
    }
}

#[test]
fn an_idle_guest_stops_after_one_round() {
    let (rounds, decision) = simulate(1024 * MIB, 0, 0, 1000 * MIB, &limits());
    assert_eq!(rounds, 1);
    assert!(matches!(decision, Decision::StopAndCopy(StopReason::Small, _)), "{decision:?}");
}

#[test]
fn a_guest_within_the_limit_is_still_polished() {
    // 100 MiB/s dirtied, 1000 MiB/s carried: the first round leaves 100 MiB, about 100 ms of
    // downtime. That is within the limit, and two more rounds make it ten and one millisecond.
    let (rounds, decision) = simulate(1024 * MIB, 512 * MIB, 100 * MIB, 1000 * MIB, &limits());
    let Decision::StopAndCopy(StopReason::Small, estimate) = decision else {
        panic!("{decision:?}")
    };
    assert_eq!(rounds, 3);
    assert!(estimate.downtime < Duration::from_millis(15), "{estimate:?}");
}

#[test]
fn a_small_hot_working_set_stops_within_the_limit() {
    let (rounds, decision) = simulate(1024 * MIB, 64 * MIB, 4000 * MIB, 1000 * MIB, &limits());
    assert!(matches!(decision, Decision::StopAndCopy(StopReason::WithinLimit, _)), "{decision:?}");
    assert!(rounds <= 3, "{rounds}");
}

#[test]
fn a_guest_that_outruns_the_link_is_forced_if_allowed_and_else_given_up() {
    let (rounds, decision) = simulate(4096 * MIB, 2048 * MIB, 4000 * MIB, 1000 * MIB, &limits());
    assert!(matches!(decision, Decision::StopAndCopy(StopReason::Forced, _)), "{decision:?}");
    assert!(rounds <= 6, "rounds that don't help are not repeated: {rounds}");
    let strict = Limits { forced_downtime: Duration::from_secs(1), ..limits() };
    let (_, decision) = simulate(4096 * MIB, 2048 * MIB, 4000 * MIB, 1000 * MIB, &strict);
    let Decision::GiveUp(gave_up) = decision else { panic!("{decision:?}") };
    let text = gave_up.to_string();
    assert!(text.contains("carries 999 MiB/s") || text.contains("carries 1000 MiB/s"), "{text}");
}

#[test]
fn a_tiny_last_round_does_not_ruin_the_bandwidth() {
    let rounds = [round(1024 * MIB, 1000, 2 * MIB), round(2 * MIB, 100, 64 * 1024)];
    let estimate = estimate(&rounds, &limits());
    assert!(estimate.bandwidth_bytes_s > 900 * MIB, "{estimate:?}");
}

#[test]
fn a_guest_of_zero_pages_is_not_taken_for_a_slow_connection() {
    let zeros = Round { sent_bytes: 40, ..round(1024 * MIB, 20, 0) };
    let decision = decide(&[zeros], &limits());
    assert!(matches!(decision, Decision::StopAndCopy(StopReason::Small, _)), "{decision:?}");
    // If it then wrote much, the next round measures the connection before anything is paused.
    let woke = Round { dirty_bytes: 16 * MIB, ..zeros };
    assert!(matches!(decide(&[woke], &limits()), Decision::AnotherRound(_)));
    let slow = round(16 * MIB, 16_000, 2 * MIB);
    let Decision::AnotherRound(estimate) = decide(&[woke, slow], &limits()) else {
        panic!("paused for 2 s")
    };
    assert_eq!(estimate.bandwidth_bytes_s, MIB);
}

proptest! {
    #[test]
    fn it_always_ends_and_respects_its_limits(
        memory in 1..4096_u64,
        working_set in 0..4096_u64,
        dirty in 0..8000_u64,
        bandwidth in 1..8000_u64,
        max_rounds in 1..40_u32,
        downtime_ms in 1..1000_u64,
    ) {
        let limits = Limits {
            rounds: max_rounds,
            downtime: Duration::from_millis(downtime_ms),
            forced_downtime: Duration::from_millis(downtime_ms * 4),
            ..limits()
        };
        let working_set = working_set.min(memory);
        let (rounds, decision) =
            simulate(memory * MIB, working_set * MIB, dirty * MIB, bandwidth * MIB, &limits);
        prop_assert!(rounds >= 1 && rounds <= max_rounds);
        match decision {
            Decision::StopAndCopy(StopReason::Forced, estimate) => {
                prop_assert!(estimate.downtime > limits.downtime);
                prop_assert!(estimate.downtime <= limits.forced_downtime);
            }
            Decision::StopAndCopy(_, estimate) => prop_assert!(estimate.downtime <= limits.downtime),
            Decision::GiveUp(gave_up) => {
                prop_assert!(gave_up.estimate.downtime > limits.forced_downtime);
            }
            Decision::AnotherRound(_) => prop_assert!(false, "not an end"),
        }
    }

    #[test]
    fn no_figures_overflow(
        figures in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>()), 0..6),
        state_bytes in any::<u64>(),
    ) {
        let round = |(covered_bytes, sent_bytes, micros, dirty_bytes)| Round {
            covered_bytes, sent_bytes, elapsed: Duration::from_micros(micros), dirty_bytes,
        };
        let rounds: Vec<Round> = figures.into_iter().map(round).collect();
        let _ = decide(&rounds, &Limits { state_bytes, ..limits() });
    }
}
