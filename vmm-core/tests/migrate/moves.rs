//! Migrations that succeed, and those that the caller ends.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestMemoryBackend};
use vmm_core::migrate::{
    Commit, DirtyPages, MigrationVm, Pagemap, Phase, SourceError, SourceOptions, TargetOptions,
};

use super::fake::{FakeIncoming, FakeVm, contents, fill, memory, page_address};
use super::pipe::Side;
use super::{Hooks, assert_runs, migrate_over, source_options, target_options};

const PAGES: u64 = 4096; // 16 MiB

fn sides() -> (Arc<Side>, Arc<Side>) {
    (Arc::default(), Arc::default())
}

#[test]
fn all_memory_arrives_though_the_guest_keeps_writing() {
    for connections in [1, 3] {
        let vm = Arc::new(FakeVm::new(memory(PAGES)));
        fill(vm.memory(), PAGES);
        let guest = vm.run(PAGES, 16, Duration::from_micros(300));
        let options = (
            &SourceOptions { data_connections: connections, ..source_options() },
            &TargetOptions {
                pagemap: Some(Arc::new(Pagemap::open().unwrap())),
                ..target_options()
            },
        );
        let incoming = FakeIncoming::new(memory(PAGES));
        let restored = Arc::clone(&incoming.restored);
        let mut hooks = Hooks::committing();
        hooks.at_commit = Box::new(|| {
            assert!(
                restored.load(Ordering::Acquire),
                "the commit is asked for before the target is ready"
            );
            assert!(vm.seen().paused, "the commit is asked for while the VM runs");
        });
        let (migrated, ready) = migrate_over(sides(), &vm, incoming, options, &mut hooks);
        let (migrated, ready) = (migrated.unwrap(), ready.unwrap());
        drop(guest);
        assert_eq!(vm.seen().resumed, 0, "a committed source never resumes");
        assert_eq!(ready.vm.writes, Some(vm.seen().writes), "the state is that of the pause");
        assert!(contents(&ready.vm.memory) == contents(vm.memory()), "memory differs");
        assert!(migrated.rounds >= 2 && migrated.rounds == ready.rounds, "{migrated:?}");
        assert!(migrated.bytes > PAGES * 4096, "{migrated:?}");
        let downtime = migrated.downtime.expect("the target's word arrived");
        assert!(downtime >= migrated.paused_before_commit && downtime <= migrated.total);
        for phase in [Phase::Precopy, Phase::StopAndCopy, Phase::Commit] {
            assert!(hooks.saw(phase), "no progress in {phase:?}");
        }
        for now in &hooks.progress {
            let known = (now.dirty_bytes_s.is_some(), now.expected_downtime.is_some());
            assert_eq!(known, (now.round > 1, now.round > 1), "only rounds measure it: {now:?}");
        }
    }
}

#[test]
fn unused_memory_costs_neither_bytes_nor_memory() {
    const SPARSE: u64 = 1 << 16; // 256 MiB
    let vm = FakeVm::new(memory(SPARSE));
    for index in 0..64 {
        vm.memory().write_obj(index + 1, page_address(vm.memory(), index * 1001)).unwrap();
    }
    // Looking through that much takes a busy machine without optimization longer than a stall.
    let stall_limit = Duration::from_secs(120);
    for with_pagemap in [true, false] {
        let pagemap = with_pagemap.then(|| Arc::new(Pagemap::open().unwrap()));
        let options = (
            &SourceOptions { pagemap: pagemap.clone(), stall_limit, ..source_options() },
            &TargetOptions { pagemap, stall_limit, ..target_options() },
        );
        let incoming = FakeIncoming::new(memory(SPARSE));
        let mut hooks = Hooks::committing();
        let (migrated, ready) = migrate_over(sides(), &vm, incoming, options, &mut hooks);
        let (migrated, ready) = (migrated.unwrap(), ready.unwrap());
        assert!(migrated.bytes < 64 * 4096 + 65536, "{migrated:?}");
        assert_eq!(ready.pages, SPARSE);
        assert!(
            DirtyPages::take_vmm_writes(&ready.vm.memory).count() <= 64,
            "zero pages were written"
        );
        for index in 0..64 {
            let value: u64 =
                ready.vm.memory.read_obj(page_address(&ready.vm.memory, index * 1001)).unwrap();
            assert_eq!(value, index + 1);
        }
        vm.resume().unwrap();
    }
}

#[test]
fn pages_that_became_zero_are_cleared_on_the_target() {
    let vm = FakeVm::new(memory(64));
    let incoming = FakeIncoming::new(memory(64));
    fill(&incoming.memory, 64);
    let options = (&source_options(), &target_options());
    let (migrated, ready) = migrate_over(sides(), &vm, incoming, options, &mut Hooks::committing());
    migrated.unwrap();
    assert!(contents(&ready.unwrap().vm.memory).iter().all(|byte| *byte == 0));
}

