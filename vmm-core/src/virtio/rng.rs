//! The entropy device (virtio 1.2 §5.4): random bytes from the host's kernel.

use std::io;
use std::os::fd::AsRawFd;

use super::queue::Request;
use super::worker::{Engine, Source, Worker};
use super::{DeviceError, DeviceQueue, Run, VirtioDevice};
use crate::memory::GuestMemory;

const ID: u16 = 4;
const QUEUE_SIZE: u16 = 64;
/// Most bytes of one answer; a driver that wants more asks again.
const MAX_BYTES: usize = 4096;

/// The device. It has no state of its own.
#[derive(Debug, Default)]
pub(crate) struct Rng {
    worker: Option<Worker<RngEngine>>,
}

impl VirtioDevice for Rng {
    fn id(&self) -> u16 {
        ID
    }

    fn class(&self) -> [u8; 3] {
        [0xff, 0x00, 0x00]
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn start(&mut self, run: Run) -> Result<(), DeviceError> {
        let device = || run.signal.name().to_owned();
        if let Some(queue) = run.queues.into_iter().next().flatten() {
            let worker = Worker::start("rng", RngEngine { queue })
                .map_err(|source| DeviceError::Worker { device: device(), source })?;
            self.worker = Some(worker);
        }
        Ok(())
    }

    fn stop(&mut self) -> Vec<DeviceQueue> {
        let engine = self.worker.take().and_then(Worker::stop);
        engine.map(|engine| engine.queue).into_iter().collect()
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
struct RngEngine {
    queue: DeviceQueue,
}

impl Engine for RngEngine {
    fn sources(&self) -> Vec<Source> {
        vec![Source { fd: self.queue.doorbell().as_raw_fd(), token: 0 }]
    }

    fn handle(&mut self, _token: u64) {
        self.queue.drain(answer);
    }
}

/// Fills what the driver offers, up to [`MAX_BYTES`].
fn answer(memory: &GuestMemory, mut request: Request) -> Result<u32, String> {
    let mut bytes = [0; MAX_BYTES];
    let wanted = request.writable.len().min(MAX_BYTES);
    let filled = random(&mut bytes[..wanted]).map_err(|error| format!("getrandom: {error}"))?;
    request.writable.write(memory, &bytes[..filled]).map_err(|error| error.to_string())?;
    u32::try_from(filled).map_err(|error| error.to_string())
}

fn random(bytes: &mut [u8]) -> io::Result<usize> {
    loop {
        // SAFETY: the kernel fills at most `len` bytes of a buffer that is that long.
        let result = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match usize::try_from(result) {
            Ok(filled) => return Ok(filled),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Bench, DESC_WRITE};

    #[test]
    fn answers_are_random_and_bounded() {
        let mut bench = Bench::new(1);
        let head = bench.push(0, &[(0x8000, 64, DESC_WRITE)]);
        let long = bench.push(0, &[(0x9000, 0x2000, DESC_WRITE)]);
        let mut device = Rng::default();
        bench.start(&mut device, 0);
        assert_eq!(bench.wait_used(0, 2), [(head, 64), (long, 4096)]);
        assert_ne!(bench.read(0x8000, 64), [0; 64]);
        assert_eq!(bench.read(0xa000, 0x1000), [0; 0x1000], "bounded");
        assert_eq!(device.stop().len(), 1);
    }

    #[test]
    fn a_buffer_outside_memory_breaks_the_device_not_the_process() {
        let mut bench = Bench::new(1);
        bench.push(0, &[(u64::MAX - 8, 64, DESC_WRITE)]);
        let mut device = Rng::default();
        bench.start(&mut device, 0);
        bench.wait_needs_reset();
        assert_eq!(device.stop().len(), 1);
    }
}
