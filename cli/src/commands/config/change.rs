//! From what is to change to a commit of it: the plan, the question before files are removed, the
//! commits, and what is said about them. Used by every verb that writes.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal;
use std::path::Path;

use serde::Serialize;

use super::local::read_input;
use crate::args::Format;
use crate::diffs::{self, Count};
use crate::failure::{Exit, Failure};
use crate::files::{Change, Committed, File, Files, Read};
use crate::{output, paths, refusal};

/// Bytes and changes of one commit: well below what the store takes in one transaction.
const COMMIT_BYTES: usize = 2 << 20;
const COMMIT_CHANGES: usize = 1000;

/// How careful a verb is.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Options {
    /// Show and check, but change nothing.
    pub(super) dry_run: bool,
    /// Remove files without asking.
    pub(super) yes: bool,
}

/// One file that is to change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Planned {
    pub(super) key: String,
    /// As it is, with its revision. `None`: absent.
    pub(super) before: Option<File>,
    /// `None`: removed.
    pub(super) after: Option<Vec<u8>>,
}

impl Planned {
    fn diff(&self) -> String {
        let before = self.before.as_ref().map(|file| file.content.as_slice());
        diffs::unified(&self.key, before, self.after.as_deref())
    }

    fn verb(&self) -> &'static str {
        match (&self.before, &self.after) {
            (None, _) => "created",
            (Some(_), Some(_)) => "changed",
            (Some(_), None) => "removed",
        }
    }

    pub(super) fn change(&self) -> Change {
        Change {
            key: self.key.clone(),
            expected: self.before.as_ref().map_or(0, |file| file.revision),
            content: self.after.clone(),
        }
    }
}

/// Files as they are wanted.
#[derive(Debug, Clone, Default)]
pub(super) struct Wanted {
    pub(super) files: BTreeMap<String, Vec<u8>>,
    /// All folders, each with its slash, also those that hold files.
    pub(super) folders: BTreeSet<String>,
}

/// What has to change. `prune`: what is not wanted goes.
pub(super) fn plan(wanted: &Wanted, present: Vec<File>, prune: bool) -> Vec<Planned> {
    let mut present: BTreeMap<String, File> =
        present.into_iter().map(|file| (file.key.clone(), file)).collect();
    let has = |present: &BTreeMap<String, File>, folder: &str| {
        present.range(folder.to_owned()..).next().is_some_and(|(key, _)| key.starts_with(folder))
    };
    let empty = wanted.folders.iter().filter(|folder| {
        let holds = wanted.files.range((*folder).clone()..).next();
        !holds.is_some_and(|(key, _)| key.starts_with(*folder))
            && !present.contains_key(*folder)
            && (prune || !has(&present, folder))
    });
    let mut plan: Vec<Planned> = empty
        .map(|folder| Planned { key: folder.clone(), before: None, after: Some(Vec::new()) })
        .collect();
    for (key, content) in &wanted.files {
        let before = present.remove(key);
        if before.as_ref().is_none_or(|file| file.content != *content) {
            plan.push(Planned { key: key.clone(), before, after: Some(content.clone()) });
        }
    }
    if prune {
        let unwanted = present
            .into_values()
            .filter(|file| !wanted.folders.contains(&file.key) && !paths::is_scratch(&file.key));
        plan.extend(unwanted.map(|file| Planned {
            key: file.key.clone(),
            before: Some(file),
            after: None,
        }));
    }
    plan
}

/// What was done, for programs.
#[derive(Debug, Serialize)]
struct Report {
    dry_run: bool,
    /// Of the commit; of the last one, where it took several.
    revision: u64,
    changes: Vec<Reported>,
}

#[derive(Debug, Serialize)]
struct Reported {
    path: String,
    change: &'static str,
    added: usize,
    removed: usize,
    diff: String,
}

/// What the person calls a file, and the text that was sent.
pub(super) type Source<'a> = dyn Fn(&str) -> String + 'a;

