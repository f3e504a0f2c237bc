//! `clusterctl config`: the replicated configuration, read only.

use clap::Subcommand;
use proto::v1;
use proto::v1::config_client::ConfigClient;
use proto::v1::watch_event::Event;
use serde::Serialize;
use tonic::transport::Channel;

use crate::args::Format;
use crate::connect::Session;
use crate::failure::{Exit, Failure};
use crate::output;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// One key's value
    #[command(
        after_help = "Examples:\n  clusterctl config get vms/web.toml\n  clusterctl config get status/vms/web -o json"
    )]
    Get {
        /// The key
        key: String,
        /// What the asked node has; answers without a quorum
        #[arg(long)]
        stale: bool,
    },
    /// The keys under a prefix
    #[command(after_help = "Examples:\n  clusterctl config ls\n  clusterctl config ls vms/")]
    Ls {
        /// What the keys begin with
        #[arg(default_value = "", hide_default_value = true)]
        prefix: String,
        /// What the asked node has; answers without a quorum
        #[arg(long)]
        stale: bool,
    },
    /// Every change under a prefix as it happens, until Ctrl-C
    #[command(
        after_help = "Examples:\n  clusterctl config watch status/vms/\n  clusterctl config watch vms/ --from-revision 100 -o json"
    )]
    Watch {
        /// What the keys begin with
        #[arg(default_value = "", hide_default_value = true)]
        prefix: String,
        /// Begin with the changes of this revision; 0: from now on
        #[arg(long, value_name = "REVISION", default_value_t = 0, hide_default_value = true)]
        from_revision: u64,
    },
}

/// A key's value, as text where it is text.
#[derive(Debug, Serialize)]
struct Entry {
    key: String,
    value: String,
    create_revision: u64,
    mod_revision: u64,
}

impl From<v1::KeyValue> for Entry {
    fn from(kv: v1::KeyValue) -> Self {
        Self {
            key: kv.key,
            value: String::from_utf8_lossy(&kv.value).into_owned(),
            create_revision: kv.create_revision,
            mod_revision: kv.mod_revision,
        }
    }
}

/// One change, for `watch`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Change {
    Put(Entry),
    Deleted { key: String, revision: u64 },
}

/// Answers may be large: a range's page, a document.
const MESSAGE_MAX: usize = 64 << 20;
/// Keys in one page of a range.
const PAGE: u32 = 500;

pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    let mut client =
        ConfigClient::new(session.channel.clone()).max_decoding_message_size(MESSAGE_MAX);
    match command {
        Command::Get { key, stale } => {
            let what = format!("read {key}");
            let request = v1::GetRequest {
                key: key.clone(),
                consistency: consistency(stale),
                at_revision: 0,
            };
            let answer = session.call(&what, client.get(request)).await?;
            let Some(kv) = answer.kv else {
                return Err(Failure::new(Exit::NotFound, format!("there is no key {key}"))
                    .why(format!("as of revision {}", answer.revision))
                    .remedy("see `clusterctl config ls`"));
            };
            output::print(session.global.output, &Entry::from(kv), |entry| entry.value.clone())
        }
        Command::Ls { prefix, stale } => {
            let entries = list(session, &mut client, prefix, consistency(stale)).await?;
            output::print(session.global.output, &entries, |entries| {
                let rows = entries.iter().map(|entry| {
                    let size = output::size(entry.value.len() as u64);
                    [entry.key.clone(), entry.mod_revision.to_string(), size]
                });
                output::columns(["KEY", "REVISION", "SIZE"], rows)
            })
        }
        Command::Watch { prefix, from_revision } => {
            let request = v1::WatchRequest { prefix, from_revision };
            let watch = watch(session, &mut client, request);
            tokio::select! {
                outcome = watch => outcome,
                () = crate::wait::interrupt() => Ok(()),
            }
        }
    }
}

fn consistency(stale: bool) -> i32 {
    let consistency = if stale { v1::Consistency::Stale } else { v1::Consistency::Linearizable };
    consistency.into()
}

async fn list(
    session: &Session,
    client: &mut ConfigClient<Channel>,
    prefix: String,
    consistency: i32,
) -> Result<Vec<Entry>, Failure> {
    let mut entries: Vec<Entry> = Vec::new();
    loop {
        let after = entries.last().map(|entry| entry.key.clone()).unwrap_or_default();
        let request = v1::RangeRequest {
            prefix: prefix.clone(),
            limit: PAGE,
            consistency,
            after,
            at_revision: 0,
        };
        let page = session.call("list keys", client.range(request)).await?;
        let more = page.more && !page.kvs.is_empty();
        entries.extend(page.kvs.into_iter().map(Entry::from));
        if !more {
            return Ok(entries);
        }
    }
}

async fn watch(
    session: &Session,
    client: &mut ConfigClient<Channel>,
    request: v1::WatchRequest,
) -> Result<(), Failure> {
    let what = format!("watch {}", request.prefix);
    let mut changes = session.call(&what, client.watch(request)).await?;
    loop {
        let response = match changes.message().await {
            Ok(Some(response)) => response,
            Ok(None) => return Ok(()),
            Err(status) => return Err(Failure::status(&what, &status)),
        };
        for event in response.events.into_iter().filter_map(|event| event.event) {
            let change = match event {
                Event::Put(kv) => Change::Put(kv.into()),
                Event::Deleted(gone) => Change::Deleted { key: gone.key, revision: gone.revision },
            };
            print_change(session.global.output, &change)?;
        }
    }
}

/// One line for each change (YAML: one document), so that a pipe sees it at once.
fn print_change(format: Format, change: &Change) -> Result<(), Failure> {
    match (format, change) {
        (Format::Table, Change::Put(entry)) => {
            let value = entry.value.trim_end().replace('\n', "\n    ");
            output::line(&format!("{:>8} put     {}\n    {value}", entry.mod_revision, entry.key))
        }
        (Format::Table, Change::Deleted { key, revision }) => {
            output::line(&format!("{revision:>8} deleted {key}"))
        }
        (Format::Json, change) => match serde_json::to_string(change) {
            Ok(line) => output::line(&line),
            Err(error) => {
                Err(Failure::new(Exit::Failed, "cannot print a change").why(error.to_string()))
            }
        },
        (Format::Yaml, change) => {
            output::line("---")?;
            output::print(Format::Yaml, change, |_| String::new())
        }
    }
}
