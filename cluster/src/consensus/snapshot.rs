//! Snapshots. A member keeps none: its state's database is one, and what it holds in files is as good
//! for a start. One that is sent is read from a [`Checkpoint`] of it; one that is received is a file.
//!
//! Layout, numbers little-endian: `HFSNAP2\n`, length (4) and bytes of the meta (postcard of Raft's
//! snapshot meta), then the state's rows in key order, table by table: table (1, its place in
//! `Table::ALL`), key length (4), value length (4), key, value; then 0xff, the number of rows (8), and
//! the CRC-32 of all before it (4).

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::state::meta;
use super::types::SnapshotMeta;
use crate::machine::{Table, decode, encode};
use crate::storage::{Checkpoint, Db};

const MAGIC: &[u8; 8] = b"HFSNAP3\n";
const END: u8 = 0xff;
/// Longer keys or values than the store allows mean damage; checked before memory is taken.
const PART_MAX: usize = 64 << 20;
/// Rows are sent in pieces of about this size, bytes.
const PIECE: usize = 1 << 20;

/// What Raft hands on as a snapshot.
#[derive(Debug)]
pub(crate) enum SnapshotData {
    /// This member's own state. What is sent may be later than what Raft was told of it: all that it
    /// holds is committed.
    Own(Arc<Db>),
    /// One that was received.
    Received(SnapshotFile),
}

/// A snapshot on its way to another member, piece by piece.
#[derive(Debug)]
pub(crate) struct Outgoing {
    state: Checkpoint,
    meta: SnapshotMeta,
    sum: crc32fast::Hasher,
    rows: u64,
    at: Place,
}

/// Where the next piece begins.
#[derive(Debug)]
enum Place {
    Head,
    /// A table, and where in it.
    Rows(usize, Vec<u8>),
    Done,
}

impl Outgoing {
    /// Of the state as it is now. Blocks.
    pub(crate) fn of(db: &Db) -> io::Result<Self> {
        let state = db.checkpoint()?;
        let meta = state.view(meta)?;
        Ok(Self { state, meta, sum: crc32fast::Hasher::new(), rows: 0, at: Place::Head })
    }

    /// What it holds.
    pub(crate) fn meta(&self) -> &SnapshotMeta {
        &self.meta
    }

    /// The next piece; None after the last. Blocks.
    pub(crate) fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut piece = Vec::new();
        let (mut number, mut from) = match std::mem::replace(&mut self.at, Place::Done) {
            Place::Done => return Ok(None),
            Place::Rows(number, from) => (number, from),
            Place::Head => {
                let head = encode(&self.meta)?;
                piece.extend_from_slice(MAGIC);
                piece.extend_from_slice(&length(&head)?);
                piece.extend_from_slice(&head);
                (0, Vec::new())
            }
        };
        let rows = self.state.view(|view| {
            let mut rows = 0;
            while let Some(table) = Table::ALL.get(number) {
                let start = std::mem::take(&mut from);
                for row in view.all_rows(*table, &start)? {
                    let (key, value) = row?;
                    if piece.len() >= PIECE {
                        from = key;
                        return Ok(rows);
                    }
                    piece.push(u8::try_from(number).map_err(io::Error::other)?);
                    piece.extend_from_slice(&length(&key)?);
                    piece.extend_from_slice(&length(&value)?);
                    piece.extend_from_slice(&key);
                    piece.extend_from_slice(&value);
                    rows += 1;
                }
                number += 1;
            }
            Ok(rows)
        })?;
        self.rows += rows;
        if number < Table::ALL.len() {
            self.at = Place::Rows(number, from);
        } else {
            piece.push(END);
            piece.extend_from_slice(&self.rows.to_le_bytes());
        }
        self.sum.update(&piece);
        if matches!(self.at, Place::Done) {
            piece.extend_from_slice(&self.sum.clone().finalize().to_le_bytes());
        }
        Ok(Some(piece))
    }
}

/// A received snapshot's file, removed with this handle.
#[derive(Debug)]
pub(crate) struct SnapshotFile {
    path: PathBuf,
}

impl SnapshotFile {
    /// An empty file to receive into.
    pub(crate) fn receive(folder: &Path) -> io::Result<(Self, File)> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(folder)?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("receiving-{}-{number}", std::process::id()));
        let file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        Ok((Self { path }, file))
    }

    /// A member's state, received from itself.
    pub(super) fn copy(db: &Db, folder: &Path) -> io::Result<Self> {
        let (snapshot, mut file) = Self::receive(folder)?;
        let mut outgoing = Outgoing::of(db)?;
        while let Some(piece) = outgoing.next()? {
            file.write_all(&piece)?;
        }
        Ok(snapshot)
    }

    /// Reads it through; answers its meta.
    pub(crate) fn verify(&self) -> io::Result<SnapshotMeta> {
        load(self, |_, _, _| Ok(()))
    }
}

impl Drop for SnapshotFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Sums up what is read through it.
struct Summed<T> {
    inner: T,
    sum: crc32fast::Hasher,
}

