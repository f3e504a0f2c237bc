//! Reading state, and changes on top of it that later entries of a batch already see.

use std::collections::BTreeMap;
use std::io;

/// The tables of the state machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Table {
    /// Latest values.
    Data,
    /// Changes by revision.
    History,
    /// Outcomes of named transactions.
    Dedup,
    /// Counters, and the log position the state belongs to.
    Machine,
}

impl Table {
    /// All of them, in the order of their numbers in snapshots.
    pub(crate) const ALL: [Self; 4] = [Self::Data, Self::History, Self::Dedup, Self::Machine];
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
    ) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>>;
}

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
    ) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let changed: Vec<_> = self
            .changes
            .range((table, from.to_vec())..)
            .take_while(|((t, key), _)| *t == table && to.is_none_or(|to| key.as_slice() < to))
            .collect();
        let removed = changed.iter().filter(|(_, value)| value.is_none()).count();
        // Each removed row can hide one of the base.
        let base = self.base.scan(table, from, to, limit.saturating_add(removed))?;
        let mut rows: BTreeMap<Vec<u8>, Vec<u8>> = base.into_iter().collect();
        for ((_, key), value) in changed {
            match value {
                Some(value) => rows.insert(key.clone(), value.clone()),
                None => rows.remove(key),
            };
        }
        Ok(rows.into_iter().take(limit).collect())
    }
}
