use std::io::Write;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures::StreamExt;
use proto::v1::RenewRequest;

use super::*;
use crate::certificates;
use crate::consensus::{Outgoing, SnapshotFile};
use crate::identity::{Certificate, renewal_request, request};
use crate::membership::{to_json, unix_now_s};
use crate::{Cluster, ClusterConfig, Opened, Txn, open};

type Error = Box<dyn std::error::Error + Send + Sync>;
type Outcome<T = ()> = Result<T, Error>;

fn config(folder: &Path) -> ClusterConfig {
    let address = |port: u8| format!("127.0.0.1:{port}");
    let mut config = ClusterConfig::new(folder.to_owned(), address(1), address(2));
    (config.snapshot_every, config.snapshot_bytes, config.snapshot_keep) = (50, 0, 5);
    config
}

async fn cluster_of_one(folder: &Path) -> Outcome<Cluster> {
    match open(config(folder)).await? {
        Opened::Fresh(fresh) => Ok(fresh.init("test", "n1").await?),
        Opened::Member(cluster) => Ok(cluster),
    }
}

/// The files under a folder in which some bytes are. A member that runs replaces files meanwhile:
/// one that is gone has nothing in it.
fn found(folder: &Path, wanted: &[u8]) -> Outcome<Vec<String>> {
    let mut hits = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            hits.extend(found(&path, wanted)?);
            continue;
        }
        let bytes = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            read => read?,
        };
        if bytes.windows(wanted.len()).any(|part| part == wanted) {
            hits.push(path.display().to_string());
        }
    }
    Ok(hits)
}

