//! Live migration between fake VMs: everything but KVM.

mod failures;
mod fake;
mod hostile;
mod moves;
mod pipe;
mod tls;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use fake::{FakeIncoming, FakeVm};
use pipe::{Side, pipes};
use vmm_core::migrate::{
    Commit, CommitWanted, Migrated, Phase, Progress, Ready, SourceError, SourceHooks,
    SourceOptions, Subject, TargetError, TargetOptions, migrate, receive,
};

fn subject() -> Subject {
    Subject {
        migration_id: "2026-11-21/7".to_owned(),
        vm_id: proto::VmId(uuid::Uuid::from_u128(7)),
        vm_name: "web".to_owned(),
        generation: proto::Generation(3),
    }
}

/// Hooks that commit as they are told, and remember what they saw.
struct Hooks<'a> {
    outcome: Commit,
    wanted: Option<CommitWanted>,
    progress: Vec<Progress>,
    at_commit: Box<dyn FnMut() + 'a>,
    on_progress: Box<dyn FnMut(&Progress) + 'a>,
}

impl Hooks<'_> {
    fn committing() -> Self {
        Self {
            outcome: Commit::Committed,
            wanted: None,
            progress: Vec::new(),
            at_commit: Box::new(|| {}),
            on_progress: Box::new(|_| {}),
        }
    }

    fn saw(&self, phase: Phase) -> bool {
        self.progress.iter().any(|progress| progress.phase == phase)
    }
}

impl SourceHooks for Hooks<'_> {
    fn progress(&mut self, progress: &Progress) {
        (self.on_progress)(progress);
        self.progress.push(*progress);
    }

    fn commit(&mut self, wanted: &CommitWanted) -> Commit {
        assert!(self.wanted.replace(*wanted).is_none(), "the commit is asked for once");
        (self.at_commit)();
        self.outcome.clone()
    }
}

fn source_options() -> SourceOptions {
    SourceOptions {
        stall_limit: Duration::from_secs(5),
        running_limit: Duration::from_secs(5),
        ..SourceOptions::new(subject())
    }
}

fn target_options() -> TargetOptions {
    TargetOptions {
        connect_limit: Duration::from_secs(5),
        stall_limit: Duration::from_secs(5),
        ..TargetOptions::new(subject())
    }
}

type Both = (Result<Migrated, SourceError>, Result<Ready<FakeIncoming>, TargetError>);

/// Migrates over pipes: the target announces that it runs if the source says that it is committed.
fn migrate_over(
    (source, target): (Arc<Side>, Arc<Side>),
    vm: &FakeVm,
    incoming: FakeIncoming,
    (from, to): (&SourceOptions, &TargetOptions),
    hooks: &mut Hooks<'_>,
) -> Both {
    let (mut connector, mut acceptor) = pipes(source, target);
    thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let mut ready = receive(incoming, &mut acceptor, to)?;
            if ready.wait_outcome(Duration::from_secs(5)) == vmm_core::migrate::Outcome::Committed {
                ready.announce_running();
            }
            Ok(ready)
        });
        let result = migrate(vm, &mut connector, from, hooks);
        drop(connector);
        (result, receiver.join().unwrap())
    })
}

/// The source runs as if nothing had happened.
fn assert_runs(vm: &FakeVm, context: &str) {
    let seen = vm.seen();
    assert!(!seen.paused, "{context}: the VM stands still");
    assert!(!seen.tracking, "{context}: dirty tracking is still on");
}
