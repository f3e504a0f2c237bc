//! The format of a backup of the configuration, written and read piece by piece.
//!
//! ```text
//! "HFBACKUP"  version (4)  length (4)  header (JSON of Header)  CRC-32 of all before it (4)
//! frame*      kind (1)  length (4)  payload  CRC-32 of kind, length and payload (4)
//! ```
//!
//! Numbers are little-endian. A frame of kind 1 holds rows: key length (4), value length (4), key,
//! value; keys rise strictly through the whole file. The last frame has kind 255 and holds the
//! number of rows (8), of frames before it (8), and the SHA-256 of all before it (32). A file that
//! does not end with it was cut off. The checksums tell damage, not forgery: who can write the file
//! can make it say anything.
//!
//! What is in it: the latest value of each key that [`is_kept`]; no history.

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

use crate::keys;

const MAGIC: &[u8; 8] = b"HFBACKUP";
/// The one version there is.
const VERSION: u32 = 1;
const ROWS: u8 = 1;
const END: u8 = 0xff;
/// A frame is written when it has this many bytes of rows.
const FRAME_BYTES: usize = 256 << 10;
/// Longer frames and headers mean damage; checked before memory is taken.
const FRAME_MAX: usize = 4 << 20;
const HEADER_MAX: usize = 64 << 10;
/// Kind and length.
const FRAME_HEAD: usize = 5;
const CRC: usize = 4;

/// Whether a key belongs into a backup. Of the system's records only those do that a new cluster
/// needs of an old one: which VMs there are, and which images are theirs. The rest says who the
/// members are, or lets somebody in: the CA, join tokens, names, nodes, leases, fencing.
#[must_use]
pub fn is_kept(key: &str) -> bool {
    if key.starts_with(keys::STATUS) {
        return key.starts_with(keys::PLACEMENTS) || key.starts_with(keys::DISKS);
    }
    !keys::IDENTITY
        .iter()
        .any(|known| key == *known || known.ends_with('/') && key.starts_with(known))
}

/// What a backup says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The cluster's name.
    pub cluster_name: String,
    /// The cluster's id.
    pub cluster_id: String,
    /// The store's revision that it holds.
    pub revision: u64,
    /// When it was made, in Unix milliseconds of the node that made it.
    pub at_unix_ms: u64,
    /// The node that made it.
    pub node: String,
    /// The version of the agent that made it.
    pub agent_version: String,
    /// About how many bytes of keys and values follow, for showing progress.
    pub about_bytes: u64,
}

impl Header {
    /// Whether it can be shown on a terminal as it is: who wrote the file wrote this too.
    fn is_printable(&self) -> bool {
        let texts = [&self.cluster_name, &self.cluster_id, &self.node, &self.agent_version];
        !texts.iter().any(|text| text.chars().any(char::is_control))
    }
}

/// Why bytes are not a backup.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackupError {
    /// Another kind of file.
    #[error("this is not a backup of a Holdfast cluster (it does not begin as one)")]
    Foreign,
    /// Another version's.
    #[error(
        "the backup has format {0}, this program reads format {VERSION}; use the version that wrote it, or a newer one"
    )]
    Version(u32),
    /// A checksum or a number in it is wrong.
    #[error("the backup is damaged at about byte {at}: {what}")]
    Damaged {
        /// Where.
        at: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// It ends too early.
    #[error("the backup was cut off: it ends after {0} bytes, without its last part")]
    CutOff(u64),
    /// A row that does not fit into a frame.
    #[error("`{0}` is too large for a backup")]
    TooLarge(String),
}

/// What a whole backup came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Keys.
    pub rows: u64,
    /// Of the file.
    pub bytes: u64,
}

/// Makes the bytes of a backup.
pub struct Writer {
    sum: Context,
    frame: Vec<u8>,
    rows: u64,
    frames: u64,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("rows", &self.rows).finish_non_exhaustive()
    }
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).unwrap_or(u32::MAX).to_le_bytes()
}

