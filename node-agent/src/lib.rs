//! The Holdfast daemon as a library: `main.rs` is a thin shell over it, and the tests drive it. It
//! wires the replicated configuration (`cluster`), the HA decisions (`ha-manager`) and the virtual
//! machine monitor (`vmm-core`) together.
//!
//! ```text
//!            clusterctl (mTLS or the local socket)          other agents (mTLS)
//!                          │                                       │
//!            access, api/ │ any node takes any request            │ api/peer
//!                          ▼                                       ▼
//!    task/ ◄──────── node::Node ────────► cluster::Cluster (documents, placements, Raft)
//!                     │      ▲                     │ watch status/vms/
//!   lease/ ── renews ─┤      └── reconcile/ ◄──────┘ starts and stops what this node owns
//!   ha/    ── leader ─┘               │
//!                                     ▼
//!                             supervisor ── one process per VM (vm_process, jailed)
//! ```
//!
//! Architecture invariants:
//! - This is the only crate that knows `cluster`, `ha-manager` and `vmm-core`.
//! - Each VM runs in a process of its own, which outlives the agent. It is started only by the node
//!   that its placement names, at that generation, for HA VMs while the node's lease is fresh.
//! - A placement changes only by a transaction that compares its revision.
//! - What is decided is decided in `ha-manager`; this crate executes.

pub mod access;
pub mod agent;
pub mod api;
pub mod clock;
pub mod config;
pub mod documents;
pub mod drain;
pub mod events;
pub mod ha;
pub mod hardware;
pub mod jail;
pub mod jobs;
pub mod leading;
pub mod lease;
pub mod migration;
pub mod network;
pub mod node;
pub mod outlook;
pub mod reconcile;
pub mod recover;
mod restore;
pub mod storage;
pub mod store;
pub mod supervisor;
pub mod task;
pub mod telemetry;
pub mod tree;
pub mod vm_process;
pub mod vms;
pub mod watchdog;
