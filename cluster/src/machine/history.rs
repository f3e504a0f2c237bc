//! Reading what was: a key or a range at a revision, and who changed what.

use std::io;

use proto::keys;

use super::{
    Lane, Place, Read, Record, Row, Table, Version, VersionHead, decode, decode_head, floor,
    folders_of_prefix, journal_key, place_of, prefix_end, rows::damaged, version_key, version_of,
};

/// Rows of the Journal that are read at once.
const JOURNAL_ROWS: usize = 256;
/// Rows of the Journal that one question looks at; the answer says where to go on.
const JOURNAL_ROWS_MAX: usize = 10_000;
/// Versions that are read at once.
const VERSION_ROWS: usize = 16;
/// Bytes of one answer, about: it is to fit into one message.
pub(crate) const ANSWER_BYTES: usize = 3 << 20;

/// One write of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) key: String,
    pub(crate) revision: u64,
    pub(crate) version: Version,
}

/// What a key was at a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum At {
    Was(Version, u64),
    Absent,
    /// It is not known any more; everything from this revision on is.
    Compacted(u64),
}

/// A key's last version that is kept, and its revision.
pub(crate) fn newest(read: &impl Read, key: &str) -> io::Result<Option<(u64, VersionHead)>> {
    let Some((row, bytes)) = row_before(read, key, u64::MAX)? else { return Ok(None) };
    Ok(Some((version_of(&row)?.1, decode_head(&bytes)?)))
}

fn version_before(read: &impl Read, key: &str, before: u64) -> io::Result<Option<(u64, Version)>> {
    let Some((row, bytes)) = row_before(read, key, before)? else { return Ok(None) };
    let revision = version_of(&row)?.1;
    Ok(Some((revision, whole(read, key, revision, &bytes)?)))
}

/// A version with its value.
fn whole(read: &impl Read, key: &str, revision: u64, row: &[u8]) -> io::Result<Version> {
    let version: Version = decode(row)?;
    if !version.is_in_data() {
        return Ok(version);
    }
    let row = read.get(Table::Data, key.as_bytes())?;
    match row.map(|row| decode(&row)).transpose()? {
        Some(Record { value, mod_revision, .. }) if mod_revision == revision => {
            Ok(Version { value: Some(value), ..version })
        }
        _ => Err(damaged("a version's value is missing")),
    }
}

fn row_before(read: &impl Read, key: &str, before: u64) -> io::Result<Option<Row>> {
    let (from, to) = (version_key(key, 0), version_key(key, before));
    Ok(read.scan_back(Table::Versions, &from, &to, 1)?.pop())
}

/// A key as it was right after a revision.
pub(crate) fn get_at(read: &impl Read, key: &str, revision: u64) -> io::Result<At> {
    if let Some((found, version)) = version_before(read, key, revision.saturating_add(1))? {
        // Below the floor as well: a key's kept versions have no gap.
        let deleted = version.value.is_none();
        return Ok(if deleted { At::Absent } else { At::Was(version, found) });
    }
    let floor = floor(read, Lane::of(key))?;
    Ok(if revision >= floor { At::Absent } else { At::Compacted(floor) })
}

/// The first revision from which the history of all keys with a prefix is whole.
pub(crate) fn floor_of_prefix(read: &impl Read, prefix: &str) -> io::Result<u64> {
    let mut highest = 1;
    for (lane, _) in folders_of_prefix(prefix) {
        highest = highest.max(floor(read, lane)?);
    }
    Ok(highest)
}

