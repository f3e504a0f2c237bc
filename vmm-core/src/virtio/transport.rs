//! The modern virtio transport over PCI (virtio 1.2 §4.1): one BAR with the configuration
//! structures, the MSI-X table and one doorbell a queue.
//!
//! ```text
//! BAR 0   0x0000 common   0x1000 ISR   0x2000 device   0x3000 doorbells (4 bytes a queue)
//!         0x4000 MSI-X table           0x5000 MSI-X pending bits
//! ```
//!
//! States: set up (the registers are the driver's) → running (the worker owns the queues) ⇄ paused
//! (the queues are back in the registers) → set up, by a reset.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::common::{COMMON_BYTES, CommonConfig, DEVICE_STATUS, STATUS_FEATURES_OK};
use super::queue::doorbell;
use super::signal::STATUS_DRIVER_OK;
use super::{DeviceError, DeviceQueue, EventSink, Run, Signal, VirtioDevice, feature};
use crate::interrupt::{InterruptError, Platform};
use crate::memory::GuestMemory;
use crate::pci::{BarSpec, ConfigSpace, ConfigState, Identity, Msix, MsixState};

/// Bytes of BAR 0.
pub(crate) const BAR_BYTES: u32 = 0x8000;

const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const DOORBELLS: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const AREA_BYTES: u64 = 0x1000;
/// Distance of two doorbells (`notify_off_multiplier`).
const DOORBELL_STEP: u32 = 4;

const VENDOR: u16 = 0x1af4;
/// PCI device ids of modern devices begin here (virtio 1.2 §4.1.2).
const DEVICE_ID_BASE: u16 = 0x1040;
const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
/// Offset, in the PCI access capability, of its data window.
const ACCESS_DATA: usize = 16;

/// A function's transport state, to save.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Virtio device id, to notice a machine with other devices.
    device_id: u16,
    config: ConfigState,
    msix: MsixState,
    common: CommonConfig,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    isr: u8,
    status: u8,
    generation: u8,
    running: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    SetUp,
    Running,
    Paused,
}

/// A virtio device as a PCI function.
#[derive(Debug)]
pub struct VirtioPci {
    config: ConfigSpace,
    msix_capability: usize,
    access_capability: usize,
    common: CommonConfig,
    max_sizes: Vec<u16>,
    signal: Arc<Signal>,
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    platform: Arc<dyn Platform>,
    doorbells: Vec<EventFd>,
    /// Where the doorbells are registered; `None` while they are not.
    doorbells_at: Option<u64>,
    phase: Phase,
    /// A doorbell that could not be registered was reported.
    complained: bool,
}

impl VirtioPci {
    /// A function with `device` behind it and its BAR at `bar_base`, a multiple of 32 KiB.
    ///
    /// # Errors
    /// [`InterruptError`] when there are no vectors or eventfds left.
    pub fn new(
        name: String,
        device: Box<dyn VirtioDevice>,
        bar_base: u32,
        memory: GuestMemory,
        platform: Arc<dyn Platform>,
        events: EventSink,
    ) -> Result<Self, InterruptError> {
        let max_sizes = device.queue_sizes();
        let vectors = u16::try_from(max_sizes.len()).unwrap_or(u16::MAX - 1) + 1;
        let msix = Msix::new(platform.as_ref(), vectors)?;
        let signal = Signal::new(name, msix, max_sizes.len(), events);
        let mut config = ConfigSpace::new(
            Identity {
                vendor: VENDOR,
                device: DEVICE_ID_BASE + device.id(),
                revision: 1,
                class: device.class(),
                subsystem_vendor: VENDOR,
                subsystem: DEVICE_ID_BASE + device.id(),
            },
            Some(BarSpec { base: bar_base, size: BAR_BYTES }),
        );
        let (msix_capability, access_capability) = add_capabilities(&mut config, vectors);
        let doorbells = max_sizes
            .iter()
            .map(|_| doorbell())
            .collect::<Result<_, _>>()
            .map_err(InterruptError::EventFd)?;
        Ok(Self {
            config,
            msix_capability,
            access_capability,
            common: CommonConfig::new(&max_sizes),
            max_sizes,
            signal,
            device,
            memory,
            platform,
            doorbells,
            doorbells_at: None,
            phase: Phase::SetUp,
            complained: false,
        })
    }

