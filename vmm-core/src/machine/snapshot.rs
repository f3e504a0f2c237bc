//! A whole VM, memory included, as a stream of bytes.
//!
//! ```text
//! "HFVM0001" | state length u64 | state (sections, with their own checksums)
//! run*         first frame u64 | pages u32 | crc32 u32 | pages * 4096 bytes
//! end          frame u64::MAX, pages 0, crc 0
//! ```
//! Integers are little-endian. Pages of zeroes are left out: a fresh machine's memory is zero.

use std::io::{Read, Write};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Machine, MachineError};
use crate::memory::PAGE_SIZE;
use crate::state::STATE_BYTES_MAX;

const MAGIC: &[u8; 8] = b"HFVM0001";
const END_FRAME: u64 = u64::MAX;
/// Pages in one run.
const RUN_PAGES: usize = 256;
const PAGE: usize = 4096;

/// Writes a paused machine.
///
/// # Errors
/// [`MachineError::WrongState`] if it is not paused; [`MachineError::Snapshot`] if `out` fails.
pub fn write_snapshot(machine: &Machine, out: &mut impl Write) -> Result<(), MachineError> {
    let failed = |source| MachineError::Snapshot { action: "written", source };
    let state = machine.save_state()?;
    out.write_all(MAGIC).map_err(failed)?;
    out.write_all(&(state.len() as u64).to_le_bytes()).map_err(failed)?;
    out.write_all(&state).map_err(failed)?;
    let memory = machine.memory();
    let mut run = vec![0; RUN_PAGES * PAGE];
    for region in memory.iter() {
        let pages = region.len() / PAGE_SIZE;
        for first in (0..pages).step_by(RUN_PAGES) {
            let count = usize::try_from(pages - first).unwrap_or(RUN_PAGES).min(RUN_PAGES);
            let address = region.start_addr().0 + first * PAGE_SIZE;
            let run = &mut run[..count * PAGE];
            memory
                .read_slice(run, GuestAddress(address))
                .map_err(|_| MachineError::SnapshotDamaged("guest memory cannot be read"))?;
            write_run(out, address / PAGE_SIZE, run).map_err(failed)?;
        }
    }
    write_header(out, END_FRAME, 0, 0).map_err(failed)?;
    out.flush().map_err(failed)
}

/// Writes the parts of a run that are not zero.
fn write_run(out: &mut impl Write, first: u64, bytes: &[u8]) -> std::io::Result<()> {
    let pages: Vec<&[u8]> = bytes.chunks(PAGE).collect();
    let mut at = 0;
    for group in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let begin = at;
        at += group.len();
        if group.first().is_some_and(|page| is_zero(page)) {
            continue;
        }
        let bytes = &bytes[begin * PAGE..at * PAGE];
        let count = u32::try_from(group.len()).unwrap_or(u32::MAX);
        write_header(out, first + begin as u64, count, crc32fast::hash(bytes))?;
        out.write_all(bytes)?;
    }
    Ok(())
}

fn is_zero(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0)
}

fn write_header(out: &mut impl Write, first: u64, pages: u32, crc: u32) -> std::io::Result<()> {
    out.write_all(&first.to_le_bytes())?;
    out.write_all(&pages.to_le_bytes())?;
    out.write_all(&crc.to_le_bytes())
}

/// Reads a VM into a machine that was made by [`Machine::create_incoming`] with the same shape and
/// devices. It is paused afterwards.
///
/// # Errors
/// [`MachineError`] with what is wrong with the bytes or does not fit; drop the machine then.
pub fn read_snapshot(machine: &Machine, input: &mut impl Read) -> Result<(), MachineError> {
    let failed = |source| MachineError::Snapshot { action: "read", source };
    let mut magic = [0; 8];
    input.read_exact(&mut magic).map_err(failed)?;
    if magic != *MAGIC {
        return Err(MachineError::SnapshotDamaged("it does not begin with HFVM0001"));
    }
    let mut length = [0; 8];
    input.read_exact(&mut length).map_err(failed)?;
    let length = usize::try_from(u64::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > STATE_BYTES_MAX {
        return Err(MachineError::SnapshotDamaged("its state is larger than any can be"));
    }
    let mut state = vec![0; length];
    input.read_exact(&mut state).map_err(failed)?;
    while read_run(machine, input)? {}
    machine.restore_state(&state)
}

/// Reads one run into memory; false at the end.
fn read_run(machine: &Machine, input: &mut impl Read) -> Result<bool, MachineError> {
    let failed = |source| MachineError::Snapshot { action: "read", source };
    let (mut first, mut pages, mut crc) = ([0; 8], [0; 4], [0; 4]);
    input.read_exact(&mut first).map_err(failed)?;
    input.read_exact(&mut pages).map_err(failed)?;
    input.read_exact(&mut crc).map_err(failed)?;
    let (first, crc) = (u64::from_le_bytes(first), u32::from_le_bytes(crc));
    let pages = usize::try_from(u32::from_le_bytes(pages)).unwrap_or(usize::MAX);
    if first == END_FRAME {
        return Ok(false);
    }
    if pages == 0 || pages > RUN_PAGES {
        return Err(MachineError::SnapshotDamaged("a run of pages has an impossible length"));
    }
    let mut bytes = vec![0; pages * PAGE];
    input.read_exact(&mut bytes).map_err(failed)?;
    if crc32fast::hash(&bytes) != crc {
        return Err(MachineError::SnapshotDamaged("the checksum of a run of pages is wrong"));
    }
    let address = first.checked_mul(PAGE_SIZE).map(GuestAddress);
    let written = address.map(|address| machine.memory().write_slice(&bytes, address));
    match written {
        Some(Ok(())) => Ok(true),
        _ => Err(MachineError::SnapshotDamaged("a page lies outside the VM's memory")),
    }
}
