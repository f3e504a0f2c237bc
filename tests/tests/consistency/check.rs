//! Is a recorded history linearizable? By replaying it: each transaction that changed something has
//! a revision of its own, so the order is known and only has to be verified.
//!
//! - Every change in the log is one transaction's, whose compares held just before it, and which was
//!   called before anyone saw the change. No transaction is there twice; an acknowledged one is
//!   there at the revision it was told; a refused one is not.
//! - An answer's revision is at least that of every answer given before its call (a write's is
//!   greater), and the change at that revision was called before the answer.
//! - What a read or a conflict shows is the state at its revision.
//! - Stale reads are states as well, and never go back on one member.
//! - A watch sees the log from its beginning, whatever happens to its member.

use std::collections::BTreeMap;

use super::history::{Answer, Call, Change, Operation, Record, State};

/// What is wrong, in words.
pub(crate) type Anomaly = String;

/// All that is wrong with a record.
pub(crate) fn anomalies(record: &Record) -> Vec<Anomaly> {
    let mut found = record.trouble.clone();
    if record.log.is_empty() {
        // It could not be read, and that is among the trouble.
        found.push("there is no log".to_owned());
        return found;
    }
    let replay = Replay::new(record);
    let authors = replay.authors(&mut found);
    for (index, operation) in record.operations.iter().enumerate() {
        replay.answer(index, operation, &mut found);
    }
    replay.real_time(&authors, &mut found);
    replay.stale_reads(&mut found);
    replay.copies(&mut found);
    found
}

struct Replay<'a> {
    record: &'a Record,
    /// The state after each revision of the log.
    states: BTreeMap<u64, State>,
    nothing: State,
}

/// The operation behind each change, by revision.
type Authors = BTreeMap<u64, usize>;

fn apply(state: &mut State, change: &Change) {
    for key in &change.deletes {
        state.remove(key);
    }
    state.extend(change.puts.clone());
}

impl<'a> Replay<'a> {
    fn new(record: &'a Record) -> Self {
        let mut state = State::new();
        let states = record.log.iter().map(|(revision, change)| {
            apply(&mut state, change);
            (*revision, state.clone())
        });
        Self { record, states: states.collect(), nothing: State::new() }
    }

    fn at(&self, revision: u64) -> &State {
        self.states.range(..=revision).next_back().map_or(&self.nothing, |(_, state)| state)
    }

    /// Finds the transaction of each change.
    fn authors(&self, found: &mut Vec<Anomaly>) -> Authors {
        let mut by_value: BTreeMap<&[u8], usize> = BTreeMap::new();
        for (index, operation) in self.record.operations.iter().enumerate() {
            for value in written(operation) {
                by_value.insert(value, index);
            }
        }
        let mut authors = Authors::new();
        let mut revision_of: BTreeMap<usize, u64> = BTreeMap::new();
        for (revision, change) in &self.record.log {
            if !change.puts.keys().any(|key| key.starts_with("k/")) {
                continue;
            }
            let value = change.puts.values().next().map(|(value, _, _)| value.as_slice());
            let Some(author) = value.and_then(|value| by_value.get(value)) else {
                found.push(format!("revision {revision}: nobody asked for {change:?}"));
                continue;
            };
            if let Some(first) = revision_of.insert(*author, *revision) {
                found.push(format!(
                    "applied twice, at {first} and {revision}: {}",
                    self.op(*author)
                ));
            }
            authors.insert(*revision, *author);
            self.effect(*revision, change, *author, found);
        }
        self.acknowledged(&revision_of, found);
        authors
    }

    fn op(&self, index: usize) -> String {
        format!("#{index} {:?}", self.record.operations[index])
    }

    /// The change is what the transaction does to the state before it.
    fn effect(&self, revision: u64, change: &Change, author: usize, found: &mut Vec<Anomaly>) {
        let before = self.at(revision - 1);
        let Call::Txn { compares, writes } = &self.record.operations[author].call else { return };
        if !hold(before, compares) {
            found.push(format!("revision {revision}: a compare did not hold: {}", self.op(author)));
        }
        let mut expected = Change::default();
        for (key, value) in writes {
            let created = before.get(key).map(|(_, created, _)| *created);
            match value {
                Some(value) => {
                    let seen = (value.clone(), created.unwrap_or(revision), revision);
                    expected.puts.insert(key.clone(), seen);
                }
                None if created.is_some() => expected.deletes.push(key.clone()),
                None => {}
            }
        }
        if expected != *change {
            found.push(format!("revision {revision} is {change:?}, not {expected:?}"));
        }
    }

    /// What was acknowledged is there, where it was said to be; what was refused is not.
    fn acknowledged(&self, revision_of: &BTreeMap<usize, u64>, found: &mut Vec<Anomaly>) {
        for (index, operation) in self.record.operations.iter().enumerate() {
            if !matches!(operation.call, Call::Txn { .. }) {
                continue;
            }
            let there = revision_of.get(&index).copied();
            let wrong = match &operation.answer {
                Answer::Committed { revision } => there != Some(*revision),
                Answer::Conflict { .. } | Answer::Refused(_) => there.is_some(),
                Answer::Contradiction(_) => true,
                Answer::Read { .. } | Answer::Unknown(_) => false,
            };
            if wrong {
                found.push(format!("in the log at {there:?}: {}", self.op(index)));
            }
        }
    }

