//! Forgetting history, one lane at a time.
//!
//! A command moves the lane's floor at once; what lies below it is then swept in steps, oldest
//! change first, so that no single entry holds up those behind it. Rows of the Machine table:
//! `floor LANE` (first revision that is whole), `swept LANE` (the sweep's place).
//!
//! A version goes when another one replaced it at or below the floor and enough newer ones of its
//! key are kept; all versions of a key go when its deletion lies below the floor. Each change is
//! looked at once, when the sweep passes it: a version that stays then, because it is among the last
//! of its key, goes when the sweep passes the changes that made it old.

use std::collections::BTreeSet;
use std::io;

use super::rows::number;
use super::{
    Lane, Overlay, Place, Read, Table, VersionHead, decode, decode_head, encode, folders, gone,
    journal_key, newest, place_of, revision, usage, version_key, version_of,
};

/// Changes that one command looks at, at most.
const CHANGES_MAX: usize = 512;
/// Versions that one command removes, at most.
const VERSIONS_MAX: usize = 2048;
/// Bytes that one command reads, about.
const BYTES_MAX: usize = 16 << 20;

fn floor_name(lane: Lane) -> &'static [u8] {
    match lane {
        Lane::Files => b"floor files",
        Lane::Status => b"floor status",
        Lane::Private => b"floor priv",
    }
}

fn swept_name(lane: Lane) -> &'static [u8] {
    match lane {
        Lane::Files => b"swept files",
        Lane::Status => b"swept status",
        Lane::Private => b"swept priv",
    }
}

/// The first revision from which a lane's history is whole.
pub(crate) fn floor(read: &impl Read, lane: Lane) -> io::Result<u64> {
    Ok(number(read, floor_name(lane))?.max(1))
}

fn swept(read: &impl Read, lane: Lane) -> io::Result<Place> {
    let row = read.get(Table::Machine, swept_name(lane))?;
    Ok(row.map(|bytes| decode(&bytes)).transpose()?.unwrap_or_default())
}

/// Whether changes below a lane's floor are still to be swept.
pub(crate) fn unswept(read: &impl Read, lane: Lane) -> io::Result<bool> {
    Ok(swept(read, lane)? < Place::first_of(floor(read, lane)?))
}

/// One step. `before` never passes the last revision: the present state stays readable.
pub(super) fn compact<R: Read>(
    state: &mut Overlay<'_, R>,
    lane: Lane,
    before: u64,
    keep: u64,
) -> io::Result<()> {
    let floor = floor(state, lane)?.max(before.min(revision(state)?));
    state.put(Table::Machine, floor_name(lane), encode(&floor)?);
    let (from, to) = (swept(state, lane)?, Place::first_of(floor));
    if from >= to {
        return Ok(());
    }
    let folder = lane.folder();
    let (start, end) = (journal_key(folder, from), journal_key(folder, to));
    let rows = state.scan(Table::Journal, &start, Some(&end), CHANGES_MAX)?;
    let mut budget = Budget { versions: VERSIONS_MAX, bytes: BYTES_MAX };
    // Short of the last row the sweep may end in the middle of a revision: it is below the floor.
    let mut reached = if rows.len() < CHANGES_MAX { Some(to) } else { None };
    let mut last = from;
    // One look at a key removes all that may go.
    let mut trimmed = BTreeSet::new();
    for (row, key) in rows {
        let place = place_of(&row)?;
        if !trimmed.contains(&key) {
            let text = String::from_utf8_lossy(&key);
            if budget.is_spent() || !trim(state, &text, floor, keep.max(1), &mut budget)? {
                reached = Some(place);
                break;
            }
            trimmed.insert(key);
        }
        last = place;
    }
    let next = Place { revision: last.revision, position: last.position.saturating_add(1) };
    state.put(Table::Machine, swept_name(lane), encode(&reached.unwrap_or(next))?);
    Ok(())
}

struct Budget {
    versions: usize,
    bytes: usize,
}

/// Removes what a key's history no longer needs; false where the budget ended first.
fn trim<R: Read>(
    state: &mut Overlay<'_, R>,
    key: &str,
    floor: u64,
    keep: u64,
    budget: &mut Budget,
) -> io::Result<bool> {
    let Some((newest_revision, newest)) = newest(state, key)? else { return Ok(true) };
    let gone = newest.deleted && newest_revision < floor;
    let end = version_key(key, u64::MAX);
    let mut from = version_key(key, 0);
    loop {
        // Two at a time: whether the first may go depends on the second.
        let pair = state.scan(Table::Versions, &from, Some(&end), 2)?;
        let Some((row, bytes)) = pair.first() else {
            // Of a key that is not gone there is a version that stays.
            gone::forget(state, key);
            return Ok(true);
        };
        let (_, revision) = version_of(row)?;
        let version = decode_head(bytes)?;
        budget.bytes = budget.bytes.saturating_sub(bytes.len());
        let replaced = match pair.get(1) {
            Some((next, _)) => version_of(next)?.1 <= floor,
            None => false,
        };
        let old = revision < floor && newest.ordinal.saturating_sub(version.ordinal) >= keep;
        let needed = !replaced || !old;
        if !gone && needed {
            return Ok(true);
        }
        if budget.is_spent() {
            return Ok(false);
        }
        budget.versions -= 1;
        usage::count_version(state, key, bytes, false)?;
        remove(state, key, revision, &version);
        from = version_key(key, revision);
    }
}

impl Budget {
    fn is_spent(&self) -> bool {
        self.versions == 0 || self.bytes == 0
    }
}

fn remove<R: Read>(state: &mut Overlay<'_, R>, key: &str, revision: u64, version: &VersionHead) {
    state.delete(Table::Versions, &version_key(key, revision));
    let at = Place { revision, position: version.position };
    for folder in folders(key) {
        state.delete(Table::Journal, &journal_key(folder, at));
    }
}
