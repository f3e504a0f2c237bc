//! Putting Raft together.

use std::sync::Arc;

use super::{LogStore, Network, Raft, StateMachine};
use crate::storage::Db;
use crate::{ClusterConfig, OpenError};

/// Starts Raft on what the database holds.
pub(crate) async fn start(
    node_id: u64,
    config: &ClusterConfig,
    db: Arc<Db>,
    machine: StateMachine,
    network: Network,
) -> Result<Raft, OpenError> {
    let raft_config = openraft::Config {
        cluster_name: "holdfast".to_owned(),
        heartbeat_interval: config.timings.heartbeat_ms,
        election_timeout_min: config.timings.election_min_ms,
        election_timeout_max: config.timings.election_max_ms,
        enable_pre_vote: Some(true),
        // How far the log is committed is not synced. A leader that went on in its old term after a
        // power loss would confirm reads at an index below what it had acknowledged.
        enable_leader_restore: Some(false),
        // By `node::snapshots`, which knows how large the log and the state are.
        snapshot_policy: openraft::SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: config.snapshot_keep,
        replication_lag_threshold: config.snapshot_every.saturating_mul(2),
        install_snapshot_timeout: 60_000,
        max_payload_entries: 512,
        broadcast_submitted_on_append: Some(true),
        ..openraft::Config::default()
    };
    let raft_config = raft_config.validate().map_err(|error| OpenError::Raft(error.to_string()))?;
    let log = LogStore::new(db);
    Raft::new(node_id, Arc::new(raft_config), network, log, machine)
        .await
        .map_err(|error| OpenError::Raft(error.to_string()))
}
