//! What both Linux boot protocols share: the memory map, the command line, the initial RAM disk,
//! the ACPI tables.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{BootError, BootRegisters, bzimage, pvh};
use crate::acpi;
use crate::memory::{GuestMemory, PAGE_SIZE, layout};

/// Where the command line is.
pub(super) const CMDLINE_START: u64 = 0x2_0000;
/// Bytes that there are for it.
pub(super) const CMDLINE_ROOM: usize = 0x1_0000;

const INITRD: &str = "initial RAM disk";

/// A range of the memory map that the kernel is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MapEntry {
    pub(super) start: u64,
    pub(super) bytes: u64,
    pub(super) ram: bool,
}

/// The memory map: RAM without the legacy areas, and the reserved PCI configuration space.
pub(super) fn memory_map(memory: &GuestMemory) -> Vec<MapEntry> {
    let entry = |start, end: u64, ram| MapEntry { start, bytes: end - start, ram };
    let mut map = vec![
        entry(0, layout::EBDA_START, true),
        entry(layout::EBDA_START, 0xa_0000, false),
        entry(layout::ACPI_START, layout::ACPI_END, false),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(layout::HIGH_MEMORY);
        let end = region.start_addr().0 + region.len();
        if end > start {
            map.push(entry(start, end, true));
        }
    }
    let ecam_end = layout::PCI_ECAM_START + layout::PCI_ECAM_SIZE;
    map.push(entry(layout::PCI_ECAM_START, ecam_end, false));
    map.sort_unstable_by_key(|entry| entry.start);
    map
}

/// End of the RAM below the hole.
pub(super) fn low_ram_end(memory: &GuestMemory) -> u64 {
    let low = memory.iter().find(|region| region.start_addr().0 == 0);
    low.map_or(0, GuestMemoryRegion::len)
}

/// Where the initial RAM disk was put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Loaded {
    pub(super) start: u64,
    pub(super) bytes: u64,
}

/// Puts the initial RAM disk as high as it may be, above `floor` and below `ceiling`.
pub(super) fn load_initrd(
    memory: &GuestMemory,
    mut file: &File,
    floor: u64,
    ceiling: u64,
) -> Result<Loaded, BootError> {
    let read = |source| BootError::Read { what: INITRD, source };
    let bytes = file.metadata().map_err(read)?.len();
    let available = low_ram_end(memory).min(ceiling);
    let no_room =
        BootError::NoRoom { what: INITRD, needed: floor.saturating_add(bytes), available };
    let start = available.checked_sub(bytes).map(|start| start & !(PAGE_SIZE - 1));
    let (Some(start), Ok(length)) = (start, usize::try_from(bytes)) else { return Err(no_room) };
    if start < floor {
        return Err(no_room);
    }
    file.seek(SeekFrom::Start(0)).map_err(read)?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, length)
        .map_err(|source| BootError::Write { what: INITRD, source })?;
    Ok(Loaded { start, bytes })
}

/// Writes the command line, which ends with a NUL.
pub(super) fn load_cmdline(
    memory: &GuestMemory,
    cmdline: &str,
    limit: usize,
) -> Result<(), BootError> {
    let limit = limit.min(CMDLINE_ROOM - 1);
    if cmdline.len() > limit {
        return Err(BootError::CommandLine { length: cmdline.len(), limit });
    }
    if cmdline.contains('\0') {
        return Err(BootError::CommandLineNul);
    }
    let bytes = [cmdline.as_bytes(), &[0]].concat();
    memory
        .write_slice(&bytes, GuestAddress(CMDLINE_START))
        .map_err(|source| BootError::Write { what: "command line", source })
}

pub(super) fn load(
    memory: &GuestMemory,
    kernel: &File,
    initrd: Option<&File>,
    cmdline: &str,
    vcpus: u8,
) -> Result<BootRegisters, BootError> {
    let acpi = acpi::tables(vcpus);
    memory
        .write_slice(&acpi.bytes, GuestAddress(layout::ACPI_START))
        .map_err(|source| BootError::Write { what: "ACPI tables", source })?;
    if is_elf(kernel)? {
        pvh::load(memory, kernel, initrd, cmdline)
    } else {
        bzimage::load(memory, kernel, initrd, cmdline)
    }
}

fn is_elf(mut kernel: &File) -> Result<bool, BootError> {
    let read = |source| BootError::Read { what: "kernel", source };
    let mut magic = Vec::new();
    kernel.seek(SeekFrom::Start(0)).map_err(read)?;
    kernel.take(4).read_to_end(&mut magic).map_err(read)?;
    Ok(magic == *b"\x7fELF")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_has_no_overlaps_and_names_all_ram() {
        for size in [1u64 << 20, 64 << 20, 3 << 30, 5 << 30] {
            let memory = crate::memory::create(size, 0).unwrap();
            let map = memory_map(&memory);
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].bytes <= pair[1].start, "{map:x?}");
            }
            let ram: u64 = map.iter().filter(|entry| entry.ram).map(|entry| entry.bytes).sum();
            assert_eq!(ram, size - (layout::HIGH_MEMORY - layout::EBDA_START));
        }
    }

    #[test]
    fn the_initrd_is_high_and_does_not_touch_the_kernel() {
        let memory = crate::memory::create(64 << 20, 0).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(10_000).unwrap();
        let loaded = load_initrd(&memory, &file, 32 << 20, u64::MAX).unwrap();
        assert_eq!(loaded, Loaded { start: (64 << 20) - 3 * 4096, bytes: 10_000 });
        file.set_len(40 << 20).unwrap();
        let error = load_initrd(&memory, &file, 32 << 20, u64::MAX).unwrap_err();
        assert!(matches!(error, BootError::NoRoom { .. }));
        file.set_len(1 << 40).unwrap();
        assert!(load_initrd(&memory, &file, 32 << 20, u64::MAX).is_err());
    }

    #[test]
    fn a_command_line_that_is_too_long_is_refused() {
        let memory = crate::memory::create(1 << 20, 0).unwrap();
        load_cmdline(&memory, "console=ttyS0", 2047).unwrap();
        assert!(matches!(
            load_cmdline(&memory, &"x".repeat(2048), 2047),
            Err(BootError::CommandLine { length: 2048, limit: 2047 })
        ));
        assert!(matches!(load_cmdline(&memory, "a\0b", 2047), Err(BootError::CommandLineNul)));
    }
}