/// Commits a plan and says what was done. `revision`: the one that the plan was made at.
pub(super) async fn carry_out(
    files: &mut Files<'_>,
    plan: Vec<Planned>,
    revision: u64,
    options: Options,
    show_diff: bool,
    source: &Source<'_>,
) -> Result<(), Failure> {
    if !options.dry_run && !options.yes {
        ask_for_removals(&plan)?;
    }
    let batches = batches(plan.clone());
    let mut revision = revision;
    for (index, batch) in batches.iter().enumerate() {
        let done = commit(files, batch, options.dry_run, source).await;
        revision = done.map_err(|failure| partly(failure, index, batches.len()))?;
    }
    report(files, &plan, revision, options, show_diff)
}

/// One commit; gives its revision.
pub(super) async fn commit(
    files: &mut Files<'_>,
    batch: &[Planned],
    dry_run: bool,
    source: &Source<'_>,
) -> Result<u64, Failure> {
    let what = match batch {
        [one] => format!("write {}", one.key),
        several => format!("write {} files", several.len()),
    };
    let changes = batch.iter().map(Planned::change).collect();
    match files.commit(&what, changes, dry_run).await? {
        Committed::Done(revision) => Ok(revision),
        Committed::Refused(refusals) => Err(refusal::failure(&what, &refusals, |key| {
            let planned = batch.iter().find(|planned| planned.key == key);
            let text = planned.and_then(|planned| planned.after.as_deref());
            (source(key), text.and_then(|text| std::str::from_utf8(text).ok()))
        })),
    }
}

fn partly(failure: Failure, done: usize, all: usize) -> Failure {
    if done == 0 {
        return failure;
    }
    let what = format!("{} ({done} of {all} commits are done)", failure.what);
    Failure { what, ..failure }.remedy("when that is resolved, run it again: it goes on from there")
}

/// Splits what does not fit in one commit: what others refer to first, removals last.
fn batches(mut plan: Vec<Planned>) -> Vec<Vec<Planned>> {
    plan.sort_by_key(|planned| {
        let rank = rank(&planned.key);
        let removed = planned.after.is_none();
        (removed, if removed { -rank } else { rank }, planned.key.clone())
    });
    let mut batches: Vec<Vec<Planned>> = Vec::new();
    let mut room = 0;
    for planned in plan {
        let size = planned.key.len() + planned.after.as_ref().map_or(0, Vec::len);
        match batches.last_mut() {
            Some(batch) if size <= room && batch.len() < COMMIT_CHANGES => {
                room -= size;
                batch.push(planned);
            }
            _ => {
                room = COMMIT_BYTES.saturating_sub(size);
                batches.push(vec![planned]);
            }
        }
    }
    batches
}

fn rank(key: &str) -> i32 {
    match key.split_once('/').map(|(folder, _)| folder) {
        None => 0,
        Some("nodes" | "access") => 1,
        Some("vms") => 2,
        Some("ha") => 3,
        Some(_) => 4,
    }
}

fn ask_for_removals(plan: &[Planned]) -> Result<(), Failure> {
    let removed: Vec<&str> = plan
        .iter()
        .filter(|planned| planned.after.is_none())
        .map(|planned| planned.key.as_str())
        .collect();
    if removed.is_empty() {
        return Ok(());
    }
    let list = removed.join("\n");
    if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
        return Err(Failure::new(Exit::Usage, "files would be removed, and nobody can be asked")
            .why(list)
            .remedy("look at it with --dry-run, then give --yes"));
    }
    eprint!("These files will be removed:\n  {}\nGo on? [y/N] ", list.replace('\n', "\n  "));
    let mut answer = String::new();
    let _ = std::io::stdin().read_line(&mut answer);
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(Failure::new(Exit::Interrupted, "nothing was changed")),
    }
}

