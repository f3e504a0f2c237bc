//! Batches of guest pages: one frame holds records of neighbouring pages, with their bytes or, for
//! zero pages, without.
//!
//! ```text
//! record   first frame number u64 | pages u32 | kind u32 (0 zero, 1 data) | data: pages × 4096 bytes
//! ```

use super::wire::{Fields, HEADER_BYTES, Kind, PAGES_BYTES_MAX, seal};
use super::{PAGE_BYTES as PAGE, PageRun, StreamError};

const RECORD_BYTES: usize = 16;
const KIND_ZERO: u32 = 0;
const KIND_DATA: u32 = 1;
/// A batch is sent when it has this many bytes: 64 full TLS records.
const FULL_BYTES: usize = 1 << 20;
/// … or covers this many pages (256 MiB): a peer must hear something while zero pages are looked through.
const FULL_PAGES: u64 = 1 << 16;
const CAPACITY: usize = HEADER_BYTES + FULL_BYTES + RECORD_BYTES + PAGE;
const _: () = assert!(CAPACITY <= PAGES_BYTES_MAX);

/// The record that the next page may still join.
#[derive(Debug, Clone, Copy)]
struct OpenRecord {
    /// Where its header stands in the buffer.
    at: usize,
    run: PageRun,
    kind: u32,
}

/// A batch being filled. The buffer is allocated once and reused.
pub(crate) struct Batch {
    buffer: Box<[u8]>,
    used: usize,
    open: Option<OpenRecord>,
    pages: u64,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self {
            buffer: vec![0; CAPACITY].into_boxed_slice(),
            used: HEADER_BYTES,
            open: None,
            pages: 0,
        }
    }

    pub(crate) fn clear(&mut self) {
        (self.used, self.open, self.pages) = (HEADER_BYTES, None, 0);
    }

    /// Pages in it, zero pages too.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Whether it must be sent before more is added.
    pub(crate) fn is_full(&self) -> bool {
        self.used >= HEADER_BYTES + FULL_BYTES || self.pages >= FULL_PAGES
    }

    /// Adds one page, whose bytes `fill` writes. Zero pages are recognized here. The batch is not full.
    pub(crate) fn add_page<E>(
        &mut self,
        frame: u64,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let joined = self.joinable(frame, KIND_DATA);
        let at = self.used + if joined.is_some() { 0 } else { RECORD_BYTES };
        let page = &mut self.buffer[at..at + PAGE];
        fill(page)?;
        if is_zero(page) {
            self.add_zero_run(PageRun { first: frame, count: 1 });
            return Ok(());
        }
        self.extend(joined, PageRun { first: frame, count: 1 }, KIND_DATA);
        self.used += PAGE;
        Ok(())
    }

    /// Adds zero pages. The batch is not full.
    pub(crate) fn add_zero_run(&mut self, mut run: PageRun) {
        // A record counts 32 bits of pages: 16 TiB. Memory of that size splits here.
        while run.count > 0 {
            let count = run.count.min(u64::from(u32::MAX));
            let piece = PageRun { first: run.first, count };
            self.extend(self.joinable(run.first, KIND_ZERO), piece, KIND_ZERO);
            run = PageRun { first: run.first + count, count: run.count - count };
        }
    }

    fn joinable(&self, frame: u64, kind: u32) -> Option<OpenRecord> {
        self.open.filter(|open| open.kind == kind && open.run.end() == frame)
    }

    fn extend(&mut self, joined: Option<OpenRecord>, piece: PageRun, kind: u32) {
        let joined = joined.filter(|open| open.run.count + piece.count <= u64::from(u32::MAX));
        let record = match joined {
            Some(OpenRecord { at, run, .. }) => OpenRecord {
                at,
                run: PageRun { first: run.first, count: run.count + piece.count },
                kind,
            },
            None => {
                let at = self.used;
                self.used += RECORD_BYTES;
                OpenRecord { at, run: piece, kind }
            }
        };
        let count = u32::try_from(record.run.count).unwrap_or(u32::MAX);
        let header = &mut self.buffer[record.at..record.at + RECORD_BYTES];
        header[..8].copy_from_slice(&record.run.first.to_le_bytes());
        header[8..12].copy_from_slice(&count.to_le_bytes());
        header[12..].copy_from_slice(&kind.to_le_bytes());
        self.pages += piece.count;
        self.open = Some(record);
    }

    /// The frame to send.
    pub(crate) fn seal(&mut self) -> Result<&[u8], StreamError> {
        seal(Kind::Pages, &mut self.buffer[..self.used])?;
        Ok(&self.buffer[..self.used])
    }
}

