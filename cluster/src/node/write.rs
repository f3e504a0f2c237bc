//! Transactions.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use proto::Revision;

use super::Node;
use crate::consensus::{Forward, Forwarded};
use crate::machine::{Full, Judged, Oversized, Reply, Share, Unfit, validate};
use crate::{KeyValue, StoreError, Txn, TxnOutcome};

/// Milliseconds since 1970 by this machine's clock.
pub(crate) fn unix_now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn no_space(full: Full) -> StoreError {
    StoreError::NoSpace {
        what: match full.share {
            Share::Files => "the files",
            Share::System => "the system's records",
        },
        used_bytes: full.used.bytes,
        used_keys: full.used.keys,
        limit_bytes: full.limit.bytes,
        limit_keys: full.limit.keys,
    }
}

fn too_large(found: Oversized) -> StoreError {
    let Oversized { key, bytes, limit } = found;
    StoreError::TooLarge(format!(
        "`{key}` has {bytes} bytes; at most {limit} are allowed here: see `clusterctl config \
         explain cluster.limits`"
    ))
}

impl Node {
    /// Commits a transaction, on any key.
    pub(crate) async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        let Judged { txn: mut command, rests_on } = Judged::from(txn);
        if command.author.is_empty() {
            command.author = format!("node {}", *self.label.borrow());
        }
        command.at_ms = unix_now_ms();
        validate(&command).map_err(|unfit| match unfit {
            Unfit::Invalid(why) => StoreError::Invalid(why),
            Unfit::TooLarge(why) => StoreError::TooLarge(why),
        })?;
        if command.client.is_empty() {
            command.client.clone_from(&self.client);
            command.sequence = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        }
        let (client, sequence) = (command.client.clone(), command.sequence);
        let asked = Forward::Txn(Judged { txn: command, rests_on });
        match self.ask_leader(asked, self.deadline()).await? {
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
            Forwarded::Reply(Reply::Full(full)) => Err(no_space(full)),
            Forwarded::Reply(Reply::Oversized(found)) => Err(too_large(found)),
            // Also where an earlier attempt may be in the log still: it rests on the same, which never
            // comes back.
            Forwarded::Reply(Reply::Overtaken) => Err(StoreError::Overtaken),
            Forwarded::DiskFull { folder, free_bytes } => {
                Err(StoreError::DiskFull { path: PathBuf::from(folder), free_bytes })
            }
            other => Err(StoreError::UnknownOutcome {
                why: format!("the leader gave an answer that does not fit ({other:?})"),
            }),
        }
    }
}
