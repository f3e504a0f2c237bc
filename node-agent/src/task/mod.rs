//! Tasks: every change that takes time. Kept by the node that runs them, with log, progress,
//! result and a way to cancel; the newest [`KEPT_MAX`] that have ended are kept.
//!
//! Ids are `<node id>-<number>`; a number is never given twice in a data folder's life, because a
//! mark on disk is raised before the numbers below it are used.
//!
//! Never: decides what a task does, talks to the network.

mod store;

pub use store::{TaskContext, TaskFailure, TaskStore, parse_id};

/// Ended tasks that are kept.
pub const KEPT_MAX: usize = 500;
/// Log lines that one task keeps; older ones are dropped and said to be.
pub const LOG_MAX: usize = 2_000;
