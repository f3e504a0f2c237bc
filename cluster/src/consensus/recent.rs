//! The last changes in memory, shared by all watches of this node: each looks on from its own
//! revision, so there is no queue per watch, and one that is slow goes on in the database.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{PoisonError, RwLock};

use crate::machine::{Changes, Record, Table, Version, Written, decode, version_of};

/// Revisions and bytes that are kept here.
const REVISIONS_MAX: usize = 2048;
const BYTES_MAX: usize = 16 << 20;

/// Whole revisions without a gap, up to the last one that was applied.
#[derive(Debug)]
pub(crate) struct Recent {
    inner: RwLock<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// The revision of the first entry, or the next one where there is none.
    first: u64,
    revisions: VecDeque<Vec<Written>>,
    bytes: usize,
}

/// What there is from a revision on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// The first revision with something wanted.
    Found(Vec<Written>),
    /// Nothing, up to and with this revision.
    Nothing(u64),
    /// It is longer ago.
    Older,
}

impl Recent {
    /// After a revision.
    pub(super) fn new(last: u64) -> Self {
        let inner = Inner { first: last + 1, revisions: VecDeque::new(), bytes: 0 };
        Self { inner: RwLock::new(inner) }
    }

    /// Forgets all; the next one comes after this revision.
    pub(super) fn reset(&self, last: u64) {
        *self.inner.write().unwrap_or_else(PoisonError::into_inner) =
            Self::new(last).inner.into_inner().unwrap_or_else(PoisonError::into_inner);
    }

    /// Takes what a batch of entries changed.
    pub(super) fn add(&self, changes: &Changes, last: u64) -> io::Result<()> {
        let mut revisions: BTreeMap<u64, Vec<Written>> = BTreeMap::new();
        let next = self.inner.read().unwrap_or_else(PoisonError::into_inner).next();
        for (row, value) in changes.of(Table::Versions) {
            let Some(value) = value else {
                // Compaction. It may have removed what the same batch wrote.
                self.reset(last);
                return Ok(());
            };
            let (key, revision) = version_of(row)?;
            if revision < next {
                // Known; it is no longer its key's latest version.
                continue;
            }
            let mut version: Version = decode(value)?;
            if version.is_in_data() {
                let row = changes.of(Table::Data).get(key.as_bytes()).and_then(Option::as_ref);
                let record = row.map(|row| decode::<Record>(row)).transpose()?;
                let Some(record) = record.filter(|record| record.mod_revision == revision) else {
                    // It is to be found in the database, if anywhere.
                    self.reset(last);
                    return Ok(());
                };
                version.value = Some(record.value);
            }
            let written = Written { key: key.to_owned(), revision, version };
            revisions.entry(revision).or_default().push(written);
        }
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        for (_, mut written) in revisions {
            written.sort_unstable_by_key(|one| one.version.head.position);
            inner.push(written);
        }
        if inner.next() != last + 1 {
            drop(inner);
            self.reset(last);
        }
        Ok(())
    }

    /// Looks on from a revision.
    pub(crate) fn look(&self, from: u64, wanted: impl Fn(&str) -> bool) -> Look {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let Some(skip) = from.checked_sub(inner.first) else { return Look::Older };
        let skip = usize::try_from(skip).unwrap_or(usize::MAX).min(inner.revisions.len());
        for written in inner.revisions.range(skip..) {
            let found: Vec<Written> =
                written.iter().filter(|one| wanted(&one.key)).cloned().collect();
            if !found.is_empty() {
                return Look::Found(found);
            }
        }
        Look::Nothing(inner.next() - 1)
    }
}

fn bytes_of(written: &[Written]) -> usize {
    let one = |one: &Written| one.key.len() + one.version.value.as_ref().map_or(0, Vec::len) + 128;
    written.iter().map(one).sum()
}

impl Inner {
    fn next(&self) -> u64 {
        self.first + self.revisions.len() as u64
    }

    fn push(&mut self, written: Vec<Written>) {
        self.bytes += bytes_of(&written);
        self.revisions.push_back(written);
        while self.revisions.len() > REVISIONS_MAX || self.bytes > BYTES_MAX {
            let Some(oldest) = self.revisions.pop_front() else { return };
            self.bytes -= bytes_of(&oldest);
            self.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Version, VersionHead, encode, version_key};

    fn change(revision: u64, key: &str, size: usize) -> io::Result<Changes> {
        let head = VersionHead {
            deleted: false,
            create_revision: revision,
            previous_revision: 0,
            ordinal: 1,
            position: 0,
            author: String::new(),
            at_ms: 0,
        };
        let version = Version { head, value: Some(vec![0; size]) };
        let mut changes = Changes::default();
        changes.set(Table::Versions, &version_key(key, revision), Some(encode(&version)?));
        Ok(changes)
    }

    #[test]
    fn a_value_that_is_in_data_alone_is_found_there() -> io::Result<()> {
        let mut changes = change(11, "a", 1)?;
        let version: Version = decode(&row(&changes, "a", 11)?)?;
        let in_data = encode(&Version { value: None, ..version })?;
        changes.set(Table::Versions, &version_key("a", 11), Some(in_data.clone()));
        let record = Record { create_revision: 11, mod_revision: 11, ordinal: 1, value: vec![7] };
        changes.set(Table::Data, b"a", Some(encode(&record)?));
        // The one before, which the batch wrote anew, is known.
        changes.set(Table::Versions, &version_key("a", 10), Some(in_data));
        let recent = Recent::new(10);
        recent.add(&changes, 11)?;
        let Look::Found(found) = recent.look(11, |_| true) else {
            return Err(io::Error::other("nothing is found"));
        };
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].version.value, Some(vec![7]));
        // It is not there: who wants it reads the database.
        changes.set(Table::Data, b"a", None);
        let recent = Recent::new(10);
        recent.add(&changes, 11)?;
        assert_eq!(recent.look(11, |_| true), Look::Older);
        Ok(())
    }

    fn row(changes: &Changes, key: &str, revision: u64) -> io::Result<Vec<u8>> {
        let row = changes.of(Table::Versions).get(&version_key(key, revision)).cloned().flatten();
        row.ok_or_else(|| io::Error::other("no row"))
    }

    #[test]
    fn it_is_bounded_and_says_what_it_no_longer_has() -> io::Result<()> {
        let recent = Recent::new(10);
        assert_eq!(recent.look(10, |_| true), Look::Older);
        assert_eq!(recent.look(11, |_| true), Look::Nothing(10));
        for revision in 11..=20 {
            recent.add(&change(revision, "a", 4 << 20)?, revision)?;
        }
        assert!(recent.inner.read().is_ok_and(|inner| inner.bytes <= BYTES_MAX));
        assert_eq!(recent.look(11, |_| true), Look::Older);
        assert!(matches!(recent.look(19, |_| true), Look::Found(w) if w[0].revision == 19));
        assert_eq!(recent.look(19, |key| key == "b"), Look::Nothing(20));
        for revision in 21..=5000 {
            recent.add(&change(revision, "b", 1)?, revision)?;
        }
        assert!(recent.inner.read().is_ok_and(|inner| inner.revisions.len() <= REVISIONS_MAX));
        assert!(matches!(recent.look(5000, |_| true), Look::Found(_)));
        // A batch of nothing but compaction.
        let mut gone = Changes::default();
        gone.set(Table::Versions, &version_key("b", 30), None);
        recent.add(&gone, 5000)?;
        assert_eq!(recent.look(5000, |_| true), Look::Older);
        assert_eq!(recent.look(5001, |_| true), Look::Nothing(5000));
        Ok(())
    }
}
