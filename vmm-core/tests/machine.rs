//! The machine with real guests on this host's /dev/kvm: flat firmware that any KVM can run.

#[path = "flat/mod.rs"]
mod flat;
#[path = "machine/pvh.rs"]
mod pvh;
#[allow(dead_code, unreachable_pub, reason = "it is the interface of another crate")]
#[path = "../../tests/src/skip.rs"]
mod skip;
#[path = "machine/smp.rs"]
mod smp;
#[path = "machine/virtio.rs"]
mod virtio;

use std::collections::BTreeSet;
use std::time::Duration;

use flat::{Flat, image, kvm, print, print_al, shutdown, wait_until};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_core::gate::boottime_ns;
use vmm_core::machine::{
    MachineError, MachineEvent, ResetCause, RunState, read_snapshot, write_snapshot,
};
use vmm_core::migrate::{DirtyPages, MigrationVm};

/// Where guests keep their numbers, and their interrupt table.
const COUNTER: u64 = 0x2000;
const PIT_TICKS: u64 = 0x2100;
const LAPIC_TICKS: u64 = 0x2104;
const SERIAL_INTERRUPTS: u64 = 0x2108;
const IDT: u32 = 0x3000;

#[test]
fn port_io_single_and_string() {
    let Some(kvm) = kvm() else { return };
    let image = image(|a| {
        print(a, b'p')?;
        // A string of port writes leaves the guest with several elements at once.
        a.mov(dword_ptr(0x2000), 0x7472_6f00)?;
        a.mov(esi, 0x2001)?;
        a.mov(ecx, 3)?;
        a.cld()?;
        a.mov(dx, 0x3f8)?;
        a.rep().outsb()?;
        // The scratch register of the serial line reads as it was written.
        a.mov(dx, 0x3ff)?;
        a.mov(al, 0x21)?;
        a.out(dx, al)?;
        a.xor(eax, eax)?;
        a.in_(al, dx)?;
        print_al(a)?;
        // Nothing answers here: all ones.
        a.mov(dx, 0x1234)?;
        a.in_(al, dx)?;
        print_al(a)?;
        shutdown(a)
    });
    let guest = Flat::started(&kvm, &image);
    assert_eq!(guest.event(), MachineEvent::Shutdown);
    assert_eq!(guest.printed(), b"port!\xff");
}

#[test]
fn mmio_reaches_pci_and_holes_read_as_ones() {
    let Some(kvm) = kvm() else { return };
    let image = image(|a| {
        // Vendor and device of the host bridge, by memory (ECAM) and by ports.
        a.mov(eax, dword_ptr(0xe000_0000u64))?;
        a.mov(dword_ptr(0x2000), eax)?;
        a.mov(dx, 0xcf8)?;
        a.mov(eax, 0x8000_0000u32)?;
        a.out(dx, eax)?;
        a.mov(dx, 0xcfc)?;
        a.in_(eax, dx)?;
        a.mov(dword_ptr(0x2004), eax)?;
        a.mov(eax, dword_ptr(0xf000_0000u64))?;
        a.mov(dword_ptr(0x2008), eax)?;
        // The firmware is read-only memory: a write to it changes nothing.
        a.mov(eax, dword_ptr(0xffff_0040u64))?;
        a.mov(dword_ptr(0xffff_0040u64), 0x1234_5678)?;
        a.sub(eax, dword_ptr(0xffff_0040u64))?;
        a.mov(dword_ptr(0x200c), eax)?;
        shutdown(a)
    });
    let guest = Flat::started(&kvm, &image);
    assert_eq!(guest.event(), MachineEvent::Shutdown);
    let (by_memory, by_ports) = (guest.word(0x2000), guest.word(0x2004));
    assert_eq!(by_memory & 0xffff, 0x1b36);
    assert_eq!(by_memory, by_ports);
    assert_eq!(guest.word(0x2008), u32::MAX);
    assert_eq!(guest.word(0x200c), 0);
}

