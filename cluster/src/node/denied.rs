//! Follows, in the replicated state, which certificates count no more: removed nodes' and revoked
//! ones.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use proto::record::CertificateRecord;
use proto::{NodeId, keys};
use tonic::{Request, Status};

use super::Node;
use super::removals::removed;
use crate::consensus::lead::look;
use crate::machine::{Record, Table, decode, prefix_end};
use crate::storage::{Db, View};
use crate::tls::{self, Denied, Recorded};

const PAUSE: Duration = Duration::from_millis(200);

/// The list as this node's copy of the state has it. No clock is asked: by one that is ahead a
/// certificate that was revoked would be over, and good again once the clock is right.
pub(super) fn denied(db: &Db) -> std::io::Result<Denied> {
    db.view(|view| {
        let mut denied = Denied::default();
        each(view, keys::REMOVALS, |id, row| {
            if let Ok(id) = id.parse()
                && removed(row)
            {
                denied.nodes.insert(NodeId(id));
            }
        })?;
        each(view, keys::CERTIFICATES, |serial, row| {
            let record = decode::<Record>(row).ok();
            let record = record.and_then(|row| serde_json::from_slice(&row.value).ok());
            match record {
                Some(CertificateRecord { revoked: None, holder, key_hash, .. }) => {
                    denied.recorded.insert(serial.to_owned(), Recorded { holder, key_hash });
                }
                // What cannot be read may say that it was revoked.
                Some(_) | None => {
                    denied.serials.insert(serial.to_owned());
                }
            }
        })?;
        Ok(denied)
    })
}

fn each(view: &View<'_>, prefix: &str, mut f: impl FnMut(&str, &[u8])) -> std::io::Result<()> {
    let end = prefix_end(prefix.as_bytes());
    for row in view.rows(Table::Data, prefix.as_bytes())? {
        let (key, value) = row?;
        if end.as_ref().is_some_and(|end| key >= *end) {
            break;
        }
        f(&String::from_utf8_lossy(&key[prefix.len()..]), &value);
    }
    Ok(())
}

/// Runs for as long as the member does.
pub(super) async fn follow(node: Arc<Node>) {
    while node.alive().is_ok() {
        let watches = (
            node.watch(keys::REMOVALS, proto::Revision(0)),
            node.watch(keys::CERTIFICATES, proto::Revision(0)),
        );
        // After the watches began: what changes between is seen by them.
        node.refresh_denied();
        if let (Ok(removals), Ok(certificates)) = watches {
            let mut changes = futures::stream::select(removals, certificates);
            while let Some(Ok(_)) = changes.next().await {
                node.refresh_denied();
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

impl Node {
    pub(super) fn refresh_denied(&self) {
        match denied(&self.db) {
            Ok(denied) => self.trust.deny(denied),
            Err(error) => {
                tracing::warn!(%error, "which certificates are refused is not known anew")
            }
        }
    }

    /// Whether the other end of a connection may still ask for anything: its certificate is good for
    /// long, and its connections may have outlived its membership.
    pub(crate) fn admit<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let Some(Some(info)) = request.extensions().get::<Option<tls::ConnectInfo>>() else {
            return Ok(());
        };
        // For nodes the state itself is asked, as it was last applied: the list is behind it.
        let refusal = match info.peer {
            tls::PeerIdentity::Node(id) => self.gone(id),
            tls::PeerIdentity::Client(_) | tls::PeerIdentity::LocalRoot => None,
        };
        let refusal = refusal.or_else(|| self.trust.judge(&info.peer, &info.serial));
        refusal.map_or(Ok(()), |refusal| Err(Status::permission_denied(refusal.words())))
    }

    /// Why a node is let in no more. One whose removal was interrupted after it was taken out of Raft
    /// is not told that it was removed: it would end for good, by the word of a copy that may be
    /// behind.
    fn gone(&self, id: NodeId) -> Option<tls::Refusal> {
        if self.was_removed(id) {
            return Some(tls::Refusal::Removed);
        }
        (self.is_leaving(id) && !self.is_member(id)).then_some(tls::Refusal::Leaving)
    }

    /// Whether Raft's configuration lists a node.
    pub(crate) fn is_member(&self, id: NodeId) -> bool {
        look(&self.raft, |now| now.membership_config.membership().get_node(&id.0).is_some())
    }
}
