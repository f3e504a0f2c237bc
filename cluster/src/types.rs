//! What callers say to the store and hear from it.

use proto::{NodeId, Revision, v1};

/// One key's present state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// UTF-8 path.
    pub key: String,
    /// What was put.
    pub value: Vec<u8>,
    /// When the key came into being.
    pub create_revision: Revision,
    /// The last write.
    pub mod_revision: Revision,
}

/// How fresh an answer must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// Confirmed with a quorum: sees every write acknowledged before the call.
    Linearizable,
    /// What this node has applied; answers without quorum.
    Stale,
    /// Sees every write acknowledged before the call of [`crate::Cluster::confirm_leadership`] that
    /// this is the answer to; asks nobody again.
    Since(Confirmed),
}

/// A leadership that a quorum confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Confirmed {
    /// Its term.
    pub term: u64,
    /// The log index that holds all that was committed when the confirmation began.
    pub(crate) index: u64,
}

/// Keys of one range, all as of one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeResult {
    /// In key order.
    pub kvs: Vec<KeyValue>,
    /// The store's revision that the answer belongs to.
    pub revision: Revision,
    /// There are more beyond the limit: ask again after the last key.
    pub more: bool,
}

/// Compares, then writes, atomically. Built with the methods below.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn {
    pub(crate) compares: Vec<(String, Revision)>,
    pub(crate) writes: Vec<Write>,
    pub(crate) dedup: Option<(String, u64)>,
    pub(crate) author: String,
    pub(crate) rests_on: Vec<(String, Revision)>,
}

/// One write of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Set a key.
    Put {
        /// Which.
        key: String,
        /// To what.
        value: Vec<u8>,
    },
    /// Remove a key; nothing happens where it is absent.
    Delete {
        /// Which.
        key: String,
    },
}

impl Txn {
    /// A transaction that does nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
    /// Only if the key is absent.
    #[must_use]
    pub fn if_absent(self, key: impl Into<String>) -> Self {
        self.if_revision(key, Revision(0))
    }
    /// Only if the key's last write is this revision (0: absent).
    #[must_use]
    pub fn if_revision(mut self, key: impl Into<String>, mod_revision: Revision) -> Self {
        self.compares.push((key.into(), mod_revision));
        self
    }
    /// Says what whoever let it through went by: a key's last write (0: absent) as it was read, from
    /// a copy that may be old. Where the key has been written since, nothing is done
    /// ([`StoreError::Overtaken`](crate::StoreError::Overtaken)): judge again by what is there now.
    /// Other than a compare it is no answer that is remembered, and tells nobody what the key holds.
    #[must_use]
    pub fn resting_on(mut self, key: impl Into<String>, mod_revision: Revision) -> Self {
        self.rests_on.push((key.into(), mod_revision));
        self
    }
    /// Set a key.
    #[must_use]
    pub fn put(mut self, key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        self.writes.push(Write::Put { key: key.into(), value: value.into() });
        self
    }
    /// Remove a key.
    #[must_use]
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.writes.push(Write::Delete { key: key.into() });
        self
    }
    /// Names the transaction, so that a repetition after an unknown outcome is answered instead
    /// of applied twice. `sequence` rises with each of the client's transactions. Without this,
    /// [`Cluster::txn`](crate::Cluster::txn) names it itself, which covers its own retries.
    #[must_use]
    pub fn named(mut self, client: impl Into<String>, sequence: u64) -> Self {
        self.dedup = Some((client.into(), sequence));
        self
    }
    /// Says who asked for it, for the history: the name in a client's certificate, `node NAME`, or
    /// `system`. Without this it is `node NAME` of the node that proposes it.
    #[must_use]
    pub fn by(mut self, author: impl Into<String>) -> Self {
        self.author = author.into();
        self
    }
    /// Whether it compares or writes a key.
    #[must_use]
    pub fn names(&self, key: &str) -> bool {
        self.keys().any(|named| named == key)
    }
    /// Every key it names.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        let written = self.writes.iter().map(|write| match write {
            Write::Put { key, .. } | Write::Delete { key } => key.as_str(),
        });
        self.compares.iter().map(|(key, _)| key.as_str()).chain(written)
    }
    /// Whether it has neither compares nor writes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.compares.is_empty() && self.writes.is_empty()
    }
}