fn framed(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(FRAME_HEAD + payload.len() + CRC);
    bytes.push(kind);
    bytes.extend(length(payload.len()));
    bytes.extend(payload);
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

impl Writer {
    /// Begins; the bytes come first.
    ///
    /// # Errors
    /// The header is too long.
    pub fn begin(header: &Header) -> Result<(Self, Vec<u8>), BackupError> {
        let header = serde_json::to_vec(header).unwrap_or_default();
        if header.is_empty() || header.len() > HEADER_MAX {
            return Err(BackupError::TooLarge("the header".to_owned()));
        }
        let mut bytes = [MAGIC.as_slice(), &VERSION.to_le_bytes(), &length(header.len())].concat();
        bytes.extend(header);
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        let mut sum = Context::new(&SHA256);
        sum.update(&bytes);
        Ok((Self { sum, frame: Vec::new(), rows: 0, frames: 0 }, bytes))
    }

    /// Takes a row, in the order of keys; the bytes that are ready, if there are any.
    ///
    /// # Errors
    /// It is too large.
    pub fn row(&mut self, key: &str, value: &[u8]) -> Result<Option<Vec<u8>>, BackupError> {
        let size = 8 + key.len() + value.len();
        if size > FRAME_MAX {
            return Err(BackupError::TooLarge(key.to_owned()));
        }
        let ready = self.frame.len() + size > FRAME_BYTES && !self.frame.is_empty();
        let bytes = ready.then(|| self.end_frame());
        self.frame.extend(length(key.len()));
        self.frame.extend(length(value.len()));
        self.frame.extend(key.as_bytes());
        self.frame.extend(value);
        self.rows += 1;
        Ok(bytes)
    }

    /// The last bytes.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        let mut bytes = if self.frame.is_empty() { Vec::new() } else { self.end_frame() };
        let sum = self.sum.finish();
        let numbers = [self.rows.to_le_bytes(), self.frames.to_le_bytes()].concat();
        bytes.extend(framed(END, &[&numbers, sum.as_ref()].concat()));
        bytes
    }

    fn end_frame(&mut self) -> Vec<u8> {
        let bytes = framed(ROWS, &std::mem::take(&mut self.frame));
        self.sum.update(&bytes);
        self.frames += 1;
        bytes
    }
}

/// A key and its value.
pub type Row = (String, Vec<u8>);

/// Takes a backup apart as its bytes come in. Rows are handed out before the whole is known to be
/// good: they count only once [`Reader::finish`] says so.
pub struct Reader {
    waiting: Vec<u8>,
    /// Bytes of `waiting` that were taken apart. They go together, once per piece: a file of many
    /// tiny frames costs no more than another.
    used: usize,
    header: Option<Header>,
    sum: Context,
    taken: u64,
    rows: u64,
    frames: u64,
    last_key: String,
    ended: bool,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("header", &self.header).finish_non_exhaustive()
    }
}

impl Default for Reader {
    fn default() -> Self {
        Self {
            waiting: Vec::new(),
            used: 0,
            header: None,
            sum: Context::new(&SHA256),
            taken: 0,
            rows: 0,
            frames: 0,
            last_key: String::new(),
            ended: false,
        }
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn number_u32(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32::from_le_bytes(number(bytes, at)?)).ok()
}

impl Reader {
    /// What the backup says of itself, once that was read.
    #[must_use]
    pub fn header(&self) -> Option<&Header> {
        self.header.as_ref()
    }

    /// Takes bytes; the rows that are complete with them.
    ///
    /// # Errors
    /// [`BackupError`]; there is no going on after it.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Row>, BackupError> {
        self.waiting.extend_from_slice(bytes);
        let mut rows = Vec::new();
        while self.step(&mut rows)? {}
        self.waiting.drain(..self.used);
        self.used = 0;
        Ok(rows)
    }

