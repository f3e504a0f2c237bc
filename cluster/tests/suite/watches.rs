//! Watches: many at once, slow ones, those that come back, those that come too late.

use std::time::Duration;

use crate::common::{LIMIT, Lab, Outcome};
use cluster::{Cluster, Txn, WatchBatch, WatchError, WatchEvent};
use futures::StreamExt;
use futures::stream::BoxStream;
use proto::Revision;

type Batches = BoxStream<'static, Result<WatchBatch, WatchError>>;

async fn write(cluster: &Cluster, prefix: &str, count: u64) -> Outcome<Revision> {
    let mut last = Revision(0);
    for n in 0..count {
        let txn = Txn::new().put(format!("{prefix}{:03}", n % 10), n.to_string());
        last = cluster.txn(txn).await?.revision();
    }
    Ok(last)
}

/// What a watch says up to a revision: revision, key, value.
async fn read_to(watch: &mut Batches, last: Revision) -> Outcome<Vec<(u64, String, String)>> {
    let mut seen = Vec::new();
    loop {
        let batch = tokio::time::timeout(LIMIT, watch.next()).await?.ok_or("it ended")??;
        for event in batch.events {
            let WatchEvent::Put(kv) = event else { return Err("nothing was deleted".into()) };
            assert_eq!(kv.mod_revision, batch.revision);
            seen.push((batch.revision.0, kv.key, String::from_utf8(kv.value)?));
        }
        if batch.revision >= last {
            return Ok(seen);
        }
    }
}

fn exactly(seen: &[(u64, String, String)], count: u64) {
    assert!(seen.windows(2).all(|pair| pair[0].0 < pair[1].0), "out of order");
    let values: Vec<u64> = seen.iter().filter_map(|one| one.2.parse().ok()).collect();
    assert_eq!(values, (0..count).collect::<Vec<_>>());
}

#[test]
fn a_thousand_watchers_each_see_everything_once_in_order() -> Outcome {
    let lab = Lab::with(1, |config| config.limits.client_watches = 1000)?;
    lab.nodes[0].run(|c| async move {
        let watches: Result<Vec<_>, _> =
            (0..1000).map(|_| c.watch_for_client("status/w/", Revision(0))).collect();
        let mut watches = watches?;
        let more = c.watch_for_client("status/w/", Revision(0)).err();
        assert!(matches!(more, Some(WatchError::TooMany { limit: 1000 })), "{more:?}");
        let began = std::time::Instant::now();
        let last = write(&c, "status/w/", 100).await?;
        let readers = watches
            .drain(..)
            .map(|mut watch| tokio::spawn(async move { read_to(&mut watch, last).await }));
        for reader in futures::future::join_all(readers).await {
            exactly(&reader??, 100);
        }
        println!("100 changes to 1000 watchers in {:?}", began.elapsed());
        // Those that ended made room.
        drop(c.watch_for_client("status/w/", Revision(0))?);
        Outcome::Ok(())
    })?
}

