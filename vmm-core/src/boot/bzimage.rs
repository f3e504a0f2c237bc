//! Linux by its own protocol: a bzImage, entered in long mode.
//!
//! Facts: the kernel's Documentation/arch/x86/boot.rst and zero-page.rst.

use std::fs::File;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{Bytes, GuestAddress};

use super::linux::{self, CMDLINE_START, MapEntry};
use super::{BootError, BootRegisters};
use crate::memory::{GuestMemory, layout};

/// Where the boot parameters ("zero page") are.
const ZERO_PAGE: u64 = 0x7000;
/// The 64-bit entry is this far into the protected-mode kernel.
const ENTRY_64: u64 = 0x200;

/// Boot protocol 2.12: the kernel says whether it has a 64-bit entry.
const VERSION_XLOADFLAGS: u16 = 0x020c;
const XLOADFLAG_KERNEL_64: u16 = 1;
const LOADFLAG_LOADED_HIGH: u8 = 1;
const LOADFLAG_CAN_USE_HEAP: u8 = 1 << 7;
const LOADER_UNKNOWN: u8 = 0xff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

pub(super) fn load(
    memory: &GuestMemory,
    mut kernel: &File,
    initrd: Option<&File>,
    cmdline: &str,
) -> Result<BootRegisters, BootError> {
    // The address is only known from the header, so the header is read before the kernel.
    let header = read_header(kernel)?;
    check_whole(kernel, &header)?;
    let start = header.pref_address;
    let end = start.saturating_add(u64::from(header.init_size));
    let available = linux::low_ram_end(memory);
    if start < layout::HIGH_MEMORY {
        return Err(BootError::Damaged(format!("it wants to be loaded at {start:#x}")));
    }
    if end > available {
        return Err(BootError::NoRoom { what: "kernel", needed: end, available });
    }
    let loaded = BzImage::load(memory, Some(GuestAddress(start)), &mut kernel, None)
        .map_err(|error| BootError::Damaged(error.to_string()))?;
    if loaded.kernel_end > end {
        return Err(BootError::Damaged("it is longer than its header says".to_owned()));
    }

    linux::load_cmdline(memory, cmdline, usize::try_from(header.cmdline_size).unwrap_or(0))?;
    let mut header = header;
    header.type_of_loader = LOADER_UNKNOWN;
    header.loadflags |= LOADFLAG_LOADED_HIGH | LOADFLAG_CAN_USE_HEAP;
    header.heap_end_ptr = 0xfe00;
    header.cmd_line_ptr = low32(CMDLINE_START);
    if let Some(initrd) = initrd {
        let ceiling = u64::from(header.initrd_addr_max) + 1;
        let loaded = linux::load_initrd(memory, initrd, end, ceiling)?;
        header.ramdisk_image = low32(loaded.start);
        header.ramdisk_size = low32(loaded.bytes);
    }
    let params = zero_page(header, &linux::memory_map(memory));
    memory
        .write_obj(params, GuestAddress(ZERO_PAGE))
        .map_err(|source| BootError::Write { what: "boot parameters", source })?;
    Ok(BootRegisters::Long { entry: start + ENTRY_64, zero_page: ZERO_PAGE })
}

/// Refuses a file that ends before the kernel does: its decompressor would stand still without a word.
fn check_whole(kernel: &File, header: &setup_header) -> Result<(), BootError> {
    let found =
        kernel.metadata().map_err(|source| BootError::Read { what: "kernel", source })?.len();
    // "If setup_sects is 0, its real value is 4"; syssize is in units of 16 bytes.
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let announced = (setup_sectors + 1) * 512 + u64::from(header.syssize) * 16;
    if found < announced {
        let text = format!("it has {found} bytes, its header announces {announced}");
        return Err(BootError::Damaged(text));
    }
    Ok(())
}

