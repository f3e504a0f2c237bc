//! What the clients saw: each operation with the moments of its call and its answer.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cluster::{KeyValue, WatchBatch, WatchEvent};
use serde::{Deserialize, Serialize};

/// Numbers all calls and answers of a simulation in the order in which they happened.
#[derive(Debug, Clone, Default)]
pub(crate) struct Order(Arc<AtomicU64>);

impl Order {
    pub(crate) fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst)
    }
}

/// What a client asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Call {
    Txn {
        compares: Vec<(String, u64)>,
        writes: Vec<(String, Option<Vec<u8>>)>,
    },
    Get {
        key: String,
    },
    Range {
        prefix: String,
    },
    /// A read that may be old, on one node.
    StaleGet {
        key: String,
        node: usize,
    },
}

/// A key's state as an answer tells it: value, created, modified.
pub(crate) type Seen = (Vec<u8>, u64, u64);
/// All keys by name.
pub(crate) type State = BTreeMap<String, Seen>;

/// What it heard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    Committed {
        revision: u64,
    },
    Conflict {
        revision: u64,
        conflicts: State,
    },
    Read {
        revision: u64,
        found: State,
    },
    /// Nothing was written, or read.
    Refused(String),
    /// May have been done or not.
    Unknown(String),
    /// Two answers that cannot both be true.
    Contradiction(String),
}

/// An operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Operation {
    pub(crate) client: usize,
    pub(crate) call: Call,
    pub(crate) called: u64,
    /// None: never answered.
    pub(crate) answered: Option<u64>,
    pub(crate) answer: Answer,
    /// How often it was sent, under one name.
    pub(crate) attempts: u32,
}

/// One revision of the store, as watches and the history tell it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub(crate) struct Change {
    pub(crate) puts: State,
    pub(crate) deletes: Vec<String>,
}

/// Everything that one simulation saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub(crate) struct Record {
    pub(crate) operations: Vec<Operation>,
    /// The store's changes by revision, read from one node at the end.
    pub(crate) log: BTreeMap<u64, Change>,
    /// The same as a watch on each node saw them, across its restarts.
    pub(crate) watched: Vec<Vec<(u64, Change)>>,
    /// What each node held at the end, and at which revision.
    pub(crate) last: Vec<(u64, State)>,
    /// What went wrong beside the answers.
    pub(crate) trouble: Vec<String>,
}

/// Whether a key's content is the same in each run of a seed. Serial numbers of certificates are
/// drawn at random.
fn is_seeded(key: &str) -> bool {
    !key.starts_with(proto::keys::CERTIFICATES)
}

pub(crate) fn state_of(kvs: impl IntoIterator<Item = KeyValue>) -> State {
    let kvs = kvs.into_iter().filter(|kv| is_seeded(&kv.key));
    let seen = |kv: KeyValue| (kv.key, (kv.value, kv.create_revision.0, kv.mod_revision.0));
    kvs.map(seen).collect()
}

pub(crate) fn change_of(batch: WatchBatch) -> (u64, Change) {
    let mut change = Change::default();
    for event in batch.events {
        match event {
            WatchEvent::Put(kv) => change.puts.extend(state_of([kv])),
            WatchEvent::Deleted { key } if is_seeded(&key) => change.deletes.push(key),
            WatchEvent::Deleted { .. } => {}
        }
    }
    (batch.revision.0, change)
}