#[test]
fn a_slow_watcher_reads_on_in_the_history_and_one_that_is_too_slow_is_told() -> Outcome {
    let lab = Lab::with(1, |config| config.retention.system_revisions = 4000)?;
    lab.nodes[0].run(|c| async move {
        let mut slow = c.watch("status/w/", Revision(0))?;
        let mut files = c.watch("w/", Revision(0))?;
        // More than is in memory.
        let mut last = Revision(0);
        for round in 0..50u64 {
            let writes = (0..60u64).map(|n| {
                let (c, value) = (c.clone(), (round * 60 + n).to_string());
                tokio::spawn(async move {
                    let txn = Txn::new().put("status/w/x", value.clone()).put("w/x", value);
                    c.txn(txn).await.map(|outcome| outcome.revision())
                })
            });
            for revision in futures::future::join_all(writes).await {
                last = last.max(revision??);
            }
        }
        let seen = read_to(&mut slow, last).await?;
        assert_eq!(seen.len(), 3000);
        assert!(seen.windows(2).all(|pair| pair[0].0 < pair[1].0), "out of order, or doubled");
        let of_files = read_to(&mut files, last).await?;
        assert!(seen.iter().map(|one| (one.0, &one.2)).eq(of_files.iter().map(|o| (o.0, &o.2))));
        Outcome::Ok(())
    })??;
    let lab = Lab::with(1, |config| config.retention.system_revisions = 10)?;
    let mut late = lab.nodes[0].cluster()?.watch("status/w/", Revision(0))?;
    let first = lab.nodes[0].run(|c| async move {
        let first = c.range("status/", "", 0, cluster::Consistency::Linearizable).await?.revision;
        write(&c, "status/w/", 200).await?;
        Outcome::Ok(first)
    })??;
    lab.wait("its beginning is compacted", |lab| {
        let again = lab.nodes[0].cluster()?.watch("status/w/", Revision(first.0 + 1));
        Ok(matches!(again, Err(WatchError::Compacted(_))))
    })?;
    lab.nodes[0].run(move |c| async move {
        let told = loop {
            match tokio::time::timeout(LIMIT, late.next()).await? {
                Some(Ok(_)) => {}
                Some(Err(error)) => break error,
                None => return Err("it ended without a word".into()),
            }
        };
        let WatchError::Compacted(compacted) = told else { return Err(told.into()) };
        assert!(compacted.asked < compacted.oldest, "{compacted:?}");
        assert!(late.next().await.is_none(), "it went on after its error");
        // What it is told to do works.
        let now = c.range("status/w/", "", 0, cluster::Consistency::Linearizable).await?;
        assert_eq!(now.kvs.len(), 10);
        let mut again = c.watch("status/w/", Revision(now.revision.0 + 1))?;
        let last = write(&c, "status/w/", 5).await?;
        exactly(&read_to(&mut again, last).await?, 5);
        Outcome::Ok(())
    })?
}

#[test]
fn a_watch_goes_on_at_another_member_without_loss_or_doubling() -> Outcome {
    let mut lab = Lab::new(3)?;
    let mut seen: Vec<(u64, String, String)> = Vec::new();
    let mut next = Revision(1);
    let mut written = 0u64;
    for round in 0..3 {
        let leader = lab.leader()?;
        // At another member each time, and the leader dies in between.
        let at = (leader + 1 + round % 2) % 3;
        let mut watch = lab.nodes[at].cluster()?.watch("w/", next)?;
        let (from, to) = (written, written + 30);
        let got = lab.nodes[at].run(move |c| async move {
            let mut last = Revision(0);
            for n in from..to {
                last = c.txn(Txn::new().put("w/x", n.to_string())).await?.revision();
            }
            read_to(&mut watch, last).await
        })??;
        written = to;
        next = Revision(got.last().ok_or("nothing was seen")?.0 + 1);
        seen.extend(got);
        lab.nodes[leader].kill();
        lab.nodes[leader].start()?;
    }
    exactly(&seen, written);
    Ok(())
}

#[test]
fn a_watch_of_a_client_hears_how_far_it_is() -> Outcome {
    let lab = Lab::with(1, |config| {
        config.limits.watch_progress = Duration::from_millis(100);
    })?;
    lab.nodes[0].run(|c| async move {
        let mut watch = c.watch_for_client("quiet/", Revision(0))?;
        let last = write(&c, "loud/", 20).await?;
        let mut heard = Revision(0);
        while heard < last {
            let batch = tokio::time::timeout(LIMIT, watch.next()).await?.ok_or("it ended")??;
            assert!(batch.events.is_empty() && batch.revision > heard, "{batch:?}");
            heard = batch.revision;
        }
        // From there it goes on, and nothing is lost.
        drop(watch);
        let mut watch = c.watch_for_client("quiet/", Revision(heard.0 + 1))?;
        let last = write(&c, "quiet/", 3).await?;
        exactly(&read_to(&mut watch, last).await?, 3);
        Outcome::Ok(())
    })?
}
