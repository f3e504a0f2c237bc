//! The store of this node's tasks, and what a running task holds of it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::StreamExt as _;
use proto::v1::{Task, TaskProgress, TaskUpdate, task_update};
use proto::{Name, NodeId};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::{KEPT_MAX, LOG_MAX};
use crate::clock::unix_ms;

/// Numbers that one write of the mark reserves.
const BLOCK: u64 = 64;

/// Why a task did not do what it was for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TaskFailure {
    /// It failed: what, why, what to do.
    #[error("{0}")]
    Failed(String),
    /// It was cancelled, and everything is as before.
    #[error("cancelled")]
    Cancelled,
    /// Something else that was asked for took its place: who and what. Ends as cancelled, too.
    #[error("cancelled: {0}")]
    Overruled(String),
}

impl From<tonic::Status> for TaskFailure {
    fn from(status: tonic::Status) -> Self {
        match status.code() {
            tonic::Code::Cancelled => Self::Cancelled,
            _ => Self::Failed(status.message().to_owned()),
        }
    }
}

/// This node's tasks. Clones are handles on the same store.
#[derive(Debug, Clone)]
pub struct TaskStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    node: NodeId,
    node_name: Mutex<Name>,
    mark: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    next: u64,
    /// Invariant: `next <= reserved`, and `reserved` is on disk before a number below it is used.
    reserved: u64,
    tasks: BTreeMap<u64, Arc<Entry>>,
}

#[derive(Debug)]
struct Entry {
    cancel: CancellationToken,
    /// Carries the task's own state; every change is announced to followers.
    state: watch::Sender<State>,
}

#[derive(Debug, Clone)]
struct State {
    task: Task,
    log: std::collections::VecDeque<String>,
    /// Lines that were dropped before the first one in `log`.
    dropped: usize,
}

/// What a running task holds: its log, its progress, and the wish to cancel it.
#[derive(Debug, Clone)]
pub struct TaskContext {
    id: String,
    entry: Arc<Entry>,
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Splits a task id into the node that runs it and its number there.
#[must_use]
pub fn parse_id(id: &str) -> Option<(NodeId, u64)> {
    let (node, number) = id.split_once('-')?;
    Some((NodeId(node.parse().ok()?), number.parse().ok()?))
}

impl TaskStore {
    fn node_name(&self) -> String {
        self.shared.node_name.lock().unwrap_or_else(PoisonError::into_inner).to_string()
    }

    /// Tasks from now on are of a node of this name.
    pub fn rename(&self, name: Name) {
        *self.shared.node_name.lock().unwrap_or_else(PoisonError::into_inner) = name;
    }

    /// Opens the store of a node; `mark` is the file that keeps numbers from being given twice.
    ///
    /// # Errors
    /// If the mark cannot be read or written.
    pub fn open(node: NodeId, node_name: Name, mark: PathBuf) -> std::io::Result<Self> {
        let next = match std::fs::read_to_string(&mark) {
            Ok(text) => text.trim().parse().map_err(|_| {
                std::io::Error::other(format!("{}: not a number: {text:?}", mark.display()))
            })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => 1,
            Err(error) => return Err(error),
        };
        let inner = Mutex::new(Inner { next, reserved: next, tasks: BTreeMap::new() });
        Ok(Self {
            shared: Arc::new(Shared { node, node_name: Mutex::new(node_name), mark, inner }),
        })
    }

