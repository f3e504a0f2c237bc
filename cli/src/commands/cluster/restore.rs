//! `clusterctl cluster restore`: a new cluster from a backup, on a node that is in none.

use std::fs::File;
use std::io::{IsTerminal, Read, Seek};
use std::path::Path;

use proto::backup::{BackupError, Header, Reader, Summary};
use proto::v1;
use proto::v1::membership_client::MembershipClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::backup::bar;
use crate::connect::Session;
use crate::failure::{Exit, Failure};
use crate::output;
use crate::wait::interrupt;

pub(super) const AFTER_HELP: &str = "\
Run it as root on a node that is in no cluster. It makes a new cluster, with an id and a CA of its
own: the nodes of the old one cannot speak to it, and contexts are made anew. Documents and secrets
are as they were; nodes join again, with new tokens; the history begins anew.

ALL VMS OF THE OLD CLUSTER MUST BE OFF, on every machine, before one of them is started in the new
one: the new cluster cannot see what still runs there, and two VMs on one disk destroy it. So all
VMs come back stopped, and a person starts each.

Examples:
  clusterctl cluster restore prod.hfb
  clusterctl cluster restore prod.hfb --name prod2 --yes";

/// Bytes in one message.
const CHUNK: usize = 256 << 10;

pub(super) struct Wanted {
    pub(super) name: String,
    pub(super) node_name: String,
    pub(super) yes: bool,
}

pub(super) async fn run(
    session: &Session,
    client: MembershipClient<Channel>,
    path: &Path,
    wanted: Wanted,
) -> Result<(), Failure> {
    let what = format!("restore {}", path.display());
    // Before anything is asked or sent: what is wrong with the file is said at once.
    let mut file = File::open(path).map_err(|error| Failure::file("read", path, &error))?;
    let (header, summary) = read(&mut file, path, &what)?;
    eprintln!("{}", described(&header, summary));
    if !wanted.yes && !confirmed().await? {
        return Err(Failure::new(Exit::Refused, format!("cannot {what}"))
            .why("it was not confirmed; nothing was changed"));
    }
    let names = v1::RestoreNames { cluster_name: wanted.name, node_name: wanted.node_name };
    let restored = tokio::select! {
        restored = send(client, file, names, summary, &what) => restored?,
        () = interrupt() => {
            return Err(Failure::new(Exit::Interrupted, format!("stopped waiting: {what}"))
                .why("a file that was not sent whole changes nothing; one that was is being restored")
                .remedy("see `clusterctl cluster status` on this node"));
        }
    };
    output::print(session.global.output, &restored, |restored| {
        output::fields([
            ("cluster", format!("{} ({})", restored.cluster_name, restored.cluster_id)),
            ("node id", restored.node_id.to_string()),
            ("CA SHA-256", format!("{} (new)", restored.ca_fingerprint)),
            ("keys", restored.keys.to_string()),
            ("VMs", format!("{}, all stopped", restored.vms)),
            ("next", "make sure that no machine of the old cluster runs a VM; `clusterctl cluster token create` and `cluster join` for each other node; then `clusterctl vm start NAME`; `clusterctl context create-admin` for each context".to_owned()),
        ])
    })
}

/// Reads the file to its end.
fn read(file: &mut File, path: &Path, what: &str) -> Result<(Header, Summary), Failure> {
    let wrong = |error: BackupError| {
        Failure::new(Exit::Usage, format!("cannot {what}"))
            .why(format!("{error}; nothing was changed"))
    };
    let (mut reader, mut piece) = (Reader::default(), vec![0; CHUNK]);
    loop {
        match file.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => drop(reader.push(&piece[..count]).map_err(wrong)?),
            Err(error) => return Err(Failure::file("read", path, &error)),
        }
    }
    let header = reader.header().cloned();
    let summary = reader.finish().map_err(wrong)?;
    file.rewind().map_err(|error| Failure::file("read", path, &error))?;
    Ok((header.ok_or_else(|| wrong(BackupError::CutOff(summary.bytes)))?, summary))
}

fn described(header: &Header, summary: Summary) -> String {
    let fields = output::fields([
        ("backup of", format!("{} ({})", header.cluster_name, header.cluster_id)),
        ("made", format!("{}, on {}", output::ago(header.at_unix_ms), header.node)),
        ("revision", header.revision.to_string()),
        ("keys", summary.rows.to_string()),
    ]);
    format!(
        "{fields}\n\nALL VMS OF THE OLD CLUSTER MUST BE OFF, on every machine, and stay off: two VMs on one disk destroy it.\nThis node becomes the first of a new cluster with a CA of its own; all VMs come back stopped."
    )
}

async fn confirmed() -> Result<bool, Failure> {
    if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
        return Err(Failure::new(Exit::Usage, "nobody can be asked: there is no terminal")
            .remedy("confirm it with --yes"));
    }
    eprint!("\nType `restore` to go on: ");
    let answer = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).map(|_| line).unwrap_or_default()
    });
    tokio::select! {
        answer = answer => Ok(answer.is_ok_and(|line| line.trim() == "restore")),
        () = interrupt() => Ok(false),
    }
}

async fn send(
    mut client: MembershipClient<Channel>,
    mut file: File,
    names: v1::RestoreNames,
    summary: Summary,
    what: &str,
) -> Result<v1::RestoreResponse, Failure> {
    let (messages, stream) = mpsc::channel(4);
    let bar = bar();
    bar.set_length(summary.bytes);
    let shown = bar.clone();
    let sending = tokio::task::spawn_blocking(move || -> std::io::Result<()> {
        let first = v1::RestoreRequest { names: Some(names), data: Vec::new() };
        // A closed channel means that the agent has answered already: its answer says why.
        if messages.blocking_send(first).is_err() {
            return Ok(());
        }
        loop {
            let mut data = vec![0; CHUNK];
            let count = file.read(&mut data)?;
            data.truncate(count);
            if count == 0
                || messages.blocking_send(v1::RestoreRequest { names: None, data }).is_err()
            {
                return Ok(());
            }
            shown.inc(count as u64);
        }
    });
    // What cannot be read any more ends the stream early; the agent finds that it was cut off.
    let answer = client.restore(ReceiverStream::new(stream)).await;
    bar.finish_and_clear();
    let failed = |why: String| Failure::new(Exit::Failed, format!("cannot {what}")).why(why);
    match sending.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return Err(failed(error.to_string())),
        Err(error) => return Err(failed(error.to_string())),
    }
    answer.map(tonic::Response::into_inner).map_err(|status| Failure::status(what, &status))
}
