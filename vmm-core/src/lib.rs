//! The virtual machine monitor as a library: KVM, memory, devices, state, migration.
//!
//! Architecture invariants: no tokio, no gRPC, no knowledge of a cluster. What a guest, a peer or a
//! file sends is never a bug: no panic is reachable from it.

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod cpuid;
pub mod gate;
pub mod interrupt;
pub mod kvm_ext;
pub mod legacy;
pub mod machine;
pub mod memory;
pub mod migrate;
pub mod pci;
pub mod state;
pub mod vcpu;
pub mod virtio;

#[cfg(test)]
#[allow(dead_code, unreachable_pub, reason = "it is the interface of another crate")]
#[path = "../../tests/src/skip.rs"]
mod skip;