/// Fills a gate of the interrupt table with a handler, which stands right here; changes EAX.
fn gate(
    a: &mut CodeAssembler,
    vector: u32,
    handler: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let slot = u64::from(IDT + 8 * vector);
    let mut behind = a.create_label();
    // The call leaves the handler's address on the stack.
    a.call(behind)?;
    handler(a)?;
    a.set_label(&mut behind)?;
    a.pop(eax)?;
    a.mov(word_ptr(slot), ax)?;
    a.mov(word_ptr(slot + 2), 8)?;
    a.mov(word_ptr(slot + 4), 0x8e00u32)?;
    a.shr(eax, 16)?;
    a.mov(word_ptr(slot + 6), ax)
}

fn out8(a: &mut CodeAssembler, port: u32, value: u32) -> Result<(), IcedError> {
    a.mov(dx, port)?;
    a.mov(al, value)?;
    a.out(dx, al)
}

/// A guest that counts interrupts of three kinds for ever: PIT by the PIC, LAPIC timer, and the
/// serial line by the I/O APIC. Its main loop prints a dot each time that all have come again.
///
/// Interrupts are only taken at one place, and handlers go back by a jump: KVM's emulator knows
/// no IRET in protected mode.
fn interrupts(a: &mut CodeAssembler) -> Result<(), IcedError> {
    const LAPIC: u64 = 0xfee0_0000;
    const IOAPIC: u64 = 0xfec0_0000;
    let (mut main, mut wait, mut check) = (a.create_label(), a.create_label(), a.create_label());
    gate(a, 0x20, |a| {
        a.inc(dword_ptr(PIT_TICKS))?;
        a.mov(al, 0x20)?;
        a.out(0x20, al)?;
        a.jmp(check)
    })?;
    gate(a, 0x30, |a| {
        a.inc(dword_ptr(LAPIC_TICKS))?;
        a.mov(dword_ptr(LAPIC + 0xb0), 0)?;
        a.jmp(check)
    })?;
    gate(a, 0x40, |a| {
        a.inc(dword_ptr(SERIAL_INTERRUPTS))?;
        a.mov(dx, 0x3fa)?;
        a.in_(al, dx)?;
        a.mov(dword_ptr(LAPIC + 0xb0), 0)?;
        a.jmp(check)
    })?;
    a.mov(word_ptr(0x2ff0), 0x7ff)?;
    a.mov(dword_ptr(0x2ff2), IDT)?;
    a.lidt(ptr(0x2ff0))?;
    // PICs: vectors from 0x20 and 0x28, only the timer let through.
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xfe),
        (0xa0, 0x11),
        (0xa1, 0x28),
        (0xa1, 2),
        (0xa1, 1),
        (0xa1, 0xff),
    ] {
        out8(a, port, value)?;
    }
    // PIT channel 0: about 200 Hz.
    out8(a, 0x43, 0x34)?;
    out8(a, 0x40, 5966 & 0xff)?;
    out8(a, 0x40, 5966 >> 8)?;
    // Local APIC on; LINT0 takes the PIC; timer periodic, divided by 16.
    a.mov(dword_ptr(LAPIC + 0xf0), 0x1ff)?;
    a.mov(dword_ptr(LAPIC + 0x350), 0x700)?;
    a.mov(dword_ptr(LAPIC + 0x3e0), 3)?;
    a.mov(dword_ptr(LAPIC + 0x320), 0x2_0030)?;
    a.mov(dword_ptr(LAPIC + 0x380), 312_500)?;
    // I/O APIC pin 4 (serial), edge, vector 0x40, to local APIC 0.
    a.mov(dword_ptr(IOAPIC), 0x10 + 2 * 4)?;
    a.mov(dword_ptr(IOAPIC + 0x10), 0x40)?;
    a.mov(dword_ptr(IOAPIC), 0x11 + 2 * 4)?;
    a.mov(dword_ptr(IOAPIC + 0x10), 0)?;
    a.mov(dx, 0x3fc)?;
    a.mov(al, 8)?;
    a.out(dx, al)?;

    a.set_label(&mut main)?;
    a.mov(esi, dword_ptr(PIT_TICKS))?;
    a.mov(edi, dword_ptr(LAPIC_TICKS))?;
    a.mov(ebx, dword_ptr(SERIAL_INTERRUPTS))?;
    // Enabling the transmitter's interrupt raises it: it is always empty.
    a.mov(dx, 0x3f9)?;
    a.mov(al, 0)?;
    a.out(dx, al)?;
    a.mov(al, 2)?;
    a.out(dx, al)?;
    a.set_label(&mut wait)?;
    a.sti()?;
    a.hlt()?;
    a.set_label(&mut check)?;
    a.mov(esp, 0x8000)?;
    a.cmp(esi, dword_ptr(PIT_TICKS))?;
    a.je(wait)?;
    a.cmp(edi, dword_ptr(LAPIC_TICKS))?;
    a.je(wait)?;
    a.cmp(ebx, dword_ptr(SERIAL_INTERRUPTS))?;
    a.je(wait)?;
    a.mov(dx, 0x3f9)?;
    a.mov(al, 0)?;
    a.out(dx, al)?;
    print(a, b'.')?;
    a.jmp(main)
}

