//! Reads what the plan looks at: all of `status/` as of one revision, and which VMs can move.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cluster::{Confirmed, Consistency};
use ha_manager::{Balance, ClusterState, Mobility, NodeView, Policy, Timing, VmView, Wishes};
use proto::documents::{BalanceBy, HaSettings};
use proto::record::{NodeRecord, Placement, PoolKind, PoolRecord};
use proto::{CpuModel, HaSpec, Name, NodeId, Revision, VmSpec, keys, parse_image};

use crate::node::Node;
use crate::store::RecordError;

/// The configuration as the decisions see it.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// For `ha-manager`.
    pub state: ClusterState,
    /// The documents, by VM.
    pub documents: BTreeMap<Name, String>,
    /// Storage pools.
    pub pools: Vec<PoolRecord>,
    /// What the cluster's document says of HA.
    pub policy: Policy,
}

/// Whether everything a VM needs is in shared pools, so that it can run on any node.
#[must_use]
pub fn movable(spec: &VmSpec, pools: &[PoolRecord]) -> bool {
    let boot = [&spec.boot.kernel, &spec.boot.initrd, &spec.boot.firmware];
    let images = boot
        .into_iter()
        .flatten()
        .map(String::as_str)
        .chain(spec.disks.iter().map(|disk| disk.image.as_str()));
    images.into_iter().all(|image| {
        let Ok((pool, _)) = parse_image(image) else { return false };
        pools.iter().any(|record| record.name == pool && record.kind == PoolKind::SharedDir)
    })
}

/// How a VM can leave its node.
fn mobility(spec: &VmSpec, pools: &[PoolRecord]) -> Mobility {
    match (movable(spec, pools), spec.cpu) {
        (false, _) => Mobility::Bound,
        // Another processor may lack what the guest has found.
        (true, CpuModel::Host) => Mobility::Cold,
        (true, CpuModel::Baseline) => Mobility::Live,
    }
}

fn wishes(ha: &HaSpec) -> Wishes {
    Wishes {
        priority: ha.priority,
        max_restarts: ha.max_restarts,
        max_relocations: ha.max_relocations,
        ..Wishes::default()
    }
}

fn policy(settings: &HaSettings, timing: Timing) -> Policy {
    Policy {
        require_watchdog: settings.require_watchdog,
        balance: match settings.balance {
            BalanceBy::Count => Balance::Count,
            BalanceBy::Static => Balance::Static,
        },
        auto_rebalance: settings.auto_rebalance,
        ..Policy::with_timing(timing)
    }
}

/// Reads it all, confirmed with a quorum.
///
/// # Errors
/// [`RecordError`].
pub async fn observe(node: &Node) -> Result<Snapshot, RecordError> {
    observe_at(node, Consistency::Linearizable).await
}

/// What was observed last, as long as it holds: in a quiet cluster it is the same each second.
#[derive(Debug, Default)]
pub(super) struct Seen(Option<(Revision, Vec<NodeId>, Arc<Snapshot>)>);

impl Seen {
    /// Reads it all on the node that confirmed its leadership, unless nothing has changed.
    pub(super) async fn observe(
        &mut self,
        node: &Node,
        confirmed: Confirmed,
    ) -> Result<Arc<Snapshot>, RecordError> {
        let at = Consistency::Since(confirmed);
        let (_, revision) = node.cluster().get(keys::HA_LEADER, at).await?;
        let members = members(node);
        if let Some((then, of, snapshot)) = &self.0
            && (*then, of) == (revision, &members)
        {
            return Ok(snapshot.clone());
        }
        // What is read may be later than the revision, and is read again then.
        let snapshot = Arc::new(observe_at(node, at).await?);
        self.0 = Some((revision, members, snapshot.clone()));
        Ok(snapshot)
    }
}

fn members(node: &Node) -> Vec<NodeId> {
    node.cluster().members().iter().map(|member| member.node_id).collect()
}

async fn observe_at(node: &Node, consistency: Consistency) -> Result<Snapshot, RecordError> {
    let documents = node.cluster().range(keys::VMS, "", 0, consistency).await?;
    let status = node.cluster().range("status/", "", 0, consistency).await?;
    let mut fenced: BTreeMap<NodeId, Revision> = BTreeMap::new();
    let mut leaving: BTreeSet<NodeId> = BTreeSet::new();
    let mut records: Vec<NodeRecord> = Vec::new();
    let mut placements: Vec<(Name, Placement, Revision)> = Vec::new();
    let pools = node.store.pools(consistency).await?;
    for kv in &status.kvs {
        let malformed = |error: serde_json::Error| RecordError::Malformed {
            key: kv.key.clone(),
            why: error.to_string(),
        };
        if let Some(name) = kv.key.strip_prefix(keys::PLACEMENTS) {
            let Ok(name) = name.parse() else { continue };
            let placement = serde_json::from_slice(&kv.value).map_err(malformed)?;
            placements.push((name, placement, kv.mod_revision));
        } else if kv.key.starts_with(keys::NODES) {
            records.push(serde_json::from_slice(&kv.value).map_err(malformed)?);
        } else if let Some(id) = kv.key.strip_prefix(keys::FENCED) {
            let Ok(id) = id.parse() else { continue };
            fenced.insert(NodeId(id), kv.mod_revision);
        } else if let Some(id) = kv.key.strip_prefix(keys::REMOVALS) {
            let Ok(id) = id.parse() else { continue };
            leaving.insert(NodeId(id));
        }
    }
    let documents: BTreeMap<Name, String> = documents
        .kvs
        .iter()
        .filter_map(|kv| {
            let name = kv.key.strip_prefix(keys::VMS)?.strip_suffix(".toml")?.parse().ok()?;
            Some((name, String::from_utf8_lossy(&kv.value).into_owned()))
        })
        .collect();
    let documents_of_nodes = node.store.node_documents(consistency).await?;
    let members = members(node);
    let nodes = records
        .into_iter()
        .filter(|record| members.contains(&record.node_id))
        .map(|mut record| {
            let id = record.node_id;
            // A node that is being removed takes no VMs: no transaction would give it one.
            record.maintenance |= leaving.contains(&id);
            let said = documents_of_nodes.get(&record.name);
            let reserved = said.and_then(|said| said.reserved_memory).unwrap_or_default();
            record.memory_bytes = record.memory_bytes.saturating_sub(reserved.0);
            let fenced = fenced.get(&id).copied();
            (id, NodeView { record, fenced, power_fencing: false, unarmed: false })
        })
        .collect();
    let vms = placements
        .into_iter()
        .map(|(name, placement, mod_revision)| {
            let spec = documents.get(&name).and_then(|text| VmSpec::parse(text).ok());
            let mobility =
                spec.as_ref().map_or(Mobility::Bound, |spec| mobility(spec.get(), &pools));
            let wishes = spec.map(|spec| wishes(&spec.get().ha)).unwrap_or_default();
            let wishes = Arc::new(wishes);
            (name, VmView { placement, mod_revision, mobility, wishes })
        })
        .collect();
    let settings = node.store.settings(consistency).await?.ha;
    let policy = policy(&settings, node.lease.timing());
    let state = ClusterState { nodes, vms, ..ClusterState::default() };
    Ok(Snapshot { state, documents, pools, policy })
}
