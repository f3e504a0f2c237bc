//! The legacy devices of a machine, as one.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::MachineError;
use super::error::{kvm, os};
use crate::bus::Bus;
use crate::legacy::Notify;
use crate::legacy::i8042::{self, I8042};
use crate::legacy::log_ring::LogRing;
use crate::legacy::power::{Power, SciLine};
use crate::legacy::rtc::{self, Rtc};
use crate::legacy::serial::{SavedSerial, SerialLine};
use crate::memory::layout;
use crate::state::{Section, StateError, find_section};

const SECTION_SERIAL: u16 = 0x0030;
const SECTION_RTC: u16 = 0x0031;
const SECTION_I8042: u16 = 0x0032;
const SECTION_POWER: u16 = 0x0033;
const VERSION: u16 = 1;

#[derive(Debug)]
pub(super) struct LegacyDevices {
    pub(super) serial: SerialLine,
    pub(super) power: Arc<Mutex<Power>>,
    rtc: Arc<Mutex<Rtc>>,
    i8042: Arc<Mutex<I8042>>,
    /// The serial line's state at power-on.
    serial_at_power_on: SavedSerial,
}

fn with<T, R>(device: &Mutex<T>, f: impl FnOnce(&mut T) -> R) -> R {
    f(&mut device.lock().unwrap_or_else(PoisonError::into_inner))
}

impl LegacyDevices {
    pub(super) fn new(
        vm: &Arc<VmFd>,
        ring: LogRing,
        notify: &Notify,
        ports: &mut Bus,
    ) -> Result<Self, MachineError> {
        let irq = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(os("make the serial line's interrupt"))?;
        vm.register_irqfd(&irq, layout::SERIAL_GSI)
            .map_err(kvm("connect the serial line's interrupt"))?;
        let serial = SerialLine::new(irq, ring);
        let line = Arc::clone(vm);
        let sci: SciLine = Arc::new(move |level| {
            if let Err(error) = line.set_irq_line(layout::SCI_GSI, level) {
                tracing::warn!(%error, "the ACPI interrupt cannot be set");
            }
        });
        let devices = Self {
            serial_at_power_on: serial.save(),
            serial,
            power: Arc::new(Mutex::new(Power::new(sci, Arc::clone(notify)))),
            rtc: Arc::new(Mutex::new(Rtc::default())),
            i8042: Arc::new(Mutex::new(I8042::new(Arc::clone(notify)))),
        };
        devices.attach(ports)?;
        Ok(devices)
    }

    fn attach(&self, ports: &mut Bus) -> Result<(), MachineError> {
        let serial = Arc::new(Mutex::new(self.serial.clone()));
        ports.insert(u64::from(layout::SERIAL_PORT), 8, serial)?;
        ports.insert(u64::from(rtc::PORT), 2, self.rtc.clone())?;
        ports.insert(u64::from(i8042::PORT), 1, self.i8042.clone())?;
        // Port 0x61 in between is KVM's timer.
        let command = I8042CommandPort(self.i8042.clone());
        ports.insert(u64::from(i8042::COMMAND_PORT), 1, Arc::new(Mutex::new(command)))?;
        let (pm, length) = (u64::from(layout::PM_PORT), u64::from(layout::PM_PORTS));
        ports.insert(pm, length, self.power.clone())?;
        Ok(())
    }

    pub(super) fn save(&self) -> Result<Vec<Section>, StateError> {
        Ok(vec![
            Section::encode(SECTION_SERIAL, 0, VERSION, &self.serial.save())?,
            Section::encode(SECTION_RTC, 0, VERSION, &with(&self.rtc, |rtc| rtc.clone()))?,
            Section::encode(SECTION_I8042, 0, VERSION, &with(&self.i8042, |it| it.save()))?,
            Section::encode(SECTION_POWER, 0, VERSION, &with(&self.power, |it| it.save()))?,
        ])
    }

    pub(super) fn restore(&self, sections: &[Section]) -> Result<(), MachineError> {
        let find = |kind| find_section(sections, kind, 0);
        let serial: SavedSerial = find(SECTION_SERIAL)?.decode(VERSION)?;
        let rtc: Rtc = find(SECTION_RTC)?.decode(VERSION)?;
        let i8042 = find(SECTION_I8042)?.decode(VERSION)?;
        let power = find(SECTION_POWER)?.decode(VERSION)?;
        self.serial.restore(&serial).map_err(os("restore the serial line"))?;
        with(&self.rtc, |it| *it = rtc);
        with(&self.i8042, |it| it.restore(i8042));
        with(&self.power, |it| it.restore(power));
        Ok(())
    }

    /// Back to power-on; what the serial line printed stays.
    pub(super) fn reset(&self) -> Result<(), MachineError> {
        self.serial.restore(&self.serial_at_power_on).map_err(os("reset the serial line"))?;
        with(&self.rtc, |it| *it = Rtc::default());
        with(&self.i8042, |it| it.restore(i8042::SavedI8042::default()));
        with(&self.power, Power::reset);
        Ok(())
    }
}

/// The keyboard controller's other port, at offset 4 of the same device.
struct I8042CommandPort(Arc<Mutex<I8042>>);

impl crate::bus::BusDevice for I8042CommandPort {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        with(&self.0, |it| it.read(4, data));
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        with(&self.0, |it| it.write(4, data));
    }
}
