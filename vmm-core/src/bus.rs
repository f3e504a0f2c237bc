//! Port and MMIO buses: which device answers at an address.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A device on a bus. Offsets are relative to the range it was added with; accesses are 1, 2, 4
/// or 8 bytes (REP string exits hand in each element by itself).
pub trait BusDevice: Send {
    /// Fills `data`; all ones where nothing answers.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes `data`; an access the device does not know is ignored.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Why a range cannot be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("bus range {base:#x}+{length:#x} is empty, wraps, or overlaps another device")]
pub struct RangeTaken {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub length: u64,
}

type Entry = (u64, Arc<Mutex<dyn BusDevice>>);

/// Ranges that do not overlap, each with its device.
#[derive(Default, Clone)]
pub struct Bus {
    ranges: BTreeMap<u64, Entry>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ranges = self.ranges.iter().map(|(base, (length, _))| (base, length));
        f.debug_map().entries(ranges).finish()
    }
}

impl Bus {
    /// Adds a device at `base..base + length`.
    ///
    /// # Errors
    /// [`RangeTaken`] if the range is empty, wraps, or overlaps another.
    pub fn insert(
        &mut self,
        base: u64,
        length: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), RangeTaken> {
        let taken = RangeTaken { base, length };
        let end = base.checked_add(length).filter(|end| *end > base).ok_or(taken)?;
        let below = self.ranges.range(..end).next_back();
        if below.is_some_and(|(other, (size, _))| other + size > base) {
            return Err(taken);
        }
        self.ranges.insert(base, (length, device));
        Ok(())
    }

    /// Takes the device that begins at `base` off the bus.
    pub fn remove(&mut self, base: u64) -> Option<Arc<Mutex<dyn BusDevice>>> {
        self.ranges.remove(&base).map(|(_, device)| device)
    }

    fn find(&self, address: u64, length: usize) -> Option<(u64, &Arc<Mutex<dyn BusDevice>>)> {
        let (base, (size, device)) = self.ranges.range(..=address).next_back()?;
        let offset = address - base;
        let fits = offset.checked_add(length as u64).is_some_and(|end| end <= *size);
        fits.then_some((offset, device))
    }

    /// Reads; an address without a device reads as all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes; an address without a device swallows it.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Latch(u8);
    impl BusDevice for Latch {
        fn read(&mut self, _: u64, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn write(&mut self, _: u64, data: &[u8]) {
            self.0 = data[0];
        }
    }

    #[test]
    fn ranges_do_not_overlap_and_holes_read_as_ones() {
        let mut bus = Bus::default();
        let latch = || Arc::new(Mutex::new(Latch(0)));
        bus.insert(0x10, 4, latch()).unwrap();
        bus.insert(0x14, 4, latch()).unwrap();
        for (base, length) in [(0xf, 2), (0x10, 1), (0x13, 1), (0x17, 9), (0x20, 0), (u64::MAX, 2)]
        {
            assert!(bus.insert(base, length, latch()).is_err(), "{base:#x}+{length}");
        }
        bus.write(0x11, &[7]);
        let mut data = [0; 2];
        bus.read(0x12, &mut data);
        assert_eq!(data, [7, 7]);
        bus.read(0x13, &mut data); // straddles two devices
        assert_eq!(data, [0xff, 0xff]);
    }
}
