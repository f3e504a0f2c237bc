//! The network device's worker: frames from the tap into receive buffers, frames from transmit
//! buffers into the tap, and the control queue.
//!
//! Invariant: a frame is handed to the guest whole or not at all. While the guest offers no receive
//! buffers, the tap is not watched, so that a flood costs nothing.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use super::S_ANNOUNCE;
use super::tap::{HEADER_BYTES, Tap};
use crate::memory::GuestMemory;
use crate::virtio::DeviceQueue;
use crate::virtio::queue::{QueueBroken, Request};
use crate::virtio::worker::{Engine, Source};

/// Header and the largest frame a tap gives: a 64 KiB segment with its Ethernet header and tags.
pub(super) const FRAME_BYTES: usize = HEADER_BYTES + 65_535 + 18;
/// Frames taken from the tap with one wake-up.
const RECEIVE_BATCH: usize = 64;

const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const CONTROL: u64 = 2;
const TAP: u64 = 3;

/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;

const CONTROL_OK: u8 = 0;
const CONTROL_ERROR: u8 = 1;
/// Class and command of the announcement's acknowledgement (virtio 1.2 §5.1.6.5.4).
const ANNOUNCE_ACK: [u8; 2] = [3, 0];

#[derive(Debug)]
pub(super) struct NetEngine {
    tap: Arc<Tap>,
    status: Arc<AtomicU16>,
    mergeable: bool,
    receive: Option<DeviceQueue>,
    transmit: Option<DeviceQueue>,
    control: Option<DeviceQueue>,
    /// A frame that was read from the tap and waits for receive buffers: the first bytes of `frame`.
    waiting: Option<usize>,
    frame: Box<[u8]>,
    /// The tap is watched.
    watching: bool,
    changed: bool,
    /// The tap cannot be read any more: its interface is gone.
    dead: bool,
}

/// What became of a frame.
#[derive(Debug, PartialEq, Eq)]
enum Delivery {
    Done,
    /// The guest offers too few buffers now: this many chains, which were taken.
    NoBuffers(u16),
}

impl NetEngine {
    pub(super) fn new(
        tap: Arc<Tap>,
        status: Arc<AtomicU16>,
        mergeable: bool,
        [receive, transmit, control]: [Option<DeviceQueue>; 3],
    ) -> Self {
        Self {
            tap,
            status,
            mergeable,
            watching: receive.is_some(),
            receive,
            transmit,
            control,
            waiting: None,
            frame: vec![0; FRAME_BYTES].into_boxed_slice(),
            changed: false,
            dead: false,
        }
    }

    /// The queues; a frame that waits is lost, as on a wire.
    pub(super) fn into_queues(self) -> Vec<DeviceQueue> {
        [self.receive, self.transmit, self.control].into_iter().flatten().collect()
    }

    fn watch(&mut self, watching: bool) {
        if self.watching != watching {
            self.watching = watching;
            self.changed = true;
        }
    }

    /// Moves frames from the tap to the guest.
    fn receive_frames(&mut self) {
        let Some(mut queue) = self.receive.take() else { return };
        let result = self.fill(&mut queue);
        // A broken ring takes no frames until the device's reset.
        self.watch(!self.dead && matches!(result, Ok(Delivery::Done)));
        self.receive = Some(queue);
    }

    fn fill(&mut self, queue: &mut DeviceQueue) -> Result<Delivery, QueueBroken> {
        for _ in 0..RECEIVE_BATCH {
            let length = match self.waiting.take() {
                Some(length) => length,
                None => match read_frame(&self.tap, &mut self.frame) {
                    Ok(Some(length)) => length,
                    Ok(None) => break,
                    Err(error) => {
                        tracing::error!(%error, "a tap interface cannot be read any more");
                        self.dead = true;
                        break;
                    }
                },
            };
            if let Delivery::NoBuffers(taken) = self.deliver(queue, length)? {
                self.waiting = Some(length);
                queue.notify()?;
                // The doorbell brings us back; when buffers came in meanwhile, at once. Those that
                // are too few are given back only now, or they would count as having come in.
                let more = queue.wait_for_doorbell()?;
                queue.put_back(taken);
                if more {
                    queue.ring_again();
                }
                return Ok(Delivery::NoBuffers(taken));
            }
        }
        queue.notify()?;
        Ok(Delivery::Done)
    }