    fn rest(&self) -> &[u8] {
        self.waiting.get(self.used..).unwrap_or_default()
    }

    /// There are no more bytes.
    ///
    /// # Errors
    /// [`BackupError::CutOff`]
    pub fn finish(self) -> Result<Summary, BackupError> {
        let bytes = self.taken + self.rest().len() as u64;
        if self.ended {
            Ok(Summary { rows: self.rows, bytes })
        } else {
            Err(BackupError::CutOff(bytes))
        }
    }

    fn damaged(&self, what: &'static str) -> BackupError {
        BackupError::Damaged { at: self.taken, what }
    }

    /// Takes one part; false where more bytes are needed.
    fn step(&mut self, rows: &mut Vec<Row>) -> Result<bool, BackupError> {
        if self.ended {
            return if self.rest().is_empty() {
                Ok(false)
            } else {
                Err(self.damaged("there is more after its end"))
            };
        }
        if self.header.is_none() { self.step_header() } else { self.step_frame(rows) }
    }

    fn step_header(&mut self) -> Result<bool, BackupError> {
        let rest = self.rest();
        let begin = rest.len().min(MAGIC.len());
        if rest[..begin] != MAGIC[..begin] {
            return Err(BackupError::Foreign);
        }
        let Some(version) = number(rest, 8).map(u32::from_le_bytes) else {
            return Ok(false);
        };
        if version != VERSION {
            return Err(BackupError::Version(version));
        }
        let Some(size) = number_u32(rest, 12) else { return Ok(false) };
        if size > HEADER_MAX {
            return Err(self.damaged("the header's length is out of bounds"));
        }
        let Some(part) = self.checked(16 + size, "the header's checksum is wrong")? else {
            return Ok(false);
        };
        let header = part.get(16..16 + size).and_then(|json| serde_json::from_slice(json).ok());
        let header: Header = header.ok_or_else(|| self.damaged("the header cannot be read"))?;
        if !header.is_printable() {
            return Err(self.damaged("the header has control characters"));
        }
        self.header = Some(header);
        self.take(&part);
        Ok(true)
    }

    /// The first `size` bytes with their checksum, once they are there and good.
    fn checked(&self, size: usize, what: &'static str) -> Result<Option<Vec<u8>>, BackupError> {
        let rest = self.rest();
        let Some(crc) = number(rest, size).map(u32::from_le_bytes) else {
            return Ok(None);
        };
        if crc32fast::hash(&rest[..size]) != crc {
            return Err(self.damaged(what));
        }
        Ok(Some(rest[..size + CRC].to_vec()))
    }

    fn take(&mut self, part: &[u8]) {
        self.sum.update(part);
        self.pass(part.len());
    }

    fn pass(&mut self, bytes: usize) {
        self.taken += bytes as u64;
        self.used += bytes;
    }

    fn step_frame(&mut self, rows: &mut Vec<Row>) -> Result<bool, BackupError> {
        let rest = self.rest();
        let (Some([kind]), Some(size)) = (number(rest, 0), number_u32(rest, 1)) else {
            return Ok(false);
        };
        if size > FRAME_MAX {
            return Err(self.damaged("a length is out of bounds"));
        }
        let Some(part) = self.checked(FRAME_HEAD + size, "a checksum is wrong")? else {
            return Ok(false);
        };
        let payload = &part[FRAME_HEAD..FRAME_HEAD + size];
        match kind {
            ROWS => {
                self.rows_of(payload, rows)?;
                self.frames += 1;
                self.take(&part);
            }
            END => {
                self.check_end(payload)?;
                self.pass(part.len());
                self.ended = true;
            }
            _ => return Err(self.damaged("a part of an unknown kind")),
        }
        Ok(true)
    }

