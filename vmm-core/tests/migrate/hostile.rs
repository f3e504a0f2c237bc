//! A target that is fed a recorded stream, cut, changed or mixed up.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vmm_core::migrate::{MigrationVm, Ready, TargetError, TargetOptions, receive};

use super::fake::{FakeIncoming, FakeVm, contents, fill, memory};
use super::pipe::{Replay, Side};
use super::{Hooks, migrate_over, source_options, target_options};

const PAGES: u64 = 48;

/// What a source sent, connection by connection, and its memory.
fn recording() -> &'static (Vec<Vec<u8>>, Vec<u8>) {
    static RECORDING: OnceLock<(Vec<Vec<u8>>, Vec<u8>)> = OnceLock::new();
    RECORDING.get_or_init(|| {
        let vm = FakeVm::new(memory(PAGES));
        fill(vm.memory(), PAGES / 2);
        let source: Arc<Side> = Arc::default();
        let incoming = FakeIncoming::new(memory(PAGES));
        let options = (&source_options(), &target_options());
        let sides = (Arc::clone(&source), Arc::default());
        let (migrated, _) = migrate_over(sides, &vm, incoming, options, &mut Hooks::committing());
        migrated.unwrap();
        (source.recorded(), contents(vm.memory()))
    })
}

fn replay(streams: Vec<Vec<u8>>) -> Result<Ready<FakeIncoming>, TargetError> {
    let begin = Instant::now();
    let options = TargetOptions { stall_limit: Duration::from_secs(2), ..target_options() };
    let result =
        receive(FakeIncoming::new(memory(PAGES)), &mut Replay(streams.into_iter()), &options);
    assert!(begin.elapsed() < Duration::from_secs(10), "it took {:?}", begin.elapsed());
    result
}

/// The bytes that `receive` reads of the control connection: all but the last frame (committed).
const COMMITTED_FRAME_BYTES: usize = 12;

#[test]
fn the_recording_itself_is_received() {
    let (streams, expected) = recording();
    assert_eq!(streams.len(), 2);
    let ready = replay(streams.clone()).unwrap();
    assert!(contents(&ready.vm.memory) == *expected);
    assert!(ready.vm.writes.is_some());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn a_flipped_bit_is_found(stream in 0..2_usize, at in any::<proptest::sample::Index>(), bit in 0..8_u8) {
        let mut streams = recording().0.clone();
        let length = streams[stream].len() - if stream == 0 { COMMITTED_FRAME_BYTES } else { 0 };
        let at = at.index(length);
        streams[stream][at] ^= 1 << bit;
        let error = replay(streams).unwrap_err();
        prop_assert!(!error.to_string().is_empty());
    }

    #[test]
    fn a_cut_is_found(stream in 0..2_usize, at in any::<proptest::sample::Index>()) {
        let mut streams = recording().0.clone();
        let length = streams[stream].len() - if stream == 0 { COMMITTED_FRAME_BYTES } else { 0 };
        streams[stream].truncate(at.index(length));
        prop_assert!(replay(streams).is_err());
    }

    #[test]
    fn garbage_is_refused(control in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(replay(vec![control]).is_err());
    }

    /// Frames whose checksums are right, but whose contents are anything.
    #[test]
    fn well_formed_nonsense_is_refused(
        frames in proptest::collection::vec((0..14_u8, proptest::collection::vec(any::<u8>(), 0..80)), 1..6),
        on_data in any::<bool>(),
    ) {
        let mut streams = recording().0.clone();
        let nonsense = frames.iter().flat_map(|(kind, payload)| frame(*kind, payload));
        if on_data {
            let attach = attach_bytes(&streams[1]);
            streams[1].truncate(attach);
            streams[1].extend(nonsense);
        } else {
            streams[0] = nonsense.collect();
        }
        prop_assert!(replay(streams).is_err());
    }
}

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_le_bytes();
    let crc = crc32fast::hash(&[&[kind], &length[..], payload].concat()).to_le_bytes();
    [&[kind, 0, 0, 0], &length[..], &crc[..], payload].concat()
}

/// The length of the first frame.
fn attach_bytes(stream: &[u8]) -> usize {
    12 + usize::try_from(u32::from_le_bytes(stream[4..8].try_into().unwrap())).unwrap()
}

fn pages(first: u64, count: u32, kind: u32, data: usize) -> Vec<u8> {
    let header = [&first.to_le_bytes()[..], &count.to_le_bytes(), &kind.to_le_bytes()].concat();
    frame(4, &[header, vec![1; data]].concat())
}

#[test]
fn pages_outside_memory_or_too_many_of_them_are_refused() {
    let cases = [
        ("in the hole", pages(PAGES / 2, 1, 1, 4096), "not guest memory"),
        ("across the end", pages(PAGES / 2 - 1, 2, 1, 8192), "not guest memory"),
        ("a wrapping run", pages(u64::MAX - 1, 4, 0, 0), "pages from page"),
        ("a wrapping address", pages(1 << 52, 1, 0, 0), "not guest memory"),
        ("no pages", pages(0, 0, 0, 0), "0 pages"),
        ("a frame without any", frame(4, &[]), "pages that are none"),
        ("an unknown kind", pages(0, 1, 2, 0), "unknown kind"),
        ("fewer bytes than pages", pages(0, 2, 1, 4096), "ends too early"),
        ("more pages than there are", pages(0, u32::MAX, 0, 0), "more pages"),
        (
            "a second round's number",
            frame(5, &[[2, 0, 0, 0].as_slice(), &[0; 12]].concat()),
            "in round 1",
        ),
        (
            "pages that were not sent",
            frame(5, &[[1, 0, 0, 0, 1, 0, 0, 0, 9].as_slice(), &[0; 7]].concat()),
            "announced",
        ),
        (
            "a huge frame",
            [&[4, 0, 0, 0][..], &u32::MAX.to_le_bytes(), &[0; 4]].concat(),
            "frame of",
        ),
        ("a message of the other side", frame(6, &[0; 16]), "while receiving memory"),
    ];
    for (name, bytes, expected) in cases {
        let mut streams = recording().0.clone();
        let attach = attach_bytes(&streams[1]);
        streams[1].truncate(attach);
        streams[1].extend(bytes);
        let error = replay(streams).unwrap_err().to_string();
        assert!(error.contains(expected), "{name}: {error}");
    }
}
