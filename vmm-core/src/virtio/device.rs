//! What a virtio device is to the transport.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{DeviceQueue, Signal};
use crate::gate::Refused;
use crate::memory::GuestMemory;

/// Something that people or the node's agent should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceEvent {
    /// A disk write was refused by the write gate.
    WriteRefused {
        /// The device, such as `block 00:01.0`.
        device: String,
        /// Why.
        reason: Refused,
    },
    /// The guest broke a ring; the device waits for a reset.
    NeedsReset {
        /// The device.
        device: String,
        /// What was wrong.
        reason: String,
    },
    /// The backend failed; reported once until the device is started again.
    BackendFailed {
        /// The device.
        device: String,
        /// What failed.
        reason: String,
    },
}

/// Takes events. Called on worker and vCPU threads: it must not block.
pub type EventSink = Arc<dyn Fn(DeviceEvent) + Send + Sync>;

/// Why a device cannot be started, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No thread, eventfd or epoll.
    #[error("{device}: its worker cannot be started")]
    Worker {
        /// The device.
        device: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The backend refused what the guest negotiated.
    #[error("{device}: {what} failed")]
    Backend {
        /// The device.
        device: String,
        /// The step.
        what: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The state does not fit this device.
    #[error("{device}: the saved state does not fit: {reason}")]
    State {
        /// The device.
        device: String,
        /// What does not fit.
        reason: String,
    },
}

/// A queue as the guest set it up, and how far it is processed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries.
    pub size: u16,
    /// The driver enabled it.
    pub enabled: bool,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring (driver area).
    pub available: u64,
    /// Used ring (device area).
    pub used: u64,
    /// Next entry of the available ring to take.
    pub next_available: u16,
    /// Next entry of the used ring to fill.
    pub next_used: u16,
}

/// What a device gets when it starts: everything it may touch until it is stopped.
#[derive(Debug)]
pub struct Run {
    /// Guest memory.
    pub memory: GuestMemory,
    /// Negotiated features.
    pub features: u64,
    /// The queues by index; `None` where the driver enabled none.
    pub queues: Vec<Option<DeviceQueue>>,
    /// Interrupts and status.
    pub signal: Arc<Signal>,
}

/// A virtio device: its identity and configuration, and a worker between `start` and `stop`.
pub trait VirtioDevice: Send + std::fmt::Debug {
    /// Virtio device id (virtio 1.2 §5).
    fn id(&self) -> u16;
    /// PCI class code: base class, subclass, programming interface.
    fn class(&self) -> [u8; 3];
    /// Device features offered (bits 0 to 23 and 50 up).
    fn features(&self) -> u64;
    /// The largest size of each queue.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Bytes of the device configuration, as the driver sees them now.
    fn config(&self) -> Vec<u8>;
    /// The driver writes to the configuration.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Starts working on the queues.
    ///
    /// # Errors
    /// [`DeviceError`]; the device is then stopped.
    fn start(&mut self, run: Run) -> Result<(), DeviceError>;
    /// Stops: no I/O is in flight and no guest memory is written afterwards. Gives the queues of
    /// [`Self::start`] back.
    fn stop(&mut self) -> Vec<DeviceQueue>;
    /// Back to power-on; only called while stopped.
    fn reset(&mut self);
    /// The image that a flush of the machine makes durable, if there is one.
    fn image(&self) -> Option<Arc<super::Image>> {
        None
    }
    /// Takes the lock of the device's backing store, if it has one.
    ///
    /// # Errors
    /// [`super::ImageError`] when another holds it.
    fn lock(&mut self) -> Result<(), super::ImageError> {
        Ok(())
    }
    /// Gives the lock up.
    ///
    /// # Errors
    /// [`super::ImageError`].
    fn unlock(&mut self) -> Result<(), super::ImageError> {
        Ok(())
    }
    /// Asks the guest's network stack to announce itself, if the device can.
    fn announce(&mut self, _signal: &Signal) {}
    /// The device's own state beside its queues; only called while stopped. Empty when it has none.
    fn save(&self) -> Vec<u8>;
    /// Takes the state of [`Self::save`], of another build perhaps.
    ///
    /// # Errors
    /// [`DeviceError::State`]; nothing is then changed.
    fn restore(&mut self, version: u16, state: &[u8]) -> Result<(), DeviceError>;
    /// Version of what [`Self::save`] gives.
    fn state_version(&self) -> u16 {
        1
    }
}
