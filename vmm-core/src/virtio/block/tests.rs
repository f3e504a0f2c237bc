use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;

use super::*;
use crate::gate::{Refused, boottime_ns};
use crate::virtio::DeviceEvent;
use crate::virtio::testing::{Bench, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, MEMORY_BYTES, RING};

const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x8100;
const DATA: u64 = 0xa000;
const SECTORS: u64 = 1024;
const ALL: u64 = F_FLUSH | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

struct Rig {
    bench: Bench,
    device: Block,
    gate: WriteGate,
    file: tempfile::NamedTempFile,
}

impl Rig {
    fn new(readonly: bool) -> Self {
        Self::with_features(readonly, ALL)
    }

    fn with_features(readonly: bool, features: u64) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        let contents: Vec<u8> =
            (0..SECTORS * 512).map(|at| (at / 512 + 1).to_le_bytes()[0]).collect();
        file.as_file().write_all_at(&contents, 0).unwrap();
        let image = Image::open(file.path(), readonly).unwrap();
        let gate = WriteGate::default();
        let config = BlockConfig { image, serial: "serial-1".into(), queues: 1 };
        let mut device = Block::new(config, gate.clone());
        let bench = Bench::new(1);
        bench.start(&mut device, features);
        Self { bench, device, gate, file }
    }

    fn header(&self, kind: u32, sector: u64) {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&sector.to_le_bytes());
        self.bench.write(HEADER, &bytes);
        self.bench.write(STATUS, &[0xee]);
    }

    /// Does a request with one data buffer; gives the status and the used length.
    fn request(&mut self, kind: u32, sector: u64, data: (u64, u32, u16)) -> (u8, u32) {
        self.header(kind, sector);
        let parts = [(HEADER, 16, 0), data, (STATUS, 1, DESC_WRITE)];
        let parts: Vec<_> = parts.into_iter().filter(|(_, length, _)| *length > 0).collect();
        let head = self.bench.push(0, &parts);
        let used = self.bench.wait_used(0, 1);
        assert_eq!(used[0].0, head);
        (self.bench.read(STATUS, 1)[0], used[0].1)
    }

    fn segments(&mut self, kind: u32, segments: &[(u64, u32, u32)]) -> u8 {
        let bytes: Vec<u8> = segments
            .iter()
            .flat_map(|(sector, count, flags)| {
                let mut bytes = sector.to_le_bytes().to_vec();
                bytes.extend_from_slice(&count.to_le_bytes());
                bytes.extend_from_slice(&flags.to_le_bytes());
                bytes
            })
            .collect();
        self.bench.write(DATA, &bytes);
        self.request(kind, 0, (DATA, u32::try_from(bytes.len()).unwrap(), 0)).0
    }

    fn on_disk(&self, sector: u64) -> u8 {
        let mut bytes = [0; 512];
        self.file.as_file().read_exact_at(&mut bytes, sector * 512).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "sector {sector} is mixed");
        bytes[0]
    }
}