fn reported(planned: &Planned) -> Reported {
    let diff = planned.diff();
    let Count { added, removed } = diffs::count(&diff);
    Reported { path: planned.key.clone(), change: planned.verb(), added, removed, diff }
}

/// Prints what differs, nothing where nothing does.
pub(super) fn print_differences(files: &Files<'_>, plan: &[Planned]) -> Result<(), Failure> {
    let format = files.session.global.output;
    if plan.is_empty() && format == Format::Table {
        return Ok(());
    }
    let changes: Vec<Reported> = plan.iter().map(reported).collect();
    output::print(format, &changes, |changes| {
        changes.iter().map(|change| diffs::painted(&change.diff)).collect()
    })
}

/// Says what was done, or would be.
pub(super) fn report(
    files: &Files<'_>,
    plan: &[Planned],
    revision: u64,
    Options { dry_run, .. }: Options,
    show_diff: bool,
) -> Result<(), Failure> {
    let report = Report { dry_run, revision, changes: plan.iter().map(reported).collect() };
    output::print(files.session.global.output, &report, |report| {
        if report.changes.is_empty() {
            return "nothing to change".to_owned();
        }
        let mut text = String::new();
        if show_diff || dry_run {
            text.extend(report.changes.iter().map(|change| diffs::painted(&change.diff)));
        }
        for Reported { path, change, added, removed, .. } in &report.changes {
            let verb = if dry_run { format!("would be {change}") } else { (*change).to_owned() };
            text.push_str(&format!("{path} {verb} (+{added} -{removed})\n"));
        }
        if !dry_run {
            text.push_str(&format!("revision {revision}"));
        }
        text
    })
}

/// How often `put` looks again where others write the same file.
const PUT_TRIES: u32 = 5;

/// `config put`: whatever is there, unless a revision is expected.
pub(super) async fn put(
    files: &mut Files<'_>,
    path: &str,
    file: &Path,
    expect: Option<u64>,
    dry_run: bool,
) -> Result<(), Failure> {
    let key = paths::key(path);
    let content = read_input(file)?;
    let text = String::from_utf8(content.clone()).ok();
    let what = format!("write {key}");
    let name = if file.as_os_str() == "-" { key.clone() } else { file.display().to_string() };
    let mut tries = if expect.is_some() { 1 } else { PUT_TRIES };
    loop {
        let expected = match expect {
            Some(expected) => expected,
            None => {
                let (present, _) = files.get(&key, Read::Linearizable).await?;
                present.map_or(0, |file| file.revision)
            }
        };
        let change = Change { key: key.clone(), expected, content: Some(content.clone()) };
        tries -= 1;
        match files.commit(&what, vec![change], dry_run).await? {
            Committed::Done(revision) => {
                return say_written(files, &key, revision, dry_run, "written");
            }
            Committed::Refused(refusals) if tries > 0 && refusal::is_conflict(&refusals) => {}
            Committed::Refused(refusals) => {
                let file_of = |_: &str| (name.clone(), text.as_deref());
                return Err(refusal::failure(&what, &refusals, file_of));
            }
        }
    }
}

/// `config rm`.
pub(super) async fn rm(files: &mut Files<'_>, path: &str, dry_run: bool) -> Result<(), Failure> {
    let key = paths::key(path);
    let file = files.existing(&key, Read::Linearizable).await?;
    let what = format!("remove {key}");
    let change = Change { key: key.clone(), expected: file.revision, content: None };
    match files.commit(&what, vec![change], dry_run).await? {
        Committed::Done(revision) => say_written(files, &key, revision, dry_run, "removed"),
        Committed::Refused(refusals) => {
            Err(refusal::failure(&what, &refusals, |key| (key.to_owned(), None)))
        }
    }
}

