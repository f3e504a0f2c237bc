//! Disks, entropy and console as a guest meets them: by PCI configuration, BAR and doorbell.
//!
//! The test lays out the rings and requests in the guest's memory; the guest sets the devices up,
//! offers one request after the other, and prints the status of each.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_core::machine::{Machine, MachineEvent};
use vmm_core::virtio::{BlockConfig, ConsolePort, Image};

use crate::flat::{Flat, config, image, kvm, print_al, shutdown, wait_until};

const ECAM: u64 = 0xe000_0000;
/// Registers of the common configuration, and the doorbells.
const FEATURE_SELECT: u32 = 0x08;
const FEATURES: u32 = 0x0c;
const STATUS: u32 = 0x14;
const QUEUE_SELECT: u32 = 0x16;
const QUEUE_SIZE: u32 = 0x18;
const QUEUE_ENABLE: u32 = 0x1c;
const QUEUE_ADDRESSES: u32 = 0x20;
const DOORBELLS: u32 = 0x3000;

const RING: u32 = 16;
const SECTORS: usize = 64;
const OK: u8 = 0;
const IOERR: u8 = 1;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A queue of a device, with its rings from `base` on and its requests' buffers behind them.
#[derive(Clone, Copy)]
struct Queue {
    slot: u32,
    index: u32,
}

impl Queue {
    fn base(self) -> u32 {
        0x10_0000 + self.slot * 0x2_0000 + self.index * 0x1_0000
    }

    fn available(self) -> u32 {
        self.base() + 0x400
    }

    fn used(self) -> u32 {
        self.base() + 0x800
    }

    /// Buffer `number`, of 4 KiB.
    fn buffer(self, number: u32) -> u32 {
        self.base() + 0x1000 * (1 + number)
    }
}

const FIRST: Queue = Queue { slot: 1, index: 0 };
const SECOND: Queue = Queue { slot: 2, index: 0 };
const ENTROPY: Queue = Queue { slot: 3, index: 0 };
const INPUT: Queue = Queue { slot: 4, index: 0 };
const OUTPUT: Queue = Queue { slot: 4, index: 1 };

/// Writes the descriptors of a queue's next request, and its entry in the available ring, but not
/// the ring's index, which is the guest's. A queue's requests have `parts.len()` descriptors each.
fn lay_out(guest: &Flat, queue: Queue, request: u16, parts: &[(u32, u32, u16)]) {
    let memory = guest.machine.memory();
    let count = u16::try_from(parts.len()).unwrap();
    for (part, (address, length, flags)) in (0..).zip(parts) {
        let index = request * count + part;
        let chained = if part + 1 < count { flags | NEXT } else { *flags };
        let mut descriptor = u64::from(*address).to_le_bytes().to_vec();
        descriptor.extend_from_slice(&length.to_le_bytes());
        descriptor.extend_from_slice(&chained.to_le_bytes());
        descriptor.extend_from_slice(&(index + 1).to_le_bytes());
        let at = u64::from(queue.base()) + 16 * u64::from(index);
        memory.write_slice(&descriptor, GuestAddress(at)).unwrap();
    }
    let entry = u64::from(queue.available()) + 4 + 2 * u64::from(request);
    memory.write_obj(request * count, GuestAddress(entry)).unwrap();
}

/// Request `request` of a disk: its header, `data`, and a status that is none yet.
fn disk_request(guest: &Flat, disk: Queue, request: u16, kind: u32, sector: u64, data: &[u8]) {
    let (header, payload) = (disk.buffer(0), disk.buffer(1));
    let (header, payload) = (header + 32 * u32::from(request), payload + 512 * u32::from(request));
    let memory = guest.machine.memory();
    let put = |at: u32, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at.into())).unwrap();
    put(header, &kind.to_le_bytes());
    put(header + 8, &sector.to_le_bytes());
    put(header + 16, &[0xee]);
    put(payload, data);
    let length = u32::try_from(data.len()).unwrap();
    let flags = if kind == 0 { WRITE } else { 0 };
    let parts = [(header, 16, 0), (payload, length, flags), (header + 16, 1, WRITE)];
    lay_out(guest, disk, request, &parts);
}

