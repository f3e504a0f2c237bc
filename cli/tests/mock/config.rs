//! The configuration of the scripted agent: a small store with history, and the ways in which a
//! real one fails.

use std::collections::BTreeMap;
use std::sync::Mutex;

use proto::v1;
use proto::v1::watch_event::Event;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::{Agent, Answer, Answers};

/// What goes wrong with a commit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Fault {
    #[default]
    None,
    NoQuorum,
    /// It is carried out, and the answer is lost, so often.
    LostAnswers(u32),
    /// Nobody ever learns what became of it.
    Unknown,
}

#[derive(Debug)]
pub(crate) struct Store {
    state: Mutex<State>,
    /// The revision, and how often all watches were broken.
    tick: watch::Sender<(u64, u64)>,
}

#[derive(Debug, Default)]
struct State {
    changes: Vec<v1::Change>,
    compacted: u64,
    fault: Fault,
    commits: u32,
    /// Written by somebody else right before the next commit.
    rival: Option<(String, String)>,
}

impl Default for Store {
    fn default() -> Self {
        Self { state: Mutex::default(), tick: watch::Sender::new((0, 0)) }
    }
}

impl State {
    fn revision(&self) -> u64 {
        self.changes.last().map_or(0, |change| change.revision)
    }

    /// The files as they were right after `at`.
    fn at(&self, at: u64) -> BTreeMap<String, v1::KeyValue> {
        let mut files: BTreeMap<String, v1::KeyValue> = BTreeMap::new();
        for change in self.changes.iter().take_while(|change| change.revision <= at) {
            match &change.content {
                None => {
                    files.remove(&change.path);
                }
                Some(content) => {
                    let before = files.get(&change.path).map(|kv| kv.create_revision);
                    let kv = v1::KeyValue {
                        key: change.path.clone(),
                        value: content.clone(),
                        create_revision: before.unwrap_or(change.revision),
                        mod_revision: change.revision,
                    };
                    files.insert(change.path.clone(), kv);
                }
            }
        }
        files
    }

    fn read(&self, at: u64) -> Result<BTreeMap<String, v1::KeyValue>, Status> {
        if at > 0 && at < self.compacted {
            let first = self.compacted;
            let text = format!("revision {at} is compacted: the history begins at {first}");
            return Err(Status::out_of_range(text));
        }
        Ok(self.at(if at == 0 { u64::MAX } else { at }))
    }

    fn write(&mut self, changes: Vec<v1::FileChange>, author: &str) -> u64 {
        let revision = self.revision() + 1;
        for change in changes {
            let previous = self.changes.iter().rev().find(|before| before.path == change.path);
            let previous_revision = previous.map_or(0, |before| before.revision);
            self.changes.push(v1::Change {
                revision,
                at_ms: 1_700_000_000_000 + revision * 1000,
                author: author.to_owned(),
                path: change.path,
                content: change.content,
                previous_revision,
            });
        }
        revision
    }

    fn refusals(&self, changes: &[v1::FileChange]) -> Vec<v1::Refusal> {
        let files = self.at(u64::MAX);
        changes.iter().filter_map(|change| refusal(&files, change)).collect()
    }
}

fn refusal(files: &BTreeMap<String, v1::KeyValue>, change: &v1::FileChange) -> Option<v1::Refusal> {
    let present = files.get(&change.path).map_or(0, |kv| kv.mod_revision);
    let refused = |reason: &str, line: usize, column: usize| v1::Refusal {
        path: change.path.clone(),
        reason: reason.to_owned(),
        line: u32::try_from(line).unwrap(),
        column: u32::try_from(column).unwrap(),
        ..v1::Refusal::default()
    };
    if change.expected_revision.is_some_and(|expected| expected != present) {
        let conflict = refused("it was changed in the meantime", 0, 0);
        return Some(v1::Refusal { present_revision: Some(present), ..conflict });
    }
    let text = std::str::from_utf8(change.content.as_ref()?).ok()?;
    if !change.path.ends_with(".toml") {
        return None;
    }
    if let Err(error) = text.parse::<toml::Table>() {
        let before = &text[..error.span().map_or(0, |span| span.start)];
        let column = before.rsplit('\n').next().unwrap().chars().count() + 1;
        return Some(refused(error.message(), before.matches('\n').count() + 1, column));
    }
    let index = text.lines().position(|line| line.contains("GB\""))?;
    let column = text.lines().nth(index)?.find('"')? + 1;
    Some(refused("this is not a size: write it as in 2GiB", index + 1, column))
}

