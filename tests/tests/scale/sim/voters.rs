//! The voters: real members (openraft, RocksDB, TLS, gRPC), each on a runtime of its own, whose
//! threads are told apart by their name. Beside Raft they answer lease heartbeats by the same two
//! calls of the cluster crate as the agent does (`node-agent/src/ha/leader.rs`).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use cluster::{Cluster, ClusterConfig, Consistency, Opened, open};
use proto::v1::peer_client::PeerClient;
use proto::v1::peer_server::{Peer, PeerServer};
use proto::v1::{
    AbortMigrationRequest, AbortMigrationResponse, FinishMigrationRequest, FinishMigrationResponse,
    HeartbeatRequest, HeartbeatResponse, PrepareMigrationRequest, PrepareMigrationResponse,
};
use proto::{NodeId, keys};
use tokio::runtime::Runtime;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::net::Net;

/// Between two lease heartbeats of a node (0.1 L).
pub(crate) const LEASE_EVERY: Duration = Duration::from_secs(1);

/// One voter.
#[derive(Debug)]
pub(crate) struct Voter {
    pub(crate) cluster: Cluster,
    pub(crate) runtime: Runtime,
    thread: String,
    folder: PathBuf,
}

/// Where a node is reached, by its number from 0.
pub(crate) fn address(number: usize) -> String {
    format!("v{number}:1")
}

fn config(number: usize, folder: PathBuf, most: usize, net: &Net) -> ClusterConfig {
    let mut config = ClusterConfig::new(folder, address(number), format!("e{number}:1"));
    config.voters_max = most;
    // No stand-in takes the seat of a voter that is killed.
    config.voter_patience = Duration::from_secs(24 * 3600);
    // While the cluster forms, who comes later gets what was before by snapshot.
    config.snapshot_every = 500;
    config.snapshot_bytes = 0;
    config.snapshot_keep = 20;
    config.host = Arc::new(net.clone());
    config
}

