//! Raft, by openraft: the only module that names that crate.
//!
//! [`log_store`](LogStore) and [`state`](StateMachine) keep Raft's data in the database,
//! [`network`](Network) sends its messages, [`start`] puts them together.

pub(crate) mod change;
mod checksum;
mod held;
pub(crate) mod lead;
mod log_cache;
mod log_store;
mod network;
mod recent;
mod service;
mod snapshot;
mod start;
mod state;
mod types;

#[cfg(test)]
mod suite_tests;

pub(crate) use change::Seen;
pub(crate) use checksum::{Checked, Checksum, says_damage};
pub(crate) use held::{Held, held, settled};
pub(crate) use lead::current_metrics;
pub(crate) use log_store::LogStore;
pub(crate) use network::{Network, Peers, REMOVED, ask, hello, renew};
pub use network::{never_connected, says_removed};
pub(crate) use recent::Look;
pub use service::RaftService;
pub(crate) use service::{Forward, Forwarded};
pub(crate) use snapshot::clean_up;
#[cfg(test)]
pub(crate) use snapshot::{Outgoing, SnapshotFile};
pub(crate) use start::start;
pub(crate) use state::{Applied, StateMachine, position};
pub(crate) use types::{MemberNode, Metrics, Raft};
