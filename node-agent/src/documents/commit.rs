//! Reads what is there, has the changes judged, and commits what they come to; again, if others
//! were faster.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cluster::{Consistency, FileChange, FileRefused, StoreError, TxnOutcome};
use ha_manager::ClusterState;
use proto::documents::{DocumentPath, classify};
use proto::record::DiskClaim;
use proto::v1::config_client::ConfigClient;
use proto::{NodeId, Revision, VmId, keys, v1};
use tonic::{Code, Response, Status};

use super::plan::{Largest, NewVm, Plan, Present, plan};
use super::refusal::{status_refused, store_refused};
use super::{Refusal, paths};
use crate::api::forward::Caller;
use crate::api::leader;
use crate::events::stamped;
use crate::ha::{Snapshot, observe};
use crate::node::Node;
use crate::storage::Pool;
use crate::store::{RecordError, Versioned, store_status};
use crate::vms::{check_images, choose};

/// How often changes are judged anew when others were faster.
const TRIES: usize = 8;

/// What the asker wants besides the changes.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// The node for a VM that is made; empty: the one that `ha-manager` picks.
    pub node: String,
    /// Only judge.
    pub dry_run: bool,
    /// Make the folder of a new pool where it is missing.
    pub make_folders: bool,
}

/// What became of changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// Of the commit, or with `dry_run` or where nothing was changed the store's.
    pub revision: Revision,
    /// Where the first VM that they make or change is, or would be.
    pub owner: Option<NodeId>,
}

/// Whether only the leader can judge them: it knows the nodes' load, which a new VM's place
/// depends on.
#[must_use]
pub fn need_leader(changes: &[FileChange]) -> bool {
    changes.iter().any(|change| {
        change.content.is_some()
            && matches!(DocumentPath::of(&change.path), Some(DocumentPath::Vm(_)))
    })
}

/// Judges and commits changes at this node: what became of them, or each change that is refused.
///
/// # Errors
/// The store's, as a status.
pub async fn commit(
    node: &Arc<Node>,
    caller: &Caller,
    changes: &[FileChange],
    wanted: &Wanted,
) -> Result<Result<Done, Vec<Refusal>>, Status> {
    match try_commit(node, caller, changes, wanted).await {
        Ok(done) => Ok(done),
        Err(Failed::Store(error)) => Err(store_status(&error)),
        Err(Failed::Other(status)) => Err(status),
    }
}

/// Why nothing was judged, or not committed.
enum Failed {
    Store(StoreError),
    Other(Status),
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<RecordError> for Failed {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::Store(error) => Self::Store(error),
            malformed @ RecordError::Malformed { .. } => Self::Other(malformed.into()),
        }
    }
}

async fn try_commit(
    node: &Arc<Node>,
    caller: &Caller,
    changes: &[FileChange],
    wanted: &Wanted,
) -> Result<Result<Done, Vec<Refusal>>, Failed> {
    if changes.len() > paths::CHANGES_MAX {
        // Before each of them is read.
        return Ok(plan(&Present::default(), changes, &mut |_| unreachable_choice())
            .map(|_| Done { revision: Revision(0), owner: None }));
    }
    for _ in 0..TRIES {
        let documents = changes.iter().any(|change| DocumentPath::of(&change.path).is_some());
        let snapshot = if documents { Some(observe(node).await?) } else { None };
        let (present, revision) = read(node, changes, snapshot.as_ref()).await?;
        let planned = plan(&present, changes, &mut |spec| {
            let Some(snapshot) = &snapshot else { return unreachable_choice() };
            let observations = node.leader.observations(snapshot.state.nodes.keys().copied());
            let owner = choose(node, snapshot, &observations, spec, &wanted.node)
                .map_err(|status| (status.code(), status.message().to_owned()))?;
            let event = format!("created by {} on {}", caller.user, node.name_of(owner));
            Ok(NewVm { id: VmId(uuid::Uuid::new_v4()), owner, event: stamped(&event) })
        });
        let plan = match planned {
            Ok(plan) => plan,
            Err(refusals) => return Ok(Err(refusals)),
        };
        let refusals =
            look(node, caller, snapshot.as_ref(), &present, changes, &plan, wanted).await;
        if !refusals.is_empty() {
            return Ok(Err(refusals));
        }
        let owner = plan.look_at.first().map(|(_, _, owner)| *owner);
        if wanted.dry_run || plan.unchanged {
            return Ok(Ok(Done { revision, owner }));
        }
        match node.cluster().txn(plan.txn.by(&caller.user)).await? {
            TxnOutcome::Committed { revision } => {
                tracing::info!(files = changes.len(), %revision, author = %caller.user, "files changed");
                return Ok(Ok(Done { revision, owner }));
            }
            TxnOutcome::Conflict { .. } => {}
        }
    }
    let busy = "others keep changing the same documents; try again";
    Err(Failed::Other(Status::aborted(busy)))
}

