//! A driver's side for device tests: rings in a small guest memory, and what comes back on them.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::queue::doorbell;
use super::signal::STATUS_NEEDS_RESET;
use super::{DeviceEvent, DeviceQueue, QueueState, Run, Signal, VirtioDevice};
use crate::interrupt::fake::FakePlatform;
use crate::memory::GuestMemory;
use crate::pci::Msix;

pub(crate) const DESC_NEXT: u16 = 1;
pub(crate) const DESC_WRITE: u16 = 2;
pub(crate) const DESC_INDIRECT: u16 = 4;

/// Entries of each ring.
pub(crate) const RING: u16 = 16;
pub(crate) const MEMORY_BYTES: usize = 1 << 20;

pub(crate) struct Bench {
    pub(crate) memory: GuestMemory,
    pub(crate) signal: Arc<Signal>,
    pub(crate) events: Arc<Mutex<Vec<DeviceEvent>>>,
    queues: Vec<QueueState>,
    doorbells: Vec<vmm_sys_util::eventfd::EventFd>,
    next_descriptor: Vec<u16>,
    seen_used: Vec<u16>,
}

impl Bench {
    pub(crate) fn new(queues: u16) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        let platform = FakePlatform::default();
        let events = Arc::new(Mutex::new(Vec::new()));
        let msix = Msix::new(&platform, queues + 1).unwrap();
        let sink = events.clone();
        let sink: super::EventSink = Arc::new(move |event| sink.lock().unwrap().push(event));
        let signal = Signal::new("test 00:01.0".into(), msix, usize::from(queues), sink);
        let queue = |index: u16| {
            let base = 0x1000 * (u64::from(index) + 1);
            QueueState {
                size: RING,
                enabled: true,
                descriptors: base,
                available: base + 0x400,
                used: base + 0x800,
                next_available: 0,
                next_used: 0,
            }
        };
        Self {
            memory,
            signal,
            events,
            queues: (0..queues).map(queue).collect(),
            doorbells: (0..queues).map(|_| doorbell().unwrap()).collect(),
            next_descriptor: vec![0; usize::from(queues)],
            seen_used: vec![0; usize::from(queues)],
        }
    }

    pub(crate) fn queue(&self, index: u16) -> DeviceQueue {
        let at = usize::from(index);
        let doorbell = self.doorbells[at].try_clone().unwrap();
        let (memory, signal) = (self.memory.clone(), self.signal.clone());
        DeviceQueue::new(index, 256, &self.queues[at], false, memory, doorbell, signal).unwrap()
    }

    pub(crate) fn run(&self, features: u64) -> Run {
        let count = u16::try_from(self.queues.len()).unwrap();
        let queues = (0..count).map(|index| Some(self.queue(index))).collect();
        let (memory, signal) = (self.memory.clone(), self.signal.clone());
        Run { memory, features, queues, signal }
    }

    pub(crate) fn start(&self, device: &mut dyn VirtioDevice, features: u64) {
        device.start(self.run(features)).unwrap();
    }

    /// Waits until the worker has taken the doorbell of a queue, twice: what it did for the first
    /// ring is then done.
    pub(crate) fn wait_idle(&self, queue: u16) {
        for _ in 0..2 {
            self.ring(queue);
            wait("the doorbell to be answered", || !self.is_rung(queue));
        }
    }

    /// Whether the doorbell of a queue was rung and not yet answered.
    pub(crate) fn is_rung(&self, queue: u16) -> bool {
        use std::os::fd::AsRawFd;
        let fd = self.doorbells[usize::from(queue)].as_raw_fd();
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that lives across the call.
        unsafe { libc::poll(&raw mut poll, 1, 0) != 0 }
    }

    /// Takes up the indices that a stopped device gave back.
    pub(crate) fn take_back(&mut self, queues: &[DeviceQueue]) {
        for queue in queues {
            self.queues[usize::from(queue.index())] = queue.state();
        }
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub(crate) fn put_descriptor(&self, table: u64, index: u16, fields: (u64, u32, u16, u16)) {
        let (address, length, flags, next) = fields;
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&next.to_le_bytes());
        self.write(table + u64::from(index) * 16, &bytes);
    }

    /// Makes a chain of (address, length, flags) available and rings; gives its head.
    pub(crate) fn push(&mut self, queue: u16, parts: &[(u64, u32, u16)]) -> u16 {
        let at = usize::from(queue);
        let table = self.queues[at].descriptors;
        let head = self.next_descriptor[at];
        for (index, (address, length, flags)) in parts.iter().enumerate() {
            let here = (head + u16::try_from(index).unwrap()) % RING;
            let last = index + 1 == parts.len();
            let flags = flags | if last { 0 } else { DESC_NEXT };
            self.put_descriptor(table, here, (*address, *length, flags, (here + 1) % RING));
        }
        self.next_descriptor[at] = (head + u16::try_from(parts.len()).unwrap()) % RING;
        self.offer(queue, head);
        head
    }

    /// Puts any head into the available ring and rings.
    pub(crate) fn offer(&self, queue: u16, head: u16) {
        let at = usize::from(queue);
        let available = self.queues[at].available;
        let index: u16 = self.memory.read_obj(GuestAddress(available + 2)).unwrap();
        let slot = available + 4 + u64::from(index % RING) * 2;
        self.write(slot, &head.to_le_bytes());
        self.write(available + 2, &index.wrapping_add(1).to_le_bytes());
        self.doorbells[at].write(1).unwrap();
    }

    pub(crate) fn set_available_index(&self, queue: u16, index: u16) {
        let at = usize::from(queue);
        self.write(self.queues[at].available + 2, &index.to_le_bytes());
        self.doorbells[at].write(1).unwrap();
    }

    pub(crate) fn ring(&self, queue: u16) {
        self.doorbells[usize::from(queue)].write(1).unwrap();
    }

    pub(crate) fn used_index(&self, queue: u16) -> u16 {
        let used = self.queues[usize::from(queue)].used;
        self.memory.load(GuestAddress(used + 2), std::sync::atomic::Ordering::Acquire).unwrap()
    }

    /// Waits for `count` used chains: (head, bytes written).
    pub(crate) fn wait_used(&mut self, queue: u16, count: u16) -> Vec<(u16, u32)> {
        let at = usize::from(queue);
        let target = self.seen_used[at].wrapping_add(count);
        let what = format!("{count} used chains on queue {queue}");
        wait(&what, || self.used_index(queue) == target);
        let first = std::mem::replace(&mut self.seen_used[at], target);
        (0..count)
            .map(|index| {
                let slot = u64::from(first.wrapping_add(index) % RING);
                let entry = self.read(self.queues[at].used + 4 + slot * 8, 8);
                let head = u16::from_le_bytes([entry[0], entry[1]]);
                (head, u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]))
            })
            .collect()
    }

    pub(crate) fn wait_needs_reset(&self) {
        wait("DEVICE_NEEDS_RESET", || self.signal.status() & STATUS_NEEDS_RESET != 0);
    }
}

/// Waits for a condition, ten seconds at most.
pub(crate) fn wait(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < end, "timed out waiting for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
