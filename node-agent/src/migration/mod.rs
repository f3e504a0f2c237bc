//! Both ends of a live migration, as their agents see it. The VM processes do the copying.
//!
//! ```text
//!  source agent                                   target agent
//!  run_source ── Prepare ───────────────────────► prepare: starts a receiving VM process
//!     │ MigrateOut ─► source process ═══ TLS ═══► receiving process
//!     │ ◄─ commit_wanted (vCPUs paused)
//!     │ commit(): the transaction, until its outcome is known
//!     │ ResolveCommit ─► source process
//!     └─ Finish ────────────────────────────────► reads the placement itself, then run
//! ```
//!
//! Decides nothing about ownership: `commit` is the caller's transaction, and the caller reads the
//! placement before it calls [`Incoming::run`].
//!
//! Invariants: a failure before the commit leaves the VM running at the source and no process at
//! the target; after it the source process never resumes, and the target runs the VM only at the
//! generation of the commit.

mod incoming;
mod source;

use async_trait::async_trait;
use proto::v1::peer_client::PeerClient;
use proto::v1::{
    AbortMigrationRequest, FinishMigrationRequest, FinishMigrationResponse,
    PrepareMigrationRequest, PrepareMigrationResponse,
};
use proto::{Generation, Name, NodeId, VmId, VmSpec};
use serde::{Deserialize, Serialize};
use tonic::Status;
use tonic::transport::Channel;

use crate::supervisor::{CpuidLeaf, ResolveError, StartError, VmError};

pub use incoming::Incoming;
pub use source::run_source;

/// The versions of the stream between VM processes that this build speaks.
pub const PROTOCOL: std::ops::RangeInclusive<u32> = 1..=1;

/// The target's agent, as the source's sees it.
#[async_trait]
pub trait TargetPeer: Send + Sync {
    /// [`Incoming::prepare`] over there.
    async fn prepare(
        &self,
        request: PrepareMigrationRequest,
    ) -> Result<PrepareMigrationResponse, Status>;
    /// [`Incoming::run`] over there, once its agent has read the commit.
    async fn finish(
        &self,
        request: FinishMigrationRequest,
    ) -> Result<FinishMigrationResponse, Status>;
    /// [`Incoming::abort`] over there.
    async fn abort(&self, request: AbortMigrationRequest) -> Result<(), Status>;
}

#[async_trait]
impl TargetPeer for PeerClient<Channel> {
    async fn prepare(
        &self,
        request: PrepareMigrationRequest,
    ) -> Result<PrepareMigrationResponse, Status> {
        Ok(self.clone().prepare_migration(request).await?.into_inner())
    }
    async fn finish(
        &self,
        request: FinishMigrationRequest,
    ) -> Result<FinishMigrationResponse, Status> {
        Ok(self.clone().finish_migration(request).await?.into_inner())
    }
    async fn abort(&self, request: AbortMigrationRequest) -> Result<(), Status> {
        self.clone().abort_migration(request).await.map(drop)
    }
}

/// How a migration is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceOptions {
    /// Names this attempt; unique, at most 64 bytes.
    pub migration_id: String,
    /// This node.
    pub source_node: NodeId,
    /// Longest stop of the vCPUs that is aimed at; 0: the default.
    pub downtime_limit_ms: u32,
    /// 0: as fast as it goes.
    pub bandwidth_limit_mib_s: u32,
}

/// What became of the commit transaction. There is no "unknown": the callback asks until it knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommitOutcome {
    /// The target owns the VM, at this generation.
    Committed(Generation),
    /// Nothing changed: the VM is this node's, at the generation it had.
    Refused(String),
    /// It was not committed, and the VM is not this node's either any more.
    Gone(String),
}

/// Why a migration did not happen, or not to its end.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The VM's process.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Not in a state to be moved.
    #[error("VM `{name}` is {state} and cannot be moved live: resume or start it first")]
    State {
        /// The VM.
        name: Name,
        /// What it does.
        state: &'static str,
    },
    /// The target said no.
    #[error("the target cannot take VM `{name}`: {}", status.message())]
    Target {
        /// The VM.
        name: Name,
        /// Its words.
        status: Status,
    },
    /// Before the commit; the VM runs on at the source.
    #[error("migration of VM `{name}` failed, it runs on here: {reason}")]
    Failed {
        /// The VM.
        name: Name,
        /// Why.
        reason: String,
    },
    /// Asked for; the VM runs on at the source.
    #[error("migration of VM `{0}` was cancelled, it runs on here")]
    Cancelled(Name),
    /// The placement changed meanwhile; the VM runs on at the source as far as it may.
    #[error("migration of VM `{name}` was not committed, it runs on here: {reason}")]
    Refused {
        /// The VM.
        name: Name,
        /// Why.
        reason: String,
    },
    /// The VM process ended during its migration, before the commit.
    #[error("VM `{name}` ended during its migration: {reason}")]
    Lost {
        /// The VM.
        name: Name,
        /// Why.
        reason: String,
    },
    /// Target side: the request makes no sense.
    #[error("migration request refused: {0}")]
    Request(String),
    /// Target side: disks, networks.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// Target side: the receiving process.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Target side: there is no such incoming VM.
    #[error("no incoming migration `{migration_id}` of VM `{name}` here")]
    UnknownIncoming {
        /// The VM.
        name: Name,
        /// The attempt.
        migration_id: String,
    },
}

/// What the target must know of the VM; the rest it resolves by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    spec: VmSpec,
    vm_id: VmId,
    /// Bound by the node lease, as the placement says; absent: as the document says.
    #[serde(default)]
    ha: Option<bool>,
    cpuid: Vec<CpuidLeaf>,
    /// The NICs' MAC addresses, in order.
    macs: Vec<[u8; 6]>,
}
