//! One block request: parsing what the guest wrote, and doing it (virtio 1.2 §5.2.6).
//!
//! Whatever a request says, it ends in a status byte; only a chain without room for one breaks the
//! device.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::Bytes;

use super::Signal;
use super::image::{Image, SECTOR};
use crate::gate::WriteGate;
use crate::memory::GuestMemory;
use crate::virtio::Buffers;
use crate::virtio::queue::Request;

/// Bytes of the answer to a get-id request.
pub(crate) const ID_BYTES: usize = 20;
/// Bytes of a request's header: type, reserved, sector.
const HEADER_BYTES: usize = 16;
/// Bytes of a discard or write-zeroes segment: sector, sectors, flags.
const SEGMENT_BYTES: usize = 16;
const FLAG_UNMAP: u32 = 1;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// What discard and write-zeroes requests may ask for.
pub(crate) struct Limits {
    /// Sectors of a discard segment.
    pub(crate) discard_sectors: u32,
    /// Sectors of a write-zeroes segment; lower, since they may have to be written.
    pub(crate) zeroes_sectors: u32,
    /// Segments of a request.
    pub(crate) segments: u32,
}

impl Limits {
    pub(crate) const DEFAULT: Self =
        Self { discard_sectors: 1 << 22, zeroes_sectors: 1 << 16, segments: 16 };
}

/// The status byte of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// Why a request did not succeed.
enum Failure {
    /// The guest asked for what cannot be.
    Invalid,
    Unsupported,
    /// The gate said no; it was reported.
    Refused,
    Backend(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::InvalidInput => Self::Invalid,
            io::ErrorKind::Unsupported => Self::Unsupported,
            _ => Self::Backend(error),
        }
    }
}

/// What requests are done with.
#[derive(Debug)]
pub(crate) struct Access {
    pub(crate) image: Arc<Image>,
    pub(crate) gate: WriteGate,
    pub(crate) serial: [u8; ID_BYTES],
    pub(crate) writeback: Arc<AtomicBool>,
    pub(crate) signal: Arc<Signal>,
    /// A failure of the backend or the gate was reported.
    pub(crate) complained: bool,
}

impl Access {
    /// Does a request. Gives the number of bytes written to guest memory, or says why the device is
    /// broken.
    pub(crate) fn handle(&mut self, memory: &GuestMemory, request: Request) -> Result<u32, String> {
        let Request { mut readable, mut writable, .. } = request;
        let status_at = writable
            .take_last_byte()
            .map_err(|_| "a block request has no room for its status".to_owned())?;
        let (status, filled) = match self.execute(memory, &mut readable, &mut writable) {
            Ok(filled) => (Status::Ok, filled),
            Err(Failure::Unsupported) => (Status::Unsupported, 0),
            Err(Failure::Invalid | Failure::Refused) => (Status::IoError, 0),
            Err(Failure::Backend(error)) => {
                if !std::mem::replace(&mut self.complained, true) {
                    let path = self.image.path().display();
                    self.signal.backend_failed(&format!("disk image {path}: {error}"));
                }
                (Status::IoError, 0)
            }
        };
        memory
            .write_obj(status as u8, status_at)
            .map_err(|_| "a block request's status is outside guest memory".to_owned())?;
        Ok(u32::try_from(filled).unwrap_or(u32::MAX).saturating_add(1))
    }

    /// Does what the header says; gives the number of bytes put into `writable`.
    fn execute(
        &mut self,
        memory: &GuestMemory,
        readable: &mut Buffers,
        writable: &mut Buffers,
    ) -> Result<usize, Failure> {
        let mut header = [0; HEADER_BYTES];
        readable.read(memory, &mut header).map_err(|_| Failure::Invalid)?;
        let sector = u64_at(&header, 8);
        match u32_at(&header, 0) {
            T_IN => {
                let offset = self.range(sector, writable.len())?;
                writable.fill_from_file(memory, self.image.fd(), offset)?;
                Ok(writable.len())
            }
            T_OUT => {
                self.refuse_readonly()?;
                let offset = self.range(sector, readable.len())?;
                let gate = &self.gate;
                let check = || gate.check().map_err(io::Error::other);
                let result = readable.write_to_file(memory, self.image.fd(), offset, check);
                self.written(result)
            }
            T_FLUSH => {
                self.image.flush_for_guest()?;
                Ok(0)
            }
            T_GET_ID => {
                let length = writable.len().min(ID_BYTES);
                writable.write(memory, &self.serial[..length]).map_err(|_| Failure::Invalid)?;
                Ok(length)
            }
            kind @ (T_DISCARD | T_WRITE_ZEROES) => {
                self.refuse_readonly()?;
                self.erase(memory, kind, readable)
            }
            _ => Err(Failure::Unsupported),
        }
    }

