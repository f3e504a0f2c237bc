//! A kernel that is entered by the PVH protocol, as Xen's docs/misc/pvh.pandoc has it: 32-bit
//! protected mode without paging, the start info in EBX.

use std::fs::File;
use std::io::Write;
use std::sync::mpsc::Receiver;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kvm_bindings::kvm_segment;
use kvm_ioctls::Kvm;
use vmm_core::boot::{BootRegisters, BootSource, set_boot_registers};
use vmm_core::machine::{Machine, MachineConfig, MachineEvent, ResetCause};

use crate::flat::elf::{CODE, ENTRY, ZEROS, file, kernel};
use crate::flat::{Flat, MEMORY, kvm, print, print_al, shutdown};

/// Where the guest keeps what it found: CR0, CR4, EFLAGS, and a word that should be zero.
const FOUND: u64 = 0x2000;
const CMDLINE: &str = "console=ttyS0 by=pvh";
const INITRD: &[u8] = b"the initial RAM disk, of no even size";

/// Fields of the start info (Xen's public/arch-x86/hvm/start_info.h).
const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 4;
const MODULES: u32 = 12;
const MODULE_LIST: u32 = 16;
const COMMAND_LINE: u32 = 24;
const RSDP: u32 = 32;
const MEMORY_MAP: u32 = 40;
const MEMORY_MAP_ENTRIES: u32 = 48;
/// Bytes of an entry of the memory map.
const ENTRY_BYTES: u32 = 24;

/// Prints ECX bytes from ESI on.
fn print_bytes(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dx, 0x3f8)?;
    a.cld()?;
    a.rep().outsb()
}

/// Prints what stands at ESI, up to its NUL.
fn print_text(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut next, mut end) = (a.create_label(), a.create_label());
    a.set_label(&mut next)?;
    a.mov(al, byte_ptr(esi))?;
    a.test(al, al)?;
    a.je(end)?;
    print_al(a)?;
    a.inc(esi)?;
    a.jmp(next)?;
    a.set_label(&mut end)?;
    a.nop()
}

/// Prints a letter for each thing that it checks, and the things that only this side can check.
/// Loads no segment register: they are used as the protocol leaves them.
fn program(
    a: &mut CodeAssembler,
    end: fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut bad = a.create_label();
    a.mov(esp, u32::try_from(ZEROS + 0x1000).unwrap())?;
    a.pushfd()?;
    a.pop(eax)?;
    a.mov(dword_ptr(FOUND + 8), eax)?;
    a.mov(eax, cr0)?;
    a.mov(dword_ptr(FOUND), eax)?;
    a.mov(eax, cr4)?;
    a.mov(dword_ptr(FOUND + 4), eax)?;
    // A word of the image's zeros, which then is none any more.
    a.mov(eax, dword_ptr(ZEROS + 0x1000))?;
    a.mov(dword_ptr(FOUND + 12), eax)?;
    a.mov(dword_ptr(ZEROS + 0x1000), 0x1234)?;

    a.cmp(dword_ptr(ebx), MAGIC)?;
    a.jne(bad)?;
    print(a, b'M')?;
    a.cmp(dword_ptr(ebx + VERSION), 1)?;
    a.jne(bad)?;
    print(a, b'V')?;
    // All addresses have 64 bits; the guest can follow the lower 32.
    for field in [MODULE_LIST, COMMAND_LINE, RSDP, MEMORY_MAP] {
        a.cmp(dword_ptr(ebx + (field + 4)), 0)?;
        a.jne(bad)?;
    }
    a.cmp(dword_ptr(ebx + MODULES), 1)?;
    a.jne(bad)?;
    a.mov(esi, dword_ptr(ebx + COMMAND_LINE))?;
    print_text(a)?;
    a.mov(esi, dword_ptr(ebx + RSDP))?;
    a.mov(ecx, 8)?;
    print_bytes(a)?;
    a.mov(edi, dword_ptr(ebx + MODULE_LIST))?;
    a.mov(esi, dword_ptr(edi))?;
    a.mov(ecx, dword_ptr(edi + 8))?;
    print_bytes(a)?;
    a.mov(esi, dword_ptr(ebx + MEMORY_MAP))?;
    a.imul_3(ecx, dword_ptr(ebx + MEMORY_MAP_ENTRIES), ENTRY_BYTES)?;
    print_bytes(a)?;
    end(a)?;
    a.set_label(&mut bad)?;
    print(a, b'!')?;
    shutdown(a)
}

