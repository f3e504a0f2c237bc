//! A model of the world for the HA manager's decisions: what happens if a node dies?
//!
//! - [`scenario`], [`command`]: what is written in a scenario file.
//! - [`run`]: plays it with the real decisions of [`ha_manager`], and judges each instant.
//! - [`generate`]: random scenarios, a seed each; [`shrink`]: what of one is enough to fail.
//!
//! Architecture invariant: no I/O, no clock, no async, and no chance but a seed's. The same scenario
//! gives the same outcome everywhere.

#![forbid(unsafe_code)]

pub mod command;
pub mod generate;
pub mod outcome;
mod random;
pub mod scenario;
pub mod shrink;
mod world;

pub use outcome::Outcome;
pub use scenario::{Checked, Scenario, ScenarioError};
pub use world::Mistake;

use world::World;

/// Plays a scenario to its end.
#[must_use]
pub fn run(scenario: &Checked) -> Outcome {
    World::new(scenario, scenario.spec.seed, None).run()
}

/// Plays a scenario in a world where one rule is broken: the judge must notice.
#[must_use]
pub fn run_with(scenario: &Checked, mistake: Mistake) -> Outcome {
    World::new(scenario, scenario.spec.seed, Some(mistake)).run()
}
