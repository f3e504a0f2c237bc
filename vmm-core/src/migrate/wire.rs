//! The frames of the migration protocol, and the messages of the control connection.
//!
//! ```text
//! frame   kind u8 | 0 u8 | 0 u16 | length u32 | crc32 u32 | payload
//! ```
//!
//! Integers are little-endian. The CRC-32 covers kind, length and payload; the network is covered
//! by TLS, this finds damage before and after it. Payloads of `Hello` and `Accept` may grow at their end:
//! what a reader does not know there, it ignores. Kinds 32 to 63 are left for throttling and local disks.

use super::stream::{Patience, Stream, flush, read_exact, write_all};
use super::{StreamError, Subject};
use crate::state::STATE_BYTES_MAX;

/// Oldest protocol version that this build speaks.
pub(crate) const PROTOCOL_MIN: u16 = 1;
/// Newest protocol version that this build speaks.
pub(crate) const PROTOCOL_MAX: u16 = 1;
/// Most data connections of one migration.
pub(crate) const DATA_CONNECTIONS_MAX: u16 = 16;
/// Bytes before a frame's payload.
pub(crate) const HEADER_BYTES: usize = 12;
/// Most bytes of a batch of pages.
pub(crate) const PAGES_BYTES_MAX: usize = 2 << 20;

const CONTROL_BYTES_MAX: usize = 64 << 10;
const REGIONS_MAX: usize = 64;
const TEXT_BYTES_MAX: usize = 4096;
const MAGIC: u32 = u32::from_le_bytes(*b"HFMG");
/// A payload is allocated in steps, as it arrives: a length alone costs a hostile peer nothing.
const READ_STEP: usize = 1 << 20;

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Hello = 1,
    Accept = 2,
    Attach = 3,
    Pages = 4,
    RoundEnd = 5,
    RoundAck = 6,
    State = 7,
    Ready = 8,
    Committed = 9,
    Abandoned = 10,
    Running = 11,
    Failed = 12,
}

impl Kind {
    fn parse(code: u8) -> Option<Self> {
        use Kind::*;
        let all = [
            Hello, Accept, Attach, Pages, RoundEnd, RoundAck, State, Ready, Committed, Abandoned,
            Running, Failed,
        ];
        all.into_iter().find(|kind| *kind as u8 == code)
    }

    fn payload_max(self) -> usize {
        match self {
            Self::Pages => PAGES_BYTES_MAX,
            Self::State => STATE_BYTES_MAX,
            _ => CONTROL_BYTES_MAX,
        }
    }
}

/// Fills in the header of a frame whose payload stands behind `HEADER_BYTES` in `frame`.
pub(crate) fn seal(kind: Kind, frame: &mut [u8]) -> Result<(), StreamError> {
    let length =
        frame.len().checked_sub(HEADER_BYTES).filter(|length| *length <= kind.payload_max());
    let length = length.and_then(|length| u32::try_from(length).ok());
    let length = length.ok_or_else(|| {
        StreamError::protocol(format!("a {kind:?} frame of {} bytes", frame.len()))
    })?;
    let crc = checksum(kind, length, &frame[HEADER_BYTES..]);
    frame[..4].copy_from_slice(&[kind as u8, 0, 0, 0]);
    frame[4..8].copy_from_slice(&length.to_le_bytes());
    frame[8..12].copy_from_slice(&crc.to_le_bytes());
    Ok(())
}

fn checksum(kind: Kind, length: u32, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&[kind as u8]);
    hasher.update(&length.to_le_bytes());
    hasher.update(payload);
    hasher.finalize()
}

/// Sends one frame at once.
pub(crate) fn send(
    stream: &mut dyn Stream,
    kind: Kind,
    payload: &[u8],
    patience: Patience<'_>,
) -> Result<(), StreamError> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend_from_slice(payload);
    seal(kind, &mut frame)?;
    let doing = "sending to the other side";
    write_all(stream, &frame, patience, doing)?;
    flush(stream, patience, doing)
}

