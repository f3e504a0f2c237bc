//! The documents as typed things. All of them were checked before they were committed.

use std::collections::BTreeMap;

use cluster::{Consistency, KeyValue};
use proto::document::{Document, parse};
use proto::documents::NodeDocument;
use proto::{Name, keys};

use super::{RecordError, Store};

fn parsed<T: Document>(kv: &KeyValue) -> Result<T, RecordError> {
    let malformed = |why: String| RecordError::Malformed { key: kv.key.clone(), why };
    let text = std::str::from_utf8(&kv.value).map_err(|error| malformed(error.to_string()))?;
    parse(text).map_err(|error| malformed(error.to_string()))
}

impl Store {
    /// All documents of a folder, by name.
    async fn folder<T: Document>(
        &self,
        folder: &str,
        consistency: Consistency,
    ) -> Result<BTreeMap<Name, T>, RecordError> {
        let range = self.cluster().range(folder, "", 0, consistency).await?;
        let mut documents = BTreeMap::new();
        for kv in &range.kvs {
            let stem = kv.key[folder.len()..].strip_suffix(".toml");
            if let Some(name) = stem.and_then(|stem| stem.parse().ok()) {
                documents.insert(name, parsed(kv)?);
            }
        }
        Ok(documents)
    }

    /// What people say of the nodes.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn node_documents(
        &self,
        consistency: Consistency,
    ) -> Result<BTreeMap<Name, NodeDocument>, RecordError> {
        self.folder(keys::NODE_DOCUMENTS, consistency).await
    }
}
