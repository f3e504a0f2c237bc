//! `Config`: the key-value store itself, for people and tools. Records and documents that have a
//! service of their own are read here, and written there.

use std::sync::{Arc, PoisonError};

use cluster::{
    Consistency, FileChange, KeyValue, ReadAtError, StoreError, Txn, TxnOutcome, WatchError,
    WatchEvent,
};
use futures::StreamExt as _;
use proto::documents::{PathKind, PathRefused, classify};
use proto::v1::config_client::ConfigClient;
use proto::v1::config_server::Config;
use proto::v1::{self, watch_event, write_op};
use proto::{Revision, keys};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::forward::Caller;
use super::{Answers, Api, leader};
use crate::access::{again, may_write, resting};
use crate::documents::{self, Refusal, Wanted};
use crate::node::Node;
use crate::store::store_status;

/// How often a transaction is judged anew while roles change.
const JUDGED_MAX: usize = 4;

fn consistency(wanted: i32) -> Consistency {
    match v1::Consistency::try_from(wanted) {
        Ok(v1::Consistency::Stale) => Consistency::Stale,
        Ok(v1::Consistency::Linearizable) | Err(_) => Consistency::Linearizable,
    }
}

fn check_read(key: &str) -> Result<(), Status> {
    // A prefix that is shorter than `priv/` would cover it: the store leaves those keys out.
    if key.starts_with(keys::PRIV) {
        return Err(Status::permission_denied(format!("`{key}` is for the agents alone")));
    }
    Ok(())
}

/// Plain files alone are written here: a document is checked against its schema and the others.
fn check_write(key: &str) -> Result<(), Status> {
    match classify(key) {
        Ok(PathKind::Plain | PathKind::Folder) => Ok(()),
        Ok(PathKind::Document(document)) => Err(Status::permission_denied(format!(
            "`{document}` cannot be set here: it is a document, which is checked before it is \
             written; use `clusterctl config put` or `config edit`"
        ))),
        Err(refused @ PathRefused::Denied(_)) => {
            Err(Status::permission_denied(refused.to_string()))
        }
        Err(refused @ PathRefused::Invalid(_)) => {
            Err(Status::invalid_argument(refused.to_string()))
        }
    }
}

/// The key of a write.
fn written(write: &v1::WriteOp) -> Option<&str> {
    Some(match write.op.as_ref()? {
        write_op::Op::Put(put) => &put.key,
        write_op::Op::Delete(delete) => &delete.key,
    })
}

fn visible(kv: &KeyValue) -> bool {
    !kv.key.starts_with(keys::PRIV)
}

fn txn(request: v1::TxnRequest) -> Result<Txn, Status> {
    let mut txn = Txn::new();
    for compare in request.compares {
        check_read(&compare.key)?;
        txn = txn.if_revision(compare.key, Revision(compare.mod_revision));
    }
    for write in request.writes {
        txn = match write.op {
            Some(write_op::Op::Put(put)) => {
                check_write(&put.key)?;
                txn.put(put.key, put.value)
            }
            Some(write_op::Op::Delete(delete)) => {
                check_write(&delete.key)?;
                txn.delete(delete.key)
            }
            None => return Err(Status::invalid_argument("a write without an operation")),
        };
    }
    if !request.client.is_empty() {
        txn = txn.named(request.client, request.sequence);
    }
    Ok(txn)
}

/// Commits a transaction that its caller may make when it is committed: one who was let through by
/// roles that have changed since is judged again.
async fn commit_judged(
    node: &Node,
    mut caller: Caller,
    mut message: v1::TxnRequest,
) -> Result<TxnOutcome, Status> {
    if !message.client.is_empty() {
        let mut named = node.named.lock().unwrap_or_else(PoisonError::into_inner);
        message.client = named.bind(&caller.names, &message.client, Instant::now())?;
    }
    for _ in 0..JUDGED_MAX {
        may_write(&caller, message.writes.iter().filter_map(written))?;
        let txn = resting(txn(message.clone())?.by(&caller.user), &caller);
        match node.cluster().txn(txn).await {
            Err(StoreError::Overtaken) => {
                let caught_up = node.access.catch_up(&node.store).await;
                caught_up.map_err(|error| store_status(&error))?;
                caller = again(&caller, "Config.Txn", &node.access.known())?;
            }
            outcome => return outcome.map_err(|error| store_status(&error)),
        }
    }
    Err(store_status(&StoreError::Overtaken))
}

