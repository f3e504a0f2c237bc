use std::path::Path;

use proto::record::{CertificateHolder, CertificateRecord, Revocation};
use proto::{keys, v1};

use super::super::denied::denied;
use super::*;
use crate::identity::{Ca, request_key_hash};
use crate::membership::to_json;
use crate::{Cluster, Opened, Txn, open};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

const DAY_S: u64 = 86_400;

fn config(folder: &Path) -> ClusterConfig {
    ClusterConfig::new(folder.to_owned(), "127.0.0.1:1".to_owned(), "127.0.0.1:2".to_owned())
}

/// Waits for a condition, with a limit.
async fn until<F: Future<Output = Outcome<bool>>>(what: &str, holds: impl Fn() -> F) -> Outcome {
    let limit = std::time::Instant::now() + Duration::from_secs(40);
    while std::time::Instant::now() < limit {
        if holds().await? {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(format!("did not happen: {what}").into())
}

/// A cluster of one, which has recorded what it shows.
async fn cluster_of_one(folder: &Path) -> Outcome<Cluster> {
    let Opened::Fresh(fresh) = open(config(folder)).await? else {
        return Err("the folder is not fresh".into());
    };
    let cluster = fresh.init("test", "n1").await?;
    let node = cluster.node();
    until("it is settled", || async { Ok(node.renewal.settled.load(Ordering::SeqCst)) }).await?;
    Ok(cluster)
}

async fn states(cluster: &Cluster) -> Outcome<Vec<(String, String)>> {
    let listed = cluster.certificates().await?.into_iter();
    Ok(listed.filter(|one| one.kind == "node").map(|one| (one.serial, one.state)).collect())
}

fn is_in_use(refused: Result<Vec<v1::Certificate>, MembershipError>) -> Outcome {
    let refused = refused.err().ok_or("a member was locked out")?.to_string();
    assert!(refused.contains("clusterctl cluster cert renew n1"), "{refused}");
    Ok(())
}

#[test]
fn attempts_become_rarer_but_not_towards_the_end() {
    let (look, long) = (Duration::from_secs(1), Duration::from_secs(120 * DAY_S));
    assert_eq!(pause(look, 0, long), look);
    assert_eq!(pause(look, 3, long), Duration::from_secs(8));
    for many in [10, 16, 40, u32::MAX] {
        assert_eq!(pause(look, many, long), PAUSE_MAX);
    }
    // An hour, a minute, nothing left.
    for (left_s, pause_s) in [(3600, 360), (60, 6), (9, 1), (0, 1)] {
        let left = Duration::from_secs(left_s);
        assert_eq!(pause(look, u32::MAX, left), Duration::from_secs(pause_s), "{left_s} s left");
    }
    // As with certificates of a year.
    assert_eq!(pause(LOOK_MAX, u32::MAX, Duration::ZERO), PAUSE_URGENT);
    let mut left = Duration::from_secs(900);
    let mut attempts = 0;
    while left > PAUSE_URGENT {
        left = left.saturating_sub(pause(LOOK_MAX, 16, left));
        attempts += 1;
    }
    assert!(attempts > 10, "{attempts} attempts in the last quarter of an hour");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_node_works_with_is_not_revoked_whatever_was_signed_after_it() -> Outcome {
    let folder = tempfile::tempdir()?;
    let cluster = cluster_of_one(folder.path()).await?;
    let node = cluster.node().clone();
    let own = node.certificate().serial;
    // Signed and recorded; then the node died, or the request was dropped.
    let (key, csr_pem) = renewal_request(cluster.cluster_id(), node.id())?;
    let key_hash = request_key_hash(&csr_pem)?;
    let request = RenewRequest { node_id: 1, csr_pem, now_unix_s: unix_now_s() };
    let next = Pair::new(&key, &certificates::issue_next(&node, &request).await?);
    let serial = next.certificate().ok_or("unreadable")?.serial;
    // The same, by a clock that is years ahead.
    let issued_unix_s = unix_now_s() + 4000 * DAY_S;
    let ahead = CertificateRecord {
        holder: CertificateHolder::Node(node.id()),
        issued_unix_s,
        expires_unix_s: issued_unix_s + DAY_S,
        key_hash,
        in_use: false,
        revoked: None,
        trouble: None,
        authority: node.certificate().authority,
    };
    cluster.txn(Txn::new().put(keys::certificate("4fffffff"), to_json(&ahead)?)).await?;
    let state = |serial: &str, state: &str| (serial.to_owned(), state.to_owned());
    let expected = [state("4fffffff", "unused"), state(&serial, "unused"), state(&own, "valid")];
    assert_eq!(states(&cluster).await?, expected, "the last recorded one first");
    is_in_use(cluster.revoke_certificates(&own, "root").await)?;

    // One that was revoked before the node had it is not taken into use.
    cluster.revoke_certificates(&serial, "root").await?;
    let refused = node.exchange(&next).await.err().ok_or("it was taken")?;
    assert!(refused.contains("revoked before it was used"), "{refused}");
    assert_eq!(node.certificate().serial, own);

    // The next renewal goes on, and what is replaced by it can be revoked.
    let renewed = cluster.renew_certificate().await?;
    assert_eq!(renewed.serial, node.certificate().serial);
    let expected = [
        state(&renewed.serial, "valid"),
        state("4fffffff", "replaced"),
        state(&serial, "revoked"),
        state(&own, "replaced"),
    ];
    assert_eq!(states(&cluster).await?, expected);
    is_in_use(cluster.revoke_certificates(&renewed.serial, "root").await)?;
    cluster.revoke_certificates(&own, "root").await?;
    cluster.txn(Txn::new().put("works", "1")).await?;
    cluster.shutdown().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_without_a_pair_is_given_back() -> Outcome {
    let folder = tempfile::tempdir()?;
    let cluster = cluster_of_one(folder.path()).await?;
    let node = cluster.node().clone();
    let own = node.certificate().serial;
    let (key, csr_pem) = renewal_request(cluster.cluster_id(), node.id())?;
    let request = RenewRequest { node_id: 1, csr_pem, now_unix_s: unix_now_s() };
    let next = Pair::new(&key, &certificates::issue_next(&node, &request).await?);
    let serial = next.certificate().ok_or("unreadable")?.serial;
    // Claimed; then the node died before the pair was on its disk.
    certificates::claim(&node, &serial).await?;
    for claimed in [&own, &serial] {
        is_in_use(cluster.revoke_certificates(claimed, "root").await)?;
    }
    cluster.shutdown().await;
    drop((cluster, node));
    let Opened::Member(cluster) = open(config(folder.path())).await? else {
        return Err("no member".into());
    };
    assert_eq!(cluster.certificate().serial, own);
    let expected = vec![(serial.clone(), "unused".to_owned()), (own.clone(), "valid".to_owned())];
    until("it is given back", || async { Ok(states(&cluster).await? == expected) }).await?;
    is_in_use(cluster.revoke_certificates(&own, "root").await)?;
    cluster.revoke_certificates(&serial, "root").await?;
    cluster.shutdown().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_that_nobody_waits_for_is_ended() -> Outcome {
    let folder = tempfile::tempdir()?;
    let cluster = cluster_of_one(folder.path()).await?;
    let node = cluster.node();
    let before = node.certificate().serial;
    {
        let mut asking = Box::pin(cluster.renew_certificate());
        let _ = futures::poll!(asking.as_mut());
    }
    until("it has another one", || async { Ok(node.certificate().serial != before) }).await?;
    let shown = node.certificate().serial;
    let on_disk = Identity::load(folder.path())?.ok_or("nothing there")?;
    assert_eq!(on_disk.pair.certificate().map(|one| one.serial), Some(shown));
    assert_eq!(on_disk.previous.and_then(|pair| Some(pair.certificate()?.serial)), Some(before));
    cluster.shutdown().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_was_ahead_leaves_a_certificate_that_is_good() -> Outcome {
    let folder = tempfile::tempdir()?;
    let cluster = cluster_of_one(folder.path()).await?;
    let node = cluster.node().clone();
    let (held, now, life) = (node.renewal.held(), unix_now_s(), node.config.certificates.node);
    let own = held.certificate.serial.clone();
    let (id, trusted) = (node.id(), node.trusted());
    let owner = Owner {
        cluster_id: cluster.cluster_id(),
        id,
        trusted: &trusted,
        folder: folder.path(),
        life,
    };
    let replacement = |held: &Held, now| alone::replacement(&owner, held, &node.db, now);
    // By a clock that is two years ahead it has expired; so has each other one but a new one.
    let ahead = now + 730 * DAY_S;
    let signed = replacement(&held, ahead)?;
    assert_eq!(signed.certificate.standing(ahead), Standing::Good);
    assert_eq!(signed.certificate.standing(now), Standing::NotYet);
    // Ahead once more, further: the one that the others know is the one that is kept.
    let further = replacement(&signed, ahead + 730 * DAY_S)?;
    assert_eq!(further.previous.as_ref(), Some(&held.pair));
    // The clock is right again: another one is signed.
    let back = replacement(&further, now)?;
    assert_eq!(back.certificate.standing(now), Standing::Good);
    assert!(back.certificate.serial != own);
    // Where nothing can be signed, it is the one before, unless that was revoked.
    let another = Trusted::only(&Ca::make(cluster.cluster_id())?.certificate_pem);
    let unable = Owner { trusted: &another, ..owner };
    let before = alone::replacement(&unable, &further, &node.db, now)?;
    assert_eq!((before.pair == held.pair, &before.certificate.serial), (true, &own));
    assert_eq!(before.previous.as_ref(), Some(&further.pair));
    let none = Held { previous: None, ..further.clone() };
    let refused = alone::replacement(&unable, &none, &node.db, now).err().ok_or("from nothing")?;
    assert!(refused.contains("another CA's"), "{refused}");
    let key = keys::certificate(&own);
    let (kv, _) = cluster.get(&key, crate::Consistency::Linearizable).await?;
    let mut record: CertificateRecord = crate::membership::from_json(&kv.ok_or("not there")?)?;
    record.revoked = Some(Revocation { at_unix_s: now, by: "root".to_owned() });
    cluster.txn(Txn::new().put(key.as_str(), to_json(&record)?)).await?;
    let refused = alone::replacement(&unable, &further, &node.db, now).err().ok_or("revoked")?;
    assert!(refused.contains("another CA's"), "{refused}");
    // One that is shown and was revoked all the same is of no use, and says so.
    assert!(certificates::settle(&node, &held.certificate).await.is_err());
    until("its revocation is known", || async {
        Ok(node.is_useless(&held.certificate, unix_now_s()))
    })
    .await?;
    node.renew_if_due().await?;
    assert!(node.certificate().serial != own);
    assert!(!node.is_useless(&node.certificate(), unix_now_s()));
    record.revoked = None;
    cluster.txn(Txn::new().put(key, to_json(&record)?)).await?;
    // A clock that cannot be right signs nothing, and what is there stays.
    let refused = replacement(&none, 5).err().ok_or("it was signed")?;
    assert!(refused.contains("timedatectl"), "{refused}");

    // As it starts.
    cluster.shutdown().await;
    further.pair.store(folder.path(), further.previous.as_ref())?;
    drop((cluster, node));
    let Opened::Member(cluster) = open(config(folder.path())).await? else {
        return Err("no member".into());
    };
    let node = cluster.node().clone();
    let fresh = node.certificate();
    assert!(fresh.serial != own && fresh.standing(unix_now_s()) == Standing::Good);
    assert_ne!(fresh.serial, further.certificate.serial);

    // While it runs.
    let further = Held { previous: Some(held.pair.clone()), ..further };
    *node.renewal.held.lock().unwrap_or_else(PoisonError::into_inner) = further;
    // Its own task may be faster: then there is nothing left to do, and perhaps no leader to do it.
    let _ = node.renew_if_due().await;
    assert_eq!(node.certificate().standing(unix_now_s()), Standing::Good);
    cluster.shutdown().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_outlives_the_certificate() -> Outcome {
    let folder = tempfile::tempdir()?;
    let cluster = cluster_of_one(folder.path()).await?;
    let node = cluster.node().clone();
    // Over since 1970, or so it seems to a clock that is ahead.
    let record = |revoked| CertificateRecord {
        holder: CertificateHolder::Client("ann".to_owned()),
        issued_unix_s: 0,
        expires_unix_s: 1,
        key_hash: String::new(),
        in_use: false,
        revoked,
        trouble: None,
        authority: String::new(),
    };
    let revoked = Some(Revocation { at_unix_s: 0, by: "root".to_owned() });
    let (bad, good) = (keys::certificate("4aaaaaaa"), keys::certificate("4bbbbbbb"));
    let txn = Txn::new().put(bad.as_str(), to_json(&record(revoked))?);
    cluster.txn(txn.put(good.as_str(), to_json(&record(None))?)).await?;
    assert_eq!(denied(&node.db)?.serials, ["4aaaaaaa".to_owned()].into());
    certificates::forget(&node).await?;
    let there = |key: String| {
        let cluster = cluster.clone();
        async move { cluster.get(&key, crate::Consistency::Linearizable).await }
    };
    assert!(there(good).await?.0.is_none(), "it is over and nobody's, by all clocks");
    assert!(there(bad).await?.0.is_some());
    assert_eq!(denied(&node.db)?.serials, ["4aaaaaaa".to_owned()].into());
    cluster.shutdown().await;
    Ok(())
}
