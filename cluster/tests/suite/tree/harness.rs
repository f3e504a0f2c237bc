//! A cluster with its tree mounted on each member.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::IntoRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use cluster::tree::{Mount, TreeConfig};
use cluster::{Cluster, FileChange, FileRefused, FileWriter, StoreError, Txn, TxnOutcome};
use nix::errno::Errno;
use proto::Revision;
use tempfile::TempDir;

use crate::common::{Lab, Outcome};

/// Whether the tree can be mounted here; says so if not.
pub(crate) fn can_mount(test: &str) -> bool {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let reason = match device {
        Err(error) => format!("/dev/fuse cannot be used: {error}"),
        Ok(_) if !nix::unistd::geteuid().is_root() => "mounting needs root".to_owned(),
        Ok(_) => return true,
    };
    crate::skip::skip(test, &reason);
    false
}

/// Commits by plain transactions. A document with `BAD` in it is refused.
pub(crate) struct TestWriter {
    cluster: Cluster,
    pub(crate) hangs: Arc<AtomicBool>,
}

#[async_trait]
impl FileWriter for TestWriter {
    async fn commit(
        &self,
        changes: Vec<FileChange>,
        author: &str,
    ) -> Result<Revision, FileRefused> {
        if self.hangs.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        let mut txn = Txn::new().by(author);
        for change in changes {
            if let Some(content) = &change.content {
                check(&change.path, content)?;
            }
            if let Some(expected) = change.expected {
                txn = txn.if_revision(change.path.as_str(), expected);
            }
            txn = match change.content {
                Some(content) => txn.put(change.path, content),
                None => txn.delete(change.path),
            };
        }
        match self.cluster.txn(txn).await {
            Ok(TxnOutcome::Committed { revision }) => Ok(revision),
            Ok(TxnOutcome::Conflict { conflicts, .. }) => {
                let (path, present) = match conflicts.first() {
                    Some(kv) => (kv.key.clone(), kv.mod_revision),
                    None => (String::new(), Revision(0)),
                };
                Err(FileRefused::Conflict { path, present })
            }
            Err(error) => Err(match &error {
                StoreError::NoQuorum { .. } => FileRefused::NoQuorum(error.to_string()),
                StoreError::UnknownOutcome { .. } => FileRefused::Unknown(error.to_string()),
                StoreError::TooLarge(_) => FileRefused::TooLarge(error.to_string()),
                StoreError::NoSpace { .. } => FileRefused::Full(error.to_string()),
                StoreError::Private(_) => FileRefused::Denied(error.to_string()),
                _ => FileRefused::Busy(error.to_string()),
            }),
        }
    }
}

fn check(path: &str, content: &[u8]) -> Result<(), FileRefused> {
    let text = String::from_utf8_lossy(content);
    let bad = text.lines().position(|line| line.contains("BAD"));
    match bad {
        Some(line) if path.ends_with(".toml") => Err(FileRefused::Invalid {
            path: path.to_owned(),
            reason: "`BAD` is not allowed".to_owned(),
            line: u32::try_from(line + 1).ok(),
            column: Some(1),
        }),
        _ => Ok(()),
    }
}

/// Members, each with its mount.
pub(crate) struct Mounted {
    mounts: Vec<Option<Mount>>,
    pub(crate) writers: Vec<Arc<AtomicBool>>,
    pub(crate) lab: Lab,
    folder: PathBuf,
    _temporary: Option<TempDir>,
}

impl Mounted {
    pub(crate) fn new(members: usize) -> Outcome<Self> {
        let temporary = tempfile::tempdir()?;
        let folder = temporary.path().to_owned();
        Self::start(members, folder, Some(temporary))
    }

    /// With its mounts in a given folder.
    pub(crate) fn new_in(members: usize, folder: &Path) -> Outcome<Self> {
        Self::start(members, folder.to_owned(), None)
    }

    fn start(members: usize, folder: PathBuf, _temporary: Option<TempDir>) -> Outcome<Self> {
        let (mounts, writers, lab) = (Vec::new(), Vec::new(), Lab::new(members)?);
        let mut this = Self { mounts, writers, lab, folder, _temporary };
        for number in 0..members {
            this.writers.push(Arc::default());
            this.mounts.push(None);
            this.mount(number)?;
        }
        Ok(this)
    }

    /// Mounts (again) on a member.
    pub(crate) fn mount(&mut self, number: usize) -> Outcome {
        let config = TreeConfig { mount: self.root(number) };
        let hangs = self.writers[number].clone();
        let mount = self.lab.nodes[number].run(|cluster| async move {
            let writer = TestWriter { cluster: cluster.clone(), hangs };
            Mount::start(cluster, Arc::new(writer), config).await
        })??;
        self.mounts[number] = Some(mount);
        Ok(())
    }

    pub(crate) fn unmount(&mut self, number: usize) {
        self.mounts[number] = None;
    }

    /// Whether a mount ends within a time.
    pub(crate) fn ended_within(&self, number: usize, limit: Duration) -> Outcome<bool> {
        let mount = self.mounts[number].as_ref().ok_or("not mounted")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let ended = runtime.block_on(async { tokio::time::timeout(limit, mount.ended()).await });
        Ok(ended.is_ok())
    }

    fn root(&self, number: usize) -> PathBuf {
        self.folder.join(format!("mount{number}"))
    }

    /// A path on a member's mount.
    pub(crate) fn at(&self, number: usize, path: &str) -> PathBuf {
        self.root(number).join(path)
    }

    /// A path on the first member's mount.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.at(0, path)
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Puts keys past the tree.
    pub(crate) fn txn(&self, number: usize, txn: Txn) -> Outcome<Revision> {
        let done =
            self.lab.nodes[number].run(|cluster| async move { cluster.txn(txn).await })??;
        Ok(done.revision())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Before the members: whoever waits for an answer gets one.
        self.mounts.clear();
    }
}

/// Waits for a condition, with a limit.
pub(crate) fn wait(what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < crate::common::LIMIT, "did not happen: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
    begin.elapsed()
}

/// Closes a file and says what `close` said.
pub(crate) fn close(file: File) -> Result<(), Errno> {
    nix::unistd::close(file.into_raw_fd())
}

/// Opens with flags beyond those for reading and writing.
pub(crate) fn open(path: &Path, write: bool, flags: i32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(write).custom_flags(flags).open(path)
}

/// Opens or creates for writing, with flags.
pub(crate) fn create(path: &Path, flags: i32) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).custom_flags(flags).open(path)
}

/// Writes a whole file and closes it.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<(), Errno> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(path);
    let mut file = file.map_err(|error| errno(&error))?;
    file.write_all(content).map_err(|error| errno(&error))?;
    close(file)
}

/// The system's number of an error.
pub(crate) fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

/// What an operation failed with.
pub(crate) fn failure<T>(result: io::Result<T>) -> Errno {
    match result {
        Ok(_) => Errno::from_raw(0),
        Err(error) => errno(&error),
    }
}

/// A folder's names, sorted, without what is always at the top.
pub(crate) fn names(path: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
