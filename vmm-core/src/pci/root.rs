//! The root bus: its functions, and what the machine does with all of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::access::{ConfigPorts, ECAM_BYTES, Ecam, PORTS_BASE, PORTS_COUNT, Window};
use super::{ConfigSpace, ConfigState, Identity, SLOTS};
use crate::bus::{Bus, RangeTaken};
use crate::gate::WriteGate;
use crate::interrupt::{InterruptError, Platform};
use crate::memory::{self, GuestMemory};
use crate::state::{Section, StateError, find_section};
use crate::virtio::{
    Block, BlockConfig, Console, ConsolePort, DeviceError, EventSink, Image, ImageError, Net,
    NetConfig, Rng, TransportState, VirtioDevice, VirtioPci,
};

/// Section: the root bus itself.
pub const SECTION_ROOT: u16 = 0x0200;
/// Section: the transport of a virtio function; the instance is its slot.
pub const SECTION_TRANSPORT: u16 = 0x0201;
/// Section: the device behind a transport; the instance is its slot.
pub const SECTION_DEVICE: u16 = 0x0202;
const VERSION: u16 = 1;

/// Distance of two BARs at power-on.
const BAR_STEP: u64 = crate::virtio::BAR_BYTES as u64;

/// Where the bus is in guest physical memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciLayout {
    /// First address of the window for BARs; below 4 GiB, a multiple of 1 MiB.
    pub window_start: u64,
    /// Bytes of the window; at least 1 MiB.
    pub window_size: u64,
    /// First address of configuration space by memory; 1 MiB.
    pub ecam_start: u64,
}

impl Default for PciLayout {
    fn default() -> Self {
        Self {
            window_start: memory::layout::PCI_MMIO_START,
            window_size: memory::layout::PCI_MMIO_SIZE,
            ecam_start: memory::layout::PCI_ECAM_START,
        }
    }
}

/// Why something could not be done with the bus or a function on it.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// All slots or the window are full.
    #[error("the PCI bus is full: at most {} devices", SLOTS - 1)]
    Full,
    /// The bus ranges are taken.
    #[error("the PCI bus cannot be attached")]
    Attach(#[from] RangeTaken),
    /// No vectors or eventfds.
    #[error("no interrupts for a PCI device")]
    Interrupt(#[from] InterruptError),
    /// A device failed.
    #[error("a virtio device failed")]
    Device(#[from] DeviceError),
    /// An image cannot be locked.
    #[error("a disk image cannot be locked")]
    Image(#[from] ImageError),
    /// A section is missing or does not decode.
    #[error("the saved state of the PCI bus cannot be used")]
    State(#[from] StateError),
    /// The devices are not those of the state.
    #[error(
        "the saved state has devices in slots {saved:?}, this machine in {here:?}: start it with the same devices"
    )]
    OtherDevices {
        /// Slots in the state.
        saved: Vec<u8>,
        /// Slots here.
        here: Vec<u8>,
    },
    /// Saving needs a pause.
    #[error("{device} is running: pause the devices before their state is saved or replaced")]
    NotPaused {
        /// The device.
        device: String,
    },
}

/// The bus's own state, to save.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct RootState {
    port_address: u32,
    bridge: ConfigState,
    slots: Vec<u8>,
}

/// What the one lock guards.
pub(crate) struct Functions {
    pub(crate) port_address: u32,
    bridge: ConfigSpace,
    slots: BTreeMap<u8, VirtioPci>,
}

impl Functions {
    pub(crate) fn read_config(
        &mut self,
        bus: u8,
        slot: u8,
        function: u8,
        at: usize,
        data: &mut [u8],
    ) {
        match (bus, slot, function, self.slots.get_mut(&slot)) {
            (0, 0, 0, _) => self.bridge.read(at, data),
            (0, _, 0, Some(device)) => device.read_config(at, data),
            _ => data.fill(0xff),
        }
    }

    pub(crate) fn write_config(&mut self, bus: u8, slot: u8, function: u8, at: usize, data: &[u8]) {
        match (bus, slot, function, self.slots.get_mut(&slot)) {
            (0, 0, 0, _) => self.bridge.write(at, data),
            (0, _, 0, Some(device)) => device.write_config(at, data),
            _ => (),
        }
    }

    /// The function whose BAR holds `length` bytes at `address`, and the offset in it.
    pub(crate) fn at(&mut self, address: u64, length: usize) -> Option<(&mut VirtioPci, u64)> {
        self.slots.values_mut().find_map(|function| {
            let (base, size) = function.bar()?;
            let offset = address.checked_sub(base)?;
            let fits = offset.checked_add(length as u64)? <= size;
            fits.then_some((function, offset))
        })
    }
}

/// The root bus with its functions. Clones are the same bus.
#[derive(Clone)]
pub struct PciRoot {
    functions: Arc<Mutex<Functions>>,
    layout: PciLayout,
    memory: GuestMemory,
    platform: Arc<dyn Platform>,
    gate: WriteGate,
    events: EventSink,
}

impl std::fmt::Debug for PciRoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciRoot").field("layout", &self.layout).finish_non_exhaustive()
    }
}

