//! Which nodes were removed, or are being removed. Asked at each message of a member.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use proto::record::{RemovalRecord, RemovalState};
use proto::{NodeId, keys};

use super::Node;
use crate::machine::{Read, Record, Table, decode};

/// What was read last, which is good until the state moves on.
#[derive(Debug, Default)]
pub(super) struct Removals(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    /// Index of the log entry that the state had applied.
    at: u64,
    by_node: BTreeMap<NodeId, Option<Removal>>,
}

/// How far a node's removal has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Removal {
    /// It may still be withdrawn.
    Announced,
    Removed,
}

impl Node {
    fn removal(&self, id: NodeId) -> Option<Removal> {
        // Before the state is read: what is later than this is read again.
        let at = self.machine.applied().borrow().index;
        let mut seen = self.removals.0.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.at != at {
            *seen = Seen { at, by_node: BTreeMap::new() };
        }
        if let Some(removal) = seen.by_node.get(&id) {
            return *removal;
        }
        let key = keys::removal(id);
        let row = self.db.view(|view| view.get(Table::Data, key.as_bytes())).ok()?;
        let state = |row: &[u8]| if removed(row) { Removal::Removed } else { Removal::Announced };
        let removal = row.map(|row| state(&row));
        seen.by_node.insert(id, removal);
        removal
    }

    /// Whether a node is known to have been removed.
    pub(crate) fn was_removed(&self, id: NodeId) -> bool {
        self.removal(id) == Some(Removal::Removed)
    }

    /// Whether a node is known to have been removed, or its removal to have been announced.
    pub(super) fn is_leaving(&self, id: NodeId) -> bool {
        self.removal(id).is_some()
    }
}

/// A removal that is only announced does not shut the node out: it may still be withdrawn.
pub(super) fn removed(row: &[u8]) -> bool {
    let Ok(record) = decode::<Record>(row) else { return false };
    serde_json::from_slice::<RemovalRecord>(&record.value)
        .is_ok_and(|record| record.state == RemovalState::Removed)
}