/// What a driver does until DRIVER_OK, with VERSION_1 and `features`; leaves the BAR in EBX.
fn set_up(a: &mut CodeAssembler, queues: &[Queue], features: u32) -> Result<(), IcedError> {
    bar(a, queues[0])?;
    for status in [0, 1, 3] {
        a.mov(byte_ptr(ebx + STATUS), status)?;
    }
    for (select, features) in [(0, features), (1, 1)] {
        a.mov(dword_ptr(ebx + FEATURE_SELECT), select)?;
        a.mov(dword_ptr(ebx + FEATURES), features)?;
    }
    a.mov(byte_ptr(ebx + STATUS), 0xb)?;
    for queue in queues {
        a.mov(word_ptr(ebx + QUEUE_SELECT), queue.index)?;
        a.mov(word_ptr(ebx + QUEUE_SIZE), RING)?;
        for (at, address) in [(0, queue.base()), (8, queue.available()), (16, queue.used())] {
            a.mov(dword_ptr(ebx + (QUEUE_ADDRESSES + at)), address)?;
            a.mov(dword_ptr(ebx + (QUEUE_ADDRESSES + at + 4)), 0)?;
        }
        a.mov(word_ptr(ebx + QUEUE_ENABLE), 1)?;
    }
    a.mov(byte_ptr(ebx + STATUS), 0xf)
}

/// Loads the address of a device's BAR 0 into EBX.
fn bar(a: &mut CodeAssembler, queue: Queue) -> Result<(), IcedError> {
    a.mov(ebx, dword_ptr(ECAM + u64::from(queue.slot << 15) + 0x10))?;
    a.and(ebx, 0xffff_fff0_u32)
}

/// Offers the requests up to number `request`, and waits until all of them are done.
fn offer(a: &mut CodeAssembler, queue: Queue, request: u16) -> Result<(), IcedError> {
    let mut wait = a.create_label();
    let count = u32::from(request) + 1;
    a.mov(word_ptr(queue.available() + 2), count)?;
    a.mov(word_ptr(ebx + (DOORBELLS + 4 * queue.index)), queue.index)?;
    a.set_label(&mut wait)?;
    a.mov(ax, word_ptr(queue.used() + 2))?;
    a.cmp(ax, count)?;
    a.jne(wait)
}

/// Prints the status of a disk's request.
fn print_status(a: &mut CodeAssembler, disk: Queue, request: u16) -> Result<(), IcedError> {
    a.mov(al, byte_ptr(disk.buffer(0) + 32 * u32::from(request) + 16))?;
    print_al(a)
}

/// Sector `number` holds its number plus `first` in all bytes.
fn disk_file(first: u8) -> (tempfile::NamedTempFile, Vec<u8>) {
    let contents: Vec<u8> = (first..).take(SECTORS).flat_map(|byte| [byte; 512]).collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().write_all_at(&contents, 0).unwrap();
    (file, contents)
}

fn disk(path: &Path, readonly: bool) -> BlockConfig {
    // The file itself could be written: what keeps it is the device.
    let file = File::options().read(true).write(true).open(path).unwrap();
    let image = Image::from_file(file, path, readonly).unwrap();
    BlockConfig { image, serial: String::new(), queues: 1 }
}

/// A discard's or write-zeroes' segment.
fn segment(sector: u64, sectors: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &[0; 4]].concat()
}

const READ: u32 = 0;
const OUT: u32 = 1;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const REQUESTS: u16 = 4;

