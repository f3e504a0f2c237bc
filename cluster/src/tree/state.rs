//! What all of the tree's operations share.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use tokio::sync::watch;

use super::names;
use super::namespace::{Namespace, Stale};
use super::notices::Notices;
use super::quorum::Quorum;
use super::source::{Origin, Source};
use crate::node::Node;
use crate::{Cluster, FileWriter};

/// Locks that keep commits of one file in order; files share them.
const LOCKS: usize = 64;
/// Changes that `.log` shows.
pub(super) const LOG_MAX: usize = 200;

/// The tree.
pub(super) struct Tree {
    pub(super) cluster: Cluster,
    pub(super) source: Source,
    pub(super) writer: Arc<dyn FileWriter>,
    pub(super) quorum: Quorum,
    pub(super) notices: Notices,
    /// Rises with every revision that the names in memory have.
    pub(super) applied: watch::Sender<u64>,
    /// Held for reading by whoever commits one file, for writing by whoever moves names.
    pub(super) names: tokio::sync::RwLock<()>,
    locks: [tokio::sync::Mutex<()>; LOCKS],
    state: Mutex<State>,
}

/// What is in memory. Never locked while anything is waited for.
pub(super) struct State {
    pub(super) names: Namespace,
    pub(super) handles: HashMap<u64, Handle>,
    next_handle: u64,
    /// The placement records, for `.vms`.
    pub(super) placements: BTreeMap<String, Vec<u8>>,
    /// For `.log`, the oldest first.
    pub(super) log: VecDeque<LogLine>,
    /// The last document that was not moved away.
    pub(super) stayed: Option<Stayed>,
}

/// A document that somebody wanted to move away.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stayed {
    pub(super) inode: u64,
    pub(super) pid: u32,
    pub(super) at: Instant,
}

/// One change, as `.log` shows it.
#[derive(Debug, Clone)]
pub(super) struct LogLine {
    pub(super) revision: u64,
    pub(super) origin: Origin,
    pub(super) path: String,
    pub(super) removed: bool,
}

/// Something open.
#[derive(Debug)]
pub(super) enum Handle {
    File {
        inode: u64,
        write: bool,
        append: bool,
        /// Has written since its last commit.
        wrote: bool,
    },
    /// A file that was made when it was opened.
    Generated(Vec<u8>),
    /// A folder's entries when it was last read from its beginning: name, inode, is a folder.
    Folder { inode: u64, entries: Vec<(String, u64, bool)> },
}

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caller {
    pub(super) uid: u32,
    pub(super) pid: u32,
}

impl Caller {
    /// Only root changes anything, and sees `priv/`. The kernel checks modes; this does not rely on it.
    pub(super) fn require_root(self) -> Result<(), Errno> {
        if self.uid == 0 { Ok(()) } else { Err(Errno::EACCES) }
    }
}

impl Tree {
    pub(super) fn new(cluster: Cluster, node: Arc<Node>, writer: Arc<dyn FileWriter>) -> Self {
        Self {
            cluster,
            source: Source::new(node),
            writer,
            quorum: Quorum::default(),
            notices: Notices::default(),
            applied: watch::channel(0).0,
            names: tokio::sync::RwLock::default(),
            locks: std::array::from_fn(|_| tokio::sync::Mutex::default()),
            state: Mutex::new(State {
                names: Namespace::new(),
                handles: HashMap::new(),
                next_handle: 1,
                placements: BTreeMap::new(),
                log: VecDeque::new(),
                stayed: None,
            }),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps commits of one inode in order.
    pub(super) async fn in_order(&self, inode: u64) -> tokio::sync::MutexGuard<'_, ()> {
        let at = usize::try_from(inode % LOCKS as u64).unwrap_or(0);
        self.locks[at].lock().await
    }

    /// Changes names in memory and has the kernel told.
    pub(super) fn change<T>(&self, f: impl FnOnce(&mut Namespace) -> (T, Vec<Stale>)) -> T {
        let (result, stale) = f(&mut self.lock().names);
        self.notices.tell(stale);
        result
    }

    /// Reads `priv/` again. The watch does not show it; it changes rarely.
    pub(super) async fn refresh_private(&self) -> Result<(), Errno> {
        let files = self.source.list_under(proto::keys::PRIV).await?;
        let files = files.into_iter();
        let files = files.map(|file| (file.key, file.revision, file.size, file.seconds));
        self.change(|names| ((), names.replace(proto::keys::PRIV, files.collect())));
        Ok(())
    }

    /// Whether something under `priv/` is meant.
    pub(super) fn is_private(&self, inode: u64) -> bool {
        self.lock().names.path(inode).is_ok_and(|path| names::is_private(&path))
    }
}

impl State {
    /// Keeps something open under a number.
    pub(super) fn open(&mut self, handle: Handle) -> u64 {
        let number = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(number, handle);
        number
    }

    /// Adds a line to `.log`.
    pub(super) fn log(&mut self, line: LogLine) {
        if self.log.len() == LOG_MAX {
            self.log.pop_front();
        }
        self.log.push_back(line);
    }
}

/// Ends with `EIO` what takes longer than any operation may.
pub(super) async fn bounded<T>(work: impl Future<Output = Result<T, Errno>>) -> Result<T, Errno> {
    const LIMIT: Duration = Duration::from_secs(10);
    tokio::time::timeout(LIMIT, work).await.unwrap_or(Err(Errno::EIO))
}
