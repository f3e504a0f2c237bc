//! Makes a failing scenario smaller: takes away what it fails without.

use crate::scenario::Scenario;

/// The smallest scenario found that still `fails`, by taking away steps, commands, rules and
/// resources, one at a time, until none can be spared.
#[must_use]
pub fn shrink(scenario: &Scenario, fails: impl Fn(&Scenario) -> bool) -> Scenario {
    let mut smallest = scenario.clone();
    loop {
        let smaller = without_one(&smallest).into_iter().find(|candidate| fails(candidate));
        match smaller {
            Some(smaller) => smallest = smaller,
            None => return smallest,
        }
    }
}

/// Each scenario with one thing less.
fn without_one(scenario: &Scenario) -> Vec<Scenario> {
    let mut all = Vec::new();
    for index in 0..scenario.steps.len() {
        let mut less = scenario.clone();
        less.steps.remove(index);
        all.push(less);
        if scenario.steps[index].commands.len() > 1 {
            for command in 0..scenario.steps[index].commands.len() {
                let mut less = scenario.clone();
                less.steps[index].commands.remove(command);
                all.push(less);
            }
        }
    }
    for index in 0..scenario.rules.len() {
        let mut less = scenario.clone();
        less.rules.remove(index);
        all.push(less);
    }
    for id in scenario.resources.keys() {
        let mut less = scenario.clone();
        less.resources.remove(id);
        all.push(less);
    }
    all
}
