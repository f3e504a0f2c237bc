//! All tests of whole agents and VM processes, in one program: each program more is minutes of
//! building.

mod common;
#[allow(unreachable_pub, reason = "it is the interface of another crate")]
#[path = "../../../tests/src/ports.rs"]
mod ports;
mod rig;
#[allow(dead_code, unreachable_pub, reason = "it is the interface of another crate")]
#[path = "../../../tests/src/skip.rs"]
mod skip;

mod access;
mod agent;
mod disaster;
mod membership;
mod migration;
mod network;
mod tree;
mod vm;
mod vm_process;
