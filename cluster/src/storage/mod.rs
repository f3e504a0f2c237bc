//! The data folder: its lock, the RocksDB database in it, and the thread that makes writes durable.
//!
//! ```text
//! DATA/lock            held while an agent runs; holds its process id
//! DATA/db/             RocksDB: column families log, vote, default, and one per table of the machine
//! DATA/snapshots/      at most one snapshot being kept, and those being received
//! ```
//!
//! Invariants: every write goes through one write-ahead log, so what a crash leaves is a prefix of
//! the writes in their order (a vote never overtakes a log entry); nothing is reported durable
//! before an fsync of that log that began after the write.

mod db;
mod flush;
mod folder;
mod frozen;

pub(crate) use db::{Cf, Db, View};
pub(crate) use flush::Flusher;
pub(crate) use folder::{FolderLock, boot_id, free_bytes};
pub(crate) use frozen::Frozen;
