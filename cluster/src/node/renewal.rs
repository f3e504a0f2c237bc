//! This node's own certificate: gets the next one in time, shows it from then on, keeps it on disk.
//!
//! ```text
//!   due, asked for ──► new key ──► the leader signs ──► on disk ──► in each new handshake
//!                         │ fails: again, later and later; why is in the record, for the list
//!                         └ expired (the node was off too long): it signs with the CA's key itself
//! ```

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::v1::RenewRequest;

use super::Node;
use crate::certificates;
use crate::consensus::{lead, renew};
use crate::host::blocking;
use crate::identity::{Ca, Certificate, Identity, Life, Pair, fingerprint, renewal_request};
use crate::machine::{Read, Record, Table, decode};
use crate::membership::{CA_KEY, unix_now_s};
use crate::storage::Db;
use crate::tls::{Credentials, PeerIdentity};
use crate::{ClusterConfig, MembershipError};

/// Between two looks at most.
const LOOK_MAX: Duration = Duration::from_secs(60);
const LOOK_MIN: Duration = Duration::from_millis(100);
/// Between two attempts at most.
const PAUSE_MAX: Duration = Duration::from_secs(600);

/// What this node knows of its own certificate.
#[derive(Debug)]
pub(super) struct Renewal {
    present: Mutex<Certificate>,
    /// One renewal of this node at a time.
    one: tokio::sync::Mutex<()>,
    /// One signature for others at a time.
    issuing: tokio::sync::Mutex<()>,
}

impl Renewal {
    /// None where the certificate cannot be read.
    pub(super) fn of(pair: &Pair) -> Option<Self> {
        let present = Mutex::new(pair.certificate()?);
        let (one, issuing) = (tokio::sync::Mutex::default(), tokio::sync::Mutex::default());
        Some(Self { present, one, issuing })
    }
}

/// Between two looks at whether it is time: often enough for the shortest life.
fn look_every(config: &ClusterConfig) -> Duration {
    (config.certificates.node / 50).clamp(LOOK_MIN, LOOK_MAX)
}

/// After so many failures in a row.
fn pause(look: Duration, failures: u32) -> Duration {
    look.saturating_mul(1u32.checked_shl(failures.min(16)).unwrap_or(u32::MAX)).min(PAUSE_MAX)
}

/// A certificate for this node, signed by itself with the CA's key: every member has it. Only for one
/// that has expired: with that the leader, or whoever could elect one, would not talk to it.
fn sign_alone(
    config: &ClusterConfig,
    cluster_id: &str,
    id: proto::NodeId,
    ca_pem: &str,
    db: &Db,
) -> Result<Pair, String> {
    let row = db.view(|view| view.get(Table::Data, CA_KEY.as_bytes()));
    let row = row.map_err(|error| error.to_string())?.ok_or("it has no copy of the CA's key")?;
    let record: Record = decode(&row).map_err(|error| error.to_string())?;
    let ca: Ca = serde_json::from_slice(&record.value).map_err(|error| error.to_string())?;
    if fingerprint(&ca.certificate_pem) != fingerprint(ca_pem) {
        return Err("its copy of the CA's key is another CA's".to_owned());
    }
    let (key, csr) = renewal_request(cluster_id, id).map_err(|error| error.to_string())?;
    let life = Life::from_now(config.certificates.node);
    let signed = ca.sign_node(cluster_id, id, &csr, life).map_err(|error| error.to_string())?;
    Ok(Pair::new(&key, &signed))
}

/// At the start: a certificate that has expired is of no use to anybody.
pub(super) fn renew_if_over(
    config: &ClusterConfig,
    identity: &mut Identity,
    db: &Db,
) -> Result<(), String> {
    let Some(present) = identity.pair.certificate() else {
        return Err("node.pem holds no certificate of a node; remove this node from the cluster, empty its data folder and join again".to_owned());
    };
    if unix_now_s() < present.expires_unix_s {
        return Ok(());
    }
    let (cluster_id, id) = (&identity.record.cluster_id, identity.record.node_id);
    match sign_alone(config, cluster_id, id, &identity.ca_pem, db) {
        Ok(pair) => {
            tracing::warn!("this node's certificate had expired; it has signed another one");
            pair.store(&config.data_dir).map_err(|error| error.to_string())?;
            identity.pair = pair;
        }
        Err(why) => {
            tracing::error!(%why, "this node's certificate has expired; the other members will not talk to it: remove it from the cluster, empty its data folder and join again")
        }
    }
    Ok(())
}

