//! One queue of a running device: the ring, its doorbell, and the interrupt for its used buffers.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::buffers::split_chain;
use super::{Buffers, QueueState, Signal};
use crate::memory::GuestMemory;

/// The ring cannot be used any more; the device was told to ask for its reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the guest broke the ring")]
pub struct QueueBroken;

/// How long a worker goes on with one queue before it looks whether it shall stop: a pause waits
/// for no more than this and one request, however many a slow disk has waiting. They stay in the
/// available ring.
const DRAIN_LIMIT: Duration = Duration::from_millis(5);

/// A chain that the driver made available.
#[derive(Debug)]
pub struct Request {
    /// Index of the chain's head descriptor: what goes back into the used ring.
    pub head: u16,
    /// What the driver wrote.
    pub readable: Buffers,
    /// What the device may fill.
    pub writable: Buffers,
}

/// A queue while its device runs.
#[derive(Debug)]
pub struct DeviceQueue {
    index: u16,
    queue: Queue,
    memory: GuestMemory,
    doorbell: EventFd,
    signal: Arc<Signal>,
    broken: bool,
    /// Used entries were added since the driver was last told.
    unsignalled: bool,
}

impl DeviceQueue {
    /// Takes up a queue where `state` left it.
    ///
    /// # Errors
    /// Says what is wrong with the addresses or the size.
    pub fn new(
        index: u16,
        max_size: u16,
        state: &QueueState,
        event_idx: bool,
        memory: GuestMemory,
        doorbell: EventFd,
        signal: Arc<Signal>,
    ) -> Result<Self, String> {
        let queue = Queue::try_from(virtio_queue::QueueState {
            max_size,
            next_avail: state.next_available,
            next_used: state.next_used,
            event_idx_enabled: event_idx,
            size: state.size,
            ready: state.enabled,
            desc_table: state.descriptors,
            avail_ring: state.available,
            used_ring: state.used,
        })
        .map_err(|error| format!("queue {index}: {error}"))?;
        if !queue.is_valid(&memory) {
            return Err(format!("queue {index} is not in guest memory"));
        }
        let (broken, unsignalled) = (false, false);
        Ok(Self { index, queue, memory, doorbell, signal, broken, unsignalled })
    }

    /// The queue's number in its device.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries of the rings.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Guest memory that the queue's buffers are in.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// What the driver rings when it has made buffers available.
    #[must_use]
    pub fn doorbell(&self) -> &EventFd {
        &self.doorbell
    }

    /// Takes the doorbell's count.
    pub fn acknowledge(&self) {
        // An empty count means that somebody else took it; the ring is looked at anyway.
        let _ = self.doorbell.read();
    }

    /// Comes back to this queue with the next wake-up.
    pub fn ring_again(&self) {
        // Fails only when the counter is full, which is a doorbell that rings.
        let _ = self.doorbell.write(1);
    }

    /// Takes the next available chain; `None` when there is none.
    ///
    /// # Errors
    /// [`QueueBroken`] when the ring or the chain breaks the rules.
    pub fn pop(&mut self) -> Result<Option<Request>, QueueBroken> {
        if self.broken {
            return Err(QueueBroken);
        }
        let size = self.queue.size();
        let chain = match self.queue.iter(&self.memory) {
            Ok(mut available) => available.next(),
            Err(error) => return Err(self.fail(&error.to_string())),
        };
        let Some(chain) = chain else { return Ok(None) };
        let head = chain.head_index();
        if head >= size {
            return Err(self.fail("the available ring names a descriptor that does not exist"));
        }
        match split_chain(chain) {
            Ok((readable, writable)) => Ok(Some(Request { head, readable, writable })),
            Err(error) => Err(self.fail(&error.to_string())),
        }
    }

    /// Puts the last `count` chains that were taken back.
    pub fn put_back(&mut self, count: u16) {
        let next = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(next);
    }