impl Api {
    /// The node and the caller, whose requests are counted. Those that come from other nodes were
    /// counted there.
    fn admitted<T>(&self, request: &Request<T>) -> Result<(Arc<Node>, Caller), Status> {
        let (caller, node) = (Caller::of(request)?, self.node()?);
        if !caller.is_forwarded() {
            node.cluster().take_turn(&caller.user).map_err(|error| store_status(&error))?;
        }
        Ok((node, caller))
    }
}

#[tonic::async_trait]
impl Config for Api {
    async fn get(
        &self,
        request: Request<v1::GetRequest>,
    ) -> Result<Response<v1::GetResponse>, Status> {
        let (node, _) = self.admitted(&request)?;
        let message = request.into_inner();
        check_read(&message.key)?;
        if message.at_revision != 0 {
            let revision = Revision(message.at_revision);
            let kv = node.cluster().get_at(&message.key, revision).await.map_err(past_status)?;
            let (kv, revision) = (kv.map(Into::into), revision.0);
            return Ok(Response::new(v1::GetResponse { kv, revision }));
        }
        let got = node.cluster().get(&message.key, consistency(message.consistency)).await;
        let (kv, revision) = got.map_err(|error| store_status(&error))?;
        Ok(Response::new(v1::GetResponse { kv: kv.map(Into::into), revision: revision.0 }))
    }

    async fn range(
        &self,
        request: Request<v1::RangeRequest>,
    ) -> Result<Response<v1::RangeResponse>, Status> {
        let (node, _) = self.admitted(&request)?;
        let message = request.into_inner();
        check_read(&message.prefix)?;
        let limit = usize::try_from(message.limit).unwrap_or(usize::MAX);
        let (prefix, after) = (&message.prefix, &message.after);
        let range = if message.at_revision == 0 {
            let consistency = consistency(message.consistency);
            let got = node.cluster().range_page(prefix, after, limit, consistency).await;
            got.map_err(|error| store_status(&error))?
        } else {
            let revision = Revision(message.at_revision);
            node.cluster().range_at(prefix, after, limit, revision).await.map_err(past_status)?
        };
        Ok(Response::new(v1::RangeResponse {
            kvs: range.kvs.into_iter().filter(visible).map(Into::into).collect(),
            revision: range.revision.0,
            more: range.more,
        }))
    }

    async fn txn(
        &self,
        request: Request<v1::TxnRequest>,
    ) -> Result<Response<v1::TxnResponse>, Status> {
        let (node, caller) = self.admitted(&request)?;
        let outcome = commit_judged(&node, caller, request.into_inner()).await?;
        let revision = outcome.revision().0;
        Ok(Response::new(match outcome {
            TxnOutcome::Committed { .. } => {
                v1::TxnResponse { succeeded: true, revision, conflicts: Vec::new() }
            }
            TxnOutcome::Conflict { conflicts, .. } => v1::TxnResponse {
                succeeded: false,
                revision,
                conflicts: conflicts.into_iter().filter(visible).map(Into::into).collect(),
            },
        }))
    }

    async fn history(
        &self,
        request: Request<v1::HistoryRequest>,
    ) -> Result<Response<v1::HistoryResponse>, Status> {
        let (node, _) = self.admitted(&request)?;
        let message = request.into_inner();
        check_read(&message.prefix)?;
        let before = Revision(message.before_revision);
        let limit = usize::try_from(message.limit).unwrap_or(usize::MAX);
        let found = node.cluster().history(&message.prefix, message.exact, before, limit).await;
        let history = found.map_err(|error| store_status(&error))?;
        Ok(Response::new(v1::HistoryResponse {
            changes: history.changes.into_iter().map(Into::into).collect(),
            compacted_revision: history.compacted.0,
            more: history.next_before.is_some(),
            next_before_revision: history.next_before.map_or(0, |revision| revision.0),
        }))
    }

