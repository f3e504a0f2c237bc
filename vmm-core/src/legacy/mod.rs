//! The few devices of a PC that a stock kernel looks for without asking PCI: serial line, CMOS
//! clock, keyboard controller, ACPI power management. The interrupt controllers and the timer are
//! KVM's.
//!
//! Invariant: whatever a guest writes, a device here allocates nothing that grows and never panics.

pub mod i8042;
pub mod log_ring;
mod log_writer;
pub mod power;
pub mod rtc;
pub mod serial;

use std::sync::Arc;

use crate::machine::MachineEvent;

/// Where a device reports that the guest wants to be off or reset. Called on a vCPU's thread.
pub type Notify = Arc<dyn Fn(MachineEvent) + Send + Sync>;
