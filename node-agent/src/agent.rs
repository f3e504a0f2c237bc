//! The daemon: opens the data folder, serves the local socket at once, and becomes a member when
//! the folder says so, or when `cluster init` or `join` makes it one. No restart is needed.
//!
//! ```text
//!   keeper of the watchdog ─► open ─┬─ Fresh ──── init / join ──┐
//!                                   └─ Member ──────────────────┴─► member: adopt VM processes,
//!                                                                   listeners, loops
//! ```
//!
//! Invariants: VM processes are adopted before anything is started; a graceful end leaves them
//! running; a member that can take no part any more ends its HA VMs before the agent ends.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use cluster::{
    Cluster, ClusterConfig, Consistency, OpenError, Opened, RaftTimings, StoreError, Uninitialized,
};
use futures::future::BoxFuture;
use ha_manager::Timing;
use proto::v1::{
    InitRequest, InitResponse, JoinRequest, JoinResponse, RestoreNames, RestoreRequest,
    RestoreResponse,
};
use proto::{Name, keys};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use crate::access::{Access, Guard};
use crate::api::{self, Api, Former};
use crate::config::Config;
use crate::documents::Documents;
use crate::ha::Leader;
use crate::jobs::Jobs;
use crate::lease::{Keeper, Lease};
use crate::node::{Hardware, Node, Slot};
use crate::store::{Board, Store};
use crate::supervisor::{Supervisor, SupervisorConfig};
use crate::task::TaskStore;
use crate::vms::Shutdowns;
use crate::{ha, hardware, leading, reconcile, telemetry, tree};

/// The exit status of [`Ended::Removed`]. The systemd unit does not start the agent again after it.
pub const EXIT_REMOVED: u8 = 3;

/// Why the agent ended by itself.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Ended {
    /// The node was removed from its cluster: to start the agent again changes nothing.
    #[error("{0}")]
    Removed(String),
    /// A member that cannot go on.
    #[error("{0}")]
    Failed(String),
}

/// How long the agent waits for its listeners and threads when it ends.
const END_LIMIT: Duration = Duration::from_secs(5);
/// How long `cluster join` waits for a new member's copy: clients wait for an answer for 30 s. It is a
/// member whatever becomes of that.
const CATCH_UP_LIMIT: Duration = Duration::from_secs(15);

/// The agent, member or not.
#[derive(Debug)]
pub struct Agent {
    config: Arc<Config>,
    slot: Slot,
    /// The data folder as long as it belongs to no cluster.
    fresh: Mutex<Option<Uninitialized>>,
    stop: CancellationToken,
    /// Why a member cannot go on.
    failure: mpsc::UnboundedSender<Ended>,
    /// Keeps the tree mounted until the agent ends.
    tree: std::sync::Mutex<Option<tokio::task::JoinHandle<()>>>,
    /// Has the watchdog, and this node's lease, from the first moment on.
    keeper: Arc<Keeper>,
    /// Locked until the agent has ended: another one would adopt, and end, this one's VMs.
    run_folder: std::sync::Mutex<Option<File>>,
}

/// Threads that serve requests.
const WORKERS_MIN: usize = 2;
const WORKERS_MAX: usize = 4;

/// The two listeners of a member, bound before it becomes one.
struct Listeners {
    api: TcpListener,
    enrol: TcpListener,
}

/// Runs the agent, on a runtime of its own, until SIGTERM or SIGINT, which leave the VMs running.
///
/// # Errors
/// What keeps it from starting, or going on.
pub fn run(config: Config) -> anyhow::Result<()> {
    on_a_runtime(run_until_told(config))
}

pub(crate) fn on_a_runtime<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    // tokio's own setting goes first.
    if std::env::var_os("TOKIO_WORKER_THREADS").is_none() {
        runtime.worker_threads(workers());
    }
    let runtime = runtime.enable_all().build()?;
    let ended = runtime.block_on(work);
    runtime.shutdown_timeout(Duration::from_secs(2));
    ended
}

/// Threads that serve requests: half of the cores, four at most, and two at least: one may wait for
/// the disk. The other cores are the VMs', and a thread more than there is work for costs the ones
/// that work: each wakes the next one.
fn workers() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / 2).clamp(WORKERS_MIN, WORKERS_MAX)
}

