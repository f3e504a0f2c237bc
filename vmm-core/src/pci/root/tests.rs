//! A driver's way to its device: configuration ports and ECAM, capabilities, the common
//! configuration, a request, an interrupt; and a whole bus saved and restored.

use std::collections::BTreeMap;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::gate::NO_DEADLINE;
use crate::interrupt::fake::FakePlatform;
use crate::virtio::no_events;
use crate::virtio::testing::wait;

const WINDOW: u64 = 0xc000_0000;
const ECAM: u64 = 0xe000_0000;
const MESSAGE: u64 = 0xfee0_0000;
const STATUS: u64 = 0x14;

struct Board {
    root: PciRoot,
    pio: Bus,
    mmio: Bus,
    memory: GuestMemory,
    platform: FakePlatform,
}

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
}

impl Board {
    fn new(memory: GuestMemory) -> Self {
        let platform = FakePlatform::default();
        let layout = PciLayout { window_start: WINDOW, window_size: 0x2000_0000, ecam_start: ECAM };
        let gate = WriteGate::new(NO_DEADLINE);
        let backend = Arc::new(platform.clone());
        let root = PciRoot::new(layout, memory.clone(), backend, gate, no_events());
        let (mut pio, mut mmio) = (Bus::default(), Bus::default());
        root.attach(&mut pio, &mut mmio).unwrap();
        Self { root, pio, mmio, memory, platform }
    }

    fn with_rng(memory: GuestMemory) -> Self {
        let board = Self::new(memory);
        assert_eq!(board.root.add_rng().unwrap(), 1);
        board
    }

    fn port_config(&self, slot: u32, at: u32) -> u32 {
        let address = 1 << 31 | slot << 11 | (at & 0xfc);
        self.pio.write(0xcf8, &address.to_le_bytes());
        let mut data = [0; 4];
        self.pio.read(0xcfc, &mut data);
        u32::from_le_bytes(data)
    }

    fn ecam(&self, slot: u64, at: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(ECAM + (slot << 15) + at, &mut data);
        u32::from_le_bytes(data)
    }

    fn ecam_write(&self, slot: u64, at: u64, data: &[u8]) {
        self.mmio.write(ECAM + (slot << 15) + at, data);
    }

    /// Capabilities of a function: (id, virtio structure type) to offset.
    fn capabilities(&self, slot: u64) -> BTreeMap<(u8, u8), u64> {
        let mut found = BTreeMap::new();
        let mut at = u64::from(self.ecam(slot, 0x34) & 0xff);
        while at != 0 {
            let [id, next, _, kind] = self.ecam(slot, at).to_le_bytes();
            let kind = if id == 9 { kind } else { 0 };
            assert!(found.insert((id, kind), at).is_none(), "twice: {id:#x} {kind}");
            at = u64::from(next);
        }
        found
    }

    fn bar(&self) -> u64 {
        u64::from(self.ecam(1, 0x10) & !0xf)
    }

    fn get(&self, at: u64, length: usize) -> u64 {
        let mut data = [0; 8];
        self.mmio.read(self.bar() + at, &mut data[..length]);
        u64::from_le_bytes(data)
    }

    fn set(&self, at: u64, value: u64, length: usize) {
        self.mmio.write(self.bar() + at, &value.to_le_bytes()[..length]);
    }

    /// What virtio_pci does until DRIVER_OK: MSI-X, features, queue 0 at 0x1000.
    fn drive(&self) {
        let capabilities = self.capabilities(1);
        let msix = capabilities[&(0x11, 0)];
        self.ecam_write(1, msix + 2, &0xc000_u16.to_le_bytes());
        for vector in 0..2_u64 {
            self.set(0x4000 + vector * 16, MESSAGE, 4);
            self.set(0x4004 + vector * 16, 0, 4);
            self.set(0x4008 + vector * 16, 0x40 + vector, 4);
            self.set(0x400c + vector * 16, 0, 4);
        }
        self.ecam_write(1, msix + 2, &0x8000_u16.to_le_bytes());
        self.set(STATUS, 0, 1);
        self.set(STATUS, 1, 1);
        self.set(STATUS, 3, 1);
        self.set(0x00, 1, 4);
        assert_eq!(self.get(0x04, 4) & 1, 1, "VERSION_1 is offered");
        self.set(0x08, 1, 4);
        self.set(0x0c, 1, 4);
        self.set(STATUS, 0xb, 1);
        assert_eq!(self.get(STATUS, 1), 0xb);
        self.set(0x10, 0, 2);
        assert_eq!(self.get(0x10, 2), 0);
        self.set(0x16, 0, 2);
        self.set(0x18, 16, 2);
        self.set(0x1a, 1, 2);
        assert_eq!(self.get(0x1a, 2), 1);
        self.set(0x20, 0x1000, 4);
        self.set(0x24, 0, 4);
        self.set(0x28, 0x1400, 8);
        self.set(0x30, 0x1800, 8);
        self.set(0x1c, 1, 2);
        self.set(STATUS, 0xf, 1);
    }

