//! Against a model: random transactions on plain maps and on the state machine.

use std::collections::BTreeMap;
use std::io;

use proptest::prelude::*;

use super::command::KeyWrite;
use super::{
    At, Changes, Command, Judged, Lane, Overlay, Read, Record, Reply, Row, Table, TxnCommand,
    apply, decode, get_at, revision,
};

/// Created, modified, value, by key.
pub(super) type Data = BTreeMap<String, (u64, u64, Vec<u8>)>;

/// Rows in memory.
#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Rows(pub(super) BTreeMap<(Table, Vec<u8>), Vec<u8>>);

impl Read for Rows {
    fn get(&self, table: Table, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        Ok(self.0.get(&(table, key.to_vec())).cloned())
    }
    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        limit: usize,
    ) -> io::Result<Vec<Row>> {
        let rows = self.0.range((table, from.to_vec())..);
        let inside =
            rows.take_while(|((t, key), _)| *t == table && to.is_none_or(|to| key.as_slice() < to));
        Ok(inside.take(limit).map(|((_, key), value)| (key.clone(), value.clone())).collect())
    }
    fn scan_back(
        &self,
        table: Table,
        from: &[u8],
        to: &[u8],
        limit: usize,
    ) -> io::Result<Vec<Row>> {
        let rows = self.0.range((table, from.to_vec())..(table, to.to_vec())).rev();
        Ok(rows.take(limit).map(|((_, key), value)| (key.clone(), value.clone())).collect())
    }
}

impl Rows {
    pub(super) fn apply(&mut self, index: u64, command: &Command) -> io::Result<Reply> {
        let mut state = Overlay::new(self);
        let reply = apply(&mut state, index, command)?;
        let changes = state.into_changes();
        self.take(&changes);
        Ok(reply)
    }

    /// Several as one batch.
    fn apply_together(&mut self, first: u64, commands: &[Command]) -> io::Result<Vec<Reply>> {
        let mut state = Overlay::new(self);
        let numbered = (first..).zip(commands);
        let replies = numbered.map(|(index, command)| apply(&mut state, index, command)).collect();
        let changes = state.into_changes();
        self.take(&changes);
        replies
    }

    pub(super) fn take(&mut self, changes: &Changes) {
        for (table, key, value) in changes.iter() {
            match value {
                Some(value) => self.0.insert((table, key.to_vec()), value.to_vec()),
                None => self.0.remove(&(table, key.to_vec())),
            };
        }
    }

    pub(super) fn data(&self) -> io::Result<Data> {
        let rows = self.scan(Table::Data, b"", None, usize::MAX)?;
        rows.into_iter()
            .map(|(key, value)| {
                let record: Record = decode(&value)?;
                let key = String::from_utf8_lossy(&key).into_owned();
                Ok((key, (record.create_revision, record.mod_revision, record.value)))
            })
            .collect()
    }
}

/// What the store should be.
#[derive(Debug, Default)]
struct Model {
    revision: u64,
    data: Data,
    answers: BTreeMap<(String, u64), Option<u64>>,
}

impl Model {
    fn apply(&mut self, txn: &TxnCommand) -> Option<u64> {
        let name = (txn.client.clone(), txn.sequence);
        if let Some(answer) = self.answers.get(&name) {
            return *answer;
        }
        let held = txn.compares.iter().all(|(key, wanted)| {
            self.data.get(key).map_or(0, |(_, modified, _)| *modified) == *wanted
        });
        let answer = held.then(|| self.write(txn));
        if !txn.client.is_empty() {
            self.answers.insert(name, answer);
        }
        answer
    }

    fn write(&mut self, txn: &TxnCommand) -> u64 {
        let next = self.revision + 1;
        for KeyWrite { key, value } in &txn.writes {
            match value {
                Some(value) => {
                    let created = self.data.get(key).map_or(next, |(created, _, _)| *created);
                    self.data.insert(key.clone(), (created, next, value.clone()));
                    self.revision = next;
                }
                None if self.data.remove(key).is_some() => self.revision = next,
                None => {}
            }
        }
        self.revision
    }
}

fn key() -> impl Strategy<Value = String> {
    prop_oneof!["a", "a/b", "b", "\u{e9}"].prop_map(|key| key.to_owned())
}

fn txns() -> impl Strategy<Value = Vec<TxnCommand>> {
    let writes = prop::collection::btree_map(
        key(),
        prop::option::of(prop::collection::vec(any::<u8>(), 0..4)),
        0..4,
    );
    let compares = prop::collection::vec((key(), 0u64..12), 0..2);
    let named = prop_oneof![Just((String::new(), 0)), ("[cd]", 1u64..6)];
    let txn = (compares, writes, named).prop_map(|(compares, writes, (client, sequence))| {
        let (author, at_ms) = (String::new(), 0);
        TxnCommand {
            compares,
            writes: writes.into_iter().map(|(key, value)| KeyWrite { key, value }).collect(),
            client,
            sequence,
            author,
            at_ms,
        }
    });
    prop::collection::vec(txn, 0..60)
}

proptest! {
    #[test]
    fn the_store_is_the_model(txns in txns()) {
        let (mut rows, mut model) = (Rows::default(), Model::default());
        for (index, txn) in (1u64..).zip(&txns) {
            let before = revision(&rows)?;
            let reply = rows.apply(index, &Command::Txn(txn.clone()))?;
            let expected = model.apply(txn);
            match reply {
                Reply::Committed { revision } => prop_assert_eq!(Some(revision), expected),
                Reply::Conflict { .. } => prop_assert_eq!(None, expected),
                other => prop_assert!(false, "{:?}", other),
            }
            prop_assert!(revision(&rows)? - before <= 1);
            prop_assert_eq!(revision(&rows)?, model.revision);
            prop_assert_eq!(&rows.data()?, &model.data);
        }
    }
}

