//! Live migration between two supervisors on loopback, with real VM processes.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};

use crate::common::{Node, is_in_order, lacks_kvm_or_root, launch, name};
use async_trait::async_trait;
use node_agent::migration::{
    CommitOutcome, Incoming, MigrationError, SourceOptions, TargetPeer, run_source,
};
use node_agent::storage::{Pool, Pools};
use node_agent::supervisor::{DiskFile, ExitReason, Launch, Stop, VmState};
use proto::record::{PoolKind, PoolRecord};
use proto::v1::{
    AbortMigrationRequest, FinishMigrationRequest, FinishMigrationResponse, MigrationDone,
    PrepareMigrationRequest, PrepareMigrationResponse,
};
use proto::{DiskSpec, Generation, Name, NodeId};
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// The target's agent, without the wire between: what the source's agent reaches by its client.
struct Target {
    incoming: Incoming,
    pools: Pools,
    /// What its reading of the placement gives.
    committed: Arc<Mutex<Option<Generation>>>,
    /// The lease deadlines that it reads the placement under, one for each try; then none.
    leases: Mutex<VecDeque<u64>>,
    refusals: Mutex<Vec<String>>,
}

#[async_trait]
impl TargetPeer for Target {
    async fn prepare(
        &self,
        request: PrepareMigrationRequest,
    ) -> Result<PrepareMigrationResponse, Status> {
        let prepared = self.incoming.prepare(&request, &self.pools, &[], lease_of_a_minute()).await;
        prepared.map_err(|error| Status::failed_precondition(error.to_string()))
    }

    async fn finish(
        &self,
        request: FinishMigrationRequest,
    ) -> Result<FinishMigrationResponse, Status> {
        let read = *self.committed.lock().unwrap();
        let generation =
            read.ok_or_else(|| Status::unavailable("not committed as far as I see"))?;
        let vm = request.vm.parse().unwrap();
        let lease = self.leases.lock().unwrap().pop_front();
        let run = self.incoming.run(&vm, &request.migration_id, generation, lease).await;
        run.map_err(|error| {
            self.refusals.lock().unwrap().push(error.to_string());
            Status::internal(error.to_string())
        })
    }

    async fn abort(&self, request: AbortMigrationRequest) -> Result<(), Status> {
        let vm = request.vm.parse().unwrap();
        let aborted = self.incoming.abort(&vm, &request.migration_id, &request.reason).await;
        aborted.map_err(|error| Status::internal(error.to_string()))
    }
}

fn lease_of_a_minute() -> Option<u64> {
    Some(vmm_core::gate::boottime_ns() + 60_000_000_000)
}

/// Two nodes that share a pool, and a VM with a disk that runs on the first.
struct Pair {
    source: Node,
    target: Node,
    peer: Target,
    vm: Name,
    _shared: tempfile::TempDir,
}

impl Pair {
    async fn new() -> Self {
        Self::with(|_| ()).await
    }

    async fn with(change: impl FnOnce(&mut Launch)) -> Self {
        let shared = tempfile::tempdir().unwrap();
        let record = PoolRecord {
            name: name("test"),
            kind: PoolKind::SharedDir,
            path: shared.path().to_str().unwrap().to_owned(),
        };
        let pool = Pool::initialise(&record).unwrap();
        let (source, target) = (Node::new(), Node::new());
        let mut wanted: Launch = launch(shared.path(), "web");
        let path = pool.create_disk("web.raw", 1 << 20).unwrap();
        wanted.disks.push(DiskFile { path, readonly: false, image: "test/web.raw".into() });
        let image = "test/web.raw".to_owned();
        wanted.spec.disks.push(DiskSpec { image, size: None, readonly: false });
        change(&mut wanted);
        let vm = wanted.name.clone();
        source.supervisor.start(wanted).await.unwrap();
        source.printed(&vm, 20).await;
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let incoming = Incoming::new(target.supervisor.clone(), loopback, loopback.to_string());
        let pools = Pools::new(vec![record]);
        let peer = Target {
            incoming,
            pools,
            committed: Arc::default(),
            leases: Mutex::default(),
            refusals: Mutex::default(),
        };
        Self { source, target, peer, vm, _shared: shared }
    }

