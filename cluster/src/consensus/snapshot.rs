//! Snapshots as files: the state's rows in key order, table by table, read and written in pieces.
//!
//! Layout, numbers little-endian: `HFSNAP2\n`, length (4) and bytes of the meta (postcard of Raft's
//! snapshot meta), then rows: table (1, its place in `Table::ALL`), key length (4), value length
//! (4), key, value; then 0xff, the number of rows (8), and the CRC-32 of all before it (4).

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::types::SnapshotMeta;
use crate::machine::{Table, decode, encode};
use crate::storage::Db;

const MAGIC: &[u8; 8] = b"HFSNAP2\n";
const END: u8 = 0xff;
/// Longer keys or values than the store allows mean damage; checked before memory is taken.
const PART_MAX: usize = 64 << 20;

/// A snapshot's file, open for reading. The name may go while it is being sent.
#[derive(Debug)]
pub(crate) struct SnapshotFile {
    pub(crate) path: PathBuf,
    file: File,
    /// A file that was received and is not kept: removed with this handle.
    temporary: bool,
}

impl SnapshotFile {
    fn open(path: PathBuf) -> io::Result<Self> {
        let file = File::open(&path)?;
        Ok(Self { path, file, temporary: false })
    }

    /// An empty file to receive into.
    pub(crate) fn receive(folder: &Path) -> io::Result<(Self, File)> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(folder)?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("receiving-{}-{number}", std::process::id()));
        let writer = create(&path)?;
        let file = File::open(&path)?;
        Ok((Self { path, file, temporary: true }, writer))
    }

    /// Reads it through; answers its meta.
    pub(crate) fn verify(&self) -> io::Result<SnapshotMeta> {
        load(self, |_, _, _| Ok(()))
    }

    /// Bytes at an offset; empty at the end.
    pub(crate) fn chunk(&self, offset: u64, size: usize) -> io::Result<Vec<u8>> {
        let mut chunk = vec![0; size];
        let mut filled = 0;
        while filled < size {
            let at = offset + u64::try_from(filled).unwrap_or(u64::MAX);
            match self.file.read_at(&mut chunk[filled..], at)? {
                0 => break,
                count => filled += count,
            }
        }
        chunk.truncate(filled);
        Ok(chunk)
    }
}

impl Drop for SnapshotFile {
    fn drop(&mut self) {
        if self.temporary {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// Writes what goes through it into a checksum as well.
struct Summed<T> {
    inner: T,
    sum: crc32fast::Hasher,
}

impl<T: Write> Summed<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sum.update(bytes);
        self.inner.write_all(bytes)
    }
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

fn kept(folder: &Path) -> PathBuf {
    folder.join("current")
}

/// Writes a snapshot of the database's present state and makes it the one that is kept.
/// `meta_of` reads the meta from the same view as the rows.
pub(super) fn build(
    db: &Db,
    meta_of: impl Fn(&crate::storage::View<'_>) -> io::Result<SnapshotMeta>,
) -> io::Result<(SnapshotMeta, SnapshotFile)> {
    let folder = db.folder().join("snapshots");
    fs::create_dir_all(&folder)?;
    let building = folder.join("building");
    let meta = db.view(|view| {
        let meta = meta_of(view)?;
        let file = create(&building)?;
        let mut out = Summed {
            inner: BufWriter::with_capacity(1 << 20, file),
            sum: crc32fast::Hasher::new(),
        };
        let head = encode(&meta)?;
        out.write(MAGIC)?;
        out.write(&length(&head)?)?;
        out.write(&head)?;
        let mut rows = 0u64;
        for (number, table) in (0u8..).zip(Table::ALL) {
            for row in view.rows(table, b"")? {
                let (key, value) = row?;
                out.write(&[number])?;
                out.write(&length(&key)?)?;
                out.write(&length(&value)?)?;
                out.write(&key)?;
                out.write(&value)?;
                rows += 1;
            }
        }
        out.write(&[END])?;
        out.write(&rows.to_le_bytes())?;
        let sum = out.sum.clone().finalize();
        out.inner.write_all(&sum.to_le_bytes())?;
        let file = out.inner.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        Ok(meta)
    })?;
    keep(&folder, &building)?;
    Ok((meta, SnapshotFile::open(kept(&folder))?))
}

/// Makes a complete file the one that is kept.
pub(super) fn keep(folder: &Path, file: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    fs::rename(file, kept(folder))?;
    File::open(folder)?.sync_all()
}

/// The snapshot that is kept, if there is one.
pub(super) fn current(folder: &Path) -> io::Result<Option<(SnapshotMeta, SnapshotFile)>> {
    let snapshot = match SnapshotFile::open(kept(folder)) {
        Ok(snapshot) => snapshot,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut reader = reader(&snapshot)?;
    Ok(Some((head(&mut reader)?, snapshot)))
}

fn reader(snapshot: &SnapshotFile) -> io::Result<Summed<BufReader<File>>> {
    let file = File::open(&snapshot.path)?;
    Ok(Summed { inner: BufReader::with_capacity(1 << 20, file), sum: crc32fast::Hasher::new() })
}

fn head(reader: &mut Summed<BufReader<File>>) -> io::Result<SnapshotMeta> {
    if reader.read::<8>()? != *MAGIC {
        return Err(damaged("it does not begin as one"));
    }
    let size = reader.read::<4>()?;
    decode(&reader.read_part(size)?)
}

/// Reads all of a snapshot, row by row, verifying its checksum. Rows are handed out before the
/// checksum is known: the caller makes them count only when this returns.
pub(super) fn load(
    snapshot: &SnapshotFile,
    mut row: impl FnMut(Table, &[u8], Vec<u8>) -> io::Result<()>,
) -> io::Result<SnapshotMeta> {
    let mut reader = reader(snapshot)?;
    let meta = head(&mut reader)?;
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
    let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
    for entry in entries {
        let entry = entry?;
        if entry.file_name() != "current" {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
