//! `node drain`, after the node was marked: the leader's plan moves the VMs; this watches until none
//! is left, and says what stays, why, and what to do about it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ha_manager::Mobility;
use proto::record::Phase;
use proto::{Name, NodeId};
use tonic::Status;

use crate::api::forward::Caller;
use crate::api::{leader, status_of};
use crate::ha::observe;
use crate::node::Node;
use crate::store::BoardView;
use crate::task::{TaskContext, TaskFailure};

/// A drain that gets nowhere for so long is given up waiting for; the node stays drained.
const STUCK: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The VMs that are still the node's.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Here {
    /// Running, or about to.
    up: BTreeSet<Name>,
    /// Running nowhere.
    down: BTreeSet<Name>,
    migrating: bool,
}

impl Here {
    fn of(view: &BoardView, id: NodeId) -> Self {
        let mut here = Self::default();
        for (name, placement) in view.placements.iter().filter(|(_, p)| p.value.owner == id) {
            let set = match placement.value.phase {
                Phase::Stopped
                | Phase::Error
                | Phase::Recovering
                | Phase::Unplaceable
                | Phase::Frozen => &mut here.down,
                Phase::Starting
                | Phase::Started
                | Phase::Stopping
                | Phase::Migrating { .. }
                | Phase::Relocating { .. } => &mut here.up,
            };
            set.insert(name.clone());
            here.migrating |=
                matches!(placement.value.phase, Phase::Migrating { .. } | Phase::Relocating { .. });
        }
        here
    }

    fn names(&self) -> impl Iterator<Item = &Name> {
        self.up.iter().chain(&self.down)
    }

    fn len(&self) -> usize {
        self.up.len() + self.down.len()
    }
}

/// Watches a drain to its end. VMs that run nowhere and whose files are in a local pool stay with
/// the node; that is no failure.
///
/// # Errors
/// VMs that should leave and cannot: each with the plan's reason.
pub async fn run(
    node: &Arc<Node>,
    caller: &Caller,
    task: &TaskContext,
    id: NodeId,
) -> Result<Option<serde_json::Value>, TaskFailure> {
    let mut before = Here::default();
    let mut told: BTreeMap<Name, String> = BTreeMap::new();
    let mut stuck_since = None;
    let mut total = 0;
    loop {
        let view = node.board.view();
        let here = Here::of(&view, id);
        for name in before.names().filter(|name| !here.names().any(|left| left == *name)) {
            if let Some(placement) = view.placements.get(name) {
                task.log(format!("{name} is on {} now", node.name_of(placement.value.owner)));
            }
        }
        total = total.max(here.len());
        let all = u64::try_from(total).unwrap_or(u64::MAX);
        let away = all.saturating_sub(u64::try_from(here.len()).unwrap_or(u64::MAX));
        task.progress(drained(away, all), away, all);
        if here.up.is_empty()
            && let Some(stay) = only_bound(node, &here).await
        {
            return Ok(ended(task, &node.name_of(id), &stay, all));
        }
        if here != before || here.migrating {
            stuck_since = None;
        }
        for (name, reason) in reasons(node, caller).await.unwrap_or_default() {
            if here.names().any(|left| *left == name) && told.get(&name) != Some(&reason) {
                task.log(format!("{name}: {reason}"));
                told.insert(name, reason);
            }
        }
        // VMs that cannot leave now may later: the node stays drained, the task ends with why.
        if stuck_since.get_or_insert_with(Instant::now).elapsed() > STUCK {
            return Err(stuck(&here, &told));
        }
        before = here;
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = task.cancel().cancelled() => {
                task.log("no longer waiting; the node stays drained until `node resume`".to_owned());
                return Err(TaskFailure::Cancelled);
            }
        }
    }
}

/// How far a drain has come.
fn drained(away: u64, all: u64) -> String {
    match (away, all) {
        (_, 0) => "no VM belongs to the node: it is empty".to_owned(),
        (away, all) if away == all => format!("all {all} VMs moved away: the node is empty"),
        (away, all) => format!("{away} of {all} VMs moved away, {} to go", all - away),
    }
}

/// The VMs that are left, if all of them are bound to the node by files in a local pool.
async fn only_bound(node: &Node, here: &Here) -> Option<Vec<Name>> {
    let down: Vec<Name> = here.down.iter().cloned().collect();
    if down.is_empty() {
        return Some(down);
    }
    let snapshot = observe(node).await.ok()?;
    let bound =
        |name: &Name| snapshot.state.vms.get(name).is_some_and(|vm| vm.mobility == Mobility::Bound);
    down.iter().all(bound).then_some(down)
}

fn ended(task: &TaskContext, name: &str, stay: &[Name], all: u64) -> Option<serde_json::Value> {
    if stay.is_empty() {
        task.log(drained(all, all));
        return None;
    }
    let names: Vec<&str> = stay.iter().map(Name::as_str).collect();
    task.log(format!(
        "nothing runs on {name} any more. Stopped VMs with files in a pool of its own stay: {}. \
         Before `clusterctl cluster remove {name}`, export what is worth keeping (`clusterctl \
         image`) and delete them (`clusterctl vm delete`)",
        names.join(", ")
    ));
    Some(serde_json::json!({ "stay": names }))
}

fn stuck(here: &Here, told: &BTreeMap<Name, String>) -> TaskFailure {
    let why: Vec<String> = here
        .names()
        .map(|name| {
            format!("{name}: {}", told.get(name).map_or("no reason is known", String::as_str))
        })
        .collect();
    TaskFailure::Failed(format!(
        "{} VMs cannot leave: {}. The node stays drained and gives them away when that changes; \
         `clusterctl node resume` ends it",
        why.len(),
        why.join(" | ")
    ))
}

/// What the leader's last plan says about each VM.
async fn reasons(node: &Node, caller: &Caller) -> Result<BTreeMap<Name, String>, Status> {
    let report = match leader::ask(node, |channel| status_of(channel, caller)).await? {
        None => {
            let plan = node.leader.last_plan();
            plan.report.iter().map(|(name, report)| format!("{name}: {report}")).collect()
        }
        Some(answer) => answer.into_inner().report,
    };
    let split = |line: &String| {
        let (name, reason) = line.split_once(": ")?;
        Some((name.parse().ok()?, reason.to_owned()))
    };
    Ok(report.iter().filter_map(split).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_counts_what_has_moved() {
        assert_eq!(drained(1, 3), "1 of 3 VMs moved away, 2 to go");
        assert_eq!(drained(3, 3), "all 3 VMs moved away: the node is empty");
        assert_eq!(drained(0, 0), "no VM belongs to the node: it is empty");
    }
}
