//! When a member writes its state out and cuts its log off. Nothing is written twice for it: the
//! state's database is the snapshot.

use super::Node;
use crate::consensus::lead;

/// One turn, once a second.
pub(super) async fn keep(node: &Node) {
    let since = lead::look(&node.raft, |now| lead::since_cut(now, node.config.snapshot_keep));
    if since < node.config.snapshot_every || !is_due(node) {
        return;
    }
    if let Err(error) = node.raft.trigger().snapshot().await {
        tracing::debug!(%error, "Raft has ended, and makes no snapshot");
    }
}

/// Where the disk is full the log cannot grow any more, and is cut off all the same; but not where
/// what is only in memory of the state would fill the rest.
fn is_due(node: &Node) -> bool {
    let is_long = node.db.logged_bytes() >= node.config.snapshot_bytes;
    let in_memory = node.db.in_memory_bytes();
    let has_room = node.db.free_bytes().is_none_or(|free| free > in_memory.saturating_mul(2));
    has_room && (is_long || node.db.disk_low())
}
