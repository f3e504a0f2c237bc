//! openraft's own storage suite on our storage.

use std::sync::Arc;

use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use tempfile::TempDir;

use super::types::TypeConfig;
use super::{LogStore, StateMachine};
use crate::storage::{Db, FolderLock};

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateMachine), StorageError<TypeConfig>> {
        let failed = |error: &dyn std::fmt::Display| {
            StorageError::read(openraft::impls::BoxedErrorSource::from_string(error))
        };
        use openraft::errors::ErrorSource;
        let folder = tempfile::tempdir().map_err(|error| failed(&error))?;
        let host = Arc::new(crate::host::ThisHost);
        let lock = FolderLock::take(folder.path()).map_err(|error| failed(&error))?;
        let db = Arc::new(Db::create(folder.path(), lock, host).map_err(|error| failed(&error))?);
        let machine = StateMachine::open(db.clone()).map_err(|error| failed(&error))?;
        Ok((folder, LogStore::new(db), machine))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_storage_passes_openrafts_suite() -> Result<(), StorageError<TypeConfig>> {
    Suite::test_all(Builder).await
}
