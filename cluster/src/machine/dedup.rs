//! Outcomes of named transactions, so that a repetition is answered instead of applied twice.
//!
//! Rows: `a CLIENT SEQUENCE` → outcome (the revision, or none for a failed compare);
//! `c CLIENT` → [`ClientRow`]; `o LOG-INDEX` → client, to find one that has been silent for long.
//! Bounded by counting alone: [`ANSWERS_MAX`] outcomes per client (older ones are answered
//! "forgotten", never applied), [`CLIENTS_MAX`] clients (a client that has been silent while that
//! many others wrote is forgotten; retries end after seconds, long before).

use std::io;

use serde::{Deserialize, Serialize};

use super::rows::number;
use super::{Overlay, Read, Table, decode, encode, prefix_end};

/// Outcomes kept per client.
pub(super) const ANSWERS_MAX: u64 = 1024;
/// Clients kept.
pub(super) const CLIENTS_MAX: u64 = 4096;
/// A client's place in the order of silence is renewed once it is this many entries old: less than
/// [`CLIENTS_MAX`], and not with each of its transactions.
const RENEWED_AFTER: u64 = 1024;

#[derive(Debug, Default, Serialize, Deserialize)]
struct ClientRow {
    /// Sequences below this one are forgotten, and have no rows.
    kept_from: u64,
    /// Outcomes kept.
    count: u64,
    /// Its place in the order of silence: the log index of one of its last transactions.
    place: u64,
    /// The highest sequence it ever had.
    highest: u64,
}

/// What is known of a named transaction.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// Never seen.
    New,
    /// Applied at this revision, or refused by a compare (None).
    Answered(Option<u64>),
    /// Older than what is kept.
    Forgotten,
}

fn client_key(client: &str) -> Vec<u8> {
    [b"c".as_slice(), client.as_bytes()].concat()
}

fn answers_prefix(client: &str) -> Vec<u8> {
    // The length first: no client's rows lie among another's.
    let length = u16::try_from(client.len()).unwrap_or(u16::MAX).to_be_bytes();
    [b"a".as_slice(), &length, client.as_bytes()].concat()
}

fn answer_key(client: &str, sequence: u64) -> Vec<u8> {
    [answers_prefix(client).as_slice(), &sequence.to_be_bytes()].concat()
}

fn order_key(index: u64) -> Vec<u8> {
    [b"o".as_slice(), &index.to_be_bytes()].concat()
}

/// Looks a transaction up.
pub(super) fn look_up(read: &impl Read, client: &str, sequence: u64) -> io::Result<Known> {
    let Some(bytes) = read.get(Table::Dedup, &client_key(client))? else { return Ok(Known::New) };
    let ClientRow { kept_from, highest, .. } = decode(&bytes)?;
    if sequence > highest {
        return Ok(Known::New);
    }
    if sequence < kept_from {
        return Ok(Known::Forgotten);
    }
    let answer = read.get(Table::Dedup, &answer_key(client, sequence))?;
    Ok(answer.map(|bytes| decode(&bytes)).transpose()?.map_or(Known::New, Known::Answered))
}

/// Remembers an outcome, and forgets the oldest beyond the bounds.
pub(super) fn remember<R: Read>(
    state: &mut Overlay<'_, R>,
    index: u64,
    client: &str,
    sequence: u64,
    outcome: Option<u64>,
) -> io::Result<()> {
    state.put(Table::Dedup, &answer_key(client, sequence), encode(&outcome)?);
    let row = state.get(Table::Dedup, &client_key(client))?;
    let is_new = row.is_none();
    let mut row: ClientRow = row.map(|bytes| decode(&bytes)).transpose()?.unwrap_or_default();
    if is_new || index.saturating_sub(row.place) >= RENEWED_AFTER {
        if !is_new {
            state.delete(Table::Dedup, &order_key(row.place));
        }
        state.put(Table::Dedup, &order_key(index), client.as_bytes().to_vec());
        row.place = index;
    }
    row.count += 1;
    row.highest = row.highest.max(sequence);
    if row.count > ANSWERS_MAX {
        row.kept_from = drop_oldest(state, client, &row)?.saturating_add(1);
        row.count -= 1;
    }
    state.put(Table::Dedup, &client_key(client), encode(&row)?);
    if is_new { count_client(state) } else { Ok(()) }
}

