//! Where things live in the replicated configuration.
//!
//! Documents (people write them, TOML) live under the path that the mounted tree will show;
//! records (the system writes them, JSON of [`crate::record`]) live under `status/`.

use crate::{Name, NodeId};

/// All VM documents.
pub const VMS: &str = "vms/";
/// All nodes' documents.
pub const NODE_DOCUMENTS: &str = "nodes/";
/// All documents of who may do what.
pub const ACCESS: &str = "access/";
/// The document of the storage pools.
pub const STORAGE_DOCUMENT: &str = "storage.toml";
/// The document of the networks.
pub const NETWORKS_DOCUMENT: &str = "networks.toml";
/// The document of the cluster's settings.
pub const CLUSTER_DOCUMENT: &str = "cluster.toml";
/// All records of the system.
pub const STATUS: &str = "status/";
/// All placement records.
pub const PLACEMENTS: &str = "status/vms/";
/// All node records.
pub const NODES: &str = "status/nodes/";
/// All fenced records.
pub const FENCED: &str = "status/fenced/";
/// All removal records.
pub const REMOVALS: &str = "status/removals/";
/// All records of certificates.
pub const CERTIFICATES: &str = "status/certificates/";
/// Which members trust the CA that is to sign next.
pub const CA_TRUST: &str = "status/ca/trust/";
/// Which leader may act for HA.
pub const HA_LEADER: &str = "status/ha/leader";
/// How the members' copies compared last.
pub const VERIFICATION: &str = "status/verification";
/// Who administered last; every transaction that changes who does compares and writes it.
pub const ADMINISTRATION: &str = "status/administration";
/// All disk claims.
pub const DISKS: &str = "status/disks/";
/// All that is for root alone: the CA's encrypted key, join tokens.
pub const PRIV: &str = "priv/";

/// What makes this cluster itself, or lets somebody in: its CA, join tokens, the names and ids of
/// its nodes.
pub const IDENTITY: [&str; 4] = ["priv/ca", "priv/tokens/", "priv/names/", "priv/next-node-id"];

/// A VM's document.
#[must_use]
pub fn vm_document(vm: &Name) -> String {
    format!("{VMS}{vm}.toml")
}
/// A VM's placement record: owner, generation, phase.
#[must_use]
pub fn placement(vm: &Name) -> String {
    format!("{PLACEMENTS}{vm}")
}
/// A node's record. By id: the name is a label that can change.
#[must_use]
pub fn node(node: NodeId) -> String {
    format!("{NODES}{:020}", node.0)
}
/// The record that a node was declared dead; removed by the node itself once it is clean again.
#[must_use]
pub fn fenced(node: NodeId) -> String {
    format!("{FENCED}{:020}", node.0)
}
/// The record that a node leaves the cluster, or has left it. Every transaction that gives a VM to a
/// node compares that it is absent.
#[must_use]
pub fn removal(node: NodeId) -> String {
    format!("{REMOVALS}{:020}", node.0)
}
/// The record of a certificate that the cluster's CA has issued, by its serial number (lower-case
/// hexadecimal).
#[must_use]
pub fn certificate(serial: &str) -> String {
    format!("{CERTIFICATES}{serial}")
}
/// A member's word that it trusts all CAs that a revision of the CA's record names.
#[must_use]
pub fn ca_trust(node: NodeId) -> String {
    format!("{CA_TRUST}{:020}", node.0)
}
/// The claim of one VM on a writable disk image, `pool/name`.
#[must_use]
pub fn disk_claim(image: &str) -> String {
    format!("{DISKS}{image}")
}
/// What people say about a node.
#[must_use]
pub fn node_document(node: &Name) -> String {
    format!("{NODE_DOCUMENTS}{node}.toml")
}
/// What the holder of a client certificate may do.
#[must_use]
pub fn access_document(client: &Name) -> String {
    format!("{ACCESS}{client}.toml")
}
