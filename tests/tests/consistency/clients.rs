//! Clients: each does one operation after the other, on whichever member it likes, repeats a
//! transaction under its name while the outcome is unknown, and writes down what it saw.

use std::collections::BTreeMap;

use cluster::{Consistency, StoreError, TxnOutcome};
use serde::{Deserialize, Serialize};

use super::history::{Answer, Call, Operation, State, state_of};
use super::rng::Rng;
use super::world::{Shared, TICK_MS, World, locked, txn_of};

const KEYS: usize = 5;
const PREFIX: &str = "k/";
/// A transaction is sent at most so often.
const ATTEMPTS: u32 = 4;

/// How clients may be wrong about the store; the checks must notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Manner {
    /// As they should be.
    Honest,
    /// Stale reads are passed off as linearizable ones.
    StaleAsFresh,
    /// A repetition goes out under a new name, so that it is applied again.
    ForgetsNames,
}

type Slot = Shared<Option<(u64, Answer)>>;

/// One copy of an operation on its way.
struct Sent {
    node: usize,
    run: u64,
    slot: Slot,
}

struct Doing {
    operation: Operation,
    sent: Vec<Sent>,
    sequence: u64,
}

/// One client.
pub(crate) struct Client {
    id: usize,
    rng: Rng,
    manner: Manner,
    doing: Option<Box<Doing>>,
    idle_until: u64,
    sequence: u64,
    /// Revisions as it last saw them.
    known: BTreeMap<String, u64>,
}

impl Client {
    pub(crate) fn new(id: usize, rng: Rng, manner: Manner) -> Self {
        let known = BTreeMap::new();
        Self { id, rng, manner, doing: None, idle_until: 0, sequence: 0, known }
    }

    /// Looks for answers, and asks for something new where `more` is set. Answers whether it is
    /// at rest.
    pub(crate) fn turn(&mut self, world: &World, more: bool, done: &mut Vec<Operation>) -> bool {
        if let Some(doing) = self.doing.take() {
            match self.look(world, doing) {
                Ok(operation) => {
                    self.learn(&operation);
                    done.push(operation);
                    self.idle_until = world.now + self.rng.between(0, 200 / TICK_MS);
                }
                Err(doing) => self.doing = Some(doing),
            }
        }
        if self.doing.is_none() && more && world.now >= self.idle_until {
            self.begin(world);
        }
        self.doing.is_none()
    }

    /// Ends what it waits for with an unknown outcome.
    pub(crate) fn give_up(&mut self) -> Option<Operation> {
        Some(self.doing.take()?.operation)
    }

    fn begin(&mut self, world: &World) {
        self.sequence += 1;
        let call = self.choose(world.nodes.len());
        let operation = Operation {
            client: self.id,
            call,
            called: world.order.next(),
            answered: None,
            answer: Answer::Unknown("not answered".to_owned()),
            attempts: 0,
        };
        let mut doing = Doing { operation, sent: Vec::new(), sequence: self.sequence };
        self.send(world, &mut doing);
        // A message that arrives twice: the same transaction on two members at once.
        if matches!(doing.operation.call, Call::Txn { .. }) && self.rng.chance(10) {
            self.send(world, &mut doing);
        }
        self.doing = Some(Box::new(doing));
    }

    fn choose(&mut self, nodes: usize) -> Call {
        match self.rng.between(0, 99) {
            0..55 => self.choose_txn(),
            55..80 => Call::Get { key: self.key() },
            80..90 => Call::Range { prefix: PREFIX.to_owned() },
            _ => Call::StaleGet { key: self.key(), node: self.rng.index(nodes) },
        }
    }

    fn key(&mut self) -> String {
        format!("{PREFIX}{}", self.rng.index(KEYS))
    }

    /// Every value is written by one transaction alone: a change in the history names its author.
    fn choose_txn(&mut self) -> Call {
        let value = format!("{}-{}", self.id, self.sequence).into_bytes();
        let first = self.key();
        let mut writes = vec![(first.clone(), Some(value.clone()))];
        let mut compares = Vec::new();
        let second = self.key();
        if second != first && self.rng.chance(40) {
            let deletes = self.rng.chance(40);
            writes.push((second.clone(), (!deletes).then_some(value)));
        }
        for key in [first, second] {
            if self.rng.chance(40) && compares.iter().all(|(known, _)| *known != key) {
                let revision = self.known.get(&key).copied().unwrap_or(0);
                compares.push((key, revision));
            }
        }
        Call::Txn { compares, writes }
    }

    fn send(&mut self, world: &World, doing: &mut Doing) {
        let node = match &doing.operation.call {
            Call::StaleGet { node, .. } => *node,
            _ => self.rng.index(world.nodes.len()),
        };
        doing.operation.attempts += 1;
        let slot = Slot::default();
        doing.sent.push(Sent { node, run: world.nodes[node].run, slot: slot.clone() });
        let Some(cluster) = world.cluster(node) else {
            let refused = Answer::Refused("the member is down".to_owned());
            *locked(&slot) = Some((world.order.next(), refused));
            return;
        };
        let mut sequence = doing.sequence;
        if self.manner == Manner::ForgetsNames {
            sequence = sequence * 100 + u64::from(doing.operation.attempts);
        }
        let fresh = match self.manner {
            Manner::StaleAsFresh => Consistency::Stale,
            Manner::Honest | Manner::ForgetsNames => Consistency::Linearizable,
        };
        let (call, name) = (doing.operation.call.clone(), format!("client-{}", self.id));
        let order = world.order.clone();
        world.spawn(node, async move {
            let answer = perform(&cluster, call, fresh, name, sequence).await;
            *locked(&slot) = Some((order.next(), answer));
        });
    }