/// Removes a client's lowest outcome; answers its sequence.
fn drop_oldest<R: Read>(
    state: &mut Overlay<'_, R>,
    client: &str,
    &ClientRow { kept_from, count, highest, .. }: &ClientRow,
) -> io::Result<u64> {
    // As a rule a client's sequences have no gaps, and it needs no look; or a look is cheaper than a
    // search.
    let first = answer_key(client, kept_from);
    let no_gap = highest.saturating_sub(kept_from) == count.saturating_sub(1);
    if no_gap || state.get(Table::Dedup, &first)?.is_some() {
        state.delete(Table::Dedup, &first);
        return Ok(kept_from);
    }
    // From there on: before it the database has the traces of all that were removed.
    let prefix = answers_prefix(client);
    let oldest = state.scan(Table::Dedup, &first, prefix_end(&prefix).as_deref(), 1)?;
    let Some((key, _)) = oldest.into_iter().next() else { return Ok(kept_from) };
    state.delete(Table::Dedup, &key);
    let sequence = key.get(prefix.len()..).and_then(|tail| <[u8; 8]>::try_from(tail).ok());
    Ok(sequence.map_or(kept_from, u64::from_be_bytes))
}

fn count_client<R: Read>(state: &mut Overlay<'_, R>) -> io::Result<()> {
    let clients = number(state, b"clients")? + 1;
    if clients <= CLIENTS_MAX {
        state.put(Table::Machine, b"clients", encode(&clients)?);
        return Ok(());
    }
    let silent = state.scan(Table::Dedup, b"o", Some(b"p"), 1)?;
    let Some((order, client)) = silent.into_iter().next() else { return Ok(()) };
    let client = String::from_utf8_lossy(&client).into_owned();
    let prefix = answers_prefix(&client);
    let end = prefix_end(&prefix);
    for (key, _) in state.scan(Table::Dedup, &prefix, end.as_deref(), usize::MAX)? {
        state.delete(Table::Dedup, &key);
    }
    state.delete(Table::Dedup, &order);
    state.delete(Table::Dedup, &client_key(&client));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::model_tests::Rows;
    use super::*;

    fn remembered(rows: &mut Rows, index: u64, sequence: u64) -> io::Result<()> {
        let mut state = Overlay::new(&*rows);
        assert_eq!(look_up(&state, "ann", sequence)?, Known::New);
        remember(&mut state, index, "ann", sequence, Some(index))?;
        let changes = state.into_changes();
        rows.take(&changes);
        Ok(())
    }

    #[test]
    fn a_client_that_counts_from_zero_is_not_answered_anew() -> io::Result<()> {
        let mut rows = Rows::default();
        for sequence in 0..=ANSWERS_MAX {
            remembered(&mut rows, sequence + 1, sequence)?;
        }
        assert_eq!(look_up(&rows, "ann", 0)?, Known::Forgotten);
        assert_eq!(look_up(&rows, "ann", 1)?, Known::Answered(Some(2)));
        Ok(())
    }

    /// Requests overtake each other: 2, 1, 4, 3, and so on.
    #[test]
    fn a_clients_oldest_outcomes_go_and_are_said_to_be_forgotten() -> io::Result<()> {
        let (mut rows, total) = (Rows::default(), 3 * ANSWERS_MAX);
        for index in 1..=total {
            let sequence = if index % 2 == 1 { index + 1 } else { index - 1 };
            remembered(&mut rows, index, sequence)?;
            let prefix = answers_prefix("ann");
            let kept =
                rows.scan(Table::Dedup, &prefix, prefix_end(&prefix).as_deref(), usize::MAX)?;
            assert_eq!(kept.len() as u64, index.min(ANSWERS_MAX));
        }
        for sequence in 1..=total {
            let known = look_up(&rows, "ann", sequence)?;
            let expected = if sequence > total - ANSWERS_MAX {
                let index = if sequence % 2 == 1 { sequence + 1 } else { sequence - 1 };
                Known::Answered(Some(index))
            } else {
                Known::Forgotten
            };
            assert_eq!(known, expected, "sequence {sequence}");
        }
        Ok(())
    }
}
