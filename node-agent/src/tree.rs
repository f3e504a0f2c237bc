//! The mounted tree of this node: mounted as long as the agent is a member, tried again where it
//! cannot be. The agent works without it, and never looks into it: it would wait for itself.

use std::sync::Arc;
use std::time::Duration;

use cluster::tree::{Mount, MountError, TreeConfig};
use cluster::{Cluster, FileWriter};

use crate::config::Tree;

/// Before the next attempt.
const PAUSE: Duration = Duration::from_secs(30);

/// Keeps the tree mounted until it is dropped.
pub async fn run(config: Tree, cluster: Cluster, writer: Arc<dyn FileWriter>) {
    let Some(path) = config.path() else { return };
    let config = TreeConfig { mount: path.to_owned() };
    let mut said = String::new();
    loop {
        match Mount::start(cluster.clone(), writer.clone(), config.clone()).await {
            Ok(mount) => {
                said.clear();
                mount.ended().await;
                tracing::warn!(path = %path.display(), "somebody unmounted the tree");
            }
            Err(error @ MountError::NotRoot) => {
                tracing::warn!("the tree is not mounted: {error}");
                return;
            }
            Err(error) => {
                let text = error.to_string();
                if text != said {
                    tracing::warn!("the tree is not mounted: {text}; trying again now and then");
                    said = text;
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}
