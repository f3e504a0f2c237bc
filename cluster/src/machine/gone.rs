//! Keys that were deleted, as long as history knows them: a key that comes again goes on counting its
//! versions. To look for its last version instead would be a search for each new key.
//!
//! Rows of the Machine table: `gone KEY` → [`Gone`].

use std::io;

use serde::{Deserialize, Serialize};

use super::{Overlay, Read, Table, decode, encode};

/// The version that deleted a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Gone {
    pub(crate) revision: u64,
    /// See [`super::VersionHead`].
    pub(crate) ordinal: u64,
}

fn row(key: &str) -> Vec<u8> {
    [b"gone ".as_slice(), key.as_bytes()].concat()
}

/// A key was deleted.
pub(super) fn note<R: Read>(state: &mut Overlay<'_, R>, key: &str, gone: Gone) -> io::Result<()> {
    state.put(Table::Machine, &row(key), encode(&gone)?);
    Ok(())
}

/// What is known of a key that comes (again).
pub(super) fn take<R: Read>(state: &mut Overlay<'_, R>, key: &str) -> io::Result<Option<Gone>> {
    let row = row(key);
    let Some(bytes) = state.get(Table::Machine, &row)? else { return Ok(None) };
    state.delete(Table::Machine, &row);
    Ok(Some(decode(&bytes)?))
}

/// History knows a key no more.
pub(super) fn forget<R: Read>(state: &mut Overlay<'_, R>, key: &str) {
    state.delete(Table::Machine, &row(key));
}
