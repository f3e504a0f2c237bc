//! Who changed what when, and what was then: on real members, through compaction.

use std::time::Duration;

use crate::common::{Lab, Outcome};
use cluster::{Change, Cluster, ReadAtError, StoreError, Txn};
use proto::{Revision, keys};

async fn put(cluster: &Cluster, key: &str, value: &str, author: &str) -> Outcome<Revision> {
    let txn = Txn::new().put(key, value).by(author);
    Ok(cluster.txn(txn).await?.revision())
}

/// All changes, page by page.
async fn all(cluster: &Cluster, prefix: &str, exact: bool) -> Outcome<Vec<Change>> {
    let (mut found, mut before) = (Vec::new(), Revision(0));
    loop {
        let page = cluster.history(prefix, exact, before, 3).await?;
        found.extend(page.changes);
        match page.next_before {
            Some(next) => before = next,
            None => return Ok(found),
        }
    }
}

#[test]
fn every_member_knows_who_changed_what_and_when() -> Outcome {
    let lab = Lab::new(3)?;
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let began = u64::try_from(now()?.as_millis())?;
    let cluster = lab.nodes[0].cluster()?;
    let (first, second, gone) = lab.nodes[0].run(move |c| async move {
        let first = put(&c, "vms/a.toml", "1", "ann").await?;
        let second = put(&c, "vms/a.toml", "2", "bob").await?;
        put(&c, "networks.toml", "x", "").await?;
        let both = Txn::new().delete("vms/a.toml").put("vms/b.toml", "3").by("carl");
        Outcome::Ok((first, second, c.txn(both).await?.revision()))
    })??;
    let ended = u64::try_from(now()?.as_millis())?;
    for node in &lab.nodes {
        let changes = node.run(|c| async move { all(&c, "vms/", false).await })??;
        let seen: Vec<_> =
            changes.iter().map(|c| (c.revision, c.path.as_str(), c.author.as_str())).collect();
        assert_eq!(
            seen,
            [
                (gone, "vms/b.toml", "carl"),
                (gone, "vms/a.toml", "carl"),
                (second, "vms/a.toml", "bob"),
                (first, "vms/a.toml", "ann"),
            ]
        );
        assert!(changes.iter().all(|c| (began..=ended).contains(&c.at_ms)), "{changes:?}");
        let of_a = node.run(|c| async move { all(&c, "vms/a.toml", true).await })??;
        assert_eq!(of_a, changes[1..]);
        assert_eq!(of_a[0].content, None);
        assert_eq!(of_a[0].previous_revision, second);
        let (was, range) = node.run(move |c| async move {
            let was = c.get_at("vms/a.toml", of_a[0].previous_revision).await?;
            Outcome::Ok((was, c.range_at("", "", 0, second).await?))
        })??;
        assert_eq!(was.map(|kv| kv.value), Some(b"2".to_vec()));
        let people: Vec<_> =
            range.kvs.iter().filter(|kv| !kv.key.starts_with(keys::STATUS)).collect();
        let keys: Vec<_> = people.iter().map(|kv| kv.key.as_str()).collect();
        assert_eq!(keys, ["vms/a.toml"]);
        assert_eq!(people[0].mod_revision, second);
        let nameless = node.run(|c| async move { all(&c, "networks.toml", true).await })??;
        assert_eq!(nameless[0].author, "node n1");
    }
    let secret =
        lab.nodes[1].run(|c| async move { c.history("priv/ca", true, Revision(0), 0).await })?;
    assert!(matches!(secret, Err(StoreError::Private(_))), "{secret:?}");
    let all = lab.nodes[1].run(|c| async move { all(&c, "", false).await })??;
    assert!(all.iter().all(|change| !change.path.starts_with("priv/")), "{all:?}");
    let future = lab.nodes[2]
        .run(move |c| async move { c.get_at("vms/a.toml", Revision(gone.0 + 1)).await })?;
    assert!(matches!(future, Err(ReadAtError::Future { .. })), "{future:?}");
    drop(cluster);
    Ok(())
}

#[test]
fn the_systems_churn_does_not_push_out_peoples_history() -> Outcome {
    let lab = Lab::with(1, |config| {
        config.retention.system_revisions = 20;
        config.retention.file_versions = 3;
        config.retention.file_age = Duration::from_secs(3600);
    })?;
    let first = lab.nodes[0].run(|c| async move {
        let first = put(&c, "vms/a.toml", "0", "ann").await?;
        for n in 1..10 {
            put(&c, "vms/a.toml", &n.to_string(), "ann").await?;
        }
        for n in 0..200 {
            put(&c, "status/vms/a", &n.to_string(), "").await?;
        }
        Outcome::Ok(first)
    })??;
    lab.wait("the churn is swept", |lab| {
        lab.nodes[0].run(|c| async move {
            Ok(all(&c, "status/vms/a", true).await?.len() <= 42
                && matches!(c.get_at("status/vms/a", first).await, Err(ReadAtError::Compacted(_))))
        })?
    })?;
    lab.nodes[0].run(move |c| async move {
        let kept = all(&c, "vms/a.toml", true).await?;
        assert_eq!(kept.len(), 10, "younger than an hour");
        let was = c.get_at("vms/a.toml", first).await?.ok_or("it is gone")?;
        assert_eq!(was.value, b"0");
        Outcome::Ok(())
    })?
}

