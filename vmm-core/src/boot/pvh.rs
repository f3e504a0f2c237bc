//! Linux by the PVH protocol: an ELF image with the Xen note, entered in 32-bit protected mode.
//!
//! Facts: Xen's docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h.

use std::fs::File;

use linux_loader::loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::elf::ElfImage;
use super::linux::{self, CMDLINE_START};
use super::{BootError, BootRegisters};
use crate::memory::{GuestMemory, layout};

const START_INFO: u64 = 0x6000;
const MODULE_LIST: u64 = 0x6100;
const MEMORY_MAP: u64 = 0x6200;
const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const RAM: u32 = 1;
const RESERVED: u32 = 2;
/// What Linux takes (COMMAND_LINE_SIZE - 1).
const CMDLINE_LIMIT: usize = 2047;

pub(super) fn load(
    memory: &GuestMemory,
    kernel: &File,
    initrd: Option<&File>,
    cmdline: &str,
) -> Result<BootRegisters, BootError> {
    let image = ElfImage::read(kernel)?;
    let available = linux::low_ram_end(memory);
    if image.end() > available {
        return Err(BootError::NoRoom { what: "kernel", needed: image.end(), available });
    }
    image.load(kernel, memory)?;
    linux::load_cmdline(memory, cmdline, CMDLINE_LIMIT)?;

    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: CMDLINE_START,
        rsdp_paddr: layout::ACPI_START,
        memmap_paddr: MEMORY_MAP,
        ..hvm_start_info::default()
    };
    if let Some(initrd) = initrd {
        let loaded = linux::load_initrd(memory, initrd, image.end(), 1 << 32)?;
        let module = hvm_modlist_entry {
            paddr: loaded.start,
            size: loaded.bytes,
            ..hvm_modlist_entry::default()
        };
        write(memory, "module list", module, MODULE_LIST)?;
        info.nr_modules = 1;
        info.modlist_paddr = MODULE_LIST;
    }
    for (slot, entry) in (0u32..).zip(linux::memory_map(memory)) {
        let entry = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.bytes,
            type_: if entry.ram { RAM } else { RESERVED },
            ..hvm_memmap_table_entry::default()
        };
        let size = size_of::<hvm_memmap_table_entry>() as u64;
        write(memory, "memory map", entry, MEMORY_MAP + u64::from(slot) * size)?;
        info.memmap_entries = slot + 1;
    }
    write(memory, "start info", info, START_INFO)?;
    Ok(BootRegisters::Protected { entry: image.entry(), start_info: START_INFO })
}

fn write<T: ByteValued>(
    memory: &GuestMemory,
    what: &'static str,
    value: T,
    address: u64,
) -> Result<(), BootError> {
    memory
        .write_obj(value, GuestAddress(address))
        .map_err(|source| BootError::Write { what, source })
}