impl PciRoot {
    /// A bus with a host bridge. Its devices write to disks only while `gate` is open, and report
    /// to `events`.
    #[must_use]
    pub fn new(
        layout: PciLayout,
        memory: GuestMemory,
        platform: Arc<dyn Platform>,
        gate: WriteGate,
        events: EventSink,
    ) -> Self {
        let bridge = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: [0x06, 0x00, 0x00],
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        let functions = Functions {
            port_address: 0,
            bridge: ConfigSpace::new(bridge, None),
            slots: BTreeMap::new(),
        };
        let functions = Arc::new(Mutex::new(functions));
        Self { functions, layout, memory, platform, gate, events }
    }

    fn lock(&self) -> MutexGuard<'_, Functions> {
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the configuration ports on `pio`, the window and ECAM on `mmio`.
    ///
    /// # Errors
    /// [`PciError::Attach`] when another device is there.
    pub fn attach(&self, pio: &mut Bus, mmio: &mut Bus) -> Result<(), PciError> {
        let functions = || self.functions.clone();
        pio.insert(PORTS_BASE, PORTS_COUNT, Arc::new(Mutex::new(ConfigPorts(functions()))))?;
        mmio.insert(self.layout.ecam_start, ECAM_BYTES, Arc::new(Mutex::new(Ecam(functions()))))?;
        let start = self.layout.window_start;
        let window = Window { functions: functions(), start };
        mmio.insert(start, self.layout.window_size, Arc::new(Mutex::new(window)))?;
        Ok(())
    }

    /// Adds any virtio device in the next slot; gives the slot.
    ///
    /// # Errors
    /// [`PciError::Full`] or [`PciError::Interrupt`].
    pub fn add(&self, kind: &str, device: Box<dyn VirtioDevice>) -> Result<u8, PciError> {
        let mut functions = self.lock();
        let slot = functions.slots.keys().next_back().map_or(1, |last| last + 1);
        let offset = u64::from(slot) * BAR_STEP;
        let fits = slot < SLOTS && offset + BAR_STEP <= self.layout.window_size;
        let base = u32::try_from(self.layout.window_start + offset).ok().filter(|_| fits);
        let name = format!("{kind} 00:{slot:02x}.0");
        let function = VirtioPci::new(
            name,
            device,
            base.ok_or(PciError::Full)?,
            self.memory.clone(),
            self.platform.clone(),
            self.events.clone(),
        )?;
        functions.slots.insert(slot, function);
        Ok(slot)
    }

    /// Adds a disk. Its image is not locked before [`Self::lock_disks`].
    ///
    /// # Errors
    /// See [`Self::add`].
    pub fn add_block(&self, config: BlockConfig) -> Result<u8, PciError> {
        self.add("block", Box::new(Block::new(config, self.gate.clone())))
    }

    /// Adds a network interface.
    ///
    /// # Errors
    /// See [`Self::add`].
    pub fn add_net(&self, config: NetConfig) -> Result<u8, PciError> {
        self.add("net", Box::new(Net::new(config)))
    }

    /// Adds an entropy source.
    ///
    /// # Errors
    /// See [`Self::add`].
    pub fn add_rng(&self) -> Result<u8, PciError> {
        self.add("rng", Box::new(Rng::default()))
    }

    /// Adds a console.
    ///
    /// # Errors
    /// See [`Self::add`].
    pub fn add_console(&self, port: Arc<ConsolePort>) -> Result<u8, PciError> {
        self.add("console", Box::new(Console::new(port)))
    }

    /// Locks the image of every disk: exclusively, or shared when it is read-only. All or none.
    ///
    /// # Errors
    /// [`PciError::Image`] names the image that another holds.
    pub fn lock_disks(&self) -> Result<(), PciError> {
        let mut functions = self.lock();
        let result = functions.slots.values_mut().try_for_each(|slot| slot.device_mut().lock());
        if result.is_err() {
            for slot in functions.slots.values_mut() {
                slot.device_mut().unlock()?;
            }
        }
        result.map_err(PciError::from)
    }

    /// Gives the locks up.
    ///
    /// # Errors
    /// [`PciError::Image`].
    pub fn unlock_disks(&self) -> Result<(), PciError> {
        let mut functions = self.lock();
        functions.slots.values_mut().try_for_each(|slot| slot.device_mut().unlock())?;
        Ok(())
    }

