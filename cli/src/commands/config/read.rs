//! `config ls`, `config get`, `config show`.

use crate::args::Format;
use crate::failure::{Exit, Failure};
use crate::files::{File, Files, Read, Shown};
use crate::output;
use crate::paths::{self, At};

pub(super) async fn ls(
    files: &mut Files<'_>,
    prefix: &str,
    all: bool,
    stale: bool,
) -> Result<(), Failure> {
    let prefix = paths::prefix(prefix);
    let (mut found, _) = files.list(&prefix, Read::stale(stale)).await?;
    if !all && paths::is_peoples(&prefix) {
        found.retain(|file| paths::is_peoples(&file.key));
    }
    let shown: Vec<Shown> = found.iter().cloned().map(Shown::from).collect();
    output::print(files.session.global.output, &shown, |_| {
        let rows = found.iter().map(|file| {
            let size = output::size(file.content.len() as u64);
            [file.key.clone(), file.revision.to_string(), size]
        });
        output::columns(["PATH", "REVISION", "SIZE"], rows)
    })
}

pub(super) async fn get(files: &mut Files<'_>, path: &str, stale: bool) -> Result<(), Failure> {
    let file = files.existing(&paths::key(path), Read::stale(stale)).await?;
    print(files, file)
}

pub(super) async fn show(files: &mut Files<'_>, path: At) -> Result<(), Failure> {
    let Some(revision) = path.revision else {
        return Err(Failure::new(Exit::Usage, format!("no revision is given for {}", path.key))
            .remedy(format!(
                "write {}@REVISION (see `clusterctl config history {0}`), or use `clusterctl config get`",
                path.key
            )));
    };
    let file = files.existing(&path.key, Read::At(revision)).await?;
    print(files, file)
}

/// For people the content as it is, to the byte: it may be piped into a file.
fn print(files: &Files<'_>, file: File) -> Result<(), Failure> {
    match files.session.global.output {
        Format::Table => output::bytes(&file.content),
        format => output::print(format, &Shown::from(file), |_| String::new()),
    }
}
