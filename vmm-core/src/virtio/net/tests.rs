use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use super::engine::FRAME_BYTES;
use super::*;
use crate::virtio::testing::{Bench, DESC_WRITE, wait};
use crate::virtio::worker::Engine as _;

/// The device on one end of a datagram socket, which keeps packet borders as a tap does.
struct Rig {
    bench: Bench,
    device: Net,
    wire: UnixDatagram,
}

const MERGEABLE: u64 = F_MRG_RXBUF | F_GUEST_ANNOUNCE | F_STATUS;

fn net(tap: Tap) -> Net {
    Net::new(NetConfig { tap, mac: [2, 0, 0, 0, 0, 1], mtu: Some(1400) })
}

impl Rig {
    fn new(features: u64) -> Self {
        let (wire, tap) = UnixDatagram::pair().unwrap();
        wire.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        tap.set_nonblocking(true).unwrap();
        let mut device = net(Tap::fake(OwnedFd::from(tap)));
        let bench = Bench::new(3);
        device.run(bench.run(features), "net".into()).unwrap();
        Self { bench, device, wire }
    }

    fn frame(length: usize) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend((12..length).map(|at| at.to_le_bytes()[0]));
        frame
    }
}

#[test]
fn frames_leave_whole_and_bad_ones_are_dropped() {
    let mut rig = Rig::new(MERGEABLE);
    let frame = Rig::frame(100);
    rig.bench.write(0x8000, &frame);
    let short = rig.bench.push(1, &[(0x8000, 11, 0)]);
    let outside = rig.bench.push(1, &[(0x8000, 12, 0), (1 << 40, 60, 0)]);
    let huge = rig.bench.push(1, &[(0x8000, 12, 0), (0x8000, 0xf_0000, 0)]);
    let good = rig.bench.push(1, &[(0x8000, 12, 0), (0x800c, 50, 0), (0x803e, 38, 0)]);
    let used = rig.bench.wait_used(1, 4);
    assert_eq!(used, [(short, 0), (outside, 0), (huge, 0), (good, 0)]);
    let mut received = vec![0; 200];
    let length = rig.wire.recv(&mut received).unwrap();
    assert_eq!(received[..length], frame);
    rig.wire.set_nonblocking(true).unwrap();
    assert!(rig.wire.recv(&mut received).is_err(), "only the good frame came");
}

#[test]
fn a_frame_is_spread_over_as_many_buffers_as_it_needs() {
    let mut rig = Rig::new(MERGEABLE);
    rig.wire.send(&Rig::frame(100)).unwrap();
    rig.wire.send(&Rig::frame(20)).unwrap();
    let first = rig.bench.push(0, &[(0x9000, 40, DESC_WRITE)]);
    let second = rig.bench.push(0, &[(0x9100, 20, DESC_WRITE), (0x9200, 20, DESC_WRITE)]);
    // 80 bytes of room are too few for the first frame: nothing may be used yet.
    rig.bench.wait_idle(0);
    assert_eq!(rig.bench.used_index(0), 0);
    let third = rig.bench.push(0, &[(0x9300, 64, DESC_WRITE)]);
    assert_eq!(rig.bench.wait_used(0, 3), [(first, 40), (second, 40), (third, 20)]);
    let mut expected = Rig::frame(100);
    expected[10] = 3;
    let got = [(0x9000, 40), (0x9100, 20), (0x9200, 20), (0x9300, 20)];
    let got: Vec<u8> = got.iter().flat_map(|(at, length)| rig.bench.read(*at, *length)).collect();
    assert_eq!(got, expected);
    let fourth = rig.bench.push(0, &[(0x9400, 64, DESC_WRITE)]);
    assert_eq!(rig.bench.wait_used(0, 1), [(fourth, 20)]);
    assert_eq!(rig.bench.read(0x940a, 2), [1, 0]);
}

#[test]
fn buffers_that_are_too_few_are_waited_for_without_spinning() {
    let (wire, tap) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    let mut bench = Bench::new(3);
    let queues = [0, 1, 2].map(|index| Some(bench.queue(index)));
    let tap = Arc::new(Tap::fake(OwnedFd::from(tap)));
    let mut engine = NetEngine::new(tap, Arc::default(), true, queues);
    wire.send(&Rig::frame(100)).unwrap();
    let first = bench.push(0, &[(0x9000, 60, DESC_WRITE)]);
    engine.handle(0);
    assert_eq!(bench.used_index(0), 0);
    assert!(!bench.is_rung(0), "the worker would come back at once, for ever");
    let second = bench.push(0, &[(0x9100, 60, DESC_WRITE)]);
    assert!(bench.is_rung(0));
    engine.handle(0);
    assert_eq!(bench.wait_used(0, 2), [(first, 60), (second, 40)]);
}

#[test]
fn without_mergeable_buffers_a_frame_that_does_not_fit_is_dropped() {
    let mut rig = Rig::new(0);
    rig.wire.send(&Rig::frame(100)).unwrap();
    rig.wire.send(&Rig::frame(30)).unwrap();
    let head = rig.bench.push(0, &[(0x9000, 64, DESC_WRITE)]);
    assert_eq!(rig.bench.wait_used(0, 1), [(head, 30)]);
    assert_eq!(rig.bench.read(0x900c, 18), Rig::frame(30)[12..]);
}

