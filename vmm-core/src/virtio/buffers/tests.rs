use std::io::{Seek, Write};
use std::os::fd::AsRawFd;

use vm_memory::GuestMemoryBackend as _;
use vm_memory::GuestMemoryRegion as _;

use vm_memory::bitmap::Bitmap as _;

use super::*;

fn memory() -> GuestMemory {
    // Two regions that touch: a range across them is two slices.
    GuestMemory::from_ranges(&[(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x4000)]).unwrap()
}

fn buffers(parts: &[(u64, usize)]) -> Buffers {
    let mut buffers = Buffers::default();
    for (address, length) in parts {
        buffers.push(GuestAddress(*address), *length);
    }
    buffers
}

fn dirty_pages(memory: &GuestMemory) -> Vec<u64> {
    let regions = memory.iter();
    let pages = regions.flat_map(|region| {
        let start = region.start_addr().0;
        let bitmap = region.bitmap();
        (0..region.len()).step_by(0x1000).filter_map(move |offset| {
            bitmap.dirty_at(usize::try_from(offset).unwrap()).then_some(start + offset)
        })
    });
    pages.collect()
}

#[test]
fn streams_are_cut_where_asked() {
    let memory = memory();
    let mut stream = buffers(&[(0x100, 3), (0x200, 0), (0x3ffe, 4)]);
    stream.write(&memory, b"ab").unwrap();
    stream.clone().write(&memory, b"cdefg").unwrap();
    assert_eq!(stream.take(6), Err(BuffersError::TooShort));
    assert_eq!(stream.take_last_byte(), Ok(GuestAddress(0x4001)));
    let mut read = [0; 4];
    stream.read(&memory, &mut read).unwrap();
    assert_eq!(&read, b"cdef");
    assert!(stream.is_empty());
    assert_eq!(stream.take_last_byte(), Err(BuffersError::TooShort));
    let mut outside = buffers(&[(0x7fff, 2)]);
    assert_eq!(outside.write(&memory, b"xy"), Err(BuffersError::Outside));
}

#[test]
fn file_reads_mark_exactly_the_pages_they_fill() {
    let memory = memory();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[7; 0x2100]).unwrap();
    file.rewind().unwrap();
    let target = buffers(&[(0x1000, 0x10), (0x3800, 0x1000)]);
    target.fill_from_file(&memory, file.as_raw_fd(), 0x100).unwrap();
    assert_eq!(dirty_pages(&memory), [0x1000, 0x3000, 0x4000]);
    let mut bytes = [0; 0x1000];
    memory.read_slice(&mut bytes, GuestAddress(0x3800)).unwrap();
    assert_eq!(bytes, [7; 0x1000]);

    let early_end = target.fill_from_file(&memory, file.as_raw_fd(), 0x2000);
    assert_eq!(early_end.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    let outside = buffers(&[(0, 0x10), (0x7000, 0x1001)]);
    let error = outside.fill_from_file(&memory, file.as_raw_fd(), 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    assert!(!dirty_pages(&memory).contains(&0), "nothing is read when a part is outside");
}

#[test]
fn file_writes_ask_first_and_leave_memory_clean() {
    let memory = memory();
    memory.write_slice(b"hello", GuestAddress(0x3ffd)).unwrap();
    let before = dirty_pages(&memory);
    let file = tempfile::tempfile().unwrap();
    let clean = buffers(&[(0x1000, 8), (0x6000, 8)]);
    clean.write_to_file(&memory, file.as_raw_fd(), 0, || Ok(())).unwrap();
    let file = tempfile::tempfile().unwrap();
    let source = buffers(&[(0x3ffd, 5)]);
    source.write_to_file(&memory, file.as_raw_fd(), 3, || Ok(())).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 8);
    let refused = source.write_to_file(&memory, file.as_raw_fd(), 100, || {
        Err(io::ErrorKind::PermissionDenied.into())
    });
    assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(file.metadata().unwrap().len(), 8);
    assert_eq!(dirty_pages(&memory), before);
}

#[test]
fn a_long_write_asks_again_and_again() {
    let memory = memory();
    let file = tempfile::tempfile().unwrap();
    let source = buffers(&vec![(0, 0x8000); 400]);
    let mut asked = 0;
    let count = || {
        asked += 1;
        if asked == 3 { Err(io::ErrorKind::PermissionDenied.into()) } else { Ok(()) }
    };
    let refused = source.write_to_file(&memory, file.as_raw_fd(), 0, count).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(file.metadata().unwrap().len(), 2 * MAX_CALL_BYTES as u64);
    source.write_to_file(&memory, file.as_raw_fd(), 0, || Ok(())).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 400 * 0x8000);
}