fn say_written(
    files: &Files<'_>,
    key: &str,
    revision: u64,
    dry_run: bool,
    verb: &str,
) -> Result<(), Failure> {
    #[derive(Debug, Serialize)]
    struct Written<'a> {
        path: &'a str,
        revision: u64,
        dry_run: bool,
    }
    let written = Written { path: key, revision, dry_run };
    output::print(files.session.global.output, &written, |_| match dry_run {
        true => format!("{key} would be {verb}"),
        false => format!("{key} {verb}, revision {revision}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(key: &str, content: &str, revision: u64) -> File {
        let content = content.as_bytes().to_vec();
        File { key: key.to_owned(), content, create_revision: 1, revision }
    }

    fn wanted(files: &[(&str, &str)], folders: &[&str]) -> Wanted {
        Wanted {
            files: files.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec())).collect(),
            folders: folders.iter().map(|folder| (*folder).to_owned()).collect(),
        }
    }

    fn verbs(plan: &[Planned]) -> Vec<(&str, &str)> {
        plan.iter().map(|planned| (planned.verb(), planned.key.as_str())).collect()
    }

    #[test]
    fn only_what_differs_changes_and_only_from_what_was_seen() {
        let present = || vec![file("a", "1", 5), file("b", "1", 6), file("c", "1", 7)];
        let wanted = wanted(&[("a", "1"), ("b", "2"), ("d", "1")], &[]);
        let planned = plan(&wanted, present(), false);
        assert_eq!(verbs(&planned), [("changed", "b"), ("created", "d")]);
        let expected: Vec<_> = planned.iter().map(|planned| planned.change().expected).collect();
        assert_eq!(expected, [6, 0]);
        let planned = plan(&wanted, present(), true);
        assert_eq!(verbs(&planned), [("changed", "b"), ("created", "d"), ("removed", "c")]);
    }

    #[test]
    fn folders_are_made_and_kept_but_not_doubled() {
        let one = |present: Vec<File>, wanted: &Wanted, prune| {
            let plan = plan(wanted, present, prune);
            plan.into_iter().map(|planned| (planned.verb(), planned.key)).collect::<Vec<_>>()
        };
        let empty = wanted(&[], &["notes/"]);
        let full = wanted(&[("notes/a", "")], &["notes/"]);
        assert_eq!(one(vec![], &empty, false), [("created", "notes/".to_owned())]);
        assert_eq!(one(vec![file("notes/", "", 1)], &empty, true), []);
        assert_eq!(one(vec![file("notes/b", "", 1)], &empty, false), []);
        let (made, gone) = (("created", "notes/".to_owned()), ("removed", "notes/b".to_owned()));
        assert_eq!(one(vec![file("notes/b", "", 1)], &empty, true), [made, gone]);
        assert_eq!(one(vec![file("notes/", "", 1), file("notes/a", "", 1)], &full, true), []);
        assert_eq!(one(vec![file("notes/.a.swp", "", 1)], &wanted(&[], &[]), true), []);
    }

    #[test]
    fn a_large_plan_is_split_with_what_others_need_first() {
        let big = "x".repeat(COMMIT_BYTES - 1000);
        let wanted =
            wanted(&[("vms/web.toml", &big), ("storage.toml", "s"), ("notes/x", &big)], &[]);
        let present = vec![file("vms/old.toml", "", 1), file("networks.toml", "", 1)];
        let split = batches(plan(&wanted, present, true));
        let keys: Vec<Vec<&str>> =
            split.iter().map(|batch| batch.iter().map(|p| p.key.as_str()).collect()).collect();
        let last = vec!["notes/x", "vms/old.toml", "networks.toml"];
        assert_eq!(keys, [vec!["storage.toml", "vms/web.toml"], last]);
        let many = (0..COMMIT_CHANGES + 1).map(|n| (format!("n/{n}"), Vec::new())).collect();
        let many = Wanted { files: many, folders: BTreeSet::new() };
        assert_eq!(batches(plan(&many, Vec::new(), false)).len(), 2);
    }
}
