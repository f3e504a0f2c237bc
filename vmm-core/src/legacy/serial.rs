//! The first serial line (16550), from vm-superio, with its interrupt by irqfd and its output in a
//! [`LogRing`].

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::log_ring::LogRing;
use crate::bus::BusDevice;

/// Input that waits for the guest: what does not fit is refused.
const INPUT_LIMIT: usize = 4096;

/// How long saving waits for the log on disk: a part of a migration's downtime.
const SAVE_FLUSH_LIMIT: Duration = Duration::from_millis(100);

/// Raises the interrupt: KVM injects it when the descriptor is written to.
#[derive(Debug)]
pub struct IrqTrigger(pub EventFd);

impl Trigger for IrqTrigger {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

type Uart = Serial<IrqTrigger, NoEvents, LogRing>;

/// The serial line's state as it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedSerial {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    /// What the guest has not read yet: the FIFO's bytes.
    fifo: Vec<u8>,
    /// What waits behind the FIFO.
    waiting: Vec<u8>,
}

struct Inner {
    uart: Uart,
    waiting: VecDeque<u8>,
}

impl Inner {
    /// Moves waiting input to the FIFO as far as there is room. In loopback mode the line takes
    /// nothing from outside.
    fn feed(&mut self) {
        while !self.waiting.is_empty() && self.uart.fifo_capacity() > 0 {
            let (part, _) = self.waiting.as_slices();
            match self.uart.enqueue_raw_bytes(part) {
                Ok(taken @ 1..) => drop(self.waiting.drain(..taken)),
                Ok(0) | Err(_) => break,
            }
        }
    }
}

/// A serial line. Clones are the same line.
#[derive(Clone)]
pub struct SerialLine {
    inner: Arc<Mutex<Inner>>,
    ring: LogRing,
}

impl std::fmt::Debug for SerialLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialLine").field("printed", &self.ring.end()).finish_non_exhaustive()
    }
}

impl SerialLine {
    /// A line that raises its interrupt with `irq` and prints to `ring`.
    #[must_use]
    pub fn new(irq: EventFd, ring: LogRing) -> Self {
        let uart = Serial::new(IrqTrigger(irq), ring.clone());
        Self { inner: Arc::new(Mutex::new(Inner { uart, waiting: VecDeque::new() })), ring }
    }

    fn with<T>(&self, f: impl FnOnce(&mut Inner) -> T) -> T {
        f(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What the guest printed.
    #[must_use]
    pub fn output(&self) -> &LogRing {
        &self.ring
    }

    /// Types `input` at the guest; says how many bytes were taken, fewer if it does not read.
    pub fn type_input(&self, input: &[u8]) -> usize {
        self.with(|inner| {
            let room = INPUT_LIMIT.saturating_sub(inner.waiting.len());
            let taken = room.min(input.len());
            inner.waiting.extend(&input[..taken]);
            inner.feed();
            taken
        })
    }

    /// The state to save. The VM is paused; what it printed goes to the log on disk first, so that
    /// nothing of it is there twice, or after what the VM prints elsewhere.
    #[must_use]
    pub fn save(&self) -> SavedSerial {
        self.ring.flush(SAVE_FLUSH_LIMIT);
        self.with(|inner| {
            let state = inner.uart.state();
            SavedSerial {
                divisor: [state.baud_divisor_low, state.baud_divisor_high],
                interrupt_enable: state.interrupt_enable,
                interrupt_identification: state.interrupt_identification,
                line_control: state.line_control,
                line_status: state.line_status,
                modem_control: state.modem_control,
                modem_status: state.modem_status,
                scratch: state.scratch,
                fifo: state.in_buffer,
                waiting: inner.waiting.iter().copied().collect(),
            }
        })
    }

    /// Takes over a saved state.
    ///
    /// # Errors
    /// `InvalidData` if it holds more input than a line can.
    pub fn restore(&self, saved: &SavedSerial) -> io::Result<()> {
        if saved.waiting.len() > INPUT_LIMIT {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the serial line's saved input is longer than a line can hold",
            ));
        }
        let state = SerialState {
            baud_divisor_low: saved.divisor[0],
            baud_divisor_high: saved.divisor[1],
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.fifo.clone(),
        };
        self.with(|inner| {
            let irq = inner.uart.interrupt_evt().0.try_clone()?;
            inner.uart = Serial::from_state(&state, IrqTrigger(irq), NoEvents, self.ring.clone())
                .map_err(|error| {
                let text = format!("the serial line's saved state is wrong: {error:?}");
                io::Error::new(io::ErrorKind::InvalidData, text)
            })?;
            inner.waiting = saved.waiting.iter().copied().collect();
            inner.feed();
            Ok(())
        })
    }
}

impl BusDevice for SerialLine {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            self.with(|inner| {
                *byte = inner.uart.read(offset);
                inner.feed();
            });
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            self.with(|inner| {
                if let Err(error) = inner.uart.write(offset, *byte) {
                    tracing::debug!(?error, "serial line");
                }
                inner.feed();
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> (SerialLine, EventFd) {
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (SerialLine::new(irq.try_clone().unwrap(), LogRing::new(64, None)), irq)
    }

    #[test]
    fn prints_and_takes_long_input_in_order_across_save_and_restore() {
        let (mut serial, irq) = line();
        serial.write(0, b"A");
        assert_eq!(serial.output().read(0, 9).bytes, b"A");
        serial.write(1, &[1]); // receive interrupts on
        let _ = irq.read();
        let typed: Vec<u8> = (0..200).collect();
        assert_eq!(serial.type_input(&typed), 200);
        assert_eq!(irq.read().unwrap(), 1);

        let saved = serial.save();
        let (mut other, _irq) = line();
        other.restore(&saved).unwrap();
        let mut read = Vec::new();
        let mut status = [0];
        other.read(5, &mut status);
        while status[0] & 1 == 1 {
            let mut byte = [0];
            other.read(0, &mut byte);
            read.push(byte[0]);
            other.read(5, &mut status);
        }
        assert_eq!(read, typed);
    }

    #[test]
    fn input_is_bounded() {
        let (serial, _irq) = line();
        let taken: usize = (0..100).map(|_| serial.type_input(&[0; 1000])).sum();
        assert!((INPUT_LIMIT..INPUT_LIMIT + 1000).contains(&taken), "{taken}");
        assert_eq!(serial.type_input(&[0; 10]), 0);
        let mut saved = serial.save();
        saved.fifo = vec![0; 10_000];
        assert!(serial.restore(&saved).is_err());
        saved.fifo = vec![];
        saved.waiting = vec![0; 10_000];
        assert!(serial.restore(&saved).is_err());
    }
}
