//! The state machine: what a committed command does to the store. Pure: state is read through
//! [`Read`], changes are collected in an [`Overlay`], and nothing else is looked at or touched, so
//! every node that applies the same log has the same state.
//!
//! | table   | key                              | value                                       |
//! |---------|----------------------------------|---------------------------------------------|
//! | Data    | the key                          | [`Record`]: latest value and its revisions   |
//! | History | revision (8 BE), position (4 BE) | [`HistoryEvent`]: what this write did        |
//! | Dedup   | see [`dedup`]                    | outcomes of named transactions              |
//! | Machine | a word                           | `revision`, `compacted`, `clients`          |
//!
//! Invariants: one revision per transaction that changes something; every change of Data has its
//! row in History until compacted; the last revision and `last applied` go to disk in one batch.

mod apply;
mod command;
mod dedup;
mod overlay;
mod rows;

#[cfg(test)]
mod model_tests;

pub(crate) use apply::apply;
pub(crate) use command::{Command, Reply, TxnCommand, validate};
pub(crate) use overlay::{Changes, Overlay, Read, Table};
pub(crate) use rows::{
    HistoryEvent, Record, compacted, decode, encode, history_key, history_revision, prefix_end,
    revision,
};
