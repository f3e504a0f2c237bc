//! What each command does.

use std::io;

use super::command::{Command, ConflictKv, Judged, KeyWrite, Reply, TxnCommand};
use super::dedup::{self, Known};
use super::{
    Gone, Overlay, Place, Read, Record, Replaced, Table, Version, VersionHead, compact, decode,
    encode, folders, gone, journal_key, revision, rows::damaged, usage, version_key,
};

/// The longest value of a latest version, bytes, that is in Data alone until the next one comes. A
/// transaction may replace, or delete, very much at once, and carries all of it over.
const IN_DATA_ALONE: usize = 1024;

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
        Command::Txn(txn) => apply_txn(state, index, txn, &[]),
        Command::Judged(Judged { txn, rests_on }) => apply_txn(state, index, txn, rests_on),
        Command::Limit(limits) => {
            usage::set_limits(state, *limits)?;
            Ok(Reply::None)
        }
        Command::Compact { lane, before, keep } => {
            compact::compact(state, *lane, *before, *keep)?;
            Ok(Reply::None)
        }
        Command::Check => Ok(Reply::CheckAt { index, revision: revision(state)? }),
    }
}

fn apply_txn<R: Read>(
    state: &mut Overlay<'_, R>,
    index: u64,
    txn: &TxnCommand,
    rests_on: &[(String, u64)],
) -> io::Result<Reply> {
    if txn.client.is_empty() {
        return execute(state, txn, rests_on);
    }
    match dedup::look_up(state, &txn.client, txn.sequence)? {
        Known::Answered(Some(revision)) => Ok(Reply::Committed { revision }),
        // What a key holds is for those alone who may ask now.
        Known::Answered(None) if !failed_compares(state, rests_on)?.is_empty() => {
            Ok(Reply::Overtaken)
        }
        Known::Answered(None) => {
            // It was refused then; what conflicts may look different now.
            let conflicts = failed_compares(state, &txn.compares)?;
            Ok(Reply::Conflict { revision: revision(state)?, conflicts: present(conflicts) })
        }
        Known::Forgotten => Ok(Reply::Forgotten),
        Known::New => {
            let reply = execute(state, txn, rests_on)?;
            let outcome = match &reply {
                Reply::Committed { revision } => Some(*revision),
                Reply::Conflict { .. } => None,
                // Nothing was done; a repetition is looked at anew.
                Reply::None
                | Reply::Forgotten
                | Reply::Full(_)
                | Reply::Oversized(_)
                | Reply::Overtaken
                | Reply::CheckAt { .. } => return Ok(reply),
            };
            dedup::remember(state, index, &txn.client, txn.sequence, outcome)?;
            Ok(reply)
        }
    }
}

fn execute<R: Read>(
    state: &mut Overlay<'_, R>,
    txn: &TxnCommand,
    rests_on: &[(String, u64)],
) -> io::Result<Reply> {
    if !failed_compares(state, rests_on)?.is_empty() {
        return Ok(Reply::Overtaken);
    }
    let failed = failed_compares(state, &txn.compares)?;
    let last = revision(state)?;
    if !failed.is_empty() {
        return Ok(Reply::Conflict { revision: last, conflicts: present(failed) });
    }
    let replaced = |write: &KeyWrite| Ok(record(state, &write.key)?.map(Replaced::from));
    let old: io::Result<Vec<_>> = txn.writes.iter().map(replaced).collect();
    let old = old?;
    if let Some(oversized) = usage::oversized(state, &txn.writes, &old)? {
        return Ok(Reply::Oversized(oversized));
    }
    if let Some(full) = usage::count(state, &txn.writes, &old)? {
        return Ok(Reply::Full(full));
    }
    let mut at = Place::first_of(last + 1);
    for (KeyWrite { key, value }, old) in txn.writes.iter().zip(old) {
        if write(state, txn, at, key, (old, value.as_deref()))? {
            at.position += 1;
        }
    }
    if at.position == 0 {
        return Ok(Reply::Committed { revision: last });
    }
    state.put(Table::Machine, b"revision", encode(&at.revision)?);
    Ok(Reply::Committed { revision: at.revision })
}

/// One write; false where nothing changed (a delete of an absent key).
fn write<R: Read>(
    state: &mut Overlay<'_, R>,
    txn: &TxnCommand,
    at: Place,
    key: &str,
    (old, value): (Option<Replaced>, Option<&[u8]>),
) -> io::Result<bool> {
    if old.is_none() && value.is_none() {
        return Ok(false);
    }
    let create_revision = old.as_ref().map_or(at.revision, |old| old.create_revision);
    let (previous_revision, last) = match &old {
        Some(old) => {
            keep(state, key, old)?;
            (old.mod_revision, old.ordinal)
        }
        // It may have existed before.
        None => gone::take(state, key)?.map_or((0, 0), |gone| (gone.revision, gone.ordinal)),
    };
    match value {
        Some(value) => {
            let (mod_revision, value) = (at.revision, value.to_vec());
            let record = Record { create_revision, mod_revision, ordinal: last + 1, value };
            state.put(Table::Data, key.as_bytes(), encode(&record)?);
        }
        None => {
            state.delete(Table::Data, key.as_bytes());
            gone::note(state, key, Gone { revision: at.revision, ordinal: last + 1 })?;
        }
    }
    let head = VersionHead {
        deleted: value.is_none(),
        create_revision,
        previous_revision,
        ordinal: last + 1,
        position: at.position,
        author: txn.author.clone(),
        at_ms: txn.at_ms,
    };
    let twice = |value: &&[u8]| value.len() > IN_DATA_ALONE;
    let row = encode(&Version { head, value: value.filter(twice).map(<[u8]>::to_vec) })?;
    usage::count_version(state, key, &row, true)?;
    state.put(Table::Versions, &version_key(key, at.revision), row);
    for folder in folders(key) {
        state.put(Table::Journal, &journal_key(folder, at), key.as_bytes().to_vec());
    }
    Ok(true)
}

/// A key's latest version is about to be followed by another one: its value goes to its row in
/// Versions.
fn keep<R: Read>(state: &mut Overlay<'_, R>, key: &str, old: &Replaced) -> io::Result<()> {
    if old.value_bytes > IN_DATA_ALONE {
        return Ok(());
    }
    let at = version_key(key, old.mod_revision);
    let row = state.get(Table::Versions, &at)?.ok_or_else(|| damaged("a version is missing"))?;
    let version: Version = decode(&row)?;
    let record = record(state, key)?.filter(|record| record.mod_revision == old.mod_revision);
    // A key that is written twice in one transaction, which no member proposes, has it already.
    let (true, Some(Record { value, .. })) = (version.is_in_data(), record) else { return Ok(()) };
    let whole = encode(&Version { value: Some(value), ..version })?;
    usage::count_version(state, key, &row, false)?;
    usage::count_version(state, key, &whole, true)?;
    state.put(Table::Versions, &at, whole);
    Ok(())
}

fn record(read: &impl Read, key: &str) -> io::Result<Option<Record>> {
    read.get(Table::Data, key.as_bytes())?.map(|bytes| decode(&bytes)).transpose()
}

/// The keys whose compare does not hold, with their present state.
fn failed_compares(
    read: &impl Read,
    compares: &[(String, u64)],
) -> io::Result<Vec<(String, Option<Record>)>> {
    let mut failed = Vec::new();
    for (key, wanted) in compares {
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