/// The longest line of a PEM text, which is one of its middle.
fn line(pem: &str) -> Outcome<&str> {
    Ok(pem.lines().filter(|line| !line.starts_with('-')).nth(1).ok_or("no line")?)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cas_clear_key_is_in_no_file_and_no_backup() -> Outcome {
    let folder = tempfile::tempdir()?;
    let cluster = cluster_of_one(&folder.path().join("data")).await?;
    let data = folder.path().join("data");
    for n in 0..200 {
        cluster.txn(Txn::new().put(format!("notes/{n}"), "a note of somebody")).await?;
    }
    // One that is sent holds what this one holds.
    let (sent, mut file) = SnapshotFile::receive(folder.path())?;
    let mut outgoing = Outgoing::of(cluster.node().db())?;
    while let Some(piece) = outgoing.next()? {
        file.write_all(&piece)?;
    }
    cluster.issue_client("ann", &request()?.1, None).await?;
    let mut pieces = cluster.backup(Consistency::Linearizable).await?;
    let mut backup = Vec::new();
    while let Some(piece) = pieces.next().await {
        backup.extend(piece?);
    }
    std::fs::write(folder.path().join("backup.hfb"), backup)?;
    let ca = signer(cluster.node()).await?.ca;
    let sealing_key = std::fs::read_to_string(data.join(SEALING_KEY))?;
    // As it is while the member runs, and after its tables were written.
    for turn in ["running", "stopped", "reopened"] {
        let clear = STANDARD.encode(ca.key_bytes());
        for (what, bytes) in [
            ("DER", ca.key_bytes()),
            // The secret number itself: bytes 36 to 68 of a P-256 key in PKCS #8.
            ("number", &ca.key_bytes()[36..68]),
            ("PEM", &clear.as_bytes()[..64]),
            ("PEM", &clear.as_bytes()[64..128]),
        ] {
            let hits = found(folder.path(), bytes)?;
            assert!(hits.is_empty(), "{turn}: the CA's key ({what}) is in {hits:?}");
        }
        let hits = found(folder.path(), sealing_key.trim().as_bytes())?;
        assert_eq!(hits, [data.join(SEALING_KEY).display().to_string()], "{turn}");
        // What is looked for would be found: so is what stands beside it.
        let certificate = line(&ca.certificate_pem)?;
        let hits = found(folder.path(), certificate.as_bytes())?;
        for part in ["/receiving-", "/data/db/"] {
            assert!(hits.iter().any(|file| file.contains(part)), "{turn}: {part} {hits:?}");
        }
        let hits = found(folder.path(), b"a note of somebody")?;
        assert!(hits.iter().any(|file| file.ends_with("backup.hfb")), "{turn}: {hits:?}");
        let hits = found(folder.path(), b"sealed_key")?;
        assert!(!hits.iter().any(|file| file.ends_with("backup.hfb")), "a backup can sign");
        match turn {
            "running" => cluster.shutdown().await,
            "stopped" => cluster_of_one(&data).await?.shutdown().await,
            _ => {}
        }
    }
    drop((sent, outgoing));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_was_tampered_with_is_not_signed_with() -> Outcome {
    let folder = tempfile::tempdir()?;
    let cluster = cluster_of_one(folder.path()).await?;
    let node = cluster.node().clone();
    let cluster_id = cluster.cluster_id().to_owned();
    let good = own_copy(node.db())?.ok_or("no record")?.record;
    let put = |record: &CaRecord| {
        let txn = to_json(record).map(|json| Txn::new().put(CA_KEY, json));
        let node = node.clone();
        async move { Outcome::Ok(node.txn(txn?).await?) }
    };
    // Another CA's key under the same certificate, and another CA under this node's own key.
    let key = SealingKey::load(folder.path())?;
    let eves = CaRecord::first(&Ca::make(&cluster_id)?, &SealingKey::make()?, &cluster_id)?;
    let elsewhere = CaRecord::first(&Ca::make("c2")?, &key, "c2")?;
    let mut flipped = serde_json::to_value(&good)?;
    let sealed = flipped["present"]["sealed_key"].as_str().ok_or("no key")?;
    let changed = if sealed.starts_with('A') { "B" } else { "A" };
    flipped["present"]["sealed_key"] = format!("{changed}{}", &sealed[1..]).into();
    for bad in [eves, elsewhere, serde_json::from_value(flipped)?] {
        put(&bad).await?;
        let client = cluster.issue_client("ann", &request()?.1, None).await.map(drop);
        let Err(error @ MembershipError::CannotSign { .. }) = client else {
            return Err(format!("{client:?}").into());
        };
        let text = error.to_string();
        assert!(text.contains("cannot be decrypted") && text.contains("join again"), "{text}");
        let csr_pem = renewal_request(&cluster_id, node.id())?.1;
        let request = RenewRequest { node_id: 1, csr_pem, now_unix_s: unix_now_s() };
        let refused = certificates::issue_next(&node, &request).await.err().ok_or("signed")?;
        assert!(refused.message().contains("cannot be decrypted"), "{refused}");
        let alone = own_ca(node.db(), folder.path(), &cluster_id).err().ok_or("opened")?;
        assert!(alone.contains("cannot be decrypted"), "{alone}");
    }
    put(&good).await?;
    cluster.issue_client("ann", &request()?.1, None).await?;
    cluster.shutdown().await;
    Ok(())
}

/// Whoever has a stolen key must not get away from its revocation with a new certificate.
#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_certificate_gets_its_holder_no_other_one() -> Outcome {
    let folder = tempfile::tempdir()?;
    let cluster = cluster_of_one(folder.path()).await?;
    let issue = |caller: Option<String>| {
        let cluster = cluster.clone();
        async move {
            cluster.issue_client("ann", &request()?.1, caller.as_deref()).await.map_err(Error::from)
        }
    };
    let first = Certificate::from_pem(&issue(None).await?.certificate_pem).ok_or("unreadable")?;
    let next = issue(Some(first.serial.clone())).await?;
    let next = Certificate::from_pem(&next.certificate_pem).ok_or("unreadable")?;
    cluster.revoke_certificates("ann", "root").await?;
    for serial in [first.serial, next.serial, "00".repeat(20)] {
        let refused = issue(Some(serial)).await.err().ok_or("issued")?;
        assert!(refused.to_string().contains("was revoked"), "{refused}");
    }
    // An administrator, as root on a node, makes another one.
    issue(None).await?;
    cluster.shutdown().await;
    Ok(())
}