    /// Makes all disk writes that were completed so far durable. The devices run on meanwhile.
    ///
    /// # Errors
    /// [`PciError::Image`] names the first image that failed; all were tried.
    pub fn flush(&self) -> Result<(), PciError> {
        let mut functions = self.lock();
        let devices = functions.slots.values_mut();
        let images: Vec<_> = devices.filter_map(|slot| slot.device_mut().image()).collect();
        drop(functions);
        let flush = |image: &Arc<Image>| {
            let path = image.path().to_owned();
            image.flush().map_err(|source| ImageError::Flush { path, source })
        };
        let results: Vec<_> = images.iter().map(flush).collect();
        results.into_iter().collect::<Result<(), _>>()?;
        Ok(())
    }

    /// Stops and drains every worker: afterwards no I/O is in flight, no device writes to guest
    /// memory, and what the guest wrote to disks is durable. Call it with the vCPUs stopped.
    ///
    /// # Errors
    /// [`PciError::Image`] when a disk cannot be flushed; all devices are paused anyway.
    pub fn pause(&self) -> Result<(), PciError> {
        self.lock().slots.values_mut().for_each(VirtioPci::pause);
        self.flush()
    }

    /// Starts the workers again, looks at every active queue and interrupts its driver.
    ///
    /// # Errors
    /// [`PciError::Device`] when a worker does not start; those before it run.
    pub fn resume(&self) -> Result<(), PciError> {
        let mut functions = self.lock();
        functions.slots.values_mut().try_for_each(VirtioPci::resume)?;
        Ok(())
    }

    /// Asks the guest's network stacks to announce themselves: after a migration.
    pub fn announce(&self) {
        self.lock().slots.values_mut().for_each(VirtioPci::announce);
    }

    /// Resets all functions to their power-on state: a reset of the machine.
    pub fn reset(&self) {
        let mut functions = self.lock();
        functions.port_address = 0;
        functions.bridge.reset();
        functions.slots.values_mut().for_each(VirtioPci::reset);
    }

    /// Ends all workers and takes all functions off the bus.
    pub fn stop(&self) {
        let slots = std::mem::take(&mut self.lock().slots);
        drop(slots);
    }

    /// The state of the bus and its functions, which are paused.
    ///
    /// # Errors
    /// [`PciError::NotPaused`], or [`PciError::State`] when it cannot be encoded.
    pub fn save(&self) -> Result<Vec<Section>, PciError> {
        let functions = self.lock();
        check_quiet(&functions)?;
        let root = RootState {
            port_address: functions.port_address,
            bridge: functions.bridge.save(),
            slots: functions.slots.keys().copied().collect(),
        };
        let mut sections = vec![Section::encode(SECTION_ROOT, 0, VERSION, &root)?];
        for (slot, function) in &functions.slots {
            let instance = u16::from(*slot);
            let transport = function.save();
            sections.push(Section::encode(SECTION_TRANSPORT, instance, VERSION, &transport)?);
            let (version, bytes) = function.save_device();
            sections.push(Section { kind: SECTION_DEVICE, instance, version, bytes });
        }
        Ok(sections)
    }

    /// Takes a saved state; the same devices were added in the same order. The devices are paused
    /// afterwards; [`Self::resume`] lets them run.
    ///
    /// # Errors
    /// [`PciError`] says what does not fit. The bus is then in no defined state: drop it.
    pub fn restore(&self, sections: &[Section]) -> Result<(), PciError> {
        let mut functions = self.lock();
        check_quiet(&functions)?;
        let root: RootState = find_section(sections, SECTION_ROOT, 0)?.decode(VERSION)?;
        let here: Vec<_> = functions.slots.keys().copied().collect();
        if root.slots != here {
            return Err(PciError::OtherDevices { saved: root.slots, here });
        }
        functions.port_address = root.port_address;
        // The bridge has no registers that matter; one of another build is left as it is here.
        functions.bridge.restore(&root.bridge);
        for (slot, function) in &mut functions.slots {
            let instance = u16::from(*slot);
            let transport = find_section(sections, SECTION_TRANSPORT, instance)?;
            let transport: TransportState = transport.decode(VERSION)?;
            let device = find_section(sections, SECTION_DEVICE, instance)?;
            function.restore(&transport, device.version, &device.bytes)?;
        }
        Ok(())
    }
}

fn check_quiet(functions: &Functions) -> Result<(), PciError> {
    match functions.slots.values().find(|function| !function.is_quiet()) {
        None => Ok(()),
        Some(function) => Err(PciError::NotPaused { device: function.name().to_owned() }),
    }
}

#[cfg(test)]
mod tests;
