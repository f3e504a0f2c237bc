//! MSI-X: the emulated table, the pending bits, and the vectors behind them (PCI 3.0 §6.8.2).
//!
//! Invariant: a vector is signalled only while MSI-X is enabled and neither the function nor the
//! vector is masked; otherwise its pending bit is set, and the unmasking sends it.

use serde::{Deserialize, Serialize};

use crate::interrupt::{InterruptError, MsiVector, Platform};

/// The vector that stands for "none" (virtio 1.2 §4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// Bytes of a table entry.
const ENTRY_BYTES: u64 = 16;
/// Message control: MSI-X is enabled.
pub(crate) const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
pub(crate) const CONTROL_MASK_ALL: u16 = 1 << 14;

/// One table entry, to save.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixEntry {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// The vector's mask bit.
    pub masked: bool,
    /// The vector's pending bit.
    pub pending: bool,
}

/// The table and its control bits, to save.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// All entries in order.
    pub entries: Vec<MsixEntry>,
    /// MSI-X enable.
    pub enabled: bool,
    /// Function mask.
    pub function_masked: bool,
}

const RESET_ENTRY: MsixEntry = MsixEntry { address: 0, data: 0, masked: true, pending: false };

/// The MSI-X state of one function.
#[derive(Debug)]
pub struct Msix {
    entries: Vec<MsixEntry>,
    vectors: Vec<Box<dyn MsiVector>>,
    enabled: bool,
    function_masked: bool,
    complained: bool,
}

impl Msix {
    /// A table of `count` masked vectors.
    ///
    /// # Errors
    /// [`InterruptError`] when the platform has no more vectors.
    pub fn new(platform: &dyn Platform, count: u16) -> Result<Self, InterruptError> {
        Ok(Self {
            entries: vec![RESET_ENTRY; usize::from(count)],
            vectors: (0..count).map(|_| platform.new_vector()).collect::<Result<_, _>>()?,
            enabled: false,
            function_masked: false,
            complained: false,
        })
    }

    /// Number of vectors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no vectors.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Sends vector `vector`, or sets its pending bit while it is masked. Without MSI-X, or for a
    /// vector that does not exist, nothing happens.
    pub fn trigger(&mut self, vector: u16) {
        let index = usize::from(vector);
        let Some(entry) = self.entries.get_mut(index) else { return };
        if !self.enabled {
            return;
        }
        if self.function_masked || entry.masked {
            entry.pending = true;
            return;
        }
        let result = self.vectors[index].signal();
        self.complain(result);
    }

    /// Takes the two control bits of the capability.
    pub(crate) fn set_control(&mut self, control: u16) {
        self.enabled = control & CONTROL_ENABLE != 0;
        self.function_masked = control & CONTROL_MASK_ALL != 0;
        for index in 0..self.entries.len() {
            self.refresh(index);
        }
    }

