//! `clusterctl ha simulate FILE`: what would happen? No cluster is asked.

use std::io::Read;
use std::path::{Path, PathBuf};

use ha_simulator::{Checked, Outcome, Scenario, ScenarioError};

use crate::args::Format;
use crate::failure::{Exit, Failure};
use crate::output;

#[derive(Debug, clap::Args)]
pub(crate) struct Simulate {
    /// The scenario: TOML, or JSON if its name ends in `.json`; `-`: TOML from the standard input
    pub(crate) file: PathBuf,
    /// Another seed than the file's: another jitter of heartbeats, messages and work
    #[arg(long)]
    pub(crate) seed: Option<u64>,
}

/// Plays the scenario and prints what happened.
///
/// # Errors
/// A file that is no scenario; a promise that was broken, or an expectation that does not hold.
pub(crate) fn simulate(format: Format, command: &Simulate) -> Result<(), Failure> {
    let path = command.file.display().to_string();
    let mut scenario = read(&command.file)?;
    if let Some(seed) = command.seed {
        scenario.spec.seed = seed;
    }
    let outcome = ha_simulator::run(&scenario);
    output::print(format, &outcome, table)?;
    match outcome.violations.len() {
        0 => Ok(()),
        count => {
            let why = outcome.violations.join("; ");
            Err(Failure::new(Exit::Failed, format!("{path}: {count} violation(s)")).why(why))
        }
    }
}

fn read(path: &Path) -> Result<Checked, Failure> {
    let text = match path.as_os_str().to_str() {
        Some("-") => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map(|_| text)
        }
        _ => std::fs::read_to_string(path),
    };
    let text = text.map_err(|error| Failure::file("read", path, &error))?;
    let json = path.extension().is_some_and(|extension| extension == "json");
    let read = if json { Scenario::from_json(&text) } else { Scenario::from_toml(&text) };
    read.map_err(|error: ScenarioError| {
        Failure::new(Exit::Usage, format!("{} is no scenario", path.display()))
            .why(error.to_string())
            .remedy("the format is explained in the README, under \"High availability\"")
    })
}

fn table(outcome: &Outcome) -> String {
    let at = |ms: u64| format!("{}.{:03} s", ms / 1000, ms % 1000);
    let lines = outcome.timeline.iter().map(|line| [at(line.at_ms), line.text.clone()]);
    let story = output::columns(["TIME", "WHAT HAPPENED"], lines);
    let resources = outcome.resources.iter().map(|(id, resource)| {
        let running_on: Vec<&str> = resource.running_on.iter().map(AsRef::as_ref).collect();
        [
            id.clone(),
            resource.state.clone(),
            resource.requested.word().to_owned(),
            resource.owner.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string),
            output::or_dash(&running_on.join(", ")),
            at(resource.down_ms),
        ]
    });
    let headings = ["RESOURCE", "STATE", "REQUESTED", "OWNER", "RUNS ON", "DOWN"];
    let resources = output::columns(headings, resources);
    let nodes = outcome.nodes.iter().map(|(name, node)| {
        let word = |switch| match switch {
            ha_simulator::scenario::Switch::On => "on".to_owned(),
            ha_simulator::scenario::Switch::Off => "off".to_owned(),
        };
        let state = node.state.word().to_owned();
        [name.to_string(), word(node.power), word(node.network), state]
    });
    let nodes = output::columns(["NODE", "POWER", "NETWORK", "STATE"], nodes);
    let verdict = match outcome.violations.as_slice() {
        [] => "ok: no promise is broken, and what was expected came out".to_owned(),
        violations => format!("NOT OK\n{}", violations.join("\n")),
    };
    let name = if outcome.name.is_empty() { "scenario" } else { &outcome.name };
    [name.to_owned(), story, resources, nodes, verdict].join("\n\n")
}
