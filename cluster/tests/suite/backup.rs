//! Backups of real members.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cluster::{Cluster, Consistency, StoreError, Txn};
use futures::StreamExt;
use proto::backup::{Header, Reader};

use crate::common::{LIMIT, Lab, Outcome};

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

#[test]
fn a_backup_is_one_moment_while_others_write() -> Outcome {
    let lab = Lab::new(3)?;
    let (ends, writer) = (Arc::new(AtomicBool::new(false)), lab.nodes[0].cluster()?);
    let stop = ends.clone();
    let writing = std::thread::spawn(move || -> Outcome<u64> {
        let runtime = tokio::runtime::Runtime::new()?;
        let mut written = 0u64;
        while !stop.load(Ordering::SeqCst) {
            written += 1;
            // Far apart in the order of keys, and with much between them.
            let text = written.to_string();
            let txn = Txn::new().put("a", text.as_str()).put("z", text.as_str());
            let txn = txn.put(format!("vms/{:03}.toml", written % 200), vec![1; 20_000]);
            runtime.block_on(writer.txn(txn))?;
        }
        Ok(written)
    });
    let mut last = 0;
    for turn in 0..9 {
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
    let written = writing.join().map_err(|_| "the writer panicked")??;
    assert!(written > 20 && last > 20, "{written} written");
    Ok(())
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
    let ended = lab.nodes[0].run(|c| async move {
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
        let mut last = None;
        while let Some(piece) = slow.next().await {
            last = Some(piece);
        }
        assert!(took < Duration::from_secs(10), "the end took {took:?}");
        Outcome::Ok(last)
    })??;
    // What came is no whole backup, and says so.
    assert!(matches!(ended, Some(Err(StoreError::Failed { .. })) | Some(Ok(_))), "{ended:?}");
    lab.nodes[0].kill();
    lab.nodes[0].start()?;
    let bytes =
        lab.nodes[0].run(|c| async move { taken(&c, Consistency::Linearizable).await })??;
    assert_eq!(read(&bytes)?.1["f0"], b"new");
    Ok(())
}