    /// The finished operation, or what still goes on.
    fn look(&mut self, world: &World, mut doing: Box<Doing>) -> Result<Operation, Box<Doing>> {
        let mut waiting = Vec::new();
        for sent in std::mem::take(&mut doing.sent) {
            let answer = locked(&sent.slot).take();
            let gone = !world.is_up(sent.node) || world.nodes[sent.node].run != sent.run;
            match answer {
                Some((at, answer)) => doing.operation.hear(at, answer),
                None if gone => doing.operation.hear_nothing(world.order.next()),
                None => waiting.push(sent),
            }
        }
        doing.sent = waiting;
        if !doing.sent.is_empty() {
            return Err(doing);
        }
        let open = matches!(doing.operation.answer, Answer::Unknown(_));
        let is_txn = matches!(doing.operation.call, Call::Txn { .. });
        if open && is_txn && doing.operation.attempts < ATTEMPTS && self.rng.chance(80) {
            self.send(world, &mut doing);
            return Err(doing);
        }
        Ok(doing.operation)
    }

    fn learn(&mut self, operation: &Operation) {
        match (&operation.answer, &operation.call) {
            (Answer::Read { found, .. } | Answer::Conflict { conflicts: found, .. }, _) => {
                for (key, (_, _, modified)) in found {
                    self.known.insert(key.clone(), *modified);
                }
            }
            (Answer::Committed { revision }, Call::Txn { writes, .. }) => {
                for (key, value) in writes {
                    self.known.insert(key.clone(), value.as_ref().map_or(0, |_| *revision));
                }
            }
            _ => {}
        }
    }
}

impl Operation {
    /// Takes one answer into account. One that says what became of it counts more than one that
    /// does not; two that say different things are kept apart as trouble.
    fn hear(&mut self, at: u64, answer: Answer) {
        let known = |answer: &Answer| !matches!(answer, Answer::Unknown(_) | Answer::Refused(_));
        match (&self.answer, &answer) {
            (Answer::Committed { revision: a }, Answer::Committed { revision: b }) if a != b => {
                self.answer = Answer::Contradiction(format!("committed at {a} and at {b}"));
            }
            (Answer::Committed { .. }, Answer::Conflict { .. })
            | (Answer::Conflict { .. }, Answer::Committed { .. }) => {
                self.answer = Answer::Contradiction("committed, and not".to_owned());
            }
            (now, _) if known(now) => {}
            (_, new) if known(new) => (self.answer, self.answered) = (answer, Some(at)),
            // The first answer, if it is the only one: nothing was done.
            (Answer::Unknown(_), Answer::Refused(_)) if self.attempts == 1 => {
                (self.answer, self.answered) = (answer, Some(at));
            }
            _ => {}
        }
    }

    fn hear_nothing(&mut self, at: u64) {
        self.hear(at, Answer::Unknown("the member went down".to_owned()));
    }
}

async fn perform(
    cluster: &cluster::Cluster,
    call: Call,
    fresh: Consistency,
    client: String,
    sequence: u64,
) -> Answer {
    match call {
        Call::Txn { compares, writes } => {
            let txn = txn_of(&compares, &writes).named(client, sequence);
            match cluster.txn(txn).await {
                Ok(TxnOutcome::Committed { revision }) => {
                    Answer::Committed { revision: revision.0 }
                }
                Ok(TxnOutcome::Conflict { revision, conflicts }) => {
                    Answer::Conflict { revision: revision.0, conflicts: state_of(conflicts) }
                }
                Err(error) => refusal(&error),
            }
        }
        Call::Get { key } => get(cluster, &key, fresh).await,
        Call::StaleGet { key, .. } => get(cluster, &key, Consistency::Stale).await,
        Call::Range { prefix } => match cluster.range(&prefix, "", 0, fresh).await {
            Ok(range) => Answer::Read { revision: range.revision.0, found: state_of(range.kvs) },
            Err(error) => refusal(&error),
        },
    }
}

async fn get(cluster: &cluster::Cluster, key: &str, consistency: Consistency) -> Answer {
    match cluster.get(key, consistency).await {
        Ok((found, revision)) => {
            let found: State = state_of(found);
            Answer::Read { revision: revision.0, found }
        }
        Err(error) => refusal(&error),
    }
}

/// What an error says about the outcome.
fn refusal(error: &StoreError) -> Answer {
    let text = error.to_string();
    match error {
        // Its text names the folder, which is another one in each run of a seed.
        StoreError::DiskFull { .. } => Answer::Refused("the leader's disk is full".to_owned()),
        StoreError::NoQuorum { .. }
        | StoreError::NoSpace { .. }
        | StoreError::TooLarge(_)
        | StoreError::TooOften { .. }
        | StoreError::Busy(_)
        | StoreError::Overtaken
        | StoreError::Recovering => Answer::Refused(text),
        StoreError::UnknownOutcome { .. }
        | StoreError::Forgotten { .. }
        | StoreError::Invalid(_)
        | StoreError::Private(_)
        | StoreError::Failed { .. }
        | StoreError::Removed
        | StoreError::Shutdown => Answer::Unknown(text),
    }
}
