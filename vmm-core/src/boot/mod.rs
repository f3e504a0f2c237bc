//! Putting into memory what a VM begins with, and the first vCPU's registers for it.
//!
//! Owns the boot protocols: Linux by bzImage (64-bit entry), Linux by PVH (ELF with the Xen note),
//! and flat PC firmware. Reads images as hostile bytes: whatever is in them, the result is a
//! loaded image or a [`BootError`].

mod bzimage;
mod elf;
mod firmware;
mod linux;
mod pvh;
mod registers;

use std::fs::File;
use std::io;

pub use registers::{BootRegisters, RegistersError, set_boot_registers};

use crate::memory::GuestMemory;

/// What a VM begins with. Files are read when the VM is made, and again at each reset.
#[derive(Debug)]
pub enum BootSource {
    /// A Linux kernel: a bzImage, or an ELF image with a PVH entry.
    Linux {
        /// The kernel.
        kernel: File,
        /// The initial RAM disk.
        initrd: Option<File>,
        /// The command line.
        cmdline: String,
    },
    /// A flat firmware image, mapped so that it ends at 4 GiB.
    Firmware(File),
}

/// Why a VM cannot boot what it was given.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("the {what} cannot be read")]
    Read {
        /// "kernel", "initial RAM disk", "firmware image".
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Neither a bzImage nor an ELF image.
    #[error(
        "the kernel is neither a bzImage nor an ELF image: give it /boot/vmlinuz-... of a Linux \
         package, and check that the file is whole"
    )]
    NotAKernel,
    /// A kernel that lacks what is needed.
    #[error("the kernel cannot be booted: {0}")]
    Unsupported(&'static str),
    /// Broken image.
    #[error("the kernel image is damaged or cut off: {0}")]
    Damaged(String),
    /// It does not fit.
    #[error(
        "the VM's memory is too small: the {what} needs memory up to {needed:#x}, below 4 GiB \
         there is {available:#x}; give the VM more memory"
    )]
    NoRoom {
        /// What does not fit.
        what: &'static str,
        /// Address behind its end.
        needed: u64,
        /// End of the memory that it may use.
        available: u64,
    },
    /// The command line is too long.
    #[error("the kernel's command line has {length} bytes, this kernel takes {limit}")]
    CommandLine {
        /// Bytes given.
        length: usize,
        /// Bytes it takes.
        limit: usize,
    },
    /// A NUL in the command line.
    #[error("the kernel's command line holds a NUL byte")]
    CommandLineNul,
    /// The firmware image has a size that cannot be.
    #[error("the firmware image has {0} bytes: it must be a multiple of 4096, at most 16 MiB")]
    FirmwareSize(u64),
    /// Memory could not be written: a layout that does not hold what it must.
    #[error("the {what} cannot be written to guest memory")]
    Write {
        /// What was written.
        what: &'static str,
        /// Why.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

impl BootSource {
    /// Bytes of guest memory that the firmware image needs at the end of 4 GiB; 0 without one.
    ///
    /// # Errors
    /// [`BootError`] if its size cannot be read or cannot be mapped.
    pub fn firmware_bytes(&self) -> Result<u64, BootError> {
        match self {
            Self::Linux { .. } => Ok(0),
            Self::Firmware(file) => firmware::size(file),
        }
    }

    /// Loads it into memory and says how the first vCPU begins.
    ///
    /// # Errors
    /// [`BootError`] with what is wrong with the images or does not fit.
    pub fn load(&self, memory: &GuestMemory, vcpus: u8) -> Result<BootRegisters, BootError> {
        match self {
            Self::Linux { kernel, initrd, cmdline } => {
                linux::load(memory, kernel, initrd.as_ref(), cmdline, vcpus)
            }
            Self::Firmware(file) => firmware::load(memory, file),
        }
    }
}
