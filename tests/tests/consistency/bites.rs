//! The checks themselves: what they must refuse is refused. A simulation whose disks lie, whose
//! clients misuse the store or whose record was changed afterwards never passes.

use super::check::anomalies;
use super::clients::Manner;
use super::faults::Fault;
use super::history::{Answer, Call, Change, Operation, Record};
use super::machine::Promise;
use super::search::{Verdict, search};
use super::simulation::{Run, Setup, run};

/// The first of some seeds whose run the checks refuse for this reason.
fn caught(setup: &Setup, reason: &str) -> bool {
    (1..=40).any(|seed| {
        let found = anomalies(&run(seed, setup).record);
        found.iter().any(|anomaly| anomaly.contains(reason))
    })
}

#[test]
fn a_disk_that_lies_about_fsync_is_caught() {
    let setup =
        Setup { promise: Promise::Broken, faults: vec![Fault::CutPowerOfAll], ..Setup::all() };
    assert!(caught(&setup, "in the log at None"));
}

#[test]
fn stale_reads_passed_off_as_fresh_are_caught() {
    let setup = Setup {
        manner: Manner::StaleAsFresh,
        faults: vec![Fault::IsolateAny, Fault::SlowNetwork],
        ..Setup::all()
    };
    assert!(caught(&setup, "known before"));
}

#[test]
fn a_repetition_that_is_applied_twice_is_caught() {
    let setup = Setup { manner: Manner::ForgetsNames, faults: Vec::new(), ..Setup::all() };
    assert!(caught(&setup, "applied twice"));
}

/// Few enough operations to search through.
fn small() -> Setup {
    let faults = vec![Fault::KillLeader, Fault::IsolateLeader, Fault::CutPowerOfAll];
    Setup { nodes: 3, clients: 3, faulty_ms: 2500, faults, ..Setup::all() }
}

fn is_ours(change: &Change) -> bool {
    change.puts.keys().any(|key| key.starts_with("k/"))
}

/// The store's revision before the clients began.
fn first_revision(run: &Run) -> u64 {
    let first = run.record.log.iter().find(|(_, change)| is_ours(change));
    first.map_or(0, |(revision, _)| revision - 1)
}

/// A run in which nothing is wrong.
fn good(seed: u64) -> Run {
    let run = run(seed, &small());
    assert_eq!(anomalies(&run.record), Vec::<String>::new(), "seed {seed}");
    run
}

#[test]
fn an_independent_search_agrees() {
    for seed in 1..=6 {
        let run = good(seed);
        let verdict = search(&run.record.operations, first_revision(&run));
        assert_eq!(verdict, Verdict::Linearizable, "seed {seed}");
    }
    let wrong = Setup { manner: Manner::StaleAsFresh, faults: vec![Fault::IsolateAny], ..small() };
    let found = (1..=40)
        .map(|seed| run(seed, &wrong))
        .find(|run| anomalies(&run.record).iter().any(|anomaly| anomaly.contains("known before")));
    let found = found.expect("a stale read that shows");
    assert_eq!(search(&found.record.operations, first_revision(&found)), Verdict::Not);
}

/// Both checks refuse a good history when one answer in it is changed.
#[test]
fn changed_answers_are_refused() {
    let good = good(1);
    let first = first_revision(&good);
    let change = |at: usize| {
        let mut record = good.record.clone();
        match &mut record.operations[at].answer {
            Answer::Committed { revision } | Answer::Read { revision, .. } => *revision += 1,
            Answer::Conflict { .. }
            | Answer::Refused(_)
            | Answer::Unknown(_)
            | Answer::Contradiction(_) => return None,
        }
        let fresh = !matches!(record.operations[at].call, Call::StaleGet { .. });
        fresh.then_some(record)
    };
    let changed: Vec<_> = (0..good.record.operations.len()).filter_map(change).collect();
    assert!(changed.len() > 20, "{}", changed.len());
    let mut refusals = 0;
    for record in changed {
        let refused = !anomalies(&record).is_empty();
        let verdict = search(&record.operations, first);
        // A read of a key that the next change leaves alone may as well have come after it.
        assert_eq!(refused, verdict == Verdict::Not, "{record:#?}");
        refusals += usize::from(refused);
    }
    assert!(refusals > 10, "{refusals}");
}

/// A good record is refused once it is changed in one of the ways in which a store could be wrong,
/// at whichever acknowledged write.
fn refused(change: impl Fn(&mut Record, u64), reason: &str) {
    let good = good(2);
    let revisions: Vec<u64> = good.record.operations.iter().filter_map(committed).collect();
    assert!(revisions.len() > 5, "{revisions:?}");
    for revision in revisions {
        let mut record = good.record.clone();
        change(&mut record, revision);
        let found = anomalies(&record);
        assert!(found.iter().any(|anomaly| anomaly.contains(reason)), "{revision}: {found:#?}");
    }
}

fn committed(operation: &Operation) -> Option<u64> {
    match operation.answer {
        Answer::Committed { revision } => Some(revision),
        _ => None,
    }
}

#[test]
fn a_lost_write_is_refused() {
    refused(|record, at| drop(record.log.remove(&at)), "in the log at None");
}

#[test]
fn a_doubled_transaction_is_refused() {
    let double = |record: &mut Record, at: u64| {
        let change = record.log[&at].clone();
        let last = record.log.last_key_value().map_or(0, |(revision, _)| *revision);
        record.log.insert(last + 1, change);
    };
    refused(double, "applied twice");
}

#[test]
fn a_member_whose_copy_differs_is_refused() {
    let corrupt = |record: &mut Record, _: u64| {
        record.last[1].1.retain(|key, _| !key.starts_with("k/"));
    };
    refused(corrupt, "node 1 holds at");
}

#[test]
fn a_watch_that_missed_a_change_is_refused() {
    let miss = |record: &mut Record, at: u64| {
        record.watched[2].retain(|(revision, _)| *revision != at);
    };
    refused(miss, "the watch on node 2");
}