    /// Asks for 16 random bytes at 0x8000 as request number `index`, and waits for them.
    fn request(&self, index: u16) {
        let mut descriptor = 0x8000_u64.to_le_bytes().to_vec();
        descriptor.extend_from_slice(&16_u32.to_le_bytes());
        descriptor.extend_from_slice(&[2, 0, 0, 0]);
        self.memory.write_slice(&descriptor, GuestAddress(0x1000)).unwrap();
        let slot = 0x1404 + u64::from(index % 16) * 2;
        self.memory.write_obj(0_u16, GuestAddress(slot)).unwrap();
        self.memory.write_obj(index + 1, GuestAddress(0x1402)).unwrap();
        self.set(0x3000, 0, 2);
        self.wait_used(index + 1);
    }

    fn wait_used(&self, index: u16) {
        wait("the used index", || {
            self.memory.read_obj::<u16>(GuestAddress(0x1802)).unwrap() == index
        });
    }

    fn wait_messages(&self, expected: &[u32]) {
        wait("an interrupt", || self.platform.record.lock().unwrap().sent.len() >= expected.len());
        let sent = self.platform.take_sent();
        let expected: Vec<_> = expected.iter().map(|data| (MESSAGE, *data)).collect();
        assert_eq!(sent, expected);
    }
}

#[test]
fn both_ways_show_the_same_functions() {
    let board = Board::with_rng(memory());
    assert_eq!(board.port_config(0, 0), 0x0008_1b36);
    assert_eq!(board.port_config(0, 8) >> 16, 0x0600, "a host bridge");
    assert_eq!(board.port_config(1, 0), 0x1044_1af4);
    for at in (0..256).step_by(4) {
        assert_eq!(board.port_config(1, at), board.ecam(1, u64::from(at)), "{at:#x}");
    }
    assert_eq!(board.port_config(2, 0), u32::MAX, "an empty slot");
    assert_eq!(board.ecam(1, 0x1000), u32::MAX, "function 1");
    assert_eq!(board.ecam(1, 0x100), 0, "no extended capabilities");
    board.pio.write(0xcf8, &0x0000_0800_u32.to_le_bytes());
    let mut data = [0; 4];
    board.pio.read(0xcfc, &mut data);
    assert_eq!(data, [0xff; 4], "configuration is off");
    board.pio.write(0xcf8, &0x8000_0800_u32.to_le_bytes());
    board.pio.read(0xcfe, &mut data[..2]);
    assert_eq!(data[..2], [0x44, 0x10]);
    board.pio.write(0xcf9, &[6]);
    board.pio.read(0xcf8, &mut data);
    assert_eq!(data, 0x8000_0800_u32.to_le_bytes(), "a byte at 0xcf9 is no address");
    let all: Vec<_> = board.capabilities(1).into_keys().collect();
    assert_eq!(all, [(9, 1), (9, 2), (9, 3), (9, 4), (9, 5), (0x11, 0)]);
}

