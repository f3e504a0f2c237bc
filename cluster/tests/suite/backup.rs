//! Backups of real members and clusters restored from them.

use std::collections::BTreeMap;
use std::io::{Seek, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cluster::{Cluster, Consistency, Opened, RestoreError, Restored, StoreError, Txn, open};
use futures::StreamExt;
use proto::backup::{Header, Reader, Writer};
use proto::record::{DiskClaim, Phase, Placement, Requested};
use proto::{Generation, Name, NodeId, VmId, keys};

use crate::common::{LIMIT, Lab, Outcome, TestNode, serve, test_config};

/// All bytes of a backup.
async fn taken(cluster: &Cluster, consistency: Consistency) -> Outcome<Vec<u8>> {
    let mut pieces = cluster.backup(consistency).await?;
    let mut bytes = Vec::new();
    while let Some(piece) = pieces.next().await {
        bytes.extend(piece?);
    }
    Ok(bytes)
}

fn read(bytes: &[u8]) -> Outcome<(Header, BTreeMap<String, Vec<u8>>)> {
    let mut reader = Reader::default();
    let rows = reader.push(bytes)?.into_iter().collect();
    let header = reader.header().cloned().ok_or("there is no header")?;
    reader.finish()?;
    Ok((header, rows))
}

fn file(bytes: &[u8]) -> Outcome<std::fs::File> {
    let mut file = tempfile::tempfile()?;
    file.write_all(bytes)?;
    // Wherever it stands, it is read from its begin.
    file.seek(std::io::SeekFrom::Start(1))?;
    Ok(file)
}

fn placement() -> Placement {
    Placement {
        vm_id: VmId(uuid::Uuid::from_u128(0x6f0a_2b1c)),
        owner: NodeId(3),
        generation: Generation(7),
        phase: Phase::Migrating { target: NodeId(2) },
        requested: Requested::Started,
        ha: true,
        cpus: 2,
        memory_bytes: 1 << 30,
        start_failures: 2,
        tried: Vec::new(),
        home: None,
        lock: None,
        retry_at_unix_ms: Some(5),
        message: None,
        events: vec!["made".to_owned()],
    }
}

#[test]
fn a_backup_is_one_moment_while_others_write() -> Outcome {
    let lab = Lab::new(3)?;
    let (ends, writer) = (Arc::new(AtomicBool::new(false)), lab.nodes[0].cluster()?);
    let done = Arc::new(AtomicU64::new(0));
    let (stop, count) = (ends.clone(), done.clone());
    let writing = std::thread::spawn(move || -> Outcome {
        let runtime = tokio::runtime::Runtime::new()?;
        let mut written = 0u64;
        while !stop.load(Ordering::SeqCst) {
            written += 1;
            // Far apart in the order of keys, and with much between them.
            let text = written.to_string();
            let txn = Txn::new().put("a", text.as_str()).put("z", text.as_str());
            let txn = txn.put(format!("vms/{:03}.toml", written % 200), vec![1; 20_000]);
            runtime.block_on(writer.txn(txn))?;
            count.store(written, Ordering::SeqCst);
        }
        Ok(())
    });
    let (mut last, until) = (0, Instant::now() + LIMIT);
    for turn in 0.. {
        if turn >= 9 && done.load(Ordering::SeqCst) > 20 {
            break;
        }
        assert!(Instant::now() < until && !writing.is_finished(), "nothing is written");
        let node = &lab.nodes[turn % 3];
        let bytes = node.run(|c| async move { taken(&c, Consistency::Linearizable).await })??;
        let (header, rows) = read(&bytes)?;
        assert_eq!(rows.get("a"), rows.get("z"), "torn at revision {}", header.revision);
        assert!(header.revision >= last, "{header:?}");
        last = header.revision;
        assert_eq!((header.cluster_name.as_str(), &header.node), ("test", &node.name));
        let inner =
            rows.keys().filter(|key| key.starts_with("priv/") || key.starts_with("status/"));
        assert_eq!(inner.count(), 0, "the lab has nothing of these that is kept");
    }
    ends.store(true, Ordering::SeqCst);
    writing.join().map_err(|_| "the writer panicked")?
}

#[test]
fn a_backup_can_be_taken_without_a_quorum_if_asked_so() -> Outcome {
    let mut lab = Lab::new(3)?;
    lab.nodes[0].run(|c| async move { c.txn(Txn::new().put("cluster.toml", "x = 1")).await })??;
    lab.wait("all have it", |lab| {
        let got =
            lab.nodes[2].run(|c| async move { c.get("cluster.toml", Consistency::Stale).await });
        Ok(got??.0.is_some())
    })?;
    lab.nodes[0].kill();
    lab.nodes[1].kill();
    let refused =
        lab.nodes[2].run(|c| async move { taken(&c, Consistency::Linearizable).await })?;
    assert!(refused.is_err_and(|error| error.to_string().contains("no quorum")));
    let bytes = lab.nodes[2].run(|c| async move { taken(&c, Consistency::Stale).await })??;
    assert_eq!(read(&bytes)?.1["cluster.toml"], b"x = 1");
    Ok(())
}

#[test]
fn a_reader_that_takes_nothing_holds_up_neither_others_nor_the_end() -> Outcome {
    let mut lab = Lab::new(1)?;
    let came = lab.nodes[0].run(|c| async move {
        for n in 0..40 {
            c.txn(Txn::new().put(format!("f{n}"), vec![n; 512 << 10])).await?;
        }
        let mut slow = c.backup(Consistency::Linearizable).await?;
        let slower = c.backup(Consistency::Linearizable).await?;
        let third = c.backup(Consistency::Linearizable).await.map(drop);
        assert!(matches!(third, Err(StoreError::Busy(_))), "{third:?}");
        // Both wait for their readers; writes go on, and who hangs up makes room.
        assert!(c.txn(Txn::new().put("f0", "new")).await?.committed());
        drop(slower);
        let until = Instant::now() + LIMIT;
        while c.backup(Consistency::Linearizable).await.is_err() {
            assert!(Instant::now() < until, "no room");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let begin = Instant::now();
        c.shutdown().await;
        let took = begin.elapsed();
        let mut came = Vec::new();
        while let Some(Ok(piece)) = slow.next().await {
            came.extend(piece);
        }
        assert!(took < Duration::from_secs(10), "the end took {took:?}");
        Outcome::Ok(came)
    })??;
    let whole = read(&came).map(drop);
    assert!(whole.is_err_and(|error| error.to_string().contains("cut off")));
    lab.nodes[0].kill();
    lab.nodes[0].start()?;
    let bytes =
        lab.nodes[0].run(|c| async move { taken(&c, Consistency::Linearizable).await })??;
    assert_eq!(read(&bytes)?.1["f0"], b"new");
    Ok(())
}

/// A fresh node that restores, and then serves.
async fn restore(
    config: cluster::ClusterConfig,
    bytes: Vec<u8>,
    name: &str,
) -> Outcome<(Cluster, Restored)> {
    let Opened::Fresh(fresh) = open(config.clone()).await? else {
        return Err("the folder is not fresh".into());
    };
    let (cluster, restored) = fresh.restore(file(&bytes)?, name, "r1").await?;
    serve(&cluster, &config).await?;
    Ok((cluster, restored))
}

async fn value(cluster: &Cluster, key: &str) -> Outcome<Option<Vec<u8>>> {
    Ok(cluster.get(key, Consistency::Linearizable).await?.0.map(|kv| kv.value))
}

#[test]
fn a_restored_cluster_has_the_data_and_no_vm_that_runs() -> Outcome {
    let lab = Lab::new(3)?;
    let web: Name = "web".parse()?;
    let claim = DiskClaim { vm_id: placement().vm_id, vm: web.clone() };
    let written = Txn::new()
        .put(keys::vm_document(&web), "name = \"web\"")
        .put("cluster.toml", "x = 1")
        .put("notes/empty/", "")
        .put(keys::placement(&web), serde_json::to_vec(&placement())?)
        .put(keys::disk_claim("shared/web.raw"), serde_json::to_vec(&claim)?)
        .put(keys::node(NodeId(2)), "{}")
        .put(keys::fenced(NodeId(2)), "{}")
        .put(keys::HA_LEADER, "{}");
    let (bytes, old_id, old_ca) = lab.nodes[1].run(|c| async move {
        c.txn(written).await?;
        for first in (0..2500).step_by(500) {
            let many = (first..first + 500)
                .fold(Txn::new(), |txn, n| txn.put(format!("vms/v{n:04}.toml"), vec![b'x'; 3000]));
            c.txn(many).await?;
        }
        let bytes = taken(&c, Consistency::Linearizable).await?;
        Outcome::Ok((bytes, c.cluster_id().to_owned(), c.ca_fingerprint().to_owned()))
    })??;

    let folder = tempfile::tempdir()?;
    let mut second = TestNode::new(folder.path(), "r2")?;
    let config = test_config(&folder.path().join("r1"))?;
    let runtime = tokio::runtime::Runtime::new()?;
    let (cluster, restored) = runtime.block_on(restore(config.clone(), bytes, ""))?;
    assert_eq!((restored.keys, restored.vms), (2505, 1));
    assert_eq!(restored.header.cluster_id, old_id);
    assert_ne!(cluster.cluster_id(), old_id);
    assert_ne!(cluster.ca_fingerprint(), old_ca);
    assert_eq!((cluster.cluster_name(), cluster.node_id()), ("test", NodeId(1)));
    let check = async |cluster: &Cluster| {
        assert_eq!(value(cluster, "cluster.toml").await?, Some(b"x = 1".to_vec()));
        assert_eq!(value(cluster, "notes/empty/").await?, Some(Vec::new()));
        assert_eq!(value(cluster, "vms/v2499.toml").await?, Some(vec![b'x'; 3000]));
        let files = cluster.range("", "", 0, Consistency::Linearizable).await?.kvs;
        let files = files.iter().filter(|kv| !kv.key.starts_with("status/")).count();
        assert_eq!(files, 2503);
        let kept = value(cluster, &keys::disk_claim("shared/web.raw")).await?.ok_or("no claim")?;
        assert_eq!(serde_json::from_slice::<DiskClaim>(&kept)?.vm_id, placement().vm_id);
        for key in [keys::node(NodeId(2)), keys::fenced(NodeId(2)), keys::HA_LEADER.to_owned()] {
            assert_eq!(value(cluster, &key).await?, None, "{key}");
        }
        let web: Name = "web".parse()?;
        let kept = value(cluster, &keys::placement(&web)).await?.ok_or("no placement")?;
        let kept: Placement = serde_json::from_slice(&kept)?;
        assert_eq!((kept.owner, kept.phase), (NodeId(1), Phase::Stopped));
        assert_eq!((kept.requested, kept.ha), (Requested::Stopped, true));
        assert_eq!((kept.start_failures, kept.retry_at_unix_ms), (0, None));
        assert!(kept.generation > Generation(100_000), "{}", kept.generation);
        assert!(kept.message.is_some_and(|message| message.contains("old cluster")));
        assert_eq!(kept.vm_id, placement().vm_id);
        Outcome::Ok(())
    };
    runtime.block_on(check(&cluster))?;
    // It lets a node in, and the copies are the same.
    let token = runtime.block_on(cluster.create_token(0))?.token;
    second.join(&token)?;
    let until = Instant::now() + LIMIT;
    loop {
        let found = runtime.block_on(cluster.verify())?;
        if found.members.len() == 2 && found.members.iter().all(|m| m.outcome == "same") {
            break;
        }
        assert!(Instant::now() < until, "{found:?}");
    }
    second.stop();
    // What was restored is there after a restart. Alone it has no quorum: two are needed now.
    runtime.block_on(cluster.shutdown());
    drop((cluster, runtime));
    second.start()?;
    let runtime = tokio::runtime::Runtime::new()?;
    let cluster = runtime.block_on(async {
        let Opened::Member(cluster) = open(config.clone()).await? else {
            return Err("it is no member".into());
        };
        serve(&cluster, &config).await?;
        Outcome::Ok(cluster)
    })?;
    runtime.block_on(check(&cluster))?;
    runtime.block_on(cluster.shutdown());
    Ok(())
}

#[test]
fn a_file_that_is_not_good_changes_nothing() -> Outcome {
    let header = Header {
        cluster_name: "prod".to_owned(),
        cluster_id: "c1".to_owned(),
        revision: 42,
        at_unix_ms: 1,
        node: "n1".to_owned(),
        agent_version: "0.1.0".to_owned(),
        about_bytes: 0,
    };
    let written = |rows: &[(&str, &[u8])]| -> Outcome<Vec<u8>> {
        let (mut writer, mut bytes) = Writer::begin(&header)?;
        for (key, value) in rows {
            bytes.extend(writer.row(key, value)?.unwrap_or_default());
        }
        bytes.extend(writer.finish());
        Ok(bytes)
    };
    let good = written(&[("cluster.toml", b"x = 1"), ("priv/ca", b"theirs")])?;
    let (mut wrong, mut newer) = (good.clone(), good.clone());
    let middle = wrong.len() - 70;
    wrong[middle] ^= 4;
    newer[8] = 7;
    let mut far = placement();
    far.generation = Generation(u64::MAX);
    let far = serde_json::to_vec(&far)?;
    let large = vec![0; (1 << 20) + 1];
    let cases: [(Vec<u8>, &str); 10] = [
        (Vec::new(), "cut off"),
        (good[..good.len() - 1].to_vec(), "cut off"),
        (wrong, "damaged"),
        (newer, "format 7"),
        (b"not one".to_vec(), "not a backup"),
        (written(&[("status/vms/web", b"{}")])?, "status/vms/web"),
        (written(&[("status/vms/Not a name", b"{}")])?, "not a valid name"),
        (written(&[("status/vms/web", &far)])?, "out of bounds"),
        (written(&[("a\nb", b"")])?, "control characters"),
        (written(&[("big", &large)])?, "1048577 bytes"),
    ];
    let folder = tempfile::tempdir()?;
    let config = test_config(&folder.path().join("r1"))?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let Opened::Fresh(fresh) = open(config.clone()).await? else {
            return Err("the folder is not fresh".into());
        };
        for (bytes, expected) in cases {
            let error = fresh.restore(file(&bytes)?, "", "r1").await.map(drop);
            let error = error.err().ok_or(format!("it was restored: {expected}"))?;
            let text = error.to_string();
            assert!(text.contains(expected) && text.contains("nothing was changed"), "{text}");
            let left: Vec<_> = std::fs::read_dir(&config.data_dir)?.flatten().collect();
            assert_eq!(left.len(), 1, "only the lock: {left:?}");
        }
        let named = fresh.restore(file(&good)?, "Not a name", "r1").await.map(drop);
        assert!(matches!(named, Err(RestoreError::Init(_))), "{named:?}");
        // The same folder takes a good one.
        let (cluster, restored) = fresh.restore(file(&good)?, "again", "r1").await?;
        assert_eq!((restored.keys, cluster.cluster_name()), (1, "again"));
        assert_eq!(value(&cluster, "cluster.toml").await?, Some(b"x = 1".to_vec()));
        // With a CA of its own: it lets nodes in.
        assert!(cluster.create_token(0).await.is_ok());
        cluster.shutdown().await;
        Outcome::Ok(())
    })
}

/// A member whose file of its identity got lost: a new cluster there would delete its database.
#[test]
fn what_is_left_of_a_member_is_not_overwritten() -> Outcome {
    let mut lab = Lab::new(1)?;
    lab.nodes[0].stop();
    lab.nodes[0].wait_closed();
    let folder = lab.nodes[0].config.data_dir.clone();
    // An attempt to join that came to nothing, before the cluster was made, excuses nothing.
    std::fs::write(folder.join("joining.key"), "left")?;
    lab.nodes[0].start()?;
    lab.nodes[0].stop();
    lab.nodes[0].wait_closed();
    let (there, away) = (folder.join("identity.json"), folder.join("away"));
    std::fs::rename(&there, &away)?;
    let refused = tokio::runtime::Runtime::new()?.block_on(open(lab.nodes[0].config.clone()));
    let text = refused.map(drop).err().ok_or("it was opened")?.to_string();
    assert!(text.contains("identity.json: is missing") && text.contains("put it back"), "{text}");
    std::fs::rename(&away, &there)?;
    lab.nodes[0].start()?;
    lab.leader().map(drop)
}
