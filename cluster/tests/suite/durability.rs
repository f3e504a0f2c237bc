//! What was acknowledged outlives SIGKILL. The test runs itself again as the process that is killed.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use crate::common::Outcome;
use cluster::{ClusterConfig, Consistency, Opened, Txn, open};

const FOLDER: &str = "HOLDFAST_TEST_FOLDER";

fn config(folder: &str) -> ClusterConfig {
    // Alone: nobody dials it.
    ClusterConfig::new(folder.into(), "127.0.0.1:9".to_owned(), "127.0.0.1:9".to_owned())
}

/// The child's part: writes until it is killed, and says which writes were acknowledged.
#[test]
fn child_writes_until_it_is_killed() -> Outcome {
    let Ok(folder) = std::env::var(FOLDER) else { return Ok(()) };
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async move {
        let cluster = match open(config(&folder)).await? {
            Opened::Fresh(fresh) => fresh.init("test", "n1").await?,
            Opened::Member(cluster) => cluster,
        };
        let run = std::process::id();
        for count in 0u64.. {
            let key = format!("k/{run}/{count:08}");
            cluster.txn(Txn::new().if_absent(key.as_str()).put(key.as_str(), "v")).await?;
            eprintln!("acknowledged {key}");
        }
        Ok(())
    })
}

#[test]
fn acknowledged_writes_outlive_sigkill() -> Outcome {
    let temporary = tempfile::tempdir()?;
    let folder = temporary.path().join("n1").display().to_string();
    let mut acknowledged = Vec::new();
    for round in 0..3 {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--exact", "durability::child_writes_until_it_is_killed", "--nocapture"])
            .env(FOLDER, &folder)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut lines = BufReader::new(child.stderr.take().ok_or("no stderr")?).lines();
        let wanted = 50 + round * 37;
        let mut seen = 0;
        for line in lines.by_ref() {
            if let Some(key) = line?.strip_prefix("acknowledged ") {
                acknowledged.push(key.to_owned());
                seen += 1;
            }
            if seen == wanted {
                break;
            }
        }
        assert_eq!(seen, wanted, "the child ended by itself");
        child.kill()?;
        child.wait()?;
        // What it still said before it died counts as well.
        for line in lines.map_while(Result::ok) {
            if let Some(key) = line.strip_prefix("acknowledged ") {
                acknowledged.push(key.to_owned());
            }
        }
    }
    let runtime = tokio::runtime::Runtime::new()?;
    let found = runtime.block_on(async move {
        let Opened::Member(cluster) = open(config(&folder)).await? else {
            return Err("not a member".into());
        };
        let found = cluster.range("k/", "", 0, Consistency::Linearizable).await?;
        cluster.shutdown().await;
        Outcome::Ok(found)
    })?;
    let found: std::collections::BTreeSet<_> = found.kvs.into_iter().map(|kv| kv.key).collect();
    for key in &acknowledged {
        assert!(found.contains(key), "{key} was acknowledged and is gone");
    }
    Ok(())
}
