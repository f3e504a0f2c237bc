//! Raft's messages (openraft's types as postcard), as far as a stand-in must read and write them.

/// A place of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LogId {
    pub(crate) term: u64,
    pub(crate) index: u64,
}

/// Log entries, or none, from a leader.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Append {
    pub(crate) term: u64,
    pub(crate) leader: u64,
    pub(crate) prev: Option<LogId>,
    pub(crate) entries: u64,
    /// The first of them.
    pub(crate) first: Option<LogId>,
}

/// What a snapshot begins with.
#[derive(Debug)]
pub(crate) struct SnapshotHeader {
    /// The leader's vote, as it is to be answered.
    pub(crate) vote: Vec<u8>,
    pub(crate) last: Option<LogId>,
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn number(&mut self) -> Option<u64> {
        let (mut value, mut shift) = (0u64, 0);
        loop {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f).checked_shl(shift)?;
            if byte & 0x80 == 0 {
                return Some(value);
            }
            shift += 7;
        }
    }

    fn log_id(&mut self) -> Option<LogId> {
        Some(LogId { term: self.number()?, index: self.number()? })
    }

    fn maybe_log_id(&mut self) -> Option<Option<LogId>> {
        match self.byte()? {
            0 => Some(None),
            1 => self.log_id().map(Some),
            _ => None,
        }
    }

    /// Term and leader of a vote that a quorum gave.
    fn vote(&mut self) -> Option<(u64, u64)> {
        let term = self.number()?;
        let given = self.byte()?;
        let leader = self.number()?;
        let committed = self.byte()?;
        (given == 1 && committed == 1).then_some((term, leader))
    }
}

impl Append {
    /// `None`: not a message of this kind.
    pub(crate) fn read(payload: &[u8]) -> Option<Self> {
        let mut reader = Reader(payload);
        let (term, leader) = reader.vote()?;
        let (prev, entries) = (reader.maybe_log_id()?, reader.number()?);
        let first = if entries > 0 { Some(reader.log_id()?) } else { None };
        Some(Self { term, leader, prev, entries, first })
    }
}

impl SnapshotHeader {
    pub(crate) fn read(header: &[u8]) -> Option<Self> {
        let mut reader = Reader(header);
        reader.vote()?;
        let vote = header[..header.len() - reader.0.len()].to_vec();
        Some(Self { vote, last: reader.maybe_log_id()? })
    }
}

fn write(bytes: &mut Vec<u8>, mut value: u64) {
    loop {
        let low = u8::try_from(value & 0x7f).unwrap_or(0);
        value >>= 7;
        if value == 0 {
            return bytes.push(low);
        }
        bytes.push(low | 0x80);
    }
}

fn write_log_id(bytes: &mut Vec<u8>, log_id: LogId) {
    write(bytes, log_id.term);
    write(bytes, log_id.index);
}

/// What a learner makes of entries: the last one that it has of them, or the place where its log
/// differs.
pub(crate) type Appended = Result<Option<LogId>, LogId>;

/// The answer to one of a stream.
pub(crate) fn of_a_stream(appended: Appended) -> Vec<u8> {
    let mut bytes = Vec::new();
    match appended {
        Ok(None) => bytes.extend([0, 0]),
        Ok(Some(last)) => {
            bytes.extend([0, 1]);
            write_log_id(&mut bytes, last);
        }
        Err(differs) => {
            bytes.extend([1, 0]);
            write_log_id(&mut bytes, differs);
        }
    }
    bytes
}

/// The answer to one that came alone.
pub(crate) fn alone(append: &Append, appended: Appended) -> Vec<u8> {
    match appended {
        Ok(Some(last)) if append.entries > 1 && Some(last) == append.first => {
            let mut bytes = vec![1, 1];
            write_log_id(&mut bytes, last);
            bytes
        }
        Ok(_) => vec![0],
        Err(_) => vec![2],
    }
}

/// `Forward::Hello`.
pub(crate) fn hello() -> Vec<u8> {
    vec![0]
}

/// Id and secret of a join token.
pub(crate) fn token(text: &str) -> Option<(String, String)> {
    let bytes = base64url(text.strip_prefix("hf1-")?)?;
    let mut reader = Reader(&bytes);
    let mut word = || {
        let length = usize::try_from(reader.number()?).ok()?;
        let (word, rest) = reader.0.split_at_checked(length)?;
        reader.0 = rest;
        String::from_utf8(word.to_vec()).ok()
    };
    Some((word()?, word()?))
}

fn base64url(text: &str) -> Option<Vec<u8>> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let (mut bytes, mut held, mut bits) = (Vec::new(), 0u32, 0);
    for letter in text.bytes() {
        let digit = DIGITS.iter().position(|digit| *digit == letter)?;
        held = (held << 6 | u32::try_from(digit).ok()?) & 0xffff;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push(u8::try_from(held >> bits & 0xff).ok()?);
        }
    }
    Some(bytes)
}
