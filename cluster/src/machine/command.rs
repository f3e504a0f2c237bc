//! What goes into the log, and what comes out of applying it. These types are on disk and on the
//! wire (postcard): variants and fields are only ever added at the end.

use proto::Revision;
use serde::{Deserialize, Serialize};

use super::{DataLimits, Full, Lane, Oversized};
use crate::{Txn, Write};

/// Longest key, bytes.
pub(crate) const KEY_MAX: usize = 1024;
/// Longest value, bytes.
pub(crate) const VALUE_MAX: usize = 1 << 20;
/// Most compares and writes together.
pub(crate) const OPS_MAX: usize = 8192;
/// All keys and values of a transaction together, bytes.
pub(crate) const TXN_MAX: usize = 3 << 20;
/// Longest client name, bytes.
const CLIENT_MAX: usize = 128;
/// Longest author, bytes.
const AUTHOR_MAX: usize = 128;

/// A log entry's payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Command {
    /// Compare, then write.
    Txn(TxnCommand),
    /// Forget history of one lane, at most some rows of it per command.
    Compact {
        /// Which keys' history.
        lane: Lane,
        /// First revision that stays whole: everything from it on can be read and watched.
        before: u64,
        /// Versions of each key that stay, however old they are.
        keep: u64,
    },
    /// How much the data may take from here on.
    Limit(DataLimits),
    /// Changes nothing: each member computes a checksum of its state as it is after this entry.
    Check,
    /// As `Txn`, where what its permission rests on is still as it was.
    Judged(Judged),
}

/// A transaction with what it was let through by. Whoever judged it may have known less than all:
/// here, in the log's own order, it shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Judged {
    pub(crate) txn: TxnCommand,
    /// Key and mod_revision (0: absent), as they were judged by; empty: nobody judged.
    pub(crate) rests_on: Vec<(String, u64)>,
}

impl Judged {
    /// As it is logged.
    pub(crate) fn command(self) -> Command {
        if self.rests_on.is_empty() { Command::Txn(self.txn) } else { Command::Judged(self) }
    }
}

impl Command {
    /// What it carries, bytes.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Txn(txn) | Self::Judged(Judged { txn, .. }) => txn.bytes(),
            Self::Compact { .. } | Self::Limit(_) | Self::Check => 0,
        }
    }
}

/// A transaction as it is logged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TxnCommand {
    /// Key and mod_revision (0: absent).
    pub(crate) compares: Vec<(String, u64)>,
    pub(crate) writes: Vec<KeyWrite>,
    /// Client and sequence; an empty client is not remembered.
    pub(crate) client: String,
    pub(crate) sequence: u64,
    /// Who asked for it; for people.
    pub(crate) author: String,
    /// The proposer's wall clock, milliseconds since 1970; for people. Nothing here decides by it.
    pub(crate) at_ms: u64,
}

impl TxnCommand {
    /// Its keys and values, bytes.
    pub(crate) fn bytes(&self) -> usize {
        let compared = self.compares.iter().map(|(key, _)| key.len());
        let written = self.writes.iter().map(KeyWrite::bytes);
        compared.chain(written).sum()
    }
}

impl KeyWrite {
    fn bytes(&self) -> usize {
        self.key.len() + self.value.as_ref().map_or(0, Vec::len)
    }
}

/// One key's write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeyWrite {
    pub(crate) key: String,
    /// None: delete.
    #[serde(with = "serde_bytes")]
    pub(crate) value: Option<Vec<u8>>,
}

/// What applying a command came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// Nothing to say (blank and membership entries, compaction).
    None,
    /// Committed at this revision.
    Committed { revision: u64 },
    /// A compare failed. The conflicting keys' present state.
    Conflict { revision: u64, conflicts: Vec<ConflictKv> },
    /// The answer of this (client, sequence) is no longer known.
    Forgotten,
    /// The data would be larger than it may be; nothing was written.
    Full(Full),
    /// Where in the log the checksums are computed, and the store's revision there.
    CheckAt { index: u64, revision: u64 },
    /// A file is larger than one may be; nothing was written.
    Oversized(Oversized),
    /// What its permission rests on has changed; nothing was written.
    Overtaken,
}

/// A key's state in a [`Reply`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConflictKv {
    pub(crate) key: String,
    #[serde(with = "serde_bytes")]
    pub(crate) value: Vec<u8>,
    pub(crate) create_revision: u64,
    pub(crate) mod_revision: u64,
}

