//! Reads the second disk once, whole, and tries whether it can be written.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use tests::guest::client::SecondDisk;

const DISK: &str = "/dev/vdb";

/// A piece, where direct I/O may put it.
#[repr(align(4096))]
struct Piece([u8; 1 << 16]);

/// What is found; `None`: there is no second disk.
pub(crate) fn look() -> io::Result<Option<SecondDisk>> {
    let open = File::options().read(true).custom_flags(libc::O_DIRECT).open(DISK);
    let mut disk = match open {
        Ok(disk) => disk,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let (mut bytes, mut crc) = (0, crc32fast::Hasher::new());
    let mut piece = Box::new(Piece([0; 1 << 16]));
    loop {
        let count = disk.read(&mut piece.0)?;
        if count == 0 {
            break;
        }
        crc.update(&piece.0[..count]);
        bytes += u64::try_from(count).map_err(io::Error::other)?;
    }
    let readonly = std::fs::read_to_string("/sys/block/vdb/ro")?.trim() == "1";
    // Its first sector is written back: a disk that can be written is the same afterwards.
    disk.read_exact_at(&mut piece.0[..512], 0)?;
    let written = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT | libc::O_SYNC)
        .open(DISK)
        .and_then(|disk| disk.write_all_at(&piece.0[..512], 0));
    let write_error = written.err().map_or(String::new(), |error| error.to_string());
    Ok(Some(SecondDisk { bytes, crc: crc.finalize(), readonly, write_error }))
}
