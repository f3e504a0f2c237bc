//! Live migration: moves a running VM to another process, which may be on another machine.
//!
//! ```text
//! source (migrate)                                target (receive)
//!   prepare        Hello ───────── control ──────────►  same layout? same migration?
//!                  ◄───────────────────────── Accept
//!                  Attach ─────── data 1..N ─────────►
//!   precopy round  Pages… RoundEnd ── data ──────────►  writes them to its memory
//!                  ◄───────────────────────── RoundAck
//!     … converge::decide after every round …
//!   stop-and-copy  (paused) Pages… RoundEnd, State ──►  restores the state
//!                  ◄───────────────────────────── Ready
//!   commit         hooks.commit(): the caller decides, elsewhere
//!                  Committed | Abandoned ────────────►  (a hint; the target reads the commit itself)
//!   clean up       ◄─────────────────────────── Running  (its loss is harmless)
//! ```
//!
//! Owns the wire format, the encryption, the copying and the decision when to stop. It never decides
//! who owns a VM: the source asks its caller to commit, the target hands its caller a VM that does not run.
//! Blocking threads and [`std::net::TcpStream`]; no async runtime.
//!
//! Architecture invariants
//! - Before [`SourceHooks::commit`] says [`Commit::Committed`], every failure leaves the VM running on the
//!   source with dirty tracking off. After it, the source never resumes.
//! - [`receive`] never runs a VM. The caller does, once it has read the commit.
//! - The decision when to stop ([`converge`]) is pure: no clock, no I/O.
//! - A hostile peer can make a migration fail, with a clear error, in bounded time and memory; no more.

mod batch;
mod cancel;
pub mod converge;
mod dirty;
mod error;
mod pace;
mod pagemap;
mod round;
pub mod source;
mod stream;
pub mod target;
pub mod tls;
mod vm;
mod wire;

pub use cancel::CancelToken;
pub use dirty::{DirtyPages, PageRun};
pub use error::{SourceError, StreamError, TargetError};
pub use pagemap::Pagemap;
pub use source::{
    Commit, CommitWanted, Migrated, Phase, Progress, SourceHooks, SourceOptions, migrate,
};
pub use stream::{Acceptor, Connector, Stream};
pub use target::{Outcome, Ready, TargetOptions, receive};
pub use vm::{IncomingVm, MigrationVm, VmError};

pub use crate::memory::PAGE_SIZE;

/// Bytes of a page, as a size in memory.
const PAGE_BYTES: usize = 4096;
const _: () = assert!(PAGE_BYTES as u64 == PAGE_SIZE);

/// Which VM is moved, in which migration: both sides must name the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// This migration, chosen by the agents; at most 64 bytes.
    pub migration_id: String,
    /// The VM.
    pub vm_id: proto::VmId,
    /// The VM's name; at most 63 bytes.
    pub vm_name: String,
    /// The generation at which the source runs it.
    pub generation: proto::Generation,
}
