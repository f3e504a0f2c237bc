//! One simulation: form a cluster, let clients work while things go wrong, end all faults, and write
//! down what everyone saw.

use std::collections::BTreeMap;
use std::process::Command;

use cluster::{Cluster, Consistency, StoreError};
use futures::StreamExt;
use proto::Revision;
use serde::{Deserialize, Serialize};

use super::clients::{Client, Manner};
use super::entropy;
use super::faults::{Fault, Nemesis};
use super::history::{Answer, Call, Change, Operation, Record, change_of, state_of};
use super::machine::Promise;
use super::rng::Rng;
use super::world::{Outcome, TICK_MS, World, locked, txn_of};

/// Attempts that each last request when all is well is given.
const PATIENCE: usize = 10;
/// Written when all is over; no client uses it.
const LAST_KEY: &str = "k/end";

/// What a simulation is made of, beside its seed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Setup {
    /// Members: three vote, the others take their places.
    pub(crate) nodes: usize,
    pub(crate) clients: usize,
    /// How long things go wrong, simulated milliseconds.
    pub(crate) faulty_ms: u64,
    pub(crate) faults: Vec<Fault>,
    pub(crate) promise: Promise,
    pub(crate) manner: Manner,
}

impl Setup {
    /// All faults, honest disks and clients.
    pub(crate) fn all() -> Self {
        Self {
            nodes: 4,
            clients: 5,
            faulty_ms: 12_000,
            faults: Fault::ALL.to_vec(),
            promise: Promise::Kept,
            manner: Manner::Honest,
        }
    }
}

/// What came of one.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) record: Record,
    pub(crate) faults: Vec<Fault>,
    /// Others vote at the end than at the beginning.
    pub(crate) voters_changed: bool,
    /// Simulated time, milliseconds.
    pub(crate) took_ms: u64,
}

/// Names the file with what the child process is to simulate; its answer goes beside it.
const ORDER: &str = "HOLDFAST_SIMULATE";

/// Runs a seed in a process of its own: tokio counts its runtimes in the whole process, and that
/// count decides the order in which it polls.
pub(crate) fn run(seed: u64, setup: &Setup) -> Run {
    in_child(seed, setup).unwrap_or_else(|why| Run {
        record: Record { trouble: vec![format!("no simulation: {why}")], ..Record::default() },
        ..Run::default()
    })
}

fn in_child(seed: u64, setup: &Setup) -> Outcome<Run> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let folder = tempfile::tempdir().map_err(|error| text(&error))?;
    let (order, answer) = (folder.path().join("order"), folder.path().join("answer"));
    let encoded = serde_json::to_vec(&(seed, setup)).map_err(|error| text(&error))?;
    std::fs::write(&order, encoded).map_err(|error| text(&error))?;
    let child = Command::new(std::env::current_exe().map_err(|error| text(&error))?)
        .args(["--exact", "child_simulates", "--ignored", "--nocapture"])
        .env(ORDER, &order)
        .output()
        .map_err(|error| text(&error))?;
    if !child.status.success() {
        return Err(String::from_utf8_lossy(&child.stderr).into_owned());
    }
    let answer = std::fs::read(answer).map_err(|error| text(&error))?;
    serde_json::from_slice(&answer).map_err(|error| text(&error))
}

/// The child's part. On a fresh thread: all that a thread keeps begins with the seed.
pub(crate) fn serve() {
    let order = std::env::var_os(ORDER).expect("started by a test that names its order");
    let encoded = std::fs::read(&order).expect("the order is there");
    let (seed, setup): (u64, Setup) = serde_json::from_slice(&encoded).expect("an order");
    let thread = std::thread::spawn(move || {
        entropy::seed_this_thread(seed);
        let mut run = Run::default();
        if let Err(why) = go_through(seed, &setup, &mut run) {
            run.record.trouble.push(why);
        }
        run
    });
    let run = thread.join().expect("the simulation panicked");
    let answer = serde_json::to_vec(&run).expect("an answer");
    std::fs::write(std::path::Path::new(&order).with_file_name("answer"), answer)
        .expect("the answer is written");
}