impl std::fmt::Display for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Txn(txn) | Self::Judged(Judged { txn, .. }) => write!(
                f,
                "txn {}/{} ({} compares, {} writes)",
                txn.client,
                txn.sequence,
                txn.compares.len(),
                txn.writes.len()
            ),
            Self::Compact { lane, before, keep } => {
                write!(f, "compact {lane:?} before {before}, keep {keep}")
            }
            Self::Limit(limits) => write!(f, "limit {limits:?}"),
            Self::Check => f.write_str("check"),
        }
    }
}

impl std::fmt::Display for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("done"),
            Self::Committed { revision } => write!(f, "committed at {revision}"),
            Self::Conflict { conflicts, .. } => write!(f, "conflict on {} keys", conflicts.len()),
            Self::Forgotten => f.write_str("forgotten"),
            Self::Full(full) => write!(f, "full: {:?}", full.share),
            Self::Oversized(found) => write!(f, "oversized: {}", found.key),
            Self::Overtaken => f.write_str("overtaken"),
            Self::CheckAt { index, revision } => write!(f, "check at {index}, revision {revision}"),
        }
    }
}

fn numbers(revisions: Vec<(String, Revision)>) -> Vec<(String, u64)> {
    revisions.into_iter().map(|(key, revision)| (key, revision.0)).collect()
}

impl From<Txn> for Judged {
    fn from(mut txn: Txn) -> Self {
        let rests_on = numbers(std::mem::take(&mut txn.rests_on));
        Self { txn: txn.into(), rests_on }
    }
}

impl From<Txn> for TxnCommand {
    fn from(txn: Txn) -> Self {
        let (client, sequence) = txn.dedup.unwrap_or_default();
        Self {
            compares: numbers(txn.compares),
            writes: txn
                .writes
                .into_iter()
                .map(|write| match write {
                    Write::Put { key, value } => KeyWrite { key, value: Some(value) },
                    Write::Delete { key } => KeyWrite { key, value: None },
                })
                .collect(),
            client,
            sequence,
            author: txn.author,
            at_ms: 0,
        }
    }
}

/// Why a transaction is not proposed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Unfit {
    /// It breaks a rule.
    Invalid(String),
    /// A value, or all of it, is too large.
    TooLarge(String),
}

/// Checks a transaction before it is proposed: sizes, keys, no key written twice.
pub(crate) fn validate(txn: &TxnCommand) -> Result<(), Unfit> {
    if txn.client.len() > CLIENT_MAX {
        return Err(Unfit::Invalid(format!("a client's name has at most {CLIENT_MAX} bytes")));
    }
    if txn.author.len() > AUTHOR_MAX || txn.author.chars().any(char::is_control) {
        let rule = "bytes and no control characters";
        return Err(Unfit::Invalid(format!("an author's name has at most {AUTHOR_MAX} {rule}")));
    }
    let mut keys = txn.compares.iter().map(|(key, _)| key).chain(txn.writes.iter().map(|w| &w.key));
    keys.try_for_each(|key| valid_key(key)).map_err(Unfit::Invalid)?;
    let mut written = std::collections::BTreeSet::new();
    for write in &txn.writes {
        if !written.insert(&write.key) {
            let key = &write.key;
            return Err(Unfit::Invalid(format!("`{key}` is written twice in one transaction")));
        }
    }
    fits(txn).map_err(Unfit::TooLarge)
}

fn fits(txn: &TxnCommand) -> Result<(), String> {
    if txn.compares.len() + txn.writes.len() > OPS_MAX {
        return Err(format!("more than {OPS_MAX} compares and writes in one transaction"));
    }
    for KeyWrite { key, value } in &txn.writes {
        let size = value.as_ref().map_or(0, Vec::len);
        if size > VALUE_MAX {
            return Err(format!("`{key}` has {size} bytes; at most {VALUE_MAX} are allowed"));
        }
    }
    let total = txn.bytes();
    if total > TXN_MAX {
        return Err(format!(
            "the transaction has {total} bytes; at most {TXN_MAX} are allowed: do it in parts"
        ));
    }
    Ok(())
}

/// Checks one key.
pub(crate) fn valid_key(key: &str) -> Result<(), String> {
    if key.is_empty() || key.len() > KEY_MAX {
        return Err(format!("a key has 1 to {KEY_MAX} bytes, this one has {}", key.len()));
    }
    if key.chars().any(char::is_control) {
        return Err(format!("the key `{}` contains control characters", key.escape_debug()));
    }
    Ok(())
}