#[test]
fn a_driver_gets_bytes_and_an_interrupt() {
    let board = Board::with_rng(memory());
    board.drive();
    let doorbells = |board: &Board| -> Vec<u64> {
        board.platform.record.lock().unwrap().doorbells.keys().copied().collect()
    };
    assert_eq!(doorbells(&board), [board.bar() + 0x3000]);
    board.request(0);
    board.wait_messages(&[0x41]);
    assert_eq!((board.get(0x1000, 1), board.get(0x1000, 1)), (1, 0), "reading the ISR clears it");

    // The BAR moves, the doorbell with it; without decoding nothing answers.
    board.ecam_write(1, 0x10, &0xd000_0000_u32.to_le_bytes());
    assert_eq!(doorbells(&board), [0xd000_3000]);
    board.request(1);
    board.wait_messages(&[0x41]);
    board.ecam_write(1, 0x04, &[0, 0]);
    assert_eq!(doorbells(&board), Vec::<u64>::new());
    assert_eq!(board.get(STATUS, 1), 0xff);
    board.ecam_write(1, 0x04, &[6, 0]);

    board.set(STATUS, 0, 1);
    assert_eq!((board.get(STATUS, 1), board.get(0x1c, 2), board.get(0x18, 2)), (0, 0, 64));
    assert_eq!(doorbells(&board), Vec::<u64>::new());
    // The table outlives the device's reset; the driver comes again.
    board.memory.write_slice(&[0; 0x1000], GuestAddress(0x1000)).unwrap();
    board.drive();
    board.request(0);
    board.wait_messages(&[0x41]);
    board.root.reset();
    assert_eq!((board.bar(), board.get(STATUS, 1)), (WINDOW + 0x8000, 0));
}

#[test]
fn set_up_has_its_rules() {
    let board = Board::with_rng(memory());
    board.set(STATUS, 3, 1);
    board.set(STATUS, 0xb, 1);
    assert_eq!(board.get(STATUS, 1), 3, "no FEATURES_OK without VERSION_1");
    board.set(0x08, 1, 4);
    board.set(0x0c, 3, 4);
    board.set(STATUS, 0xb, 1);
    assert_eq!(board.get(STATUS, 1), 3, "nor with a feature that is not offered");
    board.set(0x0c, 1, 4);
    board.set(STATUS, 0x7, 1);
    assert_eq!(board.get(STATUS, 1), 3, "no DRIVER_OK before FEATURES_OK");
    board.set(STATUS, 0xb, 1);
    board.set(0x0c, 3, 4);
    assert_eq!(board.get(0x0c, 4), 1, "features are fixed by FEATURES_OK");
    for (size, expected) in [(128, 64), (3, 64), (0, 64), (32, 32)] {
        board.set(0x18, size, 2);
        assert_eq!(board.get(0x18, 2), expected);
    }
    board.set(0x1a, 2, 2);
    assert_eq!(board.get(0x1a, 2), 0xffff, "there are two vectors");
    board.set(0x16, 7, 2);
    assert_eq!(board.get(0x18, 2), 0, "there is no queue 7");
    board.set(0x16, 0, 2);
    // A queue outside memory breaks the device, not the process.
    board.set(0x20, 0xffff_ffff_ffff_fff0, 8);
    board.set(0x1c, 1, 2);
    board.set(0x20, 0x1000, 8);
    assert_eq!(board.get(0x20, 8), 0xffff_ffff_ffff_fff0, "an enabled queue is fixed");
    board.set(STATUS, 0xf, 1);
    assert_eq!(board.get(STATUS, 1), 0x4f);
    board.root.pause().unwrap();
    board.root.resume().unwrap();
    assert_eq!(board.get(STATUS, 1), 0x4f);
}

#[test]
fn the_access_capability_reaches_the_bar() {
    let board = Board::with_rng(memory());
    let at = board.capabilities(1)[&(9, 5)];
    let point = |offset: u32, length: u32| {
        board.ecam_write(1, at + 8, &offset.to_le_bytes());
        board.ecam_write(1, at + 12, &length.to_le_bytes());
    };
    point(0x18, 2);
    let mut data = [0; 2];
    board.mmio.read(ECAM + (1 << 15) + at + 16, &mut data);
    assert_eq!(u16::from_le_bytes(data), 64);
    point(0x14, 1);
    board.ecam_write(1, at + 16, &[1]);
    assert_eq!(board.get(STATUS, 1), 1);
    for (offset, length) in [(0x8000, 1), (u32::MAX, 4), (0x14, 3), (0x14, 0)] {
        point(offset, length);
        board.ecam_write(1, at + 16, &[3]);
    }
    assert_eq!(board.get(STATUS, 1), 1);
}

