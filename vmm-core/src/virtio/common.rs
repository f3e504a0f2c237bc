//! The common configuration structure (virtio 1.2 §4.1.4.3): the registers of feature negotiation
//! and queue set-up. Pure: what a status write sets off is the transport's.

use serde::{Deserialize, Serialize};

use super::{QueueState, Signal, feature};

/// Bytes of the structure, with the queue reset fields of virtio 1.2.
pub(crate) const COMMON_BYTES: usize = 64;

/// Status: the driver takes the features (virtio 1.2 §2.1).
pub(crate) const STATUS_FEATURES_OK: u8 = 0x08;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
pub(crate) const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESCRIPTORS: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;

/// The registers, as they are saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CommonConfig {
    pub(crate) device_feature_select: u32,
    pub(crate) driver_feature_select: u32,
    pub(crate) driver_features: u64,
    pub(crate) queue_select: u16,
    pub(crate) queues: Vec<QueueState>,
}

impl CommonConfig {
    pub(crate) fn new(queue_sizes: &[u16]) -> Self {
        let queue = |size: &u16| QueueState {
            size: *size,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
            next_available: 0,
            next_used: 0,
        };
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(queue).collect(),
        }
    }

    fn selected(&self) -> Option<&QueueState> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// All registers as the driver reads them.
    pub(crate) fn bytes(&self, offered: u64, signal: &Signal) -> [u8; COMMON_BYTES] {
        let mut bytes = [0; COMMON_BYTES];
        let mut put = |offset: u64, value: &[u8]| {
            let at = usize::try_from(offset).unwrap_or(0);
            bytes[at..at + value.len()].copy_from_slice(value);
        };
        put(DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        put(DEVICE_FEATURE, &word(offered, self.device_feature_select));
        put(DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        put(DRIVER_FEATURE, &word(self.driver_features, self.driver_feature_select));
        put(CONFIG_VECTOR, &signal.config_vector().to_le_bytes());
        let queues = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
        put(NUM_QUEUES, &queues.to_le_bytes());
        put(DEVICE_STATUS, &[signal.status()]);
        put(CONFIG_GENERATION, &[signal.generation()]);
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.selected() {
            put(QUEUE_SIZE, &queue.size.to_le_bytes());
            put(QUEUE_VECTOR, &signal.queue_vector(self.queue_select).to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(QUEUE_DESCRIPTORS, &queue.descriptors.to_le_bytes());
            put(QUEUE_DRIVER, &queue.available.to_le_bytes());
            put(QUEUE_DEVICE, &queue.used.to_le_bytes());
        }
        bytes
    }

    /// Takes a write of everything but the status. Only writes of a whole field, or of a half of a
    /// 64-bit field, count. Features and queues are fixed once they were agreed and enabled.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8], max_sizes: &[u16], signal: &Signal) {
        let value = data.iter().take(8).rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
        match (offset, data.len()) {
            (DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = low(value),
            (DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = low(value),
            (DRIVER_FEATURE, 4) if signal.status() & STATUS_FEATURES_OK == 0 => {
                match self.driver_feature_select {
                    0 => set_low(&mut self.driver_features, low(value)),
                    1 => set_high(&mut self.driver_features, low(value)),
                    _ => (),
                }
            }
            (CONFIG_VECTOR, 2) => signal.set_config_vector(short(value)),
            (QUEUE_SELECT, 2) => self.queue_select = short(value),
            (QUEUE_VECTOR, 2) => signal.set_queue_vector(self.queue_select, short(value)),
            _ => self.write_queue(offset, data.len(), value, max_sizes),
        }
    }

    fn write_queue(&mut self, offset: u64, length: usize, value: u64, max_sizes: &[u16]) {
        let index = usize::from(self.queue_select);
        let (Some(queue), Some(max_size)) = (self.queues.get_mut(index), max_sizes.get(index))
        else {
            return;
        };
        if queue.enabled {
            return;
        }
        match (offset, length) {
            (QUEUE_SIZE, 2) if short(value).is_power_of_two() && short(value) <= *max_size => {
                queue.size = short(value);
            }
            (QUEUE_ENABLE, 2) if value == 1 => queue.enabled = true,
            _ => {
                write_address(&mut queue.descriptors, offset, QUEUE_DESCRIPTORS, length, value);
                write_address(&mut queue.available, offset, QUEUE_DRIVER, length, value);
                write_address(&mut queue.used, offset, QUEUE_DEVICE, length, value);
            }
        }
    }

    /// Whether the driver's features are a subset of `offered` and make a modern device.
    pub(crate) fn features_agree(&self, offered: u64) -> bool {
        self.driver_features & !offered == 0 && self.driver_features & feature::VERSION_1 != 0
    }
}

fn write_address(target: &mut u64, offset: u64, field: u64, length: usize, value: u64) {
    match (offset.checked_sub(field), length) {
        (Some(0), 8) => *target = value,
        (Some(0), 4) => set_low(target, low(value)),
        (Some(4), 4) => set_high(target, low(value)),
        _ => (),
    }
}

fn word(features: u64, select: u32) -> [u8; 4] {
    match select {
        0 => low(features).to_le_bytes(),
        1 => low(features >> 32).to_le_bytes(),
        _ => [0; 4],
    }
}

fn set_low(target: &mut u64, value: u32) {
    *target = (*target & !0xffff_ffff) | u64::from(value);
}

fn set_high(target: &mut u64, value: u32) {
    *target = (*target & 0xffff_ffff) | (u64::from(value) << 32);
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
fn low(value: u64) -> u32 {
    value as u32
}

#[expect(clippy::cast_possible_truncation, reason = "a field of two bytes was read")]
fn short(value: u64) -> u16 {
    value as u16
}
