//! `clusterctl cluster backup`: the configuration as one file. The file is checked while it is
//! written, and has its name only once it is whole and on the disk.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use proto::backup::{Header, Reader, Summary};
use proto::v1;
use proto::v1::membership_client::MembershipClient;
use serde::Serialize;
use tempfile::NamedTempFile;
use tonic::transport::Channel;

use crate::connect::Session;
use crate::failure::{Exit, Failure};
use crate::output;
use crate::wait::interrupt;

pub(super) const AFTER_HELP: &str = "\
It holds all documents, which VMs there are, and the secrets under priv/, at one revision, taken
while the cluster works. It does not hold the history, disk images, the cluster's CA, nodes, join
tokens: a cluster that is restored from it makes a CA of its own.

The file has secrets in it: root takes it, on a node (over its local socket), and it is made for its
owner alone (mode 0600); keep it as such. Its checksums show damage, not forgery.

Examples:
  clusterctl cluster backup /backup/prod-$(date +%F).hfb
  clusterctl cluster backup --stale prod.hfb     # without a quorum: what this node has";

/// Nothing came for so long: the connection is of no use.
const SILENCE: Duration = Duration::from_secs(60);

/// What was written.
#[derive(Debug, Serialize)]
struct Written {
    file: String,
    #[serde(flatten)]
    header: Header,
    keys: u64,
    bytes: u64,
}

pub(super) async fn run(
    session: &Session,
    client: MembershipClient<Channel>,
    file: &Path,
    stale: bool,
    force: bool,
) -> Result<(), Failure> {
    if !force && file.exists() {
        return Err(Failure::new(Exit::Refused, format!("cannot write {}", file.display()))
            .why("it is there already")
            .remedy("choose another name, or replace it with --force"));
    }
    let folder = match file.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    if !folder.is_dir() {
        return Err(Failure::new(Exit::NotFound, format!("cannot write {}", file.display()))
            .why(format!("there is no folder {}", folder.display()))
            .remedy(format!(
                "make it (`mkdir -p {}`), or mount what belongs there, then try again",
                folder.display()
            )));
    }
    let failed = |error: std::io::Error| Failure::file("write", file, &error);
    // For its owner alone, and gone with this value unless it is kept.
    let mut partial = NamedTempFile::new_in(folder).map_err(failed)?;
    let what = format!("back up the cluster into {}", file.display());
    let limit = async {
        match session.global.timeout {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    let nothing = |exit, why: &str| {
        Err(Failure::new(exit, format!("cannot {what}")).why(format!("{why}; no file was left")))
    };
    let (header, summary) = tokio::select! {
        received = receive(client, stale, &what, &mut partial, file) => received?,
        () = limit => return nothing(Exit::Timeout, "the time limit passed"),
        () = interrupt() => return nothing(Exit::Interrupted, "interrupted"),
    };
    partial.as_file().sync_all().map_err(failed)?;
    let kept = if force { partial.persist(file) } else { partial.persist_noclobber(file) };
    kept.map_err(|error| failed(error.error))?;
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)?;
    let file = file.display().to_string();
    let written = Written { file, header, keys: summary.rows, bytes: summary.bytes };
    output::print(session.global.output, &written, |written| {
        output::fields([
            ("file", written.file.clone()),
            ("cluster", format!("{} ({})", written.header.cluster_name, written.header.cluster_id)),
            ("revision", written.header.revision.to_string()),
            ("keys", written.keys.to_string()),
            ("size", output::size(written.bytes)),
            ("note", "secrets are in it: keep it for root alone".to_owned()),
        ])
    })
}

/// Writes the pieces, and takes them apart on the way: what is wrong is known at once.
async fn receive(
    mut client: MembershipClient<Channel>,
    stale: bool,
    what: &str,
    partial: &mut NamedTempFile,
    file: &Path,
) -> Result<(Header, Summary), Failure> {
    let refused = |status: tonic::Status| Failure::status(what, &status);
    let damaged = |error: proto::backup::BackupError| {
        Failure::new(Exit::Failed, format!("cannot {what}"))
            .why(format!("what the node sent is not whole: {error}; no file was left"))
    };
    let silent = |_| {
        Failure::new(Exit::Unreachable, format!("cannot {what}"))
            .why(format!("nothing came for {} s; no file was left", SILENCE.as_secs()))
    };
    let asked = client.backup(v1::BackupRequest { stale });
    let answer = tokio::time::timeout(SILENCE, asked).await.map_err(silent)?;
    let mut chunks = answer.map_err(refused)?.into_inner();
    let (mut reader, bar) = (Reader::default(), bar());
    loop {
        let next = tokio::time::timeout(SILENCE, chunks.message()).await.map_err(silent)?;
        let Some(chunk) = next.map_err(refused)? else { break };
        reader.push(&chunk.data).map_err(damaged)?;
        if let Some(header) = reader.header() {
            bar.set_length(header.about_bytes);
        }
        bar.inc(chunk.data.len() as u64);
        partial.write_all(&chunk.data).map_err(|error| Failure::file("write", file, &error))?;
    }
    bar.finish_and_clear();
    let header = reader.header().cloned();
    let summary = reader.finish().map_err(damaged)?;
    let cut_off = || damaged(proto::backup::BackupError::CutOff(summary.bytes));
    Ok((header.ok_or_else(cut_off)?, summary))
}

/// Shown on a terminal only.
pub(super) fn bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) =
        ProgressStyle::with_template("{bar:30} {binary_bytes} of about {binary_total_bytes}, {eta}")
    {
        bar.set_style(style);
    }
    bar
}