fn image(end: fn(&mut CodeAssembler) -> Result<(), IcedError>) -> File {
    let mut a = CodeAssembler::new(32).unwrap();
    program(&mut a, end).unwrap();
    // What comes before the entry is never run: it halts.
    let mut code = vec![0xf4; usize::try_from(ENTRY - CODE).unwrap()];
    code.extend(a.assemble(ENTRY).unwrap());
    file(&kernel(&code))
}

fn started(kvm: &Kvm, kernel: File) -> Flat {
    let mut initrd = tempfile::tempfile().unwrap();
    initrd.write_all(INITRD).unwrap();
    let boot = BootSource::Linux { kernel, initrd: Some(initrd), cmdline: CMDLINE.to_owned() };
    let config = MachineConfig::new(1, MEMORY, boot);
    let (machine, events): (Machine, Receiver<MachineEvent>) =
        Machine::create(kvm, config).unwrap();
    machine.resume().unwrap();
    Flat { machine, events }
}

/// What the guest prints: letters, texts, and the memory map, in the protocol's numbers.
fn expected() -> Vec<u8> {
    const RAM: u32 = 1;
    const RESERVED: u32 = 2;
    let mut printed = format!("MV{CMDLINE}RSD PTR ").into_bytes();
    printed.extend_from_slice(INITRD);
    for (start, end, kind) in [
        (0, 0x9_fc00, RAM),
        (0x9_fc00, 0xa_0000, RESERVED),
        (0xe_0000, 0x10_0000, RESERVED),
        (0x10_0000, MEMORY, RAM),
        (0xe000_0000, 0xe010_0000, RESERVED),
    ] {
        printed.extend_from_slice(&u64::to_le_bytes(start));
        printed.extend_from_slice(&(end - start).to_le_bytes());
        printed.extend_from_slice(&u64::from(kind).to_le_bytes());
    }
    printed
}

fn check_found(guest: &Flat) {
    let [control_0, control_4, eflags, zero] = [0, 4, 8, 12].map(|at| guest.word(FOUND + at));
    // Protection on; ET cannot be switched off.
    assert_eq!((control_0 & !0x10, control_4), (1, 0), "CR0 {control_0:#x}");
    assert_eq!(eflags & 0x2_0300, 0, "VM, IF and TF are off: {eflags:#x}");
    assert_eq!(zero, 0, "the image's zeros");
}

#[test]
fn a_kernel_entered_by_pvh_finds_its_start_info() {
    let Some(kvm) = kvm() else { return };
    let guest = started(&kvm, image(shutdown));
    assert_eq!(guest.event(), MachineEvent::Shutdown);
    assert_eq!(guest.printed().escape_ascii().to_string(), expected().escape_ascii().to_string());
    check_found(&guest);
}

#[test]
fn a_reset_enters_it_by_pvh_again() {
    let Some(kvm) = kvm() else { return };
    let guest = started(
        &kvm,
        image(|a| {
            a.mov(dx, 0x608)?;
            a.mov(al, 1)?;
            a.out(dx, al)?;
            a.hlt()
        }),
    );
    for round in 1..=3 {
        assert_eq!(guest.event(), MachineEvent::Reset(ResetCause::AcpiReset));
        assert!(guest.printed() == expected().repeat(round), "round {round}");
        check_found(&guest);
        guest.machine.reset().unwrap();
    }
}

/// What a guest cannot see of itself: the parts of the segments that only the processor keeps.
#[test]
fn the_segments_are_those_of_the_protocol() {
    let Some(kvm) = kvm() else { return };
    let vm = kvm.create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let memory = vmm_core::memory::create(MEMORY, 0).unwrap();
    let registers = BootRegisters::Protected { entry: 0x12_3450, start_info: 0x6000 };
    set_boot_registers(&vcpu, 0, &memory, registers).unwrap();
    let regs = vcpu.get_regs().unwrap();
    assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x12_3450, 0x6000, 2));
    let sregs = vcpu.get_sregs().unwrap();
    let parts = |s: &kvm_segment| (s.base, s.limit, s.type_, s.s, s.db, s.present, s.l);
    // Code: executed and readable, data: writable; both accessed, flat, 32-bit.
    assert_eq!(parts(&sregs.cs), (0, 0xffff_ffff, 0xb, 1, 1, 1, 0));
    for data in [&sregs.ds, &sregs.es, &sregs.ss] {
        assert_eq!(parts(data), (0, 0xffff_ffff, 3, 1, 1, 1, 0));
    }
    // The task: 32-bit, busy.
    assert_eq!(parts(&sregs.tr), (0, 0x67, 0xb, 0, 0, 1, 0));
    assert_eq!((sregs.cr0 & !0x10, sregs.cr4, sregs.efer), (1, 0, 0));
}
