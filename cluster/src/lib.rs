//! The replicated configuration: one multi-version key-value store on every node, kept the same
//! by Raft, and the membership and identity of the nodes that keep it.
//!
//! ```text
//!   Cluster ── txn/get/range ─► consensus (openraft) ─► machine (pure) ─► RocksDB
//!      │                            │ gRPC, mTLS                            │
//!      ├── watch ◄──────────────────┼──────────── history by revision ◄─────┘
//!      └── identity (CA, tokens) ── tls (listener, connector)
//! ```
//!
//! Owns: the data folder (lock, keys, certificates, database, snapshots), the Raft instance, the
//! gRPC services `Raft`, `Enrolment`. Never: VMs, HA decisions, listening
//! sockets (the agent binds them and mounts the services).
//!
//! Invariants: `openraft` is named only in [`consensus`]; `machine` reads no clock, draws no random
//! number and does no I/O of its own; what was acknowledged is on the disks of a quorum.

mod authority;
mod backup;
mod certificates;
mod cluster;
mod config;
mod consensus;
mod enrol;
mod error;
mod files;
pub mod host;
mod identity;
mod machine;
mod membership;
mod node;
mod open;
mod recover;
mod removal;
mod rename;
mod restore;
mod service;
mod status;
mod storage;
pub mod tls;
pub mod tree;
mod types;
mod verify;
mod voters;

pub use cluster::Cluster;
pub use config::{CertificateLives, ClusterConfig, Limits, RaftTimings, Retention};
pub use consensus::{RaftService, never_connected, says_removed};
pub use error::{
    Compacted, InitError, JoinError, MembershipError, NotLeader, OpenError, ReadAtError,
    StoreError, WatchError,
};
pub use files::{FileChange, FileRefused, FileWriter};
pub use open::{Opened, Uninitialized, open};
pub use recover::{Heard, RecoverError, Recovered, Survey, Survivor, finish_recovery};
pub use restore::{RestoreError, Restored};
pub use service::EnrolmentService;
pub use types::{
    Change, Confirmed, Consistency, History, KeyValue, Leadership, Member, RangeResult, Txn,
    TxnOutcome, WatchBatch, WatchEvent, Write,
};
