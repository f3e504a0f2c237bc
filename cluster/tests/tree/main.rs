//! The mounted tree on a real kernel, over real members in one process. Where there is no
//! `/dev/fuse`, or no right to mount, each test says that it was skipped.

#[path = "../common/mod.rs"]
mod common;
#[allow(dead_code, unreachable_pub, reason = "it is the interface of another crate")]
#[path = "../../../tests/src/skip.rs"]
mod skip;

mod crash;
mod harness;
mod members;
mod objects;
mod posix;
mod programs;
mod random;
