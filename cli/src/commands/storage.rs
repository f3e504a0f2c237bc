//! `clusterctl storage`: pools that images live in.

use clap::{Subcommand, ValueEnum};
use proto::v1;
use proto::v1::storage_client::StorageClient;

use crate::connect::Session;
use crate::failure::Failure;
use crate::output;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// All pools
    #[command(visible_alias = "ls", after_help = "Examples:\n  clusterctl storage list")]
    List,
    /// Make a pool of a folder
    #[command(
        after_help = "Examples:\n  clusterctl storage create shared --kind shared-dir --path /mnt/nas/holdfast\n  clusterctl storage create local --kind local-dir --path /srv/holdfast --create"
    )]
    Create {
        /// Its name
        name: String,
        /// Whether all nodes see the same files there
        #[arg(long)]
        kind: Kind,
        /// The folder, the same path on every node
        #[arg(long)]
        path: String,
        /// Make the folder if it is missing on the node that is asked
        #[arg(long)]
        create: bool,
    },
    /// Forget a pool that no VM uses; its images stay where they are
    #[command(visible_alias = "rm", after_help = "Examples:\n  clusterctl storage delete old")]
    Delete {
        /// The pool
        name: String,
    },
}

/// Kinds of pools.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Kind {
    /// A folder of each node's own
    LocalDir,
    /// One folder that all nodes mount
    SharedDir,
}

pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    let mut client = StorageClient::new(session.channel.clone());
    let format = session.global.output;
    match command {
        Command::List => {
            let pools = client.list_pools(v1::ListPoolsRequest {});
            let pools = session.call("list storage pools", pools).await?;
            output::print(format, &pools, |pools| table(&pools.pools))
        }
        Command::Create { name, kind, path, create } => {
            let what = format!("create storage pool {name}");
            if matches!(kind, Kind::LocalDir) {
                eprintln!("note: each node makes {path} when it first uses the pool");
            }
            let kind = match kind {
                Kind::LocalDir => "local-dir",
                Kind::SharedDir => "shared-dir",
            };
            let pool = v1::Pool { name, kind: kind.to_owned(), path, ..v1::Pool::default() };
            let request = v1::CreatePoolRequest { pool: Some(pool), create_folder: create };
            let pool = session.call(&what, client.create_pool(request)).await?;
            output::print(format, &pool, |pool| table(std::slice::from_ref(pool)))
        }
        Command::Delete { name } => {
            let what = format!("delete storage pool {name}");
            let deleted = client.delete_pool(v1::DeletePoolRequest { name });
            let deleted = session.call(&what, deleted).await?;
            output::print(format, &deleted, |_| format!("done: {what}"))
        }
    }
}

fn table(pools: &[v1::Pool]) -> String {
    let size = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), output::size);
    let rows = pools.iter().map(|pool| {
        let (capacity, free) = (size(pool.capacity_bytes), size(pool.free_bytes));
        [pool.name.clone(), pool.kind.clone(), pool.path.clone(), capacity, free]
    });
    output::columns(["POOL", "KIND", "PATH", "CAPACITY", "FREE"], rows)
}