#[test]
fn reads_writes_flushes_and_names_itself() {
    let mut rig = Rig::new(false);
    assert_eq!(rig.request(0, 3, (DATA, 1024, DESC_WRITE)), (OK, 1025));
    assert_eq!(rig.bench.read(DATA, 1024), [[4; 512], [5; 512]].concat());
    rig.bench.write(DATA, &[0x77; 512]);
    assert_eq!(rig.request(1, SECTORS - 1, (DATA, 512, 0)), (OK, 1));
    assert_eq!(rig.on_disk(SECTORS - 1), 0x77);
    assert_eq!(rig.request(4, 0, (0, 0, 0)), (OK, 1));
    assert_eq!(rig.request(8, 0, (DATA, 20, DESC_WRITE)), (OK, 21));
    assert_eq!(rig.bench.read(DATA, 20), b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(rig.request(8, 0, (DATA, 5, DESC_WRITE)), (OK, 6));
    assert_eq!(rig.device.stop().len(), 1);
}

#[test]
fn what_cannot_be_gets_a_status() {
    let mut rig = Rig::new(false);
    let write = DESC_WRITE;
    for (kind, sector, data, expected) in [
        (0, SECTORS, (DATA, 512, write), IOERR),
        (0, SECTORS - 1, (DATA, 1024, write), IOERR),
        (0, u64::MAX, (DATA, 512, write), IOERR),
        (0, u64::MAX / 512, (DATA, 512, write), IOERR),
        (0, 0, (DATA, 511, write), IOERR),
        (0, 0, (MEMORY_BYTES as u64 - 512, 1024, write), IOERR),
        (0, 0, (u64::MAX - 511, 512, write), IOERR),
        (1, SECTORS, (DATA, 512, 0), IOERR),
        (1, 0, (DATA, 513, 0), IOERR),
        (1, 0, (1 << 40, 512, 0), IOERR),
        (2, 0, (DATA, 512, 0), UNSUPP),
        (0xffff_ffff, 0, (DATA, 512, write), UNSUPP),
        (11, 0, (DATA, 8, 0), IOERR),
        (13, 0, (0, 0, 0), IOERR),
        (0, 0, (0, 0, 0), OK),
    ] {
        let status = rig.request(kind, sector, data).0;
        assert_eq!(status, expected, "type {kind}, sector {sector:#x}, data {data:x?}");
    }
    let too_short = rig.bench.push(0, &[(HEADER, 8, 0), (STATUS, 1, DESC_WRITE)]);
    assert_eq!(rig.bench.wait_used(0, 1), [(too_short, 1)]);
    assert_eq!(rig.bench.read(STATUS, 1), [IOERR]);
    assert_eq!(rig.request(0, 0, (DATA, 512, DESC_WRITE)), (OK, 513), "still alive");
}

#[test]
fn headers_and_data_in_any_layout() {
    let mut rig = Rig::new(false);
    rig.header(1, 7);
    rig.bench.write(HEADER + 16, &[0x55; 512]);
    // Header and data in pieces that respect no border, and an empty buffer.
    let parts = [
        (HEADER, 3, 0),
        (HEADER + 3, 0, 0),
        (HEADER + 3, 100, 0),
        (HEADER + 103, 425, 0),
        (0x9000, 1, DESC_WRITE),
    ];
    let head = rig.bench.push(0, &parts);
    assert_eq!(rig.bench.wait_used(0, 1), [(head, 1)]);
    assert_eq!((rig.on_disk(7), rig.bench.read(0x9000, 1)[0]), (0x55, OK));

    // Data and status in one buffer, through an indirect table.
    rig.header(0, 7);
    rig.bench.put_descriptor(0xf000, 0, (HEADER, 16, DESC_NEXT, 1));
    rig.bench.put_descriptor(0xf000, 1, (DATA, 513, DESC_WRITE, 0));
    let head = rig.bench.push(0, &[(0xf000, 32, DESC_INDIRECT)]);
    assert_eq!(rig.bench.wait_used(0, 1), [(head, 513)]);
    assert_eq!(rig.bench.read(DATA, 513), [vec![0x55; 512], vec![OK]].concat());
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let mut rig = Rig::new(true);
    assert_ne!(rig.device.features() & F_RO, 0);
    assert_eq!(rig.request(0, 0, (DATA, 512, DESC_WRITE)).0, OK);
    rig.bench.write(DATA, &[9; 512]);
    assert_eq!(rig.request(1, 0, (DATA, 512, 0)).0, IOERR);
    assert_eq!(rig.segments(11, &[(0, 8, 0)]), IOERR);
    assert_eq!(rig.segments(13, &[(0, 8, 0)]), IOERR);
    assert_eq!(rig.on_disk(0), 1);
}

#[test]
fn the_gate_stops_every_kind_of_write() {
    let mut rig = Rig::new(false);
    rig.gate.renew(boottime_ns());
    rig.bench.write(DATA, &[9; 512]);
    assert_eq!(rig.request(1, 0, (DATA, 512, 0)), (IOERR, 1));
    assert_eq!(rig.segments(11, &[(0, 8, 0)]), IOERR);
    assert_eq!(rig.segments(13, &[(0, 8, 0)]), IOERR);
    assert_eq!(rig.segments(13, &[(0, 8, 1)]), IOERR);
    assert_eq!(rig.request(0, 0, (DATA, 512, DESC_WRITE)).0, OK, "reads go on");
    assert_eq!(rig.on_disk(0), 1);
    let events = rig.bench.events.lock().unwrap().clone();
    let [DeviceEvent::WriteRefused { reason: Refused::DeadlinePassed { .. }, .. }] = &events[..]
    else {
        panic!("{events:?}");
    };
    rig.gate.renew(boottime_ns() + 60_000_000_000);
    rig.bench.write(DATA, &[9; 512]);
    assert_eq!(rig.request(1, 0, (DATA, 512, 0)).0, OK);
    assert_eq!(rig.on_disk(0), 9);
}

#[test]
fn discard_gives_space_back_and_zeroes_are_zeros() {
    let mut rig = Rig::new(false);
    let blocks = |rig: &Rig| rig.file.as_file().metadata().unwrap().blocks();
    rig.file.as_file().sync_all().unwrap();
    let before = blocks(&rig);
    assert_eq!(rig.segments(11, &[(0, 256, 0), (512, 256, 0)]), OK);
    rig.file.as_file().sync_all().unwrap();
    assert!(blocks(&rig) <= before - 512, "{} of {before} blocks", blocks(&rig));
    assert_eq!([0, 255, 256, 511, 512, 767, 768].map(|at| rig.on_disk(at)), [0, 0, 1, 0, 0, 0, 1]);

    assert_eq!(rig.segments(13, &[(300, 3, 0)]), OK);
    assert_eq!([299, 300, 302, 303].map(|at| rig.on_disk(at)), [44, 0, 0, 48]);
    assert_eq!(rig.segments(13, &[(800, 8, 1)]), OK);
    assert_eq!([799, 800, 807, 808].map(|at| rig.on_disk(at)), [32, 0, 0, 41]);
    rig.device.image.write_zeros_for_test(900 * 512, 512);
    assert_eq!([899, 900, 901].map(|at| rig.on_disk(at)), [132, 0, 134]);

    let end = SECTORS - 8;
    for (kind, segments, expected) in [
        (11, vec![(0, 8, 1)], UNSUPP),
        (13, vec![(0, 8, 2)], UNSUPP),
        (13, vec![(end, 9, 0)], IOERR),
        (11, vec![(u64::MAX, 8, 0)], IOERR),
        (11, vec![(0, 0, 0)], IOERR),
        (13, vec![(0, u32::MAX, 0)], IOERR),
        (13, vec![(400, 8, 0), (end, 9, 0)], IOERR),
        (11, vec![(0, 8, 0); 17], IOERR),
    ] {
        assert_eq!(rig.segments(kind, &segments), expected, "{kind} {segments:?}");
    }
    assert_eq!(rig.on_disk(400), 145, "nothing is done of a request that is partly bad");
    assert_eq!(rig.file.as_file().metadata().unwrap().len(), SECTORS * 512);
}

#[test]
fn the_cache_mode_is_the_drivers() {
    let rig = Rig::with_features(false, 0);
    assert_eq!(rig.device.config()[32], 0, "a driver that cannot flush gets write-through");
    let mut rig = Rig::new(false);
    assert_eq!(rig.device.config()[32], 1);
    rig.device.write_config(32, &[0]);
    assert_eq!(rig.device.config()[32], 0);
    rig.device.write_config(32, &[7]);
    rig.device.write_config(0, &[1]);
    assert_eq!(rig.device.config()[32], 0);
    assert_eq!(rig.device.config()[..8], SECTORS.to_le_bytes());
    rig.bench.write(DATA, &[9; 512]);
    assert_eq!(rig.request(1, 0, (DATA, 512, 0)).0, OK);
}

#[test]
fn a_batch_is_served_whole() {
    let mut rig = Rig::new(false);
    drop(rig.device.stop());
    rig.header(1, 5);
    let heads: Vec<u16> = (0..5)
        .map(|_| rig.bench.push(0, &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, DESC_WRITE)]))
        .collect();
    rig.bench.write(DATA, &[3; 512]);
    rig.bench.start(&mut rig.device, ALL);
    let used = rig.bench.wait_used(0, 5);
    assert_eq!(used.iter().map(|(head, _)| *head).collect::<Vec<_>>(), heads);
    assert_eq!(rig.on_disk(5), 3);
}