    /// The device's name in logs and events.
    #[must_use]
    pub fn name(&self) -> &str {
        self.signal.name()
    }

    /// The device.
    pub fn device_mut(&mut self) -> &mut dyn VirtioDevice {
        self.device.as_mut()
    }

    fn offered(&self) -> u64 {
        self.device.features() | feature::TRANSPORT
    }

    /// Where the BAR answers: base and size.
    #[must_use]
    pub fn bar(&self) -> Option<(u64, u64)> {
        self.config.bar()
    }

    /// The guest reads configuration space.
    pub fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        let window = self.access_capability + ACCESS_DATA;
        if offset == window
            && let Some((at, length)) = self.access_window()
            && length == data.len()
        {
            self.read_bar(at, data);
            return;
        }
        self.config.read(offset, data);
    }

    /// The guest writes configuration space.
    pub fn write_config(&mut self, offset: usize, data: &[u8]) {
        let window = self.access_capability + ACCESS_DATA;
        if offset == window {
            if let Some((at, length)) = self.access_window()
                && length == data.len()
            {
                self.write_bar(at, data);
            }
            return;
        }
        self.config.write(offset, data);
        let control = self.config.read_u16(self.msix_capability + 2);
        self.signal.with_msix(|msix| msix.set_control(control));
        self.place_doorbells();
    }

    /// What the PCI access capability (virtio 1.2 §4.1.4.9) points at: an offset in BAR 0 and 1, 2
    /// or 4 bytes.
    fn access_window(&self) -> Option<(u64, usize)> {
        let mut bar = [0];
        self.config.read(self.access_capability + 4, &mut bar);
        let at = u64::from(self.config.read_u32(self.access_capability + 8));
        let length = self.config.read_u32(self.access_capability + 12);
        let fits = at.checked_add(u64::from(length))? <= u64::from(BAR_BYTES);
        let valid = bar == [0] && matches!(length, 1 | 2 | 4) && fits;
        valid.then_some((at, usize::try_from(length).ok()?))
    }

    /// The guest reads behind the BAR.
    pub fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        let (area, at) = (offset - offset % AREA_BYTES, offset % AREA_BYTES);
        match area {
            COMMON => {
                let bytes = self.common.bytes(self.offered(), &self.signal);
                debug_assert_eq!(bytes.len(), COMMON_BYTES);
                copy_from(&bytes, at, data);
            }
            ISR if at == 0 => {
                data.fill(0);
                if let Some(first) = data.first_mut() {
                    *first = self.signal.take_isr();
                }
            }
            DEVICE => copy_from(&self.device.config(), at, data),
            DOORBELLS => data.fill(0),
            TABLE => self.signal.with_msix(|msix| msix.read_table(at, data)),
            PENDING => self.signal.with_msix(|msix| msix.read_pending(at, data)),
            _ => data.fill(0xff),
        }
    }

    /// The guest writes behind the BAR.
    pub fn write_bar(&mut self, offset: u64, data: &[u8]) {
        let (area, at) = (offset - offset % AREA_BYTES, offset % AREA_BYTES);
        match (area, at) {
            (COMMON, DEVICE_STATUS) if data.len() == 1 => self.write_status(data[0]),
            (COMMON, _) => self.common.write(at, data, &self.max_sizes, &self.signal),
            (DEVICE, _) => self.device.write_config(at, data),
            (DOORBELLS, _) => self.ring(at),
            (TABLE, _) => self.signal.with_msix(|msix| msix.write_table(at, data)),
            _ => (),
        }
    }

    /// A doorbell that did not come by ioeventfd.
    fn ring(&self, at: u64) {
        let index = usize::try_from(at / u64::from(DOORBELL_STEP)).unwrap_or(usize::MAX);
        if let Some(doorbell) = self.doorbells.get(index) {
            // Fails only when the counter is full, which is a doorbell that rings.
            let _ = doorbell.write(1);
        }
    }

    fn write_status(&mut self, value: u8) {
        if value == 0 {
            self.reset_device();
            return;
        }
        let before = self.signal.status();
        let mut added = value & !before;
        if added & STATUS_FEATURES_OK != 0 && !self.common.features_agree(self.offered()) {
            added &= !STATUS_FEATURES_OK;
        }
        let starts = added & STATUS_DRIVER_OK != 0
            && (before | added) & STATUS_FEATURES_OK != 0
            && self.phase == Phase::SetUp;
        if !starts {
            added &= !STATUS_DRIVER_OK;
        }
        self.signal.add_status(added & !super::signal::STATUS_NEEDS_RESET);
        if starts {
            self.activate();
        }
    }

    fn activate(&mut self) {
        self.phase = Phase::Running;
        if let Err(error) = self.start() {
            let error: &dyn std::error::Error = &error;
            tracing::error!(device = self.name(), error, "a virtio device does not start");
            self.signal.backend_failed(&error.to_string());
            self.signal.needs_reset("it does not start");
        }
        self.place_doorbells();
    }

    /// Hands the queues to the device. A queue that is not in guest memory breaks the device, as
    /// the guest's own fault; only a failure of the host is an error.
    fn start(&mut self) -> Result<(), DeviceError> {
        let event_idx = self.common.driver_features & feature::EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(self.max_sizes.len());
        for (index, max_size) in (0_u16..).zip(&self.max_sizes) {
            let at = usize::from(index);
            let state = &self.common.queues[at];
            if !state.enabled {
                queues.push(None);
                continue;
            }
            let doorbell = self.doorbells[at]
                .try_clone()
                .map_err(|source| DeviceError::Worker { device: self.name().to_owned(), source })?;
            let (memory, signal) = (self.memory.clone(), self.signal.clone());
            let queue =
                DeviceQueue::new(index, *max_size, state, event_idx, memory, doorbell, signal);
            match queue {
                Ok(queue) => queues.push(Some(queue)),
                Err(reason) => {
                    self.signal.needs_reset(&reason);
                    return Ok(());
                }
            }
        }
        self.device.start(Run {
            memory: self.memory.clone(),
            features: self.common.driver_features,
            queues,
            signal: self.signal.clone(),
        })
    }

    /// Stops the worker and takes its queues back into the registers.
    fn stop(&mut self) {
        let queues = self.device.stop();
        let healthy = self.signal.status() & super::signal::STATUS_NEEDS_RESET == 0;
        if healthy
            && queues.len() != self.common.queues.iter().filter(|queue| queue.enabled).count()
        {
            self.signal.needs_reset("its worker failed");
        }
        for queue in queues {
            if let Some(state) = self.common.queues.get_mut(usize::from(queue.index())) {
                *state = queue.state();
            }
        }
    }

    /// Stops the worker; nothing is in flight and no guest memory is written until
    /// [`Self::resume`].
    pub fn pause(&mut self) {
        if self.phase == Phase::Running {
            self.stop();
            self.phase = Phase::Paused;
        }
    }

    /// Goes on after [`Self::pause`] or [`Self::restore`]: looks at every active queue, and
    /// interrupts the driver for each, since either side's last signal may be lost.
    ///
    /// # Errors
    /// [`DeviceError`] when the worker does not start.
    pub fn resume(&mut self) -> Result<(), DeviceError> {
        if self.phase != Phase::Paused {
            return Ok(());
        }
        if self.signal.status() & super::signal::STATUS_NEEDS_RESET == 0 {
            self.start()?;
        }
        self.phase = Phase::Running;
        self.place_doorbells();
        for (index, state) in (0_u16..).zip(&self.common.queues) {
            if state.enabled {
                self.ring(u64::from(index) * u64::from(DOORBELL_STEP));
                self.signal.queue(index);
            }
        }
        Ok(())
    }

    /// Whether no worker runs.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.phase != Phase::Running
    }

    /// A reset by the driver (status 0): the PCI side stays as it is.
    fn reset_device(&mut self) {
        if self.phase == Phase::Running {
            self.stop();
        }
        self.phase = Phase::SetUp;
        self.place_doorbells();
        for doorbell in &self.doorbells {
            // Empty is what it shall be.
            let _ = doorbell.read();
        }
        self.device.reset();
        self.signal.reset();
        self.common = CommonConfig::new(&self.max_sizes);
    }

    /// A reset of the machine.
    pub fn reset(&mut self) {
        self.reset_device();
        self.config.reset();
        self.signal.with_msix(Msix::reset);
    }

    /// Asks the guest's network stack to announce itself, if this is a network device.
    pub fn announce(&mut self) {
        let signal = self.signal.clone();
        self.device.announce(&signal);
    }

    /// Registers the doorbells where the BAR is while the device runs, nowhere otherwise.
    fn place_doorbells(&mut self) {
        let wanted = match (self.phase, self.config.bar()) {
            (Phase::Running, Some((base, _))) => Some(base + DOORBELLS),
            _ => None,
        };
        if wanted == self.doorbells_at {
            return;
        }
        if let Some(base) = self.doorbells_at.take() {
            self.remove_doorbells(base, self.doorbells.len());
        }
        let Some(base) = wanted else { return };
        for (index, address) in doorbell_addresses(base, self.doorbells.len()) {
            if let Err(error) = self.platform.add_doorbell(address, &self.doorbells[index]) {
                // The write then comes as an exit, to `ring`: slower, but it works.
                if !std::mem::replace(&mut self.complained, true) {
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(device = self.name(), error, "a doorbell is not direct");
                }
                self.remove_doorbells(base, index);
                return;
            }
        }
        self.doorbells_at = Some(base);
    }

    fn remove_doorbells(&self, base: u64, count: usize) {
        for (index, address) in doorbell_addresses(base, count) {
            if let Err(error) = self.platform.remove_doorbell(address, &self.doorbells[index]) {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(device = self.name(), error, "a doorbell is left behind");
            }
        }
    }

    /// The transport's state; only meaningful while [`Self::is_quiet`].
    #[must_use]
    pub fn save(&self) -> TransportState {
        let queues = u16::try_from(self.max_sizes.len()).unwrap_or(u16::MAX);
        TransportState {
            device_id: self.device.id(),
            config: self.config.save(),
            msix: self.signal.with_msix(|msix| msix.save()),
            common: self.common.clone(),
            config_vector: self.signal.config_vector(),
            queue_vectors: (0..queues).map(|index| self.signal.queue_vector(index)).collect(),
            isr: self.signal.isr(),
            status: self.signal.status(),
            generation: self.signal.generation(),
            running: self.phase != Phase::SetUp,
        }
    }

    /// The device's own state and its version.
    #[must_use]
    pub fn save_device(&self) -> (u16, Vec<u8>) {
        (self.device.state_version(), self.device.save())
    }

    /// Takes a saved state. A device that ran is paused afterwards.
    ///
    /// # Errors
    /// [`DeviceError::State`] when it does not fit this device.
    pub fn restore(
        &mut self,
        state: &TransportState,
        device_version: u16,
        device: &[u8],
    ) -> Result<(), DeviceError> {
        self.reset();
        self.restore_checked(state)?;
        if !device.is_empty() {
            self.device.restore(device_version, device)?;
        }
        Ok(())
    }

    fn restore_checked(&mut self, state: &TransportState) -> Result<(), DeviceError> {
        let refuse =
            |reason: String| DeviceError::State { device: self.signal.name().to_owned(), reason };
        if state.device_id != self.device.id() {
            let (saved, here) = (state.device_id, self.device.id());
            return Err(refuse(format!("it is of virtio device {saved}, here is {here}")));
        }
        // What a driver has only written counts for nothing before it was agreed to.
        let agreed = state.running || state.status & STATUS_FEATURES_OK != 0;
        let missing = state.common.driver_features & !self.offered();
        if agreed && missing != 0 {
            return Err(refuse(format!("the guest uses features {missing:#x} that are not here")));
        }
        let queues = &state.common.queues;
        if queues.len() != self.max_sizes.len() || state.queue_vectors.len() != queues.len() {
            return Err(refuse(format!("it has {} queues", queues.len())));
        }
        for (queue, max_size) in queues.iter().zip(&self.max_sizes) {
            if !queue.size.is_power_of_two() || queue.size > *max_size {
                return Err(refuse(format!("a queue has {} entries", queue.size)));
            }
        }
        if !self.config.restore(&state.config) {
            return Err(refuse("its configuration space is of another function".to_owned()));
        }
        if !self.signal.with_msix(|msix| msix.restore(&state.msix)) {
            let count = state.msix.entries.len();
            return Err(refuse(format!("it has {count} interrupt vectors")));
        }
        self.common = state.common.clone();
        self.signal.set_config_vector(state.config_vector);
        for (index, vector) in (0_u16..).zip(&state.queue_vectors) {
            self.signal.set_queue_vector(index, *vector);
        }
        self.signal.set_isr(state.isr);
        self.signal.set_status(state.status);
        self.signal.set_generation(state.generation);
        self.phase = if state.running { Phase::Paused } else { Phase::SetUp };
        Ok(())
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        if self.phase == Phase::Running {
            self.stop();
        }
        if let Some(base) = self.doorbells_at.take() {
            self.remove_doorbells(base, self.doorbells.len());
        }
    }
}