    /// Reads the table; whatever is no aligned 4 or 8 bytes inside it reads as all ones.
    pub(crate) fn read_table(&self, offset: u64, data: &mut [u8]) {
        let aligned = matches!(data.len(), 4 | 8) && offset.is_multiple_of(data.len() as u64);
        let index = usize::try_from(offset / ENTRY_BYTES).ok();
        let Some(entry) = index.filter(|_| aligned).and_then(|index| self.entries.get(index))
        else {
            data.fill(0xff);
            return;
        };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&entry.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&entry.data.to_le_bytes());
        bytes[12] = u8::from(entry.masked);
        let start = usize::try_from(offset % ENTRY_BYTES).unwrap_or(0);
        data.copy_from_slice(&bytes[start..start + data.len()]);
    }

    /// Writes to the table; whatever is no aligned 4 or 8 bytes inside it is ignored.
    pub(crate) fn write_table(&mut self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let Some(index) =
            usize::try_from(offset / ENTRY_BYTES).ok().filter(|index| *index < self.entries.len())
        else {
            return;
        };
        for (word, chunk) in (offset % ENTRY_BYTES / 4..).zip(data.chunks_exact(4)) {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(chunk);
            self.write_word(index, word, u32::from_le_bytes(bytes));
        }
        self.refresh(index);
    }

    fn write_word(&mut self, index: usize, word: u64, value: u32) {
        let entry = &mut self.entries[index];
        match word {
            0 => entry.address = (entry.address & !0xffff_ffff) | u64::from(value & !3),
            1 => entry.address = (entry.address & 0xffff_ffff) | (u64::from(value) << 32),
            2 => entry.data = value,
            _ => entry.masked = value & 1 != 0,
        }
    }

    /// Reads the pending bit array.
    pub(crate) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data.iter_mut()) {
            let first = usize::try_from(at.saturating_mul(8)).unwrap_or(usize::MAX);
            *byte = (0..8).fold(0, |bits, bit| {
                let entry = first.checked_add(bit).and_then(|index| self.entries.get(index));
                bits | u8::from(entry.is_some_and(|entry| entry.pending)) << bit
            });
        }
    }

    /// Brings route and pending bit of an entry in line with the masks.
    fn refresh(&mut self, index: usize) {
        if !self.enabled || self.function_masked || self.entries[index].masked {
            return;
        }
        let entry = &mut self.entries[index];
        let (vector, pending) = (&mut self.vectors[index], std::mem::take(&mut entry.pending));
        let routed = vector.route(entry.address, entry.data);
        let result = routed.and_then(|()| if pending { vector.signal() } else { Ok(()) });
        self.complain(result);
    }

    fn complain(&mut self, result: Result<(), InterruptError>) {
        if let Err(error) = result
            && !std::mem::replace(&mut self.complained, true)
        {
            let error: &dyn std::error::Error = &error;
            tracing::error!(error, "an interrupt is lost (further ones are not reported)");
        }
    }

    /// Back to power-on.
    pub(crate) fn reset(&mut self) {
        self.entries.fill(RESET_ENTRY);
        self.enabled = false;
        self.function_masked = false;
    }

    /// The state to save.
    #[must_use]
    pub fn save(&self) -> MsixState {
        MsixState {
            entries: self.entries.clone(),
            enabled: self.enabled,
            function_masked: self.function_masked,
        }
    }

    /// Takes a saved state and programs the routes. False, and nothing changed, when the table has
    /// another size.
    pub fn restore(&mut self, state: &MsixState) -> bool {
        if state.entries.len() != self.entries.len() {
            return false;
        }
        self.entries.clone_from(&state.entries);
        self.enabled = state.enabled;
        self.function_masked = state.function_masked;
        for index in 0..self.entries.len() {
            self.refresh(index);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::interrupt::fake::FakePlatform;

    fn program(msix: &mut Msix, index: u64, data: u32, masked: bool) {
        msix.write_table(index * 16, &0xfee0_1000_u64.to_le_bytes());
        msix.write_table(index * 16 + 8, &data.to_le_bytes());
        msix.write_table(index * 16 + 12, &u32::from(masked).to_le_bytes());
    }

    fn pending(msix: &Msix) -> u8 {
        let mut bits = [0; 8];
        msix.read_pending(0, &mut bits);
        bits[0]
    }

    #[test]
    fn a_masked_vector_waits_for_its_unmasking() {
        let platform = FakePlatform::default();
        let mut msix = Msix::new(&platform, 3).unwrap();
        program(&mut msix, 1, 0x41, false);
        msix.trigger(1);
        assert_eq!(platform.take_sent(), [], "MSI-X is off");
        assert_eq!(pending(&msix), 0);

        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        msix.trigger(1);
        assert_eq!((platform.take_sent(), pending(&msix)), (vec![], 0b10));
        msix.set_control(CONTROL_ENABLE);
        assert_eq!((platform.take_sent(), pending(&msix)), (vec![(0xfee0_1000, 0x41)], 0));

        program(&mut msix, 1, 0x42, true);
        msix.trigger(1);
        msix.trigger(1);
        assert_eq!((platform.take_sent(), pending(&msix)), (vec![], 0b10));
        program(&mut msix, 1, 0x43, false);
        assert_eq!((platform.take_sent(), pending(&msix)), (vec![(0xfee0_1000, 0x43)], 0));
        msix.trigger(1);
        msix.trigger(2); // masked since power-on
        msix.trigger(7); // does not exist
        msix.trigger(NO_VECTOR);
        assert_eq!((platform.take_sent(), pending(&msix)), (vec![(0xfee0_1000, 0x43)], 0b100));
    }

    #[test]
    fn what_was_pending_survives_a_save() {
        let platform = FakePlatform::default();
        let mut msix = Msix::new(&platform, 2).unwrap();
        program(&mut msix, 0, 0x51, false);
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        msix.trigger(0);
        let mut other = Msix::new(&platform, 2).unwrap();
        assert!(other.restore(&msix.save()));
        assert_eq!(platform.take_sent(), []);
        other.set_control(CONTROL_ENABLE);
        assert_eq!(platform.take_sent(), [(0xfee0_1000, 0x51)]);
        assert!(!Msix::new(&platform, 3).unwrap().restore(&msix.save()));
    }

    proptest! {
        #[test]
        fn any_access_is_answered(
            accesses in proptest::collection::vec((any::<bool>(), prop_oneof![0..64_u64, any::<u64>()],
                prop_oneof![Just(1), Just(2), Just(4), Just(8)], any::<u64>()), 0..60),
        ) {
            let platform = FakePlatform::default();
            let mut msix = Msix::new(&platform, 3).unwrap();
            msix.set_control(CONTROL_ENABLE);
            for (write, offset, length, value) in accesses {
                let mut data = value.to_le_bytes()[..length].to_vec();
                if write {
                    msix.write_table(offset, &data);
                } else {
                    msix.read_table(offset, &mut data);
                    msix.read_pending(offset, &mut data);
                }
                msix.trigger(u16::from_le_bytes([data[0], *data.last().unwrap()]));
            }
            prop_assert_eq!(msix.entries.len(), 3);
        }
    }
}
