//! Closing by itself: a real store, no mount, and a writer that commits when it is told to.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::poll;
use proto::Revision;
use tempfile::TempDir;
use tokio::sync::{Semaphore, watch};

use super::files::Opening;
use super::follow;
use super::state::{Caller, Tree};
use crate::{
    Cluster, ClusterConfig, Consistency, FileChange, FileRefused, FileWriter, Opened, Txn,
};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

const ROOT: Caller = Caller { uid: 0, pid: 1 };
const EMPTY_IT: Opening = Opening { write: true, append: false, truncate: true, exclusive: false };
const WRITE: Opening = Opening { truncate: false, ..EMPTY_IT };
const LIMIT: Duration = Duration::from_secs(20);

/// Commits one time for each permit. What holds `BAD` is refused.
struct Gated {
    cluster: Cluster,
    permits: Semaphore,
    /// Commits that have come to the gate.
    came: watch::Sender<usize>,
}

#[async_trait]
impl FileWriter for Gated {
    async fn commit(
        &self,
        changes: Vec<FileChange>,
        author: &str,
    ) -> Result<Revision, FileRefused> {
        self.came.send_modify(|came| *came += 1);
        self.permits.acquire().await.map_err(|e| FileRefused::Busy(e.to_string()))?.forget();
        let mut txn = Txn::new().by(author);
        for change in changes {
            txn = match change.content {
                Some(content) if content.starts_with(b"BAD") => {
                    let (path, reason) = (change.path, "BAD".to_owned());
                    return Err(FileRefused::Invalid { path, reason, line: None, column: None });
                }
                Some(content) => txn.put(change.path, content),
                None => txn.delete(change.path),
            };
        }
        let done = self.cluster.txn(txn).await;
        done.map(|done| done.revision()).map_err(|error| FileRefused::Busy(error.to_string()))
    }
}

struct Rig {
    tree: Arc<Tree>,
    writer: Arc<Gated>,
    cluster: Cluster,
    inode: u64,
    _folder: TempDir,
}

impl Rig {
    /// With the file `f`.
    async fn new() -> Outcome<Self> {
        let folder = tempfile::tempdir()?;
        let nowhere = || "127.0.0.1:1".to_owned();
        let config = ClusterConfig::new(folder.path().join("n1"), nowhere(), nowhere());
        let Opened::Fresh(fresh) = crate::open(config).await? else {
            return Err("the folder is not fresh".into());
        };
        let cluster = fresh.init("test", "n1").await?;
        cluster.txn(Txn::new().put("f", "hello world")).await?;
        let (permits, came) = (Semaphore::new(0), watch::channel(0).0);
        let writer = Arc::new(Gated { cluster: cluster.clone(), permits, came });
        let tree = Arc::new(Tree::new(cluster.clone(), cluster.node().clone(), writer.clone()));
        tokio::spawn(follow::follow(tree.clone()));
        let mut applied = tree.applied.subscribe();
        tokio::time::timeout(LIMIT, applied.wait_for(|revision| *revision > 0)).await??;
        let inode = tree.lock().names.resolve("f").ok_or("no such file")?;
        Ok(Self { tree, writer, cluster, inode, _folder: folder })
    }

    /// Waits until so many commits have come to the gate.
    async fn came(&self, count: usize) -> Outcome {
        let mut came = self.writer.came.subscribe();
        tokio::time::timeout(LIMIT, came.wait_for(|came| *came >= count)).await??;
        Ok(())
    }

    /// Size by the names in memory.
    fn size(&self) -> Outcome<u64> {
        Ok(self.tree.lock().names.file(self.inode)?.size())
    }

    async fn stored(&self) -> Outcome<Vec<u8>> {
        let (kv, _) = self.cluster.get("f", Consistency::Linearizable).await?;
        Ok(kv.ok_or("gone")?.value)
    }

    /// Begins to close what was only emptied, up to the commit that this takes.
    async fn close_emptied(&self) -> Outcome<tokio::task::JoinHandle<()>> {
        let handle = self.tree.open(self.inode, EMPTY_IT, ROOT).await?;
        let tree = self.tree.clone();
        let closing = tokio::spawn(async move { tree.release(handle, ROOT).await });
        self.came(1).await?;
        Ok(closing)
    }
}

