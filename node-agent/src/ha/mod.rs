//! High availability on the Raft leader's node: hears heartbeats, plans, carries the plan out.
//!
//! Two safety rules live here, both about acknowledging a heartbeat, which lets a node go on:
//!
//! - **Never while that node is being fenced.** [`Leader`] keeps the nodes whose fencing is under
//!   way; the detector's verdict is asked once more under the same lock that the heartbeats note
//!   themselves under.
//! - **Never by a leader that an earlier leader's fencing could overtake.** A new leader first
//!   writes [`proto::keys::HA_LEADER`]; every transaction of HA compares it. So a fencing that an
//!   earlier leader still has in flight either was committed before, and is seen, or never will be.
//!
//! Owns: the detector, the last plan, the executor. Never: decides what to do (`ha-manager` does),
//! starts or stops a VM process (the owner's reconciler does).

mod by_hand;
mod execute;
mod fencing;
mod leader;
mod observe;
mod remote;

pub use by_hand::fence_by_hand;
pub(crate) use execute::HA_USER;
pub use leader::{Leader, NodeLook, run};
pub use observe::{Snapshot, movable, observe};
pub use remote::observations;
