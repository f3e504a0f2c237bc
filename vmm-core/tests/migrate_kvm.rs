//! Live migration of a guest on this host's /dev/kvm, between machines of one process over loopback TLS.
//!
//! The guest is a flat firmware image that goes round 4 MiB of its memory for ever: each page must
//! hold what the last round left there, and gets the next value. A page that a migration lost or
//! brought too early is found by the guest itself, on whichever side it runs then.

#[allow(dead_code, unreachable_pub, reason = "it is the interface of another crate")]
#[path = "../../tests/src/skip.rs"]
mod skip;

use std::fs::File;
use std::io::Write;
use std::net::TcpListener;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_core::boot::BootSource;
use vmm_core::machine::{Machine, MachineConfig};
use vmm_core::memory::GuestMemory;
use vmm_core::migrate::tls::{Identity, TlsAcceptor, TlsConnector};
use vmm_core::migrate::{
    Commit, CommitWanted, Migrated, Pagemap, Progress, Ready, SourceHooks, SourceOptions, Subject,
    TargetOptions, migrate, receive,
};

const MEMORY: u64 = 64 << 20;
const IMAGE_BYTES: usize = 128 << 10;
/// Where the last 64 KiB of the image lie, in which all code is.
const SEGMENT: u32 = 0xffff_0000;
const SEGMENT_OFFSET: usize = 0x1_0000;
const ENTRY_16: u16 = 0x1000;
const GDTR: u16 = 0x2000;
const GDT: u16 = 0x2010;
const ENTRY_32: u16 = 0x3000;

/// The memory that the guest goes round.
const RING_BEGIN: u32 = 0x0100_0000;
const RING_END: u32 = RING_BEGIN + (4 << 20);
/// Rounds made.
const ROUNDS: u64 = 0x8000;
/// The address of a page that did not hold what it should, and what it held.
const LOST_PAGE: u64 = 0x8010;

/// The 32-bit program.
fn program() -> Vec<u8> {
    let mut a = CodeAssembler::new(32).unwrap();
    let (mut fill, mut round, mut page, mut lost) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    let memory = |address: u64| dword_ptr(u32::try_from(address).unwrap());
    a.mov(ax, 0x10).unwrap();
    a.mov(ds, ax).unwrap();
    a.mov(ebx, RING_BEGIN).unwrap();
    a.set_label(&mut fill).unwrap();
    a.mov(dword_ptr(ebx), ebx).unwrap();
    a.add(ebx, 4096).unwrap();
    a.cmp(ebx, RING_END).unwrap();
    a.jb(fill).unwrap();
    a.mov(ebp, 1).unwrap();
    a.set_label(&mut round).unwrap();
    a.mov(ebx, RING_BEGIN).unwrap();
    a.set_label(&mut page).unwrap();
    a.mov(eax, ebp).unwrap();
    a.dec(eax).unwrap();
    a.xor(eax, ebx).unwrap();
    a.cmp(dword_ptr(ebx), eax).unwrap();
    a.jne(lost).unwrap();
    a.mov(eax, ebp).unwrap();
    a.xor(eax, ebx).unwrap();
    a.mov(dword_ptr(ebx), eax).unwrap();
    a.add(ebx, 4096).unwrap();
    a.cmp(ebx, RING_END).unwrap();
    a.jb(page).unwrap();
    a.mov(memory(ROUNDS), ebp).unwrap();
    a.inc(ebp).unwrap();
    a.jmp(round).unwrap();
    a.set_label(&mut lost).unwrap();
    a.mov(eax, dword_ptr(ebx)).unwrap();
    a.mov(memory(LOST_PAGE + 4), eax).unwrap();
    a.mov(memory(LOST_PAGE), ebx).unwrap();
    a.hlt().unwrap();
    a.jmp(lost).unwrap();
    a.assemble(u64::from(SEGMENT) + u64::from(ENTRY_32)).unwrap()
}