/// Keys with a prefix after `after`, as they were right after a revision, without those of `priv/`;
/// and whether there are more: than `limit`, or than fit into one answer. The revision is not below [`floor_of_prefix`].
pub(crate) fn range_at(
    read: &impl Read,
    prefix: &str,
    after: &str,
    limit: usize,
    revision: u64,
) -> io::Result<(Vec<Written>, bool)> {
    let (mut found, mut bytes) = (Vec::new(), 0);
    let end = prefix_end(prefix.as_bytes());
    let mut from = if after > prefix { past(after) } else { prefix.as_bytes().to_vec() };
    loop {
        let first = read.scan(Table::Versions, &from, end.as_deref(), 1)?;
        let Some((row, _)) = first.first() else { return Ok((found, false)) };
        let (key, _) = version_of(row)?;
        if Lane::of(key) == Lane::Private {
            match prefix_end(keys::PRIV.as_bytes()) {
                Some(next) => from = next,
                None => return Ok((found, false)),
            }
            continue;
        }
        let was = version_before(read, key, revision.saturating_add(1))?;
        if let Some((revision, version)) = was.filter(|(_, version)| version.value.is_some()) {
            if found.len() == limit || bytes > ANSWER_BYTES {
                return Ok((found, true));
            }
            let written = Written { key: key.to_owned(), revision, version };
            bytes += size(&written);
            found.push(written);
        }
        from = past(key);
    }
}

/// After all rows of a key.
fn past(key: &str) -> Vec<u8> {
    [key.as_bytes(), &[1]].concat()
}

/// Changes, the newest first, in whole revisions.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    pub(crate) changes: Vec<Written>,
    /// Ask again before this revision for older ones; None: these are all.
    pub(crate) next_before: Option<u64>,
}

/// Who changed what before a revision: one key (`exact`), or all keys with a prefix but those of
/// `priv/`. About `limit` at most; fewer where the answer would be too large or took too long.
pub(crate) fn changes(
    read: &impl Read,
    prefix: &str,
    exact: bool,
    before: u64,
    limit: usize,
) -> io::Result<Changes> {
    if exact {
        changes_of_key(read, prefix, before, limit)
    } else {
        changes_under(read, prefix, before, limit)
    }
}

fn changes_of_key(
    read: &impl Read,
    key: &str,
    mut before: u64,
    limit: usize,
) -> io::Result<Changes> {
    let mut page = Page::new(limit);
    loop {
        let (from, to) = (version_key(key, 0), version_key(key, before));
        let rows = read.scan_back(Table::Versions, &from, &to, VERSION_ROWS)?;
        let all = rows.len() < VERSION_ROWS;
        for (row, bytes) in rows {
            let revision = version_of(&row)?.1;
            let version = whole(read, key, revision, &bytes)?;
            if !page.take(vec![Written { key: key.to_owned(), revision, version }]) {
                return Ok(page.end(Some(revision + 1)));
            }
            before = revision;
        }
        if all {
            return Ok(page.end(None));
        }
    }
}

fn changes_under(
    read: &impl Read,
    prefix: &str,
    mut before: u64,
    limit: usize,
) -> io::Result<Changes> {
    let folders: Vec<&str> = folders_of_prefix(prefix).into_iter().map(|(_, f)| f).collect();
    let (mut page, mut looked) = (Page::new(limit), 0);
    loop {
        let (rows, rest) = journal(read, &folders, Span::Before(before), JOURNAL_ROWS)?;
        looked += rows.len();
        for revision in rows.chunk_by(|one, other| one.0.revision == other.0.revision) {
            let mut written = Vec::new();
            for (place, key) in revision.iter().filter(|(_, key)| key.starts_with(prefix)) {
                written.push(written_at(read, key, place.revision)?);
            }
            let Some((place, _)) = revision.first() else { continue };
            if !page.take(written) {
                return Ok(page.end(Some(place.revision + 1)));
            }
        }
        match rest {
            None => return Ok(page.end(None)),
            Some(next) if looked >= JOURNAL_ROWS_MAX => return Ok(page.end(Some(next))),
            Some(next) => before = next,
        }
    }
}

/// The version that a row of the Journal tells of.
pub(crate) fn written_at(read: &impl Read, key: &str, revision: u64) -> io::Result<Written> {
    let version = whole(read, key, revision, &row_at(read, key, revision)?)?;
    Ok(Written { key: key.to_owned(), revision, version })
}