    fn rows_of(&mut self, mut payload: &[u8], rows: &mut Vec<Row>) -> Result<(), BackupError> {
        while !payload.is_empty() {
            let row = split_row(payload).ok_or_else(|| self.damaged("a row is not whole"))?;
            let (key, value, rest) = row;
            if self.rows > 0 && key <= self.last_key.as_str() {
                return Err(self.damaged("its keys are not in order"));
            }
            key.clone_into(&mut self.last_key);
            rows.push((key.to_owned(), value.to_vec()));
            self.rows += 1;
            payload = rest;
        }
        Ok(())
    }

    fn check_end(&self, payload: &[u8]) -> Result<(), BackupError> {
        let counted = [self.rows.to_le_bytes(), self.frames.to_le_bytes()].concat();
        if payload.get(..16) != Some(&counted) {
            return Err(self.damaged("rows are missing"));
        }
        let sum = self.sum.clone().finish();
        if payload.get(16..) != Some(sum.as_ref()) {
            return Err(self.damaged("the checksum of the whole is wrong"));
        }
        Ok(())
    }
}

fn split_row(payload: &[u8]) -> Option<(&str, &[u8], &[u8])> {
    let (key, value) = (number_u32(payload, 0)?, number_u32(payload, 4)?);
    let key_end = 8usize.checked_add(key)?;
    let value_end = key_end.checked_add(value)?;
    let text = std::str::from_utf8(payload.get(8..key_end)?).ok()?;
    Some((text, payload.get(key_end..value_end)?, payload.get(value_end..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            cluster_name: "prod".to_owned(),
            cluster_id: "c1".to_owned(),
            revision: 42,
            at_unix_ms: 1,
            node: "n1".to_owned(),
            agent_version: "0.1.0".to_owned(),
            about_bytes: 100,
        }
    }

    fn rows() -> Vec<Row> {
        let large = vec![7; 1 << 20];
        let mut rows: Vec<Row> = (0..2000u32)
            .map(|n| (format!("vms/{n:05}.toml"), vec![n.to_le_bytes()[0]; 300]))
            .collect();
        rows.push(("vms/large".to_owned(), large));
        rows.push(("vms/none".to_owned(), Vec::new()));
        rows
    }

    fn written(rows: &[Row]) -> Vec<u8> {
        let (mut writer, mut bytes) = Writer::begin(&header()).unwrap();
        for (key, value) in rows {
            bytes.extend(writer.row(key, value).unwrap().unwrap_or_default());
        }
        bytes.extend(writer.finish());
        bytes
    }

    fn read(bytes: &[u8], piece: usize) -> Result<(Header, Vec<Row>, Summary), BackupError> {
        let (mut reader, mut rows) = (Reader::default(), Vec::new());
        for piece in bytes.chunks(piece) {
            rows.extend(reader.push(piece)?);
        }
        let header = reader.header().cloned();
        let summary = reader.finish()?;
        Ok((header.unwrap(), rows, summary))
    }

    #[test]
    fn what_is_written_is_read_whatever_the_pieces() {
        let (rows, bytes) = (rows(), written(&rows()));
        for piece in [777, 1 << 16, bytes.len()] {
            let (found, read, summary) = read(&bytes, piece).unwrap();
            assert_eq!((found, &read), (header(), &rows));
            assert_eq!(summary, Summary { rows: 2002, bytes: bytes.len() as u64 });
        }
        let (_, none, summary) = read(&written(&[]), 1).unwrap();
        assert_eq!((none.len(), summary.rows), (0, 0));
    }

    #[test]
    fn a_file_that_ends_early_is_said_to_be_cut_off() {
        let bytes = written(&rows()[..1500]);
        let ends = (0..400).chain((400..bytes.len()).step_by(997)).chain([bytes.len() - 1]);
        for end in ends {
            let found = read(&bytes[..end], 4096);
            assert_eq!(found.unwrap_err(), BackupError::CutOff(end as u64), "at {end}");
        }
    }

    #[test]
    fn every_wrong_bit_is_noticed() {
        let bytes = written(&rows()[..20]);
        for at in 0..bytes.len() {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1 << (at % 8);
            let found = read(&wrong, wrong.len()).map(|(_, rows, _)| rows.len());
            assert!(found.is_err(), "byte {at}");
        }
    }

    #[test]
    fn foreign_files_and_versions_are_called_so() {
        assert_eq!(read(b"PK\x03\x04 zip", 4).unwrap_err(), BackupError::Foreign);
        assert_eq!(read(b"H", 1).unwrap_err(), BackupError::CutOff(1));
        let mut newer = written(&[]);
        newer[8] = 2;
        let found = read(&newer, 64).unwrap_err();
        assert_eq!(found, BackupError::Version(2));
        assert!(found.to_string().contains("format 2") && found.to_string().contains("format 1"));
        let mut longer = written(&rows()[..3]);
        longer.push(0);
        let found = read(&longer, longer.len()).unwrap_err().to_string();
        assert!(found.contains("more after its end"), "{found}");
    }

    /// Frames whose checksums are right and whose content is not.
    #[test]
    fn hostile_content_is_refused_before_memory_is_taken() {
        let (writer, begin) = Writer::begin(&header()).unwrap();
        drop(writer);
        let huge = [&begin, [ROWS].as_slice(), &u32::MAX.to_le_bytes()].concat();
        assert!(read(&huge, 64).unwrap_err().to_string().contains("out of bounds"));
        let row = |key: &[u8], value_length: u32| {
            [&length(key.len())[..], &value_length.to_le_bytes(), key].concat()
        };
        let cases = [
            (framed(ROWS, &row(b"a", 9)), "not whole"),
            (framed(ROWS, &row(b"\xff", 0)), "not whole"),
            (framed(ROWS, &u32::MAX.to_le_bytes()), "not whole"),
            (framed(ROWS, &[row(b"b", 0), row(b"a", 0)].concat()), "not in order"),
            (framed(ROWS, &[row(b"a", 0), row(b"a", 0)].concat()), "not in order"),
            (framed(7, b""), "unknown kind"),
            (framed(END, b""), "rows are missing"),
            (framed(END, &[0; 48]), "whole is wrong"),
        ];
        for (frame, expected) in cases {
            let found = read(&[begin.as_slice(), &frame].concat(), 64).unwrap_err().to_string();
            assert!(found.contains(expected), "{found}");
        }
        let escape = Header { cluster_name: "\u{1b}[2Jprod".to_owned(), ..header() };
        let (_, escape) = Writer::begin(&escape).unwrap();
        assert!(read(&escape, 64).unwrap_err().to_string().contains("control characters"));
        let size = FRAME_MAX;
        let (mut writer, _) = Writer::begin(&header()).unwrap();
        assert!(matches!(writer.row("a", &vec![0; size]), Err(BackupError::TooLarge(_))));
    }

    /// Each frame of a piece was once moved to the piece's begin: minutes for some megabytes.
    #[test]
    fn many_tiny_frames_cost_no_more_than_their_bytes() {
        let (_, begin) = Writer::begin(&header()).unwrap();
        let none = framed(ROWS, b"");
        let bytes = [begin, none.repeat(400_000)].concat();
        let found = read(&bytes, bytes.len()).unwrap_err();
        assert_eq!(found, BackupError::CutOff(bytes.len() as u64));
    }

    #[test]
    fn only_what_a_new_cluster_needs_is_kept() {
        let kept = [
            "vms/web.toml",
            "cluster.toml",
            "notes",
            "status/vms/web",
            "status/disks/a/b",
            "priv/fence",
            "priv/card",
        ];
        let dropped = [
            "priv/ca",
            "priv/tokens/x",
            "priv/names/n1",
            "priv/next-node-id",
            "status/nodes/1",
            "status/fenced/1",
            "status/removals/1",
            "status/ha/leader",
            "status/verification",
            "status/new",
        ];
        assert!(kept.iter().all(|key| is_kept(key)));
        for key in dropped {
            assert!(!is_kept(key), "{key}");
        }
    }
}