fn low32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// Reads the setup header, by loading the image into no memory at all but its own.
fn read_header(kernel: &File) -> Result<setup_header, BootError> {
    use std::os::unix::fs::FileExt;

    use vm_memory::ByteValued;
    const HEADER_START: u64 = 0x1f1;
    const MAGIC: u32 = 0x5372_6448;
    let mut header = setup_header::default();
    kernel.read_exact_at(header.as_mut_slice(), HEADER_START).map_err(|source| {
        match source.kind() {
            std::io::ErrorKind::UnexpectedEof => BootError::NotAKernel,
            _ => BootError::Read { what: "kernel", source },
        }
    })?;
    if header.header != MAGIC {
        return Err(BootError::NotAKernel);
    }
    if header.version < VERSION_XLOADFLAGS || header.xloadflags & XLOADFLAG_KERNEL_64 == 0 {
        return Err(BootError::Unsupported("it is not a 64-bit kernel of Linux 3.8 or later"));
    }
    Ok(header)
}

fn zero_page(hdr: setup_header, map: &[MapEntry]) -> boot_params {
    let mut params = boot_params { hdr, ..boot_params::default() };
    params.acpi_rsdp_addr = layout::ACPI_START;
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(map) {
        let kind = if entry.ram { E820_RAM } else { E820_RESERVED };
        *slot = boot_e820_entry { addr: entry.start, size: entry.bytes, r#type: kind };
    }
    params.e820_entries = u8::try_from(map.len().min(table.len())).unwrap_or(0);
    params.e820_table = table;
    params
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use vm_memory::ByteValued;

    fn image(edit: impl FnOnce(&mut setup_header)) -> File {
        let mut header = setup_header {
            setup_sects: 1,
            header: 0x5372_6448,
            version: 0x020f,
            loadflags: 1,
            xloadflags: 1,
            pref_address: 16 << 20,
            init_size: 1 << 20,
            cmdline_size: 2047,
            initrd_addr_max: 0x7fff_ffff,
            ..setup_header::default()
        };
        edit(&mut header);
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        file.write_all_at(header.as_slice(), 0x1f1).unwrap();
        file
    }

    #[test]
    fn loads_a_kernel_and_fills_the_zero_page() {
        let memory = crate::memory::create(64 << 20, 0).unwrap();
        let registers = load(&memory, &image(|_| {}), None, "quiet").unwrap();
        let entry = (16 << 20) + 0x200;
        assert_eq!(registers, BootRegisters::Long { entry, zero_page: ZERO_PAGE });
        let params: boot_params = memory.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        assert_eq!({ params.acpi_rsdp_addr }, layout::ACPI_START);
        assert!(params.e820_entries >= 5);
    }

    #[test]
    fn hostile_headers_are_refused() {
        let memory = crate::memory::create(64 << 20, 0).unwrap();
        let refused = |file: File| load(&memory, &file, None, "").unwrap_err();
        let damaged = refused(image(|header| header.pref_address = 0));
        assert!(matches!(damaged, BootError::Damaged(_)));
        let large = refused(image(|header| header.init_size = u32::MAX));
        assert!(matches!(large, BootError::NoRoom { .. }));
        let wrapping = refused(image(|header| header.pref_address = u64::MAX));
        assert!(matches!(wrapping, BootError::NoRoom { .. }));
        let other = refused(image(|header| header.header = 0));
        assert!(matches!(other, BootError::NotAKernel));
        let old = refused(image(|header| header.xloadflags = 0));
        assert!(matches!(old, BootError::Unsupported(_)));
        let sectors = refused(image(|header| header.setup_sects = 255));
        assert!(matches!(sectors, BootError::Damaged(_)));
        // 8192 bytes are two sectors and 448 units of 16 bytes.
        let cut_off = refused(image(|header| header.syssize = 449));
        assert!(matches!(cut_off, BootError::Damaged(_)));
        load(&memory, &image(|header| header.syssize = 448), None, "").unwrap();
        assert!(matches!(refused(tempfile::tempfile().unwrap()), BootError::NotAKernel));
    }
}