    /// Runs `work` as a task and gives its id at once. `user` is who asked.
    ///
    /// # Errors
    /// If no number can be had because the data folder cannot be written.
    pub fn spawn<F, Fut>(
        &self,
        kind: &str,
        subject: &str,
        user: &str,
        work: F,
    ) -> std::io::Result<String>
    where
        F: FnOnce(TaskContext) -> Fut,
        Fut: Future<Output = Result<Option<serde_json::Value>, TaskFailure>> + Send + 'static,
    {
        let context = self.begin(kind, subject, user)?;
        let id = context.id.clone();
        let span = tracing::info_span!("task", id = %id, kind, subject, user);
        let store = self.clone();
        let work = work(context.clone());
        tokio::spawn(
            async move {
                // A panic in the work ends the task as failed instead of leaving it running for ever.
                let outcome = match tokio::spawn(work.in_current_span()).await {
                    Ok(outcome) => outcome,
                    Err(error) => Err(TaskFailure::Failed(format!("internal error: {error}"))),
                };
                context.end(outcome);
                store.trim();
            }
            .instrument(span),
        );
        Ok(id)
    }

    fn begin(&self, kind: &str, subject: &str, user: &str) -> std::io::Result<TaskContext> {
        let mut inner = lock(&self.shared.inner);
        if inner.next >= inner.reserved {
            let reserved = inner.next.saturating_add(BLOCK);
            write_mark(&self.shared.mark, reserved)?;
            inner.reserved = reserved;
        }
        let number = inner.next;
        inner.next = number.saturating_add(1);
        let id = format!("{}-{number}", self.shared.node);
        let task = Task {
            task_id: id.clone(),
            kind: kind.to_owned(),
            subject: subject.to_owned(),
            state: "running".to_owned(),
            node: self.node_name(),
            started_unix_ms: unix_ms(),
            user: user.to_owned(),
            ..Task::default()
        };
        let state = State { task, log: std::collections::VecDeque::new(), dropped: 0 };
        let entry =
            Arc::new(Entry { cancel: CancellationToken::new(), state: watch::Sender::new(state) });
        inner.tasks.insert(number, entry.clone());
        Ok(TaskContext { id, entry })
    }

    /// Drops the oldest ended tasks beyond the limit.
    fn trim(&self) {
        let mut inner = lock(&self.shared.inner);
        let ended: Vec<u64> = inner
            .tasks
            .iter()
            .filter(|(_, entry)| entry.state.borrow().task.ended_unix_ms.is_some())
            .map(|(number, _)| *number)
            .collect();
        for number in ended.iter().take(ended.len().saturating_sub(KEPT_MAX)) {
            inner.tasks.remove(number);
        }
    }

    fn entry(&self, id: &str) -> Option<Arc<Entry>> {
        let (node, number) = parse_id(id)?;
        (node == self.shared.node).then(|| lock(&self.shared.inner).tasks.get(&number).cloned())?
    }

    /// The newest tasks first, at most `limit`.
    #[must_use]
    pub fn list(&self, limit: usize) -> Vec<Task> {
        let inner = lock(&self.shared.inner);
        inner.tasks.values().rev().take(limit).map(|e| e.state.borrow().task.clone()).collect()
    }

    /// One task; `None` if it is not here or no longer kept.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<Task> {
        Some(self.entry(id)?.state.borrow().task.clone())
    }

    /// Asks a task to stop. It ends as cancelled unless it is past the point of no return.
    #[must_use]
    pub fn cancel(&self, id: &str) -> Option<Task> {
        let entry = self.entry(id)?;
        entry.cancel.cancel();
        let task = entry.state.borrow().task.clone();
        Some(task)
    }

    /// Waits until a task has ended; `None` if it is not here.
    pub async fn wait(&self, id: &str) -> Option<Task> {
        let mut state = self.entry(id)?.state.subscribe();
        let ended = state.wait_for(|state| state.task.ended_unix_ms.is_some()).await.ok()?;
        Some(ended.task.clone())
    }

    /// The task's log from its start, then live with its progress, ending with the task itself.
    pub fn follow(
        &self,
        id: &str,
    ) -> Option<impl futures::Stream<Item = TaskUpdate> + Send + use<>> {
        let entry = self.entry(id)?;
        let position = Position { entry, seen: 0, progress: None, done: false };
        let updates = futures::stream::unfold(position, |mut position| async move {
            let updates = position.next().await?;
            Some((futures::stream::iter(updates), position))
        });
        Some(updates.flatten())
    }
}

