//! `config watch`: every change once, in order, also over lost connections and leaders. Where the
//! cluster has forgotten what happened meanwhile, it says so, and shows what is different now.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::v1;
use proto::v1::watch_event::Event;
use serde::Serialize;
use tonic::{Code, Status};

use crate::args::Format;
use crate::failure::{Exit, Failure};
use crate::files::{File, Files, Read, Shown};
use crate::{output, paths};

/// Between two tries to get the connection back.
const PAUSE: Duration = Duration::from_millis(500);

/// One line of output.
#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Line {
    Put(Shown),
    Deleted {
        key: String,
        revision: u64,
    },
    /// What happened up to this revision is not known; the lines that follow are the differences.
    Resync {
        revision: u64,
    },
}

/// How far the watching has come.
#[derive(Debug)]
struct Position {
    prefix: String,
    /// With the system's records.
    all: bool,
    /// The first revision that was not seen yet; 0: from now on.
    next: u64,
    /// The keys that are there, with their last change.
    known: BTreeMap<String, u64>,
}

/// Never ends but by an error that trying again does not help.
pub(super) async fn watch(
    files: &mut Files<'_>,
    prefix: &str,
    all: bool,
    from_revision: u64,
) -> Result<(), Failure> {
    let prefix = paths::prefix(prefix);
    let all = all || !paths::is_peoples(&prefix);
    let (present, revision) = files.list(&prefix, Read::Linearizable).await?;
    let known = present.into_iter().map(|file| (file.key, file.revision)).collect();
    let next = if from_revision == 0 { revision + 1 } else { from_revision };
    let what = format!("watch {}", if prefix.is_empty() { "all" } else { &prefix });
    let mut position = Position { prefix, all, next, known };
    // What was asked for may be gone; what was already seen may not.
    let mut begun = from_revision == 0;
    let mut said = false;
    loop {
        let status = match follow(files, &mut position, &mut said).await? {
            Some(status) => status,
            None => Status::unavailable("the node ended the stream"),
        };
        match status.code() {
            Code::OutOfRange if begun => resync(files, &mut position).await?,
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal => {
                if !said {
                    eprintln!("connection lost, trying again …");
                    said = true;
                }
                tokio::time::sleep(PAUSE).await;
            }
            _ => return Err(refused(&what, &status)),
        }
        begun = true;
    }
}

fn refused(what: &str, status: &Status) -> Failure {
    let failure = Failure::status(what, status);
    match status.code() {
        Code::OutOfRange => Failure { exit: Exit::NotFound, ..failure }
            .remedy("begin with a later revision, or with none: see `clusterctl config history`"),
        _ => failure,
    }
}

/// One stream, until it breaks; with what, if the node said.
async fn follow(
    files: &mut Files<'_>,
    position: &mut Position,
    said: &mut bool,
) -> Result<Option<Status>, Failure> {
    let request =
        v1::WatchRequest { prefix: position.prefix.clone(), from_revision: position.next };
    let mut responses = match files.client.watch(request).await {
        Ok(responses) => responses.into_inner(),
        Err(status) => return Ok(Some(status)),
    };
    loop {
        let response = match responses.message().await {
            Ok(Some(response)) => response,
            Ok(None) => return Ok(None),
            Err(status) => return Ok(Some(status)),
        };
        if std::mem::take(said) {
            eprintln!("connected again");
        }
        for event in response.events.into_iter().filter_map(|event| event.event) {
            let line = position.note(event);
            print(files.session.global.output, &line, position.all)?;
        }
        position.next = position.next.max(response.revision + 1);
    }
}

impl Position {
    fn note(&mut self, event: Event) -> Line {
        match event {
            Event::Put(kv) => {
                self.known.insert(kv.key.clone(), kv.mod_revision);
                Line::Put(File::from(kv).into())
            }
            Event::Deleted(gone) => {
                self.known.remove(&gone.key);
                Line::Deleted { key: gone.key, revision: gone.revision }
            }
        }
    }

    /// What is different now from what was seen last.
    fn differences(&mut self, present: Vec<File>, revision: u64) -> Vec<Line> {
        let mut lines = vec![Line::Resync { revision }];
        let before = std::mem::take(&mut self.known);
        for file in present {
            self.known.insert(file.key.clone(), file.revision);
            if before.get(&file.key) != Some(&file.revision) {
                lines.push(Line::Put(file.into()));
            }
        }
        let gone = before.into_keys().filter(|key| !self.known.contains_key(key));
        lines.extend(gone.map(|key| Line::Deleted { key, revision }));
        self.next = revision + 1;
        lines
    }
}

/// The changes in between are gone: catches up with the differences.
async fn resync(files: &mut Files<'_>, position: &mut Position) -> Result<(), Failure> {
    eprintln!(
        "the history from revision {} on was compacted before it was seen; what follows are the \
         differences, not each change",
        position.next
    );
    let (present, revision) = files.list(&position.prefix, Read::Linearizable).await?;
    for line in position.differences(present, revision) {
        print(files.session.global.output, &line, position.all)?;
    }
    Ok(())
}

/// One line for each change (YAML: one document), so that a pipe sees it at once.
fn print(format: Format, line: &Line, all: bool) -> Result<(), Failure> {
    let peoples = match line {
        Line::Put(shown) => paths::is_peoples(&shown.key),
        Line::Deleted { key, .. } => paths::is_peoples(key),
        Line::Resync { .. } => true,
    };
    if !(all || peoples) {
        return Ok(());
    }
    match (format, line) {
        (Format::Table, Line::Put(shown)) => {
            let value = match &shown.value {
                crate::files::Value::Value(text) => text.trim_end().replace('\n', "\n    "),
                crate::files::Value::ValueBase64(_) => "(no text)".to_owned(),
            };
            output::line(&format!("{:>8} put     {}\n    {value}", shown.mod_revision, shown.key))
        }
        (Format::Table, Line::Deleted { key, revision }) => {
            output::line(&format!("{revision:>8} deleted {key}"))
        }
        (Format::Table, Line::Resync { revision }) => {
            output::line(&format!("{revision:>8} resync"))
        }
        (Format::Json, line) => match serde_json::to_string(line) {
            Ok(text) => output::line(&text),
            Err(error) => {
                Err(Failure::new(Exit::Failed, "cannot print a change").why(error.to_string()))
            }
        },
        (Format::Yaml, line) => {
            output::line("---")?;
            output::print(Format::Yaml, line, |_| String::new())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_caught_up_with_by_the_differences() {
        let file = |key: &str, revision| File {
            key: key.to_owned(),
            content: Vec::new(),
            create_revision: 1,
            revision,
        };
        let known = [("same", 3), ("changed", 4), ("gone", 5)];
        let known = known.into_iter().map(|(key, revision)| (key.to_owned(), revision)).collect();
        let mut position = Position { prefix: String::new(), all: true, next: 6, known };
        let present = vec![file("changed", 8), file("new", 9), file("same", 3)];
        let lines = position.differences(present, 10);
        let told: Vec<_> = lines
            .iter()
            .map(|line| match line {
                Line::Put(shown) => format!("put {}", shown.key),
                Line::Deleted { key, .. } => format!("deleted {key}"),
                Line::Resync { revision } => format!("resync {revision}"),
            })
            .collect();
        assert_eq!(told, ["resync 10", "put changed", "put new", "deleted gone"]);
        assert_eq!(position.next, 11);
    }
}