/// Receives one frame into `payload`, of one of the kinds `expected`. The wait for its first byte and the
/// frame itself each have the patience's limit. A `Failed` frame is an error with the peer's words.
pub(crate) fn receive(
    stream: &mut dyn Stream,
    payload: &mut Vec<u8>,
    expected: &[Kind],
    patience: Patience<'_>,
    doing: &'static str,
) -> Result<Kind, StreamError> {
    let mut header = [0; HEADER_BYTES];
    read_exact(stream, &mut header[..1], patience, doing)?;
    read_exact(stream, &mut header[1..], patience, doing)?;
    let [code, zero, zeros @ ..] = header;
    let kind = Kind::parse(code).filter(|_| zero == 0 && zeros[..2] == [0, 0]);
    let kind =
        kind.ok_or_else(|| StreamError::protocol(format!("unknown frame {code} while {doing}")))?;
    if kind != Kind::Failed && !expected.contains(&kind) {
        return Err(StreamError::protocol(format!("a {kind:?} frame while {doing}")));
    }
    let mut fields = Fields(&header[4..]);
    let (length, crc) = (fields.u32()?, fields.u32()?);
    let size = usize::try_from(length).unwrap_or(usize::MAX);
    if size > kind.payload_max() {
        return Err(StreamError::protocol(format!("a {kind:?} frame of {length} bytes")));
    }
    payload.clear();
    while payload.len() < size {
        let from = payload.len();
        payload.resize(size.min(from + READ_STEP), 0);
        read_exact(stream, &mut payload[from..], patience, doing)?;
    }
    if checksum(kind, length, payload) != crc {
        return Err(StreamError::protocol(format!("a damaged {kind:?} frame while {doing}")));
    }
    if kind == Kind::Failed {
        let reason = String::from_utf8_lossy(&payload[..payload.len().min(TEXT_BYTES_MAX)]);
        return Err(StreamError::Refused { reason: reason.escape_debug().to_string() });
    }
    Ok(kind)
}

/// Bytes of a message that are still to be read.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], StreamError> {
        let (bytes, rest) = self
            .0
            .split_at_checked(count)
            .ok_or_else(|| StreamError::protocol("a message that ends too early"))?;
        self.0 = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StreamError> {
        let bytes = self.bytes(N)?;
        <[u8; N]>::try_from(bytes)
            .map_err(|_| StreamError::protocol("a message that ends too early"))
    }

    pub(crate) fn u16(&mut self) -> Result<u16, StreamError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, StreamError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, StreamError> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<String, StreamError> {
        let length = usize::from(self.u16()?);
        if length > TEXT_BYTES_MAX {
            return Err(StreamError::protocol(format!("a text of {length} bytes")));
        }
        let bytes = self.bytes(length)?.to_vec();
        String::from_utf8(bytes).map_err(|_| StreamError::protocol("a text that is not UTF-8"))
    }

    /// Nothing may be left.
    pub(crate) fn end(self) -> Result<(), StreamError> {
        match self.0.len() {
            0 => Ok(()),
            left => Err(StreamError::protocol(format!("{left} bytes too many in a message"))),
        }
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) -> Result<(), StreamError> {
    let length = u16::try_from(text.len()).ok().filter(|_| text.len() <= TEXT_BYTES_MAX);
    let length =
        length.ok_or_else(|| StreamError::protocol(format!("a text of {} bytes", text.len())))?;
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(text.as_bytes());
    Ok(())
}

/// One region of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RegionLayout {
    /// Guest-physical address of its first byte.
    pub(crate) start: u64,
    /// Its size.
    pub(crate) bytes: u64,
}

/// The source's first message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) protocol_min: u16,
    pub(crate) protocol_max: u16,
    pub(crate) data_connections: u16,
    pub(crate) page_bytes: u32,
    pub(crate) subject: Subject,
    pub(crate) layout: Vec<RegionLayout>,
}

impl Hello {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, StreamError> {
        let mut out = MAGIC.to_le_bytes().to_vec();
        for field in [self.protocol_min, self.protocol_max, self.data_connections] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(&self.page_bytes.to_le_bytes());
        out.extend_from_slice(self.subject.vm_id.0.as_bytes());
        out.extend_from_slice(&self.subject.generation.0.to_le_bytes());
        put_text(&mut out, &self.subject.migration_id)?;
        put_text(&mut out, &self.subject.vm_name)?;
        let regions =
            u16::try_from(self.layout.len()).ok().filter(|_| self.layout.len() <= REGIONS_MAX);
        let regions = regions.ok_or_else(|| {
            StreamError::protocol(format!("{} memory regions", self.layout.len()))
        })?;
        out.extend_from_slice(&regions.to_le_bytes());
        for region in &self.layout {
            out.extend_from_slice(&region.start.to_le_bytes());
            out.extend_from_slice(&region.bytes.to_le_bytes());
        }
        Ok(out)
    }

