//! Pure decisions: who is dead, what runs where, what to do next.
//!
//! - [`lease`]: how long a node may act for its HA VMs without hearing from the leader.
//! - [`detector`]: when the leader may call a node dead.
//! - [`placement`]: which node can take a VM, and why the others cannot.
//! - [`by_hand`]: what a person's `node fence` releases.
//! - [`rules`]: which VMs belong together, apart, or on which nodes, and whether that can hold.
//! - [`plan`]: what to do now, as values that an executor carries out; [`edit`]: what that writes.
//! - [`owner`]: what a node does about the VMs that the placements say are its own.
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
pub mod edit;
pub mod lease;
mod load;
pub mod owner;
pub mod placement;
pub mod plan;
pub mod policy;
pub mod rules;
pub mod state;

pub use by_hand::{ByHand, FenceDenied, plan_by_hand};
pub use detector::{Detector, NodeState, Verdict};
pub use edit::{Edit, edits};
pub use lease::{Ack, InvalidLease, LeaseState, NodeLease, Timing};
pub use placement::{Denied, NoPlace, check_start, check_target, place};
pub use plan::{Action, Cause, Explainer, FencedVm, Plan, VmReport, plan};
pub use policy::{Balance, Policy, Shutdown};
pub use rules::{Conflict, Rule, Rules};
pub use state::{
    Attempts, ClusterState, Disarm, Mobility, NodeView, Now, Observations, PowerFencing, Usage,
    VmRef, VmView, Wishes,
};