/// Whether all bytes are zero. Most pages that are not show it in their first words.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    let (chunks, rest) = page.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |sum, byte| sum | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// One record of a received batch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Record<'a> {
    Zero(PageRun),
    Data(PageRun, &'a [u8]),
}

/// The records of a received batch, in order; ends after the first error.
pub(crate) struct Records<'a>(Fields<'a>);

impl<'a> Records<'a> {
    pub(crate) fn of(payload: &'a [u8]) -> Self {
        Self(Fields(payload))
    }

    fn record(&mut self) -> Result<Record<'a>, StreamError> {
        let (first, count, kind) = (self.0.u64()?, self.0.u32()?, self.0.u32()?);
        let run = PageRun { first, count: u64::from(count) };
        if count == 0 || first.checked_add(run.count).is_none() {
            return Err(StreamError::protocol(format!("{count} pages from page {first:#x}")));
        }
        match kind {
            KIND_ZERO => Ok(Record::Zero(run)),
            KIND_DATA => {
                let bytes = usize::try_from(count).ok().and_then(|count| count.checked_mul(PAGE));
                Ok(Record::Data(run, self.0.bytes(bytes.unwrap_or(usize::MAX))?))
            }
            kind => Err(StreamError::protocol(format!("pages of the unknown kind {kind}"))),
        }
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, StreamError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.0.is_empty() {
            return None;
        }
        let record = self.record();
        if record.is_err() {
            self.0 = Fields(&[]);
        }
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::migrate::PAGE_SIZE;

    fn unpack(batch: &mut Batch) -> (BTreeMap<u64, u8>, usize) {
        let frame = batch.seal().unwrap();
        let mut pages = BTreeMap::new();
        let mut records = 0;
        for record in Records::of(&frame[HEADER_BYTES..]) {
            records += 1;
            match record.unwrap() {
                Record::Zero(run) => pages.extend((run.first..run.end()).map(|frame| (frame, 0))),
                Record::Data(run, data) => {
                    assert_eq!(data.len() as u64, run.count * PAGE_SIZE);
                    pages.extend(
                        (run.first..run.end()).zip(data.chunks(PAGE).map(|page| page[PAGE - 1])),
                    );
                }
            }
        }
        (pages, records)
    }

    proptest! {
        #[test]
        fn what_is_added_is_unpacked(pages in proptest::collection::btree_map(0..400_u64, 0..3_u8, 0..200)) {
            let mut batch = Batch::new();
            for (frame, value) in &pages {
                prop_assert!(!batch.is_full());
                batch.add_page(*frame, |page| {
                    page.fill(0);
                    page[PAGE - 1] = *value;
                    Ok::<_, ()>(())
                }).unwrap();
            }
            prop_assert_eq!(batch.pages(), pages.len() as u64);
            prop_assert_eq!(unpack(&mut batch).0, pages);
        }

        #[test]
        fn garbage_never_panics(garbage in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Records::of(&garbage).count();
        }
    }

    #[test]
    fn neighbours_share_a_record_and_a_full_batch_fits_its_buffer() {
        let mut batch = Batch::new();
        let mut frame = 0;
        while !batch.is_full() {
            batch
                .add_page(frame, |page| {
                    page.fill(1);
                    Ok::<_, ()>(())
                })
                .unwrap();
            frame += 1;
        }
        assert_eq!(unpack(&mut batch).1, 1);
        batch.clear();
        assert!(batch.is_empty());
        frame = 0;
        while !batch.is_full() {
            batch
                .add_page(frame, |page| {
                    page.fill(1);
                    Ok::<_, ()>(())
                })
                .unwrap();
            frame += 2; // a record for each
        }
        assert!(unpack(&mut batch).1 > 200);
        batch.clear();
        batch.add_zero_run(PageRun { first: 5, count: 1 << 33 });
        assert_eq!(batch.pages(), 1 << 33);
    }
}
