//! Transactions.

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use proto::Revision;

use super::Node;
use crate::consensus::{Forward, Forwarded};
use crate::machine::{Reply, TxnCommand, validate};
use crate::{KeyValue, StoreError, Txn, TxnOutcome};

impl Node {
    /// Commits a transaction, on any key.
    pub(crate) async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        let mut command = TxnCommand::from(txn);
        validate(&command).map_err(StoreError::Invalid)?;
        if command.client.is_empty() {
            command.client.clone_from(&self.client);
            command.sequence = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        }
        let (client, sequence) = (command.client.clone(), command.sequence);
        match self.ask_leader(Forward::Txn(command), self.deadline()).await? {
            Forwarded::Reply(Reply::Committed { revision }) => {
                Ok(TxnOutcome::Committed { revision: Revision(revision) })
            }
            Forwarded::Reply(Reply::Conflict { revision, conflicts }) => Ok(TxnOutcome::Conflict {
                revision: Revision(revision),
                conflicts: conflicts
                    .into_iter()
                    .map(|kv| KeyValue {
                        key: kv.key,
                        value: kv.value,
                        create_revision: Revision(kv.create_revision),
                        mod_revision: Revision(kv.mod_revision),
                    })
                    .collect(),
            }),
            Forwarded::Reply(Reply::Forgotten) => Err(StoreError::Forgotten { client, sequence }),
            Forwarded::DiskFull { folder, free_bytes } => {
                Err(StoreError::DiskFull { path: PathBuf::from(folder), free_bytes })
            }
            other => Err(StoreError::UnknownOutcome {
                why: format!("the leader gave an answer that does not fit ({other:?})"),
            }),
        }
    }
}