    /// Puts the first `length` bytes of the frame buffer into as many receive buffers as they need.
    fn deliver(&mut self, queue: &mut DeviceQueue, length: usize) -> Result<Delivery, QueueBroken> {
        let mut chains: Vec<Request> = Vec::new();
        let mut room = 0;
        while room < length {
            let Some(request) = queue.pop()? else {
                return Ok(Delivery::NoBuffers(u16::try_from(chains.len()).unwrap_or(u16::MAX)));
            };
            if request.writable.is_empty() || !request.readable.is_empty() {
                return Err(queue.fail("a receive buffer cannot be written to"));
            }
            room += request.writable.len();
            chains.push(request);
            if !self.mergeable && room < length {
                // The driver's buffers are too small for this frame: it is dropped.
                queue.put_back(1);
                return Ok(Delivery::Done);
            }
        }
        let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        self.frame[NUM_BUFFERS..HEADER_BYTES].copy_from_slice(&count.to_le_bytes());
        let memory = queue.memory().clone();
        let mut rest = &self.frame[..length];
        for mut request in chains {
            let (part, behind) = rest.split_at(rest.len().min(request.writable.len()));
            rest = behind;
            if let Err(error) = request.writable.write(&memory, part) {
                return Err(queue.fail(&error.to_string()));
            }
            queue.complete(request.head, u32::try_from(part.len()).unwrap_or(0))?;
        }
        Ok(Delivery::Done)
    }

    fn transmit_frames(&mut self) {
        let Some(queue) = &mut self.transmit else { return };
        let tap = &self.tap;
        queue.drain(|memory, request| {
            let length = request.readable.len();
            if (HEADER_BYTES..=FRAME_BYTES).contains(&length)
                && let Err(error) = request.readable.send_packet(memory, tap.fd())
            {
                // The tap is full, down, or refuses what the guest made of its header.
                tracing::trace!(%error, "a frame of the guest is dropped");
            }
            Ok(0)
        });
    }

    fn handle_control(&mut self) {
        let Some(queue) = &mut self.control else { return };
        let status = &self.status;
        queue.drain(|memory, request| control(memory, request, status));
    }
}

/// Does a command of the control queue (virtio 1.2 §5.1.6.5).
fn control(memory: &GuestMemory, mut request: Request, status: &AtomicU16) -> Result<u32, String> {
    let mut command = [0; 2];
    let read = request.readable.read(memory, &mut command);
    let answer = match (read, command) {
        (Ok(()), ANNOUNCE_ACK) => {
            status.fetch_and(!S_ANNOUNCE, Ordering::AcqRel);
            CONTROL_OK
        }
        _ => CONTROL_ERROR,
    };
    request.writable.write(memory, &[answer]).map_err(|error| error.to_string())?;
    Ok(1)
}

/// Reads a frame with its header; `None` when there is none now.
fn read_frame(tap: &Tap, frame: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        // SAFETY: the kernel fills at most `len` bytes of a buffer that is that long.
        let result = unsafe { libc::read(tap.fd(), frame.as_mut_ptr().cast(), frame.len()) };
        if let Ok(length) = usize::try_from(result) {
            return Ok(Some(length).filter(|length| *length >= HEADER_BYTES));
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Ok(None),
            _ => return Err(error),
        }
    }
}

impl Engine for NetEngine {
    fn sources(&self) -> Vec<Source> {
        let queues =
            [(RECEIVE, &self.receive), (TRANSMIT, &self.transmit), (CONTROL, &self.control)];
        let doorbells = queues.into_iter().filter_map(|(token, queue)| {
            Some(Source { fd: queue.as_ref()?.doorbell().as_raw_fd(), token })
        });
        let tap = self.watching.then(|| Source { fd: self.tap.fd(), token: TAP });
        doorbells.chain(tap).collect()
    }

    fn sources_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    fn handle(&mut self, token: u64) {
        match token {
            TRANSMIT => self.transmit_frames(),
            CONTROL => self.handle_control(),
            RECEIVE => {
                if let Some(queue) = &self.receive {
                    queue.acknowledge();
                }
                self.receive_frames();
            }
            _ => self.receive_frames(),
        }
    }
}
