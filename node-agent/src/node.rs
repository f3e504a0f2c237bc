//! A node that belongs to a cluster: everything its services and loops share.
//!
//! Owns nothing but the handles. Never: decides.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use cluster::Cluster;
use proto::record::NodeRecord;
use proto::v1::NodeReport;
use proto::{Name, NodeId};
use tokio::sync::{Notify, watch};

use crate::access::Access;
use crate::api::Named;
use crate::config::Config;
use crate::ha::Leader;
use crate::jobs::Jobs;
use crate::lease::Lease;
use crate::store::{Board, Store};
use crate::supervisor::Supervisor;
use crate::task::TaskStore;
use crate::vms::Shutdowns;

/// What the services and loops of a member share.
#[derive(Debug)]
pub struct Node {
    /// The agent's configuration.
    pub config: Arc<Config>,
    /// This node's id for life.
    pub id: NodeId,
    /// The name it came up with.
    pub first_name: Name,
    /// Typed access to the replicated configuration.
    pub store: Store,
    /// The placements as this node has applied them.
    pub board: Board,
    /// Who has which role, as this node has applied it.
    pub access: Access,
    /// Under which names clients repeat their transactions.
    pub named: std::sync::Mutex<Named>,
    /// The VM processes here.
    pub supervisor: Supervisor,
    /// The tasks here.
    pub tasks: TaskStore,
    /// The node lease.
    pub lease: Lease,
    /// What the leader knows, while this node leads.
    pub leader: Leader,
    /// Who works on which VM here.
    pub jobs: Jobs,
    /// The shutdowns under way here, for what overrules them.
    pub shutdowns: Shutdowns,
    /// Wakes the reconciler.
    pub kick: Notify,
    /// What this node says of itself.
    pub hardware: Hardware,
    /// Identity of the watchdog that guards it; empty: none, or none yet: the lease of an earlier
    /// agent may keep this one from starting it.
    pub watchdog: watch::Receiver<String>,
}

/// What was found at the start of the agent.
#[derive(Debug, Clone, Default)]
pub struct Hardware {
    /// Logical CPUs.
    pub cpus: u32,
    /// Memory for VMs, bytes.
    pub memory_bytes: u64,
    /// svm | vmx | pvm | none.
    pub kvm: String,
    /// What KVM can offer guests, for the cluster's baseline.
    pub cpuid: Vec<proto::record::CpuidRecord>,
}

/// Empty until the node belongs to a cluster. Clones share it.
pub type Slot = Arc<ArcSwapOption<Node>>;

impl Node {
    /// The member's handle.
    #[must_use]
    pub fn cluster(&self) -> &Cluster {
        self.store.cluster()
    }

    /// Whether something resets this machine if it hangs with an HA VM, or its configuration says
    /// that nothing need.
    #[must_use]
    pub fn may_run_ha(&self) -> bool {
        !self.watchdog.borrow().is_empty() || self.config.allow_ha_without_watchdog
    }

    /// The label people see; it can change.
    #[must_use]
    pub fn name(&self) -> Name {
        let label = self.cluster().node_name().borrow().parse();
        // The cluster takes names only that are names.
        label.unwrap_or_else(|_| self.first_name.clone())
    }

    /// What this node says of itself with each heartbeat.
    #[must_use]
    pub fn report(&self) -> NodeReport {
        let running = self.supervisor.running();
        NodeReport {
            cpus: self.hardware.cpus,
            memory_bytes: self.hardware.memory_bytes,
            memory_free_bytes: crate::hardware::memory_available_bytes(),
            watchdog: self.watchdog.borrow().clone(),
            kvm: self.hardware.kvm.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            running: running
                .into_iter()
                .map(|vm| proto::v1::RunningVm {
                    name: vm.name.to_string(),
                    generation: vm.generation.0,
                })
                .collect(),
            cpuid: Vec::new(),
        }
    }

    /// This node's record as it should be, keeping what others may have set.
    #[must_use]
    pub fn record(&self, present: Option<&NodeRecord>) -> NodeRecord {
        NodeRecord {
            node_id: self.id,
            name: self.name(),
            api_address: self.config.advertised_api(),
            cpus: self.hardware.cpus,
            memory_bytes: self.hardware.memory_bytes,
            maintenance: present.is_some_and(|record| record.maintenance),
            cpuid: self.hardware.cpuid.clone(),
            watchdog: self.watchdog.borrow().clone(),
            kvm: self.hardware.kvm.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            zone: self.config.node.zone.clone(),
            witness: self.config.node.witness,
            // It is back.
            absence: None,
        }
    }

    /// The name of a member, or its id where it has none any more.
    #[must_use]
    pub fn name_of(&self, node: NodeId) -> String {
        let members = self.cluster().members();
        members
            .into_iter()
            .find(|member| member.node_id == node)
            .map_or_else(|| format!("node id {node}"), |member| member.name)
    }

    /// The id of a member by name or id.
    #[must_use]
    pub fn find(&self, text: &str) -> Option<NodeId> {
        let members = self.cluster().members();
        members
            .iter()
            .find(|member| member.name == text)
            .or_else(|| members.iter().find(|member| member.node_id.to_string() == text))
            .map(|member| member.node_id)
    }
}
