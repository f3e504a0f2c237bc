//! A keyboard controller with nothing attached: it answers what a kernel probes for, at once, and
//! resets the VM when its reset line is pulsed. ACPI says that there is none, so kernels that
//! read ACPI do not look for it.

use serde::{Deserialize, Serialize};

use super::Notify;
use crate::bus::BusDevice;
use crate::machine::{MachineEvent, ResetCause};

/// The data port; commands and status are at [`PORT`] + 4.
pub const PORT: u16 = 0x60;
/// The status and command port.
pub const COMMAND_PORT: u16 = 0x64;

const STATUS_OUTPUT_FULL: u8 = 0x01;
const STATUS_SYSTEM: u8 = 0x04;
const STATUS_UNLOCKED: u8 = 0x10;

const COMMAND_READ_CONFIG: u8 = 0x20;
const COMMAND_WRITE_CONFIG: u8 = 0x60;
const COMMAND_DISABLE_AUX: u8 = 0xa7;
const COMMAND_TEST_AUX: u8 = 0xa9;
const COMMAND_SELF_TEST: u8 = 0xaa;
const COMMAND_TEST_KEYBOARD: u8 = 0xab;
const COMMAND_READ_OUTPUT: u8 = 0xd0;
const COMMAND_WRITE_OUTPUT: u8 = 0xd1;
const COMMAND_PULSE_RESET: u8 = 0xfe;

const SELF_TEST_PASSED: u8 = 0x55;
/// Clock line stuck low: no device on this interface.
const INTERFACE_ABSENT: u8 = 0x01;
/// A20 open, reset line high.
const OUTPUT_PORT: u8 = 0x03;

/// What the controller remembers, as it is saved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedI8042 {
    config: u8,
    output: Option<u8>,
    /// The command that waits for its data byte.
    command: Option<u8>,
}

/// The controller.
pub struct I8042 {
    state: SavedI8042,
    notify: Notify,
}

impl std::fmt::Debug for I8042 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("I8042").field("state", &self.state).finish_non_exhaustive()
    }
}

impl I8042 {
    /// A controller that reports a reset to `notify`.
    #[must_use]
    pub fn new(notify: Notify) -> Self {
        Self { state: SavedI8042::default(), notify }
    }

    /// The state to save.
    #[must_use]
    pub fn save(&self) -> SavedI8042 {
        self.state.clone()
    }

    /// Takes over a saved state.
    pub fn restore(&mut self, saved: SavedI8042) {
        self.state = saved;
    }

    fn command(&mut self, command: u8) {
        self.state.command = None;
        match command {
            COMMAND_READ_CONFIG => self.state.output = Some(self.state.config),
            COMMAND_SELF_TEST => self.state.output = Some(SELF_TEST_PASSED),
            COMMAND_TEST_KEYBOARD | COMMAND_TEST_AUX => self.state.output = Some(INTERFACE_ABSENT),
            COMMAND_READ_OUTPUT => self.state.output = Some(OUTPUT_PORT),
            COMMAND_WRITE_CONFIG | COMMAND_WRITE_OUTPUT => self.state.command = Some(command),
            COMMAND_DISABLE_AUX => self.state.config |= 0x20,
            COMMAND_PULSE_RESET => self.reset(),
            _ => {}
        }
    }

    fn data(&mut self, value: u8) {
        match self.state.command.take() {
            Some(COMMAND_WRITE_CONFIG) => self.state.config = value,
            Some(COMMAND_WRITE_OUTPUT) if value & 1 == 0 => self.reset(),
            _ => {}
        }
    }

    fn reset(&self) {
        (self.notify)(MachineEvent::Reset(ResetCause::KeyboardController));
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some(byte) = data.first_mut() else { return };
        match offset {
            0 => *byte = self.state.output.take().unwrap_or(0),
            4 => {
                let full = self.state.output.map_or(0, |_| STATUS_OUTPUT_FULL);
                *byte = STATUS_SYSTEM | STATUS_UNLOCKED | full;
            }
            _ => *byte = 0xff,
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data.first()) {
            (0, Some(value)) => self.data(*value),
            (4, Some(command)) => self.command(*command),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn answers_probes_at_once_and_reports_a_reset() {
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&events);
        let mut controller = I8042::new(Arc::new(move |event| sink.lock().unwrap().push(event)));
        let mut ask = |command: u8| {
            controller.write(4, &[command]);
            let (mut status, mut data) = ([0], [0]);
            controller.read(4, &mut status);
            controller.read(0, &mut data);
            (status[0] & STATUS_OUTPUT_FULL != 0).then_some(data[0])
        };
        assert_eq!(ask(COMMAND_SELF_TEST), Some(SELF_TEST_PASSED));
        assert_eq!(ask(COMMAND_READ_CONFIG), Some(0));
        assert_eq!(ask(0x77), None);
        assert!(events.lock().unwrap().is_empty());
        ask(COMMAND_PULSE_RESET);
        let expected = MachineEvent::Reset(ResetCause::KeyboardController);
        assert_eq!(*events.lock().unwrap(), [expected]);
    }
}
