//! What was measured beside what the model says.

use cluster::RaftTimings;
use tests::scale::{Exchange, SIZES, Shape};

use super::voters::LEASE_EVERY;
use super::{Failover, VALUE, Window};

/// A write's entry in a message, beyond its value: key, client, numbers, about.
const ENTRY: f64 = 68.0;

/// Such a cluster with the defaults.
pub(crate) fn shape(voters: usize, learners: usize, writes_per_s: f64, batch: f64) -> Shape {
    let timings = RaftTimings::default();
    let seconds = |ms: u64| std::time::Duration::from_millis(ms).as_secs_f64();
    let count = |count: usize| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
    Shape {
        voters: count(voters),
        learners: count(learners),
        heartbeat_s: seconds(timings.heartbeat_ms),
        election_s: (seconds(timings.election_min_ms), seconds(timings.election_max_ms)),
        lease_every_s: LEASE_EVERY.as_secs_f64(),
        lease_s: LEASE_EVERY.as_secs_f64() * 10.0,
        // On this machine, with voters that answer at once.
        round_s: 0.002,
        writes: writes_per_s,
        batch,
        entry_bytes: count(VALUE) + ENTRY,
    }
}

pub(crate) fn print_window(what: &str, window: &Window, shape: &Shape) {
    let Exchange { heartbeats, entries, commits, hellos, leases } = window.exchange();
    let model = shape.exchange();
    println!("{what}, {} voters, {} learners:", shape.voters, shape.learners);
    println!("                        measured     model");
    let line = |what: &str, measured: f64, model: f64| {
        println!("  {what:<20} {measured:>10.1} {model:>9.1}");
    };
    line("messages/s", window.messages(), model.all() * shape.learners);
    line("KB/s", window.bytes() / 1e3, shape.learner_bytes(&SIZES) * shape.learners / 1e3);
    line("each: heartbeats/s", heartbeats, model.heartbeats);
    line("each: entries/s", entries, model.entries);
    line("each: commits/s", commits, model.commits);
    line("each: membership/s", hellos, model.hellos);
    line("each: lease/s", leases, model.leases);
    for (name, per_s, payload, wire) in window.kinds() {
        println!(
            "  {name:<12} {per_s:>9.1}/s, {payload:>6.1} B payload, {wire:>6.1} B on the wire"
        );
    }
    println!(
        "  leader: {:.0} % of a core; leases: {:.1} ms, {} not acknowledged; {} writes in {:.1} s, {:.2} to a message",
        window.cpu_percent,
        window.lease_ms(),
        window.refused(),
        window.writes,
        window.seconds,
        window.batch(),
    );
}

pub(crate) fn print_failover(failover: &Failover, shape: &Shape) {
    let (best, mean, worst) = shape.failover().write_s;
    println!(
        "the leader killed: a write is taken after {:.2} s (model: {best:.2} to {worst:.2}, {mean:.2} on average), all leases are acknowledged after {:.2} s",
        failover.write.as_secs_f64(),
        failover.leases.as_secs_f64(),
    );
}
