//! What a machine is made of.

use std::sync::Arc;

use crate::boot::BootSource;
use crate::cpuid::CpuidPolicy;
use crate::gate::WriteGate;
use crate::legacy::log_ring::LogFile;
use crate::virtio::{BlockConfig, ConsolePort, EventSink, NetConfig};

/// Most vCPUs of a VM.
pub const VCPUS_MAX: u8 = 8;

/// A machine, as it is to be made. Files are open already: making a machine opens nothing.
pub struct MachineConfig {
    /// vCPUs, 1 to [`VCPUS_MAX`].
    pub vcpus: u8,
    /// Memory in bytes, a multiple of 4096.
    pub memory_bytes: u64,
    /// The CPU model.
    pub cpuid: CpuidPolicy,
    /// What it begins with.
    pub boot: BootSource,
    /// Disks, in the order in which the guest sees them. Their images are locked by
    /// [`PciRoot::lock_disks`](crate::pci::PciRoot::lock_disks), not before.
    pub disks: Vec<BlockConfig>,
    /// Network interfaces, in order.
    pub nics: Vec<NetConfig>,
    /// A virtio console beside the serial line.
    pub console: Option<Arc<ConsolePort>>,
    /// Where virtio devices report what went wrong.
    pub device_events: EventSink,
    /// Whether it has an entropy device.
    pub rng: bool,
    /// Bytes of serial output kept in memory.
    pub serial_ring_bytes: usize,
    /// Where serial output is logged as well.
    pub serial_log: Option<LogFile>,
    /// Until when the VM may run and write to its disks.
    pub gate: WriteGate,
}

impl std::fmt::Debug for MachineConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MachineConfig")
            .field("vcpus", &self.vcpus)
            .field("memory_bytes", &self.memory_bytes)
            .field("boot", &self.boot)
            .field("disks", &self.disks.len())
            .field("nics", &self.nics.len())
            .finish_non_exhaustive()
    }
}

impl MachineConfig {
    /// A machine without disks and interfaces.
    #[must_use]
    pub fn new(vcpus: u8, memory_bytes: u64, boot: BootSource) -> Self {
        Self {
            vcpus,
            memory_bytes,
            cpuid: CpuidPolicy::Host,
            boot,
            disks: Vec::new(),
            nics: Vec::new(),
            console: None,
            device_events: crate::virtio::no_events(),
            rng: true,
            serial_ring_bytes: 256 << 10,
            serial_log: None,
            gate: WriteGate::default(),
        }
    }
}
