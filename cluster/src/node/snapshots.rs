//! When a member writes a snapshot and cuts its log off. The state is in the database anyway; a
//! snapshot writes all of it out once more, so the log grows as large as that before.

use std::io;

use super::Node;
use crate::consensus::lead;
use crate::machine::used_bytes;

/// One turn, once a second.
pub(super) async fn keep(node: &Node) {
    if lead::look(&node.raft, lead::since_snapshot) < node.config.snapshot_every {
        return;
    }
    match is_due(node) {
        Ok(false) => {}
        Ok(true) => {
            if let Err(error) = node.raft.trigger().snapshot().await {
                tracing::debug!(%error, "Raft has ended, and makes no snapshot");
            }
        }
        Err(error) => tracing::error!(%error, "how large the state is cannot be read"),
    }
}

fn is_due(node: &Node) -> io::Result<bool> {
    let state = node.db.view(|view| used_bytes(view))?;
    Ok(node.db.logged_bytes() >= state.max(node.config.snapshot_bytes))
}
