//! How much there may be: the limits of `cluster.toml` on real members, and what churn leaves behind.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cluster::{Cluster, Consistency, StoreError, Txn, WatchError};
use proto::{Revision, keys};

use crate::common::{Lab, Outcome};

async fn settings(cluster: &Cluster, text: &str) -> Outcome {
    let txn = Txn::new().put(keys::CLUSTER_DOCUMENT, text);
    cluster.txn(txn).await?.committed().then_some(()).ok_or_else(|| "refused".into())
}

fn put(key: &str, size: usize) -> Txn {
    Txn::new().put(key, vec![7u8; size])
}

/// A write on one member: its error, if it was refused.
fn refusal(lab: &Lab, member: usize, txn: Txn) -> Outcome<Option<StoreError>> {
    lab.nodes[member].run(|c| async move { c.txn(txn).await.err() })
}

/// Waits until a file that is larger than this is refused; it is not there afterwards.
fn until_files_are_limited(lab: &Lab, member: usize, bytes: usize) -> Outcome {
    let tries = std::cell::Cell::new(bytes);
    lab.wait("the limit holds", |lab| {
        // One that is there may stay as large as it is.
        tries.set(tries.get() + 1);
        Ok(matches!(
            refusal(lab, member, put("large", tries.get()))?,
            Some(StoreError::TooLarge(_))
        ))
    })?;
    let gone = refusal(lab, member, Txn::new().delete("large"))?;
    gone.map_or(Ok(()), |error| Err(error.into()))
}

#[test]
fn the_settings_of_the_document_hold_on_every_member_and_for_the_next_leader() -> Outcome {
    let mut lab = Lab::new(3)?;
    let text = "[limits]\nlargest_file = \"2KiB\"\nfiles = 100\nfiles_size = \"1MiB\"\n";
    lab.nodes[0].run(move |c| async move { settings(&c, text).await })??;
    until_files_are_limited(&lab, 1, 2048)?;
    let full = |lab: &Lab, members: &[usize]| -> Outcome {
        for member in members {
            let large =
                refusal(lab, *member, put("large", 2049))?.ok_or("it was taken")?.to_string();
            assert!(large.contains("`large` has 2049 bytes; at most 2048"), "{large}");
            assert!(large.contains("explain cluster.limits"), "{large}");
            let many = (0..101).fold(Txn::new(), |txn, n| txn.put(format!("many/{n}"), ""));
            match refusal(lab, *member, many)? {
                Some(error @ StoreError::NoSpace { limit_keys: 100, .. }) => {
                    assert!(error.to_string().contains("explain cluster.limits"), "{error}");
                }
                other => return Err(format!("not refused for their number: {other:?}").into()),
            }
        }
        Ok(())
    };
    full(&lab, &[0, 1, 2])?;
    // Neither the next leader nor one that starts anew has an idea of its own, at no time.
    let leader = lab.leader()?;
    lab.nodes[leader].kill();
    let others: Vec<usize> = (0..3).filter(|member| *member != leader).collect();
    for _ in 0..20 {
        full(&lab, &others)?;
    }
    lab.nodes[leader].start()?;
    full(&lab, &[leader])?;
    // A limit that is raised takes what it refused; the system's records never counted.
    assert!(refusal(&lab, leader, put("status/x", 1 << 20))?.is_none());
    let text = "[limits]\nfiles_size = \"1MiB\"\n";
    lab.nodes[leader].run(move |c| async move { settings(&c, text).await })??;
    lab.wait("they are raised", |lab| Ok(refusal(lab, leader, put("large", 2049))?.is_none()))?;
    let half = |key: &str| put(key, 600 << 10);
    assert!(refusal(&lab, leader, half("one"))?.is_none());
    match refusal(&lab, leader, half("two"))? {
        Some(StoreError::NoSpace { limit_bytes: 1_048_576, .. }) => {}
        other => return Err(format!("not refused for their size: {other:?}").into()),
    }
    assert!(refusal(&lab, leader, Txn::new().delete("one"))?.is_none());
    assert!(refusal(&lab, leader, half("two"))?.is_none());
    Ok(())
}

/// A million small files, as far as their number may be tested: the limit answers, with its own
/// words, and long before that memory or time would be one.
#[test]
fn many_small_files_are_refused_at_the_limit_and_not_before() -> Outcome {
    let lab = Lab::new(1)?;
    let text = "[limits]\nfiles = 20000\nlargest_file = \"1KiB\"\n";
    lab.nodes[0].run(move |c| async move { settings(&c, text).await })??;
    until_files_are_limited(&lab, 0, 1024)?;
    lab.nodes[0].run(|c| async move {
        // The document itself.
        let (mut written, began) = (1u64, std::time::Instant::now());
        let refused = loop {
            let txn =
                (0..500).fold(Txn::new(), |txn, n| txn.put(format!("many/{written}-{n}"), ""));
            match c.txn(txn).await {
                Ok(_) => written += 500,
                Err(error) => break error,
            }
            assert!(written <= 20_000, "the setting does not hold");
        };
        println!("{written} files in {:?}", began.elapsed());
        assert!(written + 500 > 20_000, "refused at {written}");
        let StoreError::NoSpace { used_keys, limit_keys: 20_000, .. } = refused else {
            return Err(refused.into());
        };
        assert_eq!(used_keys, written);
        // Nothing of the refused transaction is there, and reads and deletes go on.
        let page = c.range_page("many/", "", 100, Consistency::Linearizable).await?;
        assert!(page.more && page.kvs.len() == 100);
        let delete = page.kvs.iter().fold(Txn::new(), |txn, kv| txn.delete(kv.key.clone()));
        assert!(c.txn(delete).await?.committed());
        Outcome::Ok(())
    })?
}

