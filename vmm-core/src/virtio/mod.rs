//! Virtio 1.2 devices over PCI: block, network, entropy, console.
//!
//! Owns the modern PCI transport ([`VirtioPci`]), the rings (through virtio-queue) and the devices.
//! A device knows its queues, a [`Signal`] and its backend, never its transport. Nothing here runs
//! on a vCPU thread but register accesses: each running device has a worker thread that owns its
//! queues, and stopping it drains it and gives the queues back.
//!
//! Invariants
//! - All ring and descriptor input is hostile: work per wake-up is bounded, allocations are bounded,
//!   and a ring that breaks the rules ends in `DEVICE_NEEDS_RESET`, never in a panic.
//! - Guest memory is written only through [`Buffers`] and virtio-queue, which mark the dirty bitmap
//!   after the bytes are there.
//! - A device that is paused has no I/O in flight and writes to no guest memory.

mod block;
mod buffers;
mod common;
mod console;
mod device;
mod net;
mod queue;
mod rng;
mod signal;
mod transport;
mod worker;

#[cfg(test)]
pub(crate) mod testing;

pub use block::{BlockConfig, Image, ImageError};
pub use buffers::{Buffers, BuffersError, MAX_DESCRIPTORS, split_chain};
pub use console::ConsolePort;
pub use device::{DeviceError, DeviceEvent, EventSink, QueueState, Run, VirtioDevice};
pub use net::{NetConfig, Tap, TapError};
pub use queue::{DeviceQueue, QueueBroken, Request};
pub use signal::Signal;
pub use transport::{TransportState, VirtioPci};

pub(crate) use block::Block;
pub(crate) use console::Console;
pub(crate) use net::Net;
pub(crate) use rng::Rng;
pub(crate) use transport::BAR_BYTES;

/// Feature bits that the transport and the rings implement for every device (virtio 1.2 §6).
pub(crate) mod feature {
    /// Indirect descriptors.
    pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
    /// Used and avail events.
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    /// Not a legacy device.
    pub(crate) const VERSION_1: u64 = 1 << 32;
    /// What the transport offers beside the device's own bits.
    pub(crate) const TRANSPORT: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

/// An event sink that drops everything; for tests and tools.
#[must_use]
pub fn no_events() -> EventSink {
    std::sync::Arc::new(|_| ())
}
