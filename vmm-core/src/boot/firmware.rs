//! Flat PC firmware: the image ends at 4 GiB, its last 128 KiB are seen below 1 MiB as well, and
//! the first vCPU begins at the reset vector, as after power-on.

use std::fs::File;
use std::io::{Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{BootError, BootRegisters};
use crate::memory::{GuestMemory, layout};

const WHAT: &str = "firmware image";

pub(super) fn size(file: &File) -> Result<u64, BootError> {
    let size = file.metadata().map_err(|source| BootError::Read { what: WHAT, source })?.len();
    match layout::firmware_range(size) {
        Ok(Some(_)) => Ok(size),
        Ok(None) | Err(_) => Err(BootError::FirmwareSize(size)),
    }
}

pub(super) fn load(memory: &GuestMemory, mut file: &File) -> Result<BootRegisters, BootError> {
    let size = size(file)?;
    let written = |source| BootError::Write { what: WHAT, source };
    let length = usize::try_from(size).map_err(|_| BootError::FirmwareSize(size))?;
    let start = GuestAddress(layout::HIGH_RAM_START - size);
    file.seek(SeekFrom::Start(0)).map_err(|source| BootError::Read { what: WHAT, source })?;
    memory.read_exact_volatile_from(start, &mut file, length).map_err(written)?;

    let shadow_bytes = size.min(layout::FIRMWARE_SHADOW);
    let mut shadow = vec![0; usize::try_from(shadow_bytes).unwrap_or(0)];
    memory
        .read_slice(&mut shadow, GuestAddress(layout::HIGH_RAM_START - shadow_bytes))
        .map_err(written)?;
    let shadow_start = GuestAddress(layout::FIRMWARE_SHADOW_END - shadow_bytes);
    if memory.check_range(shadow_start, shadow.len()) {
        memory.write_slice(&shadow, shadow_start).map_err(written)?;
    }
    Ok(BootRegisters::ResetVector)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_at_4_gib_and_is_shadowed() {
        let file = tempfile::tempfile().unwrap();
        let image: Vec<u8> = (0..64u8).flat_map(|page| [page; 4096]).collect();
        std::os::unix::fs::FileExt::write_all_at(&file, &image, 0).unwrap();
        let memory = crate::memory::create(2 << 20, image.len() as u64).unwrap();
        assert_eq!(load(&memory, &file).unwrap(), BootRegisters::ResetVector);
        let byte = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!((byte(0xffff_ffff), byte(0xfffc_0000)), (63, 0));
        assert_eq!((byte(0xf_ffff), byte(0xe_0000), byte(0xd_ffff)), (63, 32, 0));
    }

    #[test]
    fn odd_sizes_are_refused() {
        let file = tempfile::tempfile().unwrap();
        for size in [0, 1, 4097, layout::MAX_FIRMWARE + 4096] {
            file.set_len(size).unwrap();
            assert!(matches!(super::size(&file), Err(BootError::FirmwareSize(_))), "{size}");
        }
    }
}