#[test]
fn interrupts_of_pic_ioapic_and_lapic_come() {
    let Some(kvm) = kvm() else { return };
    let guest = Flat::started(&kvm, &image(interrupts));
    let printed = guest.wait_printed(5);
    assert!(printed.iter().all(|byte| *byte == b'.'), "{printed:?}");
    for counter in [PIT_TICKS, LAPIC_TICKS, SERIAL_INTERRUPTS] {
        assert!(guest.word(counter) >= 5, "{counter:#x}");
    }
}

#[test]
fn timers_and_interrupts_go_on_after_save_and_restore() {
    let Some(kvm) = kvm() else { return };
    let image = image(interrupts);
    let guest = Flat::started(&kvm, &image);
    guest.wait_printed(3);
    guest.machine.pause().unwrap();
    let mut saved = Vec::new();
    write_snapshot(&guest.machine, &mut saved).unwrap();
    let before: Vec<u32> =
        [PIT_TICKS, LAPIC_TICKS, SERIAL_INTERRUPTS].map(|at| guest.word(at)).to_vec();
    drop(guest);

    let other = Flat::incoming(&kvm, &image);
    read_snapshot(&other.machine, &mut saved.as_slice()).unwrap();
    assert_eq!(other.machine.state(), RunState::Paused);
    for (at, before) in [PIT_TICKS, LAPIC_TICKS, SERIAL_INTERRUPTS].into_iter().zip(&before) {
        assert_eq!(other.word(at), *before);
    }
    other.machine.resume().unwrap();
    other.wait_printed(5);
    for (at, before) in [PIT_TICKS, LAPIC_TICKS, SERIAL_INTERRUPTS].into_iter().zip(&before) {
        assert!(other.word(at) > *before, "{at:#x}");
    }
}

/// Counts in a register and in memory for ever; says X if they ever differ.
fn counter(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut again, mut differ) = (a.create_label(), a.create_label());
    a.xor(ebx, ebx)?;
    a.set_label(&mut again)?;
    a.cmp(ebx, dword_ptr(COUNTER))?;
    a.jne(differ)?;
    a.inc(ebx)?;
    a.mov(dword_ptr(COUNTER), ebx)?;
    a.jmp(again)?;
    a.set_label(&mut differ)?;
    print(a, b'X')?;
    a.hlt()
}

#[test]
fn a_counting_guest_goes_on_where_it_was_in_a_new_machine() {
    let Some(kvm) = kvm() else { return };
    let image = image(counter);
    let mut guest = Flat::started(&kvm, &image);
    for _ in 0..3 {
        let begun = guest.word(COUNTER);
        wait_until("counting", || guest.word(COUNTER) > begun + 1000);
        guest.machine.pause().unwrap();
        let count = guest.word(COUNTER);
        let mut saved = Vec::new();
        write_snapshot(&guest.machine, &mut saved).unwrap();
        assert_eq!(guest.word(COUNTER), count, "paused means paused");

        let other = Flat::incoming(&kvm, &image);
        read_snapshot(&other.machine, &mut saved.as_slice()).unwrap();
        assert_eq!(other.word(COUNTER), count);
        other.machine.resume().unwrap();
        wait_until("counting on", || other.word(COUNTER) > count + 1000);
        assert_eq!(other.printed(), b"");
        guest = other;
    }
}

