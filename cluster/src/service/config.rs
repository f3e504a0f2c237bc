//! `Config`: the store for clients and nodes. Nobody reads or writes `priv/` here, and only nodes
//! (and root on the spot) write `status/`, which is the system's own.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use proto::v1::config_server::Config;
use proto::v1::write_op::Op;
use proto::{Revision, keys, v1};
use tonic::{Request, Response, Status};

use crate::membership::status_of;
use crate::node::Node;
use crate::tls::{PeerIdentity, require_any};
use crate::{Consistency, StoreError, Txn, TxnOutcome, WatchError, WatchEvent};

/// The system's records.
const STATUS: &str = "status/";

/// Serves the store.
#[derive(Debug, Clone)]
pub struct ConfigService {
    node: Arc<Node>,
}

impl ConfigService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

fn consistency(wire: i32) -> Result<Consistency, Status> {
    match v1::Consistency::try_from(wire) {
        Ok(v1::Consistency::Linearizable) => Ok(Consistency::Linearizable),
        Ok(v1::Consistency::Stale) => Ok(Consistency::Stale),
        Err(_) => Err(Status::invalid_argument("unknown consistency")),
    }
}

/// Refuses private keys.
pub(crate) fn public(key: &str) -> Result<(), StoreError> {
    if key.starts_with(keys::PRIV) { Err(StoreError::Private(key.to_owned())) } else { Ok(()) }
}

/// A transaction from the wire, if the caller may ask for it.
fn txn_of(request: v1::TxnRequest, caller: &PeerIdentity) -> Result<Txn, Status> {
    let mut txn = Txn::new();
    for compare in request.compares {
        public(&compare.key).map_err(status_of)?;
        txn = txn.if_revision(compare.key, Revision(compare.mod_revision));
    }
    for write in request.writes {
        let op =
            write.op.ok_or_else(|| Status::invalid_argument("a write without an operation"))?;
        let key = match &op {
            Op::Put(put) => &put.key,
            Op::Delete(delete) => &delete.key,
        };
        public(key).map_err(status_of)?;
        if key.starts_with(STATUS) && matches!(caller, PeerIdentity::Client(_)) {
            return Err(Status::permission_denied(format!(
                "`{key}` is a record of the system and is not edited; use the command for what you want to change"
            )));
        }
        txn = match op {
            Op::Put(put) => txn.put(put.key, put.value),
            Op::Delete(delete) => txn.delete(delete.key),
        };
    }
    if request.client.is_empty() {
        Ok(txn)
    } else {
        Ok(txn.named(request.client, request.sequence))
    }
}

type Watch = Pin<Box<dyn Stream<Item = Result<v1::WatchResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Config for ConfigService {
    type WatchStream = Watch;

    async fn get(
        &self,
        request: Request<v1::GetRequest>,
    ) -> Result<Response<v1::GetResponse>, Status> {
        require_any(&request)?;
        let request = request.into_inner();
        public(&request.key).map_err(status_of)?;
        let consistency = consistency(request.consistency)?;
        let (kv, revision) = self.node.get(&request.key, consistency).await.map_err(status_of)?;
        Ok(Response::new(v1::GetResponse { kv: kv.map(Into::into), revision: revision.0 }))
    }

    async fn range(
        &self,
        request: Request<v1::RangeRequest>,
    ) -> Result<Response<v1::RangeResponse>, Status> {
        require_any(&request)?;
        let request = request.into_inner();
        let limit = usize::try_from(request.limit).unwrap_or(usize::MAX);
        let consistency = consistency(request.consistency)?;
        let range = self.node.range(&request.prefix, &request.after, limit, consistency, false);
        let found = range.await.map_err(status_of)?;
        Ok(Response::new(v1::RangeResponse {
            kvs: found.kvs.into_iter().map(Into::into).collect(),
            revision: found.revision.0,
            more: found.more,
        }))
    }

    async fn txn(
        &self,
        request: Request<v1::TxnRequest>,
    ) -> Result<Response<v1::TxnResponse>, Status> {
        let caller = require_any(&request)?;
        let txn = txn_of(request.into_inner(), &caller)?;
        let answer = match self.node.txn(txn).await.map_err(status_of)? {
            TxnOutcome::Committed { revision } => {
                v1::TxnResponse { succeeded: true, revision: revision.0, conflicts: Vec::new() }
            }
            TxnOutcome::Conflict { revision, conflicts } => v1::TxnResponse {
                succeeded: false,
                revision: revision.0,
                conflicts: conflicts.into_iter().map(Into::into).collect(),
            },
        };
        Ok(Response::new(answer))
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Watch>, Status> {
        require_any(&request)?;
        let request = request.into_inner();
        let watch = self.node.watch(&request.prefix, Revision(request.from_revision));
        let batches = watch.map_err(watch_status)?;
        let responses = batches.map(|batch| {
            let batch = batch.map_err(watch_status)?;
            let revision = batch.revision.0;
            let events = batch.events.into_iter().map(|event| {
                let event = match event {
                    WatchEvent::Put(kv) => v1::watch_event::Event::Put(kv.into()),
                    WatchEvent::Deleted { key } => {
                        v1::watch_event::Event::Deleted(v1::Deleted { key, revision })
                    }
                };
                v1::WatchEvent { event: Some(event) }
            });
            Ok(v1::WatchResponse { revision, events: events.collect() })
        });
        Ok(Response::new(Box::pin(responses)))
    }
}

fn watch_status(error: WatchError) -> Status {
    match error {
        WatchError::Compacted(compacted) => Status::out_of_range(compacted.to_string()),
        WatchError::Store(error) => status_of(error),
    }
}
