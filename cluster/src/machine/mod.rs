//! The state machine: what a committed command does to the store. Pure: state is read through
//! [`Read`], changes are collected in an [`Overlay`], and nothing else is looked at or touched, so
//! every node that applies the same log has the same state.
//!
//! | table    | key                                         | value                            |
//! |----------|---------------------------------------------|----------------------------------|
//! | Data     | the key                                     | [`Record`]: latest value         |
//! | Versions | the key, 0, revision (8 BE)                 | [`Version`]: what a write did    |
//! | Journal  | a folder, 0, revision (8 BE), place (4 BE)  | the key that was written         |
//! | Dedup    | see [`dedup`]                               | outcomes of named transactions   |
//! | Machine  | a word                                      | `revision`, `clients`, see [`compact`], [`gone`], [`usage`] |
//!
//! A short value is stored once: in Data while it is its key's latest, in Versions afterwards.
//!
//! A write has a row in Versions, and one in the Journal for each folder above it (the first few,
//! see [`folders`]), so that neither a key's nor a folder's history is searched for. The system's
//! records are in the Journal once, under their [`Lane`]: they change all the time.
//!
//! Invariants: one revision per transaction that changes something; from a lane's floor on, every
//! version of its keys is kept, and those in force at the floor; a key's kept versions are its
//! newest ones, without a gap; the last revision and `last applied` go to disk in one batch.

mod apply;
mod command;
mod compact;
mod dedup;
mod gone;
mod history;
mod lane;
mod overlay;
mod rows;
mod usage;

#[cfg(test)]
pub(crate) use command::{KeyWrite, TxnCommand};

#[cfg(test)]
mod history_tests;
#[cfg(test)]
mod limit_tests;
#[cfg(test)]
mod model_tests;

pub(crate) use apply::apply;
pub(crate) use command::{Command, Judged, Reply, Unfit, VALUE_MAX, valid_key, validate};
pub(crate) use compact::{floor, unswept};
use gone::Gone;
pub(crate) use history::{
    ANSWER_BYTES, At, Span, Written, changes, floor_of_prefix, get_at, journal, newest, range_at,
    written_at, written_at_ms,
};
pub(crate) use lane::{Lane, folders, folders_of_prefix};
pub(crate) use overlay::{Changes, Overlay, Read, Row, Table};
pub(crate) use rows::{
    Place, Record, Replaced, Version, VersionHead, decode, decode_head, encode, journal_key,
    place_of, prefix_end, revision, version_key, version_of,
};
pub(crate) use usage::{DataLimits, Full, Oversized, Share, Usage, kept, limits, used_bytes};
