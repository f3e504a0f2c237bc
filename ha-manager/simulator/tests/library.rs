//! The scenario library, `tests/scenarios/`: each file plays as it says it does. Files that must be
//! refused are in `refused/`, with the reason in their first line.

use std::fs;
use std::path::{Path, PathBuf};

use ha_simulator::{Checked, Scenario, ScenarioError, run};

fn library() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/scenarios")
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{folder:?}: {error}")) {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn read(path: &Path) -> Result<Checked, ScenarioError> {
    let text = fs::read_to_string(path).unwrap();
    match path.extension().is_some_and(|extension| extension == "json") {
        true => Scenario::from_json(&text),
        false => Scenario::from_toml(&text),
    }
}

fn is_refused(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str() == "refused")
}

#[test]
fn every_scenario_plays_as_it_says() {
    let all = files(&library());
    let mut failed = Vec::new();
    let mut without = Vec::new();
    for path in all.iter().filter(|path| !is_refused(path)) {
        let name = path.strip_prefix(library()).unwrap().display().to_string();
        let scenario = match read(path) {
            Ok(scenario) => scenario,
            Err(error) => {
                failed.push(format!("{name}: {error}"));
                continue;
            }
        };
        // Kept because they once broke a promise: that they do no more is what is expected.
        if scenario.spec.expect.is_none() && !name.starts_with("found/") {
            without.push(name.clone());
        }
        let outcome = run(&scenario);
        assert_eq!(outcome, run(&scenario), "{name}: the same seed is the same run");
        if !outcome.ok {
            let story =
                outcome.timeline.iter().map(|line| format!("{:>8} {}", line.at_ms, line.text));
            let story: Vec<String> = story.collect();
            failed.push(format!("{name}: {}\n{}", outcome.violations.join("; "), story.join("\n")));
        }
    }
    assert!(without.is_empty(), "they expect nothing: {without:?}");
    assert!(
        failed.is_empty(),
        "{} of {} failed:\n{}",
        failed.len(),
        all.len(),
        failed.join("\n\n")
    );
}

#[test]
fn what_makes_no_sense_is_refused_with_its_place() {
    let all = files(&library().join("refused"));
    assert!(!all.is_empty());
    for path in all {
        let text = fs::read_to_string(&path).unwrap();
        let expected = text.lines().next().and_then(|line| line.strip_prefix("# "));
        let error = match read(&path) {
            Ok(_) => panic!("{path:?} was taken"),
            Err(error) => error.to_string(),
        };
        let expected = expected.unwrap_or_else(|| panic!("{path:?}: {error}"));
        assert!(error.contains(expected), "{path:?}: {error}");
    }
}
