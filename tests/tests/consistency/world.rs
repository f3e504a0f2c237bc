//! The members, each on a runtime of its own with a clock that stands still until it is told to
//! go on. All of them run in turns on one thread, a tick at a time: what happens depends on the seed
//! alone.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cluster::{Cluster, ClusterConfig, Opened, RaftTimings, Txn, open};
use futures::StreamExt;
use tokio::runtime::Runtime;
use tokio::time::Instant;
use tonic::transport::Server;

use super::entropy;
use super::fabric::{Listener, Net};
use super::history::{Change, Order, change_of};
use super::machine::{self, Machine, Promise};
use super::rng::Rng;

/// A tick, milliseconds.
pub(crate) const TICK_MS: u64 = 5;
/// As many members vote; the others are learners.
const VOTERS: usize = 3;
/// A member that has not started after this many ticks never will.
const START_LIMIT: u64 = 60_000 / TICK_MS;

pub(crate) type Shared<T> = Arc<Mutex<T>>;
pub(crate) type Outcome<T = ()> = Result<T, String>;

pub(crate) fn locked<T>(shared: &Shared<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a member comes to be one.
enum Birth {
    Init,
    Join(String),
    Again,
}

pub(crate) struct Node {
    folder: PathBuf,
    config: ClusterConfig,
    pub(crate) machine: Machine,
    /// Its clock's speed, percent.
    rate: u64,
    running: Option<Running>,
    /// Counts starts: an answer of an earlier run never comes.
    pub(crate) run: u64,
    pub(crate) watched: Shared<Vec<(u64, Change)>>,
}

struct Running {
    runtime: Runtime,
    began: Instant,
    began_tick: u64,
    started: Shared<Option<Outcome<Cluster>>>,
}

pub(crate) struct World {
    pub(crate) net: Net,
    pub(crate) nodes: Vec<Node>,
    pub(crate) now: u64,
    pub(crate) order: Order,
    pub(crate) trouble: Shared<Vec<String>>,
    _folder: tempfile::TempDir,
}

fn config(index: usize, folder: PathBuf, machine: &Machine) -> ClusterConfig {
    let address = |port: u16| format!("host-{index}:{port}");
    let mut config = ClusterConfig::new(folder, address(7400), address(7401));
    config.timings = RaftTimings { heartbeat_ms: 100, election_min_ms: 500, election_max_ms: 1000 };
    config.request_timeout = Duration::from_secs(2);
    // Short enough for a voter that is cut off to lose its vote, and to come back without it.
    config.voter_patience = Duration::from_secs(2);
    // Small enough for members to catch up by snapshot within a simulation.
    config.snapshot_every = 150;
    config.snapshot_bytes = 0;
    config.snapshot_keep = 20;
    config.host = Arc::new(machine.clone());
    config
}

/// In memory where the system has such a place: an fsync there costs nothing.
fn folder() -> Outcome<tempfile::TempDir> {
    let made = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    made.map_err(|error| format!("no folder for the simulation: {error}"))
}

impl World {
    pub(crate) fn new(rng: &mut Rng, nodes: usize, promise: Promise) -> Outcome<Self> {
        let net = Net::new(nodes, rng.fork());
        let folder = folder()?;
        let nodes = (0..nodes).map(|index| {
            let machine = Machine::new(index, promise, net.clone(), rng.fork());
            let folder = folder.path().join(format!("n{index}"));
            let config = config(index, folder.clone(), &machine);
            let rate = rng.between(85, 115);
            let watched = Shared::default();
            Node { folder, config, machine, rate, running: None, run: 0, watched }
        });
        let nodes = nodes.collect();
        Ok(Self {
            net,
            nodes,
            now: 0,
            order: Order::default(),
            trouble: Shared::default(),
            _folder: folder,
        })
    }

    /// Makes the cluster.
    pub(crate) fn form(&mut self) -> Outcome {
        self.start(0, Birth::Init)?;
        self.wait_started(0)?;
        for index in 1..self.nodes.len() {
            let token = self.ask(0, |cluster| async move { cluster.create_token(0).await })?;
            let token = token.map_err(|error| error.to_string())?.token;
            self.start(index, Birth::Join(token))?;
            self.wait_started(index)?;
        }
        self.until("enough of them vote", |world| world.voters(0).len() == VOTERS)
    }

    /// Who votes, as one member knows.
    pub(crate) fn voters(&self, index: usize) -> Vec<proto::NodeId> {
        let members = self.cluster(index).map(|cluster| cluster.members()).unwrap_or_default();
        members.iter().filter(|member| member.voter).map(|member| member.node_id).collect()
    }

    /// One tick of the network and of every running member.
    pub(crate) fn tick(&mut self) {
        self.now += 1;
        entropy::set_clock(self.now * TICK_MS);
        self.net.tick(self.now);
        for node in &self.nodes {
            let Some(running) = &node.running else { continue };
            let passed_ms = (self.now - running.began_tick) * TICK_MS * node.rate / 100;
            let until = running.began + Duration::from_millis(passed_ms);
            running.runtime.block_on(async move { tokio::time::sleep_until(until).await });
        }
    }

    /// Ticks until a condition holds.
    pub(crate) fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) -> Outcome {
        let limit = self.now + START_LIMIT;
        while !holds(self) {
            if self.now > limit {
                return Err(format!("did not happen within a minute: {what}"));
            }
            self.tick();
        }
        Ok(())
    }

    /// A member's answer to one question, ticking until it is there.
    pub(crate) fn ask<T: Send + 'static, F>(
        &mut self,
        index: usize,
        question: impl FnOnce(Cluster) -> F,
    ) -> Outcome<T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let slot: Shared<Option<T>> = Arc::default();
        let cluster = self.cluster(index).ok_or("the member is not running")?;
        self.spawn(index, {
            let (slot, question) = (slot.clone(), question(cluster));
            async move {
                let answer = question.await;
                *locked(&slot) = Some(answer);
            }
        });
        self.until("an answer", |_| locked(&slot).is_some())?;
        locked(&slot).take().ok_or_else(|| "no answer".to_owned())
    }

    /// Runs something on a member's runtime, if it is up.
    pub(crate) fn spawn(&self, index: usize, task: impl Future<Output = ()> + Send + 'static) {
        if let Some(running) = &self.nodes[index].running {
            running.runtime.spawn(task);
        }
    }

    /// The member's handle, if it is up and has started.
    pub(crate) fn cluster(&self, index: usize) -> Option<Cluster> {
        let running = self.nodes[index].running.as_ref()?;
        locked(&running.started).as_ref()?.as_ref().ok().cloned()
    }

    pub(crate) fn is_up(&self, index: usize) -> bool {
        self.nodes[index].running.is_some()
    }

    /// The leader, by what those that are up say of themselves.
    pub(crate) fn leader(&self) -> Option<usize> {
        (0..self.nodes.len()).find(|index| {
            self.cluster(*index).is_some_and(|cluster| cluster.leadership().borrow().is_leader)
        })
    }

    pub(crate) fn restart(&mut self, index: usize) -> Outcome {
        if self.is_up(index) { Ok(()) } else { self.start(index, Birth::Again) }
    }

    fn start(&mut self, index: usize, birth: Birth) -> Outcome {
        self.net.switch_on(index);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .map_err(|error| error.to_string())?;
        let began = runtime.block_on(async { Instant::now() });
        let started: Shared<Option<Outcome<Cluster>>> = Arc::default();
        let node = &mut self.nodes[index];
        node.run += 1;
        let (config, name) = (node.config.clone(), format!("n{index}"));
        let listeners = [&config.api_address, &config.enrol_address]
            .map(|address| self.net.listen(index, address));
        runtime.spawn({
            let (started, trouble) = (started.clone(), self.trouble.clone());
            let watched = node.watched.clone();
            async move {
                let outcome = open_member(config, &name, birth, listeners).await;
                match &outcome {
                    Ok(cluster) => look_after(cluster, &name, watched, trouble),
                    Err(why) => locked(&trouble).push(format!("{name} did not start: {why}")),
                }
                *locked(&started) = Some(outcome);
            }
        });
        node.running = Some(Running { runtime, began, began_tick: self.now, started });
        Ok(())
    }

    fn wait_started(&mut self, index: usize) -> Outcome {
        self.until("a member starts", |world| {
            let running = world.nodes[index].running.as_ref();
            running.is_some_and(|running| locked(&running.started).is_some())
        })?;
        match self.cluster(index) {
            Some(_) => Ok(()),
            None => Err(format!("{:?}", locked(&self.trouble))),
        }
    }

    /// Ends the member's process; its disk keeps all it wrote.
    pub(crate) fn kill(&mut self, index: usize) {
        self.net.switch_off(index);
        self.end(index);
    }

    /// Ends it at once; its folder is as it was at that moment.
    fn end(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        let Some(running) = node.running.take() else { return };
        let ended = machine::crash(&node.folder, || drop(running));
        if let Err(error) = ended {
            locked(&self.trouble).push(format!("n{index} did not end as by a crash: {error}"));
        }
    }

    /// Cuts the machine's power; of what was not synced a part is lost.
    pub(crate) fn cut_power(&mut self, index: usize) {
        if self.nodes[index].running.is_none() {
            return;
        }
        self.net.switch_off(index);
        self.end(index);
        let node = &self.nodes[index];
        if let Err(error) = node.machine.cut_power(&node.folder) {
            locked(&self.trouble).push(format!("the power of n{index} was not cut: {error}"));
        }
    }
}

