//! The one guest memory type. KVM's dirty log does not see the VMM's own writes; the bitmap that
//! vm-memory keeps does. Both are merged when dirty pages are taken.
//!
//! Invariant: every byte that a guest can write lies in a region of [`GuestMemory`], so that a
//! migration that copies all regions has copied all memory.

pub mod dirty;
pub mod layout;

use vm_memory::GuestAddress;

/// Guest memory with a dirty bitmap (one bit a page) of the VMM's own writes.
pub type GuestMemory = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;

/// Bytes in a page: the unit of dirty tracking and of migration.
pub const PAGE_SIZE: u64 = 4096;

/// Why guest memory cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is not one that a VM can have.
    #[error(
        "a VM cannot have {0} bytes of memory: it must be a multiple of 4096 and at least {min}",
        min = layout::MIN_MEMORY
    )]
    Size(u64),
    /// The firmware image does not fit.
    #[error(
        "a firmware image of {0} bytes cannot be mapped: it must be a multiple of 4096 and at \
         most {max} bytes",
        max = layout::MAX_FIRMWARE
    )]
    Firmware(u64),
    /// The host did not give the address space.
    #[error("cannot map {bytes} bytes of guest memory")]
    Map {
        /// Bytes asked for.
        bytes: u64,
        /// What mmap said.
        #[source]
        source: vm_memory::mmap::FromRangesError,
    },
}

/// Maps the memory of a VM: RAM below and above the hole for devices, and, if there is a flat
/// firmware image, `firmware_bytes` that end at 4 GiB. Nothing is touched, so it costs nothing yet.
///
/// # Errors
/// [`MemoryError`] if a size is impossible or the host refuses.
pub fn create(memory_bytes: u64, firmware_bytes: u64) -> Result<GuestMemory, MemoryError> {
    let mut ranges = Vec::new();
    for (start, length) in layout::ram_ranges(memory_bytes)? {
        ranges.push((GuestAddress(start), to_usize(length, memory_bytes)?));
    }
    if let Some((start, length)) = layout::firmware_range(firmware_bytes)? {
        let length = usize::try_from(length).map_err(|_| MemoryError::Firmware(firmware_bytes))?;
        ranges.push((GuestAddress(start), length));
    }
    ranges.sort_unstable_by_key(|(start, _)| start.0);
    GuestMemory::from_ranges(&ranges).map_err(|source| MemoryError::Map {
        bytes: memory_bytes.saturating_add(firmware_bytes),
        source,
    })
}

fn to_usize(length: u64, memory_bytes: u64) -> Result<usize, MemoryError> {
    usize::try_from(length).map_err(|_| MemoryError::Size(memory_bytes))
}
