//! Dirty pages: what guest and VMM have written since the last look.
//!
//! The guest's writes come from KVM's dirty log, the VMM's own (device writes to queues and
//! buffers, loaded images) from vm-memory's bitmap. [`DirtyLog::take`] merges and clears both.
//!
//! Invariant: a page whose content changed after a `take` began is reported by the next `take`.
//! Bits are cleared before anyone reads the page, so that a write in between is not lost.
//!
//! KVM's log runs with manual protection and INITIALLY_SET where the host has them: pages are
//! protected in small steps under a short lock, at the start as well as later.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{GuestMemory, PAGE_SIZE};
use crate::kvm_ext;
use crate::migrate::DirtyPages;

/// Pages that are protected again in one ioctl: bounds how long KVM's memory lock is held.
const CLEAR_STEP_PAGES: u64 = 32768;

/// Why the dirty log failed.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// KVM refused.
    #[error("cannot {what} dirty page tracking of memory slot {slot}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// KVM's memory slot.
        slot: u32,
        /// What the ioctl said.
        #[source]
        source: io::Error,
    },
    /// Tracking is off.
    #[error("dirty pages are not being tracked: start tracking first")]
    NotTracking,
}

#[derive(Debug)]
struct Slot {
    id: u32,
    start: u64,
    bytes: u64,
    host_address: u64,
    flags: u32,
}

/// The memory slots of a VM and their dirty log.
pub struct DirtyLog {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    slots: Vec<Slot>,
    manual_protect: bool,
    tracking: Mutex<bool>,
}

impl std::fmt::Debug for DirtyLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirtyLog")
            .field("slots", &self.slots)
            .field("manual_protect", &self.manual_protect)
            .field("tracking", &self.tracking)
            .finish_non_exhaustive()
    }
}

impl DirtyLog {
    /// Gives all of `memory` to the VM, one KVM slot a region; regions for which `slot_flags`
    /// (by first address) says KVM_MEM_READONLY cannot be written by the guest.
    ///
    /// # Errors
    /// [`DirtyError::Kvm`] if KVM refuses a slot.
    pub fn new(
        vm: Arc<VmFd>,
        memory: GuestMemory,
        slot_flags: impl Fn(u64) -> u32,
    ) -> Result<Self, DirtyError> {
        let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let offered = vm.check_extension_raw(u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
        let offered = u32::try_from(offered).unwrap_or(0) & wanted;
        let mut capability =
            kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
        capability.args[0] = u64::from(offered);
        let manual_protect = offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0
            && vm.enable_cap(&capability).is_ok();

        let mut slots = Vec::new();
        for (id, region) in (0..).zip(memory.iter()) {
            let start = region.start_addr().0;
            slots.push(Slot {
                id,
                start,
                bytes: region.len(),
                host_address: region.as_ptr() as u64,
                flags: slot_flags(start),
            });
        }
        let log = Self { vm, memory, slots, manual_protect, tracking: Mutex::new(false) };
        for slot in &log.slots {
            log.set_slot(slot, 0, "prepare")?;
        }
        Ok(log)
    }

    fn set_slot(&self, slot: &Slot, flags: u32, what: &'static str) -> Result<(), DirtyError> {
        let region = kvm_userspace_memory_region {
            slot: slot.id,
            flags: slot.flags | flags,
            guest_phys_addr: slot.start,
            memory_size: slot.bytes,
            userspace_addr: slot.host_address,
        };
        // SAFETY: the host range is a mapping of `memory`, which lives as long as this log and the
        // VM's descriptor in it, and regions do not overlap.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(|source| DirtyError::Kvm {
            what,
            slot: slot.id,
            source: source.into(),
        })
    }

    /// Starts tracking: a write after this returns is reported by a later [`take`](Self::take),
    /// what was written before is forgotten. Starting twice starts afresh.
    ///
    /// # Errors
    /// [`DirtyError::Kvm`]; tracking is then off.
    pub fn start(&self) -> Result<(), DirtyError> {
        let mut tracking = self.tracking.lock().unwrap_or_else(PoisonError::into_inner);
        let started = self.start_slots();
        if started.is_err() {
            let _ = self.stop_slots();
        }
        *tracking = started.is_ok();
        started
    }

    fn start_slots(&self) -> Result<(), DirtyError> {
        for slot in &self.slots {
            self.set_slot(slot, KVM_MEM_LOG_DIRTY_PAGES, "start")?;
            self.take_slot(slot)?;
        }
        let _forgotten = DirtyPages::take_vmm_writes(&self.memory);
        Ok(())
    }

    fn stop_slots(&self) -> Result<(), DirtyError> {
        self.slots.iter().try_for_each(|slot| self.set_slot(slot, 0, "stop"))
    }

    /// Stops tracking. Takes longer the larger the memory is (KVM rebuilds its mappings), so not
    /// something to do while a guest is paused for a migration.
    ///
    /// # Errors
    /// [`DirtyError::Kvm`].
    pub fn stop(&self) -> Result<(), DirtyError> {
        let mut tracking = self.tracking.lock().unwrap_or_else(PoisonError::into_inner);
        *tracking = false;
        self.stop_slots()
    }

    /// Takes and clears the dirty pages of guest and VMM.
    ///
    /// # Errors
    /// [`DirtyError`]; pages that were already cleared in a failed call are lost, so the caller
    /// must begin anew with [`start`](Self::start).
    pub fn take(&self) -> Result<DirtyPages, DirtyError> {
        let tracking = self.tracking.lock().unwrap_or_else(PoisonError::into_inner);
        if !*tracking {
            return Err(DirtyError::NotTracking);
        }
        let mut pages = DirtyPages::default();
        for slot in &self.slots {
            let bitmap = self.take_slot(slot)?;
            pages.add_region(slot.start / PAGE_SIZE, slot.bytes / PAGE_SIZE, bitmap);
        }
        pages.merge(DirtyPages::take_vmm_writes(&self.memory));
        Ok(pages)
    }

    fn take_slot(&self, slot: &Slot) -> Result<Vec<u64>, DirtyError> {
        let failed = |what| move |source| DirtyError::Kvm { what, slot: slot.id, source };
        let bytes = usize::try_from(slot.bytes).map_err(|_| DirtyError::NotTracking)?;
        let mut bitmap = self
            .vm
            .get_dirty_log(slot.id, bytes)
            .map_err(|error| failed("read")(io::Error::from(error)))?;
        if !self.manual_protect {
            return Ok(bitmap);
        }
        let total = slot.bytes / PAGE_SIZE;
        let step = usize::try_from(CLEAR_STEP_PAGES / 64).unwrap_or(1);
        for (index, words) in (0u64..).zip(bitmap.chunks_mut(step)) {
            if words.iter().all(|word| *word == 0) {
                continue;
            }
            let first_page = index * CLEAR_STEP_PAGES;
            let count = (total - first_page).min(CLEAR_STEP_PAGES);
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            kvm_ext::clear_dirty_log(&self.vm, slot.id, first_page, count, words)
                .map_err(failed("clear"))?;
        }
        Ok(bitmap)
    }
}
