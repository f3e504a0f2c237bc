//! The three ways to the bus: configuration ports, ECAM, and the memory window of the BARs.

use std::sync::{Arc, Mutex, PoisonError};

use super::root::Functions;
use crate::bus::BusDevice;

/// First configuration port.
pub(crate) const PORTS_BASE: u64 = 0xcf8;
/// Address at 0xcf8, data at 0xcfc.
pub(crate) const PORTS_COUNT: u64 = 8;
/// Bytes of ECAM for one bus.
pub(crate) const ECAM_BYTES: u64 = 1 << 20;

/// Address register: configuration accesses are on.
const ENABLE: u32 = 1 << 31;

/// Ports 0xCF8 to 0xCFF (PCI 3.0 §3.2.2.3.2).
pub(crate) struct ConfigPorts(pub(crate) Arc<Mutex<Functions>>);
/// Configuration space by memory: 4 KiB a function (PCIe 7.2.2).
pub(crate) struct Ecam(pub(crate) Arc<Mutex<Functions>>);
/// Where the BARs are.
pub(crate) struct Window {
    pub(crate) functions: Arc<Mutex<Functions>>,
    pub(crate) start: u64,
}

fn with<T>(functions: &Mutex<Functions>, act: impl FnOnce(&mut Functions) -> T) -> T {
    act(&mut functions.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Bus, slot, function and register of the address register, when it is on.
fn target(address: u32, port: u64) -> Option<(u8, u8, u8, usize)> {
    let [register, function, bus, _] = address.to_le_bytes();
    let offset = usize::from(register & 0xfc) + usize::try_from(port & 3).unwrap_or(0);
    (address & ENABLE != 0).then_some((bus, function >> 3, function & 7, offset))
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        with(&self.0, |functions| {
            if offset < 4 {
                if offset == 0 && data.len() == 4 {
                    data.copy_from_slice(&functions.port_address.to_le_bytes());
                }
            } else if let Some((bus, slot, function, at)) = target(functions.port_address, offset) {
                functions.read_config(bus, slot, function, at, data);
            }
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        with(&self.0, |functions| {
            if offset < 4 {
                if let (0, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
                    // Bits 24 to 30 and 0, 1 are reserved.
                    functions.port_address = u32::from_le_bytes(bytes) & 0x80ff_fffc;
                }
            } else if let Some((bus, slot, function, at)) = target(functions.port_address, offset) {
                functions.write_config(bus, slot, function, at, data);
            }
        });
    }
}

/// Slot, function and register at an ECAM offset of bus 0.
fn ecam_target(offset: u64) -> (u8, u8, usize) {
    let part = |shift: u32, mask: u64| u8::try_from((offset >> shift) & mask).unwrap_or(0);
    (part(15, 31), part(12, 7), usize::try_from(offset & 0xfff).unwrap_or(0))
}

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let (slot, function, at) = ecam_target(offset);
        with(&self.0, |functions| functions.read_config(0, slot, function, at, data));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (slot, function, at) = ecam_target(offset);
        with(&self.0, |functions| functions.write_config(0, slot, function, at, data));
    }
}

impl BusDevice for Window {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let address = self.start.saturating_add(offset);
        with(&self.functions, |functions| match functions.at(address, data.len()) {
            Some((function, at)) => function.read_bar(at, data),
            None => data.fill(0xff),
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let address = self.start.saturating_add(offset);
        with(&self.functions, |functions| {
            if let Some((function, at)) = functions.at(address, data.len()) {
                function.write_bar(at, data);
            }
        });
    }
}
