//! Mounting and unmounting.
//!
//! The kernel ends a connection with the process that held it: what is left of a killed agent is
//! a mount whose every use fails at once with `ENOTCONN`, never one that hangs. The next start
//! takes it away.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fuser::{Config, Session, SessionACL};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tokio::runtime::Handle as Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::follow;
use super::shell::Shell;
use super::state::Tree;
use crate::{Cluster, FileWriter};

/// What the mount is called in `/proc/mounts`.
const SOURCE: &str = "holdfast";
/// The kernel's interface.
const DEVICE: &str = "/dev/fuse";
/// Threads that read requests. They wait for nothing.
const THREADS: usize = 2;
/// How long a look at the mount point may take: what is mounted there may hang.
const LOOK_LIMIT: Duration = Duration::from_secs(3);
/// Remains of killed predecessors that are taken away, one upon the other.
const REMAINS_MAX: usize = 64;

/// Where the tree is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeConfig {
    /// An empty folder, made where it is missing.
    pub mount: PathBuf,
}

/// Why the tree was not mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// Only root mounts.
    #[error("mounting needs root; run the agent as root, or set `mount = \"off\"` under [tree]")]
    NotRoot,
    /// The kernel has no FUSE, or this process may not use it.
    #[error(
        "{DEVICE} cannot be used: {0}; load the module `fuse`, or set `mount = \"off\"` under [tree]"
    )]
    NoFuse(#[source] io::Error),
    /// Another agent's mount, alive.
    #[error(
        "{} is in use by another agent's tree; give each agent a mount point of its own", .0.display()
    )]
    InUse(PathBuf),
    /// Something there does not answer.
    #[error("{} does not answer within {LOOK_LIMIT:?}; unmount what hangs there (`umount -l`)", .0.display())]
    Hangs(PathBuf),
    /// The system refused.
    #[error("cannot mount the tree at {}: {source}", path.display())]
    Io {
        /// The mount point.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The mounted tree, until it is dropped.
pub struct Mount {
    path: PathBuf,
    tree: Arc<Tree>,
    tasks: Vec<JoinHandle<()>>,
    ended: watch::Receiver<bool>,
}

impl std::fmt::Debug for Mount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mount").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Mount {
    /// Reads the names, then mounts. Waits while this node cannot read its store (it caught up
    /// with nobody since a power loss).
    ///
    /// # Errors
    /// [`MountError`]
    pub async fn start(
        cluster: Cluster,
        writer: Arc<dyn FileWriter>,
        config: TreeConfig,
    ) -> Result<Self, MountError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(MountError::NotRoot);
        }
        let device = File::options().read(true).write(true).open(DEVICE);
        let device = device.map_err(MountError::NoFuse)?;
        let path = prepare(&config.mount).await?;
        let node = cluster.node().clone();
        let tree = Arc::new(Tree::new(cluster, node, writer));
        let tasks = vec![
            tokio::spawn(follow::follow(tree.clone())),
            tokio::spawn(tree.quorum.clone().follow(tree.source.clone())),
        ];
        let (ends, ended) = watch::channel(false);
        let this = Self { path, tree, tasks, ended };
        this.first_names().await;
        this.attach(device, ends).await?;
        tracing::info!(path = %this.path.display(), "the tree is mounted");
        Ok(this)
    }

    /// Resolves when the kernel has let go of it: somebody unmounted it.
    pub async fn ended(&self) {
        // The thread that serves it is gone if there is nobody to say so.
        drop(self.ended.clone().wait_for(|ended| *ended).await);
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    async fn first_names(&self) {
        let mut applied = self.tree.applied.subscribe();
        // The sender lives as long as the tree.
        drop(applied.wait_for(|revision| *revision > 0).await);
    }

    async fn attach(&self, device: File, ends: watch::Sender<bool>) -> Result<(), MountError> {
        let (path, tree, runtime) = (self.path.clone(), self.tree.clone(), Runtime::current());
        let io = |source: io::Error| MountError::Io { path: self.path.clone(), source };
        // The handshake waits for the kernel.
        let attached =
            tokio::task::spawn_blocking(move || attach(&path, tree, runtime, device, ends));
        attached.await.map_err(|error| io(io::Error::other(error)))?.map_err(io)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        self.tree.notices.end();
        if !*self.ended.borrow() && is_mounted(&self.path).unwrap_or(true) {
            detach(&self.path);
        }
    }
}

