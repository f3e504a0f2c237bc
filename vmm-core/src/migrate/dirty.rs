//! Sets of guest pages, as bitmaps: one bit a page, region by region.

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use crate::memory::{GuestMemory, PAGE_SIZE};

/// Neighbouring pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageRun {
    /// Guest frame number of the first: guest-physical address / [`PAGE_SIZE`].
    pub first: u64,
    /// How many pages.
    pub count: u64,
}

impl PageRun {
    /// The frame number after the last page; saturates.
    #[must_use]
    pub fn end(self) -> u64 {
        self.first.saturating_add(self.count)
    }
}

/// One memory region's bitmap.
///
/// Invariant: `words.len() == pages.div_ceil(64)`, and no bit at or beyond `pages` is set.
#[derive(Debug, Clone, PartialEq, Eq)]
struct RegionBitmap {
    first: u64,
    pages: u64,
    words: Vec<u64>,
}

/// A set of guest pages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DirtyPages {
    regions: Vec<RegionBitmap>,
}

impl DirtyPages {
    /// Adds the bitmap of a region of `pages` pages whose first is frame `first`: bit `i` of word `w`
    /// is page `64 w + i`, as KVM's log and [`vm_memory::bitmap::AtomicBitmap`] have it. Words that are missing
    /// count as clean; bits beyond the region are dropped. A region that is there already (same `first`
    /// and size) is merged. Regions must not overlap otherwise.
    pub fn add_region(&mut self, first: u64, pages: u64, mut words: Vec<u64>) {
        words.resize(usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX), 0);
        if let (Some(last), tail @ 1..) = (words.last_mut(), pages % 64) {
            *last &= (1 << tail) - 1;
        }
        let same = |region: &&mut RegionBitmap| region.first == first && region.pages == pages;
        match self.regions.iter_mut().find(same) {
            Some(region) => {
                for (mine, new) in region.words.iter_mut().zip(words) {
                    *mine |= new;
                }
            }
            None => self.regions.push(RegionBitmap { first, pages, words }),
        }
    }

    /// Every page of `memory`.
    #[must_use]
    pub fn all(memory: &GuestMemory) -> Self {
        let mut all = Self::default();
        for region in memory.iter() {
            let pages = region.len() / PAGE_SIZE;
            let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
            all.add_region(
                region.start_addr().raw_value() / PAGE_SIZE,
                pages,
                vec![u64::MAX; words],
            );
        }
        all
    }

    /// The pages that the VMM itself wrote through vm-memory since this was last called, and forgets
    /// them. vm-memory marks a page after it wrote, so a write that races with this is seen now or next time.
    #[must_use]
    pub fn take_vmm_writes(memory: &GuestMemory) -> Self {
        let mut dirty = Self::default();
        for region in memory.iter() {
            let words = MmapRegion::bitmap(region).get_and_reset();
            let first = region.start_addr().raw_value() / PAGE_SIZE;
            dirty.add_region(first, region.len() / PAGE_SIZE, words);
        }
        dirty
    }

    /// Adds all pages of `other`.
    pub fn merge(&mut self, other: Self) {
        for RegionBitmap { first, pages, words } in other.regions {
            self.add_region(first, pages, words);
        }
    }

    /// How many pages.
    #[must_use]
    pub fn count(&self) -> u64 {
        let ones = |word: &u64| u64::from(word.count_ones());
        self.regions.iter().flat_map(|region| &region.words).map(ones).sum()
    }

    /// How many bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.count().saturating_mul(PAGE_SIZE)
    }

    /// Whether the page is in the set.
    #[must_use]
    pub fn contains(&self, frame: u64) -> bool {
        self.regions.iter().any(|region| {
            let offset = frame.checked_sub(region.first).filter(|offset| *offset < region.pages);
            let word = |offset: u64| {
                usize::try_from(offset / 64).ok().and_then(|word| region.words.get(word))
            };
            offset.is_some_and(|offset| {
                word(offset).is_some_and(|word| word >> (offset % 64) & 1 == 1)
            })
        })
    }

    /// The set as maximal runs, region by region, rising within each.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        self.regions.iter().flat_map(|region| Runs { region, next: 0 })
    }
}

/// The runs of one region from page `next` on.
struct Runs<'a> {
    region: &'a RegionBitmap,
    next: u64,
}

impl Runs<'_> {
    /// The first page at or after `from` whose bit is `set`; the region's size if there is none.
    fn find_bit(&self, from: u64, set: bool) -> u64 {
        let mut at = from;
        while at < self.region.pages {
            let Some(word) = usize::try_from(at / 64).ok().and_then(|w| self.region.words.get(w))
            else {
                break;
            };
            let wanted = if set { *word } else { !*word } >> (at % 64);
            if wanted != 0 {
                return (at + u64::from(wanted.trailing_zeros())).min(self.region.pages);
            }
            at = (at / 64 + 1) * 64;
        }
        self.region.pages
    }
}

impl Iterator for Runs<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        let begin = self.find_bit(self.next, true);
        if begin >= self.region.pages {
            return None;
        }
        self.next = self.find_bit(begin, false);
        Some(PageRun { first: self.region.first + begin, count: self.next - begin })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    proptest! {
        #[test]
        fn runs_are_the_set_bits(pages in 0..300_u64, words in proptest::collection::vec(any::<u64>(), 0..6)) {
            let mut dirty = DirtyPages::default();
            dirty.add_region(1000, pages, words.clone());
            let is_set = |page: u64| usize::try_from(page / 64).ok().and_then(|word| words.get(word)).is_some_and(|word| word >> (page % 64) & 1 == 1);
            let expected: Vec<u64> = (0..pages).filter(|page| is_set(*page)).map(|page| 1000 + page).collect();
            let found: Vec<u64> = dirty.runs().flat_map(|run| run.first..run.end()).collect();
            prop_assert_eq!(dirty.count(), expected.len() as u64);
            prop_assert!((0..pages).all(|page| dirty.contains(1000 + page) == is_set(page)));
            prop_assert_eq!(found, expected);
            let runs: Vec<PageRun> = dirty.runs().collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].first), "runs are maximal");
        }
    }

    #[test]
    fn the_vmms_own_writes_are_seen_once() {
        let ranges = [(GuestAddress(0), 0x4000), (GuestAddress(0x10_0000), 0x4000)];
        let memory = GuestMemory::from_ranges(&ranges).unwrap();
        memory.write_slice(&[1; 2], GuestAddress(0x1fff)).unwrap();
        memory.write_slice(&[1; 2], GuestAddress(0x10_3000)).unwrap();
        let runs: Vec<PageRun> = DirtyPages::take_vmm_writes(&memory).runs().collect();
        assert_eq!(runs, [PageRun { first: 1, count: 2 }, PageRun { first: 0x103, count: 1 }]);
        assert_eq!(DirtyPages::take_vmm_writes(&memory).count(), 0);
        assert_eq!(DirtyPages::all(&memory).count(), 8);
    }

    #[test]
    fn merging_is_a_union() {
        let mut dirty = DirtyPages::default();
        dirty.add_region(0, 3, vec![0b001]);
        let mut other = DirtyPages::default();
        other.add_region(0, 3, vec![0b1100]);
        dirty.merge(other);
        assert_eq!(dirty.runs().map(|run| run.first).collect::<Vec<_>>(), [0, 2]);
    }
}