#[test]
fn a_damaged_or_foreign_snapshot_is_refused() {
    let Some(kvm) = kvm() else { return };
    let image = image(counter);
    let guest = Flat::started(&kvm, &image);
    wait_until("counting", || guest.word(COUNTER) > 1000);
    let mut saved = Vec::new();
    let running = write_snapshot(&guest.machine, &mut saved);
    assert!(matches!(running, Err(MachineError::WrongState { .. })));
    guest.machine.pause().unwrap();
    saved.clear();
    write_snapshot(&guest.machine, &mut saved).unwrap();
    for cut in [0, 7, 12, 100, saved.len() / 2, saved.len() - 1] {
        let other = Flat::incoming(&kvm, &image);
        assert!(read_snapshot(&other.machine, &mut &saved[..cut]).is_err(), "cut at {cut}");
    }
    for at in (0..saved.len()).step_by(saved.len() / 23) {
        let mut flipped = saved.clone();
        flipped[at] ^= 0x40;
        let other = Flat::incoming(&kvm, &image);
        assert!(read_snapshot(&other.machine, &mut flipped.as_slice()).is_err(), "byte {at}");
    }
    let mut config = flat::config(&image);
    config.vcpus = 2;
    let (other, _events) = vmm_core::machine::Machine::create_incoming(&kvm, config).unwrap();
    let refused = read_snapshot(&other, &mut saved.as_slice());
    assert!(matches!(refused, Err(MachineError::OtherShape { .. })), "{refused:?}");
}

#[test]
fn pause_stops_and_resume_goes_on() {
    let Some(kvm) = kvm() else { return };
    let guest = Flat::started(&kvm, &image(counter));
    for _ in 0..50 {
        let begun = guest.word(COUNTER);
        wait_until("counting", || guest.word(COUNTER) > begun);
        guest.machine.pause().unwrap();
        let count = guest.word(COUNTER);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(guest.word(COUNTER), count);
        guest.machine.resume().unwrap();
    }
    assert_eq!(guest.printed(), b"");
}

#[test]
fn the_deadline_stops_the_guest_for_good() {
    let Some(kvm) = kvm() else { return };
    let guest = Flat::started(&kvm, &image(counter));
    wait_until("counting", || guest.word(COUNTER) > 1000);
    assert!(guest.machine.gate().renew(boottime_ns() + 50_000_000));
    assert_eq!(guest.event(), MachineEvent::DeadlinePassed);
    guest.machine.pause().unwrap();
    let count = guest.word(COUNTER);
    assert!(guest.machine.resume().is_err());
    assert_eq!(guest.word(COUNTER), count);
    assert!(guest.events.try_recv().is_err(), "reported once");
}

#[test]
fn reset_begins_anew() {
    let Some(kvm) = kvm() else { return };
    let image = image(|a| {
        // Memory keeps what was there, as it does on a PC; registers and devices do not.
        print(a, b'R')?;
        a.mov(dx, 0x3ff)?;
        a.in_(al, dx)?;
        print_al(a)?;
        out8(a, 0x3ff, 7)?;
        out8(a, 0x608, 1)?;
        a.hlt()
    });
    let guest = Flat::started(&kvm, &image);
    for round in 1..=3 {
        assert_eq!(guest.event(), MachineEvent::Reset(ResetCause::AcpiReset));
        assert_eq!(guest.printed(), b"R\0".repeat(round));
        assert!(matches!(guest.machine.resume(), Err(MachineError::WrongState { .. })));
        guest.machine.reset().unwrap();
    }
}

#[test]
fn a_triple_fault_and_the_keyboard_controller_ask_for_a_reset() {
    let Some(kvm) = kvm() else { return };
    let fault = image(|a| {
        a.mov(dword_ptr(0x2000), 0)?;
        a.mov(dword_ptr(0x2004), 0)?;
        a.lidt(ptr(0x2000))?;
        // No such segment, and no handler to say so to.
        a.mov(eax, 0x50)?;
        a.mov(ds, eax)?;
        a.hlt()
    });
    let guest = Flat::started(&kvm, &fault);
    assert_eq!(guest.event(), MachineEvent::Reset(ResetCause::TripleFault));
    let keyboard = image(|a| {
        out8(a, 0x64, 0xfe)?;
        a.hlt()
    });
    let guest = Flat::started(&kvm, &keyboard);
    assert_eq!(guest.event(), MachineEvent::Reset(ResetCause::KeyboardController));
}

