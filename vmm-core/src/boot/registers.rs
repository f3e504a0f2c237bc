//! The first vCPU's registers for each way to begin.

use kvm_bindings::{kvm_msr_entry, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestMemory;

/// Page tables: level 4, level 3, and four of level 2 that map 4 GiB one to one.
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORIES: u64 = 0xb000;
const GDT: u64 = 0x500;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 2;

const PTE_PRESENT_WRITE: u64 = 3;
const PDE_LARGE: u64 = 1 << 7;

const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;

/// How the first vCPU begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootRegisters {
    /// As after power-on: real mode, at 0xffff_fff0.
    ResetVector,
    /// Long mode, the low 4 GiB mapped one to one: Linux's 64-bit entry.
    Long {
        /// Where to begin.
        entry: u64,
        /// Address of the boot parameters, in RSI.
        zero_page: u64,
    },
    /// 32-bit protected mode without paging: PVH.
    Protected {
        /// Where to begin.
        entry: u32,
        /// Address of the start info, in EBX.
        start_info: u64,
    },
}

/// Why the first vCPU's registers cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum RegistersError {
    /// KVM refused.
    #[error("the registers to boot with cannot be set")]
    Kvm(#[from] kvm_ioctls::Error),
    /// The tables do not fit memory.
    #[error("the page tables to boot with cannot be written")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// MSRs.
    #[error("the memory types (MTRR) to boot with cannot be set")]
    Msrs,
}

/// Sets the registers of vCPU `index`, and for the first also the tables in memory that they need.
/// The others wait for the guest to start them.
///
/// # Errors
/// [`RegistersError`].
pub fn set_boot_registers(
    vcpu: &VcpuFd,
    index: u8,
    memory: &GuestMemory,
    registers: BootRegisters,
) -> Result<(), RegistersError> {
    if registers == BootRegisters::ResetVector {
        return Ok(());
    }
    set_memory_types(vcpu)?;
    if index != 0 {
        return Ok(());
    }
    let mut regs = vcpu.get_regs()?;
    regs.rflags = RFLAGS_RESERVED;
    let mut sregs = vcpu.get_sregs()?;
    let long = matches!(registers, BootRegisters::Long { .. });
    let code = segment(CODE_SELECTOR, 0xb, long);
    let data = segment(DATA_SELECTOR, 0x3, long);
    write_gdt(memory, &code, &data)?;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    match registers {
        BootRegisters::ResetVector => {}
        BootRegisters::Long { entry, zero_page } => {
            (regs.rip, regs.rsi) = (entry, zero_page);
            write_page_tables(memory)?;
            sregs.cr3 = PML4;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.efer = EFER_LME | EFER_LMA;
        }
        BootRegisters::Protected { entry, start_info } => {
            (regs.rip, regs.rbx) = (u64::from(entry), start_info);
            sregs.tr = task();
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            sregs.efer = 0;
        }
    }
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&regs)?;
    Ok(())
}

fn set_memory_types(vcpu: &VcpuFd) -> Result<(), RegistersError> {
    let entry =
        kvm_msr_entry { index: MSR_MTRR_DEF_TYPE, data: MTRR_WRITE_BACK, ..Default::default() };
    let msrs = kvm_bindings::Msrs::from_entries(&[entry]).map_err(|_| RegistersError::Msrs)?;
    match vcpu.set_msrs(&msrs)? {
        1 => Ok(()),
        _ => Err(RegistersError::Msrs),
    }
}

/// A flat segment: base 0, limit 4 GiB. `long` is for code that runs in long mode.
fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    let code = type_ & 8 != 0;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!(long && code)),
        s: 1,
        l: u8::from(long && code),
        g: 1,
        ..kvm_segment::default()
    }
}

/// The task that PVH begins in: 32-bit, busy, at address 0.
fn task() -> kvm_segment {
    kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..kvm_segment::default() }
}

/// The descriptor of a flat segment, as a processor reads it (Intel SDM 3A 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    0xffff | access << 40 | 0xf << 48 | flags << 52
}

fn write_gdt(
    memory: &GuestMemory,
    code: &kvm_segment,
    data: &kvm_segment,
) -> Result<(), RegistersError> {
    for (index, entry) in (0u64..).zip([0, 0, descriptor(code), descriptor(data)]) {
        memory.write_obj(entry, GuestAddress(GDT + 8 * index))?;
    }
    Ok(())
}

fn write_page_tables(memory: &GuestMemory) -> Result<(), RegistersError> {
    memory.write_obj(PDPT | PTE_PRESENT_WRITE, GuestAddress(PML4))?;
    for directory in 0..4u64 {
        let table = PAGE_DIRECTORIES + directory * 0x1000;
        memory.write_obj(table | PTE_PRESENT_WRITE, GuestAddress(PDPT + 8 * directory))?;
        for entry in 0..512u64 {
            let page = (directory * 512 + entry) << 21;
            let value = page | PTE_PRESENT_WRITE | PDE_LARGE;
            memory.write_obj(value, GuestAddress(table + 8 * entry))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_manual() {
        assert_eq!(descriptor(&segment(CODE_SELECTOR, 0xb, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(CODE_SELECTOR, 0xb, false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(DATA_SELECTOR, 0x3, true)), 0x00cf_9300_0000_ffff);
    }
}
