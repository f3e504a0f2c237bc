//! When a member writes its state out and cuts its log off. Nothing is written twice for it: the
//! state's database is the snapshot.

use super::Node;
use crate::consensus::lead;

/// One turn, once a second.
pub(super) async fn keep(node: &Node) {
    if lead::look(&node.raft, lead::since_snapshot) < node.config.snapshot_every || !is_due(node) {
        return;
    }
    if let Err(error) = node.raft.trigger().snapshot().await {
        tracing::debug!(%error, "Raft has ended, and makes no snapshot");
    }
}

/// Where the disk is full the log cannot grow any more, and is cut off all the same; but not where
/// what is only in memory of the state would fill the rest.
fn is_due(node: &Node) -> bool {
    let logged = node.db.logged_bytes();
    let is_long = logged >= node.config.snapshot_bytes;
    let has_room = node.db.free_bytes().is_none_or(|free| free > logged.saturating_mul(4));
    has_room && (is_long || node.db.disk_low())
}
