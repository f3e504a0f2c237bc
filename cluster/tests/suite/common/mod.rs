//! Real members in one process: real RocksDB in temporary folders, real mTLS on loopback ports.
//! Each member has a runtime of its own, so that killing it drops everything it was doing.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cluster::{Cluster, ClusterConfig, Member, OpenError, Opened, RaftTimings, open};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tonic::transport::Server;

use crate::ports::free_port;

pub(crate) type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// How long a test waits for a condition before it fails.
pub(crate) const LIMIT: Duration = Duration::from_secs(40);

/// One member, running or not.
pub(crate) struct TestNode {
    pub(crate) name: String,
    pub(crate) folder: PathBuf,
    pub(crate) config: ClusterConfig,
    running: Option<(Runtime, Cluster)>,
}

/// A cluster of them.
pub(crate) struct Lab {
    pub(crate) nodes: Vec<TestNode>,
    _folder: TempDir,
}

/// Threads of a member.
const WORKERS: usize = 2;

fn runtime() -> Outcome<Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?)
}

/// Mounts a member's services where its config says.
pub(crate) async fn serve(cluster: &Cluster, config: &ClusterConfig) -> Outcome {
    let api = bind(&config.api_address).await?;
    let enrol = bind(&config.enrol_address).await?;
    let members = Server::builder()
        .add_service(cluster.raft_service())
        .serve_with_incoming(cluster.incoming(api)?);
    let strangers = Server::builder()
        .add_service(cluster.enrolment_service())
        .serve_with_incoming(cluster.enrol_incoming(enrol)?);
    tokio::spawn(members);
    tokio::spawn(strangers);
    Ok(())
}

