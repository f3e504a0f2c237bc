//! Numbered records on the guest's disk: the proof that no write was lost, doubled or made by two
//! guests at once. Record `n` (from 1) is the 512-byte sector `n - 1`.
//!
//! ```text
//! 0   magic "HFRECORD"        24  boot id (16 bytes)
//! 8   number, u64             40  wall clock, ns since 1970, u64
//! 16  previous boots, u64     48  CLOCK_BOOTTIME, ns, u64
//!                             508 CRC-32 of bytes 0..508        (integers little endian)
//! ```
//! A boot goes on after the last valid record. Two writers at once would show: records of one boot
//! would be overwritten by those of another, so that the number of boots goes up and down again or
//! a record is missing.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Size of a record, bytes.
pub const SIZE: usize = 512;
const MAGIC: &[u8; 8] = b"HFRECORD";

/// One record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// From 1, without gaps.
    pub number: u64,
    /// How many other boots wrote to this disk before: rises by one with each boot.
    pub boots_before: u64,
    /// The boot that wrote it.
    pub boot_id: [u8; 16],
    /// The guest's CLOCK_REALTIME when it was written, ns since 1970.
    pub wall_ns: u64,
    /// The guest's CLOCK_BOOTTIME when it was written, ns.
    pub uptime_ns: u64,
}

impl Record {
    /// The sector's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; SIZE] {
        let mut sector = [0; SIZE];
        sector[..8].copy_from_slice(MAGIC);
        sector[8..16].copy_from_slice(&self.number.to_le_bytes());
        sector[16..24].copy_from_slice(&self.boots_before.to_le_bytes());
        sector[24..40].copy_from_slice(&self.boot_id);
        sector[40..48].copy_from_slice(&self.wall_ns.to_le_bytes());
        sector[48..56].copy_from_slice(&self.uptime_ns.to_le_bytes());
        let crc = crc32fast::hash(&sector[..SIZE - 4]);
        sector[SIZE - 4..].copy_from_slice(&crc.to_le_bytes());
        sector
    }

    /// Reads a sector; `None` if it holds no valid record.
    #[must_use]
    pub fn decode(sector: &[u8; SIZE]) -> Option<Self> {
        let u64_at = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&sector[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let crc = crc32fast::hash(&sector[..SIZE - 4]).to_le_bytes();
        if &sector[..8] != MAGIC || sector[SIZE - 4..] != crc {
            return None;
        }
        let mut boot_id = [0; 16];
        boot_id.copy_from_slice(&sector[24..40]);
        Some(Self {
            number: u64_at(8),
            boots_before: u64_at(16),
            boot_id,
            wall_ns: u64_at(40),
            uptime_ns: u64_at(48),
        })
    }
}

/// What is wrong with a disk's records.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Disorder {
    /// A hole, or a record in the wrong place: lost or doubled.
    #[error("sector {sector} should hold record {}, found {found:?}", sector + 1)]
    OutOfPlace {
        /// Where.
        sector: u64,
        /// The number found; `None`: no valid record although later ones follow.
        found: Option<u64>,
    },
    /// The boot count fell or jumped, or two boots share one count: two guests wrote at once.
    #[error(
        "record {0} was written by another boot than its neighbours allow: two writers at once"
    )]
    TwoWriters(u64),
    /// Time ran backwards within one boot.
    #[error("record {0} is older than the one before it, of the same boot")]
    TimeBackwards(u64),
}

/// Reads the records of a disk image, up to the first sector of zeros after the last record.
///
/// # Errors
/// If the file cannot be read. Disorder is [`check`]'s business: sectors come as they are.
pub fn read(path: &Path) -> io::Result<Vec<Option<Record>>> {
    let mut bytes = Vec::new();
    File::open(path)?.read_to_end(&mut bytes)?;
    let mut records: Vec<_> = bytes.as_chunks::<SIZE>().0.iter().map(Record::decode).collect();
    let used = records.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
    records.truncate(used);
    Ok(records)
}

/// Checks that the records are in order: none lost, none doubled, one writer at a time.
///
/// # Errors
/// The first disorder.
pub fn check(records: &[Option<Record>]) -> Result<Vec<Record>, Disorder> {
    let mut valid: Vec<Record> = Vec::with_capacity(records.len());
    for (sector, record) in (0u64..).zip(records) {
        let record = record
            .filter(|record| record.number == sector + 1)
            .ok_or(Disorder::OutOfPlace { sector, found: record.map(|record| record.number) })?;
        match valid.last() {
            Some(last) if last.boot_id == record.boot_id => {
                if last.boots_before != record.boots_before {
                    return Err(Disorder::TwoWriters(record.number));
                }
                if last.uptime_ns >= record.uptime_ns {
                    return Err(Disorder::TimeBackwards(record.number));
                }
            }
            Some(last) if record.boots_before != last.boots_before + 1 => {
                return Err(Disorder::TwoWriters(record.number));
            }
            None if record.boots_before != 0 => return Err(Disorder::TwoWriters(record.number)),
            _ => {}
        }
        valid.push(record);
    }
    Ok(valid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(number: u64, boots_before: u64) -> Record {
        Record {
            number,
            boots_before,
            boot_id: [u8::try_from(boots_before).unwrap(); 16],
            wall_ns: number * 100,
            uptime_ns: number * 100,
        }
    }

    #[test]
    fn a_record_comes_back_and_a_damaged_one_does_not() {
        let mut sector = record(7, 2).encode();
        assert_eq!(Record::decode(&sector), Some(record(7, 2)));
        sector[41] ^= 1;
        assert_eq!(Record::decode(&sector), None);
    }

    #[test]
    fn two_boots_in_a_row_are_in_order() {
        let records = [record(1, 0), record(2, 0), record(3, 1)].map(Some);
        assert_eq!(check(&records).unwrap().len(), 3);
    }

    #[test]
    fn a_lost_a_doubled_and_an_interleaved_record_are_found() {
        assert_eq!(
            check(&[Some(record(1, 0)), None, Some(record(3, 0))]),
            Err(Disorder::OutOfPlace { sector: 1, found: None })
        );
        assert_eq!(
            check(&[record(1, 0), record(1, 0)].map(Some)),
            Err(Disorder::OutOfPlace { sector: 1, found: Some(1) })
        );
        // A second writer started, then the first one wrote on: its boot comes back.
        assert_eq!(
            check(&[record(1, 0), record(2, 1), record(3, 0)].map(Some)),
            Err(Disorder::TwoWriters(3))
        );
        let mut late = record(2, 0);
        late.uptime_ns = 1;
        assert_eq!(check(&[record(1, 0), late].map(Some)), Err(Disorder::TimeBackwards(2)));
    }

    #[test]
    fn a_disk_is_read_up_to_its_last_record() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut disk = record(1, 0).encode().to_vec();
        disk.extend(record(2, 0).encode());
        disk.resize(SIZE * 50, 0);
        std::fs::write(file.path(), disk).unwrap();
        assert_eq!(check(&read(file.path()).unwrap()).unwrap().len(), 2);
    }
}