/// How far a follower has come.
struct Position {
    entry: Arc<Entry>,
    /// Lines of the whole log that were given, dropped ones included.
    seen: usize,
    progress: Option<TaskProgress>,
    done: bool,
}

impl Position {
    /// What is new, after waiting for it; `None` after the end was given.
    async fn next(&mut self) -> Option<Vec<TaskUpdate>> {
        if self.done {
            return None;
        }
        let mut watch = self.entry.state.subscribe();
        let (seen, progress) = (self.seen, self.progress.clone());
        let state = watch
            .wait_for(|state| {
                state.dropped + state.log.len() > seen
                    || state.task.progress != progress
                    || state.task.ended_unix_ms.is_some()
            })
            .await
            .ok()?
            .clone();
        let mut updates = Vec::new();
        if state.dropped > self.seen {
            let lost = state.dropped - self.seen;
            updates.push(task_update::Update::Log(format!("({lost} lines are no longer kept)")));
            self.seen = state.dropped;
        }
        for line in state.log.iter().skip(self.seen - state.dropped) {
            updates.push(task_update::Update::Log(line.clone()));
        }
        self.seen = state.dropped + state.log.len();
        if state.task.progress != self.progress {
            self.progress.clone_from(&state.task.progress);
            updates.extend(state.task.progress.clone().map(task_update::Update::Progress));
        }
        if state.task.ended_unix_ms.is_some() {
            self.done = true;
            updates.push(task_update::Update::Ended(state.task));
        }
        Some(updates.into_iter().map(|update| TaskUpdate { update: Some(update) }).collect())
    }
}

impl TaskContext {
    /// The task's id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Adds a line to the task's log, and to the agent's.
    pub fn log(&self, line: impl Into<String>) {
        let line = line.into();
        tracing::info!(task = %self.id, "{line}");
        self.entry.state.send_modify(|state| {
            state.log.push_back(line);
            while state.log.len() > LOG_MAX {
                state.log.pop_front();
                state.dropped += 1;
            }
        });
    }

    /// Says how far the task has come; `done` of `total` in any unit, 0 of 0 for unknown.
    pub fn progress(&self, text: impl Into<String>, done: u64, total: u64) {
        let progress = TaskProgress { text: text.into(), done, total };
        self.entry.state.send_modify(|state| state.task.progress = Some(progress));
    }

    /// Told when someone wants the task cancelled.
    #[must_use]
    pub fn cancel(&self) -> &CancellationToken {
        &self.entry.cancel
    }

    fn end(&self, outcome: Result<Option<serde_json::Value>, TaskFailure>) {
        match &outcome {
            Ok(_) => tracing::info!(task = %self.id, "done"),
            Err(failure) => tracing::warn!(task = %self.id, "{failure}"),
        }
        self.entry.state.send_modify(|state| {
            let task = &mut state.task;
            task.ended_unix_ms = Some(unix_ms());
            match outcome {
                Ok(result) => {
                    task.state = "done".to_owned();
                    task.result = result.map(|value| value.to_string()).unwrap_or_default();
                }
                Err(TaskFailure::Failed(error)) => {
                    task.state = "failed".to_owned();
                    task.error = error;
                }
                Err(TaskFailure::Cancelled) => task.state = "cancelled".to_owned(),
                Err(TaskFailure::Overruled(why)) => {
                    task.state = "cancelled".to_owned();
                    task.error = why;
                }
            }
        });
    }
}

