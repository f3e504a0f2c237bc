//! People's files in the cluster: read now or as they were, and committed all or nothing.
//!
//! A commit says which revision of each file it was made from, so that it can be sent again where
//! its answer was lost: it is not written twice, and what somebody else wrote meanwhile stays.

use std::time::Duration;

use proto::v1;
use proto::v1::config_client::ConfigClient;
use serde::Serialize;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::connect::{ANSWER_LIMIT, Session};
use crate::failure::{Exit, Failure};

/// Answers may be large: a range's page, a document.
const MESSAGE_MAX: usize = 64 << 20;
/// Keys in one page of a range.
const PAGE: u32 = 500;
/// A commit whose answer was lost is sent again after this.
const COMMIT_PAUSE: Duration = Duration::from_millis(500);

/// A file as it is, or was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) key: String,
    pub(crate) content: Vec<u8>,
    pub(crate) create_revision: u64,
    /// Of its last change.
    pub(crate) revision: u64,
}

impl From<v1::KeyValue> for File {
    fn from(kv: v1::KeyValue) -> Self {
        Self {
            key: kv.key,
            content: kv.value,
            create_revision: kv.create_revision,
            revision: kv.mod_revision,
        }
    }
}

/// What is to be done to a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) key: String,
    /// The revision that it must have; 0: absent.
    pub(crate) expected: u64,
    /// `None`: remove it.
    pub(crate) content: Option<Vec<u8>>,
}

/// What became of a commit that reached the cluster.
#[derive(Debug)]
pub(crate) enum Committed {
    /// It is written (or could be, where that was asked) as this revision.
    Done(u64),
    /// It was refused: nothing was written.
    Refused(Vec<v1::Refusal>),
}

/// Consistency of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Read {
    /// Confirmed with a quorum.
    Linearizable,
    /// What the asked node has; answers without a quorum.
    Stale,
    /// As it was right after this revision.
    At(u64),
}

impl Read {
    /// From the flag `--stale`.
    pub(crate) fn stale(stale: bool) -> Self {
        if stale { Self::Stale } else { Self::Linearizable }
    }

    fn parts(self) -> (i32, u64) {
        match self {
            Self::Linearizable => (v1::Consistency::Linearizable.into(), 0),
            Self::Stale => (v1::Consistency::Stale.into(), 0),
            Self::At(revision) => (v1::Consistency::Linearizable.into(), revision),
        }
    }
}

/// A client of the configuration.
#[derive(Debug, Clone)]
pub(crate) struct Files<'a> {
    pub(crate) session: &'a Session,
    pub(crate) client: ConfigClient<Channel>,
}

impl<'a> Files<'a> {
    pub(crate) fn new(session: &'a Session) -> Self {
        let client = ConfigClient::new(session.channel.clone())
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX);
        Self { session, client }
    }

    /// A file, and the revision of the answer.
    pub(crate) async fn get(
        &mut self,
        key: &str,
        read: Read,
    ) -> Result<(Option<File>, u64), Failure> {
        let (consistency, at_revision) = read.parts();
        let request = v1::GetRequest { key: key.to_owned(), consistency, at_revision };
        let answer = self.session.call(&format!("read {key}"), self.client.get(request)).await;
        let answer = answer.map_err(|failure| compacted(failure, read, Some(key)))?;
        Ok((answer.kv.map(File::from), answer.revision))
    }

    /// A file that must be there.
    pub(crate) async fn existing(&mut self, key: &str, read: Read) -> Result<File, Failure> {
        let (file, revision) = self.get(key, read).await?;
        file.ok_or_else(|| {
            Failure::new(Exit::NotFound, format!("there is no {key}"))
                .why(format!("as of revision {revision}"))
                .remedy("see `clusterctl config ls`")
        })
    }

    /// All keys with a prefix, all at one revision, which is given too.
    pub(crate) async fn list(
        &mut self,
        prefix: &str,
        read: Read,
    ) -> Result<(Vec<File>, u64), Failure> {
        let mut files: Vec<File> = Vec::new();
        let mut revision = 0;
        loop {
            let after = files.last().map(|file| file.key.clone()).unwrap_or_default();
            // The later pages are of the first one's revision: nothing is seen half changed.
            let page_read = match read {
                Read::Linearizable if revision > 0 => Read::At(revision),
                other => other,
            };
            let (consistency, at_revision) = page_read.parts();
            let prefix = prefix.to_owned();
            let request = v1::RangeRequest { prefix, limit: PAGE, consistency, after, at_revision };
            let page = self.session.call("list files", self.client.range(request)).await;
            let page = page.map_err(|failure| compacted(failure, read, None))?;
            if revision == 0 {
                revision = page.revision;
            }
            let more = page.more && !page.kvs.is_empty();
            files.extend(page.kvs.into_iter().map(File::from));
            if !more {
                return Ok((files, revision));
            }
        }
    }

    /// All of people's files.
    pub(crate) async fn peoples(&mut self, read: Read) -> Result<(Vec<File>, u64), Failure> {
        let (mut files, revision) = self.list("", read).await?;
        files.retain(|file| crate::paths::is_peoples(&file.key));
        Ok((files, revision))
    }

    /// Commits all changes or none. `dry_run`: only says whether it could.
    pub(crate) async fn commit(
        &mut self,
        what: &str,
        changes: Vec<Change>,
        dry_run: bool,
    ) -> Result<Committed, Failure> {
        let request = v1::CommitRequest {
            changes: changes.into_iter().map(v1::FileChange::from).collect(),
            dry_run,
        };
        let limit = self.session.global.timeout.unwrap_or(ANSWER_LIMIT);
        let deadline = Instant::now() + limit;
        let mut in_doubt = false;
        loop {
            let attempt = tokio::time::timeout_at(deadline, self.client.commit(request.clone()));
            let no_answer = || Status::deadline_exceeded("no answer in time");
            let answer = attempt.await.unwrap_or_else(|_| Err(no_answer()));
            match answer.map(Response::into_inner) {
                Ok(answer) if answer.refusals.is_empty() => {
                    return Ok(Committed::Done(answer.revision));
                }
                Ok(answer) if in_doubt => return self.settle(what, &request, answer).await,
                Ok(answer) => return Ok(Committed::Refused(answer.refusals)),
                // Nothing was written, and nothing was sent before.
                Err(status) if dry_run || !(in_doubt || is_unsure(&status)) => {
                    return Err(Failure::status(what, &status));
                }
                Err(status) if Instant::now() + COMMIT_PAUSE > deadline => {
                    return Err(unknown(what, &status));
                }
                Err(_) => in_doubt = true,
            }
            tokio::time::sleep(COMMIT_PAUSE).await;
        }
    }

    /// A second sending that is refused says little of the first: what is there now does.
    async fn settle(
        &mut self,
        what: &str,
        request: &v1::CommitRequest,
        answer: v1::CommitResponse,
    ) -> Result<Committed, Failure> {
        if answer.refusals.iter().all(|refusal| refusal.present_revision.is_none()) {
            // Not for what is there, but for what it is: the first was refused as well.
            return Ok(Committed::Refused(answer.refusals));
        }
        let mut revision = 0;
        for change in &request.changes {
            let (file, at) = self.get(&change.path, Read::Linearizable).await?;
            if file.as_ref().map(|file| &file.content) != change.content.as_ref() {
                let others = Status::aborted("somebody else changed the same files meanwhile");
                return Err(unknown(what, &others));
            }
            revision = revision.max(file.map_or(at, |file| file.revision));
        }
        Ok(Committed::Done(revision))
    }
}

