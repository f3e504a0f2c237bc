//! The block device (virtio 1.2 §5.2): a raw image behind one or more request queues.
//!
//! Each queue has a worker thread of its own; requests of a batch are completed with one interrupt.
//!
//! Invariants
//! - Every write, discard and write-zeroes asks the write gate right before each of its system
//!   calls.
//! - A flush that succeeded means that all writes completed before it are on stable storage. A
//!   driver that did not ask for a write-back cache gets write-through.

mod image;
mod request;

pub use image::{Image, ImageError};

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use self::request::{Access, Limits};
use super::worker::{Engine, Source, Worker};
use super::{DeviceError, DeviceQueue, Run, Signal, VirtioDevice};
use crate::gate::WriteGate;

const ID: u16 = 2;
const QUEUE_SIZE: u16 = 256;
/// Most queues of a disk.
const MAX_QUEUES: u16 = 8;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Segments of a request: a descriptor each, beside header and status, in a ring of 256.
const SEG_MAX: u32 = 254;
/// Offset of `writeback` in the configuration.
const WRITEBACK: u64 = 32;
const CONFIG_BYTES: usize = 60;

/// A disk.
#[derive(Debug)]
pub struct BlockConfig {
    /// What is on it.
    pub image: Image,
    /// What the guest sees as its serial (`/dev/disk/by-id/virtio-…`): at most 20 bytes.
    pub serial: String,
    /// Request queues; 1 to 8.
    pub queues: u16,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct BlockState {
    sectors: u64,
    writeback: bool,
}

/// The device.
#[derive(Debug)]
pub(crate) struct Block {
    image: Arc<Image>,
    serial: [u8; request::ID_BYTES],
    queues: u16,
    gate: WriteGate,
    /// The driver wants completed writes to stay in a volatile cache.
    writeback: Arc<AtomicBool>,
    workers: Vec<Worker<BlockEngine>>,
}

impl Block {
    pub(crate) fn new(config: BlockConfig, gate: WriteGate) -> Self {
        let mut serial = [0; request::ID_BYTES];
        for (target, byte) in serial.iter_mut().zip(config.serial.bytes()) {
            *target = byte;
        }
        Self {
            image: Arc::new(config.image),
            serial,
            queues: config.queues.clamp(1, MAX_QUEUES),
            gate,
            writeback: Arc::new(AtomicBool::new(true)),
            workers: Vec::new(),
        }
    }

    fn name(&self) -> String {
        format!("disk {}", self.image.path().display())
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> u16 {
        ID
    }

    fn class(&self) -> [u8; 3] {
        [0x01, 0x80, 0x00]
    }

    fn features(&self) -> u64 {
        let common = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_CONFIG_WCE;
        let write = if self.image.readonly() { F_RO } else { F_DISCARD | F_WRITE_ZEROES };
        common | write | if self.queues > 1 { F_MQ } else { 0 }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.queues)]
    }

    fn config(&self) -> Vec<u8> {
        let mut bytes = vec![0; CONFIG_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.image.sectors().to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &512_u32.to_le_bytes());
        put(32, &[u8::from(self.writeback.load(Ordering::Acquire))]);
        put(34, &self.queues.to_le_bytes());
        let limits = Limits::DEFAULT;
        put(36, &limits.discard_sectors.to_le_bytes());
        put(40, &limits.segments.to_le_bytes());
        put(44, &8_u32.to_le_bytes()); // discard alignment: 4 KiB
        put(48, &limits.zeroes_sectors.to_le_bytes());
        put(52, &limits.segments.to_le_bytes());
        put(56, &[1]); // write-zeroes may unmap
        bytes
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (WRITEBACK, [value @ (0 | 1)]) = (offset, data) {
            self.writeback.store(*value == 1, Ordering::Release);
        }
    }

    fn start(&mut self, run: Run) -> Result<(), DeviceError> {
        if run.features & F_FLUSH == 0 {
            self.writeback.store(false, Ordering::Release);
        }
        for queue in run.queues.into_iter().flatten() {
            let name = format!("blk-{}", queue.index());
            let engine = BlockEngine {
                access: Access {
                    image: self.image.clone(),
                    gate: self.gate.clone(),
                    serial: self.serial,
                    writeback: self.writeback.clone(),
                    signal: run.signal.clone(),
                    complained: false,
                },
                queue,
            };
            let worker = Worker::start(&name, engine)
                .map_err(|source| DeviceError::Worker { device: self.name(), source });
            match worker {
                Ok(worker) => self.workers.push(worker),
                Err(error) => {
                    self.workers.clear();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> Vec<DeviceQueue> {
        let engines = self.workers.drain(..).filter_map(Worker::stop);
        engines.map(|engine| engine.queue).collect()
    }

    fn reset(&mut self) {
        self.writeback.store(true, Ordering::Release);
    }

    fn image(&self) -> Option<Arc<Image>> {
        Some(self.image.clone())
    }

    fn lock(&mut self) -> Result<(), ImageError> {
        self.image.lock()
    }

    fn unlock(&mut self) -> Result<(), ImageError> {
        self.image.unlock()
    }

    fn save(&self) -> Vec<u8> {
        let state = BlockState {
            sectors: self.image.sectors(),
            writeback: self.writeback.load(Ordering::Acquire),
        };
        // A number and a flag always encode; an empty state would be refused on restore.
        postcard::to_stdvec(&state).unwrap_or_default()
    }

    fn restore(&mut self, _version: u16, state: &[u8]) -> Result<(), DeviceError> {
        let refuse = |reason: String| DeviceError::State { device: self.name(), reason };
        let (state, _) = postcard::take_from_bytes::<BlockState>(state)
            .map_err(|error| refuse(error.to_string()))?;
        let here = self.image.sectors();
        if state.sectors != here {
            let saved = state.sectors;
            return Err(refuse(format!("the disk had {saved} sectors, the image has {here}")));
        }
        self.writeback.store(state.writeback, Ordering::Release);
        Ok(())
    }
}

#[derive(Debug)]
struct BlockEngine {
    access: Access,
    queue: DeviceQueue,
}

impl Engine for BlockEngine {
    fn sources(&self) -> Vec<Source> {
        vec![Source { fd: self.queue.doorbell().as_raw_fd(), token: 0 }]
    }

    fn handle(&mut self, _token: u64) {
        let access = &mut self.access;
        self.queue.drain(|memory, request| access.handle(memory, request));
    }
}

#[cfg(test)]
mod tests;