/// Takes all trees out of the mount namespace of this thread, which must be one of its own: a
/// process that outlives the agent would keep them mounted for ever.
///
/// # Errors
/// What the system says.
pub fn leave_all() -> io::Result<()> {
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo")?;
    // The last one is the uppermost.
    for point in mounts.lines().rev().filter_map(point_of_tree) {
        umount2(Path::new(&point), MntFlags::MNT_DETACH)?;
    }
    Ok(())
}

/// Takes the uppermost mount away at once; whoever still uses it keeps it until they are done.
fn detach(path: &Path) {
    if let Err(error) = umount2(path, MntFlags::MNT_DETACH) {
        tracing::warn!(%error, path = %path.display(), "the tree cannot be unmounted");
    }
}

fn attach(
    path: &Path,
    tree: Arc<Tree>,
    runtime: Runtime,
    device: File,
    ends: watch::Sender<bool>,
) -> io::Result<()> {
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_raw_fd()
    );
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOATIME;
    mount(Some(SOURCE), path, Some("fuse.holdfast"), flags, Some(options.as_str()))?;
    let serving = serve(tree, runtime, OwnedFd::from(device), ends);
    if serving.is_err() {
        detach(path);
    }
    serving
}

fn serve(
    tree: Arc<Tree>,
    runtime: Runtime,
    device: OwnedFd,
    ends: watch::Sender<bool>,
) -> io::Result<()> {
    let mut config = Config::default();
    config.n_threads = Some(THREADS);
    let notices = tree.notices.clone();
    let shell = Shell { tree, runtime };
    let session = Session::from_fd(shell, device, SessionACL::All, config)?;
    notices.spawn(session.notifier())?;
    let thread = std::thread::Builder::new().name("tree".to_owned());
    thread.spawn(move || {
        if let Err(error) = session.run() {
            tracing::error!(%error, "the mounted tree ended");
        }
        notices.end();
        ends.send_replace(true);
    })?;
    Ok(())
}

/// The mount point: made where it is missing, freed of what a killed agent left there.
async fn prepare(wanted: &Path) -> Result<PathBuf, MountError> {
    for _ in 0..REMAINS_MAX {
        match look(wanted).await? {
            Look::Free(path) => return Ok(path),
            Look::Dead => {
                tracing::info!(path = %wanted.display(), "unmounting the tree of an agent that is gone");
                detach(wanted);
            }
        }
    }
    let source = io::Error::from(Errno::EBUSY);
    Err(MountError::Io { path: wanted.to_owned(), source })
}

enum Look {
    Free(PathBuf),
    Dead,
}

async fn look(wanted: &Path) -> Result<Look, MountError> {
    let path = wanted.to_owned();
    // Not `stat`: the kernel may still answer that for a process that is gone.
    let looked = tokio::task::spawn_blocking(move || match nix::sys::statvfs::statvfs(&path) {
        Ok(_) => path.canonicalize().map(Some),
        Err(Errno::ENOTCONN | Errno::ECONNABORTED) => Ok(None),
        Err(Errno::ENOENT) => {
            std::fs::create_dir_all(&path)?;
            path.canonicalize().map(Some)
        }
        Err(error) => Err(error.into()),
    });
    let io = |source| MountError::Io { path: wanted.to_owned(), source };
    let path = match tokio::time::timeout(LOOK_LIMIT, looked).await {
        Err(_) => return Err(MountError::Hangs(wanted.to_owned())),
        Ok(Err(error)) => return Err(io(io::Error::other(error))),
        Ok(Ok(looked)) => looked.map_err(io)?,
    };
    match path {
        None => Ok(Look::Dead),
        Some(path) if is_mounted(&path).map_err(io)? => Err(MountError::InUse(path)),
        Some(path) => Ok(Look::Free(path)),
    }
}

/// Whether a tree is mounted exactly there.
fn is_mounted(path: &Path) -> io::Result<bool> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let path = path.to_string_lossy();
    Ok(mounts.lines().filter_map(point_of_tree).any(|point| point == path))
}

/// Where a line of mountinfo says that a tree is mounted.
fn point_of_tree(line: &str) -> Option<String> {
    let tree = line.contains(" - fuse.holdfast ");
    tree.then(|| line.split(' ').nth(4).map(unescape)).flatten()
}

/// Undoes the octal escapes of mountinfo.
fn unescape(text: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(text.to_owned(), |text, (escape, letter)| text.replace(escape, letter))
}