#[test]
fn a_disk_is_written_and_the_read_only_one_beside_it_is_not() {
    let Some(kvm) = kvm() else { return };
    let (first, first_before) = disk_file(1);
    let (second, second_before) = disk_file(101);
    let image = image(|a| {
        for disk in [FIRST, SECOND] {
            // Discard and write-zeroes are asked for where they are offered; the disk that is
            // read-only does not offer them, and gets such requests all the same.
            let features = if disk.slot == FIRST.slot { 1 << 13 | 1 << 14 } else { 1 << 5 };
            set_up(a, &[disk], features)?;
            for request in 0..REQUESTS {
                offer(a, disk, request)?;
                print_status(a, disk, request)?;
            }
        }
        shutdown(a)
    });
    let mut config = config(&image);
    config.disks = vec![disk(first.path(), false), disk(second.path(), true)];
    let (machine, events) = Machine::create(&kvm, config).unwrap();
    let guest = Flat { machine, events };
    for disk in [FIRST, SECOND] {
        disk_request(&guest, disk, 0, READ, 2, &[0; 512]);
        disk_request(&guest, disk, 1, OUT, 3, &[0xcc; 512]);
        disk_request(&guest, disk, 2, DISCARD, 0, &segment(8, 8));
        disk_request(&guest, disk, 3, WRITE_ZEROES, 0, &segment(21, 2));
    }
    guest.machine.resume().unwrap();
    assert_eq!(guest.event(), MachineEvent::Shutdown);
    assert_eq!(guest.printed(), [OK, OK, OK, OK, OK, IOERR, IOERR, IOERR]);

    let read = |disk: Queue| {
        let mut bytes = vec![0; 512];
        let at = GuestAddress(disk.buffer(1).into());
        guest.machine.memory().read_slice(&mut bytes, at).unwrap();
        bytes
    };
    assert!((read(FIRST), read(SECOND)) == (vec![3; 512], vec![103; 512]), "each its own disk");
    let mut expected = first_before;
    for (sectors, byte) in [(3..4, 0xcc), (8..16, 0), (21..23, 0)] {
        expected[sectors.start * 512..sectors.end * 512].fill(byte);
    }
    assert!(std::fs::read(first.path()).unwrap() == expected);
    assert!(std::fs::read(second.path()).unwrap() == second_before);
}

#[test]
fn entropy_comes_and_the_console_echoes() {
    const TEXT: &[u8] = b"from the guest";
    let Some(kvm) = kvm() else { return };
    // Without disks the devices come two slots earlier.
    let [entropy, input, output] =
        [ENTROPY, INPUT, OUTPUT].map(|queue| Queue { slot: queue.slot - 2, ..queue });
    let image = image(|a| {
        set_up(a, &[entropy], 0)?;
        offer(a, entropy, 0)?;
        set_up(a, &[input, output], 0)?;
        offer(a, output, 0)?;
        offer(a, input, 0)?;
        // Prints what came in: as many bytes as the used ring says.
        a.mov(ecx, dword_ptr(input.used() + 8))?;
        a.mov(esi, input.buffer(0))?;
        a.mov(dx, 0x3f8)?;
        a.cld()?;
        a.rep().outsb()?;
        shutdown(a)
    });
    let port = ConsolePort::new().unwrap();
    let mut config = config(&image);
    config.console = Some(port.clone());
    let (machine, events) = Machine::create(&kvm, config).unwrap();
    let guest = Flat { machine, events };
    let memory = guest.machine.memory();
    lay_out(&guest, entropy, 0, &[(entropy.buffer(0), 32, WRITE)]);
    lay_out(&guest, input, 0, &[(input.buffer(0), 64, WRITE)]);
    lay_out(&guest, output, 0, &[(output.buffer(0), u32::try_from(TEXT.len()).unwrap(), 0)]);
    memory.write_slice(TEXT, GuestAddress(output.buffer(0).into())).unwrap();
    guest.machine.resume().unwrap();

    let mut echoed = Vec::new();
    wait_until("the console's output", || {
        let mut bytes = [0; 64];
        let count = port.read_output(&mut bytes);
        echoed.extend_from_slice(&bytes[..count]);
        echoed.len() >= TEXT.len()
    });
    assert_eq!(echoed, TEXT);
    assert_eq!(port.write_input(&echoed), TEXT.len());
    assert_eq!(guest.event(), MachineEvent::Shutdown);
    assert_eq!(guest.printed().escape_ascii().to_string(), TEXT.escape_ascii().to_string());
    assert_eq!(guest.word(u64::from(entropy.used()) + 8), 32, "as much as was asked for");
    let mut random = [0; 33];
    memory.read_slice(&mut random, GuestAddress(entropy.buffer(0).into())).unwrap();
    assert_ne!(random[..32], [0; 32]);
    assert_eq!(random[32], 0, "and no more");
}