/// As many voters as are asked for, and nobody else.
pub(crate) fn start(
    count: usize,
    folder: &std::path::Path,
    net: &Net,
) -> anyhow::Result<Vec<Voter>> {
    let mut voters: Vec<Voter> = Vec::new();
    for number in 0..count {
        let token = match voters.first() {
            Some(first) => {
                let cluster = first.cluster.clone();
                Some(first.runtime.block_on(async move { cluster.create_token(0).await })?.token)
            }
            None => None,
        };
        let folder = folder.join(format!("v{number}"));
        voters.push(Voter::start(config(number, folder, count, net), number, token, net)?);
    }
    let until = Instant::now() + Duration::from_secs(60);
    let voting = || voters[0].cluster.members().iter().filter(|member| member.voter).count();
    while voting() < count {
        if Instant::now() > until {
            bail!("{} of {count} members vote", voting());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(voters)
}

impl Voter {
    fn start(
        config: ClusterConfig,
        number: usize,
        token: Option<String>,
        net: &Net,
    ) -> anyhow::Result<Self> {
        let thread = format!("voter-{number}");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name(&thread)
            .enable_all()
            .build()?;
        let (folder, net) = (config.data_dir.clone(), net.clone());
        let cluster = runtime.block_on(async move {
            let (api, enrol) = (net.listen(&config.api_address), net.listen(&config.enrol_address));
            let Opened::Fresh(fresh) = open(config).await? else {
                bail!("the folder is not fresh")
            };
            let name = format!("v{number}");
            let cluster = match token {
                None => fresh.init("scale", &name).await?,
                Some(token) => fresh.join(&token, &name).await?,
            };
            let members = Server::builder()
                .add_service(cluster.raft_service())
                .add_service(PeerServer::new(Leases(cluster.clone())))
                .serve_with_incoming(cluster.incoming(api)?);
            let strangers = Server::builder()
                .add_service(cluster.enrolment_service())
                .serve_with_incoming(cluster.enrol_incoming(enrol)?);
            tokio::spawn(members);
            tokio::spawn(strangers);
            tokio::spawn(beat(cluster.clone()));
            Ok(cluster)
        })?;
        Ok(Self { cluster, runtime, thread, folder })
    }

    pub(crate) fn leads(&self) -> bool {
        self.cluster.leadership().borrow().is_leader
    }

    /// What its threads have used so far; its database's own are not among them.
    pub(crate) fn cpu(&self) -> anyhow::Result<Duration> {
        let mut ticks = 0;
        for task in std::fs::read_dir("/proc/self/task")? {
            // A thread may end meanwhile.
            let Ok(text) = std::fs::read_to_string(task?.path().join("stat")) else { continue };
            let (start, rest) = text.rsplit_once(')').context("a thread without a name")?;
            if start.split_once('(').is_none_or(|(_, name)| name != self.thread) {
                continue;
            }
            // utime and stime, fields 14 and 15; the first here is the third.
            let fields: Vec<&str> = rest.split_whitespace().collect();
            for field in [14, 15] {
                ticks += fields.get(field - 3).context("no times")?.parse::<u64>()?;
            }
        }
        // A tick is 10 ms, whatever the kernel's own is (USER_HZ, proc_pid_stat(5)).
        Ok(Duration::from_millis(10 * ticks))
    }

    /// Ends it at once, as a crash would.
    pub(crate) fn kill(self) -> Gone {
        let Self { cluster, runtime, folder, .. } = self;
        drop(cluster);
        runtime.shutdown_background();
        Gone(folder)
    }
}

/// A voter that was ended. Dropping it waits until its database is closed: RocksDB takes apart at
/// the end of the process what threads of an open one still use.
#[derive(Debug)]
pub(crate) struct Gone(PathBuf);

impl Drop for Gone {
    fn drop(&mut self) {
        let Ok(lock) = std::fs::File::open(self.0.join("lock")) else { return };
        let until = Instant::now() + Duration::from_secs(10);
        while lock.try_lock().is_err() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Answers lease heartbeats.
#[derive(Debug)]
struct Leases(Cluster);

async fn acknowledge(
    cluster: &Cluster,
    from: NodeId,
    sequence: u64,
) -> Result<HeartbeatResponse, Status> {
    let unavailable = |error: &dyn std::fmt::Display| Status::unavailable(error.to_string());
    let confirmed = cluster.confirm_leadership().await.map_err(|error| unavailable(&error))?;
    let fenced = cluster.get(&keys::fenced(from), Consistency::Since(confirmed)).await;
    let fenced = fenced.map_err(|error| unavailable(&error))?.0.is_some();
    let leader = cluster.node_id().0;
    Ok(HeartbeatResponse { sequence, leader, term: confirmed.term, fenced })
}

fn not_here<T>() -> Result<T, Status> {
    Err(Status::unimplemented("nothing migrates here"))
}

#[tonic::async_trait]
impl Peer for Leases {
    async fn heartbeat(
        &self,
        request: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatResponse>, Status> {
        let from = self.0.require_member(&request)?;
        acknowledge(&self.0, from, request.get_ref().sequence).await.map(Response::new)
    }
    async fn prepare_migration(
        &self,
        _: Request<PrepareMigrationRequest>,
    ) -> Result<Response<PrepareMigrationResponse>, Status> {
        not_here()
    }
    async fn finish_migration(
        &self,
        _: Request<FinishMigrationRequest>,
    ) -> Result<Response<FinishMigrationResponse>, Status> {
        not_here()
    }
    async fn abort_migration(
        &self,
        _: Request<AbortMigrationRequest>,
    ) -> Result<Response<AbortMigrationResponse>, Status> {
        not_here()
    }
}

/// A voter's own lease.
async fn beat(cluster: Cluster) {
    let mut ticks = tokio::time::interval(LEASE_EVERY);
    for sequence in 1.. {
        ticks.tick().await;
        let Some(leader) = cluster.leader() else { continue };
        let cluster = cluster.clone();
        tokio::spawn(async move {
            let node_id = cluster.node_id();
            if leader == node_id {
                let _ = acknowledge(&cluster, node_id, sequence).await;
            } else if let Ok(channel) = cluster.peer_channel(leader) {
                let request = HeartbeatRequest { node_id: node_id.0, sequence, report: None };
                let _ = PeerClient::new(channel).heartbeat(request).await;
            }
        });
    }
}