async fn open_member(
    config: ClusterConfig,
    name: &str,
    birth: Birth,
    [api, enrol]: [Listener; 2],
) -> Outcome<Cluster> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let opened = open(config).await.map_err(|error| text(&error))?;
    let cluster = match (opened, birth) {
        (Opened::Fresh(fresh), Birth::Init) => {
            fresh.init("simulation", name).await.map_err(|error| text(&error))?
        }
        (Opened::Fresh(fresh), Birth::Join(token)) => {
            fresh.join(&token, name).await.map_err(|error| text(&error))?
        }
        (Opened::Member(cluster), Birth::Again) => cluster,
        (opened, _) => return Err(format!("the folder is not as expected: {opened:?}")),
    };
    let members = Server::builder()
        .add_service(cluster.raft_service())
        .serve_with_incoming(cluster.incoming(api).map_err(|error| text(&error))?);
    let strangers = Server::builder()
        .add_service(cluster.enrolment_service())
        .serve_with_incoming(cluster.enrol_incoming(enrol).map_err(|error| text(&error))?);
    tokio::spawn(members);
    tokio::spawn(strangers);
    Ok(cluster)
}

/// Writes down what a watch on this member sees, and if the member fails.
fn look_after(
    cluster: &Cluster,
    name: &str,
    watched: Shared<Vec<(u64, Change)>>,
    trouble: Shared<Vec<String>>,
) {
    let (failing, name, complaints) = (cluster.clone(), name.to_owned(), trouble.clone());
    tokio::spawn(async move {
        let why = failing.failed().await;
        locked(&complaints).push(format!("{name} failed: {why}"));
    });
    let from = locked(&watched).last().map_or(1, |(revision, _)| revision + 1);
    match cluster.watch("", proto::Revision(from)) {
        Ok(mut changes) => {
            tokio::spawn(async move {
                while let Some(batch) = changes.next().await {
                    match batch {
                        Ok(batch) => locked(&watched).push(change_of(batch)),
                        Err(error) => locked(&trouble).push(format!("a watch ended: {error}")),
                    }
                }
            });
        }
        Err(error) => locked(&trouble).push(format!("no watch from {from}: {error}")),
    }
}

/// A transaction of the store, from a call's parts.
pub(crate) fn txn_of(compares: &[(String, u64)], writes: &[(String, Option<Vec<u8>>)]) -> Txn {
    let mut txn = Txn::new();
    for (key, revision) in compares {
        txn = txn.if_revision(key.as_str(), proto::Revision(*revision));
    }
    for (key, value) in writes {
        txn = match value {
            Some(value) => txn.put(key.as_str(), value.clone()),
            None => txn.delete(key.as_str()),
        };
    }
    txn
}