fn frames(dirty: &DirtyPages) -> BTreeSet<u64> {
    dirty.runs().flat_map(|run| run.first..run.end()).collect()
}

#[test]
fn the_dirty_log_is_exact() {
    const FIRST: u32 = 0x10_0000;
    const STRIDE: u32 = 3 * 4096;
    const PAGES: u32 = 100;
    let Some(kvm) = kvm() else { return };
    // For each byte typed: writes one word to each of the pages, then prints the byte.
    let image = image(|a| {
        let (mut poll, mut write) = (a.create_label(), a.create_label());
        a.set_label(&mut poll)?;
        a.mov(dx, 0x3fd)?;
        a.in_(al, dx)?;
        a.test(al, 1)?;
        a.je(poll)?;
        a.mov(dx, 0x3f8)?;
        a.in_(al, dx)?;
        a.mov(edi, FIRST)?;
        a.mov(ecx, PAGES)?;
        a.set_label(&mut write)?;
        a.mov(byte_ptr(edi), al)?;
        a.add(edi, STRIDE)?;
        a.dec(ecx)?;
        a.jne(write)?;
        print_al(a)?;
        a.jmp(poll)
    });
    let guest = Flat::started(&kvm, &image);
    let dirty = guest.machine.dirty();
    assert!(dirty.take().is_err(), "not tracking yet");
    let written: BTreeSet<u64> =
        (0..PAGES).map(|page| u64::from(FIRST + page * STRIDE) / 4096).collect();
    for start in 0..2usize {
        dirty.start().unwrap();
        assert_eq!(frames(&dirty.take().unwrap()), BTreeSet::new());
        for (round, byte) in (1..).zip(b"123") {
            guest.machine.serial().type_input(&[*byte]);
            guest.wait_printed(start * 3 + round);
            assert_eq!(frames(&dirty.take().unwrap()), written);
            assert_eq!(frames(&dirty.take().unwrap()), BTreeSet::new());
        }
        // The VMM's own write, across two pages, together with the guest's.
        guest.machine.memory().write_slice(&[1; 2], GuestAddress(0x5fff)).unwrap();
        assert_eq!(frames(&dirty.take().unwrap()), BTreeSet::from([5, 6]));
        dirty.stop().unwrap();
    }
}

#[test]
fn a_stopped_machine_stays_stopped() {
    let Some(kvm) = kvm() else { return };
    let guest = Flat::started(&kvm, &image(counter));
    wait_until("counting", || guest.word(COUNTER) > 1000);
    guest.machine.stop().unwrap();
    let count = guest.word(COUNTER);
    assert!(guest.machine.resume().is_err());
    assert!(guest.machine.reset().is_err());
    assert_eq!(guest.word(COUNTER), count);
}

#[test]
fn impossible_machines_are_refused() {
    let Some(kvm) = kvm() else { return };
    let image = image(counter);
    let refused = |edit: fn(&mut vmm_core::machine::MachineConfig)| {
        let mut config = flat::config(&image);
        edit(&mut config);
        vmm_core::machine::Machine::create(&kvm, config).unwrap_err().to_string()
    };
    assert!(refused(|config| config.vcpus = 0).contains("0 vCPUs"));
    assert!(refused(|config| config.vcpus = 9).contains("9 vCPUs"));
    assert!(refused(|config| config.memory_bytes = 12345).contains("memory"));
}

#[test]
fn a_guest_that_has_switched_itself_off_does_not_move() {
    let Some(kvm) = kvm() else { return };
    let guest = Flat::started(&kvm, &image(shutdown));
    assert_eq!(guest.event(), MachineEvent::Shutdown);
    // The target would run it on, over its end; this side would end what it no longer owns.
    let machine: &dyn MigrationVm = &guest.machine;
    assert!(machine.pause().is_err());
    machine.resume().unwrap();
    assert_eq!(guest.machine.state(), RunState::Paused, "what it asked for is still to be done");
    guest.machine.reset().unwrap();
    assert_eq!(guest.event(), MachineEvent::Shutdown);
}
