//! ACPI power management (fixed hardware): the power button, S5, and the reset register.
//!
//! ```text
//! +0  PM1 status (16 bit, write one to clear)   bit 8: power button
//! +2  PM1 enable (16 bit)                       bit 8: power button
//! +4  PM1 control (16 bit)                      bit 0: SCI enable; 10..12 sleep type, 13 sleep
//! +8  reset register (8 bit): writing 1 resets
//! ```
//! Facts: ACPI 6.5 sections 4.8.3 and 4.8.4. The system control interrupt is level triggered:
//! it is raised as long as an enabled status bit is set.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Notify;
use crate::bus::BusDevice;
use crate::machine::{MachineEvent, ResetCause};

/// Offset of the PM1 control block.
pub const CONTROL_OFFSET: u16 = 4;
/// Offset of the reset register.
pub const RESET_OFFSET: u16 = 8;
/// What resets when written to the reset register.
pub const RESET_VALUE: u8 = 1;
/// Sleep type of S5, as the DSDT's `_S5` has it.
pub const SLEEP_TYPE_S5: u16 = 5;

const POWER_BUTTON: u16 = 1 << 8;
const GLOBAL: u16 = 1 << 5;
/// Events that never happen, but that kernels enable and look whether they are enabled.
const SLEEP_BUTTON: u16 = 1 << 9;
const CLOCK: u16 = 1 << 10;
const CONTROL_SCI_ENABLE: u16 = 1;
const CONTROL_SLEEP_ENABLE: u16 = 1 << 13;

/// Raises or lowers the system control interrupt.
pub type SciLine = Arc<dyn Fn(bool) + Send + Sync>;

/// The registers, as they are saved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedPower {
    status: u16,
    enable: u16,
    control: u16,
}

/// The power management device.
pub struct Power {
    registers: SavedPower,
    sci: SciLine,
    notify: Notify,
}

impl std::fmt::Debug for Power {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Power").field("registers", &self.registers).finish_non_exhaustive()
    }
}

impl Power {
    /// A device that raises `sci` and reports shutdown and reset to `notify`.
    #[must_use]
    pub fn new(sci: SciLine, notify: Notify) -> Self {
        let control = CONTROL_SCI_ENABLE;
        Self { registers: SavedPower { control, ..SavedPower::default() }, sci, notify }
    }

    /// Presses the power button. False if the guest does not listen to it (yet).
    pub fn press_button(&mut self) -> bool {
        self.registers.status |= POWER_BUTTON;
        self.update_sci();
        self.registers.enable & POWER_BUTTON != 0
    }

    /// The state to save.
    #[must_use]
    pub fn save(&self) -> SavedPower {
        self.registers
    }

    /// Takes over a saved state, and raises the interrupt if it was raised.
    pub fn restore(&mut self, saved: SavedPower) {
        self.registers = saved;
        self.update_sci();
    }

    /// Back to power-on.
    pub fn reset(&mut self) {
        self.restore(SavedPower { control: CONTROL_SCI_ENABLE, ..SavedPower::default() });
    }

    fn update_sci(&self) {
        (self.sci)(self.registers.status & self.registers.enable != 0);
    }

    fn byte(&self, offset: u64) -> u8 {
        let registers = [self.registers.status, self.registers.enable, self.registers.control];
        let register = usize::try_from(offset / 2).ok().and_then(|index| registers.get(index));
        register.map_or(0, |value| value.to_le_bytes()[usize::from(offset % 2 == 1)])
    }

    fn write_byte(&mut self, offset: u64, value: u8) {
        let shift = if offset % 2 == 1 { 8 } else { 0 };
        let (bits, mask) = (u16::from(value) << shift, 0xff << shift);
        match offset / 2 {
            0 => self.registers.status &= !bits,
            1 => {
                let enable = self.registers.enable & !mask | bits;
                self.registers.enable = enable & (GLOBAL | POWER_BUTTON | SLEEP_BUTTON | CLOCK);
            }
            2 => self.control(self.registers.control & !mask | bits),
            _ => {}
        }
        self.update_sci();
    }

    fn control(&mut self, value: u16) {
        self.registers.control = value & !CONTROL_SLEEP_ENABLE | CONTROL_SCI_ENABLE;
        if value & CONTROL_SLEEP_ENABLE != 0 && value >> 10 & 7 == SLEEP_TYPE_S5 {
            (self.notify)(MachineEvent::Shutdown);
        }
    }
}

impl BusDevice for Power {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (offset, byte) in (offset..).zip(data) {
            *byte = self.byte(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == u64::from(RESET_OFFSET) {
            if data.first() == Some(&RESET_VALUE) {
                (self.notify)(MachineEvent::Reset(ResetCause::AcpiReset));
            }
            return;
        }
        for (offset, value) in (offset..).zip(data) {
            self.write_byte(offset, *value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn power() -> (Power, Arc<AtomicBool>, Arc<Mutex<Vec<MachineEvent>>>) {
        let (line, events) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (sci, sink) = (Arc::clone(&line), Arc::clone(&events));
        let power = Power::new(
            Arc::new(move |level| sci.store(level, Ordering::SeqCst)),
            Arc::new(move |event| sink.lock().unwrap().push(event)),
        );
        (power, line, events)
    }

    #[test]
    fn the_button_raises_the_interrupt_until_it_is_acknowledged() {
        let (mut power, line, _) = power();
        assert!(!power.press_button());
        assert!(!line.load(Ordering::SeqCst), "nobody listens");
        power.write(2, &POWER_BUTTON.to_le_bytes());
        assert!(line.load(Ordering::SeqCst));
        let mut status = [0; 2];
        power.read(0, &mut status);
        assert_eq!(u16::from_le_bytes(status), POWER_BUTTON);
        power.write(0, &POWER_BUTTON.to_le_bytes());
        assert!(!line.load(Ordering::SeqCst));
        assert!(power.press_button());
        let saved = power.save();
        let (mut other, line, _) = self::power();
        other.restore(saved);
        assert!(line.load(Ordering::SeqCst));
    }

    #[test]
    fn s5_and_reset_are_reported_and_other_sleep_types_are_not() {
        let (mut power, _, events) = power();
        power.write(4, &(CONTROL_SLEEP_ENABLE | 3 << 10).to_le_bytes());
        power.write(8, &[0]);
        assert!(events.lock().unwrap().is_empty());
        power.write(4, &(CONTROL_SLEEP_ENABLE | SLEEP_TYPE_S5 << 10).to_le_bytes());
        power.write(8, &[RESET_VALUE]);
        let expected = [MachineEvent::Shutdown, MachineEvent::Reset(ResetCause::AcpiReset)];
        assert_eq!(*events.lock().unwrap(), expected);
    }
}
