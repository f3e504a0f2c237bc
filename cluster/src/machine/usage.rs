//! How much the data takes, and how much it may take. Counted with each write; the limits are part
//! of the state, so that every node refuses the same transaction.
//!
//! People's files and the system's records have limits of their own, and the second holds only for
//! what people make more of: transactions that write files too (a new VM has records), and join
//! tokens. Leases, fencing, placements, a node's own records are never refused for want of space:
//! nobody else than the system writes them, and their number follows from the files'. Rows of the Machine table: `used files`,
//! `used system`, `kept files` (versions), `limits`.

use std::io;

use serde::{Deserialize, Serialize};

use super::command::KeyWrite;
use super::{Lane, Overlay, Read, Replaced, Table, decode, encode};

/// Join tokens: people make them.
const TOKENS: &str = "priv/tokens/";

/// Whose part of the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Share {
    /// People's files.
    Files,
    /// `status/` and `priv/`.
    System,
}

impl Share {
    const ALL: [Self; 2] = [Self::Files, Self::System];

    fn of(key: &str) -> Self {
        match Lane::of(key) {
            Lane::Files => Self::Files,
            Lane::Status | Lane::Private => Self::System,
        }
    }

    fn row(self) -> &'static [u8] {
        match self {
            Self::Files => b"used files",
            Self::System => b"used system",
        }
    }
}

/// An amount of keys, and the bytes of them and their values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Usage {
    pub(crate) keys: u64,
    pub(crate) bytes: u64,
}

/// The most that may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DataLimits {
    pub(crate) files: Usage,
    pub(crate) system: Usage,
    /// Largest of people's files, bytes.
    pub(crate) largest_file: u64,
}

/// A transaction would take more than is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Full {
    pub(crate) share: Share,
    pub(crate) used: Usage,
    pub(crate) limit: Usage,
}

/// What a share uses now.
pub(crate) fn used(read: &impl Read, share: Share) -> io::Result<Usage> {
    row(read, share.row())
}

fn row(read: &impl Read, name: &[u8]) -> io::Result<Usage> {
    let row = read.get(Table::Machine, name)?;
    Ok(row.map(|bytes| decode(&bytes)).transpose()?.unwrap_or_default())
}

/// The limits, once a leader has set them.
pub(crate) fn limits(read: &impl Read) -> io::Result<Option<DataLimits>> {
    read.get(Table::Machine, b"limits")?.map(|bytes| decode(&bytes)).transpose()
}

pub(super) fn set_limits<R: Read>(
    state: &mut Overlay<'_, R>,
    limits: DataLimits,
) -> io::Result<()> {
    state.put(Table::Machine, b"limits", encode(&limits)?);
    Ok(())
}

/// A file is larger than one may be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Oversized {
    pub(crate) key: String,
    pub(crate) bytes: u64,
    pub(crate) limit: u64,
}

/// Looks for a file that is too large, `old` being what each write replaces. One that does
/// not become larger is allowed, also where the limit was lowered meanwhile.
pub(super) fn oversized(
    read: &impl Read,
    writes: &[KeyWrite],
    old: &[Option<Replaced>],
) -> io::Result<Option<Oversized>> {
    let Some(DataLimits { largest_file: limit, .. }) = limits(read)? else { return Ok(None) };
    let found = writes.iter().zip(old).find_map(|(KeyWrite { key, value }, old)| {
        let (new, old) = (value.as_ref()?.len(), old.as_ref().map_or(0, |old| old.value_bytes));
        let refused = Share::of(key) == Share::Files && new as u64 > limit && new > old;
        refused.then(|| Oversized { key: key.clone(), bytes: new as u64, limit })
    });
    Ok(found)
}

/// Whether a transaction is refused where it makes a share too large.
fn is_bounded(share: Share, writes: &[KeyWrite]) -> bool {
    let by_people = |key: &str| Share::of(key) == Share::Files || key.starts_with(TOKENS);
    match share {
        Share::Files => true,
        Share::System => writes.iter().any(|write| by_people(&write.key)),
    }
}

/// Counts writes, `old` being what each replaces; or says why they may not be done. What makes the
/// data smaller is always allowed.
pub(super) fn count<R: Read>(
    state: &mut Overlay<'_, R>,
    writes: &[KeyWrite],
    old: &[Option<Replaced>],
) -> io::Result<Option<Full>> {
    let limits = limits(state)?;
    let mut changed = Vec::new();
    for share in Share::ALL {
        let (mut less, mut more) = (Usage::default(), Usage::default());
        for (write, old) in
            writes.iter().zip(old).filter(|(write, _)| Share::of(&write.key) == share)
        {
            if let Some(old) = old {
                less.add(size(&write.key, old.value_bytes));
            }
            if let Some(value) = &write.value {
                more.add(size(&write.key, value.len()));
            }
        }
        if less == more {
            continue;
        }
        let used = used(state, share)?;
        let then = Usage {
            keys: (used.keys + more.keys).saturating_sub(less.keys),
            bytes: (used.bytes + more.bytes).saturating_sub(less.bytes),
        };
        let limit =
            limits.as_ref().filter(|_| is_bounded(share, writes)).map(|limits| match share {
                Share::Files => limits.files,
                Share::System => limits.system,
            });
        if let Some(limit) = limit {
            let too_many = more.keys > less.keys && then.keys > limit.keys;
            let too_much = more.bytes > less.bytes && then.bytes > limit.bytes;
            if too_many || too_much {
                return Ok(Some(Full { share, used, limit }));
            }
        }
        changed.push((share, then));
    }
    for (share, then) in changed {
        state.put(Table::Machine, share.row(), encode(&then)?);
    }
    Ok(None)
}

fn size(key: &str, value_bytes: usize) -> Usage {
    Usage { keys: 1, bytes: (key.len() + value_bytes) as u64 }
}

impl Usage {
    fn add(&mut self, other: Self) {
        self.keys += other.keys;
        self.bytes += other.bytes;
    }
}

/// Bytes of all keys and their latest values.
pub(crate) fn used_bytes(read: &impl Read) -> io::Result<u64> {
    Ok(used(read, Share::Files)?.bytes + used(read, Share::System)?.bytes)
}

/// Versions of people's files that are kept.
pub(crate) fn kept(read: &impl Read) -> io::Result<Usage> {
    row(read, b"kept files")
}

/// Counts a version's row that came (or went).
pub(super) fn count_version<R: Read>(
    state: &mut Overlay<'_, R>,
    key: &str,
    row: &[u8],
    came: bool,
) -> io::Result<()> {
    if Share::of(key) != Share::Files {
        return Ok(());
    }
    let (mut kept, one) = (kept(state)?, size(key, row.len()));
    if came {
        kept.add(one);
    } else {
        kept.keys = kept.keys.saturating_sub(one.keys);
        kept.bytes = kept.bytes.saturating_sub(one.bytes);
    }
    state.put(Table::Machine, b"kept files", encode(&kept)?);
    Ok(())
}
