//! Every step fails once: the VM runs on the source exactly when it was not committed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vmm_core::migrate::{SourceError, SourceOptions, TargetOptions};

use super::fake::{FakeIncoming, FakeVm, fill, memory};
use super::pipe::Side;
use super::{Hooks, assert_runs, migrate_over, source_options, target_options};

const PAGES: u64 = 1024;

fn fast() -> (SourceOptions, TargetOptions) {
    let limit = Duration::from_secs(3);
    let from = SourceOptions { stall_limit: limit, running_limit: limit, ..source_options() };
    (from, TargetOptions { stall_limit: limit, connect_limit: limit, ..target_options() })
}

/// Migrates with a fault, and checks the rule. True while the fault is still reached.
fn check_fault(source: Arc<Side>, target: Arc<Side>, context: &str) -> bool {
    let vm = Arc::new(FakeVm::new(memory(PAGES)));
    fill(vmm_core::migrate::MigrationVm::memory(vm.as_ref()), PAGES);
    let (from, to) = fast();
    let incoming = FakeIncoming::new(memory(PAGES));
    let restored = Arc::clone(&incoming.restored);
    let mut hooks = Hooks::committing();
    let begin = Instant::now();
    let sides = (Arc::clone(&source), Arc::clone(&target));
    let (migrated, ready) = migrate_over(sides, &vm, incoming, (&from, &to), &mut hooks);
    assert!(begin.elapsed() < Duration::from_secs(20), "{context}: it took {:?}", begin.elapsed());
    match migrated {
        Ok(_) => {
            assert!(hooks.wanted.is_some(), "{context}: migrated without a commit");
            assert!(
                restored.load(Ordering::Acquire),
                "{context}: committed to a target without the state"
            );
            assert!(ready.is_ok(), "{context}: committed to a target that threw the VM away");
            assert_eq!(vm.seen().resumed, 0, "{context}: both run");
            assert!(vm.seen().paused, "{context}: both run");
        }
        Err(error) => {
            assert!(hooks.wanted.is_none(), "{context}: committed, yet {error}");
            assert_runs(&vm, context);
        }
    }
    source.has_failed() || target.has_failed()
}

#[test]
fn connections_that_fail_at_any_frame() {
    for after_sending in [false, true] {
        let mut reached = 0;
        for frame in 0.. {
            let context = format!("the source's frame {frame}, after sending: {after_sending}");
            if !check_fault(Side::failing_at(frame, after_sending), Arc::default(), &context) {
                reached = frame;
                break;
            }
        }
        // Hello, Attach, batches, two round ends, state, committed.
        assert!(reached >= 9, "only {reached} frames");
        for frame in 0.. {
            let context = format!("the target's frame {frame}, after sending: {after_sending}");
            if !check_fault(Arc::default(), Side::failing_at(frame, after_sending), &context) {
                reached = frame;
                break;
            }
        }
        // Accept, acknowledgement, ready, running.
        assert!(reached >= 4, "only {reached} frames");
    }
}

#[test]
fn a_machine_that_fails_at_any_step() {
    for step in ["start_dirty_tracking", "take_dirty", "pause", "save_state"] {
        let vm = FakeVm::failing_at(memory(PAGES), step);
        let (from, to) = fast();
        let incoming = FakeIncoming::new(memory(PAGES));
        let mut hooks = Hooks::committing();
        let (migrated, ready) =
            migrate_over((Arc::default(), Arc::default()), &vm, incoming, (&from, &to), &mut hooks);
        let error = migrated.unwrap_err();
        assert!(matches!(error, SourceError::Vm { .. }), "{step}: {error}");
        assert!(ready.is_err(), "{step}: the target is ready for a VM that never came");
        assert!(hooks.wanted.is_none(), "{step}");
        assert_runs(&vm, step);
    }
}

#[test]
fn a_vm_that_does_not_resume_is_said_to() {
    let vm = FakeVm::failing_at(memory(PAGES), "resume");
    let (from, to) = fast();
    let incoming = FakeIncoming { refuses_state: true, ..FakeIncoming::new(memory(PAGES)) };
    let mut hooks = Hooks::committing();
    let sides = (Arc::default(), Arc::default());
    let (migrated, _) = migrate_over(sides, &vm, incoming, (&from, &to), &mut hooks);
    let error = migrated.unwrap_err();
    assert!(matches!(error, SourceError::NotResumed { .. }), "{error}");
    assert!(error.to_string().contains("refused by request"), "the cause is named: {error}");
}

#[test]
fn a_target_that_refuses_the_state_is_quoted() {
    let vm = FakeVm::new(memory(PAGES));
    let (from, to) = fast();
    let incoming = FakeIncoming { refuses_state: true, ..FakeIncoming::new(memory(PAGES)) };
    let sides = (Arc::default(), Arc::default());
    let (migrated, ready) =
        migrate_over(sides, &vm, incoming, (&from, &to), &mut Hooks::committing());
    assert!(ready.is_err());
    let error = migrated.unwrap_err();
    assert!(error.to_string().contains("the state is refused by request"), "{error}");
    assert_runs(&vm, "state refused");
    assert_eq!(vm.seen().resumed, 1);
}

#[test]
fn a_target_that_expects_something_else_refuses() {
    let (from, to) = fast();
    let mut other_vm = to.clone();
    other_vm.subject.vm_id = proto::VmId(uuid::Uuid::from_u128(8));
    let mut other_generation = to.clone();
    other_generation.subject.generation = proto::Generation(2);
    let mut other_migration = to.clone();
    other_migration.subject.migration_id = "2026-11-21/6".to_owned();
    let cases =
        [(other_vm, PAGES), (other_generation, PAGES), (other_migration, PAGES), (to, PAGES + 2)];
    for (to, pages) in cases {
        let vm = FakeVm::new(memory(PAGES));
        let incoming = FakeIncoming::new(memory(pages));
        let sides = (Arc::default(), Arc::default());
        let (migrated, ready) =
            migrate_over(sides, &vm, incoming, (&from, &to), &mut Hooks::committing());
        assert!(ready.is_err());
        let error = migrated.unwrap_err();
        assert!(error.to_string().contains("does not fit"), "{error}");
        assert_runs(&vm, "mismatch");
    }
}

#[test]
fn a_target_that_never_answers_is_given_up() {
    let vm = FakeVm::new(memory(PAGES));
    let from = SourceOptions { stall_limit: Duration::from_millis(400), ..source_options() };
    let (mut connector, acceptor) = super::pipes(Arc::default(), Arc::default());
    let begin = Instant::now();
    let error = vmm_core::migrate::migrate(&vm, &mut connector, &from, &mut Hooks::committing())
        .unwrap_err();
    drop(acceptor);
    assert!(error.to_string().contains("did not answer within 400ms"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(4));
    assert_runs(&vm, "stalled");
}
