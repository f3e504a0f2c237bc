//! Changes that are written together.

use std::io;

use rocksdb::{DB, WriteBatch};

use super::db::next;
use super::families::{Cf, handle, table_handle};
use crate::machine::Table;

/// Changes of the log's database.
pub(crate) struct LogBatch<'a> {
    pub(super) rocks: &'a DB,
    pub(super) batch: WriteBatch,
}

impl LogBatch<'_> {
    /// Sets a row.
    pub(crate) fn put(&mut self, cf: Cf, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.batch.put_cf(handle(self.rocks, cf)?, key, value);
        Ok(())
    }
    /// Removes rows, `from <= key < to`.
    pub(crate) fn delete_range(&mut self, cf: Cf, from: &[u8], to: &[u8]) -> io::Result<()> {
        self.batch.delete_range_cf(handle(self.rocks, cf)?, from, to);
        Ok(())
    }
}

/// Changes of the state.
pub(crate) struct Batch<'a> {
    pub(super) rocks: &'a DB,
    pub(super) batch: WriteBatch,
    pub(super) state: u32,
}

impl Batch<'_> {
    /// Sets a row of a table (None: removes it) in the current state.
    pub(crate) fn set(&mut self, table: Table, key: &[u8], value: Option<&[u8]>) -> io::Result<()> {
        let cf = table_handle(self.rocks, table)?;
        let key = [self.state.to_be_bytes().as_slice(), key].concat();
        match value {
            Some(value) => self.batch.put_cf(cf, key, value),
            None => self.batch.delete_cf(cf, key),
        }
        Ok(())
    }
    /// Sets a row in the state after the current one, which nobody reads yet.
    pub(crate) fn set_in_next(&mut self, table: Table, key: &[u8], value: &[u8]) -> io::Result<()> {
        let key = [next(self.state)?.to_be_bytes().as_slice(), key].concat();
        self.batch.put_cf(table_handle(self.rocks, table)?, key, value);
        Ok(())
    }
    /// Makes the next state the current one; `set` goes there from here on.
    pub(crate) fn switch_to_next(&mut self) -> io::Result<()> {
        self.state = next(self.state)?;
        self.batch.put(b"state", self.state.to_be_bytes());
        Ok(())
    }
    /// Removes all rows of states that are not current.
    pub(super) fn drop_other_states(&mut self) -> io::Result<()> {
        let (current, after) = (self.state.to_be_bytes(), next(self.state)?.to_be_bytes());
        for table in Table::ALL {
            let cf = table_handle(self.rocks, table)?;
            self.batch.delete_range_cf(cf, [0; 4].as_slice(), &current);
            self.batch.delete_range_cf(cf, after.as_slice(), &[0xff; 5]);
        }
        Ok(())
    }
}
