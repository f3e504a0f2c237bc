//! Records of certificates, in a cluster of one.

use std::path::Path;
use std::time::{Duration, Instant};

use proto::record::CertificateHolder;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::tests::known;
use super::*;
use crate::authority::{self, own_copy};
use crate::identity::{Ca, Life, request};
use crate::tls::{Open, Refusal};
use crate::{Cluster, ClusterConfig, Opened, open};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

const LIMIT: Duration = Duration::from_secs(40);

async fn cluster_of_one(folder: &Path) -> Outcome<Cluster> {
    let address = |port: u8| format!("127.0.0.1:{port}");
    let config = ClusterConfig::new(folder.to_owned(), address(1), address(2));
    match open(config).await? {
        Opened::Fresh(fresh) => Ok(fresh.init("test", "n1").await?),
        Opened::Member(cluster) => Ok(cluster),
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) -> Outcome {
    let limit = Instant::now() + LIMIT;
    while !holds() {
        if Instant::now() > limit {
            return Err(format!("not within the limit: {what}").into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// More than one transaction may hold.
const MANY: usize = 4200;

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_revoked_with_however_many_certificates_it_has() -> Outcome {
    let folder = tempfile::tempdir()?;
    let cluster = cluster_of_one(folder.path()).await?;
    let of_ann = known("", CertificateHolder::Client("ann".to_owned()), unix_now_s()).record;
    let serials: Vec<String> = (0..MANY).map(|n| format!("{n:032x}")).collect();
    for part in serials.chunks(700) {
        let put = |txn: Txn, serial: &String| {
            Outcome::Ok(txn.put(keys::certificate(serial), to_json(&of_ann)?))
        };
        cluster.txn(part.iter().try_fold(Txn::new(), put)?).await?;
    }
    let full = cluster.issue_client("ann", &request()?.1, None).await.err().ok_or("no end")?;
    assert!(full.to_string().contains("as many as a name may have"), "{full}");
    let revoked = cluster.revoke_certificates("ann", "root").await?;
    assert_eq!(revoked.len(), MANY);
    assert!(revoked.iter().all(|one| one.state == "revoked"), "one is left");
    let left = all(cluster.node(), Consistency::Linearizable).await?;
    let live = |one: &&Known| one.record.holder == of_ann.holder && one.record.revoked.is_none();
    assert_eq!(left.iter().filter(live).count(), 0);
    cluster.issue_client("ann", &request()?.1, None).await?;
    cluster.shutdown().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_cannot_be_read_keeps_nobody_from_a_certificate_and_lets_nobody_in() -> Outcome
{
    let folder = tempfile::tempdir()?;
    let cluster = cluster_of_one(folder.path()).await?;
    let first = cluster.issue_client("ann", &request()?.1, None).await?;
    let first = Certificate::from_pem(&first.certificate_pem).ok_or("unreadable")?;
    assert_eq!(cluster.node().trust().judge(&first.holder, &first.serial), None);
    let damaged = Txn::new().put(keys::certificate(&first.serial), "{\"holder\":");
    cluster.txn(damaged).await?;
    until("what it was for is refused", || {
        cluster.node().trust().judge(&first.holder, &first.serial) == Some(Refusal::Revoked)
    })
    .await?;
    let next = cluster.issue_client("ann", &request()?.1, None).await?;
    let next = Certificate::from_pem(&next.certificate_pem).ok_or("unreadable")?;
    cluster.renew_certificate().await?;
    assert!(cluster.certificates().await?.iter().any(|one| one.serial == next.serial));
    let by_it = cluster.issue_client("ann", &request()?.1, Some(&first.serial)).await;
    assert!(by_it.is_err(), "whoever shows it got another one");
    cluster.revoke_certificates("ann", "root").await?;
    cluster.shutdown().await;
    Ok(())
}

/// What somebody is told who shows a certificate (PEM) and what certifies it.
fn shown(cluster: &Cluster, pem: &str, along: &[&str]) -> Outcome<Option<Refusal>> {
    let chain = std::iter::once(pem).chain(along.iter().copied());
    let chain: Vec<_> = chain
        .map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()))
        .collect::<Result<_, _>>()?;
    let certificate = Certificate::from_pem(pem).ok_or("unreadable")?;
    let (_open, refusal): (std::sync::Arc<Open>, _) =
        cluster.node().trust().enter(certificate, &chain);
    Ok(refusal)
}

/// Who has the disk of a node that was removed has the CA's key of that time.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_ca_before_signed_counts_where_it_is_recorded_alone() -> Outcome {
    let folder = tempfile::tempdir()?;
    let cluster = cluster_of_one(folder.path()).await?;
    let node = cluster.node().clone();
    let ann = cluster.issue_client("ann", &request()?.1, None).await?.certificate_pem;
    let stolen: Ca = authority::signer(&node).await?.ca;
    let id = cluster.cluster_id().to_owned();
    let life = Life::from_now(Duration::from_secs(3600));
    let (_, csr) = request()?;
    let forged = [
        stolen.sign_node(&id, NodeId(1), &csr, life)?,
        stolen.sign_node(&id, NodeId(99), &csr, life)?,
        stolen.sign_client(&id, "ann", &csr, life)?,
    ];
    let old = stolen.certificate_pem.clone();
    assert_eq!(shown(&cluster, &forged[0], &[&old])?, None, "before, it is like any other");

    cluster.rotate_ca("root").await?;
    until("another CA signs", || node.trusted().cross.is_some()).await?;
    let new = node.trusted().signer_pem().to_owned();
    assert_ne!(new, old);
    let cross = node.trusted().cross.clone().ok_or("no cross-certificate")?;
    for forged in &forged {
        for along in [&[old.as_str()][..], &[&cross, &new, &old], &[]] {
            assert_eq!(shown(&cluster, forged, along)?, Some(Refusal::Unrecorded));
        }
    }
    assert_eq!(shown(&cluster, &ann, &[&old])?, None, "it is recorded");
    let bob = cluster.issue_client("bob", &request()?.1, None).await?;
    assert_eq!(shown(&cluster, &bob.certificate_pem, &[])?, None);
    assert_eq!(bob.ca_pem.trim(), new.trim(), "its context trusts the old CA for good");
    // What the present one signs counts before each member has heard of it.
    let signer = authority::signer(&node).await?.ca;
    assert_eq!(shown(&cluster, &signer.sign_client(&id, "eve", &csr, life)?, &[])?, None);
    cluster.revoke_certificates("ann", "root").await?;
    until("it is revoked", || shown(&cluster, &ann, &[&old]).is_ok_and(|of| of.is_some())).await?;

    until("all show the new one's", || {
        own_copy(node.db()).is_ok_and(|own| own.is_some_and(|own| own.record.is_renewed()))
    })
    .await?;
    cluster.finish_ca_rotation("root", false).await?;
    until("it is dropped", || {
        shown(&cluster, &forged[0], &[&old]).is_ok_and(|of| of == Some(Refusal::Untrusted))
    })
    .await?;
    cluster.shutdown().await;
    Ok(())
}