#[test]
fn each_limit_has_an_error_of_its_own() -> Outcome {
    let lab = Lab::with(1, |config| {
        config.limits.client_watches = 3;
        config.limits.client_requests_per_s = 5;
    })?;
    lab.nodes[0].run(|c| async move {
        let said = |error: StoreError| error.to_string();
        let large = said(c.txn(put("a", (1 << 20) + 1)).await.err().ok_or("taken")?);
        assert!(large.starts_with("too large: `a` has 1048577 bytes"), "{large}");
        let many = (0..10_000).fold(Txn::new(), |txn, n| txn.put(format!("f{n}"), "x"));
        let many = said(c.txn(many).await.err().ok_or("taken")?);
        assert!(many.contains("more than 8192 compares and writes"), "{many}");
        let whole = (0..4).fold(Txn::new(), |txn, n| txn.put(format!("f{n}"), vec![0; 1 << 20]));
        let whole = said(c.txn(whole).await.err().ok_or("taken")?);
        assert!(whole.contains("do it in parts"), "{whole}");
        let key = said(c.txn(put(&"k".repeat(1025), 1)).await.err().ok_or("taken")?);
        assert!(key.contains("1 to 1024 bytes"), "{key}");
        let watch = || c.watch_for_client("", Revision(0));
        let three = [watch()?, watch()?, watch()?];
        match watch().err() {
            Some(error @ WatchError::TooMany { limit: 3 }) => {
                assert!(error.to_string().contains("client_watches"), "{error}");
            }
            other => return Err(format!("a fourth watch: {other:?}").into()),
        }
        drop(three);
        drop(watch()?);
        let often = (0..20).find_map(|_| c.take_turn("ann").err()).ok_or("as often as it likes")?;
        assert!(said(often).contains("client_requests_per_s"));
        // Nothing of all that was written.
        let files = c.range("", "", 0, Consistency::Linearizable).await?.kvs;
        assert!(files.iter().all(|kv| kv.key.starts_with(keys::STATUS)), "{files:?}");
        Outcome::Ok(())
    })?
}

/// Set for the process that churns, which has a memory of its own.
const VARIABLE: &str = "HOLDFAST_CHURN";
const VALUE_BYTES: usize = 16 << 10;
const ROUNDS: u64 = 8;
const WRITES_A_ROUND: u64 = 4_000;

/// What is left at most once it has settled; all rounds write 1500 MiB (each write is in the log, and
/// twice in the tables). Most of what is left is the log's obsolete part, until it is compacted: that
/// takes its time beside other tests.
const DISK_MIB: u64 = 1100;

/// Memory of this process that is in use, bytes.
fn resident() -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib << 10)
}

/// What a folder takes on the disk, bytes.
fn on_disk(folder: &Path) -> Outcome<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)?.flatten() {
        // What RocksDB removed meanwhile is gone.
        let Ok(metadata) = entry.metadata() else { continue };
        bytes += if metadata.is_dir() { on_disk(&entry.path())? } else { metadata.blocks() * 512 };
    }
    Ok(bytes)
}

/// Overwrites few keys, of people's and of the system's, many at a time.
async fn churn(cluster: &Cluster, round: u64) -> Outcome {
    let writers = (0..40u64).map(|writer| {
        let cluster = cluster.clone();
        tokio::spawn(async move {
            for number in 0..WRITES_A_ROUND / 40 {
                // Nothing that a compressor makes small.
                let mut seed = (round << 40) | (writer << 20) | number | 1;
                let value: Vec<u8> = std::iter::repeat_with(|| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    seed.to_le_bytes()[3]
                })
                .take(VALUE_BYTES)
                .collect();
                let key = ["vms/a.toml", "notes/b", "status/c"][usize::try_from(number % 3)?];
                cluster.txn(Txn::new().put(key, value)).await?;
            }
            Outcome::Ok(())
        })
    });
    for writer in futures::future::join_all(writers).await {
        writer??;
    }
    Ok(())
}

/// Not a test by itself: what the one below runs.
#[test]
fn child_that_churns() -> Outcome {
    if std::env::var(VARIABLE).is_err() {
        return Ok(());
    }
    let lab = Lab::with(1, |config| {
        config.retention.file_versions = 20;
        config.retention.file_age = Duration::ZERO;
        config.retention.system_revisions = 200;
        config.snapshot_every = 1000;
        config.snapshot_keep = 200;
    })?;
    let mut seen = Vec::new();
    for round in 0..ROUNDS {
        lab.nodes[0].run(move |c| async move { churn(&c, round).await })??;
        let folder = lab.nodes[0].folder.clone();
        // What is obsolete goes in the background.
        let settled = Instant::now() + Duration::from_secs(20);
        while on_disk(&folder)? >> 20 > DISK_MIB && Instant::now() < settled {
            std::thread::sleep(Duration::from_millis(100));
        }
        seen.push((on_disk(&folder)? >> 20, resident()? >> 20));
        println!("after {} writes: {seen:?} MiB on disk, in memory", (round + 1) * WRITES_A_ROUND);
    }
    let memory = |round: usize| seen.get(round).map_or(0, |one| one.1);
    let last = seen.len() - 1;
    assert!(seen.iter().all(|one| one.0 <= DISK_MIB), "the database grows: {seen:?}");
    assert!(memory(last) < memory(1) + 128, "the process grows: {seen:?}");
    Ok(())
}

#[test]
fn churn_leaves_the_database_and_the_process_as_large_as_they_were() -> Outcome {
    let mut child = Command::new(std::env::current_exe()?);
    child.args(["--exact", "limits::child_that_churns", "--nocapture"]).env(VARIABLE, "1");
    let output = child.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    print!("{said}");
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("1 passed"), "it did not run: {said}");
    Ok(())
}
