//! `config history`, `config diff PATH@A..B` and `config rollback`: what was.

use std::collections::BTreeSet;

use proto::v1;
use serde::Serialize;

use super::change::{self, Options, Planned};
use crate::diffs;
use crate::failure::{Exit, Failure};
use crate::files::{File, Files, Read, Value};
use crate::output::{self, or_dash};
use crate::paths::{self, Span};

/// What of the history is asked for.
pub(super) struct Wanted {
    pub(super) limit: u32,
    pub(super) before: u64,
    pub(super) patch: bool,
    pub(super) all: bool,
}

/// One change, for programs.
#[derive(Debug, Serialize)]
struct Change {
    revision: u64,
    at_ms: u64,
    author: String,
    path: String,
    change: &'static str,
    previous_revision: u64,
    #[serde(flatten)]
    content: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    diff: Option<String>,
}

pub(super) async fn history(
    files: &mut Files<'_>,
    path: &str,
    wanted: &Wanted,
) -> Result<(), Failure> {
    let is_prefix = path.is_empty() || path.ends_with('/');
    let prefix = if is_prefix { paths::prefix(path) } else { paths::key(path) };
    let (changes, compacted) = fetch(files, &prefix, !is_prefix, wanted).await?;
    // What is before the first revision is nothing.
    let compacted = if compacted > 1 { compacted } else { 0 };
    if changes.is_empty() && compacted == 0 && !is_prefix {
        return Err(Failure::new(Exit::NotFound, format!("{prefix} has no history"))
            .why("there is no such file, and was none")
            .remedy("see `clusterctl config ls`"));
    }
    let mut shown = Vec::with_capacity(changes.len());
    for change in changes {
        let diff = if wanted.patch { Some(patch(files, &change).await?) } else { None };
        shown.push(Change {
            revision: change.revision,
            at_ms: change.at_ms,
            author: change.author,
            change: verb(change.previous_revision, change.content.is_some()),
            path: change.path,
            previous_revision: change.previous_revision,
            content: change.content.map(Value::from),
            diff,
        });
    }
    output::print(files.session.global.output, &shown, |shown| table(shown, wanted.patch))?;
    if compacted > 0 && shown.len() < usize::try_from(wanted.limit).unwrap_or(usize::MAX) {
        eprintln!("note: changes before revision {compacted} may be missing: they were compacted");
    }
    Ok(())
}

fn verb(previous_revision: u64, there: bool) -> &'static str {
    match (there, previous_revision) {
        (false, _) => "removed",
        (true, 0) => "created",
        (true, _) => "changed",
    }
}

/// The newest changes, and up to which revision there may have been others.
async fn fetch(
    files: &mut Files<'_>,
    prefix: &str,
    exact: bool,
    wanted: &Wanted,
) -> Result<(Vec<v1::Change>, u64), Failure> {
    let limit = usize::try_from(wanted.limit).unwrap_or(usize::MAX);
    let everything = wanted.all || !paths::is_peoples(prefix);
    let mut changes: Vec<v1::Change> = Vec::new();
    let mut before_revision = wanted.before;
    loop {
        let request = v1::HistoryRequest {
            prefix: prefix.to_owned(),
            exact,
            before_revision,
            limit: wanted.limit.clamp(1, 500),
        };
        let what =
            format!("read the history of {}", if prefix.is_empty() { "all" } else { prefix });
        let page = files.session.call(&what, files.client.history(request)).await?;
        let peoples = |change: &v1::Change| everything || paths::is_peoples(&change.path);
        changes.extend(page.changes.into_iter().filter(peoples));
        if changes.len() >= limit || !page.more || page.next_before_revision == 0 {
            changes.truncate(limit);
            return Ok((changes, page.compacted_revision));
        }
        before_revision = page.next_before_revision;
    }
}

/// What a change did to its file.
async fn patch(files: &mut Files<'_>, change: &v1::Change) -> Result<String, Failure> {
    let before = match change.previous_revision {
        0 => None,
        previous => match files.get(&change.path, Read::At(previous)).await {
            Ok((file, _)) => file,
            Err(failure) if failure.exit == Exit::NotFound => {
                return Ok(format!("(what {} was before is compacted)\n", change.path));
            }
            Err(failure) => return Err(failure),
        },
    };
    let before = before.as_ref().map(|file| file.content.as_slice());
    Ok(diffs::unified(&change.path, before, change.content.as_deref()))
}