#[test]
fn a_stopped_device_goes_on_where_it_was() {
    let mut rig = Rig::new(false);
    for _ in 0..20 {
        assert_eq!(rig.request(0, 3, (DATA, 512, DESC_WRITE)), (OK, 513));
    }
    let state = rig.device.save();
    let queues = rig.device.stop();
    assert_eq!((queues[0].state().next_available, queues[0].state().next_used), (20, 20));
    rig.bench.take_back(&queues);
    drop(queues);
    let image = Image::open(rig.file.path(), false).unwrap();
    let config = BlockConfig { image, serial: String::new(), queues: 1 };
    rig.device = Block::new(config, rig.gate.clone());
    rig.device.restore(1, &state).unwrap();
    rig.bench.start(&mut rig.device, ALL);
    assert_eq!(rig.request(0, 3, (DATA, 512, DESC_WRITE)), (OK, 513));
    rig.file.as_file().set_len(512).unwrap();
    let image = Image::open(rig.file.path(), false).unwrap();
    let config = BlockConfig { image, serial: String::new(), queues: 1 };
    let mut other = Block::new(config, rig.gate.clone());
    assert!(matches!(other.restore(1, &state), Err(DeviceError::State { .. })));
    assert!(matches!(other.restore(1, &[0xff; 3]), Err(DeviceError::State { .. })));
}

