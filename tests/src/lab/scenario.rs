//! Scenarios that share one running lab: booting nodes and forming a cluster costs more than what
//! most of them look at. Each leaves the lab whole for the next one, which is checked.

use std::time::Instant;

use anyhow::Context;

/// Names the scenarios to play (parts of their names, separated by commas); absent: all.
pub const CHOICE_VARIABLE: &str = "HOLDFAST_SCENARIOS";

/// What scenarios are played on: a lab, and what they hand on to each other.
pub trait Stage {
    /// Checks that all is as a scenario may expect to find it.
    ///
    /// # Errors
    /// With what is broken.
    fn check_whole(&mut self) -> anyhow::Result<()>;
}

/// A scenario: its name, and what happens.
pub type Scenario<S> = (&'static str, fn(&mut S) -> anyhow::Result<()>);

/// Plays the scenarios in order; says how long each took. The first failure ends it: after it the
/// lab is not what the next one expects.
///
/// # Errors
/// The scenario's own, under its name; or what it left broken.
pub fn play<S: Stage>(stage: &mut S, scenarios: &[Scenario<S>]) -> anyhow::Result<()> {
    play_chosen(stage, scenarios, &std::env::var(CHOICE_VARIABLE).unwrap_or_default())
}

fn play_chosen<S: Stage>(
    stage: &mut S,
    scenarios: &[Scenario<S>],
    choice: &str,
) -> anyhow::Result<()> {
    let chosen =
        |name: &str| choice.is_empty() || choice.split(',').any(|part| name.contains(part));
    for (name, run) in scenarios.iter().filter(|(name, _)| chosen(name)) {
        println!("=== scenario `{name}`");
        let started = Instant::now();
        run(stage).with_context(|| format!("scenario `{name}`"))?;
        stage.check_whole().with_context(|| format!("scenario `{name}` left the lab broken"))?;
        println!("=== scenario `{name}`: passed in {:.1} s", started.elapsed().as_secs_f64());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Count(u32);

    impl Stage for Count {
        fn check_whole(&mut self) -> anyhow::Result<()> {
            anyhow::ensure!(self.0 < 10, "too many");
            Ok(())
        }
    }

    fn add(to: &mut Count) -> anyhow::Result<()> {
        to.0 += 4;
        Ok(())
    }

    fn fail(_: &mut Count) -> anyhow::Result<()> {
        anyhow::bail!("no")
    }

    #[test]
    fn the_first_failure_ends_it_and_is_named() {
        let mut stage = Count(0);
        let error = play_chosen(&mut stage, &[("one", add), ("two", fail), ("three", add)], "")
            .unwrap_err();
        assert_eq!(format!("{error:#}"), "scenario `two`: no");
        assert_eq!(stage.0, 4);
    }

    #[test]
    fn what_a_scenario_breaks_is_held_against_it() {
        let mut stage = Count(0);
        let error = play_chosen(&mut stage, &[("a", add), ("b", add), ("c", add)], "").unwrap_err();
        assert_eq!(format!("{error:#}"), "scenario `c` left the lab broken: too many");
    }

    #[test]
    fn parts_of_names_choose() {
        let mut stage = Count(0);
        play_chosen(&mut stage, &[("one", add), ("two", fail), ("three", add)], "one,thr").unwrap();
        assert_eq!(stage.0, 8);
    }
}