impl<T: Read> Summed<T> {
    fn read<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.inner.read_exact(&mut bytes)?;
        self.sum.update(&bytes);
        Ok(bytes)
    }

    fn read_part(&mut self, length: [u8; 4]) -> io::Result<Vec<u8>> {
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        if length > PART_MAX {
            return Err(damaged("a length is out of bounds"));
        }
        let mut bytes = vec![0; length];
        self.inner.read_exact(&mut bytes)?;
        self.sum.update(&bytes);
        Ok(bytes)
    }
}

fn damaged(detail: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("damaged snapshot: {detail}"))
}

fn length(bytes: &[u8]) -> io::Result<[u8; 4]> {
    u32::try_from(bytes.len())
        .map(u32::to_le_bytes)
        .map_err(|_| io::Error::other("a row is too large for a snapshot"))
}

/// Reads all of a snapshot, row by row, verifying its checksum. Rows are handed out before the
/// checksum is known: the caller makes them count only when this returns.
pub(super) fn load(
    snapshot: &SnapshotFile,
    mut row: impl FnMut(Table, &[u8], Vec<u8>) -> io::Result<()>,
) -> io::Result<SnapshotMeta> {
    let file = BufReader::with_capacity(1 << 20, File::open(&snapshot.path)?);
    let mut reader = Summed { inner: file, sum: crc32fast::Hasher::new() };
    if reader.read::<8>()? != *MAGIC {
        return Err(damaged("it does not begin as one"));
    }
    let size = reader.read::<4>()?;
    let meta = decode(&reader.read_part(size)?)?;
    let mut rows = 0u64;
    loop {
        let [number] = reader.read::<1>()?;
        if number == END {
            break;
        }
        let table = Table::ALL.get(usize::from(number)).copied();
        let table = table.ok_or_else(|| damaged("a table is unknown"))?;
        let (key_length, value_length) = (reader.read::<4>()?, reader.read::<4>()?);
        let key = reader.read_part(key_length)?;
        let value = reader.read_part(value_length)?;
        row(table, &key, value)?;
        rows += 1;
    }
    if u64::from_le_bytes(reader.read::<8>()?) != rows {
        return Err(damaged("rows are missing"));
    }
    let sum = reader.sum.clone().finalize();
    if u32::from_le_bytes(reader.read::<4>()?) != sum {
        return Err(damaged("the checksum is wrong"));
    }
    Ok(meta)
}

/// Removes what an interrupted run left.
pub(crate) fn clean_up(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::ThisHost;
    use crate::machine::Read;
    use crate::storage::FolderLock;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    #[test]
    fn a_state_arrives_in_pieces_as_it_was_when_it_was_sent() -> Outcome {
        let folder = tempfile::tempdir()?;
        let path = folder.path();
        let db = Db::create(path, FolderLock::take(path)?, Arc::new(ThisHost))?;
        // Rows that end with a piece, that are larger than one, and tables without any.
        let sizes = [PIECE / 2, PIECE / 2, 3, PIECE + 7, 0, PIECE - 40];
        let rows: Vec<(Table, Vec<u8>, Vec<u8>)> = [Table::Data, Table::Versions]
            .into_iter()
            .flat_map(|table| {
                let row = move |(n, size): (u8, usize)| (table, vec![n; 10], vec![n; size]);
                (0u8..).zip(sizes).map(row)
            })
            .collect();
        db.write(|batch| {
            rows.iter().try_for_each(|(table, key, value)| batch.set(*table, key, Some(value)))
        })?;
        let mut outgoing = Outgoing::of(&db)?;
        db.write(|batch| {
            batch.set(Table::Data, &[0; 10], None)?;
            batch.set(Table::Dedup, b"later", Some(b"1"))
        })?;
        let (received, mut file) = SnapshotFile::receive(&path.join("snapshots"))?;
        let (mut pieces, mut bytes) = (0, Vec::new());
        while let Some(piece) = outgoing.next()? {
            pieces += 1;
            bytes.extend(piece);
        }
        assert!(pieces > 4, "{pieces}");
        file.write_all(&bytes)?;
        let mut arrived = Vec::new();
        load(&received, |table, key, value| {
            arrived.push((table, key.to_vec(), value));
            Ok(())
        })?;
        assert!(arrived == rows, "{} rows", arrived.len());
        assert!(db.view(|view| view.get(Table::Data, &[0; 10]))?.is_none());
        // Cut off anywhere, or with a byte that is another: refused.
        for end in [0, 7, 100, bytes.len() / 2, bytes.len() - 1] {
            std::fs::write(&received.path, &bytes[..end])?;
            assert!(received.verify().is_err(), "{end} bytes of {}", bytes.len());
        }
        for place in [3, 30, bytes.len() / 3, bytes.len() - 2] {
            let mut changed = bytes.clone();
            changed[place] ^= 1;
            std::fs::write(&received.path, &changed)?;
            assert!(received.verify().is_err(), "byte {place}");
        }
        drop((outgoing, received));
        assert_eq!(std::fs::read_dir(path.join("snapshots"))?.count(), 0);
        db.close();
        Ok(())
    }
}
