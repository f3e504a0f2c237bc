//! The 256 bytes of a function's configuration space: a value and a write mask for each byte.
//!
//! Sizing a BAR needs no special case: the bits below its size are read-only zeros.

use serde::{Deserialize, Serialize};

/// Bytes of conventional configuration space.
pub(crate) const CONFIG_BYTES: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

/// Command register: the function answers in its memory BARs.
const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: the function may write to memory, which message-signalled interrupts are.
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Who a function is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    pub(crate) revision: u8,
    /// Base class, subclass, programming interface.
    pub(crate) class: [u8; 3],
    pub(crate) subsystem_vendor: u16,
    pub(crate) subsystem: u16,
}

/// The one memory BAR (BAR 0, 32 bits) that a function has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BarSpec {
    /// Where it is at power-on.
    pub(crate) base: u32,
    /// A power of two, at least 16.
    pub(crate) size: u32,
}

/// The guest-visible part of a configuration space, to save.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    /// All bytes; read-only ones are checked, not taken, on restore.
    pub bytes: Vec<u8>,
}

/// A function's configuration space.
#[derive(Debug, Clone)]
pub(crate) struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    /// Bits that the guest can write.
    writable: [u8; CONFIG_BYTES],
    /// The bytes at power-on.
    initial: [u8; CONFIG_BYTES],
    bar_size: u32,
    next_capability: usize,
    last_pointer: usize,
}

impl ConfigSpace {
    /// A type 0 header. With a BAR, memory decoding and bus mastering are on from the start, as
    /// firmware would leave it.
    pub(crate) fn new(identity: Identity, bar: Option<BarSpec>) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            initial: [0; CONFIG_BYTES],
            bar_size: 0,
            next_capability: FIRST_CAPABILITY,
            last_pointer: CAPABILITIES,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        let [base, sub, interface] = identity.class;
        space.put(0x08, &[identity.revision, interface, sub, base]);
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(INTERRUPT_LINE, &[0xff]);
        if let Some(BarSpec { base, size }) = bar {
            debug_assert!(size.is_power_of_two() && size >= 16 && base.is_multiple_of(size));
            space.bar_size = size;
            space.put(BAR0, &base.to_le_bytes());
            space.allow(BAR0, &(!(size - 1)).to_le_bytes());
            space.put(COMMAND, &(COMMAND_MEMORY | COMMAND_MASTER).to_le_bytes());
            let writable = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE;
            space.allow(COMMAND, &writable.to_le_bytes());
        }
        space.initial = space.bytes;
        space
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Adds a capability: its id, what follows the two header bytes, and which of those bits the
    /// guest can write. Returns the offset of the id. Called while a function is built, with
    /// capabilities that fit.
    pub(crate) fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let offset = self.next_capability;
        debug_assert!(offset + 2 + body.len() <= CONFIG_BYTES && body.len() == writable.len());
        self.put(offset, &[id, 0]);
        self.put(offset + 2, body);
        self.allow(offset + 2, writable);
        let status = self.read_u16(STATUS) | STATUS_CAPABILITIES;
        self.put(STATUS, &status.to_le_bytes());
        let pointer = self.last_pointer;
        self.put(pointer, &[u8::try_from(offset).unwrap_or(0)]);
        self.last_pointer = offset + 1;
        self.next_capability = (offset + 2 + body.len()).next_multiple_of(4);
        self.initial = self.bytes;
        offset
    }

    /// Reads; what lies beyond the conventional space is zero (no extended capabilities).
    pub(crate) fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = offset
                .checked_add(index)
                .and_then(|at| self.bytes.get(at))
                .copied()
                .unwrap_or_default();
        }
    }

    /// Writes the bits that are writable.
    pub(crate) fn write(&mut self, offset: usize, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            let Some(at) = offset.checked_add(index).filter(|at| *at < CONFIG_BYTES) else {
                return;
            };
            let mask = self.writable[at];
            self.bytes[at] = (self.bytes[at] & !mask) | (byte & mask);
        }
    }

    pub(crate) fn read_u16(&self, offset: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    pub(crate) fn read_u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Where BAR 0 answers now: base and size, or `None` when it is not decoded.
    pub(crate) fn bar(&self) -> Option<(u64, u64)> {
        let decoded = self.bar_size != 0 && self.read_u16(COMMAND) & COMMAND_MEMORY != 0;
        decoded.then(|| (u64::from(self.read_u32(BAR0)), u64::from(self.bar_size)))
    }

    /// Back to power-on.
    pub(crate) fn reset(&mut self) {
        self.bytes = self.initial;
    }

    pub(crate) fn save(&self) -> ConfigState {
        ConfigState { bytes: self.bytes.to_vec() }
    }

    /// Takes the writable bits of a saved space. False, and nothing changed, when it is not the
    /// same function: a read-only bit differs.
    pub(crate) fn restore(&mut self, state: &ConfigState) -> bool {
        let Ok(bytes) = <[u8; CONFIG_BYTES]>::try_from(state.bytes.as_slice()) else {
            return false;
        };
        let same =
            (0..CONFIG_BYTES).all(|at| (bytes[at] ^ self.bytes[at]) & !self.writable[at] == 0);
        if same {
            self.bytes = bytes;
        }
        same
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: [1, 0x80, 0],
            subsystem_vendor: 0x1af4,
            subsystem: 2,
        };
        ConfigSpace::new(identity, Some(BarSpec { base: 0xc000_8000, size: 0x8000 }))
    }

    #[test]
    fn a_bar_tells_its_size_and_moves() {
        let mut space = space();
        assert_eq!(space.bar(), Some((0xc000_8000, 0x8000)));
        space.write(BAR0, &[0xff; 4]);
        assert_eq!(space.read_u32(BAR0), 0xffff_8000);
        space.write(BAR0, &0xd000_1234_u32.to_le_bytes());
        assert_eq!(space.bar(), Some((0xd000_0000, 0x8000)));
        space.write(BAR0 + 4, &[0xff; 4]);
        assert_eq!(space.read_u32(BAR0 + 4), 0, "there is no BAR 1");
        space.write(COMMAND, &[0, 0]);
        assert_eq!(space.bar(), None);
        space.reset();
        assert_eq!(space.bar(), Some((0xc000_8000, 0x8000)));
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(9, &[1, 2, 3], &[0; 3]);
        let second = space.add_capability(0x11, &[0; 10], &[0, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mut byte = [0];
        space.read(CAPABILITIES, &mut byte);
        assert_eq!(usize::from(byte[0]), first);
        space.read(first + 1, &mut byte);
        assert_eq!(usize::from(byte[0]), second);
        space.read(second + 1, &mut byte);
        assert_eq!(byte, [0]);
        assert_ne!(space.read_u16(STATUS) & STATUS_CAPABILITIES, 0);
        space.write(second + 2, &[0xff, 0xff]);
        assert_eq!(space.read_u16(second + 2), 0xc000);
    }

    proptest! {
        #[test]
        fn no_write_changes_a_read_only_bit(
            writes in proptest::collection::vec((0..5000_usize, proptest::collection::vec(any::<u8>(), 1..9)), 0..50),
        ) {
            let mut space = space();
            let before = space.clone();
            for (offset, data) in writes {
                space.write(offset, &data);
                let mut back = vec![0; data.len()];
                space.read(offset, &mut back);
            }
            for at in 0..CONFIG_BYTES {
                prop_assert_eq!((space.bytes[at] ^ before.bytes[at]) & !space.writable[at], 0);
            }
            let mut other = before;
            prop_assert!(other.restore(&space.save()));
            prop_assert_eq!(other.bytes, space.bytes);
        }
    }
}