    fn refuse_readonly(&self) -> Result<(), Failure> {
        if self.image.readonly() { Err(Failure::Invalid) } else { Ok(()) }
    }

    /// The byte offset of a transfer that lies on the disk.
    fn range(&self, sector: u64, length: usize) -> Result<u64, Failure> {
        let length = length as u64;
        let end = sector.checked_add(length / SECTOR).ok_or(Failure::Invalid)?;
        if !length.is_multiple_of(SECTOR) || end > self.image.sectors() {
            return Err(Failure::Invalid);
        }
        sector.checked_mul(SECTOR).ok_or(Failure::Invalid)
    }

    /// What becomes of a write: a refusal is reported, a success made durable when write-through.
    fn written(&mut self, result: io::Result<()>) -> Result<usize, Failure> {
        if let Err(error) = result {
            if let Some(refused) = error.get_ref().and_then(|inner| inner.downcast_ref()) {
                if !std::mem::replace(&mut self.complained, true) {
                    self.signal.write_refused(*refused);
                }
                return Err(Failure::Refused);
            }
            return Err(error.into());
        }
        if !self.writeback.load(Ordering::Acquire) {
            self.image.flush_for_guest()?;
        }
        Ok(0)
    }

    /// Discards or zeroes the segments that the request lists. All are checked before the first.
    fn erase(
        &mut self,
        memory: &GuestMemory,
        kind: u32,
        readable: &mut Buffers,
    ) -> Result<usize, Failure> {
        let limits = Limits::DEFAULT;
        let count = readable.len() / SEGMENT_BYTES;
        let whole = readable.len().is_multiple_of(SEGMENT_BYTES);
        if count == 0 || !whole || count > limits.segments as usize {
            return Err(Failure::Invalid);
        }
        let mut segments = Vec::with_capacity(count);
        for _ in 0..count {
            let mut bytes = [0; SEGMENT_BYTES];
            readable.read(memory, &mut bytes).map_err(|_| Failure::Invalid)?;
            segments.push(self.segment(kind, &bytes, &limits)?);
        }
        let gate = &self.gate;
        let check = || gate.check().map_err(io::Error::other);
        let result = segments.iter().try_for_each(|(offset, length, unmap)| {
            let punched = unmap.then(|| self.image.punch(*offset, *length, check));
            match punched {
                Some(Err(error))
                    if error.kind() == io::ErrorKind::Unsupported && kind == T_WRITE_ZEROES =>
                {
                    self.image.zero(*offset, *length, check)
                }
                Some(result) => result,
                None => self.image.zero(*offset, *length, check),
            }
        });
        self.written(result)
    }

    /// Offset and length in bytes of a segment, and whether its space shall be given back.
    fn segment(
        &self,
        kind: u32,
        bytes: &[u8; SEGMENT_BYTES],
        limits: &Limits,
    ) -> Result<(u64, u64, bool), Failure> {
        let (sector, sectors, flags) = (u64_at(bytes, 0), u32_at(bytes, 8), u32_at(bytes, 12));
        let known = if kind == T_DISCARD { 0 } else { FLAG_UNMAP };
        if flags & !known != 0 {
            return Err(Failure::Unsupported);
        }
        let limit = if kind == T_DISCARD { limits.discard_sectors } else { limits.zeroes_sectors };
        if sectors == 0 || sectors > limit {
            return Err(Failure::Invalid);
        }
        let length = u64::from(sectors) * SECTOR;
        let offset = self.range(sector, usize::try_from(length).unwrap_or(usize::MAX))?;
        Ok((offset, length, kind == T_DISCARD || flags & FLAG_UNMAP != 0))
    }
}

fn u32_at(bytes: &[u8; 16], at: usize) -> u32 {
    let value = bytes[at..].iter().take(4).rev();
    value.fold(0, |sum, byte| sum << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    let value = bytes[at..].iter().take(8).rev();
    value.fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}