/// Lengths of values about where they are stored otherwise.
fn length() -> impl Strategy<Value = usize> {
    prop_oneof![Just(0), Just(3), Just(1024), Just(1025)]
}

fn commands() -> impl Strategy<Value = Vec<Command>> {
    let lengths = prop::collection::vec(length(), 4);
    let compaction = prop::option::weighted(0.2, (0u64..40, 1u64..4));
    let one = (txns(), lengths, compaction).prop_map(|(txns, lengths, compaction)| {
        let mut commands: Vec<Command> = Vec::new();
        for (mut txn, fill) in txns.into_iter().take(8).zip(0u8..) {
            for (write, length) in txn.writes.iter_mut().zip(&lengths) {
                write.value = write.value.as_ref().map(|_| vec![fill; *length]);
            }
            commands.push(Command::Txn(txn));
        }
        let (lane, compaction) = (Lane::Files, compaction.into_iter());
        commands.extend(compaction.map(|(before, keep)| Command::Compact { lane, before, keep }));
        commands
    });
    prop::collection::vec(one, 0..8).prop_map(|parts| parts.concat())
}

proptest! {
    /// Members apply the same log in other batches.
    #[test]
    fn batches_make_no_difference(
        commands in commands(), cuts in prop::collection::vec(1usize..9, 64),
    ) {
        let (mut alone, mut batched, mut replies) = (Rows::default(), Rows::default(), Vec::new());
        let (mut was, mut oldest) = (Vec::new(), 0);
        for (index, command) in (1u64..).zip(&commands) {
            replies.push(alone.apply(index, command)?);
            was.push((revision(&alone)?, alone.data()?));
            if let Command::Compact { before, .. } = command {
                oldest = oldest.max(*before);
            }
        }
        let (mut rest, mut first, mut together) = (commands.as_slice(), 1, Vec::new());
        for cut in cuts.iter().cycle() {
            let (batch, after) = rest.split_at(rest.len().min(*cut));
            together.extend(batched.apply_together(first, batch)?);
            first += batch.len() as u64;
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(together, replies);
        prop_assert_eq!(&batched, &alone);
        // And what was can be read.
        for (revision, data) in was.into_iter().filter(|(revision, _)| *revision >= oldest.max(1)) {
            for key in ["a", "a/b", "b", "\u{e9}"] {
                match (get_at(&alone, key, revision)?, data.get(key)) {
                    (At::Was(version, at), Some((created, modified, value))) => {
                        prop_assert_eq!(version.value.as_ref(), Some(value));
                        prop_assert_eq!((version.head.create_revision, at), (*created, *modified));
                    }
                    (At::Absent, None) => {}
                    (found, wanted) => prop_assert!(false, "{:?} instead of {:?}", found, wanted),
                }
            }
        }
    }
}

fn put(client: &str, sequence: u64) -> Command {
    Command::Txn(named(client, sequence))
}

fn named(client: &str, sequence: u64) -> TxnCommand {
    let value = Some(sequence.to_le_bytes().to_vec());
    let writes = vec![KeyWrite { key: "k".to_owned(), value }];
    let (client, author) = (client.to_owned(), "ann".to_owned());
    TxnCommand { compares: Vec::new(), writes, client, sequence, author, at_ms: 0 }
}

#[test]
fn what_was_let_through_by_something_older_is_not_done_and_not_remembered() -> io::Result<()> {
    let mut rows = Rows::default();
    let judged = |revision| {
        let rests_on = vec![("status/roles".to_owned(), revision)];
        Command::Judged(Judged { txn: named("ann", 1), rests_on })
    };
    let roles = || {
        let write = KeyWrite { key: "status/roles".to_owned(), value: Some(b"x".to_vec()) };
        Command::Txn(TxnCommand { writes: vec![write], ..named("", 0) })
    };
    assert_eq!(rows.apply(1, &roles())?, Reply::Committed { revision: 1 });
    for (index, old) in [(2, 0), (3, 7)] {
        assert_eq!(rows.apply(index, &judged(old))?, Reply::Overtaken);
        assert_eq!(revision(&rows)?, 1);
    }
    // Judged anew, under the same name.
    assert_eq!(rows.apply(4, &judged(1))?, Reply::Committed { revision: 2 });
    // A repetition is answered, whatever has changed since.
    assert_eq!(rows.apply(5, &roles())?, Reply::Committed { revision: 3 });
    assert_eq!(rows.apply(6, &judged(1))?, Reply::Committed { revision: 2 });
    Ok(())
}

#[test]
fn forgotten_answers_are_refused_and_never_applied_again() -> io::Result<()> {
    let mut rows = Rows::default();
    for sequence in 1..=1100 {
        assert!(matches!(rows.apply(sequence, &put("c", sequence))?, Reply::Committed { .. }));
    }
    let before = rows.clone();
    assert_eq!(rows.apply(2000, &put("c", 1))?, Reply::Forgotten);
    assert_eq!(rows, before);
    assert_eq!(rows.apply(2001, &put("c", 1100))?, Reply::Committed { revision: 1100 });
    Ok(())
}

#[test]
fn the_dedup_table_is_bounded() -> io::Result<()> {
    let mut rows = Rows::default();
    for index in 1..=5000u64 {
        rows.apply(index, &put(&format!("client-{index}"), 1))?;
    }
    let kept = rows.scan(Table::Dedup, b"", None, usize::MAX)?.len();
    assert!(kept <= 3 * 4096, "{kept} rows");
    // The latest are still known.
    assert_eq!(rows.apply(6000, &put("client-5000", 1))?, Reply::Committed { revision: 5000 });
    Ok(())
}
