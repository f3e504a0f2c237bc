//! What a stopped member's database holds: how far it is, who the members are, and the state that
//! its whole log comes to. For [`crate::recover`]; nothing is written.

use std::collections::BTreeMap;
use std::io;

use openraft::EntryPayload;

use super::log_store::{committed, entry};
use super::state::{applied, membership};
use super::types::{MemberNode, Membership};
use crate::machine::{Overlay, apply, revision};
use crate::storage::{Cf, LogView, View};

/// How far a member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Held {
    /// The last one that this member knew to be committed.
    pub(crate) committed: u64,
    /// The last one that it has.
    pub(crate) last: u64,
    /// The store's revision with all of them.
    pub(crate) revision: u64,
    /// All members, and whether each votes: by the last membership that is known to be agreed to
    /// and by each that came after it. One that takes a node out may have come to nothing.
    pub(crate) members: Vec<(u64, MemberNode, bool)>,
}

/// Applies the whole log, in memory. Raft's own rule is to apply what is committed; here nobody is
/// left to commit the rest, and some of it may have been: a follower learns late.
pub(crate) fn held<'a, 'v>(
    log: &LogView<'_>,
    view: &'v View<'a>,
) -> io::Result<(Held, Overlay<'v, View<'a>>)> {
    apply_until(log, view, u64::MAX)
}

/// The state of which it is known here that a majority agreed to it.
pub(crate) fn settled<'a, 'v>(
    log: &LogView<'_>,
    view: &'v View<'a>,
) -> io::Result<Overlay<'v, View<'a>>> {
    Ok(apply_until(log, view, committed(log)?)?.1)
}

fn apply_until<'a, 'v>(
    log: &LogView<'_>,
    view: &'v View<'a>,
    until: u64,
) -> io::Result<(Held, Overlay<'v, View<'a>>)> {
    let applied_id = applied(view)?;
    let applied = applied_id.map(|id| id.index);
    let committed = committed(log)?.max(applied.unwrap_or(0));
    let mut members = BTreeMap::new();
    note(&mut members, membership(view)?.membership());
    let mut state = Overlay::new(view);
    if let Some(applied) = applied_id
        && let Some(row) = log.get(Cf::Log, &applied.index.to_be_bytes())?
        && entry(&applied.index.to_be_bytes(), &row)?.log_id != applied
    {
        let detail = "the log has another entry than the one that was applied";
        return Err(io::Error::new(io::ErrorKind::InvalidData, detail));
    }
    // Raft's first entry has index 0.
    let mut next = applied.map_or(0, |index| index.saturating_add(1));
    for row in log.rows_from(Cf::Log, &next.to_be_bytes())? {
        let (key, value) = row?;
        let entry = entry(&key, &value)?;
        let index = entry.log_id.index;
        if index != next {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the log has a gap"));
        }
        if index > until {
            break;
        }
        next = index.saturating_add(1);
        match entry.payload {
            EntryPayload::Blank => {}
            EntryPayload::Normal(command) => drop(apply(&mut state, index, &command)?),
            EntryPayload::Membership(membership) => {
                if index <= committed {
                    members.clear();
                }
                note(&mut members, &membership);
            }
        }
    }
    let members = members.into_iter().map(|(id, (node, votes))| (id, node, votes));
    let held = Held {
        committed,
        last: next.saturating_sub(1),
        revision: revision(&state)?,
        members: members.collect(),
    };
    Ok((held, state))
}

fn note(members: &mut BTreeMap<u64, (MemberNode, bool)>, of: &Membership) {
    let voters: Vec<u64> = of.voter_ids().collect();
    let nodes = of.nodes().map(|(id, node)| (*id, (node.clone(), voters.contains(id))));
    members.extend(nodes);
}
