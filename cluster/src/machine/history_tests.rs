//! The past against a model that remembers every state the store was ever in.

use std::collections::BTreeMap;
use std::io;

use proptest::prelude::*;

use super::command::KeyWrite;
use super::history::{Span, changes, floor_of_prefix, get_at, journal, range_at};
use super::model_tests::Rows;
use super::{At, Command, Lane, Read, Reply, Table, TxnCommand, floor, folders, revision, unswept};

/// Keys of all lanes, nested deeper than the Journal has folders for.
const KEYS: [&str; 10] = [
    "a",
    "vms/",
    "vms/a.toml",
    "vms/a/b/c/d/e/f",
    "vms/a/b/c/d/e/g",
    "statue",
    "status/a",
    "status/vms/a",
    "priv/ca",
    "priw",
];

#[derive(Debug, Clone)]
enum Step {
    Write(BTreeMap<&'static str, Option<u8>>),
    Compact { lane: Lane, before: u64, keep: u64 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let key = prop::sample::select(KEYS.to_vec());
    let write = prop::collection::btree_map(key, prop::option::weighted(0.7, any::<u8>()), 1..4);
    let lane = prop::sample::select(Lane::ALL.to_vec());
    let compact = (lane, 0u64..70, 0u64..4).prop_map(|(lane, before, keep)| Step::Compact {
        lane,
        before,
        keep,
    });
    prop::collection::vec(prop_oneof![6 => write.prop_map(Step::Write), 1 => compact], 0..70)
}

fn command(step: &Step) -> Command {
    match step {
        Step::Write(writes) => Command::Txn(TxnCommand {
            compares: Vec::new(),
            writes: writes
                .iter()
                .map(|(key, value)| KeyWrite {
                    key: (*key).to_owned(),
                    value: value.map(|byte| vec![byte]),
                })
                .collect(),
            client: String::new(),
            sequence: 0,
            author: "ann".to_owned(),
            at_ms: 7,
        }),
        Step::Compact { lane, before, keep } => {
            Command::Compact { lane: *lane, before: *before, keep: *keep }
        }
    }
}

type State = BTreeMap<&'static str, u8>;
/// Key, revision, what it became, the revision before.
type Write = (&'static str, u64, Option<u8>, u64);

/// Every state, and every change in order.
#[derive(Debug)]
struct Past {
    states: Vec<State>,
    writes: Vec<Write>,
    keep: BTreeMap<Lane, u64>,
    /// Of a key that was deleted below the floor: up to when nothing is needed any more.
    forgotten: BTreeMap<&'static str, u64>,
}

impl Past {
    fn new() -> Self {
        Self {
            states: vec![State::new()],
            writes: Vec::new(),
            keep: BTreeMap::new(),
            forgotten: BTreeMap::new(),
        }
    }

    fn write(&mut self, writes: &BTreeMap<&'static str, Option<u8>>) {
        let mut state = self.states.last().cloned().unwrap_or_default();
        let next = self.states.len() as u64;
        let mut changed = false;
        for (key, value) in writes {
            let was = match value {
                Some(value) => state.insert(key, *value),
                None => state.remove(key),
            };
            if was.is_none() && value.is_none() {
                continue;
            }
            let before = self.writes.iter().rev().find(|write| write.0 == *key);
            self.writes.push((key, next, *value, before.map_or(0, |write| write.1)));
            changed = true;
        }
        if changed {
            self.states.push(state);
        }
    }

    fn compact(&mut self, lane: Lane, keep: u64, floor: u64) {
        // What a smaller number let go does not come back with a larger one.
        let least = self.keep.get(&lane).copied().unwrap_or(u64::MAX).min(keep);
        self.keep.insert(lane, least);
        for key in KEYS.into_iter().filter(|key| Lane::of(key) == lane) {
            match self.writes.iter().rev().find(|write| write.0 == key) {
                Some((_, at, None, _)) if *at < floor => {
                    self.forgotten.insert(key, *at);
                }
                _ => {}
            }
        }
    }

    /// Versions of a key that may not be gone: those since the floor, the one in force at it, and
    /// the last ones.
    fn needed(&self, key: &str, floor: u64) -> Vec<Known> {
        let all: Vec<&Write> = self.writes.iter().filter(|write| write.0 == key).collect();
        let keep = self.keep.get(&Lane::of(key)).copied().unwrap_or(u64::MAX).max(1);
        let forgotten = self.forgotten.get(key).copied().unwrap_or(0);
        let kept = |place: &usize| {
            let newer = (all.len() - 1 - *place) as u64;
            let in_force = all.get(*place + 1).is_none_or(|next| next.1 > floor);
            all[*place].1 > forgotten && (all[*place].1 >= floor || in_force || newer < keep)
        };
        let from = (0..all.len()).find(kept).unwrap_or(all.len());
        all[from..].iter().map(|write| known(write)).collect()
    }
}

type Known = (&'static str, u64, Option<u8>);

/// Without the link to the change before, which may have been forgotten.
fn known(write: &Write) -> Known {
    (write.0, write.1, write.2)
}

/// Applies steps to the store and to the model.
fn run(steps: &[Step]) -> io::Result<(Rows, Past)> {
    let (mut rows, mut past) = (Rows::default(), Past::new());
    for (index, step) in (1u64..).zip(steps) {
        let reply = rows.apply(index, &command(step))?;
        match step {
            Step::Write(writes) => {
                past.write(writes);
                assert!(matches!(reply, Reply::Committed { .. }));
            }
            Step::Compact { lane, keep, .. } => {
                past.compact(*lane, *keep, floor(&rows, *lane)?);
            }
        }
    }
    Ok((rows, past))
}

fn page_through(rows: &Rows, prefix: &str, exact: bool, limit: usize) -> io::Result<Vec<Write>> {
    let (mut found, mut before) = (Vec::new(), u64::MAX);
    loop {
        let page = changes(rows, prefix, exact, before, limit)?;
        for written in page.changes {
            assert!(written.revision < before, "a page begins before its bound");
            assert_eq!(
                (written.version.head.author.as_str(), written.version.head.at_ms),
                ("ann", 7)
            );
            let key = KEYS.iter().find(|key| **key == written.key).expect("a known key");
            let value = written.version.value.map(|value| value[0]);
            found.push((*key, written.revision, value, written.version.head.previous_revision));
        }
        match page.next_before {
            Some(next) => {
                assert!(next < before, "no progress");
                before = next;
            }
            None => return Ok(found),
        }
    }
}

proptest! {
    #[test]
    fn every_revision_stays_what_it_was(steps in steps()) {
        let (rows, past) = run(&steps)?;
        for (at, state) in past.states.iter().enumerate() {
            for key in KEYS {
                let whole = at as u64 >= floor(&rows, Lane::of(key))?;
                match get_at(&rows, key, at as u64)? {
                    At::Was(version, _) => {
                        prop_assert_eq!(version.value, state.get(key).map(|byte| vec![*byte]));
                    }
                    At::Absent => prop_assert_eq!(None, state.get(key)),
                    At::Compacted(oldest) => {
                        prop_assert!(!whole);
                        prop_assert_eq!(oldest, floor(&rows, Lane::of(key))?);
                    }
                }
            }
            for prefix in ["", "a", "vms/", "vms/a/b/c/d/e/", "stat", "status/", "p"] {
                if (at as u64) < floor_of_prefix(&rows, prefix)? {
                    continue;
                }
                let expected: Vec<_> = state.keys().copied()
                    .filter(|key| key.starts_with(prefix) && Lane::of(key) != Lane::Private)
                    .collect();
                let (mut found, mut after) = (Vec::new(), String::new());
                loop {
                    let (page, more) = range_at(&rows, prefix, &after, 2, at as u64)?;
                    after = page.last().map_or(after, |last| last.key.clone());
                    found.extend(page.into_iter().map(|one| one.key));
                    if !more { break; }
                }
                prop_assert_eq!(found, expected);
            }
        }
    }

    #[test]
    fn history_is_what_is_kept_and_nothing_is_lost_too_early(steps in steps(), limit in 1usize..5) {
        let (rows, past) = run(&steps)?;
        for key in KEYS {
            let needed = past.needed(key, floor(&rows, Lane::of(key))?);
            let found = page_through(&rows, key, true, limit)?;
            let found: Vec<Known> = found.iter().rev().map(known).collect();
            prop_assert!(found.ends_with(&needed), "{key}: {found:?} lacks {needed:?}");
            // Nothing is invented, and there are no gaps.
            let all: Vec<Known> = past.writes.iter().filter(|w| w.0 == key).map(known).collect();
            prop_assert!(all.ends_with(&found), "{key}: {found:?} is not the end of {all:?}");
        }
        for prefix in ["", "a", "v", "vms/", "vms/a/b/", "vms/a/b/c/d/e/", "st", "status/vms/", "priv/"] {
            let mut expected = Vec::new();
            for key in KEYS {
                if key.starts_with(prefix) && Lane::of(key) != Lane::Private {
                    expected.extend(page_through(&rows, key, true, 100)?);
                }
            }
            let place = |write: &Write| {
                let order = past.writes.iter().position(|w| w.0 == write.0 && w.1 == write.1);
                std::cmp::Reverse(order)
            };
            expected.sort_by_key(place);
            prop_assert_eq!(page_through(&rows, prefix, false, limit)?, expected);
        }
    }

    #[test]
    fn a_walk_from_the_floor_sees_every_change_once_in_order(steps in steps(), limit in 1usize..6) {
        let (rows, past) = run(&steps)?;
        for folder in ["", "vms/", "vms/a/", "status/", "priv/"] {
            let lane = Lane::of(folder);
            let (mut from, mut found) = (floor(&rows, lane)?, Vec::new());
            let expected: Vec<_> = past.writes.iter()
                .filter(|w| w.1 >= from && folders(w.0).any(|one| one == folder))
                .map(|w| (w.1, w.0.to_owned())).collect();
            loop {
                let (page, rest) = journal(&rows, &[folder], Span::From(from), limit)?;
                found.extend(page.into_iter().map(|(at, key)| (at.revision, key)));
                match rest {
                    Some(next) => { prop_assert!(next > from); from = next; }
                    None => break,
                }
            }
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn after_the_sweep_only_what_is_needed_is_left(steps in steps()) {
        let steps = steps.into_iter().map(|step| match step {
            // One rule all along: a change is looked at once, by the rule of that time.
            Step::Compact { lane, before, .. } => Step::Compact { lane, before, keep: 2 },
            write => write,
        });
        // The last revision is never below the floor: a change that nobody looks at.
        let end = Step::Write(BTreeMap::from([("statue", Some(1))]));
        let steps: Vec<Step> = steps.chain([end]).collect();
        let (mut rows, past) = run(&steps)?;
        let last = revision(&rows)?;
        for lane in Lane::ALL {
            let compact = Command::Compact { lane, before: last, keep: 2 };
            while rows.apply(1000, &compact)? == Reply::None && unswept(&rows, lane)? {}
        }
        let data = rows.data()?;
        for key in KEYS {
            let versions = page_through(&rows, key, true, 100)?;
            let most = if key == "statue" { 3 } else if data.contains_key(key) { 2 } else { 0 };
            prop_assert!(versions.len() <= most, "{key}: {versions:?}");
        }
        // Each row of the Journal has its version, each version its rows.
        let journal_rows = rows.scan(Table::Journal, b"", None, usize::MAX)?.len();
        let mut expected = 0;
        for key in KEYS {
            expected += page_through(&rows, key, true, 100)?.len() * folders(key).count();
        }
        prop_assert_eq!(journal_rows, expected);
        prop_assert_eq!(data.len(), past.states.last().map_or(0, BTreeMap::len));
    }
}

#[test]
fn a_long_history_is_swept_in_steps_and_leaves_the_data() -> io::Result<()> {
    let mut rows = Rows::default();
    for index in 1..=6000u64 {
        let key = if index.is_multiple_of(2) { "status/a" } else { "vms/a.toml" };
        rows.apply(index, &command(&Step::Write(BTreeMap::from([(key, Some(1))]))))?;
    }
    let data = rows.data()?;
    let compact = Command::Compact { lane: Lane::Status, before: 5990, keep: 1 };
    let mut steps = 0;
    while floor(&rows, Lane::Status)? < 5990 || unswept(&rows, Lane::Status)? {
        let before = rows.0.len();
        rows.apply(7000 + steps, &compact)?;
        assert!(before - rows.0.len() <= 2 * 2048 + 1, "one step removed too much");
        steps += 1;
        assert!(steps < 100, "no progress");
    }
    assert!(steps > 1, "all at once");
    // The status records' churn went; people's files have all of theirs.
    assert_eq!(page_through(&rows, "status/a", true, 100)?.len(), 6);
    assert_eq!(page_through(&rows, "vms/a.toml", true, 100)?.len(), 3000);
    assert_eq!(floor(&rows, Lane::Files)?, 1);
    assert_eq!(rows.data()?, data);
    Ok(())
}