/// Runs for as long as the member does.
pub(super) async fn keep(node: Arc<Node>) {
    let look = look_every(&node.config);
    let mut failures = 0u32;
    loop {
        if node.alive().is_err() {
            return;
        }
        match node.tend_certificate().await {
            Ok(()) => failures = 0,
            Err(why) => {
                failures = failures.saturating_add(1);
                let again = pause(look, failures);
                tracing::warn!(%why, failures, ?again, "this node did not get its next certificate");
                let _ = certificates::note_trouble(&node, &node.certificate(), &why).await;
            }
        }
        if lead::leads(&node.metrics())
            && let Err(error) = certificates::forget(&node).await
        {
            tracing::debug!(%error, "old certificates are not forgotten yet");
        }
        tokio::time::sleep(pause(look, failures)).await;
    }
}

impl Node {
    /// The certificate that this node shows now.
    pub(crate) fn certificate(&self) -> Certificate {
        self.renewal.present.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Held while a certificate is judged, signed and recorded.
    pub(crate) async fn issuing(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.renewal.issuing.lock().await
    }

    async fn tend_certificate(&self) -> Result<(), String> {
        let (present, now_unix_s) = (self.certificate(), unix_now_s());
        let life_s = self.config.certificates.node.as_secs();
        if now_unix_s >= present.due_unix_s() || present.outlasts(now_unix_s, life_s) {
            return self.renew().await.map(drop).map_err(|error| error.to_string());
        }
        if let Err(error) = certificates::record_own(self, &present).await {
            tracing::debug!(%error, "this node's certificate is not recorded yet");
        }
        Ok(())
    }

    /// Gets this node its next certificate now.
    pub(crate) async fn renew(&self) -> Result<Certificate, MembershipError> {
        let _one = self.renewal.one.lock().await;
        let refused = |why: String| MembershipError::NotRenewed(why);
        let pair = match self.ask_for_next().await {
            Ok(pair) => pair,
            Err(why) if unix_now_s() < self.certificate().expires_unix_s => {
                return Err(refused(why));
            }
            Err(why) => {
                tracing::warn!(%why, "this node's certificate has expired; it signs another one");
                let (cluster_id, id) = (&self.identity.cluster_id, self.id());
                sign_alone(&self.config, cluster_id, id, &self.ca_pem, &self.db)
                    .map_err(|alone| refused(format!("{why}; and alone: {alone}")))?
            }
        };
        self.exchange(pair).await.map_err(refused)
    }

    async fn ask_for_next(&self) -> Result<Pair, String> {
        let id = self.id();
        let (key, csr_pem) = renewal_request(&self.identity.cluster_id, id)
            .map_err(|error| format!("no key could be made: {error}"))?;
        let request = RenewRequest { node_id: id.0, csr_pem, now_unix_s: unix_now_s() };
        let leader = self.metrics().current_leader.ok_or("no leader is known")?;
        let limit = self.config.request_timeout;
        let signed = if leader == id.0 {
            let signed = tokio::time::timeout(limit, certificates::issue_next(self, &request));
            let signed = signed.await.map_err(|_| "no majority answered in time")?;
            signed.map_err(|status| status.message().to_owned())?
        } else {
            let members = self.members();
            let member = members.iter().find(|member| member.node_id.0 == leader);
            let channel = member.and_then(|member| self.peers.shared(leader, &member.api_address));
            let channel = channel.ok_or("the leader's address is not known")?;
            renew(channel, request, limit, &self.removed).await?
        };
        Ok(Pair::new(&key, &signed))
    }

    /// Works with another pair from now on: first it is looked at, then it is on disk, then it is
    /// shown. Connections that are open go on with the old one.
    async fn exchange(&self, pair: Pair) -> Result<Certificate, String> {
        let certificate = pair.certificate().ok_or("the answer is no certificate")?;
        if certificate.holder != PeerIdentity::Node(self.id()) {
            return Err(format!("the answer is a certificate of {}", certificate.holder));
        }
        Credentials::new(&pair, &self.ca_pem).map_err(|error| error.to_string())?;
        let (folder, stored) = (self.config.data_dir.clone(), pair.clone());
        blocking(self.db.host(), move || stored.store(&folder))
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("it cannot be kept: {error}"))?;
        self.credentials.replace(&pair).map_err(|error| error.to_string())?;
        *self.renewal.present.lock().unwrap_or_else(PoisonError::into_inner) = certificate.clone();
        tracing::info!(serial = %certificate.serial, expires = certificate.expires_unix_s, "this node has a new certificate");
        Ok(certificate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_become_rarer_up_to_a_limit() {
        let look = Duration::from_secs(1);
        assert_eq!(pause(look, 0), look);
        assert_eq!(pause(look, 3), Duration::from_secs(8));
        for many in [10, 16, 40, u32::MAX] {
            assert_eq!(pause(look, many), PAUSE_MAX);
        }
    }
}
