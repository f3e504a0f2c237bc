//! Typed reads, and the compare-and-put loop that every change of a placement goes through.

use std::collections::BTreeMap;

use cluster::{Cluster, Consistency, KeyValue, StoreError, Txn, TxnOutcome};
use proto::document::parse;
use proto::documents::{ClusterDocument, NetworksDocument, StorageDocument};
use proto::record::{DiskClaim, FencedRecord, NetworkRecord, NodeRecord, Placement, PoolRecord};
use proto::{DocumentError, Name, NodeId, Revision, keys};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{RecordError, UpdateError};

/// How often a change is tried again when others were faster.
const UPDATE_TRIES: usize = 8;

/// A record with the revision of its last write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versioned<T> {
    /// The record.
    pub value: T,
    /// Its `mod_revision`, for compares.
    pub revision: Revision,
}

/// Typed access to the replicated configuration.
#[derive(Debug, Clone)]
pub struct Store {
    cluster: Cluster,
}

/// A record as JSON bytes. Records are plain structs with text keys: they always serialize.
pub(crate) fn json<T: Serialize>(record: &T) -> Vec<u8> {
    serde_json::to_vec(record).unwrap_or_default()
}

/// Makes a transaction hold only while `node` may be given VMs: it is not fenced, and neither leaves
/// nor has left the cluster. Every transaction that gives a VM to a node goes through here.
#[must_use]
pub fn giving_to(txn: Txn, node: NodeId) -> Txn {
    txn.if_absent(keys::fenced(node)).if_absent(keys::removal(node))
}

pub(super) fn decode<T: DeserializeOwned>(kv: &KeyValue) -> Result<Versioned<T>, RecordError> {
    let value = serde_json::from_slice(&kv.value)
        .map_err(|error| RecordError::Malformed { key: kv.key.clone(), why: error.to_string() })?;
    Ok(Versioned { value, revision: kv.mod_revision })
}

fn malformed(path: &str, error: &DocumentError) -> RecordError {
    RecordError::Malformed { key: path.to_owned(), why: error.to_string() }
}

impl Store {
    /// Over a member's handle.
    #[must_use]
    pub fn new(cluster: Cluster) -> Self {
        Self { cluster }
    }

