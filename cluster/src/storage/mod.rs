//! The data folder: its lock, the RocksDB databases in it, and the thread that makes writes durable.
//!
//! ```text
//! DATA/lock            held while an agent runs; holds its process id
//! DATA/log/            RocksDB: Raft's log, its vote, what this member knows of itself
//! DATA/db/             RocksDB: the state machine's tables, a column family each
//! DATA/snapshots/      snapshots that are being sent or received
//! ```
//!
//! Invariants: every write of Raft's goes through one write-ahead log, so what a crash leaves is a
//! prefix of the writes in their order (a vote never overtakes a log entry); nothing is reported
//! durable before an fsync of that log that began after the write. The state has no write-ahead log:
//! a crash leaves it as it last reached its files, all tables at one point, and never ahead of what
//! is durable of the log.

mod batch;
mod checkpoint;
mod db;
mod families;
mod flush;
mod folder;
mod frozen;
mod state;
mod view;

pub(crate) use checkpoint::Checkpoint;
pub(crate) use db::{Db, LOG, STATE};
pub(crate) use families::Cf;
pub(crate) use flush::Flusher;
pub(crate) use folder::{FolderLock, boot_id, free_bytes};
pub(crate) use frozen::Frozen;
pub(crate) use view::{LogView, View};
