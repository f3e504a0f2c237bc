//! Where things are in a VM's physical address space. It is part of what a migration and a saved
//! state rely on: an address here never changes once released.
//!
//! ```text
//! 0x0000_0000  RAM (boot structures below 1 MiB, kernel from 1 MiB)
//! 0xc000_0000  PCI memory window (BARs)
//! 0xe000_0000  PCI configuration space of bus 0 (ECAM)
//! 0xfec0_0000  I/O APIC
//! 0xfee0_0000  local APICs
//! 0xfeff_c000  KVM's identity map page and task state segment (4 pages)
//! 0xff00_0000  flat firmware, ends at 4 GiB
//! 0x1_0000_0000  RAM that did not fit below the hole
//! ```

use super::{MemoryError, PAGE_SIZE};

/// The smallest memory a VM can have: the boot structures, and the reset vector's shadow below
/// 1 MiB. A Linux guest needs 64 MiB.
pub const MIN_MEMORY: u64 = 1 << 20;

/// First address of the hole below 4 GiB: no RAM from here to [`HIGH_RAM_START`].
pub const HOLE_START: u64 = 0xc000_0000;
/// First address of the RAM above the hole.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// PCI memory window for BARs.
pub const PCI_MMIO_START: u64 = HOLE_START;
/// Bytes of the PCI memory window.
pub const PCI_MMIO_SIZE: u64 = 0x2000_0000;
/// PCI configuration space by memory (ECAM): bus 0.
pub const PCI_ECAM_START: u64 = 0xe000_0000;
/// Bytes of ECAM: 32 devices with 8 functions of 4 KiB.
pub const PCI_ECAM_SIZE: u64 = 1 << 20;

/// I/O APIC registers.
pub const IOAPIC_START: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LAPIC_START: u32 = 0xfee0_0000;
/// Page that KVM uses to run real mode on some processors.
pub const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
/// Three pages that KVM uses for a task state segment on some processors.
pub const KVM_TSS: usize = 0xfeff_d000;

/// Largest flat firmware image.
pub const MAX_FIRMWARE: u64 = 16 << 20;
/// Part of a firmware image that is also seen below 1 MiB.
pub const FIRMWARE_SHADOW: u64 = 128 << 10;
/// End of the shadow.
pub const FIRMWARE_SHADOW_END: u64 = 1 << 20;

/// End of the RAM that boot structures may use: the extended BIOS data area begins here.
pub const EBDA_START: u64 = 0x9_fc00;
/// Where ACPI tables are: in the area that kernels scan for the RSDP.
pub const ACPI_START: u64 = 0xe_0000;
/// End of the ACPI tables' area.
pub const ACPI_END: u64 = 0x10_0000;
/// Where RAM above the legacy area begins.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Ports of the first serial line (8 ports).
pub const SERIAL_PORT: u16 = 0x3f8;
/// GSI of the first serial line.
pub const SERIAL_GSI: u32 = 4;
/// ACPI power management: event block (4 ports), control block (2), reset register (1).
pub const PM_PORT: u16 = 0x600;
/// Ports of the power management device.
pub const PM_PORTS: u16 = 16;
/// GSI of the ACPI system control interrupt (level, active high).
pub const SCI_GSI: u32 = 9;

/// RAM ranges (start, bytes) of a VM with `memory_bytes`, in rising order.
///
/// # Errors
/// [`MemoryError::Size`] if the size is below [`MIN_MEMORY`], no multiple of a page, or would
/// reach beyond what physical addresses of 46 bits can name.
pub fn ram_ranges(memory_bytes: u64) -> Result<Vec<(u64, u64)>, MemoryError> {
    let too_large = memory_bytes > (1 << 45);
    if memory_bytes < MIN_MEMORY || !memory_bytes.is_multiple_of(PAGE_SIZE) || too_large {
        return Err(MemoryError::Size(memory_bytes));
    }
    let low = memory_bytes.min(HOLE_START);
    let mut ranges = vec![(0, low)];
    if memory_bytes > low {
        ranges.push((HIGH_RAM_START, memory_bytes - low));
    }
    Ok(ranges)
}

/// The range (start, bytes) of a flat firmware image; none if there is none.
///
/// # Errors
/// [`MemoryError::Firmware`] if the image is no multiple of a page or larger than
/// [`MAX_FIRMWARE`].
pub fn firmware_range(firmware_bytes: u64) -> Result<Option<(u64, u64)>, MemoryError> {
    if firmware_bytes > MAX_FIRMWARE || !firmware_bytes.is_multiple_of(PAGE_SIZE) {
        return Err(MemoryError::Firmware(firmware_bytes));
    }
    Ok((firmware_bytes > 0).then(|| (HIGH_RAM_START - firmware_bytes, firmware_bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        let gib = 1 << 30;
        assert_eq!(ram_ranges(64 << 20).unwrap(), [(0, 64 << 20)]);
        assert_eq!(ram_ranges(3 * gib).unwrap(), [(0, 3 * gib)]);
        assert_eq!(ram_ranges(8 * gib).unwrap(), [(0, 3 * gib), (4 * gib, 5 * gib)]);
        for size in [0, 4096, MIN_MEMORY + 1, u64::MAX, 1 << 46] {
            assert!(ram_ranges(size).is_err(), "{size}");
        }
    }

    #[test]
    fn firmware_ends_at_4_gib() {
        assert_eq!(firmware_range(0).unwrap(), None);
        assert_eq!(firmware_range(65536).unwrap(), Some((0xffff_0000, 65536)));
        assert!(firmware_range(100).is_err());
        assert!(firmware_range(MAX_FIRMWARE + 4096).is_err());
        let highest_firmware_start = HIGH_RAM_START - MAX_FIRMWARE;
        assert!(KVM_TSS as u64 + 3 * PAGE_SIZE <= highest_firmware_start);
    }
}
