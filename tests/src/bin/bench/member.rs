//! A member of the store in a process of its own: what the agent runs, without the agent.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use cluster::{Cluster, ClusterConfig, Opened, open};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Server;

/// Where it is, and how it comes to be a member.
#[derive(Args)]
pub(crate) struct Options {
    #[arg(long)]
    dir: PathBuf,
    #[arg(long)]
    name: String,
    #[arg(long)]
    api: u16,
    #[arg(long)]
    enrol: u16,
    /// Joins with this token
    #[arg(long)]
    token: Option<String>,
    /// Makes the cluster, and a certificate for the request in this file
    #[arg(long)]
    csr: Option<PathBuf>,
}

/// What a member that made the cluster says on its standard output, as one line of JSON.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Made {
    pub(crate) cluster_id: String,
    pub(crate) ca_pem: String,
    pub(crate) certificate_pem: String,
    pub(crate) tokens: Vec<String>,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let address = |port: u16| format!("127.0.0.1:{port}");
    let config = ClusterConfig::new(
        options.dir.clone(),
        address(options.api),
        address(options.enrol),
    );
    let mut made = None;
    let cluster = match (open(config).await?, &options.token, &options.csr) {
        (Opened::Member(cluster), _, _) => cluster,
        (Opened::Fresh(fresh), Some(token), _) => fresh.join(token, &options.name).await?,
        (Opened::Fresh(fresh), None, Some(csr)) => {
            let cluster = fresh.init("bench", &options.name).await?;
            made = Some(first(&cluster, csr).await?);
            cluster
        }
        (Opened::Fresh(_), None, None) => bail!("neither a member nor about to become one"),
    };
    let api = TcpListener::bind(address(options.api)).await?;
    let enrol = TcpListener::bind(address(options.enrol)).await?;
    let members = Server::builder()
        .add_service(cluster.raft_service())
        .add_service(cluster.config_service())
        .add_service(cluster.membership_service())
        .serve_with_incoming(cluster.incoming(api)?);
    let strangers = Server::builder()
        .add_service(cluster.enrolment_service())
        .serve_with_incoming(cluster.enrol_incoming(enrol)?);
    if let Some(made) = made {
        println!("{}", serde_json::to_string(&made)?);
    }
    let mut end = signal(SignalKind::terminate())?;
    tokio::select! {
        result = members => result?,
        result = strangers => result?,
        why = cluster.failed() => bail!("{why}"),
        _ = end.recv() => {}
    }
    cluster.shutdown().await;
    Ok(())
}

async fn first(cluster: &Cluster, csr: &PathBuf) -> anyhow::Result<Made> {
    let csr = std::fs::read_to_string(csr).context("the certificate request")?;
    let issued = cluster.issue_client("bench", &csr).await?;
    let tokens = vec![cluster.create_token(0).await?.token, cluster.create_token(0).await?.token];
    Ok(Made {
        cluster_id: cluster.cluster_id().to_owned(),
        ca_pem: issued.ca_pem,
        certificate_pem: issued.certificate_pem,
        tokens,
    })
}
