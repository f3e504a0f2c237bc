//! The node lease: heartbeats to the Raft leader, and what hangs on their answers.
//!
//! ```text
//!  own thread ─┬─ before it has one: what an earlier agent's lease allows, see `keeper`
//!              ├─ every heartbeat: Peer.Heartbeat to the leader ─► acknowledged(sequence, term)
//!              │                                                     └► RenewDeadline to VM processes
//!              ├─ expired (0.6 L after sending): end all HA VM processes
//!              ├─ told that it was fenced: end all HA VM processes, delete the record, begin anew
//!              └─ watchdog: petted while the lease is young, or no HA VM process exists
//! ```
//!
//! Owns: the watchdog, and the heartbeat loop, on a real-time thread and a runtime of its own so that load on the
//! agent and on the machine does not starve it. Time is `CLOCK_BOOTTIME`. Never: decides who is dead (the leader's detector does).
//!
//! Invariant: a deadline given to a VM process comes from [`ha_manager::NodeLease`] alone.

mod guard;
mod heartbeat;
mod keeper;
mod memory;
mod state;
mod urgent;

pub use keeper::Keeper;
pub use state::{Lease, boottime_ms};