#[test]
fn the_guest_is_asked_to_announce_and_acknowledges() {
    let mut rig = Rig::new(MERGEABLE);
    let status = |device: &Net| device.config()[6];
    assert_eq!(status(&rig.device), 1);
    let generation = rig.bench.signal.generation();
    let signal = rig.bench.signal.clone();
    rig.device.announce(&signal);
    assert_eq!(status(&rig.device), 3);
    assert_eq!((rig.bench.signal.isr(), rig.bench.signal.generation()), (2, generation + 1));
    rig.bench.write(0x8000, &[3, 0, 0, 0, 9, 9]);
    let unknown = rig.bench.push(2, &[(0x8004, 2, 0), (0x9000, 1, DESC_WRITE)]);
    assert_eq!(rig.bench.wait_used(2, 1), [(unknown, 1)]);
    assert_eq!((rig.bench.read(0x9000, 1)[0], status(&rig.device)), (1, 3));
    let ack = rig.bench.push(2, &[(0x8000, 2, 0), (0x9000, 1, DESC_WRITE)]);
    assert_eq!(rig.bench.wait_used(2, 1), [(ack, 1)]);
    assert_eq!((rig.bench.read(0x9000, 1)[0], status(&rig.device)), (0, 1));
    // What is announced when a save comes is announced by the target.
    rig.device.announce(&signal);
    assert_eq!(rig.device.stop().len(), 3);
    let state = rig.device.save();
    let (_, tap) = UnixDatagram::pair().unwrap();
    let mut other = net(Tap::fake(OwnedFd::from(tap)));
    other.restore(1, &state).unwrap();
    assert_eq!(status(&other), 3);
    other.mac[5] = 9;
    assert!(matches!(other.restore(1, &state), Err(DeviceError::State { .. })));
}

#[test]
fn a_guest_that_cannot_announce_is_not_asked() {
    let mut rig = Rig::new(F_MRG_RXBUF);
    let signal = rig.bench.signal.clone();
    rig.device.announce(&signal);
    assert_eq!((rig.device.config()[6], signal.isr()), (1, 0));
}

#[test]
fn bad_receive_buffers_break_the_device_not_the_process() {
    for part in [(0x9000, 64, 0), (1 << 40, 64, DESC_WRITE), (0x9000, 0, DESC_WRITE)] {
        let mut rig = Rig::new(MERGEABLE);
        rig.bench.push(0, &[part]);
        rig.wire.send(&Rig::frame(60)).unwrap();
        rig.bench.wait_needs_reset();
        // The wire's other frames wait; the worker neither spins nor ends.
        rig.wire.send(&Rig::frame(60)).unwrap();
        rig.bench.ring(0);
        rig.bench.wait_idle(0);
        assert_eq!(rig.device.stop().len(), 3);
    }
}

#[test]
fn the_largest_segment_fits() {
    let mut rig = Rig::new(MERGEABLE);
    let frame = Rig::frame(FRAME_BYTES);
    rig.wire.send(&frame).unwrap();
    let head = rig.bench.push(0, &[(0x1_0000, 0x1_8000, DESC_WRITE)]);
    assert_eq!(rig.bench.wait_used(0, 1), [(head, u32::try_from(FRAME_BYTES).unwrap())]);
    assert_eq!(rig.bench.read(0x1_000c, FRAME_BYTES - 12), frame[12..]);
    wait("the tap to be empty", || rig.wire.send(&frame).is_ok());
}

#[test]
fn offloads_follow_the_guest() {
    assert_eq!(offloads(F_GUEST_TSO4), 0, "segments need checksums");
    assert_eq!(offloads(F_GUEST_CSUM), OFFLOAD_CSUM);
    let all = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN;
    assert_eq!(offloads(all), 15);
}

#[test]
fn names_that_no_interface_has_are_refused() {
    for name in ["", "a/b", "a b", "sixteen-bytes-ab", "nul\0"] {
        assert!(matches!(Tap::open(name), Err(TapError::Name(_))), "{name:?}");
    }
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(Tap::from_fd(OwnedFd::from(file)), Err(TapError::Flags)));
}

#[test]
fn a_real_tap_takes_every_offload() {
    let tap = match Tap::open("hf-test%d") {
        Ok(tap) => tap,
        Err(error) => {
            crate::skip::this_test(&error.to_string());
            return;
        }
    };
    for features in [0, F_GUEST_CSUM, F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN] {
        tap.set_offload(offloads(features)).unwrap();
    }
    // SAFETY: the descriptor is open as long as `tap` lives.
    let copy = unsafe { std::os::fd::BorrowedFd::borrow_raw(tap.fd()) };
    let copy = Tap::from_fd(copy.try_clone_to_owned().unwrap()).unwrap();
    copy.set_offload(0).unwrap();
}
