//! The console device (virtio 1.2 §5.3): one port with a bounded buffer each way.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::queue::{QueueBroken, doorbell};
use super::worker::{Engine, Source, Worker};
use super::{DeviceError, DeviceQueue, Run, VirtioDevice};

const ID: u16 = 3;
const QUEUE_SIZE: u16 = 64;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Bytes that wait for the guest at most.
const INPUT_BYTES: usize = 64 << 10;
/// The newest bytes of the guest that are kept.
const OUTPUT_BYTES: usize = 256 << 10;
/// Bytes moved with one request.
const CHUNK: usize = 4096;

#[derive(Debug, Default)]
struct PortBuffers {
    input: VecDeque<u8>,
    output: VecDeque<u8>,
}

/// The host's end of the console. Shared with the device, it survives resets of the guest.
#[derive(Debug)]
pub struct ConsolePort {
    buffers: Mutex<PortBuffers>,
    /// Rung when there is input for the guest.
    input_ready: EventFd,
    /// Rung when the guest has written.
    output_ready: EventFd,
}

impl ConsolePort {
    /// A port with empty buffers.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new() -> std::io::Result<Arc<Self>> {
        let (input_ready, output_ready) = (doorbell()?, doorbell()?);
        Ok(Arc::new(Self { buffers: Mutex::default(), input_ready, output_ready }))
    }

    fn lock(&self) -> MutexGuard<'_, PortBuffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands bytes to the guest; gives how many were taken, fewer when it does not read.
    pub fn write_input(&self, bytes: &[u8]) -> usize {
        let mut buffers = self.lock();
        let taken = bytes.len().min(INPUT_BYTES - buffers.input.len().min(INPUT_BYTES));
        buffers.input.extend(&bytes[..taken]);
        drop(buffers);
        // Fails only when the counter is full, which is a bell that rings.
        let _ = self.input_ready.write(1);
        taken
    }

    /// Takes what the guest wrote, oldest first; gives how many bytes. When nobody takes them, the
    /// oldest are lost.
    pub fn read_output(&self, bytes: &mut [u8]) -> usize {
        let mut buffers = self.lock();
        let count = bytes.len().min(buffers.output.len());
        for (target, byte) in bytes.iter_mut().zip(buffers.output.drain(..count)) {
            *target = byte;
        }
        count
    }

    /// Rings when the guest has written; its count is the caller's to clear.
    #[must_use]
    pub fn output_ready(&self) -> &EventFd {
        &self.output_ready
    }

    fn put_output(&self, bytes: &[u8]) {
        let mut buffers = self.lock();
        buffers.output.extend(bytes);
        let excess = buffers.output.len().saturating_sub(OUTPUT_BYTES);
        buffers.output.drain(..excess);
        drop(buffers);
        // Fails only when the counter is full, which is a bell that rings.
        let _ = self.output_ready.write(1);
    }
}

/// The device. What waits in the port's buffers is the host's, and not part of its state.
#[derive(Debug)]
pub(crate) struct Console {
    port: Arc<ConsolePort>,
    worker: Option<Worker<ConsoleEngine>>,
}

impl Console {
    pub(crate) fn new(port: Arc<ConsolePort>) -> Self {
        Self { port, worker: None }
    }
}

impl VirtioDevice for Console {
    fn id(&self) -> u16 {
        ID
    }

    fn class(&self) -> [u8; 3] {
        [0x07, 0x80, 0x00]
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn config(&self) -> Vec<u8> {
        // Columns, rows, ports, emergency write: none of their features is offered.
        vec![0; 12]
    }

    fn start(&mut self, run: Run) -> Result<(), DeviceError> {
        let device = run.signal.name().to_owned();
        let mut queues = run.queues.into_iter();
        let receive = queues.next().flatten();
        let transmit = queues.next().flatten();
        let engine = ConsoleEngine { port: self.port.clone(), receive, transmit };
        let worker = Worker::start("console", engine)
            .map_err(|source| DeviceError::Worker { device, source })?;
        self.worker = Some(worker);
        Ok(())
    }

    fn stop(&mut self) -> Vec<DeviceQueue> {
        let engine = self.worker.take().and_then(Worker::stop);
        engine
            .map(|engine| [engine.receive, engine.transmit].into_iter().flatten().collect())
            .unwrap_or_default()
    }

    fn reset(&mut self) {}

    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    fn restore(&mut self, _version: u16, _state: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }
}

#[derive(Debug)]
struct ConsoleEngine {
    port: Arc<ConsolePort>,
    receive: Option<DeviceQueue>,
    transmit: Option<DeviceQueue>,
}

const TOKEN_INPUT: u64 = 2;

impl Engine for ConsoleEngine {
    fn sources(&self) -> Vec<Source> {
        let queues = [(RECEIVE, &self.receive), (TRANSMIT, &self.transmit)];
        let doorbells = queues.into_iter().filter_map(|(token, queue)| {
            let fd = queue.as_ref()?.doorbell().as_raw_fd();
            Some(Source { fd, token: token as u64 })
        });
        let input = Source { fd: self.port.input_ready.as_raw_fd(), token: TOKEN_INPUT };
        doorbells.chain([input]).collect()
    }