/// What became of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TxnOutcome {
    /// All compares held, all writes are committed.
    Committed {
        /// The transaction's revision, or the store's where it changed nothing.
        revision: Revision,
    },
    /// A compare did not hold; nothing was written.
    Conflict {
        /// The store's revision.
        revision: Revision,
        /// Present state of the keys whose compare failed; absent ones are left out.
        conflicts: Vec<KeyValue>,
    },
}

impl TxnOutcome {
    /// Whether it was committed.
    #[must_use]
    pub fn committed(&self) -> bool {
        matches!(self, Self::Committed { .. })
    }
    /// The transaction's revision, or the store's.
    #[must_use]
    pub fn revision(&self) -> Revision {
        match self {
            Self::Committed { revision } | Self::Conflict { revision, .. } => *revision,
        }
    }
}

/// All changes of one revision that a watch asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchBatch {
    /// The transaction's revision.
    pub revision: Revision,
    /// In the order of the transaction.
    pub events: Vec<WatchEvent>,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchEvent {
    /// A key was set.
    Put(KeyValue),
    /// A key was removed.
    Deleted {
        /// Which.
        key: String,
    },
}

/// One change in the history of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The transaction's revision.
    pub revision: Revision,
    /// When, by the wall clock of the node that proposed it, milliseconds since 1970. For people.
    pub at_ms: u64,
    /// Who, see [`Txn::by`].
    pub author: String,
    /// Which key.
    pub path: String,
    /// What it was set to; None: it was deleted.
    pub content: Option<Vec<u8>>,
    /// The key's change before this one; 0: there was none, or it was forgotten before this one.
    /// What it was then is [`Cluster::get_at`](crate::Cluster::get_at) this revision.
    pub previous_revision: Revision,
}

/// Changes, the newest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    /// All changes of a revision that were asked for are here, or none.
    pub changes: Vec<Change>,
    /// Where to go on for older ones; None: these are all that are kept.
    pub next_before: Option<Revision>,
    /// Older changes than this may be missing: the history before is compacted.
    pub compacted: Revision,
}

/// A member as the Raft configuration knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Raft id, never reused.
    pub node_id: NodeId,
    /// The label people see.
    pub name: String,
    /// `host:port` of its gRPC listener.
    pub api_address: String,
    /// `host:port` of its enrolment listener.
    pub enrol_address: String,
    /// Counts for quorum.
    pub voter: bool,
    /// What fails together with it; empty: nothing else.
    pub zone: String,
    /// Here to vote, runs no VMs.
    pub witness: bool,
}

/// Whether this node leads, and since when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leadership {
    /// Raft says this node is the leader (not confirmed: see `confirm_leadership`).
    pub is_leader: bool,
    /// The term this was seen in.
    pub term: u64,
    /// When it became so, by this machine's monotonic clock.
    pub since: std::time::Instant,
}

impl From<KeyValue> for v1::KeyValue {
    fn from(kv: KeyValue) -> Self {
        Self {
            key: kv.key,
            value: kv.value,
            create_revision: kv.create_revision.0,
            mod_revision: kv.mod_revision.0,
        }
    }
}

impl From<Change> for v1::Change {
    fn from(change: Change) -> Self {
        Self {
            revision: change.revision.0,
            at_ms: change.at_ms,
            author: change.author,
            path: change.path,
            content: change.content,
            previous_revision: change.previous_revision.0,
        }
    }
}

impl From<Member> for v1::Member {
    fn from(member: Member) -> Self {
        Self {
            node_id: member.node_id.0,
            name: member.name,
            api_address: member.api_address,
            enrol_address: member.enrol_address,
            voter: member.voter,
            zone: member.zone,
            witness: member.witness,
        }
    }
}
