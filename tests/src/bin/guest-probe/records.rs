//! Writes a numbered record to the disk at a steady pace, past the page cache, each one synced
//! before the next. After a boot it goes on where the last one stopped.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use tests::guest::records::{Record, SIZE};

use crate::{Shared, boot_id, clock_ns};

const DISK: &str = "/dev/vda";

/// A sector where direct I/O may take it from.
#[repr(align(4096))]
struct Sector([u8; SIZE]);

/// Until the disk is full or fails; without a disk, not at all.
pub(crate) fn keep_writing(shared: &Shared, every_ms: u64) -> io::Result<()> {
    if every_ms == 0 || !std::path::Path::new(DISK).exists() {
        return Ok(());
    }
    let last = find_last(File::open(DISK)?)?;
    let flags = libc::O_DIRECT | libc::O_SYNC;
    let disk = OpenOptions::new().write(true).custom_flags(flags).open(DISK)?;
    let boot_id = boot_id_bytes();
    let mut number = last.map_or(0, |record| record.number);
    let boots_before = last.map_or(0, |record| record.boots_before + 1);
    loop {
        let record = Record {
            number: number + 1,
            boots_before,
            boot_id,
            wall_ns: clock_ns(libc::CLOCK_REALTIME),
            uptime_ns: clock_ns(libc::CLOCK_BOOTTIME),
        };
        let sector = Sector(record.encode());
        let size = u64::try_from(SIZE).map_err(io::Error::other)?;
        disk.write_all_at(&sector.0, number * size)?;
        number += 1;
        shared.last_record.store(number, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(every_ms));
    }
}

/// The last of the unbroken row of records at the disk's beginning.
fn find_last(mut disk: File) -> io::Result<Option<Record>> {
    let mut last: Option<Record> = None;
    let mut buffer = vec![0; SIZE * 128];
    loop {
        let count = disk.read(&mut buffer)?;
        for sector in buffer[..count].as_chunks::<SIZE>().0 {
            let next = last.map_or(1, |record| record.number + 1);
            match Record::decode(sector).filter(|record| record.number == next) {
                Some(record) => last = Some(record),
                None => return Ok(last),
            }
        }
        if count == 0 {
            return Ok(last);
        }
    }
}

fn boot_id_bytes() -> [u8; 16] {
    let digits: String = boot_id().chars().filter(|c| *c != '-').collect();
    u128::from_str_radix(&digits, 16).unwrap_or(0).to_be_bytes()
}
