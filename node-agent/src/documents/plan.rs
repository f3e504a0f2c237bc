//! What a change of documents comes to: pure, from what is there to one transaction or refusals.

use std::collections::{BTreeMap, BTreeSet};

use cluster::{FileChange, Txn};
use proto::document::parse;
use proto::documents::{
    AnyDocument, DocumentPath, NetworksDocument, PathKind, PathRefused, RolesByName,
    StorageDocument, classify, roles,
};
use proto::record::{DiskClaim, Placement, PoolRecord};
use proto::{Name, NodeId, Revision, ValidatedVmSpec, VmId, VmSpec, keys};
use tonic::Code;

use super::{Refusal, access, paths, shared, vm};
use crate::store::Versioned;

/// What is there, as far as the changes need it.
#[derive(Debug, Clone, Default)]
pub(super) struct Present {
    /// People's files: those that are changed or lie above them, and all documents if one is.
    pub(super) files: BTreeMap<String, Versioned<Vec<u8>>>,
    /// Folders among the changed paths that have something in them.
    pub(super) folders: BTreeSet<String>,
    pub(super) placements: BTreeMap<Name, Versioned<Placement>>,
    pub(super) claims: BTreeMap<String, Versioned<DiskClaim>>,
    /// The node with the most memory for VMs; `None` where that is not known.
    pub(super) largest: Option<Largest>,
    /// Of the record of who administers.
    pub(super) administration: Revision,
    /// Clients that a certificate lets in, where roles change.
    pub(super) certified: BTreeSet<String>,
}

/// A node, and what VMs may use of its memory.
#[derive(Debug, Clone)]
pub(super) struct Largest {
    pub(super) node: Name,
    pub(super) memory_bytes: u64,
}

/// Where a new VM goes, and what it is called inside.
#[derive(Debug, Clone)]
pub(super) struct NewVm {
    pub(super) id: VmId,
    pub(super) owner: NodeId,
    /// Its first event.
    pub(super) event: String,
}

/// Chooses for a new VM.
pub(super) type Choose<'a> = dyn FnMut(&ValidatedVmSpec) -> Result<NewVm, (Code, String)> + 'a;

/// What the changes come to.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// All compares and writes.
    pub(super) txn: Txn,
    /// VMs whose images have to be looked at before: the path, what it will be, its owner.
    pub(super) look_at: Vec<(String, ValidatedVmSpec, NodeId)>,
    /// Pools whose folders have to be made before.
    pub(super) new_pools: Vec<(String, PoolRecord)>,
    /// Nothing would be different afterwards.
    pub(super) unchanged: bool,
}

impl Present {
    pub(super) fn revision(&self, path: &str) -> Revision {
        self.files.get(path).map_or(Revision(0), |file| file.revision)
    }
    fn text(&self, path: &str) -> Option<&str> {
        std::str::from_utf8(&self.files.get(path)?.value).ok()
    }
    /// The files as they will be.
    fn after(&self, changes: &[FileChange]) -> Self {
        let mut after = self.clone();
        for change in changes {
            match &change.content {
                Some(content) => {
                    let file = Versioned { value: content.clone(), revision: Revision(0) };
                    after.files.insert(change.path.clone(), file);
                }
                None => drop(after.files.remove(&change.path)),
            }
        }
        after
    }
    /// All VM documents that hold.
    pub(super) fn specs(&self) -> BTreeMap<Name, ValidatedVmSpec> {
        let documents = self.files.keys().filter_map(|path| match DocumentPath::of(path) {
            Some(DocumentPath::Vm(name)) => Some((name, VmSpec::parse(self.text(path)?).ok()?)),
            _ => None,
        });
        documents.collect()
    }
    pub(super) fn storage(&self) -> StorageDocument {
        let text = self.text(keys::STORAGE_DOCUMENT).unwrap_or_default();
        parse::<StorageDocument>(text).unwrap_or_default()
    }
    /// Who has which role.
    pub(super) fn roles(&self) -> RolesByName {
        roles(self.files.iter().map(|(path, file)| (path.as_str(), file.value.as_slice())))
    }
    /// The pools as they will be.
    pub(super) fn after_pools(&self, changes: &[FileChange]) -> Vec<PoolRecord> {
        self.after(changes).storage().records()
    }
    pub(super) fn networks(&self) -> NetworksDocument {
        let text = self.text(keys::NETWORKS_DOCUMENT).unwrap_or_default();
        parse::<NetworksDocument>(text).unwrap_or_default()
    }
}