    /// Gives a chain back with `written` bytes filled. The driver is told by [`Self::notify`].
    ///
    /// # Errors
    /// [`QueueBroken`] when the used ring cannot be written.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), QueueBroken> {
        if self.broken {
            return Err(QueueBroken);
        }
        match self.queue.add_used(&self.memory, head, written) {
            Ok(()) => {
                self.unsignalled = true;
                Ok(())
            }
            Err(error) => Err(self.fail(&error.to_string())),
        }
    }

    /// Interrupts the driver if chains were completed and it wants to know.
    ///
    /// # Errors
    /// [`QueueBroken`] when the ring cannot be read.
    pub fn notify(&mut self) -> Result<(), QueueBroken> {
        if !std::mem::take(&mut self.unsignalled) {
            return Ok(());
        }
        match self.queue.needs_notification(&self.memory) {
            Ok(true) => {
                self.signal.queue(self.index);
                Ok(())
            }
            Ok(false) => Ok(()),
            Err(error) => Err(self.fail(&error.to_string())),
        }
    }

    /// Asks the driver to ring from now on; true when buffers came in meanwhile.
    ///
    /// # Errors
    /// [`QueueBroken`].
    pub fn wait_for_doorbell(&mut self) -> Result<bool, QueueBroken> {
        if self.broken {
            return Err(QueueBroken);
        }
        match self.queue.enable_notification(&self.memory) {
            Ok(more) => Ok(more),
            Err(error) => Err(self.fail(&error.to_string())),
        }
    }

    /// Marks the queue as broken and asks for a reset.
    pub fn fail(&mut self, reason: &str) -> QueueBroken {
        self.broken = true;
        self.signal.needs_reset(&format!("queue {}: {reason}", self.index));
        QueueBroken
    }

    /// The queue's state, to go on with later.
    #[must_use]
    pub fn state(&self) -> QueueState {
        QueueState {
            size: self.queue.size(),
            enabled: self.queue.ready(),
            descriptors: self.queue.desc_table(),
            available: self.queue.avail_ring(),
            used: self.queue.used_ring(),
            next_available: self.queue.next_avail(),
            next_used: self.queue.next_used(),
        }
    }

    /// Handles the chains that are available, at most as many as the ring has and for at most
    /// [`DRAIN_LIMIT`] (and one request), then tells the driver once. `handle` gives the number of bytes it filled.
    ///
    /// Work is bounded: when the driver is quicker than the device, the rest waits for the next
    /// wake-up, which is asked for here.
    pub fn drain(&mut self, mut handle: impl FnMut(&GuestMemory, Request) -> Result<u32, String>) {
        self.acknowledge();
        let memory = self.memory.clone();
        let begin = Instant::now();
        let result = (|| {
            for _ in 0..self.size() {
                let Some(request) = self.pop()? else {
                    self.notify()?;
                    if self.wait_for_doorbell()? {
                        self.ring_again();
                    }
                    return Ok(());
                };
                let head = request.head;
                let written = handle(&memory, request).map_err(|reason| self.fail(&reason))?;
                self.complete(head, written)?;
                if begin.elapsed() >= DRAIN_LIMIT {
                    break;
                }
            }
            self.notify()?;
            self.ring_again();
            Ok(())
        })();
        if result == Err(QueueBroken) {
            tracing::debug!(queue = self.index, "the queue rests until the device's reset");
        }
    }
}

/// A doorbell: an eventfd that never blocks.
pub(crate) fn doorbell() -> io::Result<EventFd> {
    EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Bench;

    #[test]
    fn slow_requests_are_handled_a_few_at_a_time() {
        let mut bench = Bench::new(1);
        for _ in 0..3 {
            bench.push(0, &[(0x8000, 8, 0)]);
        }
        let mut queue = bench.queue(0);
        for handled in 1..=3 {
            assert!(bench.is_rung(0), "the rest is not forgotten");
            queue.drain(|_, _| {
                std::thread::sleep(DRAIN_LIMIT);
                Ok(0)
            });
            assert_eq!(bench.used_index(0), handled);
        }
        queue.drain(|_, _| Err("there is no more".to_owned()));
        assert!(!bench.is_rung(0));
    }
}