    /// What an answer shows is the state at its revision.
    fn answer(&self, index: usize, operation: &Operation, found: &mut Vec<Anomaly>) {
        let right = match (&operation.answer, &operation.call) {
            (Answer::Read { revision, found }, Call::Get { key } | Call::StaleGet { key, .. }) => {
                *found == selected(self.at(*revision), |name| name == key)
            }
            (Answer::Read { revision, found }, Call::Range { prefix }) => {
                *found == selected(self.at(*revision), |name| name.starts_with(prefix))
            }
            (Answer::Conflict { revision, conflicts }, Call::Txn { compares, .. }) => {
                let state = self.at(*revision);
                // A repetition is answered as the first attempt was, with what is there by now.
                let shown = conflicts.iter().all(|(key, seen)| state.get(key) == Some(seen));
                shown && (operation.attempts > 1 || !hold(state, compares))
            }
            _ => true,
        };
        if !right {
            found.push(format!("not the state at its revision: {}", self.op(index)));
        }
    }

    /// No answer is older than one given before its call, nor newer than its own time.
    fn real_time(&self, authors: &Authors, found: &mut Vec<Anomaly>) {
        let mut moments: Vec<(u64, bool, usize)> = Vec::new();
        for (index, operation) in self.record.operations.iter().enumerate() {
            moments.push((operation.called, false, index));
            if let Some(answered) = operation.answered {
                moments.push((answered, true, index));
            }
        }
        moments.sort_unstable();
        let revision_of: BTreeMap<usize, u64> = authors.iter().map(|(r, i)| (*i, *r)).collect();
        let count = self.record.operations.len();
        // The newest revision that anyone was told, and by which answer.
        let (mut newest, mut asked, mut floor) = ((0, 0), vec![false; count], vec![(0, 0); count]);
        for (_, is_answer, index) in moments {
            let operation = &self.record.operations[index];
            if !is_answer {
                (asked[index], floor[index]) = (true, newest);
                // Applies to transactions that were never answered, too.
                if revision_of.get(&index).is_some_and(|revision| *revision <= newest.0) {
                    found.push(format!("applied before it was asked for: {}", self.op(index)));
                }
                continue;
            }
            let Some(revision) = fresh_revision(operation) else { continue };
            if revision < floor[index].0 {
                let (known, by) = floor[index];
                let (old, new) = (self.op(index), self.op(by));
                found.push(format!("older than {known}, known before: {old}, after {new}"));
            }
            let last = authors.range(..=revision).next_back();
            if last.is_some_and(|(_, author)| !asked[*author]) {
                found.push(format!("shows what nobody had asked for: {}", self.op(index)));
            }
            newest = newest.max((revision, index));
        }
    }

    /// On one member even stale reads never go back.
    fn stale_reads(&self, found: &mut Vec<Anomaly>) {
        let mut stale: Vec<(&Operation, usize, u64)> = Vec::new();
        for operation in &self.record.operations {
            if let (Call::StaleGet { node, .. }, Answer::Read { revision, .. }) =
                (&operation.call, &operation.answer)
            {
                stale.push((operation, *node, *revision));
            }
        }
        for (later, node, revision) in &stale {
            let before = stale.iter().filter(|(earlier, other, _)| {
                other == node && earlier.answered.is_some_and(|answered| answered < later.called)
            });
            if let Some(newer) = before.map(|(_, _, r)| *r).max().filter(|r| r > revision) {
                found.push(format!("node {node} went back from {newer}: {later:?}"));
            }
        }
    }

    /// Every member holds the same in the end, and every watch saw the log.
    fn copies(&self, found: &mut Vec<Anomaly>) {
        for (node, (revision, state)) in self.record.last.iter().enumerate() {
            if state != self.at(*revision) {
                found.push(format!("node {node} holds at {revision} what the log does not say"));
            }
        }
        for (node, watched) in self.record.watched.iter().enumerate() {
            let log = self.record.log.iter().take(watched.len());
            let same =
                log.zip(watched).all(|((r, c), (revision, change))| r == revision && c == change);
            if !same || watched.len() != self.record.log.len() {
                found.push(format!("the watch on node {node} did not see the log as it is"));
            }
        }
    }
}

/// The values that a transaction writes.
fn written(operation: &Operation) -> impl Iterator<Item = &[u8]> {
    let writes = match &operation.call {
        Call::Txn { writes, .. } => writes.as_slice(),
        Call::Get { .. } | Call::Range { .. } | Call::StaleGet { .. } => &[],
    };
    writes.iter().filter_map(|(_, value)| value.as_deref())
}

fn hold(state: &State, compares: &[(String, u64)]) -> bool {
    let modified = |key: &String| state.get(key).map_or(0, |(_, _, modified)| *modified);
    compares.iter().all(|(key, wanted)| modified(key) == *wanted)
}

fn selected(state: &State, wanted: impl Fn(&String) -> bool) -> State {
    state.iter().filter(|(key, _)| wanted(key)).map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// The revision that an answer stands for in the real-time order; stale reads have none.
fn fresh_revision(operation: &Operation) -> Option<u64> {
    if matches!(operation.call, Call::StaleGet { .. }) {
        return None;
    }
    match &operation.answer {
        Answer::Committed { revision }
        | Answer::Conflict { revision, .. }
        | Answer::Read { revision, .. } => Some(*revision),
        Answer::Refused(_) | Answer::Unknown(_) | Answer::Contradiction(_) => None,
    }
}