    fn handle(&mut self, token: u64) {
        if token == TRANSMIT as u64 {
            self.take_output();
            return;
        }
        // Empty is what it shall be.
        let _ = self.port.input_ready.read();
        if let Some(queue) = &mut self.receive {
            queue.acknowledge();
            if give_input(&self.port, queue) == Err(QueueBroken) {
                tracing::debug!("the console's receive queue rests until the device's reset");
            }
        }
    }
}

impl ConsoleEngine {
    fn take_output(&mut self) {
        let Some(queue) = &mut self.transmit else { return };
        let port = &self.port;
        queue.drain(|memory, mut request| {
            let mut chunk = [0; CHUNK];
            // A chain may be as long as a ring of large buffers: only the newest bytes would be
            // kept of it anyway.
            let skip = request.readable.len().saturating_sub(OUTPUT_BYTES);
            request.readable.take(skip).map_err(|error| error.to_string())?;
            while !request.readable.is_empty() {
                let part = request.readable.len().min(CHUNK);
                let bytes = &mut chunk[..part];
                request.readable.read(memory, bytes).map_err(|error| error.to_string())?;
                port.put_output(bytes);
            }
            Ok(0)
        });
    }
}

/// Fills the guest's buffers with what waits for it.
fn give_input(port: &ConsolePort, queue: &mut DeviceQueue) -> Result<(), QueueBroken> {
    let memory = queue.memory().clone();
    for _ in 0..queue.size() {
        if port.lock().input.is_empty() {
            break;
        }
        let Some(mut request) = queue.pop()? else { break };
        let mut buffers = port.lock();
        let count = request.writable.len().min(buffers.input.len()).min(CHUNK);
        let bytes: Vec<u8> = buffers.input.drain(..count).collect();
        drop(buffers);
        if let Err(error) = request.writable.write(&memory, &bytes) {
            return Err(queue.fail(&error.to_string()));
        }
        queue.complete(request.head, u32::try_from(count).unwrap_or(0))?;
    }
    queue.notify()?;
    // Buffers that came in meanwhile ring the doorbell; input that is left waits for them.
    if queue.wait_for_doorbell()? && !port.lock().input.is_empty() {
        queue.ring_again();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Bench, DESC_WRITE};

    #[test]
    fn bytes_go_both_ways() {
        let port = ConsolePort::new().unwrap();
        let mut bench = Bench::new(2);
        bench.write(0x8000, b"hello from the guest");
        let out = bench.push(1, &[(0x8000, 5, 0), (0x8005, 15, 0)]);
        let first = bench.push(0, &[(0x9000, 4, DESC_WRITE)]);
        let second = bench.push(0, &[(0x9100, 4, DESC_WRITE)]);
        let mut device = Console::new(port.clone());
        bench.start(&mut device, 0);
        assert_eq!(bench.wait_used(1, 1), [(out, 0)]);
        let mut output = [0; 64];
        let count = port.read_output(&mut output);
        assert_eq!(&output[..count], b"hello from the guest");
        assert_eq!(port.write_input(b"abcdef"), 6);
        assert_eq!(bench.wait_used(0, 2), [(first, 4), (second, 2)]);
        assert_eq!(bench.read(0x9000, 4), b"abcd");
        assert_eq!(bench.read(0x9100, 4), b"ef\0\0");
        assert_eq!(device.stop().len(), 2);
    }

    #[test]
    fn buffers_are_bounded() {
        let port = ConsolePort::new().unwrap();
        assert_eq!(port.write_input(&vec![1; INPUT_BYTES + 5]), INPUT_BYTES);
        assert_eq!(port.write_input(&[1]), 0);
        for round in 0..3 {
            port.put_output(&vec![round; OUTPUT_BYTES / 2]);
        }
        let mut output = vec![0; OUTPUT_BYTES * 2];
        assert_eq!(port.read_output(&mut output), OUTPUT_BYTES);
        assert_eq!((output[0], output[OUTPUT_BYTES - 1]), (1, 2));
    }
}
