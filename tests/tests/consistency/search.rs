//! Is a small history linearizable? By search, after Wing and Gong with Lowe's memory of what was
//! tried: it knows neither the log nor which revision belongs to whom, only a sequential store and
//! the times of calls and answers. It agrees with [`super::check`] or one of them is wrong.

use std::collections::BTreeSet;

use super::history::{Answer, Call, Operation, State};

/// Steps after which a search is given up.
const STEPS_MAX: usize = 2_000_000;

/// What the search came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Linearizable,
    Not,
    Undecided,
}

/// A store that does one thing after the other.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Store {
    revision: u64,
    state: State,
}

impl Store {
    fn holds(&self, compares: &[(String, u64)]) -> bool {
        let modified = |key: &String| self.state.get(key).map_or(0, |(_, _, modified)| *modified);
        compares.iter().all(|(key, wanted)| modified(key) == *wanted)
    }

    fn write(&mut self, writes: &[(String, Option<Vec<u8>>)]) {
        self.revision += 1;
        for (key, value) in writes {
            match value {
                Some(value) => {
                    let created = self.state.get(key).map_or(self.revision, |(_, c, _)| *c);
                    self.state.insert(key.clone(), (value.clone(), created, self.revision));
                }
                None => drop(self.state.remove(key)),
            }
        }
    }

    /// The store after the operation, if it would have given this answer.
    fn after(&self, operation: &Operation) -> Option<Self> {
        let mut next = self.clone();
        let right = match (&operation.call, &operation.answer) {
            (Call::Txn { compares, writes }, Answer::Committed { revision }) => {
                next.write(writes);
                self.holds(compares) && next.revision == *revision
            }
            (Call::Txn { compares, writes }, Answer::Unknown(_)) => {
                next.write(writes);
                self.holds(compares)
            }
            (Call::Txn { compares, .. }, Answer::Conflict { revision, .. }) => {
                !self.holds(compares) && (operation.attempts > 1 || *revision == self.revision)
            }
            (Call::Get { key }, Answer::Read { revision, found }) => {
                *revision == self.revision
                    && found.get(key) == self.state.get(key)
                    && found.keys().all(|other| other == key)
            }
            (Call::Range { .. }, Answer::Read { revision, found }) => {
                *revision == self.revision && *found == self.state
            }
            _ => false,
        };
        right.then_some(next)
    }
}

/// Looks for an order. `revision` is the store's before the first operation.
pub(crate) fn search(operations: &[Operation], revision: u64) -> Verdict {
    let counts = |operation: &&Operation| match (&operation.call, &operation.answer) {
        (Call::StaleGet { .. }, _) | (_, Answer::Refused(_)) => false,
        (Call::Get { .. } | Call::Range { .. }, answer) => matches!(answer, Answer::Read { .. }),
        (Call::Txn { .. }, _) => true,
    };
    let mut operations: Vec<&Operation> = operations.iter().filter(counts).collect();
    operations.sort_by_key(|operation| operation.called);
    let mut search = Search { operations, seen: BTreeSet::new(), steps: 0 };
    let done = vec![false; search.operations.len()];
    let found = search.go_on(done, Store { revision, state: State::new() });
    match found {
        true => Verdict::Linearizable,
        false if search.steps > STEPS_MAX => Verdict::Undecided,
        false => Verdict::Not,
    }
}

struct Search<'a> {
    operations: Vec<&'a Operation>,
    seen: BTreeSet<(Vec<bool>, Store)>,
    steps: usize,
}

impl Search<'_> {
    fn answered(&self, index: usize) -> Option<u64> {
        let operation = self.operations[index];
        operation.answered.filter(|_| !matches!(operation.answer, Answer::Unknown(_)))
    }

    fn go_on(&mut self, done: Vec<bool>, store: Store) -> bool {
        self.steps += 1;
        if self.steps > STEPS_MAX {
            return false;
        }
        let open: Vec<usize> = (0..done.len()).filter(|index| !done[*index]).collect();
        // Whatever comes next was called before the first answer among those that are left.
        let Some(first) = open.iter().filter_map(|index| self.answered(*index)).min() else {
            return true;
        };
        if !self.seen.insert((done.clone(), store.clone())) {
            return false;
        }
        for index in open {
            let operation = self.operations[index];
            if operation.called > first {
                break;
            }
            if let Some(next) = store.after(operation) {
                let mut done = done.clone();
                done[index] = true;
                if self.go_on(done, next) {
                    return true;
                }
            }
        }
        false
    }
}
