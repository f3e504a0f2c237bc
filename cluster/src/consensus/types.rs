//! The types that openraft is set up with.

use serde::{Deserialize, Serialize};

use super::state::StateMachine;
use crate::machine::{Command, Reply};

/// What Raft's membership holds of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MemberNode {
    /// The label people see.
    pub(crate) name: String,
    /// `host:port` of its gRPC listener.
    pub(crate) api_address: String,
    /// `host:port` of its enrolment listener.
    pub(crate) enrol_address: String,
    /// What fails together with it; empty: nothing else.
    pub(crate) zone: String,
    /// Here to vote, runs no VMs.
    pub(crate) witness: bool,
}

impl MemberNode {
    /// What a member says of itself.
    pub(crate) fn of(name: &str, config: &crate::ClusterConfig) -> Self {
        Self {
            name: name.to_owned(),
            api_address: config.api_address.clone(),
            enrol_address: config.enrol_address.clone(),
            zone: config.zone.clone(),
            witness: config.witness,
        }
    }
}

openraft::declare_raft_types!(
    /// One leader per term (standard Raft), so that a term names its leader.
    pub(crate) TypeConfig:
        D = Command,
        R = Reply,
        NodeId = u64,
        Node = MemberNode,
        LeaderId = openraft::impls::leader_id_std::LeaderId<Self::Term, Self::NodeId>,
);

pub(crate) type Raft = openraft::Raft<TypeConfig, StateMachine>;
pub(crate) type Metrics = openraft::RaftMetrics<TypeConfig>;
pub(crate) type LogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
pub(crate) type Vote = openraft::type_config::alias::VoteOf<TypeConfig>;
pub(crate) type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
pub(crate) type Membership = openraft::Membership<u64, MemberNode>;
pub(crate) type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;
pub(crate) type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<TypeConfig>;
pub(crate) type Snapshot =
    openraft::type_config::alias::SnapshotOf<TypeConfig, super::snapshot::SnapshotData>;
