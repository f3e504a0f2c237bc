//! Rows of the tables and their encodings.

use std::io;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Read, Table};

/// A key's latest value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) create_revision: u64,
    pub(crate) mod_revision: u64,
    /// Counts the key's versions, see [`Version`].
    pub(crate) ordinal: u64,
    #[serde(with = "serde_bytes")]
    pub(crate) value: Vec<u8>,
}

/// What is known of a record without its value: a transaction may replace very much at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Replaced {
    pub(crate) create_revision: u64,
    pub(crate) mod_revision: u64,
    pub(crate) ordinal: u64,
    /// The value's length.
    pub(crate) value_bytes: usize,
}

impl From<Record> for Replaced {
    fn from(record: Record) -> Self {
        let Record { create_revision, mod_revision, ordinal, value } = record;
        Self { create_revision, mod_revision, ordinal, value_bytes: value.len() }
    }
}

/// What one write made of a key. The row of a key's latest version has no value, unless it is a long
/// one: Data has it, until the next version comes (see [`Version::is_in_data`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Version {
    /// Before the value: it is read without it.
    pub(crate) head: VersionHead,
    /// None: deleted; in a row also: in Data.
    #[serde(with = "serde_bytes")]
    pub(crate) value: Option<Vec<u8>>,
}

impl Version {
    /// Whether this row's value is in Data.
    pub(crate) fn is_in_data(&self) -> bool {
        self.value.is_none() && !self.head.deleted
    }
}

/// Who wrote a version when, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VersionHead {
    pub(crate) deleted: bool,
    pub(crate) create_revision: u64,
    /// The key's version before this one (0: none was kept).
    pub(crate) previous_revision: u64,
    /// Rises by one with each of the key's versions.
    pub(crate) ordinal: u64,
    /// Place among its transaction's writes.
    pub(crate) position: u32,
    pub(crate) author: String,
    pub(crate) at_ms: u64,
}

/// Ends the text part of a row's key: no key of the store contains it.
const TEXT_END: u8 = 0;

/// Where a version of a key stands in Versions.
pub(crate) fn version_key(key: &str, revision: u64) -> Vec<u8> {
    [key.as_bytes(), &[TEXT_END], &revision.to_be_bytes()].concat()
}

/// The revision of a row in Versions, and its key.
pub(crate) fn version_of(row: &[u8]) -> io::Result<(&str, u64)> {
    let (key, tail) = split_tail(row, 8)?;
    let revision = tail.try_into().map(u64::from_be_bytes);
    Ok((key, revision.map_err(|_| damaged("a version's key is too short"))?))
}

/// Where a write stands in one folder's part of the Journal.
pub(crate) fn journal_key(folder: &str, at: Place) -> Vec<u8> {
    let (revision, position) = (at.revision.to_be_bytes(), at.position.to_be_bytes());
    [folder.as_bytes(), &[TEXT_END], &revision, &position].concat()
}

/// Where in the order of all writes a row of the Journal stands.
pub(crate) fn place_of(row: &[u8]) -> io::Result<Place> {
    let (_, tail) = split_tail(row, 12)?;
    let (revision, position) = tail.split_at(8);
    match (revision.try_into(), position.try_into()) {
        (Ok(revision), Ok(position)) => Ok(Place {
            revision: u64::from_be_bytes(revision),
            position: u32::from_be_bytes(position),
        }),
        _ => Err(damaged("a journal key is too short")),
    }
}

fn split_tail(row: &[u8], tail: usize) -> io::Result<(&str, &[u8])> {
    let short = || damaged("a row's key is too short");
    let cut = row.len().checked_sub(tail + 1).ok_or_else(short)?;
    let text = row.get(..cut).and_then(|text| std::str::from_utf8(text).ok());
    Ok((text.ok_or_else(|| damaged("a row's key is not text"))?, &row[cut + 1..]))
}

/// A write's place in the order of all writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Place {
    pub(crate) revision: u64,
    pub(crate) position: u32,
}

impl Place {
    /// Before all writes of a revision.
    pub(crate) fn first_of(revision: u64) -> Self {
        Self { revision, position: 0 }
    }
}

/// The store's last revision.
pub(crate) fn revision(read: &impl Read) -> io::Result<u64> {
    number(read, b"revision")
}

pub(super) fn number(read: &impl Read, name: &[u8]) -> io::Result<u64> {
    match read.get(Table::Machine, name)? {
        None => Ok(0),
        Some(bytes) => decode(&bytes),
    }
}

/// Encodes a row.
pub(crate) fn encode<T: Serialize>(row: &T) -> io::Result<Vec<u8>> {
    postcard::to_stdvec(row).map_err(|error| damaged(&error.to_string()))
}

/// Decodes a row in Versions up to its value.
pub(crate) fn decode_head(bytes: &[u8]) -> io::Result<VersionHead> {
    let head = postcard::take_from_bytes(bytes).map_err(|error| damaged(&error.to_string()))?;
    Ok(head.0)
}

/// Decodes a row.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    postcard::from_bytes(bytes).map_err(|error| damaged(&error.to_string()))
}

pub(super) fn damaged(detail: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("damaged row in the database: {detail}"))
}

/// The first key after all keys with this prefix; None where there is none.
pub(crate) fn prefix_end(prefix: &[u8]) -> Option<Vec<u8>> {
    let keep = prefix.iter().rposition(|byte| *byte != 0xff)?;
    let mut end = prefix[..=keep].to_vec();
    end[keep] += 1;
    Some(end)
}
