//! What this node proposes as the leader: commands that wait at the same time go to Raft together,
//! so that one append, one fsync, one message to each member and one batch of the state serve all
//! of them.
//!
//! Whoever finds the turn free goes at once, alone. What comes while it is taken waits, and goes with
//! all others that wait as soon as it ends: batches are as large as it is busy. (Two turns gave
//! smaller batches, and fewer transactions a second.)

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::consensus::lead::{self, Within};
use crate::consensus::{Forwarded, Raft};
use crate::machine::Command;

/// Commands that one batch takes at most; or those of one caller.
const COMMANDS_MAX: usize = 512;
/// What one batch carries at most, bytes, about; or the commands of one caller.
const BYTES_MAX: usize = 4 << 20;

/// The turn, and what waits for it; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Proposals {
    raft: Raft,
    /// How long a quorum may have been silent before it is asked first.
    silence: Duration,
    queue: Arc<Mutex<Queue>>,
}

#[derive(Debug, Default)]
struct Queue {
    /// The turn is taken.
    under_way: bool,
    waiting: VecDeque<Waiting>,
    /// Tells those that wait apart.
    last: u64,
}

/// Commands of one caller.
#[derive(Debug)]
struct Waiting {
    number: u64,
    commands: Vec<Command>,
    until: Instant,
    answer: oneshot::Sender<Vec<Forwarded>>,
}

/// Where commands that come in go.
enum Entered {
    Now(Turn, Vec<Command>),
    Queue(u64, oneshot::Receiver<Vec<Forwarded>>),
}

impl Queue {
    /// The next batch, in the order in which it came. Who does not wait any more proposes nothing.
    fn next(&mut self) -> Vec<Waiting> {
        let (mut batch, mut commands, mut bytes) = (Vec::new(), 0, 0);
        while let Some(first) = self.waiting.front() {
            let more: usize = first.commands.iter().map(Command::bytes).sum();
            let full = commands + first.commands.len() > COMMANDS_MAX || bytes + more > BYTES_MAX;
            if full && !batch.is_empty() {
                break;
            }
            let Some(first) = self.waiting.pop_front() else { break };
            if !first.answer.is_closed() {
                (commands, bytes) = (commands + first.commands.len(), bytes + more);
                batch.push(first);
            }
        }
        batch
    }
}

/// The turn. Dropping it passes it on.
#[derive(Debug)]
struct Turn(Proposals);

impl Drop for Turn {
    fn drop(&mut self) {
        let mut queue = self.0.queue();
        let batch = queue.next();
        match Handle::try_current() {
            Ok(runtime) if !batch.is_empty() => {
                drop(queue);
                runtime.spawn(Self(self.0.clone()).carry_out(batch));
            }
            // Without a runtime the process is at its end; those that wait learn that nothing was
            // proposed.
            _ => queue.under_way = false,
        }
    }
}

impl Turn {
    async fn carry_out(self, batch: Vec<Waiting>) {
        let left = |one: &Waiting| one.until.saturating_duration_since(Instant::now());
        let soonest = batch.iter().map(left).min().unwrap_or_default();
        let confirmed = batch.iter().map(left).max().unwrap_or_default();
        let within = Within { asked: soonest / 2, confirmed };
        let mut commands = Vec::new();
        let mut answers = Vec::with_capacity(batch.len());
        for one in batch {
            answers.push((one.commands.len(), one.answer));
            commands.extend(one.commands);
        }
        let mut each = self.0.to_raft(commands, within).await.into_iter();
        // The next batch is on its way before the callers of this one are woken.
        drop(self);
        for (count, answer) in answers {
            // Who does not wait any more needs no answer.
            let _ = answer.send(each.by_ref().take(count).collect());
        }
    }
}

impl Proposals {
    pub(super) fn new(raft: Raft, silence: Duration) -> Self {
        Self { raft, silence, queue: Arc::default() }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Proposes commands in their order and waits until they are applied, `limit` at most: an answer
    /// to each.
    pub(super) async fn propose(&self, commands: Vec<Command>, limit: Duration) -> Vec<Forwarded> {
        let (count, until) = (commands.len(), Instant::now() + limit);
        let (number, answered) = match self.enter(commands, until) {
            Entered::Now(turn, commands) => {
                let within = Within { asked: limit / 2, confirmed: limit };
                return turn.0.to_raft(commands, within).await;
            }
            Entered::Queue(number, answered) => (number, answered),
        };
        match tokio::time::timeout_at(until, answered).await {
            Ok(Ok(answers)) => answers,
            Ok(Err(_)) => vec![Forwarded::Unknown("this node is at its end".to_owned()); count],
            Err(_) => vec![self.too_late(number); count],
        }
    }

    fn enter(&self, commands: Vec<Command>, until: Instant) -> Entered {
        let mut queue = self.queue();
        if !queue.under_way {
            queue.under_way = true;
            return Entered::Now(Turn(self.clone()), commands);
        }
        let (answer, answered) = oneshot::channel();
        queue.last += 1;
        let number = queue.last;
        queue.waiting.push_back(Waiting { number, commands, until, answer });
        Entered::Queue(number, answered)
    }

    /// What became of commands that waited for too long.
    fn too_late(&self, number: u64) -> Forwarded {
        let mut queue = self.queue();
        let before = queue.waiting.len();
        queue.waiting.retain(|waiting| waiting.number != number);
        if queue.waiting.len() < before {
            return Forwarded::Unavailable(
                "no majority confirmed the writes before it in time".to_owned(),
            );
        }
        Forwarded::Unknown("no majority confirmed the write in time".to_owned())
    }

    async fn to_raft(&self, commands: Vec<Command>, within: Within) -> Vec<Forwarded> {
        lead::propose_all(&self.raft, commands, within, self.silence).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{KeyWrite, TxnCommand};

    fn put(bytes: usize) -> Command {
        let write = KeyWrite { key: String::new(), value: Some(vec![0; bytes]) };
        Command::Txn(TxnCommand {
            compares: Vec::new(),
            writes: vec![write],
            client: String::new(),
            sequence: 0,
            author: String::new(),
            at_ms: 0,
        })
    }

    #[test]
    fn a_batch_is_what_waits_in_its_order_and_is_bounded() {
        let (mut queue, mut callers) = (Queue::default(), Vec::new());
        let mut wait = |queue: &mut Queue, number, commands| {
            let (answer, answered) = oneshot::channel();
            queue.waiting.push_back(Waiting { number, commands, until: Instant::now(), answer });
            callers.push(answered);
        };
        // 0 waits no more; 1 and 2 fit together; 3 is larger than a batch, and goes alone.
        wait(&mut queue, 0, vec![put(1)]);
        wait(&mut queue, 1, vec![put(2), put(3)]);
        wait(&mut queue, 2, vec![put(BYTES_MAX - 5)]);
        wait(&mut queue, 3, vec![put(BYTES_MAX / 2 + 1), put(BYTES_MAX / 2 + 1)]);
        wait(&mut queue, 4, (0..COMMANDS_MAX - 1).map(|_| put(0)).collect());
        wait(&mut queue, 5, vec![put(0)]);
        wait(&mut queue, 6, vec![put(0)]);
        drop(callers.remove(0));
        let mut batches = Vec::new();
        loop {
            let batch: Vec<u64> = queue.next().iter().map(|waiting| waiting.number).collect();
            if batch.is_empty() {
                break;
            }
            batches.push(batch);
        }
        assert_eq!(batches, [vec![1, 2], vec![3], vec![4, 5], vec![6]]);
    }
}
