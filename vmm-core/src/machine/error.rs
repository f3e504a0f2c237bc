//! Why a machine cannot do what it is asked.

use std::io;

use crate::boot::{BootError, RegistersError};
use crate::bus::RangeTaken;
use crate::cpuid::CpuidError;
use crate::memory::MemoryError;
use crate::memory::dirty::DirtyError;
use crate::state::StateError;
use crate::vcpu::{PauseTimeout, VcpuStateError};

/// Why a machine cannot do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A number of vCPUs that cannot be.
    #[error("a VM cannot have {0} vCPUs: 1 to {max}", max = super::VCPUS_MAX)]
    Vcpus(u8),
    /// Memory.
    #[error("the VM's memory cannot be made")]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error("KVM cannot {what}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// What the ioctl said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The operating system.
    #[error("cannot {what}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Two devices at one address.
    #[error("two devices of the machine are at the same address")]
    Layout(#[from] RangeTaken),
    /// The CPU model.
    #[error("the VM's CPU model cannot be made")]
    Cpuid(#[from] CpuidError),
    /// Boot images.
    #[error("the VM cannot boot")]
    Boot(#[from] BootError),
    /// Boot registers.
    #[error("the VM cannot boot")]
    Registers(#[from] RegistersError),
    /// Dirty page tracking.
    #[error("dirty pages cannot be tracked")]
    Dirty(#[from] DirtyError),
    /// vCPUs.
    #[error("the VM cannot be paused")]
    Pause(#[from] PauseTimeout),
    /// vCPU state.
    #[error("the state of vCPU {index} cannot be used")]
    Vcpu {
        /// Which.
        index: usize,
        /// Why.
        #[source]
        source: VcpuStateError,
    },
    /// Saved state.
    #[error("the saved state cannot be used")]
    State(#[from] StateError),
    /// Saved on a different machine.
    #[error(
        "the saved state is of a VM with {saved_vcpus} vCPUs and {saved_memory} bytes of memory, \
         this one has {vcpus} and {memory}: create it with the same"
    )]
    OtherShape {
        /// vCPUs in the state.
        saved_vcpus: u8,
        /// Memory in the state.
        saved_memory: u64,
        /// vCPUs here.
        vcpus: u8,
        /// Memory here.
        memory: u64,
    },
    /// Wrong moment.
    #[error("the VM is {is}, it must be {wanted} for that")]
    WrongState {
        /// What it is.
        is: super::RunState,
        /// What it must be.
        wanted: &'static str,
    },
    /// PCI devices.
    #[error("a PCI device failed")]
    Pci(#[from] crate::pci::PciError),
    /// A saved VM's file.
    #[error("the saved VM cannot be {action}")]
    Snapshot {
        /// "written" or "read".
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A saved VM's file.
    #[error("the saved VM is damaged: {0}; save or copy it again")]
    SnapshotDamaged(&'static str),
}

pub(super) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}

pub(super) fn os(what: &'static str) -> impl FnOnce(io::Error) -> MachineError {
    move |source| MachineError::Os { what, source }
}
