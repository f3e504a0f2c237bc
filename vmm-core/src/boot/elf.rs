//! An ELF image of a kernel: first checked as a whole, then loaded.
//!
//! Owns which segments an image may have and where its PVH entry is. Every number in the image is
//! hostile: none is added, allocated or followed before it was compared with the file or with the
//! memory.
//!
//! Facts: the System V ABI, "Object Files"; Xen's public/elfnote.h.

use std::fs::File;
use std::io::{ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use linux_loader::elf::{self, Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::BootError;
use crate::memory::{GuestMemory, layout};

/// Most program headers; a Linux kernel has five.
const HEADERS_MAX: u16 = 64;
/// Most bytes of notes; a Linux kernel has a few hundred.
const NOTES_MAX: u64 = 1 << 20;
/// The note that names the 32-bit entry, and its owner.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const XEN: &[u8] = b"Xen\0";

/// A part of the file and the memory that it is loaded to; `bytes` beyond the file's are zeros.
#[derive(Debug, Clone, Copy)]
struct Segment {
    offset: u64,
    start: u64,
    file_bytes: u64,
    bytes: u64,
}

impl Segment {
    /// Invariant: cannot overflow, see [`segment`].
    fn end(&self) -> u64 {
        self.start + self.bytes
    }
}

/// What there is to load, by rising address.
#[derive(Debug)]
pub(super) struct ElfImage {
    segments: Vec<Segment>,
    entry: u32,
}

impl ElfImage {
    /// Reads the image's headers and notes.
    ///
    /// # Errors
    /// [`BootError`] with what is wrong with them.
    pub(super) fn read(file: &File) -> Result<Self, BootError> {
        let file_bytes = file.metadata().map_err(unreadable)?.len();
        let headers = program_headers(file)?;
        let mut segments = Vec::new();
        for (index, header) in headers.iter().enumerate() {
            if header.p_type == elf::PT_LOAD && header.p_memsz > 0 {
                segments.push(segment(index, header, file_bytes)?);
            }
        }
        segments.sort_unstable_by_key(|segment| segment.start);
        if let Some(pair) = segments.windows(2).find(|pair| pair[0].end() > pair[1].start) {
            let (below, above) = (pair[0].start, pair[1].start);
            let text = format!("its segments at {below:#x} and {above:#x} overlap");
            return Err(BootError::Damaged(text));
        }
        let entry = pvh_entry(file, &headers)?;
        let holds = |segment: &Segment| {
            u64::from(entry).checked_sub(segment.start).is_some_and(|at| at < segment.file_bytes)
        };
        if !segments.iter().any(holds) {
            let text = format!("its PVH entry {entry:#x} lies in none of its segments");
            return Err(BootError::Damaged(text));
        }
        Ok(Self { segments, entry })
    }

    /// Where the PVH protocol enters it.
    pub(super) fn entry(&self) -> u32 {
        self.entry
    }

    /// Address behind the highest segment.
    pub(super) fn end(&self) -> u64 {
        self.segments.last().map_or(0, Segment::end)
    }

    /// Loads it. What was in memory before, say before a reset, is not seen through the segments'
    /// zeros.
    ///
    /// # Errors
    /// [`BootError`] if the file or the memory does not hold a segment.
    pub(super) fn load(&self, mut file: &File, memory: &GuestMemory) -> Result<(), BootError> {
        let written = |source| BootError::Write { what: "kernel", source };
        for segment in &self.segments {
            file.seek(SeekFrom::Start(segment.offset)).map_err(unreadable)?;
            let start = GuestAddress(segment.start);
            memory
                .read_exact_volatile_from(start, &mut file, length(segment.file_bytes)?)
                .map_err(written)?;
            let zeros = [0; 4096];
            let mut at = segment.start + segment.file_bytes;
            while at < segment.end() {
                let part = zeros.len().min(length(segment.end() - at)?);
                memory.write_slice(&zeros[..part], GuestAddress(at)).map_err(written)?;
                at += part as u64;
            }
        }
        Ok(())
    }
}

fn length(bytes: u64) -> Result<usize, BootError> {
    usize::try_from(bytes).map_err(|_| BootError::Damaged(format!("it has {bytes} bytes")))
}

fn unreadable(source: std::io::Error) -> BootError {
    BootError::Read { what: "kernel", source }
}

/// Reads what must be in the file, at an offset that may be anything.
fn read_at(file: &File, bytes: &mut [u8], offset: u64, what: &str) -> Result<(), BootError> {
    file.read_exact_at(bytes, offset).map_err(|source| match source.kind() {
        // The second is what the kernel says of offsets that no file can have.
        ErrorKind::UnexpectedEof | ErrorKind::InvalidInput => {
            BootError::Damaged(format!("the file ends before its {what}"))
        }
        _ => unreadable(source),
    })
}

fn program_headers(file: &File) -> Result<Vec<Elf64_Phdr>, BootError> {
    let mut header = Elf64_Ehdr::default();
    read_at(file, header.as_mut_slice(), 0, "ELF header's end")?;
    let ident = header.e_ident;
    let kind = (ident[elf::EI_CLASS], ident[elf::EI_DATA], header.e_machine);
    if kind != (elf::ELFCLASS64, elf::ELFDATA2LSB, elf::EM_X86_64) {
        return Err(BootError::Unsupported("the ELF image is not one for 64-bit x86 processors"));
    }
    let (count, size) = (header.e_phnum, header.e_phentsize);
    if count > HEADERS_MAX || usize::from(size) != size_of::<Elf64_Phdr>() {
        let text = format!("it has {count} program headers of {size} bytes");
        return Err(BootError::Damaged(text));
    }
    let mut headers = vec![Elf64_Phdr::default(); usize::from(count)];
    let mut offset = header.e_phoff;
    for header in &mut headers {
        read_at(file, header.as_mut_slice(), offset, "program headers' end")?;
        // What was read is behind no file's end, so this stays far from the largest number.
        offset = offset.saturating_add(u64::from(size));
    }
    Ok(headers)
}

fn segment(index: usize, header: &Elf64_Phdr, file_bytes: u64) -> Result<Segment, BootError> {
    let damaged = |text: &str| Err(BootError::Damaged(format!("its segment {index} {text}")));
    let Elf64_Phdr { p_offset, p_paddr, p_filesz, p_memsz, .. } = *header;
    if p_filesz > p_memsz {
        return damaged(&format!("has {p_filesz} bytes in the file, {p_memsz} in memory"));
    }
    if p_offset.checked_add(p_filesz).is_none_or(|end| end > file_bytes) {
        return damaged(&format!("lies beyond the end of the file, which has {file_bytes} bytes"));
    }
    // Below are the boot structures.
    if p_paddr < layout::HIGH_MEMORY {
        return damaged(&format!("wants to be loaded at {p_paddr:#x}, below 1 MiB"));
    }
    if p_paddr.checked_add(p_memsz).is_none() {
        return damaged(&format!("has {p_memsz} bytes from {p_paddr:#x}: no address is so high"));
    }
    Ok(Segment { offset: p_offset, start: p_paddr, file_bytes: p_filesz, bytes: p_memsz })
}

/// Looks through all notes for the PVH entry.
fn pvh_entry(file: &File, headers: &[Elf64_Phdr]) -> Result<u32, BootError> {
    for header in headers.iter().filter(|header| header.p_type == elf::PT_NOTE) {
        if header.p_filesz > NOTES_MAX {
            return Err(BootError::Damaged(format!("it has {} bytes of notes", header.p_filesz)));
        }
        let mut notes = vec![0; length(header.p_filesz)?];
        read_at(file, &mut notes, header.p_offset, "notes' end")?;
        let align = if header.p_align == 8 { 8 } else { 4 };
        let mut rest = notes.as_slice();
        while !rest.is_empty() {
            let cut_off = || BootError::Damaged("its last note is cut off".to_owned());
            let (note, behind) = take_note(rest, align).ok_or_else(cut_off)?;
            if (note.name, note.kind) == (XEN, XEN_ELFNOTE_PHYS32_ENTRY) {
                return entry_address(note.value);
            }
            rest = behind;
        }
    }
    Err(BootError::Unsupported(
        "the ELF image has no PVH entry (build it with CONFIG_PVH, or give the bzImage)",
    ))
}

struct Note<'a> {
    kind: u32,
    name: &'a [u8],
    value: &'a [u8],
}

/// The first note, and what is behind it and its padding, which the last note may lack; none if it
/// is not whole.
fn take_note(bytes: &[u8], align: usize) -> Option<(Note<'_>, &[u8])> {
    let mut header = Elf64_Nhdr::default();
    let name_at = size_of::<Elf64_Nhdr>();
    header.as_mut_slice().copy_from_slice(bytes.get(..name_at)?);
    let name_end = name_at.checked_add(usize::try_from(header.n_namesz).ok()?)?;
    let value_at = name_end.checked_next_multiple_of(align)?;
    let value_end = value_at.checked_add(usize::try_from(header.n_descsz).ok()?)?;
    let note = Note {
        kind: header.n_type,
        name: bytes.get(name_at..name_end)?,
        value: bytes.get(value_at..value_end)?,
    };
    let next = value_end.checked_next_multiple_of(align)?.min(bytes.len());
    Some((note, bytes.get(next..)?))
}

/// The note holds a number of 4 or 8 bytes; Linux writes 8.
fn entry_address(value: &[u8]) -> Result<u32, BootError> {
    let address = match *value {
        [a, b, c, d] => Ok(u32::from_le_bytes([a, b, c, d])),
        [a, b, c, d, 0, 0, 0, 0] => Ok(u32::from_le_bytes([a, b, c, d])),
        [_, _, _, _, _, _, _, _] => Err("its PVH entry is beyond 4 GiB".to_owned()),
        _ => Err(format!("the note of its PVH entry has {} bytes, not 4 or 8", value.len())),
    };
    address.map_err(BootError::Damaged)
}

#[cfg(test)]
mod tests;
