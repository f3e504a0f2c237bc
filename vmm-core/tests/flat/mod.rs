//! Flat-firmware guests for tests: 32-bit code that begins at the reset vector. They use no x87 and
//! no SSE, so that they also run where KVM emulates every instruction.

#[allow(dead_code, reason = "tests of hostile images use more of it")]
pub(crate) mod elf;

use std::fs::File;
use std::io::Write;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};
use vmm_core::boot::BootSource;
use vmm_core::machine::{Machine, MachineConfig, MachineEvent};

/// How long a guest may take for anything.
const LIMIT: Duration = Duration::from_secs(30);
/// Memory of the guests.
pub(crate) const MEMORY: u64 = 8 << 20;
/// Where an image of 64 KiB begins, and its code.
const IMAGE_START: u64 = 0xffff_0000;
const CODE_OFFSET: usize = 0x100;

/// KVM; none after the test was recorded as skipped. The lab runs these tests in a node too.
pub(crate) fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            crate::skip::this_test(&format!("/dev/kvm cannot be opened: {error}"));
            None
        }
    }
}

/// Real-mode code at the reset vector that enters flat 32-bit protected mode at [`CODE_OFFSET`].
fn entry(image: &mut [u8]) {
    const GDT_POINTER: u8 = 0x30;
    const GDT: u8 = 0x40;
    let stub = [
        0xfa, // cli
        0x66,
        0x2e,
        0x0f,
        0x01,
        0x16,
        GDT_POINTER,
        0x00, // lgdt cs:[pointer]
        0x0f,
        0x20,
        0xc0, // mov eax, cr0
        0x66,
        0x83,
        0xc8,
        0x01, // or eax, 1
        0x0f,
        0x22,
        0xc0, // mov cr0, eax
        0x66,
        0xea,
        0x00,
        0x01,
        0xff,
        0xff,
        0x08,
        0x00, // jmp 8:0xffff0100
    ];
    image[..stub.len()].copy_from_slice(&stub);
    image[usize::from(GDT_POINTER)..][..6].copy_from_slice(&[23, 0, GDT, 0, 0xff, 0xff]);
    let descriptors = [0u64, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (slot, descriptor) in image[usize::from(GDT)..].chunks_mut(8).zip(descriptors) {
        slot.copy_from_slice(&descriptor.to_le_bytes());
    }
    // The reset vector: jmp to offset 0 (0xfff0 + 3 + rel16 = 0x10000).
    image[0xfff0..0xfff3].copy_from_slice(&[0xe9, 0x0d, 0x00]);
}

/// Assembles a guest.
pub(crate) fn image(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> File {
    let mut a = CodeAssembler::new(32).unwrap();
    a.mov(eax, 0x10).unwrap();
    for segment in [ds, es, ss] {
        a.mov(segment, eax).unwrap();
    }
    a.mov(esp, 0x8000).unwrap();
    code(&mut a).unwrap();
    let code = a.assemble(IMAGE_START + CODE_OFFSET as u64).unwrap();
    let mut bytes = vec![0xf4; 0x1_0000];
    bytes[CODE_OFFSET..CODE_OFFSET + code.len()].copy_from_slice(&code);
    entry(&mut bytes);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    file
}

/// Prints the byte in AL.
pub(crate) fn print_al(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dx, 0x3f8)?;
    a.out(dx, al)
}

/// Prints one byte; changes AL and DX.
pub(crate) fn print(a: &mut CodeAssembler, byte: u8) -> Result<(), IcedError> {
    a.mov(al, u32::from(byte))?;
    print_al(a)
}

/// Switches the VM off through ACPI.
pub(crate) fn shutdown(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dx, 0x604)?;
    a.mov(ax, 0x2000 | 5 << 10)?;
    a.out(dx, ax)?;
    a.hlt()
}

/// A machine with the guest, and its events.
pub(crate) struct Flat {
    pub(crate) machine: Machine,
    pub(crate) events: Receiver<MachineEvent>,
}

pub(crate) fn config(image: &File) -> MachineConfig {
    let boot = BootSource::Firmware(image.try_clone().unwrap());
    MachineConfig::new(1, MEMORY, boot)
}

impl Flat {
    pub(crate) fn new(kvm: &Kvm, image: &File) -> Self {
        let (machine, events) = Machine::create(kvm, config(image)).unwrap();
        Self { machine, events }
    }

    pub(crate) fn incoming(kvm: &Kvm, image: &File) -> Self {
        let (machine, events) = Machine::create_incoming(kvm, config(image)).unwrap();
        Self { machine, events }
    }

    pub(crate) fn started(kvm: &Kvm, image: &File) -> Self {
        let flat = Self::new(kvm, image);
        flat.machine.resume().unwrap();
        flat
    }

    /// The next event.
    pub(crate) fn event(&self) -> MachineEvent {
        self.events.recv_timeout(LIMIT).expect("the guest should have caused an event")
    }

    /// All that the guest printed.
    pub(crate) fn printed(&self) -> Vec<u8> {
        self.machine.serial().output().read(0, usize::MAX).bytes
    }

    /// Waits until the guest has printed `count` bytes.
    pub(crate) fn wait_printed(&self, count: usize) -> Vec<u8> {
        wait_until("output", || {
            if let Ok(event) = self.events.try_recv() {
                panic!("{event:?} while waiting for output");
            }
            self.printed().len() >= count
        });
        self.printed()
    }

    /// A number in guest memory.
    pub(crate) fn word(&self, address: u64) -> u32 {
        self.machine.memory().read_obj(GuestAddress(address)).unwrap()
    }
}

/// Waits for a condition, with a limit.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {LIMIT:?} for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
