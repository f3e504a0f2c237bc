//! PCI: one root bus with a host bridge and virtio functions.
//!
//! Owns configuration space (by ports 0xCF8/0xCFC and by memory, ECAM), BAR decoding inside one
//! memory window, and MSI-X with its table and pending bits. What a function does behind its BAR
//! belongs to [`crate::virtio`].
//!
//! ```text
//! ports 0xcf8..0xcff ─┐                     ┌─ 00:00.0 host bridge
//! ECAM ───────────────┼─► PciRoot (one lock) ┤─ 00:01.0 virtio function ─► MSI-X ─► irqfd
//! memory window ──────┘                     └─ …                        ◄─ ioeventfd (doorbells)
//! ```
//!
//! Invariants
//! - One lock guards all functions; worker threads never take it, so a vCPU that holds it may wait
//!   for them.
//! - Every access of a guest, of whatever size, offset or value, ends in a defined answer: all ones
//!   or nothing.

mod access;
mod config;
mod msix;
mod root;

pub use config::ConfigState;
pub use msix::{Msix, MsixState, NO_VECTOR};
pub use root::{PciError, PciLayout, PciRoot, SECTION_DEVICE, SECTION_ROOT, SECTION_TRANSPORT};

pub(crate) use config::{BarSpec, ConfigSpace, Identity};

/// Slots on the bus; slot 0 is the host bridge.
pub const SLOTS: u8 = 32;
