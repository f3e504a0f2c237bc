//! Fills memory with a pattern and finds it again, round after round, at a steady rate: a page that
//! a migration loses or sends too old is an error here.

use std::hint::black_box;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use crate::Shared;

/// Words checked and rewritten in one go: 64 KiB.
const STEP: usize = 8192;

/// What word `index` holds after round `round`.
fn pattern(round: u64, index: u64) -> u64 {
    (round.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// For ever: checks each step's words, then writes the next round's.
pub(crate) fn keep_checking(shared: &Shared, memory_mib: u64, rate_mib_s: u64) {
    let words = usize::try_from(memory_mib << 17).unwrap_or(0);
    let mut memory: Vec<u64> = (0..).take(words).map(|index| pattern(0, index)).collect();
    let pause = Duration::from_micros((1_000_000 / 16) / rate_mib_s.max(1)); // 16 steps are a MiB
    for round in 0.. {
        let mut index = 0;
        for step in memory.chunks_mut(STEP) {
            let mut errors = 0;
            for word in step.iter_mut() {
                errors += u64::from(black_box(*word) != pattern(round, index));
                *word = black_box(pattern(round + 1, index));
                index += 1;
            }
            shared.memory_errors.fetch_add(errors, Ordering::Relaxed);
            thread::sleep(pause);
        }
        shared.memory_rounds.store(round + 1, Ordering::Relaxed);
    }
}