/// The firmware image: reset vector, the way into protected mode, the program.
fn firmware() -> File {
    let mut image = vec![0_u8; IMAGE_BYTES];
    let mut put = |offset: u16, bytes: &[u8]| {
        let begin = SEGMENT_OFFSET + usize::from(offset);
        image[begin..begin + bytes.len()].copy_from_slice(bytes);
    };
    let jump = ENTRY_16.wrapping_sub(0xfff3).to_le_bytes();
    put(0xfff0, &[0xe9, jump[0], jump[1]]); // jmp ENTRY_16
    let gdtr = GDTR.to_le_bytes();
    let entry = (SEGMENT + u32::from(ENTRY_32)).to_le_bytes();
    let mut code = vec![0xfa]; // cli
    code.extend([0x2e, 0x66, 0x0f, 0x01, 0x16, gdtr[0], gdtr[1]]); // lgdt cs:[GDTR], 32-bit base
    code.extend([0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0]); // cr0 |= PE
    code.extend([0x66, 0xea, entry[0], entry[1], entry[2], entry[3], 0x08, 0x00]); // jmp 8:ENTRY_32
    put(ENTRY_16, &code);
    let table = (SEGMENT + u32::from(GDT)).to_le_bytes();
    put(GDTR, &[23, 0, table[0], table[1], table[2], table[3]]);
    // Marked as accessed: the image is read-only, so the CPU could not mark them.
    put(GDT + 8, &[0xff, 0xff, 0, 0, 0, 0x9b, 0xcf, 0]); // code, flat, 32-bit
    put(GDT + 16, &[0xff, 0xff, 0, 0, 0, 0x93, 0xcf, 0]); // data, flat
    put(ENTRY_32, &program());
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&image).unwrap();
    file
}

fn config() -> MachineConfig {
    MachineConfig::new(1, MEMORY, BootSource::Firmware(firmware()))
}

fn word(memory: &GuestMemory, address: u64) -> u32 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

fn contents(memory: &GuestMemory) -> Vec<u8> {
    let mut all = Vec::new();
    for region in memory.iter() {
        let mut bytes = vec![0; usize::try_from(region.len()).unwrap()];
        memory.read_slice(&mut bytes, region.start_addr()).unwrap();
        all.extend(bytes);
    }
    all
}

/// Waits until the guest has made `more` rounds, and checks that it has found no page wrong.
fn let_it_work(machine: &Machine, more: u32) {
    let memory = machine.memory();
    let from = word(memory, ROUNDS);
    let begin = Instant::now();
    while word(memory, ROUNDS).wrapping_sub(from) < more {
        let lost = word(memory, LOST_PAGE);
        assert_eq!(lost, 0, "page {lost:#x} held {:#x}", word(memory, LOST_PAGE + 4));
        let rounds = word(memory, ROUNDS);
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "the guest stands still at round {rounds}"
        );
        thread::sleep(Duration::from_millis(2));
    }
}

fn subject(generation: u64) -> Subject {
    Subject {
        migration_id: format!("test/{generation}"),
        vm_id: proto::VmId(uuid::Uuid::from_u128(1)),
        vm_name: "ring".to_owned(),
        generation: proto::Generation(generation),
    }
}

struct AlwaysCommit;

impl SourceHooks for AlwaysCommit {
    fn progress(&mut self, _: &Progress) {}

    fn commit(&mut self, _: &CommitWanted) -> Commit {
        Commit::Committed
    }
}

/// Moves the guest to a new machine, which does not run yet.
fn move_on(kvm: &Kvm, source: &Machine, generation: u64) -> (Migrated, Ready<Machine>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (ours, theirs) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let mut acceptor = TlsAcceptor::new(listener, &theirs, ours.fingerprint()).unwrap();
    let limit = Duration::from_secs(10);
    let mut connector = TlsConnector::new(address, &ours, theirs.fingerprint(), limit).unwrap();
    let (incoming, _events) = Machine::create_incoming(kvm, config()).unwrap();
    let pagemap = Pagemap::open().ok().map(Arc::new);
    let to = TargetOptions { pagemap: pagemap.clone(), ..TargetOptions::new(subject(generation)) };
    let options = SourceOptions { pagemap, ..SourceOptions::new(subject(generation)) };
    thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let mut ready = receive(incoming, &mut acceptor, &to)?;
            ready.announce_running();
            Ok::<_, vmm_core::migrate::TargetError>(ready)
        });
        let migrated = migrate(source, &mut connector, &options, &mut AlwaysCommit);
        let ready = receiver.join().unwrap();
        (migrated.unwrap(), ready.unwrap())
    })
}

#[test]
fn a_guest_that_checks_its_own_memory_moves_ten_times() {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            skip::this_test(&format!("/dev/kvm cannot be opened: {error}"));
            return;
        }
    };
    let (mut machine, _events) = Machine::create(&kvm, config()).unwrap();
    machine.resume().unwrap();
    let_it_work(&machine, 3);
    for generation in 1..=10 {
        let (migrated, ready) = move_on(&kvm, &machine, generation);
        println!(
            "migration {generation}: {} ms, downtime {:?}, {} rounds, {} KiB",
            migrated.total.as_millis(),
            migrated.downtime,
            migrated.rounds,
            migrated.bytes >> 10
        );
        let target = ready.vm;
        assert!(contents(target.memory()) == contents(machine.memory()), "memory differs");
        assert!(migrated.rounds >= 2, "the guest wrote all the time: {migrated:?}");
        target.resume().unwrap();
        let_it_work(&target, 5);
        machine = target;
    }
}