    pub(crate) fn decode(payload: &[u8]) -> Result<Self, StreamError> {
        let mut fields = Fields(payload);
        if fields.u32()? != MAGIC {
            return Err(StreamError::protocol("not a migration"));
        }
        let [protocol_min, protocol_max, data_connections] =
            [fields.u16()?, fields.u16()?, fields.u16()?];
        let page_bytes = fields.u32()?;
        let vm_id = proto::VmId(uuid::Uuid::from_bytes(fields.array()?));
        let generation = proto::Generation(fields.u64()?);
        let subject =
            Subject { migration_id: fields.text()?, vm_id, vm_name: fields.text()?, generation };
        let regions = usize::from(fields.u16()?);
        if regions > REGIONS_MAX {
            return Err(StreamError::protocol(format!("{regions} memory regions")));
        }
        let region = |_| Ok(RegionLayout { start: fields.u64()?, bytes: fields.u64()? });
        let layout = (0..regions).map(region).collect::<Result<_, StreamError>>()?;
        Ok(Self { protocol_min, protocol_max, data_connections, page_bytes, subject, layout })
    }
}

/// The target's answer to [`Hello`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Accept {
    pub(crate) protocol: u16,
    pub(crate) data_connections: u16,
}

impl Accept {
    pub(crate) fn encode(self) -> Vec<u8> {
        [self.protocol.to_le_bytes(), self.data_connections.to_le_bytes()].concat()
    }

    pub(crate) fn decode(payload: &[u8]) -> Result<Self, StreamError> {
        let mut fields = Fields(payload);
        Ok(Self { protocol: fields.u16()?, data_connections: fields.u16()? })
    }
}

/// First message of a data connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attach {
    pub(crate) index: u16,
    pub(crate) migration_id: String,
}

impl Attach {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, StreamError> {
        let mut out = self.index.to_le_bytes().to_vec();
        put_text(&mut out, &self.migration_id)?;
        Ok(out)
    }

    pub(crate) fn decode(payload: &[u8]) -> Result<Self, StreamError> {
        let mut fields = Fields(payload);
        let attach = Self { index: fields.u16()?, migration_id: fields.text()? };
        fields.end().map(|()| attach)
    }
}

/// The end of a round on one data connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RoundEnd {
    /// The first round is 1.
    pub(crate) round: u32,
    /// Whether the VM is paused and its state follows on the control connection.
    pub(crate) is_last: bool,
    /// Pages that this connection carried in the round, zero pages too.
    pub(crate) pages: u64,
}

impl RoundEnd {
    pub(crate) fn encode(self) -> Vec<u8> {
        let mut out = self.round.to_le_bytes().to_vec();
        out.extend_from_slice(&u32::from(self.is_last).to_le_bytes());
        out.extend_from_slice(&self.pages.to_le_bytes());
        out
    }

    pub(crate) fn decode(payload: &[u8]) -> Result<Self, StreamError> {
        let mut fields = Fields(payload);
        let (round, last, pages) = (fields.u32()?, fields.u32()?, fields.u64()?);
        fields.end()?;
        if last > 1 {
            return Err(StreamError::protocol("a round that is neither last nor not"));
        }
        Ok(Self { round, is_last: last == 1, pages })
    }
}

/// What a side has, counted and summed: all pages of a round, or of the whole migration with the state's checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tally {
    /// The round that is acknowledged.
    pub(crate) round: u32,
    /// CRC-32 of the state; 0 in a round's acknowledgement.
    pub(crate) state_crc: u32,
    /// Pages received so far, over all rounds.
    pub(crate) pages: u64,
}

impl Tally {
    pub(crate) fn encode(self) -> Vec<u8> {
        let mut out = self.round.to_le_bytes().to_vec();
        out.extend_from_slice(&self.state_crc.to_le_bytes());
        out.extend_from_slice(&self.pages.to_le_bytes());
        out
    }

    pub(crate) fn decode(payload: &[u8]) -> Result<Self, StreamError> {
        let mut fields = Fields(payload);
        let tally = Self { round: fields.u32()?, state_crc: fields.u32()?, pages: fields.u64()? };
        fields.end().map(|()| tally)
    }
}

/// A reason for the peer, cut to what a frame holds.
pub(crate) fn reason_bytes(reason: &str) -> &[u8] {
    &reason.as_bytes()[..reason.len().min(TEXT_BYTES_MAX)]
}