async fn run_until_told(config: Config) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let (agent, mut failures) = Agent::start(config, stop.clone()).await?;
    telemetry::notify_ready();
    let failure = tokio::select! {
        signal = terminated() => {
            tracing::info!("{signal}: ending; the VMs run on");
            None
        }
        failure = failures.recv() => failure,
    };
    telemetry::notify_stopping();
    agent.end().await;
    match failure {
        None => Ok(()),
        Some(ended) => Err(ended.into()),
    }
}

async fn terminated() -> &'static str {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = int.recv() => "SIGINT",
    }
}

/// A started agent, and where it says why it cannot go on.
pub type Started = anyhow::Result<(Arc<Agent>, mpsc::UnboundedReceiver<Ended>)>;

impl Agent {
    /// Starts the agent: the local socket, and everything else where it is a member. Boxed here, so
    /// that the whole agent is not compiled once more in every program that starts one.
    ///
    /// # Errors
    /// The data folder, the socket, a port.
    pub fn start(config: Config, stop: CancellationToken) -> BoxFuture<'static, Started> {
        Box::pin(Self::start_up(config, stop))
    }

    async fn start_up(config: Config, stop: CancellationToken) -> Started {
        let config = Arc::new(config);
        let run_folder = std::sync::Mutex::new(Some(lock_run_folder(&config.run_dir)?));
        let timing = Timing::new(config.timing.lease_ms)?;
        // First of all: the way to a lease of its own may be longer than the watchdog's patience.
        let keeper = Arc::new(Keeper::start(&config, timing)?);
        let opened = cluster::open(cluster_config(&config)).await.map_err(not_opened)?;
        let socket = api::bind_local(&config.socket_path()).await?;
        let (failure, failures) = mpsc::unbounded_channel();
        let (fresh, member) = match opened {
            Opened::Fresh(fresh) => (Some(fresh), None),
            Opened::Member(cluster) => (None, Some(cluster)),
        };
        let agent = Arc::new(Self {
            config,
            slot: Arc::new(ArcSwapOption::empty()),
            fresh: Mutex::new(fresh),
            stop,
            failure,
            tree: std::sync::Mutex::default(),
            keeper,
            run_folder,
        });
        if let Some(cluster) = member {
            let listeners = agent.bind().await?;
            agent.become_member(cluster, listeners).await?;
        } else {
            agent.keeper.release();
            tracing::info!(
                "this node belongs to no cluster yet; run `clusterctl cluster init` or `join`"
            );
        }
        let api = Api::new(agent.slot.clone());
        let guard = Guard::new(Access::default(), &agent.config.socket_path());
        let former = Arc::new(agent.clone());
        let serve = api::serve_local(api, former, guard, socket, agent.stop.clone());
        agent.watch("the local socket", serve);
        Ok((agent, failures))
    }

    /// The node, once it is a member.
    #[must_use]
    pub fn node(&self) -> Option<Arc<Node>> {
        self.slot.load_full()
    }

    /// Runs a server; its failure ends the agent.
    fn watch<E: std::fmt::Display>(
        &self,
        what: &'static str,
        serve: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        let (failure, stop) = (self.failure.clone(), self.stop.clone());
        tokio::spawn(async move {
            if let Err(error) = serve.await
                && !stop.is_cancelled()
            {
                // Nobody listens any more where the agent is ending.
                drop(failure.send(Ended::Failed(format!("{what} failed: {error}"))));
            }
        });
    }

    async fn bind(&self) -> anyhow::Result<Listeners> {
        let bind = |what, address| async move {
            TcpListener::bind(address).await.map_err(|error| {
                anyhow::anyhow!("cannot listen on {address} ({what}): {error}; choose another in the configuration")
            })
        };
        Ok(Listeners {
            api: bind("listen", self.config.listen).await?,
            enrol: bind("enrol_listen", self.config.enrol_listen).await?,
        })
    }

    async fn become_member(
        self: &Arc<Self>,
        cluster: Cluster,
        listeners: Listeners,
    ) -> anyhow::Result<()> {
        let config = self.config.clone();
        let timing = Timing::new(config.timing.lease_ms)?;
        let id = cluster.node_id();
        let name: Name = cluster.node_name().borrow().parse()?;
        let (supervisor, exits) = Supervisor::new(supervisor_config(&config))?;
        let adopted = supervisor.adopt_all()?;
        tracing::info!(node = %name, id = %id, adopted = adopted.len(), "member of `{}`", cluster.cluster_name());
        if config.node.witness {
            self.keeper.release(); // a watchdog guards what runs here
        } else {
            self.keeper.guard().await;
        }
        let tasks = TaskStore::open(id, name.clone(), config.data_dir.join("tasks"))?;
        let node = Arc::new(Node {
            id,
            first_name: name,
            store: Store::new(cluster.clone()),
            board: Board::default(),
            access: Access::default(),
            named: std::sync::Mutex::default(),
            supervisor,
            tasks,
            lease: Lease::new(timing),
            leader: Leader::new(id, timing),
            jobs: Jobs::default(),
            shutdowns: Shutdowns::default(),
            kick: Notify::new(),
            hardware: look_at_hardware(&config),
            watchdog: self.keeper.watchdog(),
            config,
        });
        if let Err(error) = node.access.load(&node.store).await {
            tracing::warn!("who may do what is not known yet: {error}");
        }
        let api = Api::new(self.slot.clone());
        self.slot.store(Some(node.clone()));
        let stop = &self.stop;
        let members = api::serve_members(api, node.clone(), listeners.api, stop.clone());
        self.watch("the api port", members);
        let enrolment = api::serve_enrolment(node.clone(), listeners.enrol, stop.clone());
        self.watch("the enrolment port", enrolment);
        self.background({
            let node = node.clone();
            async move { node.board.follow(&node.store).await }
        });
        self.background({
            let node = node.clone();
            async move { node.access.follow(&node.store).await }
        });
        self.background(reconcile::run(node.clone(), exits));
        self.background(ha::run(node.clone()));
        self.background(keep_record(node.clone()));
        self.background(leading::leave_while_drained(node.clone()));
        let writer = Arc::new(Documents::new(node.clone()));
        let tree = tree::run(node.config.tree.clone(), cluster.clone(), writer);
        let tree = self.background(tree);
        *self.tree.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(tree);
        self.background(self.clone().watch_member(node.clone(), cluster));
        self.keeper.member(node);
        Ok(())
    }

    fn background(
        &self,
        work: impl Future<Output = ()> + Send + 'static,
    ) -> tokio::task::JoinHandle<()> {
        let stop = self.stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = work => {}
            }
        })
    }

    /// Ends the agent when its member cannot go on: removed, or its database broken.
    async fn watch_member(self: Arc<Self>, node: Arc<Node>, cluster: Cluster) {
        let error = cluster.failed().await;
        let ended = node.supervisor.kill_all_ha();
        tracing::error!(ha_vms_ended = ended.len(), "{error}");
        // Gone, not only killed: else the watchdog is left running, and resets the machine.
        drop(tokio::time::timeout(END_LIMIT, node.supervisor.end_all_ha()).await);
        drop(self.failure.send(match error {
            StoreError::Removed => Ended::Removed(error.to_string()),
            error => Ended::Failed(error.to_string()),
        }));
    }

    /// Ends the agent and leaves the VMs running.
    pub async fn end(&self) {
        // Before the listeners go: the next leader needs this node's vote, where there are only two.
        if let Some(node) = self.node() {
            node.cluster().hand_over().await;
        }
        self.stop.cancel();
        let tree = self.tree.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(tree) = tree
            && tokio::time::timeout(END_LIMIT, tree).await.is_err()
        {
            tracing::warn!("the tree is still being mounted; ending all the same");
        }
        if let Some(node) = self.slot.swap(None) {
            let shutdown = node.cluster().shutdown();
            if tokio::time::timeout(END_LIMIT, shutdown).await.is_err() {
                tracing::warn!("the database is still busy; ending all the same");
            }
        }
        let keeper = self.keeper.clone();
        let ended = tokio::task::spawn_blocking(move || keeper.end());
        drop(tokio::time::timeout(END_LIMIT, ended).await);
        drop(std::fs::remove_file(self.config.socket_path()));
        self.run_folder.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    }

    fn internal(error: &anyhow::Error) -> Status {
        Status::failed_precondition(format!("{error:#}"))
    }
}