fn doorbell_addresses(base: u64, count: usize) -> impl Iterator<Item = (usize, u64)> {
    (0..count).zip((base..).step_by(DOORBELL_STEP as usize))
}

/// Copies what there is at `at`; beyond the end are zeros.
fn copy_from(bytes: &[u8], at: u64, data: &mut [u8]) {
    let start = usize::try_from(at).unwrap_or(usize::MAX);
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = start.checked_add(index).and_then(|at| bytes.get(at)).copied().unwrap_or(0);
    }
}

/// Adds the MSI-X and virtio capabilities; gives the offsets of MSI-X and of PCI access.
fn add_capabilities(config: &mut ConfigSpace, vectors: u16) -> (usize, usize) {
    let mut msix = [0; 10];
    msix[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
    msix[2..6].copy_from_slice(&le32(TABLE));
    msix[6..].copy_from_slice(&le32(PENDING));
    let mut writable = [0; 10];
    writable[1] = 0xc0;
    let msix_capability = config.add_capability(CAPABILITY_MSIX, &msix, &writable);

    // cfg_type, offset and length of each structure (virtio 1.2 §4.1.4).
    for (kind, offset) in [(1, COMMON), (3, ISR), (4, DEVICE)] {
        let body = structure(kind, offset, &[]);
        config.add_capability(CAPABILITY_VENDOR, &body, &vec![0; body.len()]);
    }
    let doorbells = structure(2, DOORBELLS, &DOORBELL_STEP.to_le_bytes());
    config.add_capability(CAPABILITY_VENDOR, &doorbells, &vec![0; doorbells.len()]);

    let mut access = structure(5, 0, &[0; 4]);
    access[10..14].fill(0); // no length until the driver sets one
    let mut writable = vec![0; access.len()];
    writable[2] = 0xff; // bar
    writable[6..].fill(0xff); // offset, length, data
    let access_capability = config.add_capability(CAPABILITY_VENDOR, &access, &writable);
    (msix_capability, access_capability)
}

/// A `struct virtio_pci_cap` behind its first two bytes, in BAR 0, with what follows it.
fn structure(kind: u8, offset: u64, more: &[u8]) -> Vec<u8> {
    let length = u8::try_from(16 + more.len()).unwrap_or(u8::MAX);
    let mut body = vec![length, kind, 0, 0, 0, 0];
    body.extend_from_slice(&le32(offset));
    body.extend_from_slice(&le32(AREA_BYTES));
    body.extend_from_slice(more);
    body
}

fn le32(value: u64) -> [u8; 4] {
    u32::try_from(value).unwrap_or(0).to_le_bytes()
}
