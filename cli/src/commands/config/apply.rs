//! `config apply` and `config diff -f`: files here against the cluster's.

use std::path::{Path, PathBuf};

use super::change::{self, Options, Planned, Wanted};
use super::local::{read_folder, read_input};
use crate::failure::{Exit, Failure};
use crate::files::{File, Files, Read};
use crate::paths::{self, Span};

/// What was given with `-f`.
struct Given {
    wanted: Wanted,
    /// For messages: where the file of a key is.
    origin: PathBuf,
    is_folder: bool,
}

impl Given {
    fn source(&self, key: &str) -> String {
        match (self.is_folder, self.origin.as_os_str() == "-") {
            (true, _) => self.origin.join(key).display().to_string(),
            (false, true) => key.to_owned(),
            (false, false) => self.origin.display().to_string(),
        }
    }
}

fn given(path: Option<&str>, file: &Path) -> Result<Given, Failure> {
    let origin = file.to_owned();
    if file.is_dir() {
        if path.is_some() {
            return Err(Failure::new(Exit::Usage, "a folder is applied as a whole")
                .why("a path is given together with a folder")
                .remedy("leave the path out, or name a single file"));
        }
        return Ok(Given { wanted: read_folder(file)?, origin, is_folder: true });
    }
    let content = read_input(file)?;
    let key = match path {
        Some(path) => paths::key(path),
        None => paths::guess(file, &content).ok_or_else(|| {
            Failure::new(Exit::Usage, format!("where does {} belong?", file.display()))
                .why("neither its name nor its content tells its path in the cluster")
                .remedy("name the path, as in: vms/web -f web.toml")
        })?,
    };
    let files = [(key, content)].into_iter().collect();
    let wanted = Wanted { files, ..Wanted::default() };
    Ok(Given { wanted, origin, is_folder: false })
}

/// The cluster's files that are to be compared, and their revision.
async fn present(files: &mut Files<'_>, given: &Given) -> Result<(Vec<File>, u64), Failure> {
    match given.wanted.files.keys().next() {
        Some(key) if !given.is_folder => {
            let (file, revision) = files.get(key, Read::Linearizable).await?;
            Ok((file.into_iter().collect(), revision))
        }
        _ => files.peoples(Read::Linearizable).await,
    }
}

pub(super) async fn apply(
    files: &mut Files<'_>,
    path: Option<&str>,
    file: &Path,
    prune: bool,
    options: Options,
) -> Result<(), Failure> {
    if prune && !file.is_dir() {
        return Err(Failure::new(Exit::Usage, "--prune goes with a folder")
            .why("a single file says nothing about what else there should be"));
    }
    let given = given(path, file)?;
    let (present, revision) = present(files, &given).await?;
    let plan = change::plan(&given.wanted, present, prune);
    let source = |key: &str| given.source(key);
    change::carry_out(files, plan, revision, options, false, &source).await
}

/// `config diff -f`: from the cluster's to what is here.
pub(super) async fn diff(
    files: &mut Files<'_>,
    path: Option<Span>,
    file: &Path,
    exit_code: bool,
) -> Result<(), Failure> {
    let key = match path {
        Some(Span { key, revisions: None }) => Some(key),
        Some(Span { key, revisions: Some(_) }) => {
            return Err(Failure::new(Exit::Usage, format!("cannot compare {key}"))
                .why("revisions and a file are given; one of them is enough"));
        }
        None => None,
    };
    let given = given(key.as_deref(), file)?;
    let (present, _) = present(files, &given).await?;
    let plan = change::plan(&given.wanted, present, given.is_folder);
    show(files, &plan, exit_code)
}

/// Prints differences; an exit code of 1 for them is asked for.
pub(super) fn show(files: &Files<'_>, plan: &[Planned], exit_code: bool) -> Result<(), Failure> {
    change::print_differences(files, plan)?;
    if exit_code && !plan.is_empty() {
        return Err(Failure::new(Exit::Failed, format!("{} files differ", plan.len())));
    }
    Ok(())
}