fn write_mark(path: &std::path::Path, mark: u64) -> std::io::Result<()> {
    use std::io::Write as _;
    let temporary = path.with_extension("new");
    let mut file = std::fs::File::create(&temporary)?;
    writeln!(file, "{mark}")?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(dir: &tempfile::TempDir) -> TaskStore {
        TaskStore::open(NodeId(3), "n3".parse().unwrap(), dir.path().join("tasks")).unwrap()
    }

    #[tokio::test]
    async fn a_follower_sees_the_whole_log_and_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let id = store
            .spawn("vm.start", "web", "admin", |task| async move {
                task.log("one");
                wait.await.ok();
                task.progress("half", 1, 2);
                task.log("two");
                Ok(Some(serde_json::json!({"bytes": 7})))
            })
            .unwrap();
        assert_eq!(id, "3-1");
        let mut updates = Box::pin(store.follow(&id).unwrap());
        let first = updates.next().await.unwrap().update.unwrap();
        assert_eq!(first, task_update::Update::Log("one".into()));
        go.send(()).unwrap();
        let rest: Vec<_> = updates.map(|u| u.update.unwrap()).collect().await;
        assert!(rest.contains(&task_update::Update::Log("two".into())));
        let Some(task_update::Update::Ended(task)) = rest.last() else { panic!("{rest:?}") };
        assert_eq!((task.state.as_str(), task.result.as_str()), ("done", "{\"bytes\":7}"));
        assert_eq!((task.user.as_str(), task.subject.as_str()), ("admin", "web"));
        // A late follower sees the same log.
        let late: Vec<_> = store.follow(&id).unwrap().collect().await;
        assert_eq!(late.len(), 4, "{late:?}");
    }

    #[tokio::test]
    async fn failure_panic_and_cancel_end_a_task() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        let failed = store
            .spawn("a", "s", "u", |_| async { Err(TaskFailure::Failed("no disk".into())) })
            .unwrap();
        let panicked = store.spawn("a", "s", "u", |_| async { Err(panic_for_test()) }).unwrap();
        let cancelled = store
            .spawn("a", "s", "u", |task| async move {
                task.cancel().cancelled().await;
                Err(TaskFailure::Cancelled)
            })
            .unwrap();
        let task = store.wait(&failed).await.unwrap();
        assert_eq!((task.state.as_str(), task.error.as_str()), ("failed", "no disk"));
        assert_eq!(store.wait(&panicked).await.unwrap().state, "failed");
        assert_eq!(store.get(&cancelled).unwrap().state, "running");
        assert!(store.cancel(&cancelled).is_some());
        assert_eq!(store.wait(&cancelled).await.unwrap().state, "cancelled");
        assert!(store.get("4-1").is_none() && store.get("x").is_none());
    }

    fn panic_for_test() -> TaskFailure {
        panic!("a bug in a task")
    }

    #[tokio::test]
    async fn numbers_are_not_given_twice_and_old_tasks_go() {
        let dir = tempfile::tempdir().unwrap();
        let first = store(&dir);
        let a = first.spawn("a", "s", "u", |_| async { Ok(None) }).unwrap();
        let second = store(&dir);
        let b = second.spawn("a", "s", "u", |_| async { Ok(None) }).unwrap();
        assert_ne!(a, b);
        for _ in 0..KEPT_MAX + 20 {
            let id = second.spawn("a", "s", "u", |_| async { Ok(None) }).unwrap();
            second.wait(&id).await;
        }
        second.trim();
        assert_eq!(second.list(usize::MAX).len(), KEPT_MAX);
        assert!(second.get(&b).is_none());
        assert_eq!(second.list(3).len(), 3);
    }

    #[tokio::test]
    async fn a_long_log_is_cut_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        let id = store
            .spawn("a", "s", "u", |task| async move {
                for n in 0..LOG_MAX + 5 {
                    task.log(n.to_string());
                }
                Ok(None)
            })
            .unwrap();
        store.wait(&id).await;
        let all: Vec<_> = store.follow(&id).unwrap().collect().await;
        assert_eq!(
            all[0].update,
            Some(task_update::Update::Log("(5 lines are no longer kept)".into()))
        );
        assert_eq!(all[1].update, Some(task_update::Update::Log("5".into())));
    }
}