impl Store {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock().unwrap();
        let done = work(&mut state);
        let revision = state.revision();
        self.tick.send_modify(|tick| tick.0 = revision);
        done
    }

    /// Writes a file as somebody else.
    pub(crate) fn put(&self, path: &str, content: &str) -> u64 {
        self.put_bytes(path, content.as_bytes())
    }

    pub(crate) fn put_bytes(&self, path: &str, content: &[u8]) -> u64 {
        let content = Some(content.to_vec());
        let change = v1::FileChange { path: path.to_owned(), expected_revision: None, content };
        self.with(|state| state.write(vec![change], "ann"))
    }

    pub(crate) fn remove(&self, path: &str) -> u64 {
        let change =
            v1::FileChange { path: path.to_owned(), expected_revision: None, content: None };
        self.with(|state| state.write(vec![change], "ann"))
    }

    pub(crate) fn get(&self, path: &str) -> Option<String> {
        let kv = self.with(|state| state.at(u64::MAX).remove(path))?;
        Some(String::from_utf8(kv.value).unwrap())
    }

    pub(crate) fn paths(&self) -> Vec<String> {
        self.with(|state| state.at(u64::MAX).into_keys().collect())
    }

    pub(crate) fn revision(&self) -> u64 {
        self.with(|state| state.revision())
    }

    /// Commits that were asked for, refused and repeated ones too.
    pub(crate) fn commits(&self) -> u32 {
        self.with(|state| state.commits)
    }

    pub(crate) fn set_fault(&self, fault: Fault) {
        self.with(|state| state.fault = fault);
    }

    pub(crate) fn set_rival(&self, path: &str, content: &str) {
        self.with(|state| state.rival = Some((path.to_owned(), content.to_owned())));
    }

    /// Forgets what was before a revision.
    pub(crate) fn compact(&self, revision: u64) {
        self.with(|state| state.compacted = revision);
    }

    /// Ends all watches.
    pub(crate) fn break_watches(&self) {
        self.tick.send_modify(|tick| tick.1 += 1);
    }

    /// How many watches there are.
    pub(crate) fn watches(&self) -> usize {
        self.tick.receiver_count()
    }
}

struct Watching {
    agent: Agent,
    tick: watch::Receiver<(u64, u64)>,
    breaks: u64,
    prefix: String,
    next: u64,
}

impl Watching {
    async fn response(&mut self) -> Result<v1::WatchResponse, Status> {
        loop {
            let (revision, breaks) = *self.tick.borrow_and_update();
            if breaks != self.breaks {
                return Err(Status::unavailable("the connection is gone"));
            }
            if revision >= self.next {
                let revision = self.next;
                self.next += 1;
                return self.agent.0.config.with(|state| events(state, revision, &self.prefix));
            }
            if self.tick.changed().await.is_err() {
                return Err(Status::unavailable("the agent ends"));
            }
        }
    }
}

fn events(state: &State, revision: u64, prefix: &str) -> Result<v1::WatchResponse, Status> {
    if revision < state.compacted {
        return Err(Status::out_of_range(format!("revision {revision} is compacted")));
    }
    let files = state.at(revision);
    let changes = state.changes.iter().filter(|change| change.revision == revision);
    let events = changes.filter(|change| change.path.starts_with(prefix)).map(|change| {
        let event = match files.get(&change.path) {
            Some(kv) => Event::Put(kv.clone()),
            None => Event::Deleted(v1::Deleted { key: change.path.clone(), revision }),
        };
        v1::WatchEvent { event: Some(event) }
    });
    Ok(v1::WatchResponse { revision, events: events.collect() })
}

