//! Reading state, and changes on top of it that later entries of a batch already see.

use std::collections::BTreeMap;
use std::io;

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

/// Changes by table and key; None: the row goes.
pub(crate) type Changes = BTreeMap<(Table, Vec<u8>), Option<Vec<u8>>>;

/// State with changes on top.
#[derive(Debug)]
pub(crate) struct Overlay<'a, R> {
    base: &'a R,
    changes: Changes,
}

impl<'a, R: Read> Overlay<'a, R> {
    /// No changes yet.
    pub(crate) fn new(base: &'a R) -> Self {
        Self { base, changes: Changes::new() }
    }
    /// Sets a row.
    pub(crate) fn put(&mut self, table: Table, key: &[u8], value: Vec<u8>) {
        self.changes.insert((table, key.to_vec()), Some(value));
    }
    /// Removes a row.
    pub(crate) fn delete(&mut self, table: Table, key: &[u8]) {
        self.changes.insert((table, key.to_vec()), None);
    }
    /// The changes, to be written as one batch.
    pub(crate) fn into_changes(self) -> Changes {
        self.changes
    }
}

impl<R: Read> Read for Overlay<'_, R> {
    fn get(&self, table: Table, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        match self.changes.get(&(table, key.to_vec())) {
            Some(changed) => Ok(changed.clone()),
            None => self.base.get(table, key),
        }
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
type Changed<'a> = Vec<(&'a Vec<u8>, &'a Option<Vec<u8>>)>;

impl<R> Overlay<'_, R> {
    fn changed(&self, table: Table, from: &[u8], to: Option<&[u8]>) -> Changed<'_> {
        self.changes
            .range((table, from.to_vec())..)
            .take_while(|((t, key), _)| *t == table && to.is_none_or(|to| key.as_slice() < to))
            .map(|((_, key), value)| (key, value))
            .collect()
    }
}

fn removed(changed: &Changed<'_>) -> usize {
    changed.iter().filter(|(_, value)| value.is_none()).count()
}

fn merge(base: Vec<Row>, changed: Changed<'_>) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut rows: BTreeMap<Vec<u8>, Vec<u8>> = base.into_iter().collect();
    for (key, value) in changed {
        match value {
            Some(value) => rows.insert(key.clone(), value.clone()),
            None => rows.remove(key),
        };
    }
    rows
}
