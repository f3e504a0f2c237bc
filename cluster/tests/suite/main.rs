//! All tests of whole members, in one program: each program more is a minute of building.

mod common;
#[allow(unreachable_pub, reason = "it is the interface of another crate")]
#[path = "../../../tests/src/ports.rs"]
mod ports;
#[allow(dead_code, unreachable_pub, reason = "it is the interface of another crate")]
#[path = "../../../tests/src/skip.rs"]
mod skip;

mod backup;
mod ca;
mod ca_rotation;
mod certificates;
mod durability;
mod history;
mod joining;
mod limits;
mod membership;
mod recover;
mod replication;
mod tls;
mod tree;
mod verify;
mod watches;
