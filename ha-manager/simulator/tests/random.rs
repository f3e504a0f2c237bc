//! Random scenarios, a seed each: whatever goes wrong, no promise is broken. `HOLDFAST_HA_SEEDS`
//! sets how many, `HOLDFAST_HA_SEED` plays one and shows what happened in it. What fails is printed
//! as a scenario, as small as it gets: to be kept in `tests/scenarios/found/`.

use ha_simulator::{Checked, Mistake, Outcome, Scenario, generate, run, run_with, shrink};

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn checked(scenario: &Scenario) -> Option<Checked> {
    scenario.clone().check("").ok()
}

/// A failing scenario, as small as it gets, in the form that is kept.
fn smallest(scenario: &Scenario, play: impl Fn(&Checked) -> Outcome) -> String {
    let fails =
        |candidate: &Scenario| checked(candidate).is_some_and(|c| !play(&c).violations.is_empty());
    let small = shrink::shrink(scenario, fails);
    let outcome = play(&checked(&small).unwrap());
    let story: Vec<String> =
        outcome.timeline.iter().map(|line| format!("# {:>8} {}", line.at_ms, line.text)).collect();
    format!("{}\n{}", toml::to_string(&small).unwrap(), story.join("\n"))
}

/// Every fourth seed, so that four tests share the cores.
fn no_seed_breaks_a_promise(part: u64) {
    let seeds: Vec<u64> = match setting("HOLDFAST_HA_SEED") {
        Some(seed) => (seed..=seed).filter(|seed| seed % 4 == part).collect(),
        None => {
            let last = setting("HOLDFAST_HA_SEEDS").unwrap_or(1_000);
            (1..=last).filter(|seed| seed % 4 == part).collect()
        }
    };
    let mut broken = Vec::new();
    let (mut fenced, mut moves) = (0, 0);
    for seed in seeds {
        let scenario = generate::scenario(seed);
        let outcome = run(&checked(&scenario).unwrap());
        (fenced, moves) = (fenced + outcome.fenced.len(), moves + outcome.moves.len());
        if let Some(violation) = outcome.violations.first() {
            broken.push((seed, violation.clone()));
        }
    }
    println!("{fenced} nodes fenced, {moves} moves");
    if let Some((seed, _)) = broken.first() {
        println!("{}", smallest(&generate::scenario(*seed), run));
    }
    assert!(broken.is_empty(), "{} seeds: {broken:#?}", broken.len());
}

#[test]
fn no_seed_breaks_a_promise_in_the_first_part() {
    no_seed_breaks_a_promise(0);
}

#[test]
fn no_seed_breaks_a_promise_in_the_second_part() {
    no_seed_breaks_a_promise(1);
}

#[test]
fn no_seed_breaks_a_promise_in_the_third_part() {
    no_seed_breaks_a_promise(2);
}

#[test]
fn no_seed_breaks_a_promise_in_the_last_part() {
    no_seed_breaks_a_promise(3);
}

/// How many seeds a mistake is looked for in.
const BITES: u64 = 400;

/// As what matters most: a VM that runs twice.
fn is_caught(mistake: Mistake) -> String {
    let caught = (1..=BITES).find_map(|seed| {
        let outcome = run_with(&checked(&generate::scenario(seed))?, mistake);
        let twice = |violation: &&String| ["I1", "I2"].iter().any(|i| violation.contains(i));
        Some(format!("seed {seed}: {}", outcome.violations.iter().find(twice)?))
    });
    caught.unwrap_or_else(|| panic!("{mistake:?} was not noticed in {BITES} seeds"))
}

#[test]
fn mistakes_are_caught() {
    for mistake in [
        Mistake::NoMargin,
        Mistake::NoGenerationCheck,
        Mistake::NoNewLeaderWait,
        Mistake::NoFence,
        Mistake::PetWithoutLease,
        Mistake::TrustUnprotected,
    ] {
        println!("{mistake:?}: {}", is_caught(mistake));
    }
}
