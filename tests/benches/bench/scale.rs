//! What one leader does for many learners: real voters, stand-ins for the learners, in this process.

use std::time::Duration;

use crate::sim::{Sim, print_failover, print_window, shape};

const DURING: Duration = Duration::from_secs(10);

/// Measures it idle, under writes, and when its leader is killed.
pub(crate) fn measure(voters: usize, learners: usize, writes_per_s: u32) -> anyhow::Result<()> {
    let mut sim = Sim::form(voters, learners)?;
    let window = sim.measure(DURING, 0)?;
    print_window("idle", &window, &shape(voters, learners, 0.0, 1.0));
    let window = sim.measure(DURING, writes_per_s)?;
    let writes = f64::from(writes_per_s);
    let what = format!("{writes_per_s} writes a second");
    print_window(&what, &window, &shape(voters, learners, writes, window.batch()));
    let failover = sim.fail_over()?;
    print_failover(&failover, &shape(voters, learners, 0.0, 1.0));
    sim.end();
    Ok(())
}
