//! Reading: the state from one consistent view, and the log as it is now.

use std::io;

use rocksdb::{DB, Direction, IteratorMode, ReadOptions, SnapshotWithThreadMode};

use super::db::{io_error, next, state_number};
use super::families::{Cf, handle, table_handle};
use crate::machine::{self, Read, Table};

/// A row of the log's database: key and value.
type RawRow = (Box<[u8]>, Box<[u8]>);
/// A row of a table: key and value.
type Row = (Vec<u8>, Box<[u8]>);

/// The log's database, as it is at each call.
pub(crate) struct LogView<'a>(pub(super) &'a DB);

impl LogView<'_> {
    /// A row.
    pub(crate) fn get(&self, cf: Cf, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.0.get_cf(handle(self.0, cf)?, key).map_err(io_error)
    }

    /// Rows from a key on.
    pub(crate) fn rows_from(
        &self,
        cf: Cf,
        from: &[u8],
    ) -> io::Result<impl Iterator<Item = io::Result<RawRow>>> {
        let rows =
            self.0.iterator_cf(handle(self.0, cf)?, IteratorMode::From(from, Direction::Forward));
        Ok(rows.map(|row| row.map_err(io_error)))
    }

    /// The last row.
    pub(crate) fn last(&self, cf: Cf) -> io::Result<Option<RawRow>> {
        let mut rows = self.0.iterator_cf(handle(self.0, cf)?, IteratorMode::End);
        rows.next().transpose().map_err(io_error)
    }
}

/// A consistent view of the state.
pub(crate) struct View<'a> {
    rocks: &'a DB,
    snapshot: SnapshotWithThreadMode<'a, DB>,
    state: u32,
}

impl<'a> View<'a> {
    /// Of a database that nobody writes to.
    pub(super) fn of(rocks: &'a DB) -> io::Result<Self> {
        let state = state_number(rocks.get(b"state").map_err(io_error)?)?;
        Ok(Self::at(rocks, state))
    }

    pub(super) fn at(rocks: &'a DB, state: u32) -> Self {
        Self { rocks, snapshot: rocks.snapshot(), state }
    }

    /// Rows of a table from a key on, without their number.
    pub(crate) fn rows(
        &self,
        table: Table,
        from: &[u8],
    ) -> io::Result<impl Iterator<Item = io::Result<Row>>> {
        self.rows_with(table, from, None, ReadOptions::default())
    }

    /// The same, past the cache: reading everything once does not push out
    /// what is read often.
    pub(crate) fn all_rows(
        &self,
        table: Table,
        from: &[u8],
    ) -> io::Result<impl Iterator<Item = io::Result<Row>>> {
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        self.rows_with(table, from, None, options)
    }

    fn rows_with(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        mut options: ReadOptions,
    ) -> io::Result<impl Iterator<Item = io::Result<Row>>> {
        let state = self.state.to_be_bytes();
        let start = [state.as_slice(), from].concat();
        // The database itself looks no further: there may be many removed rows on the way.
        options.set_iterate_upper_bound(match to {
            Some(to) => [state.as_slice(), to].concat(),
            None => next(self.state)?.to_be_bytes().to_vec(),
        });
        let rows = self.snapshot.iterator_cf_opt(
            table_handle(self.rocks, table)?,
            options,
            IteratorMode::From(&start, Direction::Forward),
        );
        Ok(rows.map(|row| {
            let (key, value) = row.map_err(io_error)?;
            Ok((key.get(4..).unwrap_or_default().to_vec(), value))
        }))
    }
}

impl Read for View<'_> {
    fn get(&self, table: Table, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let key = [self.state.to_be_bytes().as_slice(), key].concat();
        self.snapshot.get_cf(table_handle(self.rocks, table)?, key).map_err(io_error)
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        limit: usize,
    ) -> io::Result<Vec<machine::Row>> {
        let mut found = Vec::new();
        for row in self.rows_with(table, from, to, ReadOptions::default())?.take(limit) {
            let (key, value) = row?;
            found.push((key, value.into_vec()));
        }
        Ok(found)
    }

    fn scan_back(
        &self,
        table: Table,
        from: &[u8],
        to: &[u8],
        limit: usize,
    ) -> io::Result<Vec<machine::Row>> {
        let state = self.state.to_be_bytes();
        let bound = |key: &[u8]| [state.as_slice(), key].concat();
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(bound(from));
        options.set_iterate_upper_bound(bound(to));
        let handle = table_handle(self.rocks, table)?;
        let rows = self.snapshot.iterator_cf_opt(handle, options, IteratorMode::End);
        rows.take(limit)
            .map(|row| {
                let (key, value) = row.map_err(io_error)?;
                Ok((key.get(4..).unwrap_or_default().to_vec(), value.into_vec()))
            })
            .collect()
    }
}
