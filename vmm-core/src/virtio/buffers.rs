//! The memory of one descriptor chain, checked, as two byte streams: what the driver wrote and what
//! the device may fill.
//!
//! Invariant: at most [`MAX_DESCRIPTORS`] descriptors are taken of a chain, whatever the guest
//! wrote; bytes are copied only through vm-memory's slices, so bounds and the dirty bitmap hold.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;

use virtio_queue::DescriptorChain;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions, VolatileSlice};

use crate::memory::GuestMemory;

/// Most descriptors of a chain: more than any driver of this world sends to these devices.
pub const MAX_DESCRIPTORS: usize = 512;

/// Most parts of one system call (`IOV_MAX`).
const MAX_IOVECS: usize = 1024;

/// Most bytes of one system call: the write gate is asked again after so many. Drivers stay below.
const MAX_CALL_BYTES: usize = 4 << 20;

/// What is wrong with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BuffersError {
    /// The chain has no descriptor that can be read.
    #[error("the descriptor chain is empty or its head cannot be read")]
    Empty,
    /// The chain goes on to a descriptor that does not exist, or in a loop.
    #[error("the descriptor chain is cut off or runs in a loop")]
    Truncated,
    /// Too many descriptors.
    #[error("the descriptor chain has more than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
    /// A device-readable descriptor follows a device-writable one.
    #[error("a device-readable descriptor follows a device-writable one")]
    Order,
    /// A buffer is not in guest memory.
    #[error("a descriptor points outside guest memory")]
    Outside,
    /// The chain has fewer bytes than needed.
    #[error("the descriptor chain is too short")]
    TooShort,
}

/// A list of guest memory ranges, used as one stream of bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Buffers {
    parts: VecDeque<(GuestAddress, usize)>,
    length: usize,
}

/// Takes a chain apart into (readable, writable).
///
/// # Errors
/// [`BuffersError`] when the chain breaks the rules of virtio 1.2 §2.7. Ranges outside guest memory
/// show only when they are used.
pub fn split_chain(
    mut chain: DescriptorChain<&GuestMemory>,
) -> Result<(Buffers, Buffers), BuffersError> {
    let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
    let mut more = true;
    let mut count = 0;
    while more {
        let Some(descriptor) = chain.next() else {
            return Err(if count == 0 { BuffersError::Empty } else { BuffersError::Truncated });
        };
        count += 1;
        if count > MAX_DESCRIPTORS {
            return Err(BuffersError::TooLong);
        }
        let length = descriptor.len() as usize;
        if descriptor.is_write_only() {
            writable.push(descriptor.addr(), length);
        } else if !writable.parts.is_empty() {
            return Err(BuffersError::Order);
        } else {
            readable.push(descriptor.addr(), length);
        }
        more = descriptor.has_next();
    }
    Ok((readable, writable))
}

impl Buffers {
    fn push(&mut self, address: GuestAddress, length: usize) {
        // A chain is at most 2^32 bytes (virtio-queue), so this cannot overflow on 64 bits.
        self.length += length;
        self.parts.push_back((address, length));
    }

    /// Bytes that are left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no bytes are left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Takes the first `count` bytes off, as buffers of their own.
    ///
    /// # Errors
    /// [`BuffersError::TooShort`]; nothing is taken then.
    pub fn take(&mut self, count: usize) -> Result<Buffers, BuffersError> {
        if count > self.length {
            return Err(BuffersError::TooShort);
        }
        let mut taken = Buffers::default();
        while taken.length < count {
            let Some((address, length)) = self.parts.pop_front() else { break };
            let part = length.min(count - taken.length);
            taken.push(address, part);
            self.length -= part;
            if part < length {
                let rest = GuestAddress(address.0.wrapping_add(part as u64));
                self.parts.push_front((rest, length - part));
            }
        }
        Ok(taken)
    }

    /// Takes the last byte off: where a block or scsi status goes.
    ///
    /// # Errors
    /// [`BuffersError::TooShort`] when there is none.
    pub fn take_last_byte(&mut self) -> Result<GuestAddress, BuffersError> {
        while let Some((address, length)) = self.parts.pop_back() {
            if let Some(rest) = length.checked_sub(1) {
                self.length -= 1;
                self.parts.push_back((address, rest));
                return Ok(GuestAddress(address.0.wrapping_add(rest as u64)));
            }
        }
        Err(BuffersError::TooShort)
    }

    /// Takes and reads the first `data.len()` bytes.
    ///
    /// # Errors
    /// [`BuffersError::TooShort`] or [`BuffersError::Outside`].
    pub fn read(&mut self, memory: &GuestMemory, data: &mut [u8]) -> Result<(), BuffersError> {
        let taken = self.take(data.len())?;
        let mut at = 0;
        for (address, length) in taken.parts {
            memory
                .read_slice(&mut data[at..at + length], address)
                .map_err(|_| BuffersError::Outside)?;
            at += length;
        }
        Ok(())
    }

    /// Takes the first `data.len()` bytes and writes to them.
    ///
    /// # Errors
    /// [`BuffersError::TooShort`] or [`BuffersError::Outside`].
    pub fn write(&mut self, memory: &GuestMemory, data: &[u8]) -> Result<(), BuffersError> {
        let taken = self.take(data.len())?;
        let mut at = 0;
        for (address, length) in taken.parts {
            memory
                .write_slice(&data[at..at + length], address)
                .map_err(|_| BuffersError::Outside)?;
            at += length;
        }
        Ok(())
    }