    async fn commit(
        &self,
        request: Request<v1::CommitRequest>,
    ) -> Result<Response<v1::CommitResponse>, Status> {
        let (node, caller) = self.admitted(&request)?;
        let message = request.into_inner();
        // Before it is passed on: there it comes from a node.
        may_write(&caller, message.changes.iter().map(|change| change.path.as_str()))?;
        let dry_run = message.dry_run;
        let changes: Vec<FileChange> = message.changes.iter().cloned().map(file_change).collect();
        let there = |channel| {
            let request = caller.request(message.clone());
            async move { ConfigClient::new(channel).commit(request?).await }
        };
        if documents::need_leader(&changes)
            && let Some(answer) = leader::have_done(&node, there).await?
        {
            return Ok(answer);
        }
        let wanted = Wanted { dry_run, ..Wanted::default() };
        let response = match documents::commit(&node, &caller, &changes, &wanted).await? {
            Ok(done) => v1::CommitResponse { revision: done.revision.0, refusals: Vec::new() },
            Err(refusals) => {
                let refusals = refusals.iter().map(Refusal::message).collect();
                v1::CommitResponse { revision: 0, refusals }
            }
        };
        Ok(Response::new(response))
    }

    type WatchStream = Answers<v1::WatchResponse>;

    async fn watch(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (node, _) = self.admitted(&request)?;
        let message = request.into_inner();
        check_read(&message.prefix)?;
        let from = Revision(message.from_revision);
        let watch =
            node.cluster().watch_for_client(&message.prefix, from).map_err(|e| watch_status(&e))?;
        let responses = watch.map(|batch| {
            let batch = batch.map_err(|error| watch_status(&error))?;
            let revision = batch.revision.0;
            let events = batch.events.into_iter().filter_map(|event| event_of(event, revision));
            Ok(v1::WatchResponse { revision, events: events.collect() })
        });
        Ok(Response::new(responses.boxed()))
    }
}

fn file_change(change: v1::FileChange) -> FileChange {
    FileChange {
        path: change.path,
        expected: change.expected_revision.map(Revision),
        content: change.content,
    }
}

fn event_of(event: WatchEvent, revision: u64) -> Option<v1::WatchEvent> {
    let event = match event {
        WatchEvent::Put(kv) if visible(&kv) => watch_event::Event::Put(kv.into()),
        WatchEvent::Deleted { key } if !key.starts_with(keys::PRIV) => {
            watch_event::Event::Deleted(v1::Deleted { key, revision })
        }
        WatchEvent::Put(_) | WatchEvent::Deleted { .. } => return None,
    };
    Some(v1::WatchEvent { event: Some(event) })
}

fn past_status(error: ReadAtError) -> Status {
    match error {
        ReadAtError::Compacted(_) | ReadAtError::Future { .. } => {
            Status::out_of_range(error.to_string())
        }
        ReadAtError::Store(error) => store_status(&error),
    }
}

fn watch_status(error: &WatchError) -> Status {
    match error {
        WatchError::Compacted(_) => Status::out_of_range(error.to_string()),
        WatchError::TooMany { .. } => Status::resource_exhausted(error.to_string()),
        WatchError::Store(error) => store_status(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str) -> v1::TxnRequest {
        let put = v1::Put { key: key.to_owned(), value: vec![] };
        let writes = vec![v1::WriteOp { op: Some(write_op::Op::Put(put)) }];
        v1::TxnRequest { writes, ..v1::TxnRequest::default() }
    }

    #[test]
    fn status_private_and_document_keys_are_not_written_here() {
        for key in [
            "status/vms/web",
            "priv/ca.key",
            "vms/web.toml",
            "nodes/n1.toml",
            "storage.toml",
            "networks.toml",
            "cluster.toml",
            "access/ann.toml",
            "ha/web.toml",
        ] {
            let code = txn(put(key)).unwrap_err().code();
            assert_eq!(code, tonic::Code::PermissionDenied, "{key}");
        }
        for key in ["", "/a", "a//b", "a/../b", "a\nb", "vms/We b.toml"] {
            let code = txn(put(key)).unwrap_err().code();
            assert_eq!(code, tonic::Code::InvalidArgument, "{key:?}");
        }
        assert!(txn(put("notes/a")).is_ok());
        let compare = v1::Compare { key: "priv/ca.key".into(), mod_revision: 1 };
        let peek = v1::TxnRequest { compares: vec![compare], ..v1::TxnRequest::default() };
        assert!(txn(peek).is_err(), "a compare would tell of private keys");
    }
}