#[test]
fn old_versions_go_by_age_but_the_last_ones_of_each_file_stay() -> Outcome {
    let lab = Lab::with(1, |config| {
        config.retention.file_versions = 3;
        config.retention.file_age = Duration::ZERO;
    })?;
    lab.nodes[0].run(|c| async move {
        for n in 0..10 {
            put(&c, "vms/often.toml", &n.to_string(), "ann").await?;
        }
        put(&c, "vms/seldom.toml", "x", "bob").await?;
        put(&c, "vms/gone.toml", "x", "bob").await?;
        c.txn(Txn::new().delete("vms/gone.toml").by("bob")).await?;
        put(&c, "last", "x", "bob").await
    })??;
    lab.wait("it is swept", |lab| {
        lab.nodes[0].run(|c| async move {
            let paths: Vec<_> =
                all(&c, "vms/", false).await?.into_iter().map(|change| change.path).collect();
            Ok(paths == ["vms/seldom.toml", "vms/often.toml", "vms/often.toml", "vms/often.toml"])
        })?
    })
}

#[test]
fn what_is_too_much_is_refused_in_words_that_help() -> Outcome {
    let lab = Lab::with(1, |config| {
        config.limits.file_bytes = 4 << 20;
        config.limits.client_requests_per_s = 5;
    })?;
    lab.nodes[0].run(|c| async move {
        let put = |key: &str, size: usize| Txn::new().put(key, vec![7u8; size]);
        let large = c.txn(put("big", (1 << 20) + 1)).await;
        assert!(matches!(large, Err(StoreError::TooLarge(_))), "{large:?}");
        // The leader sets the limits within its first second.
        let refused = loop {
            for n in 0..4 {
                c.txn(Txn::new().delete(format!("f{n}"))).await?;
            }
            let mut outcome = Ok(());
            for n in 0..4 {
                outcome = outcome.and(c.txn(put(&format!("f{n}"), 1 << 20)).await.map(|_| ()));
            }
            match outcome {
                Ok(()) => tokio::time::sleep(Duration::from_millis(50)).await,
                Err(error) => break error,
            }
        };
        assert!(matches!(refused, StoreError::NoSpace { .. }), "{refused:?}");
        assert!(refused.to_string().contains("delete"), "{refused}");
        assert!(c.txn(put("status/x", 1 << 20)).await?.committed());
        assert!(c.txn(put("status/y", 1 << 20)).await?.committed());
        assert!(c.txn(Txn::new().delete("f0")).await?.committed());
        assert!(c.txn(put("f0", 100)).await?.committed());
        // A page for clients is no larger than a message.
        let range = c.range_page("", "", 0, cluster::Consistency::Linearizable).await?;
        assert!(range.more && range.kvs.len() >= 3, "{} keys", range.kvs.len());
        let refused = (0..20).find_map(|_| c.take_turn("ann").err());
        let Some(refused @ StoreError::TooOften { .. }) = refused else {
            return Err("it may ask as often as it likes".into());
        };
        assert!(refused.to_string().contains("wait"), "{refused}");
        c.take_turn("bob")?;
        Outcome::Ok(())
    })?
}

#[test]
fn versions_that_take_too_much_go_before_their_age_but_not_the_last_ones() -> Outcome {
    let lab = Lab::with(1, |config| {
        config.retention.file_versions = 1;
        config.retention.file_history_bytes = 10_000;
    })?;
    let last = lab.nodes[0].run(|c| async move {
        let mut last = Revision(0);
        for _ in 0..30 {
            let writes = (0..50u64).map(|n| {
                let c = c.clone();
                tokio::spawn(async move { c.txn(Txn::new().put("a", n.to_string())).await })
            });
            for written in futures::future::join_all(writes).await {
                last = last.max(written??.revision());
            }
        }
        Outcome::Ok(last)
    })??;
    let at = |revision: u64| {
        lab.nodes[0].run(move |c| async move { c.get_at("a", Revision(revision)).await })
    };
    let first = last.0 - 1490;
    lab.wait("the first ones are gone", |_| {
        Ok(matches!(at(first)?, Err(ReadAtError::Compacted(_))))
    })?;
    // The floor has come as far as it comes when this one is gone, too.
    lab.wait("all old ones are gone", |_| {
        Ok(matches!(at(last.0 - 1030)?, Err(ReadAtError::Compacted(_))))
    })?;
    assert!(at(last.0 - 1000)??.is_some());
    Ok(())
}
