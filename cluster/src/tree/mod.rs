//! The mounted tree: people's files of the store as a file system (FUSE).
//!
//! ```text
//!   kernel ─► shell (fuser) ─┬─ lookup, stat, readdir, read, write ─► namespace + buffers (memory)
//!                            └─ open, close, rename, … ─► tasks ─► source (reads), FileWriter
//!   store ── watch ─► follow ─► namespace ─► notices ─► kernel's caches
//! ```
//!
//! Owns: the mount, the names and open files in memory. Never: what a document must look like (the
//! [`FileWriter`](crate::FileWriter) knows), and no file of its own on disk.
//!
//! A file is committed when it is closed or synced, whole, in one transaction; so is a rename of a
//! whole folder. What is open here is shared by all who have it open here; between nodes the last
//! close wins, except that appended bytes are never lost and that an exclusive creation is
//! exclusive in the whole cluster.
//!
//! Invariants: names and attributes are answered from memory, so that no slow disk and no lost
//! quorum hangs a listing; everything else has a time limit; nobody waits for the thread that
//! tells the kernel what to forget.

mod attributes;
mod buffer;
mod change;
mod closing;
mod commit;
mod files;
mod follow;
mod generated;
mod inode;
mod mount;
mod names;
mod namespace;
mod notices;
mod quorum;
mod rename;
mod shell;
mod source;
mod state;

#[cfg(test)]
mod closing_tests;
#[cfg(test)]
mod namespace_tests;

pub use mount::{Mount, MountError, TreeConfig, leave_all};