#[test]
fn a_saved_bus_goes_on_elsewhere() {
    let memory = memory();
    let board = Board::with_rng(memory.clone());
    board.drive();
    board.request(0);
    board.wait_messages(&[0x41]);
    assert!(matches!(board.root.save(), Err(PciError::NotPaused { .. })));
    board.root.pause().unwrap();
    // A request that comes while nothing runs is not lost.
    memory.write_obj(2_u16, GuestAddress(0x1402)).unwrap();
    let sections = board.root.save().unwrap();
    assert_eq!(memory.read_obj::<u16>(GuestAddress(0x1802)).unwrap(), 1);

    let other = Board::with_rng(memory.clone());
    other.root.restore(&sections).unwrap();
    assert_eq!(other.root.save().unwrap(), sections);
    assert_eq!(other.platform.take_sent(), []);
    other.root.resume().unwrap();
    other.wait_used(2);
    wait("interrupts", || other.platform.record.lock().unwrap().sent.len() == 2);
    other.platform.take_sent();
    other.request(2);
    other.wait_messages(&[0x41]);

    // The source goes on after a migration that failed.
    board.root.resume().unwrap();
    board.root.pause().unwrap();
    assert_eq!(board.root.save().unwrap()[0], sections[0]);

    let empty = Board::new(memory.clone());
    assert!(matches!(empty.root.restore(&sections), Err(PciError::OtherDevices { .. })));
    let console = Board::new(memory);
    console.root.add_console(ConsolePort::new().unwrap()).unwrap();
    assert!(matches!(console.root.restore(&sections), Err(PciError::Device(_))));
    assert!(matches!(console.root.restore(&sections[..1]), Err(PciError::State(_))));
}

#[test]
fn the_bus_has_an_end() {
    let board = Board::new(memory());
    for slot in 1..SLOTS {
        assert_eq!(board.root.add_rng().unwrap(), slot);
    }
    assert!(matches!(board.root.add_rng(), Err(PciError::Full)));
    board.root.stop();
    assert_eq!(board.ecam(1, 0), u32::MAX);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Any sequence of accesses to ports, ECAM and the window ends without a panic, and nothing is
    /// written to memory that no queue was set up in.
    #[test]
    fn random_accesses_do_no_harm(
        accesses in proptest::collection::vec(
            (0..4_u8, any::<bool>(),
             prop_oneof![0..0x100_u64, 0..0x8000_u64, any::<u64>()],
             prop_oneof![Just(1_usize), Just(2), Just(4), Just(8)],
             prop_oneof![0..16_u64, any::<u64>()]), 0..200),
        drive in any::<bool>(),
    ) {
        let board = Board::with_rng(memory());
        if drive {
            board.drive();
        }
        board.memory.write_slice(&[0xa5; 0x1000], GuestAddress(0x4_0000)).unwrap();
        for (way, write, offset, length, value) in accesses {
            let mut data = value.to_le_bytes()[..length].to_vec();
            let (bus, address) = match way {
                0 => (&board.pio, 0xcf8 + offset % 8),
                1 => (&board.mmio, ECAM + (1 << 15) + offset % 0x1000),
                2 => (&board.mmio, ECAM + offset % ECAM_BYTES),
                _ => (&board.mmio, board.bar().wrapping_add(offset)),
            };
            if write {
                bus.write(address, &data);
            } else {
                bus.read(address, &mut data);
            }
        }
        board.root.pause().unwrap();
        let sections = board.root.save().unwrap();
        let other = Board::with_rng(memory());
        other.root.restore(&sections).unwrap();
        prop_assert_eq!(other.root.save().unwrap(), sections);
        let mut page = vec![0; 0x1000];
        board.memory.read_slice(&mut page, GuestAddress(0x4_0000)).unwrap();
        prop_assert!(page.iter().all(|byte| *byte == 0xa5));
    }

    /// Sections that were tampered with are refused or taken, never a panic.
    #[test]
    fn hostile_state_does_no_harm(
        section in 0..3_usize,
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let memory = memory();
        let board = Board::with_rng(memory.clone());
        board.drive();
        board.root.pause().unwrap();
        let mut sections = board.root.save().unwrap();
        let bytes = &mut sections[section].bytes;
        for (at, value) in edits {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
        }
        let other = Board::with_rng(memory);
        if other.root.restore(&sections).is_ok() {
            other.root.resume().unwrap();
            other.root.pause().unwrap();
        }
    }
}