fn unreachable_choice() -> Result<NewVm, (Code, String)> {
    Err((Code::Internal, "a VM was to be placed without looking at the nodes".to_owned()))
}

/// What the changes need to know, and the store's revision.
async fn read(
    node: &Node,
    changes: &[FileChange],
    snapshot: Option<&Snapshot>,
) -> Result<(Present, Revision), Failed> {
    let cluster = node.cluster();
    // The one read that asks the quorum; those after it see at least as much.
    let (_, revision) = cluster.get(keys::STORAGE_DOCUMENT, Consistency::Linearizable).await?;
    let mut present = Present::default();
    let mut wanted: BTreeSet<String> = BTreeSet::new();
    for change in changes.iter().filter(|change| classify(&change.path).is_ok()) {
        wanted.extend(paths::above(&change.path).map(str::to_owned));
        wanted.insert(change.path.clone());
        let within = format!("{}/", change.path.trim_end_matches('/'));
        let found = cluster.range(&within, "", 2, Consistency::Stale).await?;
        if found.kvs.iter().any(|kv| kv.key != change.path) {
            present.folders.insert(change.path.clone());
        }
    }
    let file =
        |kv: cluster::KeyValue| (kv.key, Versioned { value: kv.value, revision: kv.mod_revision });
    if let Some(snapshot) = snapshot {
        wanted.extend([keys::STORAGE_DOCUMENT.to_owned(), keys::NETWORKS_DOCUMENT.to_owned()]);
        for prefix in [keys::VMS, keys::ACCESS] {
            let range = cluster.range(prefix, "", 0, Consistency::Stale).await?;
            present.files.extend(range.kvs.into_iter().map(file));
        }
        present.placements = snapshot
            .state
            .vms
            .iter()
            .map(|(name, view)| {
                let placement = view.placement.clone();
                (name.clone(), Versioned { value: placement, revision: view.mod_revision })
            })
            .collect();
        present.largest = largest(&snapshot.state);
        present.claims = claims(node).await?;
        let (record, _) = cluster.get(keys::ADMINISTRATION, Consistency::Stale).await?;
        present.administration = record.map(|kv| kv.mod_revision).unwrap_or_default();
        if changes.iter().any(|change| change.path.starts_with(keys::ACCESS)) {
            present.certified = cluster.certified_clients().await?;
        }
    }
    for path in wanted {
        if let (Some(kv), _) = cluster.get(&path, Consistency::Stale).await? {
            present.files.extend([file(kv)]);
        }
    }
    Ok((present, revision))
}

/// Of the nodes that run VMs.
fn largest(state: &ClusterState) -> Option<Largest> {
    let records = state.nodes.values().map(|view| &view.record).filter(|record| !record.witness);
    let largest = records.max_by_key(|record| record.memory_bytes)?;
    Some(Largest { node: largest.name.clone(), memory_bytes: largest.memory_bytes })
}

async fn claims(node: &Node) -> Result<BTreeMap<String, Versioned<DiskClaim>>, Failed> {
    let all = node.store.claims(Consistency::Stale).await?;
    Ok(all)
}

