//! The documents that people write: every way to write one (the API, `vm create`, the mounted
//! tree) ends here.
//!
//! ```text
//!   changes ─► paths ─► plan (pure: schemas, references, what follows) ─► one transaction
//! ```
//!
//! Owns: what a change of documents means for the records under `status/`. Never: writes a record
//! of a VM that runs, beyond what its document's comments are.
//!
//! Invariants: a document that is there keeps its schema; what was read to judge a change is
//! compared in the transaction that makes it.

mod access;
mod commit;
mod entry;
mod paths;
mod plan;
mod refusal;
mod shared;
#[cfg(test)]
mod tests;
mod vm;

use std::sync::Arc;

use async_trait::async_trait;
use cluster::{FileChange, FileRefused, FileWriter};
use proto::Revision;

pub use commit::{Done, Wanted, commit, need_leader};
pub use entry::Entry;
pub use refusal::Refusal;

use crate::node::Node;

/// Writes people's files for the mounted tree.
#[derive(Debug, Clone)]
pub struct Documents {
    node: Arc<Node>,
}

impl Documents {
    /// Over a member.
    #[must_use]
    pub fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

#[async_trait]
impl FileWriter for Documents {
    async fn commit(
        &self,
        changes: Vec<FileChange>,
        author: &str,
    ) -> Result<Revision, FileRefused> {
        commit::route(&self.node, changes, author).await
    }
}
