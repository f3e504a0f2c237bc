//! The model of how a leader's work grows with its cluster (`tests/src/scale.rs`) holds: real voters
//! send to stand-ins for learners, which count. `tests/bench scale` measures larger clusters.

mod sim;

use std::time::Duration;

use sim::{Sim, print_failover, print_window, shape};

const DURING: Duration = Duration::from_secs(4);
const WRITES: u32 = 100;

/// Parts of the model's number. More would be a message too many to each member. A machine that is
/// short of processors sends fewer: more of those who wait share a round.
const LEAST: f64 = 0.6;
const MOST: f64 = 1.1;

fn assert_close(what: &str, measured: f64, model: f64) {
    let part = measured / model;
    assert!(
        (LEAST..=MOST).contains(&part),
        "{what}: {measured:.1} measured, {model:.1} by the model"
    );
}

fn idle(voters: usize, learners: usize) -> Sim {
    let sim = Sim::form(voters, learners).expect("a cluster");
    let window = sim.measure(DURING, 0).expect("a measurement");
    let shape = shape(voters, learners, 0.0, 1.0);
    print_window("idle", &window, &shape);
    let each = window.exchange();
    assert_close("messages", each.all(), shape.exchange().all());
    assert_close("heartbeats", each.heartbeats, shape.exchange().heartbeats);
    assert_eq!(window.refused(), 0, "leases that were not acknowledged");
    sim
}

/// With more learners two cores do not send as many messages as these writes need, and put several
/// into one.
fn writing(sim: &Sim, voters: usize, learners: usize) {
    let window = sim.measure(DURING, WRITES).expect("a measurement");
    let shape = shape(voters, learners, f64::from(WRITES), window.batch());
    print_window("writing", &window, &shape);
    assert_close("messages", window.exchange().all(), shape.exchange().all());
    assert_eq!(window.refused(), 0, "leases that were not acknowledged");
}

#[test]
fn thirty_learners_as_the_model_says_and_their_leases_survive_the_leader() {
    let mut sim = idle(3, 30);
    writing(&sim, 3, 30);
    let failover = sim.fail_over().expect("somebody leads again");
    let shape = shape(3, 30, 0.0, 1.0);
    print_failover(&failover, &shape);
    sim.end();
}

#[test]
fn a_hundred_learners_and_five_voters_as_the_model_says() {
    idle(5, 100).end();
}
