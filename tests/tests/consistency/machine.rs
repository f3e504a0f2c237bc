//! A simulated machine under a real member: its network is the [fabric](super::fabric), its disk is
//! a real folder with a real RocksDB in it, of whose write-ahead log a power cut takes what no fsync
//! had reached.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use cluster::host::{Connection, Done, GroupCommit, Host, SyncNow};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::fabric::Net;
use super::rng::Rng;

/// How a disk may betray those who rely on it; the checks must notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Promise {
    /// Durable means durable.
    Kept,
    /// Says durable at once, and syncs much later.
    Broken,
}

#[derive(Debug)]
struct State {
    rng: Rng,
    boots: u64,
    /// Free room that the file system reports, bytes.
    free: u64,
    /// An fsync takes so much longer, milliseconds.
    stall_ms: u64,
    /// The live write-ahead log and how much of it is on the disk for sure.
    synced: (PathBuf, u64),
}

/// One machine; it outlives the runs of the member on it.
#[derive(Clone)]
pub(crate) struct Machine {
    pub(crate) index: usize,
    promise: Promise,
    net: Net,
    state: Arc<Mutex<State>>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").field("index", &self.index).finish_non_exhaustive()
    }
}

const ROOM: u64 = 10 << 30;

impl Machine {
    pub(crate) fn new(index: usize, promise: Promise, net: Net, rng: Rng) -> Self {
        let synced = (PathBuf::new(), 0);
        let state = State { rng, boots: 0, free: ROOM, stall_ms: 0, synced };
        Self { index, promise, net, state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_free(&self, free: Option<u64>) {
        self.state().free = free.unwrap_or(ROOM);
    }

    pub(crate) fn set_stall(&self, stall_ms: u64) {
        self.state().stall_ms = stall_ms;
    }

    /// What a power cut does to the disk while nothing runs: the log ends somewhere after its last
    /// fsync, in the middle of a record perhaps, and some of that tail may never have been written.
    pub(crate) fn cut_power(&self, folder: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.boots += 1;
        let (log, length) = live_log(folder)?;
        let durable = if state.synced.0 == log { state.synced.1.min(length) } else { 0 };
        let end = state.rng.between(durable, length);
        let file = OpenOptions::new().write(true).open(&log)?;
        file.set_len(end)?;
        if end > durable && state.rng.chance(30) {
            let hole = state.rng.between(durable, end - 1);
            let size = usize::try_from((end - hole).min(64)).unwrap_or(0);
            file.write_all_at(&[0; 64][..size], hole)?;
        }
        Ok(())
    }

    fn fsync_ms(&self) -> u64 {
        let mut state = self.state();
        let stall = state.stall_ms;
        state.rng.between(1, 8) + stall
    }

    fn note_synced(&self, synced: (PathBuf, u64)) {
        self.state().synced = synced;
    }
}

/// Ends a member by `end`, and leaves its databases as they were before: one that is dropped in this
/// process would first write out what it had in memory only.
pub(crate) fn crash(folder: &Path, end: impl FnOnce()) -> io::Result<()> {
    let databases = ["log", "db"].map(|part| {
        let (database, image) = (folder.join(part), folder.join(format!("{part}.crashed")));
        let copied = if database.exists() { copy_database(&database, &image) } else { Ok(()) };
        (database, image, copied)
    });
    end();
    for (database, image, copied) in databases {
        copied?;
        if image.exists() {
            fs::remove_dir_all(&database)?;
            fs::rename(&image, &database)?;
        }
    }
    Ok(())
}

/// Nobody writes meanwhile, but RocksDB's own threads may still remove files: tables first, which
/// never change, then what names them, then what came to be in between.
fn copy_database(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    let each = |tables: bool| {
        for entry in fs::read_dir(from)? {
            let path = entry?.path();
            let Some(name) = path.file_name() else { continue };
            let target = to.join(name);
            let done = match path.extension().is_some_and(|extension| extension == "sst") {
                table if table != tables || name == "LOCK" || target.exists() => Ok(()),
                true => fs::hard_link(&path, target),
                false => fs::copy(&path, target).map(drop),
            };
            match done {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => done?,
            }
        }
        io::Result::Ok(())
    };
    each(true)?;
    each(false)?;
    each(true)
}

/// The present write-ahead log of Raft's log in a data folder, and its length.
fn live_log(folder: &Path) -> io::Result<(PathBuf, u64)> {
    let mut logs = Vec::new();
    for entry in fs::read_dir(folder.join("log"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            logs.push(path);
        }
    }
    // Their names are numbers of a fixed width.
    let log = logs.into_iter().max().ok_or(io::ErrorKind::NotFound)?;
    let length = fs::metadata(&log)?.len();
    Ok((log, length))
}

#[async_trait]
impl Host for Machine {
    async fn dial(&self, address: &str) -> io::Result<Connection> {
        self.net.dial(self.index, address).await
    }

    fn group_commit(&self, folder: &Path, sync: SyncNow) -> io::Result<Box<dyn GroupCommit>> {
        // The database has just synced all it wrote while it opened.
        self.note_synced(live_log(folder)?);
        let (queue, waiting) = mpsc::unbounded_channel();
        let disk = Disk { machine: self.clone(), folder: folder.to_owned(), sync };
        let now = disk.clone();
        match self.promise {
            Promise::Kept => tokio::spawn(disk.serve(waiting)),
            Promise::Broken => tokio::spawn(disk.lie(waiting)),
        };
        Ok(Box::new(Queue { queue, disk: now }))
    }

    fn blocking(&self, work: Box<dyn FnOnce() + Send>) {
        // At once: a thread would end its work at a moment of its own.
        work();
    }

    fn free_bytes(&self, _: &Path) -> Option<u64> {
        Some(self.state().free)
    }

    fn boot_id(&self) -> String {
        format!("boot-{}", self.state().boots)
    }
}

#[derive(Debug)]
struct Queue {
    queue: mpsc::UnboundedSender<Done>,
    disk: Disk,
}

impl GroupCommit for Queue {
    fn submit(&self, done: Done) {
        if let Err(unsent) = self.queue.send(done) {
            unsent.0(Err(io::Error::other("the machine is off")));
        }
    }

    fn sync_now(&self) -> io::Result<()> {
        let reached = live_log(&self.disk.folder);
        (self.disk.sync)()?;
        if matches!(self.disk.machine.promise, Promise::Kept) {
            self.disk.machine.note_synced(reached?);
        }
        Ok(())
    }
}

#[derive(Clone)]
struct Disk {
    machine: Machine,
    folder: PathBuf,
    sync: SyncNow,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("folder", &self.folder).finish_non_exhaustive()
    }
}

type Waiting = mpsc::UnboundedReceiver<Done>;

impl Disk {
    /// One fsync for all that wait when it begins. What is written while it runs may be lost.
    async fn serve(self, mut waiting: Waiting) {
        while let Some(first) = waiting.recv().await {
            let mut batch = vec![first];
            while let Ok(next) = waiting.try_recv() {
                batch.push(next);
            }
            let reached = live_log(&self.folder);
            tokio::time::sleep(Duration::from_millis(self.machine.fsync_ms())).await;
            let result = (self.sync)().and(reached).map(|log| self.machine.note_synced(log));
            for done in batch {
                let copy = result.as_ref().map_err(|error| io::Error::other(error.to_string()));
                done(copy.copied());
            }
        }
    }

    async fn lie(self, mut waiting: Waiting) {
        let mut lies = 0u32;
        while let Some(done) = waiting.recv().await {
            done(Ok(()));
            lies += 1;
            if lies.is_multiple_of(200)
                && let Ok(log) = live_log(&self.folder)
            {
                self.machine.note_synced(log);
            }
        }
    }
}
