//! The end of the log in memory: what was just appended is read again at once, to be sent to the
//! followers and to be applied.

use std::collections::VecDeque;

use super::types::Entry;

/// Entries and bytes that are kept.
const ENTRIES_MAX: usize = 4096;
const BYTES_MAX: usize = 8 << 20;

/// The last entries without a gap, up to the log's end; or none.
#[derive(Debug, Default)]
pub(super) struct LogCache {
    /// Each with its size as it is stored, bytes.
    entries: VecDeque<(Entry, usize)>,
    bytes: usize,
}

impl LogCache {
    /// Takes an entry that was appended to the log.
    pub(super) fn push(&mut self, entry: Entry, size: usize) {
        let follows = |(last, _): &(Entry, usize)| last.log_id.index + 1 == entry.log_id.index;
        if !self.entries.back().is_none_or(follows) {
            self.clear();
        }
        self.bytes += size;
        self.entries.push_back((entry, size));
        while self.entries.len() > ENTRIES_MAX || self.bytes > BYTES_MAX {
            let Some((_, size)) = self.entries.pop_front() else { return };
            self.bytes -= size;
        }
    }

    /// The log ends before this index from now on.
    pub(super) fn truncate(&mut self, from: u64) {
        while self.entries.pop_back_if(|(last, _)| last.log_id.index >= from).is_some() {}
        self.bytes = self.entries.iter().map(|(_, size)| size).sum();
    }

    /// The log begins at this index from now on.
    pub(super) fn purge(&mut self, to: u64) {
        while self.entries.pop_front_if(|(first, _)| first.log_id.index < to).is_some() {}
        self.bytes = self.entries.iter().map(|(_, size)| size).sum();
    }

    /// Forgets all.
    fn clear(&mut self) {
        self.entries.clear();
        self.bytes = 0;
    }

    /// The log's entries `from..to`, ending early after `max_bytes`, but not before the first one;
    /// `None`: not all of them are here.
    pub(super) fn read(&self, from: u64, to: u64, max_bytes: usize) -> Option<Vec<Entry>> {
        let first = self.entries.front()?.0.log_id.index;
        let skip = usize::try_from(from.checked_sub(first)?).ok()?;
        let (mut found, mut bytes) = (Vec::new(), 0);
        for (entry, size) in self.entries.iter().skip(skip) {
            if entry.log_id.index >= to || (bytes > 0 && bytes + size > max_bytes) {
                break;
            }
            bytes += size;
            found.push(entry.clone());
        }
        Some(found)
    }
}

#[cfg(test)]
mod tests {
    use openraft::EntryPayload;
    use openraft::entry::RaftEntry;
    use openraft::testing::log_id;

    use super::super::types::TypeConfig;
    use super::*;

    fn entry(index: u64) -> Entry {
        RaftEntry::new(log_id::<TypeConfig>(1, 0, index), EntryPayload::Blank)
    }

    fn indices(read: Option<Vec<Entry>>) -> Option<Vec<u64>> {
        Some(read?.iter().map(|entry| entry.log_id.index).collect())
    }

    #[test]
    fn it_answers_for_the_logs_end_alone() {
        let mut cache = LogCache::default();
        assert_eq!(cache.read(0, 9, usize::MAX), None);
        (5..9).for_each(|index| cache.push(entry(index), 10));
        assert_eq!(cache.read(4, 9, usize::MAX), None);
        assert_eq!(indices(cache.read(5, 7, usize::MAX)), Some(vec![5, 6]));
        assert_eq!(indices(cache.read(6, 99, usize::MAX)), Some(vec![6, 7, 8]));
        assert_eq!(indices(cache.read(9, 99, usize::MAX)), Some(vec![]));
        assert_eq!(indices(cache.read(5, 9, 25)), Some(vec![5, 6]));
        assert_eq!(indices(cache.read(5, 9, 1)), Some(vec![5]), "at least one");
        cache.truncate(7);
        assert_eq!(indices(cache.read(5, 99, usize::MAX)), Some(vec![5, 6]));
        assert_eq!(cache.bytes, 20);
        cache.purge(6);
        assert_eq!(cache.read(5, 99, usize::MAX), None);
        assert_eq!(indices(cache.read(6, 99, usize::MAX)), Some(vec![6]));
        assert_eq!(cache.bytes, 10);
        // The log went on elsewhere (a snapshot was installed).
        cache.push(entry(70), 10);
        assert_eq!(cache.read(6, 7, usize::MAX), None);
        assert_eq!(indices(cache.read(70, 71, usize::MAX)), Some(vec![70]));
        cache.truncate(3);
        assert_eq!(cache.read(3, 4, usize::MAX), None);
    }

    #[test]
    fn it_is_bounded() {
        let mut cache = LogCache::default();
        (0..10_000).for_each(|index| cache.push(entry(index), 100));
        assert_eq!(cache.entries.len(), ENTRIES_MAX);
        (10_000..10_100).for_each(|index| cache.push(entry(index), 1 << 20));
        assert!(cache.bytes <= BYTES_MAX && cache.entries.len() == 8);
        assert_eq!(cache.read(10_091, 10_092, usize::MAX), None);
        assert_eq!(indices(cache.read(10_099, 10_100, 1)), Some(vec![10_099]));
    }
}
