//! How a device reaches its driver: interrupts, the ISR register, the status bits it sets itself.

use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{DeviceEvent, EventSink};
use crate::gate::Refused;
use crate::pci::{Msix, NO_VECTOR};

/// Status: the device has met an error it cannot go on from (virtio 1.2 §2.1).
pub(crate) const STATUS_NEEDS_RESET: u8 = 0x40;
/// Status: the driver is set up.
pub(crate) const STATUS_DRIVER_OK: u8 = 0x04;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Interrupt side of one device, shared by its transport and its worker.
pub struct Signal {
    name: String,
    msix: Mutex<Msix>,
    queue_vectors: Vec<AtomicU16>,
    config_vector: AtomicU16,
    isr: AtomicU8,
    status: AtomicU8,
    generation: AtomicU8,
    events: EventSink,
}

impl std::fmt::Debug for Signal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signal")
            .field("name", &self.name)
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

impl Signal {
    /// The signals of device `name`.
    #[must_use]
    pub fn new(name: String, msix: Msix, queues: usize, events: EventSink) -> Arc<Self> {
        Arc::new(Self {
            name,
            msix: Mutex::new(msix),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            config_vector: AtomicU16::new(NO_VECTOR),
            isr: AtomicU8::new(0),
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            events,
        })
    }

    /// The device's name in logs and events.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tells the driver that queue `index` has used buffers.
    pub fn queue(&self, index: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        self.with_msix(|msix| msix.trigger(self.queue_vector(index)));
    }

    /// Tells the driver that the configuration or the status has changed.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.with_msix(|msix| msix.trigger(self.config_vector()));
    }

    /// Marks the device as broken until its reset; tells the driver and the agent the first time.
    pub fn needs_reset(&self, reason: &str) {
        let before = self.status.fetch_or(STATUS_NEEDS_RESET, Ordering::AcqRel);
        if before & STATUS_NEEDS_RESET == 0 {
            tracing::warn!(device = %self.name, reason, "the guest broke a virtio device");
            let (device, reason) = (self.name.clone(), reason.to_owned());
            (self.events)(DeviceEvent::NeedsReset { device, reason });
            if before & STATUS_DRIVER_OK != 0 {
                self.config_changed();
            }
        }
    }

    /// Reports a refused disk write.
    pub fn write_refused(&self, reason: Refused) {
        tracing::error!(device = %self.name, %reason, "disk write refused");
        (self.events)(DeviceEvent::WriteRefused { device: self.name.clone(), reason });
    }

    /// Reports a failing backend.
    pub fn backend_failed(&self, reason: &str) {
        tracing::error!(device = %self.name, reason, "virtio backend failed");
        let (device, reason) = (self.name.clone(), reason.to_owned());
        (self.events)(DeviceEvent::BackendFailed { device, reason });
    }

    pub(crate) fn with_msix<T>(&self, act: impl FnOnce(&mut Msix) -> T) -> T {
        act(&mut self.msix.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn queue_vector(&self, index: u16) -> u16 {
        self.queue_vectors
            .get(usize::from(index))
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    pub(crate) fn set_queue_vector(&self, index: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(index)) {
            slot.store(self.known(vector), Ordering::Release);
        }
    }

    pub(crate) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    pub(crate) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.known(vector), Ordering::Release);
    }

    /// A vector that does not exist reads back as none (virtio 1.2 §4.1.5.1.2.1).
    fn known(&self, vector: u16) -> u16 {
        let count = self.with_msix(|msix| msix.len());
        if usize::from(vector) < count { vector } else { NO_VECTOR }
    }

    /// Reads and clears the ISR register.
    pub(crate) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    pub(crate) fn isr(&self) -> u8 {
        self.isr.load(Ordering::Acquire)
    }

    pub(crate) fn set_isr(&self, isr: u8) {
        self.isr.store(isr & (ISR_QUEUE | ISR_CONFIG), Ordering::Release);
    }

    pub(crate) fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    /// Adds status bits; those that are set stay.
    pub(crate) fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::AcqRel);
    }

    pub(crate) fn set_status(&self, status: u8) {
        self.status.store(status, Ordering::Release);
    }

    pub(crate) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn set_generation(&self, generation: u8) {
        self.generation.store(generation, Ordering::Release);
    }

    /// What a device reset clears: status, ISR, vector numbers. The MSI-X table stays.
    pub(crate) fn reset(&self) {
        self.set_status(0);
        self.isr.store(0, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }
}
