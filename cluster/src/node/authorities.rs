//! Follows, in the replicated state, which CAs are trusted: on disk first, then in each new handshake,
//! then the open connections are looked through. As the leader it also takes a rotation further.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proto::{Revision, keys};

use super::Node;
use crate::authority::{self, OwnCopy, rotation};
use crate::host::blocking;
use crate::identity::{Identity, Trusted, store_trusted};
use crate::membership::to_json;
use crate::storage::Db;
use crate::{Consistency, StoreError, Txn};

const EVERY: Duration = Duration::from_millis(500);

/// The CAs that a member begins with: those of its copy of the state, unless its disk knows better.
/// Says so where this node will not be able to sign.
pub(super) fn at_start(identity: &Identity, db: &Db, folder: &Path) -> Trusted {
    match authority::own_copy(db) {
        Ok(Some(own)) => {
            authority::check(&own.record, folder, &identity.record.cluster_id);
            let trusted = own.trusted();
            if trusted.revision >= identity.trusted.revision {
                if trusted.roots != identity.trusted.roots
                    && let Err(error) = store_trusted(folder, &trusted)
                {
                    // It is tried again: until then the disk's are what this node says it trusts.
                    tracing::error!(%error, "the CAs that are trusted cannot be kept");
                    return identity.trusted.clone();
                }
                return trusted;
            }
        }
        // It joins.
        Ok(None) => {}
        Err(error) => tracing::error!(%error, "the CA's record cannot be read"),
    }
    identity.trusted.clone()
}

/// Runs for as long as the member does.
pub(super) async fn follow(node: Arc<Node>) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // The state at which there was nothing left to do.
    let mut settled = None;
    while node.alive().is_ok() {
        ticks.tick().await;
        let now = node.machine.applied().borrow().index;
        if settled == Some(now) {
            continue;
        }
        settled = match step(&node).await {
            Ok(true) => Some(now),
            Ok(false) => None,
            Err(why) => {
                tracing::warn!(%why, "the CAs that are trusted are not followed");
                None
            }
        };
    }
}

/// Answers whether that was all, until the state changes.
async fn step(node: &Node) -> Result<bool, String> {
    let own = authority::own_copy(&node.db).map_err(|error| error.to_string())?;
    let Some(own) = own else { return Ok(false) };
    if own.revision.0 > node.trusted().revision {
        node.adopt(own.trusted()).await?;
    }
    // Without a quorum it is done later.
    if let Err(error) = node.report(&own).await {
        tracing::debug!(%error, "that this node trusts the next CA is not known yet");
    }
    if crate::consensus::lead::leads(&node.metrics())
        && let Err(error) = rotation::advance(node, &own).await
    {
        tracing::debug!(%error, "the rotation of the CA goes on later");
    }
    Ok(own.record.is_settled())
}

impl Node {
    /// Trusts these CAs from now on.
    async fn adopt(&self, trusted: Trusted) -> Result<(), String> {
        let (before, roots) = (self.trusted(), trusted.roots.len());
        if (&before.roots, &before.cross) == (&trusted.roots, &trusted.cross) {
            self.trusted.store(Arc::new(trusted));
            return Ok(());
        }
        let (folder, stored) = (self.config.data_dir.clone(), trusted.clone());
        blocking(self.db.host(), move || store_trusted(&folder, &stored))
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("they cannot be kept: {error}"))?;
        // Before what is trusted: of the CA before, what is recorded counts.
        self.refresh_denied();
        self.credentials.trust(&trusted).map_err(|error| error.to_string())?;
        self.trust.recheck();
        tracing::info!(roots, signer = %trusted.signer_fingerprint(), "this node trusts other CAs");
        self.trusted.store(Arc::new(trusted));
        self.renewal.wake();
        Ok(())
    }

    /// While a rotation waits for it: says that this node trusts all that its record names.
    async fn report(&self, own: &OwnCopy) -> Result<(), StoreError> {
        if !own.record.waits_for_trust() || self.trusted().revision != own.revision.0 {
            return Ok(());
        }
        let key = keys::ca_trust(self.id());
        let present = self.get(&key, Consistency::Stale).await?.0;
        let report = to_json(&own.revision.0)?;
        if present.as_ref().is_some_and(|kv| kv.value == report) {
            return Ok(());
        }
        let was = present.map_or(Revision(0), |kv| kv.mod_revision);
        // Where either has changed meanwhile, it is looked at again.
        let txn = Txn::new().by("system").if_revision(key.clone(), was);
        let txn = txn.if_revision(authority::CA_KEY, own.revision).put(key, report);
        self.txn(txn).await.map(drop)
    }
}