#[test]
fn a_refused_commit_leaves_the_vm_running() {
    let vm = FakeVm::new(memory(64));
    let mut hooks = Hooks::committing();
    hooks.outcome = Commit::Refused("the VM has another owner".to_owned());
    let options = (&source_options(), &target_options());
    let incoming = FakeIncoming::new(memory(64));
    let (migrated, ready) = migrate_over(sides(), &vm, incoming, options, &mut hooks);
    let error = migrated.unwrap_err();
    assert!(matches!(error, SourceError::CommitRefused { .. }), "{error}");
    assert!(error.to_string().contains("another owner"), "{error}");
    assert!(ready.is_ok(), "the target was ready; its caller drops the VM");
    assert_runs(&vm, "refused");
    assert_eq!(vm.seen().resumed, 1);
}

#[test]
fn the_bandwidth_limit_holds_and_a_cancel_stops_at_once() {
    let vm = FakeVm::new(memory(PAGES));
    fill(vm.memory(), PAGES);
    let limit = NonZeroU64::new(32 << 20);
    let from = SourceOptions { bandwidth_limit_bytes_s: limit, ..source_options() };
    let options = (&from, &target_options());
    let incoming = FakeIncoming::new(memory(PAGES));
    let (migrated, _) = migrate_over(sides(), &vm, incoming, options, &mut Hooks::committing());
    let migrated = migrated.unwrap();
    assert!(migrated.total >= Duration::from_millis(450), "16 MiB at 32 MiB/s: {migrated:?}");
    vm.resume().unwrap();

    let crawl =
        SourceOptions { bandwidth_limit_bytes_s: NonZeroU64::new(1 << 20), ..source_options() };
    let cancel = crawl.cancel.clone();
    let mut cancelled_at: Option<Instant> = None;
    let mut hooks = Hooks::committing();
    hooks.on_progress = Box::new(|progress| {
        if progress.bytes > 0 && cancelled_at.is_none() {
            assert!(cancel.cancel());
            cancelled_at = Some(Instant::now());
        }
    });
    let incoming = FakeIncoming::new(memory(PAGES));
    let options = (&crawl, &target_options());
    let (migrated, ready) = migrate_over(sides(), &vm, incoming, options, &mut hooks);
    assert!(matches!(migrated, Err(SourceError::Cancelled)), "{migrated:?}");
    assert!(ready.unwrap_err().to_string().contains("cancelled"), "the target is told why");
    assert!(hooks.wanted.is_none());
    drop(hooks);
    assert!(cancelled_at.unwrap().elapsed() < Duration::from_secs(3), "it took long to stop");
    assert_runs(&vm, "cancelled");
}

#[test]
fn a_cancel_after_the_commit_began_is_refused() {
    let vm = FakeVm::new(memory(64));
    let from = source_options();
    let cancel = from.cancel.clone();
    let mut hooks = Hooks::committing();
    hooks.at_commit =
        Box::new(|| assert!(!cancel.cancel(), "a cancel was accepted during the commit"));
    let incoming = FakeIncoming::new(memory(64));
    let (migrated, _) =
        migrate_over(sides(), &vm, incoming, (&from, &target_options()), &mut hooks);
    migrated.unwrap();
}

#[test]
fn a_guest_that_outruns_the_connection_is_left_where_it_is() {
    let vm = Arc::new(FakeVm::new(memory(PAGES)));
    fill(vm.memory(), PAGES);
    let guest = vm.run(PAGES, 512, Duration::from_micros(200));
    let from = SourceOptions {
        bandwidth_limit_bytes_s: NonZeroU64::new(64 << 20),
        downtime_limit: Duration::from_millis(5),
        forced_downtime_limit: Duration::from_millis(20),
        ..source_options()
    };
    let incoming = FakeIncoming::new(memory(PAGES));
    let mut hooks = Hooks::committing();
    let (migrated, _) =
        migrate_over(sides(), &vm, incoming, (&from, &target_options()), &mut hooks);
    drop(guest);
    let error = migrated.unwrap_err();
    assert!(matches!(error, SourceError::NotConverging { .. }), "{error}");
    assert_eq!(vm.seen().resumed, 0, "it was never paused");
    assert_runs(&vm, "not converging");
    assert!(hooks.wanted.is_none() && !hooks.saw(Phase::StopAndCopy));
}

#[test]
fn memory_regions_are_known_to_the_fake() {
    let memory = memory(10);
    assert_eq!(memory.num_regions(), 2);
    assert_eq!(page_address(&memory, 5).0, 1 << 32);
}

#[test]
fn disks_are_flushed_before_the_pause_and_a_long_flush_costs_a_round_not_downtime() {
    for (first_flush, rounds, flushes) in [(0, 2, 1), (100, 3, 2)] {
        let mut vm = FakeVm::new(memory(64));
        vm.first_flush = Duration::from_millis(first_flush);
        let vm = Arc::new(vm);
        let options = (&source_options(), &target_options());
        let incoming = FakeIncoming::new(memory(64));
        let (migrated, _ready) =
            migrate_over(sides(), &vm, incoming, options, &mut Hooks::committing());
        assert_eq!(migrated.unwrap().rounds, rounds);
        assert_eq!(vm.seen().flushed, flushes);
    }
}