    async fn migrate<F: Future<Output = CommitOutcome> + Send>(
        &self,
        commit: impl FnOnce() -> F + Send,
        cancel: CancellationToken,
    ) -> Result<MigrationDone, MigrationError> {
        let options = SourceOptions {
            migration_id: uuid::Uuid::new_v4().to_string(),
            source_node: NodeId(1),
            downtime_limit_ms: 300,
            bandwidth_limit_mib_s: 0,
        };
        let supervisor = &self.source.supervisor;
        let quiet = |_| ();
        run_source(supervisor, &self.vm, &self.peer, options, commit, quiet, cancel).await
    }

    /// The source runs the VM, nothing of it is at the target, and it can still be moved.
    async fn still_at_the_source(&mut self) {
        let status = self.source.supervisor.status(&self.vm).await.unwrap();
        assert_eq!((status.state, status.generation), (VmState::Running, Generation(1)));
        assert!(!self.target.supervisor.is_busy(&self.vm));
        let before = self.source.console(&self.vm).len();
        let text = self.source.printed(&self.vm, before + 20).await;
        assert!(is_in_order(&text), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_moves_and_goes_on_where_it_was() {
    if lacks_kvm_or_root() {
        return;
    }
    let mut pair = Pair::new().await;
    let committed = Arc::clone(&pair.peer.committed);
    let commit = || async move {
        *committed.lock().unwrap() = Some(Generation(2));
        CommitOutcome::Committed(Generation(2))
    };
    let done = pair.migrate(commit, CancellationToken::new()).await.unwrap();
    assert!(done.rounds >= 1 && done.bytes > 0 && done.downtime_ms <= done.total_ms, "{done:?}");
    assert_eq!(pair.source.exit().await.reason, ExitReason::Migrated);
    let status = pair.target.supervisor.status(&pair.vm).await.unwrap();
    assert_eq!((status.state, status.generation), (VmState::Running, Generation(2)));
    assert_eq!(status.migration_id, None);
    let there = pair.target.printed(&pair.vm, 40).await;
    let whole = format!("{}{there}", pair.source.console(&pair.vm));
    assert!(is_in_order(&whole), "{whole}");
    // The disk's lock moved too.
    let mut thief = launch(pair.source.folder.path(), "thief");
    let launched = pair.peer.pools.existing("test/web.raw").unwrap();
    thief.disks.push(DiskFile { path: launched, readonly: false, image: "test/web.raw".into() });
    let refused = pair.source.supervisor.start(thief).await.unwrap_err().to_string();
    assert!(refused.contains("in use"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_commit_leaves_the_vm_where_it_is() {
    if lacks_kvm_or_root() {
        return;
    }
    let mut pair = Pair::new().await;
    for _ in 0..2 {
        let commit = || async { CommitOutcome::Refused("the placement has changed".into()) };
        let refused = pair.migrate(commit, CancellationToken::new()).await.unwrap_err();
        assert!(matches!(refused, MigrationError::Refused { .. }), "{refused}");
        pair.still_at_the_source().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_was_taken_from_its_node_while_it_moved_never_resumes_there() {
    if lacks_kvm_or_root() {
        return;
    }
    let mut pair = Pair::new().await;
    let paused = Arc::new(Mutex::new(0));
    let (console, seen) = (pair.source.supervisor.console_log(&pair.vm), Arc::clone(&paused));
    let commit = || async move {
        *seen.lock().unwrap() = std::fs::metadata(console).unwrap().len();
        CommitOutcome::Gone("this node was fenced".into())
    };
    let lost = pair.migrate(commit, CancellationToken::new()).await.unwrap_err();
    assert!(matches!(lost, MigrationError::Lost { .. }), "{lost}");
    assert_eq!(pair.source.exit().await.reason, ExitReason::Migrated);
    let (printed, paused) = (pair.source.console(&pair.vm).len(), *paused.lock().unwrap());
    assert_eq!(u64::try_from(printed).unwrap(), paused, "the guest ran on");
    pair.target.exit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_runs_an_ha_vm_only_under_a_lease_that_lasts() {
    if lacks_kvm_or_root() {
        return;
    }
    // The placement says that it is highly available, whatever its document says by now.
    let pair = Pair::with(|wanted| (wanted.ha, wanted.deadline_ns) = (true, lease_of_a_minute()));
    let pair = pair.await;
    // The first reading of the placement was under a lease that has run out since.
    let past = vmm_core::gate::boottime_ns() - 1;
    pair.peer.leases.lock().unwrap().extend([past, lease_of_a_minute().unwrap()]);
    let committed = Arc::clone(&pair.peer.committed);
    let commit = || async move {
        *committed.lock().unwrap() = Some(Generation(2));
        CommitOutcome::Committed(Generation(2))
    };
    pair.migrate(commit, CancellationToken::new()).await.unwrap();
    let refusals = pair.peer.refusals.lock().unwrap().clone();
    assert!(refusals.len() == 1 && refusals[0].contains("lease"), "{refusals:?}");
    let status = pair.target.supervisor.status(&pair.vm).await.unwrap();
    assert_eq!((status.state, status.ha), (VmState::Running, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_dies_before_the_commit_costs_nothing() {
    if lacks_kvm_or_root() {
        return;
    }
    let mut pair = Pair::new().await;
    // Found dead when the commit is asked for: the agent refuses, since the target is gone.
    let (supervisor, vm) = (pair.target.supervisor.clone(), pair.vm.clone());
    let commit = || async move {
        supervisor.stop(&vm, Stop::Kill).await.unwrap();
        CommitOutcome::Refused("the target is gone".into())
    };
    pair.migrate(commit, CancellationToken::new()).await.unwrap_err();
    pair.still_at_the_source().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_dies_before_the_commit_takes_the_target_with_it() {
    if lacks_kvm_or_root() {
        return;
    }
    let mut pair = Pair::new().await;
    let (supervisor, vm) = (pair.source.supervisor.clone(), pair.vm.clone());
    let commit = || async move {
        supervisor.stop(&vm, Stop::Kill).await.unwrap();
        CommitOutcome::Refused("the source is gone".into())
    };
    pair.migrate(commit, CancellationToken::new()).await.unwrap_err();
    assert_eq!(pair.source.exit().await.reason, ExitReason::Killed);
    assert_eq!(pair.target.exit().await.reason, ExitReason::Killed);
    // Its disk is free for the recovery elsewhere.
    let mut again = launch(pair.target.folder.path(), "web");
    let path = pair.peer.pools.existing("test/web.raw").unwrap();
    again.disks.push(DiskFile { path, readonly: false, image: "test/web.raw".into() });
    pair.target.supervisor.start(again).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_migration_runs_on_at_the_source() {
    if lacks_kvm_or_root() {
        return;
    }
    let mut pair = Pair::new().await;
    let cancel = CancellationToken::new();
    cancel.cancel();
    let commit = || async { panic!("a cancelled migration asked for its commit") };
    let cancelled = pair.migrate(commit, cancel).await.unwrap_err();
    assert!(matches!(cancelled, MigrationError::Cancelled(_)), "{cancelled}");
    pair.still_at_the_source().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_dies_while_it_commits_leaves_the_vm_paused_for_the_next() {
    if lacks_kvm_or_root() {
        return;
    }
    let pair = Pair::new().await;
    let (asked, asking) = tokio::sync::oneshot::channel();
    let commit = || async move {
        asked.send(()).unwrap();
        std::future::pending().await
    };
    tokio::select! {
        ended = pair.migrate(commit, CancellationToken::new()) => panic!("{ended:?}"),
        () = async { asking.await.unwrap() } => {}
    }
    // The agent's task is gone. The next agent finds the VM waiting, and reads the placement.
    let config = crate::common::config(pair.source.folder.path());
    let (next, _exits) = node_agent::supervisor::Supervisor::new(config).unwrap();
    next.adopt_all().unwrap();
    assert_eq!(next.status(&pair.vm).await.unwrap().state, VmState::AwaitingCommit);
    let paused = pair.source.console(&pair.vm).len();
    let waiting = pair.target.supervisor.status(&pair.vm).await.unwrap();
    assert_eq!(waiting.state, VmState::IncomingComplete);
    next.resolve_commit(&pair.vm, "", false).await.unwrap();
    let text = pair.source.printed(&pair.vm, paused + 20).await;
    assert!(is_in_order(&text), "{text}");
    // The target hears that it was abandoned and ends by itself.
    let mut target = pair.target;
    let gone = target.exit().await;
    assert!(matches!(gone.reason, ExitReason::IncomingAborted(_)), "{gone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_without_the_vms_files_refuses() {
    if lacks_kvm_or_root() {
        return;
    }
    let mut pair = Pair::new().await;
    pair.peer.pools = Pools::new(Vec::new());
    let commit = || async { panic!("a migration without a target asked for its commit") };
    let refused = pair.migrate(commit, CancellationToken::new()).await.unwrap_err();
    let MigrationError::Target { status, .. } = &refused else { panic!("{refused}") };
    assert!(status.message().contains("pool `test` does not exist"), "{status}");
    pair.still_at_the_source().await;
}
