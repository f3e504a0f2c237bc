//! As many vCPUs as a machine can have. The first starts the others, one by one, as an operating
//! system does: INIT, then SIPI, by the local APIC.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vmm_core::machine::{Machine, RunState, VCPUS_MAX, read_snapshot, write_snapshot};

use crate::flat::{Flat, config, image, kvm, print_al, wait_until};

const LAPIC: u64 = 0xfee0_0000;
/// A word for each vCPU: whether it has come, and what it counts.
const COME: u64 = 0x2000;
const COUNTS: u64 = 0x2100;

/// Each vCPU prints its number when it has come, and counts for ever.
///
/// The image is seen below 1 MiB as well, from 0xf0000 on: at vector 0xf0 the others find the
/// same way into protected mode that the first takes, and come here too.
fn count_together(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut come, mut count) = (a.create_label(), a.create_label());
    a.mov(ebx, dword_ptr(LAPIC + 0x20))?;
    a.shr(ebx, 24)?;
    a.jne(come)?;
    for ap in 1..u64::from(VCPUS_MAX) {
        let mut wait = a.create_label();
        a.mov(dword_ptr(COME + 4 * ap), 0)?;
        for command in [0x4500, 0x4600 + 0xf0] {
            a.mov(dword_ptr(LAPIC + 0x310), u32::try_from(ap).unwrap() << 24)?;
            a.mov(dword_ptr(LAPIC + 0x300), command)?;
        }
        a.set_label(&mut wait)?;
        a.cmp(dword_ptr(COME + 4 * ap), 0)?;
        a.je(wait)?;
    }
    a.set_label(&mut come)?;
    a.mov(eax, ebx)?;
    a.add(al, u32::from(b'0'))?;
    print_al(a)?;
    a.mov(dword_ptr(ebx * 4 + COME), 1)?;
    a.set_label(&mut count)?;
    a.inc(dword_ptr(ebx * 4 + COUNTS))?;
    a.jmp(count)
}

fn counts(guest: &Flat) -> Vec<u32> {
    (0..u64::from(VCPUS_MAX)).map(|vcpu| guest.word(COUNTS + 4 * vcpu)).collect()
}

fn wait_all_count(guest: &Flat) {
    let before = counts(guest);
    wait_until("all vCPUs to count", || {
        counts(guest).iter().zip(&before).all(|(now, before)| *now > before + 10)
    });
}

#[test]
fn eight_vcpus_start_pause_move_and_reset() {
    let Some(kvm) = kvm() else { return };
    let image = image(count_together);
    let config = || {
        let mut config = config(&image);
        config.vcpus = VCPUS_MAX;
        config
    };
    let (machine, events) = Machine::create(&kvm, config()).unwrap();
    let guest = Flat { machine, events };
    guest.machine.resume().unwrap();
    assert_eq!(guest.wait_printed(8).escape_ascii().to_string(), "12345670");
    wait_all_count(&guest);
    guest.machine.pause().unwrap();
    let paused = counts(&guest);
    let mut saved = Vec::new();
    write_snapshot(&guest.machine, &mut saved).unwrap();
    assert_eq!(counts(&guest), paused, "paused means paused");

    let (machine, events) = Machine::create_incoming(&kvm, config()).unwrap();
    let other = Flat { machine, events };
    read_snapshot(&other.machine, &mut saved.as_slice()).unwrap();
    assert_eq!((other.machine.state(), counts(&other)), (RunState::Paused, paused));
    other.machine.resume().unwrap();
    wait_all_count(&other);
    assert_eq!(other.printed(), b"", "nobody began anew");

    // After a reset the others wait for the first again.
    guest.machine.reset().unwrap();
    assert_eq!(guest.wait_printed(16).escape_ascii().to_string(), "1234567012345670");
    wait_all_count(&guest);
}