/// In tasks of their own: whoever asked may hang up in the middle (Ctrl-C), and a node that is half
/// a member could then neither go on nor begin anew.
#[tonic::async_trait]
impl Former for Arc<Agent> {
    async fn init(&self, request: InitRequest) -> Result<InitResponse, Status> {
        let agent = self.clone();
        formed(tokio::spawn(async move { agent.form_init(&agent, request).await })).await
    }

    async fn join(&self, request: JoinRequest) -> Result<JoinResponse, Status> {
        let agent = self.clone();
        formed(tokio::spawn(async move { agent.form_join(&agent, request).await })).await
    }

    async fn restore(&self, chunks: Streaming<RestoreRequest>) -> Result<RestoreResponse, Status> {
        if self.fresh.lock().await.is_none() {
            return Err(self.already());
        }
        let (names, file) = crate::restore::receive(&self.config.data_dir, chunks).await?;
        let agent = self.clone();
        formed(tokio::spawn(async move { agent.form_restore(&agent, names, file).await })).await
    }
}

async fn formed<T>(task: tokio::task::JoinHandle<Result<T, Status>>) -> Result<T, Status> {
    task.await.unwrap_or_else(|error| Err(Status::internal(format!("internal error: {error}"))))
}

impl Agent {
    fn already(&self) -> Status {
        let cluster = self.node().map(|node| node.cluster().cluster_name().to_owned());
        Status::already_exists(format!(
            "this node already belongs to the cluster `{}`",
            cluster.unwrap_or_default()
        ))
    }

