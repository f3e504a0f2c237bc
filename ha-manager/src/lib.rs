//! Pure decisions: who is dead, what runs where, what to do next.
//!
//! - [`lease`]: how long a node may act for its HA VMs without hearing from the leader.
//! - [`detector`]: when the leader may call a node dead.
//! - [`placement`]: which node can take a VM, and why the others cannot.
//! - [`by_hand`]: what a person's `node fence` releases.
//! - [`plan`]: what to do now, as values that an executor carries out.
//!
//! For safety the three parties never compare absolute clocks: each `now_ms` is milliseconds of the caller's
//! own monotonic clock that also counts suspended time (`CLOCK_BOOTTIME`), and only clock *rates*
//! have to agree, within 20 %.
//!
//! Architecture invariant: no I/O, no clock, no async, no randomness, no hash order. The same
//! inputs give the same plan everywhere.

#![forbid(unsafe_code)]

pub mod by_hand;
pub mod detector;
pub mod lease;
pub mod placement;
pub mod plan;

pub use by_hand::{ByHand, FenceDenied, plan_by_hand};
pub use detector::{Detector, NodeState, Verdict};
pub use lease::{Ack, InvalidLease, LeaseState, NodeLease, Timing};
pub use placement::{Denied, NoPlace, check_target, place};
pub use plan::{
    Action, Attempts, ClusterState, FencedVm, NodeView, Now, Observations, Plan, Policy, VmRef,
    VmReport, VmView, plan,
};
