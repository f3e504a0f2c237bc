//! Reading state, and changes on top of it that later entries of a batch already see.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::ops::Bound;

/// The tables of the state machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Table {
    /// Latest values.
    Data,
    /// What changed when, by folder.
    Journal,
    /// Every version of every key that is kept.
    Versions,
    /// Outcomes of named transactions.
    Dedup,
    /// Counters, and the log position the state belongs to.
    Machine,
}

impl Table {
    /// All of them, in the order of their numbers in snapshots.
    pub(crate) const ALL: [Self; 5] =
        [Self::Data, Self::Journal, Self::Versions, Self::Dedup, Self::Machine];
}

/// A consistent view of the state.
pub(crate) trait Read {
    /// One row.
    fn get(&self, table: Table, key: &[u8]) -> io::Result<Option<Vec<u8>>>;
    /// Up to `limit` rows with `from <= key < to` (None: no end), in key order.
    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        limit: usize,
    ) -> io::Result<Vec<Row>>;
    /// Up to `limit` rows with `from <= key < to`, the last key first.
    fn scan_back(&self, table: Table, from: &[u8], to: &[u8], limit: usize)
    -> io::Result<Vec<Row>>;
}

/// Key and value.
pub(crate) type Row = (Vec<u8>, Vec<u8>);

/// What became of rows, by key; None: the row goes.
type Changed = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

/// Changes by table and key.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    tables: [Changed; Table::ALL.len()],
    /// Keys and values that were set, bytes.
    bytes: usize,
}

impl Changes {
    /// Changes one row.
    pub(crate) fn set(&mut self, table: Table, key: &[u8], value: Option<Vec<u8>>) {
        self.bytes += key.len() + value.as_ref().map_or(0, Vec::len);
        self.tables[table as usize].insert(key.to_vec(), value);
    }
    /// Keys and values that were set, also those that were set again since, bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
    /// A table's changes, by key; None: the row goes.
    pub(crate) fn of(&self, table: Table) -> &Changed {
        &self.tables[table as usize]
    }
    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Table, &[u8], Option<&[u8]>)> {
        Table::ALL.into_iter().flat_map(|table| {
            let rows = self.of(table).iter();
            rows.map(move |(key, value)| (table, key.as_slice(), value.as_deref()))
        })
    }
}

/// Rows that are kept once they were read, and the longest value of one, bytes: a batch of
/// transactions looks at the same small ones again and again.
const KEPT_ROWS: usize = 4096;
const KEPT_BYTES: usize = 4096;

/// Rows of the base, by key; None: there is none.
type Seen = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

/// State with changes on top.
#[derive(Debug)]
pub(crate) struct Overlay<'a, R> {
    base: &'a R,
    seen: RefCell<[Seen; Table::ALL.len()]>,
    changes: Changes,
}

impl<'a, R: Read> Overlay<'a, R> {
    /// No changes yet.
    pub(crate) fn new(base: &'a R) -> Self {
        Self { base, seen: RefCell::default(), changes: Changes::default() }
    }
    /// Sets a row.
    pub(crate) fn put(&mut self, table: Table, key: &[u8], value: Vec<u8>) {
        self.changes.set(table, key, Some(value));
    }
    /// Removes a row.
    pub(crate) fn delete(&mut self, table: Table, key: &[u8]) {
        self.changes.set(table, key, None);
    }
    /// How much has changed, see [`Changes::bytes`].
    pub(crate) fn changed_bytes(&self) -> usize {
        self.changes.bytes()
    }
    /// The changes, to be written as one batch.
    pub(crate) fn into_changes(self) -> Changes {
        self.changes
    }
}

impl<R: Read> Read for Overlay<'_, R> {
    fn get(&self, table: Table, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        if let Some(changed) = self.changes.of(table).get(key) {
            return Ok(changed.clone());
        }
        if let Some(row) = self.seen.borrow()[table as usize].get(key) {
            return Ok(row.clone());
        }
        let row = self.base.get(table, key)?;
        let seen = &mut self.seen.borrow_mut()[table as usize];
        if row.as_ref().map_or(0, Vec::len) <= KEPT_BYTES && seen.len() < KEPT_ROWS {
            seen.insert(key.to_vec(), row.clone());
        }
        Ok(row)
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        limit: usize,
    ) -> io::Result<Vec<Row>> {
        let changed = self.changed(table, from, to);
        // Each removed row can hide one of the base.
        let base = self.base.scan(table, from, to, limit.saturating_add(removed(&changed)))?;
        Ok(merge(base, changed).into_iter().take(limit).collect())
    }

    fn scan_back(
        &self,
        table: Table,
        from: &[u8],
        to: &[u8],
        limit: usize,
    ) -> io::Result<Vec<Row>> {
        let changed = self.changed(table, from, Some(to));
        let base = self.base.scan_back(table, from, to, limit.saturating_add(removed(&changed)))?;
        Ok(merge(base, changed).into_iter().rev().take(limit).collect())
    }
}

/// Changed rows of one range, in key order.
type Part<'a> = Vec<(&'a Vec<u8>, &'a Option<Vec<u8>>)>;

impl<R> Overlay<'_, R> {
    fn changed(&self, table: Table, from: &[u8], to: Option<&[u8]>) -> Part<'_> {
        if to.is_some_and(|to| to < from) {
            return Part::new();
        }
        let bounds = (Bound::Included(from), to.map_or(Bound::Unbounded, Bound::Excluded));
        self.changes.of(table).range::<[u8], _>(bounds).collect()
    }
}

fn removed(changed: &Part<'_>) -> usize {
    changed.iter().filter(|(_, value)| value.is_none()).count()
}

fn merge(base: Vec<Row>, changed: Part<'_>) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut rows: BTreeMap<Vec<u8>, Vec<u8>> = base.into_iter().collect();
    for (key, value) in changed {
        match value {
            Some(value) => rows.insert(key.clone(), value.clone()),
            None => rows.remove(key),
        };
    }
    rows
}