    fn node_name(&self, wanted: &str) -> Result<String, Status> {
        if !wanted.is_empty() {
            return Ok(wanted.to_owned());
        }
        let name = self.config.default_node_name();
        Ok(name.map_err(|error| Status::invalid_argument(error.to_string()))?.to_string())
    }

    async fn form_init(
        &self,
        this: &Arc<Self>,
        request: InitRequest,
    ) -> Result<InitResponse, Status> {
        let mut fresh = self.fresh.lock().await;
        let Some(folder) = fresh.as_ref() else { return Err(self.already()) };
        let node_name = self.node_name(&request.node_name)?;
        let listeners = self.bind().await.map_err(|error| Self::internal(&error))?;
        let made = folder.init(&request.cluster_name, &node_name).await;
        let cluster = made.map_err(|error| api::init_status(&error))?;
        *fresh = None;
        let answer = InitResponse {
            cluster_id: cluster.cluster_id().to_string(),
            node_id: cluster.node_id().0,
            ca_fingerprint: cluster.ca_fingerprint().to_string(),
        };
        let member = this.become_member(cluster, listeners).await;
        member.map_err(|error| Self::internal(&error))?;
        Ok(answer)
    }

    async fn form_restore(
        &self,
        this: &Arc<Self>,
        names: RestoreNames,
        file: File,
    ) -> Result<RestoreResponse, Status> {
        let mut fresh = self.fresh.lock().await;
        let Some(folder) = fresh.as_ref() else { return Err(self.already()) };
        let node_name = self.node_name(&names.node_name)?;
        let listeners = self.bind().await.map_err(|error| Self::internal(&error))?;
        let made = folder.restore(file, &names.cluster_name, &node_name).await;
        let (cluster, restored) = made.map_err(|error| api::restore_status(&error))?;
        *fresh = None;
        let answer = RestoreResponse {
            cluster_id: cluster.cluster_id().to_owned(),
            cluster_name: cluster.cluster_name().to_owned(),
            node_id: cluster.node_id().0,
            ca_fingerprint: cluster.ca_fingerprint().to_owned(),
            from_cluster_id: restored.header.cluster_id,
            from_revision: restored.header.revision,
            keys: restored.keys,
            vms: restored.vms,
        };
        let member = this.become_member(cluster, listeners).await;
        member.map_err(|error| Self::internal(&error))?;
        Ok(answer)
    }

    async fn form_join(
        &self,
        this: &Arc<Self>,
        request: JoinRequest,
    ) -> Result<JoinResponse, Status> {
        let mut fresh = self.fresh.lock().await;
        let Some(folder) = fresh.as_ref() else { return Err(self.already()) };
        let node_name = self.node_name(&request.node_name)?;
        let listeners = self.bind().await.map_err(|error| Self::internal(&error))?;
        let joined = folder.join(&request.token, &node_name).await;
        let cluster = joined.map_err(|error| api::join_status(&error))?;
        *fresh = None;
        let member = this.become_member(cluster.clone(), listeners).await;
        member.map_err(|error| Self::internal(&error))?;
        drop(fresh);
        Ok(JoinResponse {
            cluster_id: cluster.cluster_id().to_string(),
            node_id: cluster.node_id().0,
            caught_up: has_caught_up(&cluster).await,
        })
    }
}

