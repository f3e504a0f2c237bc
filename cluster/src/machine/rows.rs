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
    pub(crate) value: Vec<u8>,
}

/// One write of one transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HistoryEvent {
    pub(crate) key: String,
    /// None: deleted.
    pub(crate) value: Option<Vec<u8>>,
    pub(crate) create_revision: u64,
}

/// Where a write stands in History.
pub(crate) fn history_key(revision: u64, position: u32) -> [u8; 12] {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&revision.to_be_bytes());
    key[8..].copy_from_slice(&position.to_be_bytes());
    key
}

/// The revision of a History key.
pub(crate) fn history_revision(key: &[u8]) -> io::Result<u64> {
    let bytes = key.get(..8).and_then(|head| <[u8; 8]>::try_from(head).ok());
    bytes.map(u64::from_be_bytes).ok_or_else(|| damaged("a history key is too short"))
}

/// The store's last revision.
pub(crate) fn revision(read: &impl Read) -> io::Result<u64> {
    number(read, b"revision")
}

/// The first revision that History still has whole.
pub(crate) fn compacted(read: &impl Read) -> io::Result<u64> {
    Ok(number(read, b"compacted")?.max(1))
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

/// Decodes a row.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    postcard::from_bytes(bytes).map_err(|error| damaged(&error.to_string()))
}

fn damaged(detail: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("damaged row in the database: {detail}"))
}

/// The first key after all keys with this prefix; None where there is none.
pub(crate) fn prefix_end(prefix: &[u8]) -> Option<Vec<u8>> {
    let keep = prefix.iter().rposition(|byte| *byte != 0xff)?;
    let mut end = prefix[..=keep].to_vec();
    end[keep] += 1;
    Some(end)
}