    /// Hands each continuous piece of memory to `act`.
    fn slices<'m>(
        &self,
        memory: &'m GuestMemory,
        access: Permissions,
    ) -> Result<Vec<VolatileSlice<'m, impl BitmapSlice + use<'m>>>, BuffersError> {
        let mut slices = Vec::with_capacity(self.parts.len());
        for (address, length) in &self.parts {
            let pieces =
                memory.get_slices(*address, *length, access).map_err(|_| BuffersError::Outside)?;
            for piece in pieces {
                slices.push(piece.map_err(|_| BuffersError::Outside)?);
            }
        }
        Ok(slices)
    }

    /// Fills the buffers from `offset` of a file, with as few system calls as can be, and marks
    /// what was filled as dirty.
    ///
    /// # Errors
    /// What preadv says; `UnexpectedEof` when the file ends early; `InvalidInput` when a range is
    /// outside guest memory (nothing is read then).
    pub fn fill_from_file(&self, memory: &GuestMemory, file: RawFd, offset: u64) -> io::Result<()> {
        let slices = self.slices(memory, Permissions::Write).map_err(invalid)?;
        transfer(&slices, Direction::ToGuest, offset, |iovecs, count, at| {
            // SAFETY: the iovecs come from volatile slices of guest memory that outlive the call;
            // the kernel writes only inside them, and guest memory has no Rust references.
            let result = unsafe { libc::preadv64(file, iovecs.as_ptr(), count, at) };
            done(result)
        })
    }

    /// Writes the buffers to `offset` of a file. `check` is asked before each system call.
    ///
    /// # Errors
    /// What `check` or pwritev say; `InvalidInput` when a range is outside guest memory (nothing
    /// is written then).
    pub fn write_to_file(
        &self,
        memory: &GuestMemory,
        file: RawFd,
        offset: u64,
        mut check: impl FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        let slices = self.slices(memory, Permissions::Read).map_err(invalid)?;
        transfer(&slices, Direction::FromGuest, offset, |iovecs, count, at| {
            check()?;
            // SAFETY: the iovecs come from volatile slices of guest memory that outlive the call;
            // the kernel only reads them.
            let result = unsafe { libc::pwritev64(file, iovecs.as_ptr(), count, at) };
            done(result)
        })
    }

    /// Writes the buffers to `file` as one packet.
    ///
    /// # Errors
    /// What writev says; `InvalidInput` when a range is outside guest memory or there are too many.
    pub fn send_packet(&self, memory: &GuestMemory, file: RawFd) -> io::Result<usize> {
        let slices = self.slices(memory, Permissions::Read).map_err(invalid)?;
        if slices.len() > MAX_IOVECS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard).collect();
        let iovecs: Vec<_> = guards
            .iter()
            .map(|guard| libc::iovec {
                iov_base: guard.as_ptr().cast_mut().cast(),
                iov_len: guard.len(),
            })
            .collect();
        let count = libc::c_int::try_from(iovecs.len()).map_err(io::Error::other)?;
        // SAFETY: as in `write_to_file`; the guards keep the mappings accessible.
        done(unsafe { libc::writev(file, iovecs.as_ptr(), count) })
    }
}

fn invalid(error: BuffersError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

fn done(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Which way the bytes of a [`transfer`] go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToGuest,
    FromGuest,
}

/// Calls `call` until all slices went through it, after short transfers and interruptions too.
/// Bytes that went to the guest are marked as dirty once they are there.
fn transfer<B: BitmapSlice>(
    slices: &[VolatileSlice<'_, B>],
    direction: Direction,
    mut offset: u64,
    mut call: impl FnMut(&[libc::iovec], libc::c_int, i64) -> io::Result<usize>,
) -> io::Result<()> {
    // Where the next byte goes: a slice, and an offset in it.
    let (mut index, mut inside) = (0, 0);
    while index < slices.len() {
        let batch = &slices[index..slices.len().min(index + MAX_IOVECS)];
        let guards: Vec<_> = batch.iter().map(VolatileSlice::ptr_guard_mut).collect();
        let (mut skip, mut room) = (inside, MAX_CALL_BYTES);
        let iovecs: Vec<_> = guards
            .iter()
            .map(|guard| {
                let from = std::mem::take(&mut skip);
                let length = (guard.len() - from).min(room);
                room -= length;
                libc::iovec { iov_base: guard.as_ptr().wrapping_add(from).cast(), iov_len: length }
            })
            .collect();
        let wanted = iovecs.iter().any(|iovec| iovec.iov_len > 0);
        let count = libc::c_int::try_from(iovecs.len()).map_err(io::Error::other)?;
        let at = i64::try_from(offset).map_err(io::Error::other)?;
        let moved = match call(&iovecs, count, at) {
            Ok(0) if wanted => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        offset += moved as u64;
        let mut left = moved;
        for slice in batch {
            let part = left.min(slice.len() - inside);
            if direction == Direction::ToGuest {
                slice.bitmap().mark_dirty(inside, part);
            }
            left -= part;
            inside += part;
            if inside < slice.len() {
                break;
            }
            (index, inside) = (index + 1, 0);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