/// Looks at what is outside the configuration: images, and folders of new pools.
async fn look(
    node: &Arc<Node>,
    caller: &Caller,
    snapshot: Option<&Snapshot>,
    present: &Present,
    changes: &[FileChange],
    plan: &Plan,
    wanted: &Wanted,
) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let mut refused = |path: &str, status: &Status| {
        refusals.push(Refusal::new(path, status.code(), status.message()));
    };
    let pools = present.after_pools(changes);
    for (path, spec, owner) in &plan.look_at {
        if snapshot.is_some()
            && let Err(status) = check_images(node, caller, &pools, spec, *owner).await
        {
            refused(path, &status);
        }
    }
    let (make, dry_run) = (wanted.make_folders, wanted.dry_run);
    for (path, record) in plan.new_pools.clone() {
        if node.config.tree.holds(record.path.as_ref()) {
            let reason = format!(
                "pool `{}`: {} is in the mounted tree of the configuration itself; choose a folder \
                 of a disk",
                record.name, record.path
            );
            refused(&path, &Status::invalid_argument(reason));
            continue;
        }
        let made = tokio::task::spawn_blocking(move || {
            if !make {
                Pool::check_folder(&record)?;
            }
            if dry_run { Ok(()) } else { Pool::initialise(&record).map(drop) }
        });
        match made.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => refused(&path, &error.into()),
            Err(error) => refused(&path, &Status::internal(format!("internal error: {error}"))),
        }
    }
    refusals
}

/// For the mounted tree: here, or at the leader where only it can judge.
pub(super) async fn route(
    node: &Arc<Node>,
    changes: Vec<FileChange>,
    author: &str,
) -> Result<Revision, FileRefused> {
    let caller = Caller::local(author);
    let answer = match need_leader(&changes) {
        true => at_leader(node, &caller, &changes).await?,
        false => None,
    };
    let Some(answer) = answer else {
        return match try_commit(node, &caller, &changes, &Wanted::default()).await {
            Ok(Ok(done)) => Ok(done.revision),
            Ok(Err(refusals)) => Err(first(refusals.into_iter().map(Into::into))),
            Err(Failed::Store(error)) => Err(store_refused(&error)),
            Err(Failed::Other(status)) => Err(status_refused(&status)),
        };
    };
    match answer.refusals.is_empty() {
        true => Ok(Revision(answer.revision)),
        false => Err(first(answer.refusals.into_iter().map(of_message))),
    }
}

/// What the leader makes of changes; `None` if this node leads.
async fn at_leader(
    node: &Node,
    caller: &Caller,
    changes: &[FileChange],
) -> Result<Option<v1::CommitResponse>, FileRefused> {
    let there = |channel| {
        let changes = changes.iter().cloned().map(message).collect();
        let request = caller.request(v1::CommitRequest { changes, dry_run: false });
        async move { ConfigClient::new(channel).commit(request?).await }
    };
    let answer = leader::have_done(node, there).await;
    Ok(answer.map_err(|status| status_refused(&status))?.map(Response::into_inner))
}

fn first(mut refused: impl Iterator<Item = FileRefused>) -> FileRefused {
    refused.next().unwrap_or_else(|| FileRefused::Busy("refused without a reason".to_owned()))
}

fn message(change: FileChange) -> v1::FileChange {
    v1::FileChange {
        path: change.path,
        expected_revision: change.expected.map(|revision| revision.0),
        content: change.content,
    }
}

fn of_message(refusal: v1::Refusal) -> FileRefused {
    let number = |number: u32| (number > 0).then_some(number);
    match refusal.present_revision {
        Some(present) => FileRefused::Conflict { path: refusal.path, present: Revision(present) },
        None => FileRefused::Invalid {
            path: refusal.path,
            reason: refusal.reason,
            line: number(refusal.line),
            column: number(refusal.column),
        },
    }
}