/// A port of a member that was just killed may be held for a moment.
async fn bind(address: &str) -> Outcome<TcpListener> {
    let address: SocketAddr = address.parse()?;
    let until = Instant::now() + LIMIT;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(error) if Instant::now() > until => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

pub(crate) fn test_config(folder: &Path) -> Outcome<ClusterConfig> {
    let address = || format!("127.0.0.1:{}", free_port());
    let mut config = ClusterConfig::new(folder.to_owned(), address(), address());
    config.timings = RaftTimings { heartbeat_ms: 150, election_min_ms: 600, election_max_ms: 1200 };
    Ok(config)
}

/// Opens a folder, waiting for a member that was just killed to let go of it.
async fn open_soon(config: &ClusterConfig) -> Result<Opened, OpenError> {
    let until = Instant::now() + LIMIT;
    loop {
        match open(config.clone()).await {
            Err(OpenError::InUse { .. }) if Instant::now() < until => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            other => return other,
        }
    }
}

impl TestNode {
    pub(crate) fn new(folder: &Path, name: &str) -> Outcome<Self> {
        let folder = folder.join(name);
        let config = test_config(&folder)?;
        Ok(Self { name: name.to_owned(), folder, config, running: None })
    }

    pub(crate) fn cluster(&self) -> Outcome<Cluster> {
        Ok(self.running.as_ref().ok_or("the node is not running")?.1.clone())
    }

    /// Runs something on the member's own runtime.
    pub(crate) fn run<T: Send + 'static, F>(&self, f: impl FnOnce(Cluster) -> F) -> Outcome<T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let (runtime, cluster) = self.running.as_ref().ok_or("the node is not running")?;
        Ok(runtime.block_on(f(cluster.clone())))
    }

    pub(crate) fn init(&mut self) -> Outcome {
        let (runtime, config, name) = (runtime()?, self.config.clone(), self.name.clone());
        let cluster = runtime.block_on(async move {
            let Opened::Fresh(fresh) = open(config.clone()).await? else {
                return Err("the folder is not fresh".into());
            };
            let cluster = fresh.init("test", &name).await?;
            serve(&cluster, &config).await?;
            Outcome::Ok(cluster)
        })?;
        self.running = Some((runtime, cluster));
        Ok(())
    }

    pub(crate) fn join(&mut self, token: &str) -> Outcome {
        let (runtime, config, name) = (runtime()?, self.config.clone(), self.name.clone());
        let token = token.to_owned();
        let cluster = runtime.block_on(async move {
            let Opened::Fresh(fresh) = open(config.clone()).await? else {
                return Err("the folder is not fresh".into());
            };
            let cluster = fresh.join(&token, &name).await?;
            serve(&cluster, &config).await?;
            Outcome::Ok(cluster)
        })?;
        self.running = Some((runtime, cluster));
        Ok(())
    }

    pub(crate) fn start(&mut self) -> Outcome {
        let (runtime, config) = (runtime()?, self.config.clone());
        let cluster = runtime.block_on(async move {
            let Opened::Member(cluster) = open_soon(&config).await? else {
                return Err("the folder holds no member".into());
            };
            serve(&cluster, &config).await?;
            Outcome::Ok(cluster)
        })?;
        self.running = Some((runtime, cluster));
        Ok(())
    }

    /// Runs a member that nobody reaches, though it reaches the others.
    pub(crate) fn start_deaf(&mut self) -> Outcome {
        let (runtime, config) = (runtime()?, self.config.clone());
        let cluster = runtime.block_on(async move {
            match open_soon(&config).await? {
                Opened::Member(cluster) => Outcome::Ok(cluster),
                Opened::Fresh(_) => Err("the folder holds no member".into()),
            }
        })?;
        self.running = Some((runtime, cluster));
        Ok(())
    }

    /// Lets it be reached again.
    pub(crate) fn hear(&self) -> Outcome {
        let config = self.config.clone();
        self.run(|cluster| async move { serve(&cluster, &config).await })?
    }

    /// Another place to be reached at, from its next start on.
    pub(crate) fn move_away(&mut self) -> Outcome {
        self.config.api_address = format!("127.0.0.1:{}", free_port());
        self.config.enrol_address = format!("127.0.0.1:{}", free_port());
        Ok(())
    }

    /// Drops everything at once, without an orderly end.
    pub(crate) fn kill(&mut self) {
        if let Some((runtime, cluster)) = self.running.take() {
            drop(cluster);
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }

    /// An orderly end.
    pub(crate) fn stop(&mut self) {
        if let Some((runtime, cluster)) = self.running.take() {
            runtime.block_on(cluster.shutdown());
            drop(cluster);
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.is_some()
    }
}

/// Holds up all threads of a member: its connections stay open, and nothing is answered on them.
pub(crate) struct Hang(Vec<std::sync::mpsc::Sender<()>>);

impl TestNode {
    /// Hangs until the value is dropped.
    pub(crate) fn hang(&self) -> Outcome<Hang> {
        let (runtime, _) = self.running.as_ref().ok_or("the node is not running")?;
        let (held, holds) = std::sync::mpsc::channel();
        let hang = (0..WORKERS).map(|_| {
            let (release, until) = std::sync::mpsc::channel();
            let held = held.clone();
            runtime.spawn(async move {
                let _ = held.send(());
                let _ = until.recv();
            });
            release
        });
        let hang = Hang(hang.collect());
        for _ in 0..WORKERS {
            holds.recv_timeout(LIMIT)?;
        }
        Ok(hang)
    }
}

impl Drop for TestNode {
    fn drop(&mut self) {
        self.kill();
        self.wait_closed();
    }
}

impl TestNode {
    /// Waits until the database is closed, which lets go of the folder's lock. Threads of one that
    /// is still open as the process ends use what RocksDB takes apart at its exit, and abort it.
    pub(crate) fn wait_closed(&self) {
        let Ok(lock) = std::fs::File::open(self.config.data_dir.join("lock")) else { return };
        let until = Instant::now() + Duration::from_secs(5);
        while lock.try_lock().is_err() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Lab {
    /// A cluster with as many voters as it gets; `tune` adjusts each one's settings.
    pub(crate) fn with(count: usize, tune: impl Fn(&mut ClusterConfig)) -> Outcome<Self> {
        let folder = tempfile::tempdir()?;
        let mut nodes = Vec::new();
        for number in 1..=count {
            let mut node = TestNode::new(folder.path(), &format!("n{number}"))?;
            tune(&mut node.config);
            nodes.push(node);
        }
        let mut lab = Self { nodes, _folder: folder };
        lab.nodes[0].init()?;
        for number in 1..count {
            let token = lab.token(0)?;
            lab.nodes[number].join(&token)?;
        }
        // An odd number, but two of two.
        let voters = if count == 2 { 2 } else { count - (count + 1) % 2 };
        // By each one's copy: whoever leads next goes on with these voters, and no others.
        lab.wait("there are enough voters", |lab| {
            for place in 0..count {
                let members = lab.members(place)?;
                let voting = members.iter().filter(|member| member.voter).count();
                if members.len() != count || voting != voters {
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
        Ok(lab)
    }

    pub(crate) fn new(count: usize) -> Outcome<Self> {
        Self::with(count, |_| {})
    }

    pub(crate) fn folder(&self) -> &Path {
        self._folder.path()
    }

    pub(crate) fn token(&self, on: usize) -> Outcome<String> {
        let made = self.nodes[on].run(|cluster| async move { cluster.create_token(0).await })??;
        Ok(made.token)
    }

    pub(crate) fn members(&self, on: usize) -> Outcome<Vec<Member>> {
        Ok(self.nodes[on].cluster()?.members())
    }

    /// Waits for a condition, with a limit.
    pub(crate) fn wait(
        &self,
        what: &str,
        mut holds: impl FnMut(&Self) -> Outcome<bool>,
    ) -> Outcome {
        let until = Instant::now() + LIMIT;
        while Instant::now() < until {
            if holds(self)? {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(format!("did not happen within {LIMIT:?}: {what}").into())
    }

    /// The place of the present leader, by what a running node that leads says of itself.
    pub(crate) fn leader(&self) -> Outcome<usize> {
        let mut found = None;
        self.wait("there is a leader", |lab| {
            for (place, node) in lab.nodes.iter().enumerate() {
                if let Ok(cluster) = node.cluster()
                    && cluster.leadership().borrow().is_leader
                    && node.run(|c| async move { c.confirm_leadership().await.is_ok() })?
                {
                    found = Some(place);
                }
            }
            Ok(found.is_some())
        })?;
        found.ok_or_else(|| "no leader".into())
    }
}
