//! The two databases' column families and how RocksDB keeps them.

use std::io;

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, IteratorMode, Options,
    ReadOptions,
};

use super::db::io_error;
use crate::machine::Table;

/// What the log's database holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cf {
    /// Raft log entries by index (8 bytes BE).
    Log,
    /// Raft's own small state: vote, committed, purged.
    Vote,
    /// Format, boot.
    Local,
}

impl Cf {
    const ALL: [Self; 3] = [Self::Local, Self::Log, Self::Vote];

    fn name(self) -> &'static str {
        match self {
            Self::Local => "default",
            Self::Log => "log",
            Self::Vote => "vote",
        }
    }
}

/// The state's database has a family per table; in the default one is the number of the current state.
fn table_name(table: Table) -> &'static str {
    match table {
        Table::Data => "data",
        Table::Journal => "journal",
        Table::Versions => "versions",
        Table::Dedup => "dedup",
        Table::Machine => "machine",
    }
}

/// Of what is read from the state's files, so much stays in memory.
const STATE_CACHE_BYTES: usize = 32 << 20;
/// The log's end, which is read all the time, is in memory anyway.
const LOG_CACHE_BYTES: usize = 1 << 20;
/// A table is written out by [`super::Db::flush`], which the log goes before, and never by RocksDB
/// because this is full: more than comes together between two flushes, overhead included.
const STATE_BUFFER_BYTES: usize = 128 << 20;
/// The filter for what is in memory, of [`STATE_BUFFER_BYTES`]: ten bits each for the keys that come
/// together between two flushes, about 100,000.
const MEMORY_FILTER: f64 = 0.001;
/// The log's: twice what is between two snapshots by default.
const LOG_BUFFER_BYTES: usize = 32 << 20;

pub(super) fn handle(rocks: &DB, cf: Cf) -> io::Result<&ColumnFamily> {
    by_name(rocks, cf.name())
}

pub(super) fn table_handle(rocks: &DB, table: Table) -> io::Result<&ColumnFamily> {
    by_name(rocks, table_name(table))
}

fn by_name<'a>(rocks: &'a DB, name: &str) -> io::Result<&'a ColumnFamily> {
    let missing = || io::Error::other(format!("column family {name} is missing"));
    rocks.cf_handle(name).ok_or_else(missing)
}

fn db_options(new: bool) -> Options {
    let mut options = Options::default();
    options.create_if_missing(new);
    options.create_missing_column_families(new);
    options.set_keep_log_file_num(4);
    options.set_max_log_file_size(4 << 20);
    options
}

/// The log's database: its write-ahead log is what is synced.
pub(super) fn log_options(new: bool) -> Options {
    let mut options = db_options(new);
    options.set_max_total_wal_size(64 << 20);
    options
}

/// The state's database, which is written without a write-ahead log.
pub(super) fn state_options(new: bool) -> Options {
    let mut options = db_options(new);
    // All families reach their files together, so that no file is ahead of another after a crash.
    options.set_atomic_flush(true);
    options
}

/// The log's families.
pub(super) fn log_families() -> Vec<ColumnFamilyDescriptor> {
    let cache = Cache::new_lru_cache(LOG_CACHE_BYTES);
    let family = |cf: Cf| {
        let mut options = family_options(&blocks(&cache));
        options.set_write_buffer_size(LOG_BUFFER_BYTES);
        // Read again after a crash only, and gone with the next snapshot.
        options.set_compression_type(rocksdb::DBCompressionType::None);
        ColumnFamilyDescriptor::new(cf.name(), options)
    };
    Cf::ALL.into_iter().map(family).collect()
}

/// The state's families, which share a cache.
pub(super) fn state_families() -> Vec<ColumnFamilyDescriptor> {
    let cache = Cache::new_lru_cache(STATE_CACHE_BYTES);
    let family = |table: Table| {
        let mut blocks = blocks(&cache);
        // Each new key is looked for first, and is nowhere.
        let new_keys = matches!(table, Table::Data | Table::Dedup | Table::Machine);
        if new_keys || table == Table::Versions {
            blocks.set_bloom_filter(10.0, false);
        }
        let mut options = family_options(&blocks);
        if new_keys {
            options.set_memtable_whole_key_filtering(true);
            options.set_memtable_prefix_bloom_ratio(MEMORY_FILTER);
        }
        options.set_compression_type(rocksdb::DBCompressionType::Lz4);
        options.set_write_buffer_size(STATE_BUFFER_BYTES);
        ColumnFamilyDescriptor::new(table_name(table), options)
    };
    let local = ColumnFamilyDescriptor::new(Cf::Local.name(), family_options(&blocks(&cache)));
    std::iter::once(local).chain(Table::ALL.into_iter().map(family)).collect()
}

/// Without a cache that is named, RocksDB makes one of 32 MiB for each family.
fn blocks(cache: &Cache) -> BlockBasedOptions {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks
}

fn family_options(blocks: &BlockBasedOptions) -> Options {
    let mut options = Options::default();
    options.set_block_based_table_factory(blocks);
    // Who writes does not wait for one that is on its way to a slow disk.
    options.set_max_write_buffer_number(4);
    // Taken at once, by each family, however little it gets.
    options.set_arena_block_size(128 << 10);
    options
}

/// RocksDB writes each family's lowest files anew once no reader of older states is left, to forget
/// the numbers of their rows; there is always one soon. It may be left for as long as this, s.
const BOTTOMMOST_DELAY: &str = "86400";

/// Handles of all families of the log's database.
pub(super) fn log_handles(rocks: &DB) -> io::Result<Vec<&ColumnFamily>> {
    Cf::ALL.into_iter().map(|cf| handle(rocks, cf)).collect()
}

/// Handles of all families of the state's database.
pub(super) fn state_handles(rocks: &DB) -> io::Result<Vec<&ColumnFamily>> {
    let tables = Table::ALL.into_iter().map(|table| table_handle(rocks, table));
    std::iter::once(handle(rocks, Cf::Local)).chain(tables).collect()
}

pub(super) fn leave_bottommost_files(rocks: &DB, handles: &[&ColumnFamily]) -> io::Result<()> {
    for handle in handles {
        let options = [("bottommost_file_compaction_delay", BOTTOMMOST_DELAY)];
        rocks.set_options_cf(handle, &options).map_err(io_error)?;
    }
    Ok(())
}

/// Reads everything once; checksums are verified on the way. The answer is the values' bytes.
pub(super) fn read_through(rocks: &DB, handle: &ColumnFamily) -> io::Result<u64> {
    let mut bytes = 0;
    let mut options = ReadOptions::default();
    options.fill_cache(false);
    for row in rocks.iterator_cf_opt(handle, options, IteratorMode::Start) {
        let (_, value) = row.map_err(io_error)?;
        bytes += u64::try_from(value.len()).unwrap_or(0);
    }
    Ok(bytes)
}

/// Reads both databases once; answers how many bytes the log has.
pub(super) fn check(log: &DB, state: &DB) -> io::Result<u64> {
    for handle in state_handles(state)? {
        read_through(state, handle)?;
    }
    read_through(log, handle(log, Cf::Vote)?)?;
    read_through(log, handle(log, Cf::Local)?)?;
    read_through(log, handle(log, Cf::Log)?)
}
