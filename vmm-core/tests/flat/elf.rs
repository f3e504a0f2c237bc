//! A kernel with a PVH entry, byte by byte: an ELF image with three program headers (code, zeros,
//! notes). Tests change bytes of it to make it hostile.

use std::fs::File;
use std::io::Write;

/// Where the code is loaded, and at which byte of it the note says it is entered.
pub(crate) const CODE: u64 = 0x10_0000;
pub(crate) const ENTRY: u64 = CODE + 0x10;
/// Memory that the image wants to be zeros.
pub(crate) const ZEROS: u64 = 0x11_0000;
pub(crate) const ZEROS_BYTES: u64 = 0x3000;

/// Offsets in the file of the notes, and of the code, which is last.
pub(crate) const NOTES: usize = 0x200;
pub(crate) const NOTES_BYTES: usize = 20 + 20;
pub(crate) const CODE_OFFSET: usize = 0x1000;
/// In the second note, which is the one that counts: its sizes, and its value.
pub(crate) const NOTE_NAME_SIZE: usize = NOTES + 20;
pub(crate) const NOTE_SIZE: usize = NOTES + 24;
pub(crate) const NOTE_TYPE: usize = NOTES + 28;
pub(crate) const NOTE_NAME: usize = NOTES + 32;
pub(crate) const NOTE_VALUE: usize = NOTES + 36;

/// Fields of the ELF header.
pub(crate) const E_MACHINE: usize = 18;
pub(crate) const E_PHOFF: usize = 32;
pub(crate) const E_PHENTSIZE: usize = 54;
pub(crate) const E_PHNUM: usize = 56;

/// The file offset of a program header's field.
pub(crate) const fn field(header: usize, field: usize) -> usize {
    64 + 56 * header + field
}
pub(crate) const P_TYPE: usize = 0;
pub(crate) const P_OFFSET: usize = 8;
pub(crate) const P_PADDR: usize = 24;
pub(crate) const P_FILESZ: usize = 32;
pub(crate) const P_MEMSZ: usize = 40;
pub(crate) const P_ALIGN: usize = 48;

pub(crate) fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The image; `code` is entered at its byte 0x10.
pub(crate) fn kernel(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; CODE_OFFSET];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &[2, 0, 62, 0, 1]); // executable, x86-64, version 1
    // The ELF entry is one that the PVH protocol never uses.
    put(&mut image, 24, &CODE.to_le_bytes());
    put(&mut image, E_PHOFF, &64_u64.to_le_bytes());
    put(&mut image, 52, &[64, 0, 56, 0, 3]);
    let length = code.len() as u64;
    for (index, kind, offset, address, file_bytes, bytes) in [
        (0, 1, CODE_OFFSET, CODE, length, length),
        (1, 1, 0, ZEROS, 0, ZEROS_BYTES),
        (2, 4, NOTES, 0, NOTES_BYTES as u64, 0),
    ] {
        put(&mut image, field(index, P_TYPE), &[kind]);
        put(&mut image, field(index, P_OFFSET), &(offset as u64).to_le_bytes());
        put(&mut image, field(index, P_PADDR), &address.to_le_bytes());
        put(&mut image, field(index, P_FILESZ), &file_bytes.to_le_bytes());
        put(&mut image, field(index, P_MEMSZ), &u64::to_le_bytes(bytes));
        put(&mut image, field(index, P_ALIGN), &[4]);
    }
    // Another owner's note of the same type, with a name and a value that are padded.
    put(&mut image, NOTES, &[3, 0, 0, 0, 1, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', 0, 0, 7, 0, 0, 0]);
    put(&mut image, NOTE_NAME_SIZE, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0]);
    put(&mut image, NOTE_VALUE, &ENTRY.to_le_bytes()[..4]);
    image.extend_from_slice(code);
    image
}

pub(crate) fn file(image: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(image).unwrap();
    file
}
