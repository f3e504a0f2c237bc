//! What each command does.

use std::io;

use super::command::{Command, ConflictKv, Reply, TxnCommand};
use super::dedup::{self, Known};
use super::{
    HistoryEvent, Overlay, Read, Record, Table, compacted, decode, encode, history_key, revision,
};

/// History rows that one compaction command removes at most: a long history goes in steps, and no
/// single entry holds up those behind it.
const COMPACT_ROWS_MAX: usize = 4096;

/// Applies one committed command at its log index.
///
/// # Errors
/// Only where the state cannot be read: the node must stop then, for it cannot know the state.
pub(crate) fn apply<R: Read>(
    state: &mut Overlay<'_, R>,
    index: u64,
    command: &Command,
) -> io::Result<Reply> {
    match command {
        Command::Txn(txn) => apply_txn(state, index, txn),
        Command::Compact { before } => compact(state, *before),
    }
}

fn apply_txn<R: Read>(
    state: &mut Overlay<'_, R>,
    index: u64,
    txn: &TxnCommand,
) -> io::Result<Reply> {
    if txn.client.is_empty() {
        return execute(state, txn);
    }
    match dedup::look_up(state, &txn.client, txn.sequence)? {
        Known::Answered(Some(revision)) => Ok(Reply::Committed { revision }),
        Known::Answered(None) => {
            // It was refused then; what conflicts may look different now.
            let conflicts = failed_compares(state, txn)?;
            Ok(Reply::Conflict { revision: revision(state)?, conflicts: present(conflicts) })
        }
        Known::Forgotten => Ok(Reply::Forgotten),
        Known::New => {
            let reply = execute(state, txn)?;
            let outcome = match &reply {
                Reply::Committed { revision } => Some(*revision),
                _ => None,
            };
            dedup::remember(state, index, &txn.client, txn.sequence, outcome)?;
            Ok(reply)
        }
    }
}

fn execute<R: Read>(state: &mut Overlay<'_, R>, txn: &TxnCommand) -> io::Result<Reply> {
    let failed = failed_compares(state, txn)?;
    let last = revision(state)?;
    if !failed.is_empty() {
        return Ok(Reply::Conflict { revision: last, conflicts: present(failed) });
    }
    let next = last + 1;
    let mut position = 0u32;
    for (key, value) in &txn.writes {
        if write(state, next, position, key, value.as_deref())? {
            position += 1;
        }
    }
    if position == 0 {
        return Ok(Reply::Committed { revision: last });
    }
    state.put(Table::Machine, b"revision", encode(&next)?);
    Ok(Reply::Committed { revision: next })
}

/// One write; false where nothing changed (a delete of an absent key).
fn write<R: Read>(
    state: &mut Overlay<'_, R>,
    revision: u64,
    position: u32,
    key: &str,
    value: Option<&[u8]>,
) -> io::Result<bool> {
    let old = record(state, key)?;
    let create_revision = match (&old, value) {
        (None, None) => return Ok(false),
        (Some(old), _) => old.create_revision,
        (None, Some(_)) => revision,
    };
    match value {
        Some(value) => {
            let record = Record { create_revision, mod_revision: revision, value: value.to_vec() };
            state.put(Table::Data, key.as_bytes(), encode(&record)?);
        }
        None => state.delete(Table::Data, key.as_bytes()),
    }
    let event =
        HistoryEvent { key: key.to_owned(), value: value.map(<[u8]>::to_vec), create_revision };
    state.put(Table::History, &history_key(revision, position), encode(&event)?);
    Ok(true)
}

fn record(read: &impl Read, key: &str) -> io::Result<Option<Record>> {
    read.get(Table::Data, key.as_bytes())?.map(|bytes| decode(&bytes)).transpose()
}

/// The keys whose compare does not hold, with their present state.
fn failed_compares(
    read: &impl Read,
    txn: &TxnCommand,
) -> io::Result<Vec<(String, Option<Record>)>> {
    let mut failed = Vec::new();
    for (key, wanted) in &txn.compares {
        let record = record(read, key)?;
        if record.as_ref().map_or(0, |record| record.mod_revision) != *wanted {
            failed.push((key.clone(), record));
        }
    }
    Ok(failed)
}

fn present(failed: Vec<(String, Option<Record>)>) -> Vec<ConflictKv> {
    let with_state = failed.into_iter().filter_map(|(key, record)| Some((key, record?)));
    with_state
        .map(|(key, record)| ConflictKv {
            key,
            value: record.value,
            create_revision: record.create_revision,
            mod_revision: record.mod_revision,
        })
        .collect()
}

/// Forgets history before a revision (never the last one), in whole revisions.
fn compact<R: Read>(state: &mut Overlay<'_, R>, before: u64) -> io::Result<Reply> {
    let (first, last) = (compacted(state)?, revision(state)?);
    let before = before.min(last);
    if before <= first {
        return Ok(Reply::None);
    }
    // From the very first row: a revision larger than one step leaves rows behind.
    let (from, to) = (history_key(0, 0), history_key(before, 0));
    let rows = state.scan(Table::History, &from, Some(&to), COMPACT_ROWS_MAX)?;
    let all = rows.len() < COMPACT_ROWS_MAX;
    let mut kept_from = before;
    if !all && let Some((key, _)) = rows.last() {
        // The last revision seen may not be complete and stays whole for the next step, unless it
        // alone fills this one: then it is given up, and its other rows go with the next.
        kept_from = super::history_revision(key)?.max(first + 1);
    }
    for (key, _) in rows {
        if super::history_revision(&key)? < kept_from {
            state.delete(Table::History, &key);
        }
    }
    state.put(Table::Machine, b"compacted", encode(&kept_from)?);
    Ok(Reply::None)
}
