//! Consistency under faults. Real members (openraft, RocksDB, TLS and gRPC as in production) run on
//! simulated machines: a network that delays, loses and cuts, disks that stall, fill up and forget
//! what was not synced when the power goes, clocks of different speed. Clients write down what they
//! ask and hear; [`check`] replays it, and [`search`] decides small histories without knowing revisions.
//!
//! Each seed is a run of its own that can be repeated; those that once failed are [`KEPT`]. More of
//! them, or one by its number (`HOLDFAST_SHOW=1` prints all that a failed one recorded):
//!
//! ```text
//! tests/run --seeds 10000
//! HOLDFAST_SHOW=1 tests/run --seeds 1 4711
//! ```

mod bites;
mod check;
mod clients;
mod entropy;
mod fabric;
mod faults;
mod history;
mod machine;
mod rng;
mod search;
mod simulation;
mod world;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use faults::Fault;
use history::{Answer, Call};
use simulation::{Run, Setup, run};

/// Seeds that once failed. They stay for ever.
///
/// 7: after all machines lost power the former leader went on in its term and confirmed reads at an
/// index below what it had acknowledged.
const KEPT: [u64; 1] = [7];

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// Runs seeds on all cores; answers the runs with something wrong, by seed.
fn run_all(seeds: &[u64], setup: &Setup, see: impl Fn(&Run) + Sync) -> BTreeMap<u64, Vec<String>> {
    let next = AtomicUsize::new(0);
    let bad = Mutex::new(BTreeMap::new());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(seed) = seeds.get(at) else { return };
                    if at > 0 && at.is_multiple_of(500) {
                        println!("{at} of {} seeds have begun", seeds.len());
                    }
                    let run = run(*seed, setup);
                    let anomalies = check::anomalies(&run.record);
                    if !anomalies.is_empty() {
                        println!("seed {seed}: {anomalies:#?}");
                        if std::env::var_os("HOLDFAST_SHOW").is_some() {
                            println!("{:#?}", run.record);
                        }
                        bad.lock().expect("no panic").insert(*seed, anomalies);
                    }
                    see(&run);
                }
            });
        }
    });
    bad.into_inner().expect("no panic")
}

/// What the runs of a test came to, so that one that did nothing is seen.
#[derive(Debug, Default)]
struct Tally {
    committed: u64,
    conflicts: u64,
    reads: u64,
    refused: u64,
    unknown: u64,
    voters_changed: u64,
    simulated_ms: u64,
    faults: BTreeMap<Fault, u64>,
}

impl Tally {
    fn add(&mut self, run: &Run) {
        for operation in &run.record.operations {
            match (&operation.answer, &operation.call) {
                (Answer::Committed { .. }, _) => self.committed += 1,
                (Answer::Conflict { .. }, _) => self.conflicts += 1,
                (Answer::Read { .. }, _) => self.reads += 1,
                (Answer::Refused(_), _) => self.refused += 1,
                (Answer::Unknown(_) | Answer::Contradiction(_), Call::Txn { .. }) => {
                    self.unknown += 1;
                }
                (Answer::Unknown(_) | Answer::Contradiction(_), _) => self.refused += 1,
            }
        }
        self.voters_changed += u64::from(run.voters_changed);
        self.simulated_ms += run.took_ms;
        for fault in &run.faults {
            *self.faults.entry(*fault).or_default() += 1;
        }
    }
}

/// The process that one simulation has for itself.
#[test]
#[ignore = "started by the other tests, with what it is to simulate"]
fn child_simulates() {
    simulation::serve();
}

#[test]
fn no_seed_shows_an_anomaly() {
    let first = number("HOLDFAST_FIRST_SEED", 1);
    // Without optimization a seed takes ten times as long.
    let count = number("HOLDFAST_SEEDS", if cfg!(debug_assertions) { 20 } else { 200 });
    let seeds: Vec<u64> = KEPT.into_iter().chain(first..first.saturating_add(count)).collect();
    let tally = Mutex::new(Tally::default());
    let began = std::time::Instant::now();
    let bad = run_all(&seeds, &Setup::all(), |run| tally.lock().expect("no panic").add(run));
    let tally = tally.into_inner().expect("no panic");
    println!("{} seeds in {:?}: {tally:#?}", seeds.len(), began.elapsed());
    assert!(bad.is_empty(), "seeds with anomalies: {bad:#?}");
    let per_seed = tally.committed / u64::try_from(seeds.len()).unwrap_or(1).max(1);
    assert!(per_seed >= 20, "hardly anything was written: {tally:?}");
    if count >= 100 {
        assert_eq!(tally.faults.len(), Fault::ALL.len(), "a fault never came: {tally:?}");
        assert!(tally.voters_changed > 0, "nobody ever lost a vote: {tally:?}");
    }
}

#[test]
fn a_seed_is_the_same_run_each_time() {
    for seed in [1, 7, 154] {
        let (once, again) = (run(seed, &Setup::all()), run(seed, &Setup::all()));
        for (a, b) in once.record.operations.iter().zip(&again.record.operations) {
            assert_eq!(a, b, "seed {seed}");
        }
        assert_eq!(once.record, again.record, "seed {seed}");
    }
}