fn go_through(seed: u64, setup: &Setup, run: &mut Run) -> Outcome {
    let mut rng = Rng::new(seed);
    let mut world = World::new(&mut rng, setup.nodes, setup.promise)?;
    world.form()?;
    let voters = world.voters(0);
    let mut clients: Vec<Client> =
        (0..setup.clients).map(|id| Client::new(id, rng.fork(), setup.manner)).collect();
    let mut nemesis = Nemesis::new(rng.fork(), setup.faults.clone(), world.now);
    let calm = world.now + setup.faulty_ms / TICK_MS;
    let worked = work(&mut world, &mut clients, &mut nemesis, calm, run);
    run.faults.clone_from(&nemesis.done);
    let ended = worked.and_then(|()| look_around(&mut world, &mut run.record));
    run.voters_changed = world.voters(0) != voters;
    run.took_ms = world.now * TICK_MS;
    run.record.watched = world.nodes.iter().map(|node| locked(&node.watched).clone()).collect();
    run.record.trouble.append(&mut locked(&world.trouble));
    ended
}

/// Faults until `calm`, a while without any, then until every client is at rest.
fn work(
    world: &mut World,
    clients: &mut [Client],
    nemesis: &mut Nemesis,
    calm: u64,
    run: &mut Run,
) -> Outcome {
    let (last_call, limit) = (calm + 1500 / TICK_MS, calm + 30_000 / TICK_MS);
    loop {
        if world.now < calm {
            nemesis.turn(world)?;
        } else if world.now == calm {
            nemesis.end(world)?;
        }
        let more = world.now < last_call;
        let mut at_rest = true;
        for client in clients.iter_mut() {
            at_rest &= client.turn(world, more, &mut run.record.operations);
        }
        if !more && (at_rest || world.now > limit) {
            run.record.operations.extend(clients.iter_mut().filter_map(Client::give_up));
            return if at_rest { Ok(()) } else { Err("a client was never answered".to_owned()) };
        }
        world.tick();
    }
}

/// What every member holds once all is well again, and the whole history.
fn look_around(world: &mut World, record: &mut Record) -> Outcome {
    let nodes = world.nodes.len();
    world.until("all members run again", |world| (0..nodes).all(|n| world.cluster(n).is_some()))?;
    let revision = last_write(world, record)?;
    for node in 0..nodes {
        let range = until_done(world, node, |cluster| async move {
            cluster.range("", "", 0, Consistency::Linearizable).await
        })?;
        record.last.push((range.revision.0, state_of(range.kvs)));
    }
    world.until("all watches have seen everything", |world| {
        let seen = |node: usize| locked(&world.nodes[node].watched).last().map_or(0, |(r, _)| *r);
        (0..nodes).all(|node| seen(node) >= revision)
    })?;
    record.log = world.ask(1, move |cluster| history(cluster, revision))??;
    Ok(())
}

/// The write that ends the history. It is one of the recorded operations: an answer that claims to
/// show its revision before it was asked for is wrong.
fn last_write(world: &mut World, record: &mut Record) -> Outcome<u64> {
    let writes = vec![(LAST_KEY.to_owned(), Some(b"end".to_vec()))];
    let called = world.order.next();
    let revision = until_done(world, 0, |cluster| {
        // Under a name: what is asked again is not written again.
        let end = txn_of(&[], &writes).named("end".to_owned(), 1);
        async move { cluster.txn(end).await.map(|outcome| outcome.revision().0) }
    })?;
    record.operations.push(Operation {
        client: usize::MAX,
        call: Call::Txn { compares: Vec::new(), writes },
        called,
        answered: Some(world.order.next()),
        answer: Answer::Committed { revision },
        attempts: 1,
    });
    Ok(revision)
}

/// When all is well a member may take its time to catch up, but not for ever.
fn until_done<T: Send + 'static, F>(
    world: &mut World,
    node: usize,
    question: impl Fn(Cluster) -> F,
) -> Outcome<T>
where
    F: Future<Output = Result<T, StoreError>> + Send + 'static,
{
    for _ in 1..PATIENCE {
        if let Ok(answer) = world.ask(node, &question)? {
            return Ok(answer);
        }
    }
    world.ask(node, question)?.map_err(|error| format!("node {node}, when all is well: {error}"))
}

async fn history(cluster: Cluster, to: u64) -> Outcome<BTreeMap<u64, Change>> {
    let mut log = BTreeMap::new();
    let mut changes = cluster.watch("", Revision(1)).map_err(|error| error.to_string())?;
    while log.last_key_value().is_none_or(|(revision, _)| *revision < to) {
        match changes.next().await {
            Some(Ok(batch)) => {
                let (revision, change) = change_of(batch);
                log.insert(revision, change);
            }
            Some(Err(error)) => return Err(error.to_string()),
            None => return Err("the history ended".to_owned()),
        }
    }
    Ok(log)
}
