//! Which pages of guest memory were never touched, from `/proc/self/pagemap` (proc_pid_pagemap(5)).
//!
//! A page of private anonymous memory that is neither present nor swapped reads as zero; knowing that without
//! reading it saves a page fault each, and the memory that the fault would take.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use super::{DirtyPages, PAGE_SIZE};
use crate::memory::GuestMemory;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const ENTRY_BYTES: usize = 8;
/// Pages that are looked up in one read.
const CHUNK_PAGES: usize = 8192;

/// An open `/proc/self/pagemap`. A jailed process opens it before it gives up its privileges.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens this process's page map.
    ///
    /// # Errors
    /// Whatever open says. Migration works without it, more slowly for memory that was never used.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// The pages of `memory` that were never touched (or were given back) when they were looked at. Regions
    /// that are not private anonymous memory have none. A page that is touched meanwhile may be among them.
    ///
    /// # Errors
    /// Whatever reading says.
    pub(crate) fn untouched(&self, memory: &GuestMemory) -> io::Result<DirtyPages> {
        let mut untouched = DirtyPages::default();
        for region in memory.iter().filter(|region| is_private_anonymous(region)) {
            let pages = region.len() / PAGE_SIZE;
            let first = region.start_addr().raw_value() / PAGE_SIZE;
            let words = self.untouched_words(region.as_ptr().addr() as u64 / PAGE_SIZE, pages)?;
            untouched.add_region(first, pages, words);
        }
        Ok(untouched)
    }

    fn untouched_words(&self, virtual_page: u64, pages: u64) -> io::Result<Vec<u64>> {
        let mut words = Vec::new();
        let mut buffer = vec![0; CHUNK_PAGES * ENTRY_BYTES];
        let mut done = 0;
        while done < pages {
            let count = usize::try_from(pages - done).unwrap_or(usize::MAX).min(CHUNK_PAGES);
            let entries = &mut buffer[..count * ENTRY_BYTES];
            self.0.read_exact_at(entries, (virtual_page + done) * ENTRY_BYTES as u64)?;
            let (entries, _) = entries.as_chunks::<ENTRY_BYTES>();
            words.extend(entries.chunks(64).map(|chunk| {
                chunk.iter().rev().fold(0_u64, |word, entry| {
                    let untouched = u64::from_ne_bytes(*entry) & (PRESENT | SWAPPED) == 0;
                    word << 1 | u64::from(untouched)
                })
            }));
            done += count as u64;
        }
        Ok(words)
    }
}

fn is_private_anonymous<B: vm_memory::bitmap::Bitmap>(region: &MmapRegion<B>) -> bool {
    let wanted = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    region.file_offset().is_none()
        && region.is_hugetlbfs() != Some(true)
        && region.flags() & wanted == wanted
        && region.flags() & libc::MAP_HUGETLB == 0
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn touched_pages_are_told_from_untouched_ones() {
        let ranges = [(GuestAddress(0), 200 << 12), (GuestAddress(1 << 30), 64 << 12)];
        let memory = GuestMemory::from_ranges(&ranges).unwrap();
        for frame in [3, 64, 199, (1 << 18) + 5] {
            memory.write_obj(1_u8, GuestAddress(frame << 12)).unwrap();
        }
        let untouched = Pagemap::open().unwrap().untouched(&memory).unwrap();
        for frame in [3, 64, 199, (1 << 18) + 5] {
            assert!(!untouched.contains(frame), "{frame}");
        }
        // Huge pages may touch neighbours, so only the sum can be checked.
        assert!(untouched.count() <= 260);
        let fresh = GuestMemory::from_ranges(&ranges).unwrap();
        assert_eq!(Pagemap::open().unwrap().untouched(&fresh).unwrap().count(), 264);
    }
}