/// Whether a commit may have been written although it was answered so.
fn is_unsure(status: &Status) -> bool {
    use std::error::Error as _;
    // A status with a cause is a broken connection, not an answer.
    status.source().is_some()
        || matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled | Code::Unknown)
}

fn unknown(what: &str, status: &Status) -> Failure {
    let failure = Failure::status(what, status);
    let why = failure.why.unwrap_or_default();
    Failure::new(failure.exit, format!("the outcome is unknown: {what}"))
        .why(format!("it may or may not have been written: {why}"))
        .remedy(
            "when the cluster answers again, see `clusterctl config history` for whether it was, \
             before you repeat it",
        )
}

fn compacted(failure: Failure, read: Read, path: Option<&str>) -> Failure {
    match (read, failure.code) {
        (Read::At(revision), Some(Code::OutOfRange)) => {
            let why = failure.why.unwrap_or_default();
            let what = path.unwrap_or("the files");
            let of = path.map(|path| format!(" {path}")).unwrap_or_default();
            Failure::new(Exit::NotFound, format!("cannot read {what} as of revision {revision}"))
                .why(why)
                .remedy(format!("see `clusterctl config history{of}` for what is kept"))
        }
        _ => failure,
    }
}

impl From<Change> for v1::FileChange {
    fn from(change: Change) -> Self {
        Self { path: change.key, expected_revision: Some(change.expected), content: change.content }
    }
}

/// A file as programs see it: text where it is text, else base64.
#[derive(Debug, Serialize)]
pub(crate) struct Shown {
    pub(crate) key: String,
    #[serde(flatten)]
    pub(crate) value: Value,
    pub(crate) create_revision: u64,
    pub(crate) mod_revision: u64,
}

/// A content as programs see it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Value {
    Value(String),
    ValueBase64(String),
}

impl From<Vec<u8>> for Value {
    fn from(content: Vec<u8>) -> Self {
        use base64::Engine as _;
        match String::from_utf8(content) {
            Ok(text) => Self::Value(text),
            Err(error) => {
                Self::ValueBase64(base64::prelude::BASE64_STANDARD.encode(error.as_bytes()))
            }
        }
    }
}

impl From<File> for Shown {
    fn from(file: File) -> Self {
        Self {
            key: file.key,
            value: file.content.into(),
            create_revision: file.create_revision,
            mod_revision: file.revision,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_have_been_written_is_unsure() {
        assert!(is_unsure(&Status::deadline_exceeded("the leader changed")));
        assert!(is_unsure(&Status::from_error(Box::new(std::io::Error::other("reset")))));
        for sure in [Status::unavailable("no quorum"), Status::invalid_argument("x")] {
            assert!(!is_unsure(&sure), "{sure}");
        }
        let text = unknown("change a", &Status::deadline_exceeded("no answer")).to_string();
        assert!(text.contains("unknown") && text.contains("config history"), "{text}");
    }

    #[test]
    fn bytes_that_are_no_text_are_shown_as_base64() {
        let json = |content: &[u8]| serde_json::to_value(Value::from(content.to_vec())).unwrap();
        assert_eq!(json(b"x = 1\n"), serde_json::json!({"value": "x = 1\n"}));
        assert_eq!(json(b"\xff\0"), serde_json::json!({"value_base64": "/wA="}));
    }
}
