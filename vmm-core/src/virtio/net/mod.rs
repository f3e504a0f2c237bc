//! The network device (virtio 1.2 §5.1) on a tap interface, with checksum and TSO offload both ways,
//! mergeable receive buffers and guest announce.
//!
//! Frames are the kernel's business: a header or a frame that makes no sense is refused by the tap
//! and dropped, as a wire would.

mod engine;
mod tap;

pub use tap::{Tap, TapError};

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use serde::{Deserialize, Serialize};

use self::engine::NetEngine;
use self::tap::{OFFLOAD_CSUM, OFFLOAD_TSO_ECN, OFFLOAD_TSO4, OFFLOAD_TSO6};
use super::worker::Worker;
use super::{DeviceError, DeviceQueue, Run, Signal, VirtioDevice};

const ID: u16 = 1;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_GUEST_ANNOUNCE: u64 = 1 << 21;

const S_LINK_UP: u16 = 1;
const S_ANNOUNCE: u16 = 2;

/// A network interface.
#[derive(Debug)]
pub struct NetConfig {
    /// Its other end.
    pub tap: Tap,
    /// The guest's address.
    pub mac: [u8; 6],
    /// What the guest is told to use, if it is told.
    pub mtu: Option<u16>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct NetState {
    mac: [u8; 6],
    status: u16,
}

/// The device.
#[derive(Debug)]
pub(crate) struct Net {
    tap: Arc<Tap>,
    mac: [u8; 6],
    mtu: Option<u16>,
    status: Arc<AtomicU16>,
    /// Features of the driver that runs, to know whether it can announce.
    features: u64,
    worker: Option<Worker<NetEngine>>,
}

impl Net {
    pub(crate) fn new(config: NetConfig) -> Self {
        let NetConfig { tap, mac, mtu } = config;
        let status = Arc::new(AtomicU16::new(S_LINK_UP));
        Self { tap: Arc::new(tap), mac, mtu, status, features: 0, worker: None }
    }
}

/// Which offloads of the tap the guest's features allow.
fn offloads(features: u64) -> libc::c_uint {
    if features & F_GUEST_CSUM == 0 {
        return 0;
    }
    let pairs = [
        (F_GUEST_TSO4, OFFLOAD_TSO4),
        (F_GUEST_TSO6, OFFLOAD_TSO6),
        (F_GUEST_ECN, OFFLOAD_TSO_ECN),
    ];
    let segments = pairs.iter().filter(|(feature, _)| features & feature != 0);
    segments.fold(OFFLOAD_CSUM, |offload, (_, flag)| offload | flag)
}

impl VirtioDevice for Net {
    fn id(&self) -> u16 {
        ID
    }

    fn class(&self) -> [u8; 3] {
        [0x02, 0x00, 0x00]
    }

    fn features(&self) -> u64 {
        let checksum = F_CSUM | F_GUEST_CSUM;
        let to_guest = F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN | F_MRG_RXBUF;
        let from_guest = F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN;
        let control = F_MAC | F_STATUS | F_CTRL_VQ | F_GUEST_ANNOUNCE;
        checksum | to_guest | from_guest | control | self.mtu.map_or(0, |_| F_MTU)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn config(&self) -> Vec<u8> {
        let mut bytes = self.mac.to_vec();
        bytes.extend_from_slice(&self.status.load(Ordering::Acquire).to_le_bytes());
        bytes.extend_from_slice(&1_u16.to_le_bytes()); // queue pairs
        bytes.extend_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        bytes
    }

    fn start(&mut self, run: Run) -> Result<(), DeviceError> {
        let device = run.signal.name().to_owned();
        let offload = offloads(run.features);
        self.tap.set_offload(offload).map_err(|source| DeviceError::Backend {
            device: device.clone(),
            what: "TUNSETOFFLOAD",
            source,
        })?;
        self.run(run, device)
    }

    fn stop(&mut self) -> Vec<DeviceQueue> {
        let engine = self.worker.take().and_then(Worker::stop);
        engine.map(|engine| engine.into_queues()).unwrap_or_default()
    }

    fn reset(&mut self) {
        self.features = 0;
        self.status.store(S_LINK_UP, Ordering::Release);
    }

    fn announce(&mut self, signal: &Signal) {
        let able = F_GUEST_ANNOUNCE | F_STATUS;
        if self.features & able == able {
            self.status.fetch_or(S_ANNOUNCE, Ordering::AcqRel);
            signal.config_changed();
        }
    }

    fn save(&self) -> Vec<u8> {
        let state = NetState { mac: self.mac, status: self.status.load(Ordering::Acquire) };
        // Plain numbers always encode.
        postcard::to_stdvec(&state).unwrap_or_default()
    }

    fn restore(&mut self, _version: u16, state: &[u8]) -> Result<(), DeviceError> {
        let device = || "network interface".to_owned();
        let (state, _) = postcard::take_from_bytes::<NetState>(state)
            .map_err(|error| DeviceError::State { device: device(), reason: error.to_string() })?;
        if state.mac != self.mac {
            let reason = format!("its address is {:02x?}, here it is {:02x?}", state.mac, self.mac);
            return Err(DeviceError::State { device: device(), reason });
        }
        self.status.store(state.status & (S_LINK_UP | S_ANNOUNCE), Ordering::Release);
        Ok(())
    }
}

impl Net {
    fn run(&mut self, run: Run, device: String) -> Result<(), DeviceError> {
        self.features = run.features;
        let mergeable = run.features & F_MRG_RXBUF != 0;
        let mut queues = run.queues.into_iter();
        let engine = NetEngine::new(
            self.tap.clone(),
            self.status.clone(),
            mergeable,
            [queues.next(), queues.next(), queues.next()].map(Option::flatten),
        );
        let worker = Worker::start("net", engine)
            .map_err(|source| DeviceError::Worker { device, source })?;
        self.worker = Some(worker);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