#[test]
fn broken_rings_ask_for_a_reset() {
    let breaks: [fn(&mut Bench); 6] = [
        |bench| bench.offer(0, RING),
        |bench| bench.set_available_index(0, RING + 1),
        |bench| {
            bench.push(0, &[(HEADER, 16, 0)]); // no room for a status
        },
        |bench| {
            bench.push(0, &[(STATUS, 1, DESC_WRITE), (HEADER, 16, 0)]);
        },
        |bench| {
            bench.put_descriptor(0x1000, 0, (HEADER, 16, DESC_NEXT, 0)); // a loop
            bench.offer(0, 0);
        },
        |bench| {
            bench.push(0, &[(HEADER, 16, 0), (u64::MAX, 1, DESC_WRITE)]); // status outside
        },
    ];
    for (index, broken) in breaks.into_iter().enumerate() {
        let mut rig = Rig::new(false);
        broken(&mut rig.bench);
        rig.bench.wait_needs_reset();
        let events = rig.bench.events.lock().unwrap().clone();
        assert!(matches!(&events[..], [DeviceEvent::NeedsReset { .. }]), "{index}: {events:?}");
        assert_eq!(rig.bench.used_index(0), 0, "{index}");
        assert_eq!(rig.device.stop().len(), 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever descriptors, ring entries and request headers say: no panic, the image keeps its
    /// size, and nothing outside the writable buffers changes.
    #[test]
    fn random_chains_do_no_harm(
        descriptors in proptest::collection::vec(
            (prop_oneof![Just(HEADER), DATA..DATA + 0x4000, any::<u64>()],
             prop_oneof![Just(16_u32), Just(1), Just(512), 0..0x3000_u32, any::<u32>()],
             0..8_u16, 0..20_u16), 16),
        heads in proptest::collection::vec(0..18_u16, 1..6),
        kind in prop_oneof![0..14_u32, any::<u32>()],
        sector in prop_oneof![0..SECTORS + 2, any::<u64>()],
    ) {
        let mut rig = Rig::new(false);
        let canary = vec![0xa5; 0x1000];
        rig.bench.write(0x7_0000, &canary);
        rig.header(kind, sector);
        let mut reaches_canary = false;
        for (index, (address, length, flags, next)) in (0_u16..).zip(&descriptors) {
            let end = address.saturating_add(u64::from(*length));
            reaches_canary |= *address < 0x7_1000 && end > 0x7_0000;
            rig.bench.put_descriptor(0x1000, index, (*address, *length, *flags, *next));
        }
        // Indirect tables in the data area may point anywhere; they are zeros here.
        for head in heads {
            rig.bench.offer(0, head);
        }
        prop_assert_eq!(rig.device.stop().len(), 1);
        prop_assert_eq!(rig.file.as_file().metadata().unwrap().len(), SECTORS * 512);
        if !reaches_canary {
            prop_assert_eq!(rig.bench.read(0x7_0000, 0x1000), canary);
        }
    }
}

#[test]
fn a_write_through_image_leaves_nothing_in_the_page_cache_to_be_written_late() {
    let rig = Rig::new(false);
    let flags = |image: &Image| {
        // SAFETY: reads the flags of a descriptor that is open.
        unsafe { libc::fcntl(image.fd(), libc::F_GETFL) }
    };
    let through = Image::open_write_through(rig.file.path()).unwrap();
    let cached = Image::open(rig.file.path(), false).unwrap();
    assert_eq!(flags(&through) & libc::O_DSYNC, libc::O_DSYNC);
    assert_eq!(flags(&cached) & libc::O_DSYNC, 0);
}