    /// The untyped store below.
    #[must_use]
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// One record.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn record<T: DeserializeOwned>(
        &self,
        key: &str,
        consistency: Consistency,
    ) -> Result<Option<Versioned<T>>, RecordError> {
        let (kv, _) = self.cluster.get(key, consistency).await?;
        kv.as_ref().map(decode).transpose()
    }

    async fn records<T: DeserializeOwned>(
        &self,
        prefix: &str,
        consistency: Consistency,
    ) -> Result<Vec<(String, Versioned<T>)>, RecordError> {
        let range = self.cluster.range(prefix, "", 0, consistency).await?;
        range.kvs.iter().map(|kv| Ok((kv.key[prefix.len()..].to_owned(), decode(kv)?))).collect()
    }

    /// A VM's placement, confirmed with a quorum.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn placement(&self, vm: &Name) -> Result<Option<Versioned<Placement>>, RecordError> {
        self.record(&keys::placement(vm), Consistency::Linearizable).await
    }

    /// All placements by name.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn placements(
        &self,
        consistency: Consistency,
    ) -> Result<BTreeMap<Name, Versioned<Placement>>, RecordError> {
        let all = self.records(keys::PLACEMENTS, consistency).await?;
        Ok(all.into_iter().filter_map(|(key, value)| Some((key.parse().ok()?, value))).collect())
    }

    /// A VM's document.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn document(
        &self,
        vm: &Name,
        consistency: Consistency,
    ) -> Result<Option<Versioned<String>>, RecordError> {
        self.text(&keys::vm_document(vm), consistency).await
    }

    /// A document's text.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn text(
        &self,
        path: &str,
        consistency: Consistency,
    ) -> Result<Option<Versioned<String>>, RecordError> {
        let (kv, _) = self.cluster.get(path, consistency).await?;
        Ok(kv.map(|kv| Versioned {
            value: String::from_utf8_lossy(&kv.value).into_owned(),
            revision: kv.mod_revision,
        }))
    }

    /// The cluster's settings; the defaults where there is no document.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn settings(&self, consistency: Consistency) -> Result<ClusterDocument, RecordError> {
        let document = self.text(keys::CLUSTER_DOCUMENT, consistency).await?;
        let parsed = parse::<ClusterDocument>(document.as_ref().map_or("", |text| &text.value));
        parsed.map_err(|error| malformed(keys::CLUSTER_DOCUMENT, &error))
    }

    /// Who may write which image, by `pool/name`.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn claims(
        &self,
        consistency: Consistency,
    ) -> Result<BTreeMap<String, Versioned<DiskClaim>>, RecordError> {
        Ok(self.records(keys::DISKS, consistency).await?.into_iter().collect())
    }

    /// All node records by id.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn nodes(
        &self,
        consistency: Consistency,
    ) -> Result<BTreeMap<NodeId, Versioned<NodeRecord>>, RecordError> {
        let all = self.records::<NodeRecord>(keys::NODES, consistency).await?;
        Ok(all.into_iter().map(|(_, record)| (record.value.node_id, record)).collect())
    }

    /// All fenced records by node id.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn fenced(
        &self,
        consistency: Consistency,
    ) -> Result<BTreeMap<NodeId, Versioned<FencedRecord>>, RecordError> {
        let all = self.records(keys::FENCED, consistency).await?;
        let with_id = |(key, record): (String, _)| Some((NodeId(key.parse().ok()?), record));
        Ok(all.into_iter().filter_map(with_id).collect())
    }

    /// All storage pools.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn pools(&self, consistency: Consistency) -> Result<Vec<PoolRecord>, RecordError> {
        let document = self.text(keys::STORAGE_DOCUMENT, consistency).await?;
        let parsed = parse::<StorageDocument>(document.as_ref().map_or("", |text| &text.value));
        parsed
            .map(|document| document.records())
            .map_err(|error| malformed(keys::STORAGE_DOCUMENT, &error))
    }

    /// All networks.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn networks(
        &self,
        consistency: Consistency,
    ) -> Result<Vec<NetworkRecord>, RecordError> {
        let document = self.text(keys::NETWORKS_DOCUMENT, consistency).await?;
        let parsed = parse::<NetworksDocument>(document.as_ref().map_or("", |text| &text.value));
        parsed
            .map(|document| document.records())
            .map_err(|error| malformed(keys::NETWORKS_DOCUMENT, &error))
    }

    /// Changes a placement: reads it, lets `change` make the new one or refuse, and puts it if
    /// nobody was faster; else begins again.
    ///
    /// # Errors
    /// [`UpdateError`]; [`UpdateError::Refused`] with `change`'s words.
    pub async fn update_placement(
        &self,
        vm: &Name,
        change: impl FnMut(&mut Placement) -> Result<(), String>,
    ) -> Result<Versioned<Placement>, UpdateError> {
        self.update_placement_if(vm, change, Txn::new).await
    }

    /// As [`Store::update_placement`], in one transaction with more compares and writes.
    ///
    /// # Errors
    /// [`UpdateError`]; [`UpdateError::Contended`] also if `base`'s own compares never hold.
    pub async fn update_placement_if(
        &self,
        vm: &Name,
        mut change: impl FnMut(&mut Placement) -> Result<(), String>,
        base: impl Fn() -> Txn,
    ) -> Result<Versioned<Placement>, UpdateError> {
        let key = keys::placement(vm);
        for _ in 0..UPDATE_TRIES {
            let Some(mut placement) = self.placement(vm).await? else {
                return Err(UpdateError::Unknown(vm.clone()));
            };
            change(&mut placement.value).map_err(UpdateError::Refused)?;
            let txn = base()
                .if_revision(key.clone(), placement.revision)
                .put(key.clone(), json(&placement.value));
            match self.cluster.txn(txn).await? {
                TxnOutcome::Committed { revision } => {
                    return Ok(Versioned { value: placement.value, revision });
                }
                TxnOutcome::Conflict { .. } => {}
            }
        }
        Err(UpdateError::Contended(vm.clone()))
    }

    /// Puts a changed placement if it is still at `revision`. `false`: it is not.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn put_placement_at(
        &self,
        vm: &Name,
        revision: Revision,
        placement: &Placement,
    ) -> Result<bool, StoreError> {
        let key = keys::placement(vm);
        let txn = Txn::new().if_revision(key.clone(), revision).put(key, json(placement));
        Ok(self.cluster.txn(txn).await?.committed())
    }

    /// Changes this or another node's record, making it where it is absent.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn update_node(
        &self,
        node: NodeId,
        change: impl Fn(Option<NodeRecord>) -> Option<NodeRecord>,
    ) -> Result<Option<NodeRecord>, RecordError> {
        let key = keys::node(node);
        loop {
            let present = self.record::<NodeRecord>(&key, Consistency::Linearizable).await?;
            let revision = present.as_ref().map_or(Revision(0), |record| record.revision);
            let old = present.map(|record| record.value);
            let Some(new) = change(old.clone()) else { return Ok(old) };
            if old.as_ref() == Some(&new) {
                return Ok(old);
            }
            let txn = Txn::new().if_revision(key.clone(), revision).put(key.clone(), json(&new));
            if self.cluster.txn(txn).await?.committed() {
                return Ok(Some(new));
            }
        }
    }
}