/// When that version was written, by its proposer's clock.
pub(crate) fn written_at_ms(read: &impl Read, key: &str, revision: u64) -> io::Result<u64> {
    Ok(decode_head(&row_at(read, key, revision)?)?.at_ms)
}

fn row_at(read: &impl Read, key: &str, revision: u64) -> io::Result<Vec<u8>> {
    let row = read.get(Table::Versions, &version_key(key, revision))?;
    row.ok_or_else(|| damaged("a version is missing"))
}

fn size(written: &Written) -> usize {
    written.key.len() + written.version.value.as_ref().map_or(0, Vec::len)
}

/// An answer that is being filled.
struct Page {
    found: Vec<Written>,
    bytes: usize,
    limit: usize,
}

impl Page {
    fn new(limit: usize) -> Self {
        Self { found: Vec::new(), bytes: 0, limit }
    }

    /// Takes a revision's changes, if there is room; the first ones always.
    fn take(&mut self, written: Vec<Written>) -> bool {
        let bytes: usize = written.iter().map(size).sum();
        let full =
            self.found.len() + written.len() > self.limit || self.bytes + bytes > ANSWER_BYTES;
        if full && !self.found.is_empty() && !written.is_empty() {
            return false;
        }
        self.bytes += bytes;
        self.found.extend(written);
        true
    }

    fn end(self, next_before: Option<u64>) -> Changes {
        Changes { changes: self.found, next_before }
    }
}

/// Which part of the Journal, and in which direction it is read.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Span {
    /// From this revision on, the oldest first.
    From(u64),
    /// Before this revision, the newest first.
    Before(u64),
}

/// Rows of some folders' parts of the Journal: whole revisions, about `limit` rows at most (one
/// revision may have more), and the span's bound for the rest; None: there is no more.
pub(crate) fn journal(
    read: &impl Read,
    folders: &[&str],
    span: Span,
    limit: usize,
) -> io::Result<(Vec<JournalRow>, Option<u64>)> {
    let (from, to, back) = match span {
        Span::From(from) => (from, u64::MAX, false),
        Span::Before(before) => (0, before, true),
    };
    let mut rows = journal_rows(read, folders, (from, to), back, limit)?;
    let (Some((first, _)), Some((last, _))) = (rows.first(), rows.last()) else {
        return Ok((rows, None));
    };
    let (first, last) = (first.revision, last.revision);
    if rows.len() < limit {
        return Ok((rows, None));
    }
    if first == last {
        // One revision fills the page: all of it.
        rows = journal_rows(read, folders, (first, first + 1), back, usize::MAX)?;
        return Ok((rows, Some(if back { first } else { first + 1 })));
    }
    // The last revision may not be complete.
    rows.retain(|(at, _)| at.revision != last);
    Ok((rows, Some(if back { last + 1 } else { last })))
}

/// A write's place, and the key that was written.
pub(crate) type JournalRow = (Place, String);

/// The first `limit` rows of `from <= revision < to`, whatever revision they end in.
fn journal_rows(
    read: &impl Read,
    folders: &[&str],
    (from, to): (u64, u64),
    back: bool,
    limit: usize,
) -> io::Result<Vec<JournalRow>> {
    let mut rows = Vec::new();
    for folder in folders {
        let bound = |revision| journal_key(folder, Place::first_of(revision));
        let (from, to) = (bound(from), bound(to));
        let found = if back {
            read.scan_back(Table::Journal, &from, &to, limit)?
        } else {
            read.scan(Table::Journal, &from, Some(&to), limit)?
        };
        for (row, key) in found {
            rows.push((place_of(&row)?, String::from_utf8_lossy(&key).into_owned()));
        }
    }
    rows.sort_unstable_by_key(|(at, _)| *at);
    if back {
        rows.reverse();
    }
    rows.truncate(limit);
    Ok(rows)
}