fn when(at_ms: u64) -> String {
    let at = std::time::UNIX_EPOCH.checked_add(std::time::Duration::from_millis(at_ms));
    // The formatter takes years up to 9999.
    match at.filter(|_| at_ms > 0 && at_ms < 253_402_300_800_000) {
        Some(at) => humantime::format_rfc3339_seconds(at).to_string(),
        None => "-".to_owned(),
    }
}

fn table(changes: &[Change], patch: bool) -> String {
    let row = |change: &Change| {
        let (revision, author) = (change.revision.to_string(), or_dash(&change.author));
        [revision, when(change.at_ms), author, change.change.to_owned(), change.path.clone()]
    };
    if !patch {
        let headings = ["REVISION", "WHEN", "AUTHOR", "CHANGE", "PATH"];
        return output::columns(headings, changes.iter().map(row));
    }
    let texts = changes.iter().map(|change| {
        let diff = diffs::painted(change.diff.as_deref().unwrap_or_default());
        format!("{}\n{diff}", row(change).join("  "))
    });
    texts.collect::<Vec<_>>().join("\n")
}

/// `config diff PATH@A..B`.
pub(super) async fn diff(
    files: &mut Files<'_>,
    span: Option<Span>,
    exit_code: bool,
) -> Result<(), Failure> {
    let Some(Span { key, revisions: Some((from, to)) }) = span else {
        return Err(Failure::new(Exit::Usage, "nothing to compare with").remedy(
            "give revisions, as in vms/web@12..40 or vms/web@12 (see `clusterctl config history`), \
             or a file with -f",
        ));
    };
    let (before, _) = files.get(&key, Read::At(from)).await?;
    let (after, _) = files.get(&key, to.map_or(Read::Linearizable, Read::At)).await?;
    if before.is_none() && after.is_none() {
        return Err(Failure::new(Exit::NotFound, format!("there is no {key}"))
            .why("neither then nor then")
            .remedy(format!("see `clusterctl config history {key}`")));
    }
    let plan = Planned { key, before, after: after.map(|file| file.content) };
    let differs = plan.before.as_ref().map(|file| &file.content) != plan.after.as_ref();
    let plan: Vec<Planned> = Some(plan).filter(|_| differs).into_iter().collect();
    super::apply::show(files, &plan, exit_code)
}

/// `config rollback`: a new commit that makes things what they were.
pub(super) async fn rollback(
    files: &mut Files<'_>,
    path: &str,
    to: u64,
    options: Options,
) -> Result<(), Failure> {
    let is_folder = path.ends_with('/');
    let key = if is_folder { paths::prefix(path) } else { paths::key(path) };
    let (present, revision) = state(files, &key, is_folder, Read::Linearizable).await?;
    if to > revision {
        return Err(Failure::new(Exit::Usage, format!("there is no revision {to} yet"))
            .why(format!("the cluster is at revision {revision}")));
    }
    let (past, _) = state(files, &key, is_folder, Read::At(to)).await?;
    if past.is_empty() && present.is_empty() {
        return Err(Failure::new(Exit::NotFound, format!("there is no {key}"))
            .why(format!("neither now nor at revision {to}"))
            .remedy(format!("see `clusterctl config history {key}`")));
    }
    let wanted = change::Wanted {
        files: past.into_iter().map(|file| (file.key, file.content)).collect(),
        folders: BTreeSet::new(),
    };
    let plan = change::plan(&wanted, present, true);
    let source = |key: &str| format!("{key}@{to}");
    change::carry_out(files, plan, revision, options, true, &source).await
}

/// A file or all of a folder's, with the revision of the answer.
async fn state(
    files: &mut Files<'_>,
    key: &str,
    is_folder: bool,
    read: Read,
) -> Result<(Vec<File>, u64), Failure> {
    if is_folder {
        let (mut found, revision) = files.list(key, read).await?;
        found.retain(|file| paths::is_peoples(&file.key));
        return Ok((found, revision));
    }
    let (file, revision) = files.get(key, read).await?;
    Ok((file.into_iter().collect(), revision))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_utc_and_wild_ones_are_none() {
        assert_eq!(when(1_700_000_000_123), "2023-11-14T22:13:20Z");
        assert_eq!((when(0).as_str(), when(u64::MAX).as_str()), ("-", "-"));
    }

    #[test]
    fn changes_have_verbs() {
        assert_eq!(
            [verb(0, true), verb(3, true), verb(3, false)],
            ["created", "changed", "removed"]
        );
    }
}