/// Judges the changes. `author` is who makes them.
///
/// # Errors
/// Each change that is refused.
pub(super) fn plan(
    present: &Present,
    changes: &[FileChange],
    choose: &mut Choose<'_>,
) -> Result<Plan, Vec<Refusal>> {
    if changes.len() > paths::CHANGES_MAX {
        let reason =
            format!("{} files in one commit; at most {}", changes.len(), paths::CHANGES_MAX);
        return Err(vec![Refusal::new("", Code::ResourceExhausted, reason)]);
    }
    let mut refusals = Vec::new();
    let mut seen = BTreeSet::new();
    for change in changes {
        if !seen.insert(&change.path) {
            refusals.push(Refusal::new(&change.path, Code::InvalidArgument, "it is listed twice"));
        } else if let Err(refusal) = form(present, change) {
            refusals.push(refusal);
        }
    }
    if !refusals.is_empty() {
        return Err(refusals);
    }
    let after = present.after(changes);
    let mut plan = Plan { unchanged: true, ..Plan::default() };
    for change in changes {
        let changed = match &change.content {
            Some(content) => {
                present.files.get(&change.path).map(|file| &file.value) != Some(content)
            }
            None => present.files.contains_key(&change.path),
        };
        plan.unchanged &= !changed;
        if !changed {
            continue;
        }
        write(&mut plan, present, change);
        if let Err(more) = follow(&mut plan, present, &after, change, choose) {
            refusals.extend(more);
        }
    }
    if refusals.is_empty() {
        match access::keep_one(&mut plan, present, &after) {
            Ok(()) => return Ok(plan),
            Err(refusal) => refusals.push(refusal),
        }
    }
    Err(refusals)
}

/// What can be said of a change by itself.
fn form(present: &Present, change: &FileChange) -> Result<(), Refusal> {
    let path = change.path.as_str();
    let kind = classify(path).map_err(|refused| {
        let shown: String = path.chars().take(200).flat_map(char::escape_debug).collect();
        let code = match refused {
            PathRefused::Invalid(_) => Code::InvalidArgument,
            PathRefused::Denied(_) => Code::PermissionDenied,
        };
        Refusal::new(&shown, code, refused.to_string())
    })?;
    let is = present.revision(path);
    if change.expected.is_some_and(|expected| expected != is) {
        return Err(Refusal::conflict(path, is));
    }
    let Some(content) = &change.content else { return Ok(()) };
    if content.len() > paths::FILE_MAX {
        let reason = format!("{} bytes; a file has at most {}", content.len(), paths::FILE_MAX);
        return Err(Refusal::new(path, Code::ResourceExhausted, reason));
    }
    if let Some(file) = paths::above(path).find(|above| present.files.contains_key(*above)) {
        return Err(wrong(path, &format!("`{file}` is a file, not a folder")));
    }
    match kind {
        PathKind::Folder if !content.is_empty() => Err(wrong(path, "a folder has no content")),
        PathKind::Folder if present.files.contains_key(path.trim_end_matches('/')) => {
            Err(wrong(path, "there is a file of this name"))
        }
        PathKind::Folder => Ok(()),
        PathKind::Plain | PathKind::Document(_) if present.folders.contains(path) => {
            Err(wrong(path, "there is a folder of this name"))
        }
        PathKind::Document(_) if std::str::from_utf8(content).is_err() => {
            Err(wrong(path, "a document is UTF-8 text"))
        }
        PathKind::Document(_) | PathKind::Plain => Ok(()),
    }
}

fn wrong(path: &str, reason: &str) -> Refusal {
    Refusal::new(path, Code::InvalidArgument, reason)
}

/// The file itself.
fn write(plan: &mut Plan, present: &Present, change: &FileChange) {
    let txn = std::mem::take(&mut plan.txn);
    let txn = txn.if_revision(change.path.clone(), present.revision(&change.path));
    plan.txn = match &change.content {
        Some(content) => txn.put(change.path.clone(), content.clone()),
        None => txn.delete(change.path.clone()),
    };
}

/// What follows from a document.
fn follow(
    plan: &mut Plan,
    present: &Present,
    after: &Present,
    change: &FileChange,
    choose: &mut Choose<'_>,
) -> Result<(), Vec<Refusal>> {
    let path = change.path.as_str();
    let Some(document) = DocumentPath::of(path) else { return Ok(()) };
    let parsed = match change.content.as_deref().map(String::from_utf8_lossy) {
        None => None,
        Some(text) => Some(
            AnyDocument::parse(document.kind(), &text)
                .map_err(|error| Refusal::document(path, &error))?,
        ),
    };
    let followed = match (document, parsed) {
        (DocumentPath::Vm(name), Some(AnyDocument::Vm(spec))) => {
            vm::write(plan, present, after, (path, &name), spec, choose)
        }
        (DocumentPath::Vm(name), _) => vm::remove(plan, present, path, &name),
        (DocumentPath::Storage, _) => shared::storage(plan, present, after),
        (DocumentPath::Networks, _) => shared::networks(present, after),
        // They are judged together, once all are known: `access`.
        (DocumentPath::Access(_) | DocumentPath::Node(_) | DocumentPath::Cluster, _) => Ok(()),
    };
    followed.map_err(|refusal| vec![refusal])
}

/// Adds compares and writes to a plan's transaction.
pub(super) fn extend(plan: &mut Plan, change: impl FnOnce(Txn) -> Txn) {
    plan.txn = change(std::mem::take(&mut plan.txn));
}
