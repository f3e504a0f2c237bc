//! A virtual machine: its parts made in order, its life, its state.
//!
//! ```text
//!  create ──► Created ──resume()──► Running ◄──resume()/pause()──► Paused ──► (dropped)
//!  create_incoming ──► Created ──restore_state()──► Paused
//! ```
//! An event of the guest (shutdown, reset, crash) stops the vCPUs by itself: the machine is then
//! halted, and only [`Machine::reset`] makes it run again.
//!
//! Owns the order in which parts are made, saved and restored. Knows no file name, no cluster, and
//! opens nothing.
//!
//! Invariants
//! - No vCPU enters the guest after the gate's deadline.
//! - State is read and written only while no vCPU is in the guest and no device works.

mod build;
mod chips;
mod config;
mod error;
mod event;
mod legacy;
mod life;
mod migration;
mod snapshot;
mod watch;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::{VcpuFd, VmFd};

use crate::boot::BootSource;
use crate::cpuid::CpuidList;
use crate::gate::{WriteGate, boottime_ns};
use crate::legacy::serial::SerialLine;
use crate::memory::GuestMemory;
use crate::memory::dirty::DirtyLog;
use crate::pci::PciRoot;
use crate::vcpu::{MsrIndices, Pulse, VcpuControl, VcpuState};

pub use config::{MachineConfig, VCPUS_MAX};
pub use error::MachineError;
pub use event::{MachineEvent, ResetCause};
pub use snapshot::{read_snapshot, write_snapshot};

use chips::ChipState;
use legacy::LegacyDevices;
use watch::DeadlineWatch;

/// How long the end of a machine waits for its serial log.
const LOG_LIMIT: Duration = Duration::from_secs(1);

/// Where a machine is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// Made, never run.
    Created,
    /// Its vCPUs run, or are halted by an event.
    Running,
    /// Its vCPUs and devices stand still.
    Paused,
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "not started",
            Self::Running => "running",
            Self::Paused => "paused",
        })
    }
}

#[derive(Debug)]
struct Vcpu {
    fd: Arc<Mutex<VcpuFd>>,
    /// What this host can show to it at most.
    host_cpuid: CpuidList,
    /// What it was given.
    cpuid: Mutex<CpuidList>,
}

/// What a reset goes back to.
#[derive(Debug)]
struct PowerOn {
    chips: ChipState,
    vcpus: Vec<VcpuState>,
}

/// A virtual machine. All methods may be called from any thread but a vCPU's; they wait for each
/// other.
pub struct Machine {
    // Dropped in this order: threads are ended by Drop before anything else goes.
    vcpus: Vec<Vcpu>,
    control: VcpuControl,
    threads: Vec<JoinHandle<()>>,
    watch: DeadlineWatch,
    halted: Arc<AtomicBool>,
    pci: PciRoot,
    legacy: LegacyDevices,
    dirty: DirtyLog,
    memory: GuestMemory,
    memory_bytes: u64,
    vm: Arc<VmFd>,
    boot: BootSource,
    msrs: MsrIndices,
    xsave_size: usize,
    power_on: PowerOn,
    gate: WriteGate,
    pulse: Mutex<Pulse>,
    state: Mutex<RunState>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("vcpus", &self.vcpus.len())
            .field("memory_bytes", &self.memory_bytes)
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The serial line: its output, and a way to type.
    #[must_use]
    pub fn serial(&self) -> &SerialLine {
        &self.legacy.serial
    }

    /// The PCI bus with the virtio devices.
    #[must_use]
    pub fn pci(&self) -> &PciRoot {
        &self.pci
    }

    /// The dirty page log.
    #[must_use]
    pub fn dirty(&self) -> &DirtyLog {
        &self.dirty
    }

    /// The gate that was given in the configuration.
    #[must_use]
    pub fn gate(&self) -> &WriteGate {
        &self.gate
    }

    /// Where the machine is in its life.
    #[must_use]
    pub fn state(&self) -> RunState {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For how long a vCPU that is meant to run has given no sign of life, by the looks of this
    /// method's caller: to be called every few seconds. Never waits for a vCPU.
    #[must_use]
    pub fn silence(&self) -> Duration {
        let now = Duration::from_nanos(boottime_ns());
        let running = self.control.is_running();
        let mut pulse = self.pulse.lock().unwrap_or_else(PoisonError::into_inner);
        let silence = pulse.look(&self.control.rounds(), running, now);
        if running {
            self.control.kick();
        }
        silence
    }

    /// Whether an event has stopped the vCPUs.
    #[must_use]
    pub fn is_halted(&self) -> bool {
        self.halted.load(Ordering::SeqCst)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.control.exit();
        self.watch.stop();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
        self.pci.stop();
        let log = self.legacy.serial.output();
        log.close();
        log.flush(LOG_LIMIT);
    }
}