/// Waits until a new member's own copy holds what the cluster was when it joined, itself included:
/// until then its status would show a cluster of nobody. False: it did not get so far in time.
async fn has_caught_up(cluster: &Cluster) -> bool {
    let is_listed = || cluster.members().iter().any(|member| member.node_id == cluster.node_id());
    let copied = async {
        while cluster.get(keys::CLUSTER_DOCUMENT, Consistency::Linearizable).await.is_err()
            || !is_listed()
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(CATCH_UP_LIMIT, copied).await.is_ok()
}

/// One agent for each run folder: the VM processes in it are its own.
pub(crate) fn lock_run_folder(folder: &Path) -> anyhow::Result<File> {
    use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
    let failed = |error: std::io::Error| {
        anyhow::anyhow!("cannot use the run folder {}: {error}", folder.display())
    };
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(folder).map_err(failed)?;
    let mut options = File::options();
    let file = options.write(true).create(true).truncate(false).mode(0o600);
    let file = file.open(folder.join("lock")).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => anyhow::bail!(
            "the run folder {} belongs to another node-agent that is running: give each agent a run folder of its own",
            folder.display()
        ),
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

fn not_opened(error: OpenError) -> anyhow::Error {
    match error {
        OpenError::Removed { .. } => Ended::Removed(error.to_string()).into(),
        error => error.into(),
    }
}

pub(crate) fn cluster_config(config: &Config) -> ClusterConfig {
    let timing = &config.timing;
    let (api, enrol) = (config.advertised_api(), config.advertised_enrol());
    ClusterConfig {
        timings: RaftTimings {
            heartbeat_ms: timing.raft_heartbeat_ms,
            election_min_ms: timing.election_min_ms,
            election_max_ms: timing.election_max_ms,
        },
        request_timeout: Duration::from_millis(timing.quorum_wait_ms),
        zone: config.node.zone.clone(),
        witness: config.node.witness,
        voter_patience: timing.lease() * 3,
        limits: cluster::Limits {
            client_watches: config.limits.client_watches,
            client_requests_per_s: config.limits.client_requests_per_s,
            ..cluster::Limits::default()
        },
        ..ClusterConfig::new(config.data_dir.clone(), api, enrol)
    }
}

fn supervisor_config(config: &Config) -> SupervisorConfig {
    let root = nix::unistd::geteuid().is_root();
    let defaults = SupervisorConfig::new(&config.run_dir);
    let hang_limit = Duration::from_millis(config.timing.hang_limit_ms);
    SupervisorConfig {
        binary: config.vm_program.clone().unwrap_or_else(|| defaults.binary.clone()),
        uid_base: root.then_some(config.uid_base),
        reserve_memory_bytes: config.reserve_memory_mib << 20,
        probe_every: hang_limit / 6,
        hang_limit,
        ..defaults
    }
}

fn look_at_hardware(config: &Config) -> Hardware {
    if config.node.witness {
        return Hardware { cpus: hardware::cpus(), kvm: "none".to_owned(), ..Hardware::default() };
    }
    let reserve = config.reserve_memory_mib << 20;
    Hardware {
        cpus: hardware::cpus(),
        memory_bytes: hardware::memory_total_bytes().saturating_sub(reserve),
        kvm: hardware::kvm(),
        cpuid: hardware::cpuid(),
    }
}

/// Writes this node's record when it comes up, under a new name at once, and again whenever it is
/// not as it should be.
async fn keep_record(node: Arc<Node>) {
    let (mut name, mut watchdog) = (node.cluster().node_name(), node.watchdog.clone());
    loop {
        watchdog.mark_unchanged();
        node.tasks.rename(node.name());
        let written =
            node.store.update_node(node.id, |present| Some(node.record(present.as_ref())));
        let wait = match written.await {
            Ok(_) => Duration::from_secs(30),
            Err(error) => {
                tracing::debug!("this node's record: {error}");
                Duration::from_millis(500)
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            renamed = name.changed() => if renamed.is_err() { return },
            // Nothing changes it any more once the agent is ending, which ends this too.
            Ok(()) = watchdog.changed() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn systemd_starts_no_removed_node_again() {
        let unit = include_str!("../../deploy/systemd/holdfast-node-agent.service");
        let line = format!("RestartPreventExitStatus={}", super::EXIT_REMOVED);
        assert!(unit.lines().any(|l| l == line), "{line} is missing");
    }
}