#[tonic::async_trait]
impl v1::config_server::Config for Agent {
    async fn get(&self, request: Request<v1::GetRequest>) -> Answer<v1::GetResponse> {
        let request = request.into_inner();
        self.0.config.with(|state| {
            let kv = state.read(request.at_revision)?.remove(&request.key);
            Ok(Response::new(v1::GetResponse { kv, revision: state.revision() }))
        })
    }
    async fn range(&self, request: Request<v1::RangeRequest>) -> Answer<v1::RangeResponse> {
        let request = request.into_inner();
        self.0.config.with(|state| {
            let files = state.read(request.at_revision)?.into_values();
            let wanted = files.filter(|kv| kv.key.starts_with(&request.prefix));
            let mut kvs: Vec<_> = wanted.filter(|kv| kv.key > request.after).collect();
            // Pages are small here, so that there are several.
            let more = kvs.len() > 3;
            kvs.truncate(3);
            Ok(Response::new(v1::RangeResponse { kvs, revision: state.revision(), more }))
        })
    }
    async fn txn(&self, _: Request<v1::TxnRequest>) -> Answer<v1::TxnResponse> {
        Err(Status::permission_denied("files are committed"))
    }
    type WatchStream = Answers<v1::WatchResponse>;
    async fn watch(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Answer<Answers<v1::WatchResponse>> {
        let request = request.into_inner();
        let tick = self.0.config.tick.subscribe();
        let (revision, breaks) = *tick.borrow();
        let next = if request.from_revision == 0 { revision + 1 } else { request.from_revision };
        if self.0.config.with(|state| next < state.compacted) {
            return Err(Status::out_of_range(format!("revision {next} is compacted")));
        }
        let watching = Watching { agent: self.clone(), tick, breaks, prefix: request.prefix, next };
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            let mut watching = watching;
            loop {
                let response = tokio::select! {
                    response = watching.response() => response,
                    () = sender.closed() => return,
                };
                let ended = response.is_err();
                if sender.send(response).await.is_err() || ended {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver))))
    }
    async fn history(&self, request: Request<v1::HistoryRequest>) -> Answer<v1::HistoryResponse> {
        let request = request.into_inner();
        self.0.config.with(|state| {
            let before = Some(request.before_revision).filter(|before| *before > 0);
            let wanted = |change: &&v1::Change| {
                change.revision >= state.compacted
                    && change.revision < before.unwrap_or(u64::MAX)
                    && match request.exact {
                        true => change.path == request.prefix,
                        false => change.path.starts_with(&request.prefix),
                    }
            };
            let mut changes: Vec<_> = state.changes.iter().rev().filter(wanted).cloned().collect();
            let more = changes.len() > 2;
            changes.truncate(2);
            Ok(Response::new(v1::HistoryResponse {
                next_before_revision: changes.last().map_or(0, |change| change.revision),
                changes,
                compacted_revision: state.compacted,
                more,
            }))
        })
    }
    async fn commit(&self, request: Request<v1::CommitRequest>) -> Answer<v1::CommitResponse> {
        let request = request.into_inner();
        self.0.config.with(|state| commit(state, request)).map(Response::new)
    }
}

fn commit(state: &mut State, request: v1::CommitRequest) -> Result<v1::CommitResponse, Status> {
    state.commits += 1;
    match state.fault {
        Fault::NoQuorum => return Err(Status::unavailable("no quorum: 1 of 3 voters answers")),
        Fault::Unknown => return Err(Status::deadline_exceeded("the leader changed meanwhile")),
        Fault::None | Fault::LostAnswers(_) => {}
    }
    if let Some((path, content)) = state.rival.take() {
        let content = Some(content.into_bytes());
        state.write(vec![v1::FileChange { path, expected_revision: None, content }], "ann");
    }
    let refusals = state.refusals(&request.changes);
    let revision = match refusals.is_empty() && !request.dry_run {
        true => state.write(request.changes, "root"),
        false => state.revision(),
    };
    match &mut state.fault {
        Fault::LostAnswers(left) if *left > 0 => {
            *left -= 1;
            Err(Status::deadline_exceeded("no answer in time; the outcome is unknown"))
        }
        _ => Ok(v1::CommitResponse { revision, refusals }),
    }
}