/// The close saves in the background and succeeds; what was changed meanwhile is not saved yet, and
/// is somebody else's to save. It was taken for what a failed save had left, and dropped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_close_leaves_a_truncation_that_came_meanwhile_to_its_maker() -> Outcome {
    let rig = Rig::new().await?;
    let closing = rig.close_emptied().await?;
    // Whoever has the turn after the close holds up the truncation, which comes third.
    let mut turn = Box::pin(rig.tree.in_order(rig.inode));
    assert!(poll!(&mut turn).is_pending());
    let mut truncating = Box::pin(rig.tree.truncate(rig.inode, None, 5, ROOT));
    assert!(poll!(&mut truncating).is_pending());
    assert_eq!(rig.size()?, 5);
    rig.writer.permits.add_permits(2);
    let turn = turn.await;
    closing.await?;
    assert_eq!(rig.stored().await?, b"", "what was closed is saved");
    assert_eq!(rig.size()?, 5, "and the truncation is still to be saved");
    drop(turn);
    truncating.await?;
    assert_eq!(rig.stored().await?, [0; 5]);
    Ok(())
}

/// The same with a close whose save is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_close_leaves_what_others_changed_to_them() -> Outcome {
    let rig = Rig::new().await?;
    let bad = rig.tree.open(rig.inode, EMPTY_IT, ROOT).await?;
    rig.tree.write(bad, 0, b"BAD")?;
    let mut closing = Box::pin(async {
        let refused = rig.tree.flush(bad, ROOT, false).await;
        rig.tree.release(bad, ROOT).await;
        refused
    });
    assert!(poll!(&mut closing).is_pending());
    rig.came(1).await?;
    let good = rig.tree.open(rig.inode, WRITE, ROOT).await?;
    rig.tree.write(good, 0, b"GOOD")?;
    rig.writer.permits.add_permits(1);
    assert_eq!(closing.await, Err(nix::errno::Errno::EINVAL));
    assert_eq!(rig.stored().await?, b"hello world");
    rig.writer.permits.add_permits(1);
    rig.tree.flush(good, ROOT, false).await?;
    rig.tree.release(good, ROOT).await;
    assert_eq!(rig.stored().await?, b"GOOD");
    Ok(())
}

/// Two that only emptied the file: the one that closes first leaves it to the other, whose save
/// is refused by then for good; nothing unsaved is shown afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_is_left_to_save_is_given_up() -> Outcome {
    let rig = Rig::new().await?;
    let reader = Opening { write: false, ..WRITE };
    let reader = rig.tree.open(rig.inode, reader, ROOT).await?;
    let both = [
        rig.tree.open(rig.inode, WRITE, ROOT).await?,
        rig.tree.open(rig.inode, WRITE, ROOT).await?,
    ];
    rig.tree.write(both[0], 0, b"BAD")?;
    // More than it takes.
    rig.writer.permits.add_permits(10);
    for handle in both {
        rig.tree.release(handle, ROOT).await;
    }
    assert_eq!(*rig.writer.came.borrow(), 1, "what is refused is not tried again by itself");
    assert_eq!(rig.tree.read(reader, 0, 100)?, b"hello world");
    assert_eq!(rig.stored().await?, b"hello world");
    Ok(())
}

/// A save that a truncation came into, of two that were left to the last one to close.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_to_close_saves_what_was_left_to_it() -> Outcome {
    let rig = Rig::new().await?;
    let other = rig.tree.open(rig.inode, WRITE, ROOT).await?;
    let last = rig.tree.open(rig.inode, EMPTY_IT, ROOT).await?;
    rig.tree.release(other, ROOT).await;
    let tree = rig.tree.clone();
    let closing = tokio::spawn(async move { tree.release(last, ROOT).await });
    rig.came(1).await?;
    // Opened, emptied, written to and closed without a save of its own: left to the one above.
    let third = rig.tree.open(rig.inode, EMPTY_IT, ROOT).await?;
    rig.tree.write(third, 0, b"left")?;
    rig.tree.release(third, ROOT).await;
    rig.writer.permits.add_permits(2);
    closing.await?;
    assert_eq!(rig.stored().await?, b"left");
    Ok(())
}
