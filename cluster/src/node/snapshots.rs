//! When a member writes a snapshot and cuts its log off. The state is in the database anyway; a
//! snapshot writes all of it out once more, so the log grows as large as that before.

use std::io;

use super::Node;
use crate::consensus::lead;
use crate::machine::{kept, used_bytes};

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

/// Where the disk is full the log cannot grow any more, and is cut off all the same; but not where a
/// snapshot would fill the rest.
fn is_due(node: &Node) -> io::Result<bool> {
    let (state, history) = node.db.view(|view| Ok((used_bytes(view)?, kept(view)?.bytes)))?;
    let has_room = node.db.free_bytes().is_none_or(|free| free > 2 * (state + history));
    let is_long = node.db.logged_bytes() >= state.max(node.config.snapshot_bytes);
    Ok(has_room && (is_long || node.db.disk_low()))
}
