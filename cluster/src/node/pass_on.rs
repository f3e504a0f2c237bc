//! Transactions of a member that does not lead: those that wait at the same time go to the leader
//! in one message, and are answered in one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::Instant;

use super::Node;
use crate::consensus::{Forward, Forwarded};
use crate::machine::{Judged, VALUE_MAX};

/// Messages that are on their way at once: one is answered while the next one fills.
const AT_ONCE: usize = 2;
/// Those that take longer are not waited for: they may hang on a leader that died.
const OVERTAKE: Duration = Duration::from_millis(50);
/// What one message carries, and what its answer may have to, bytes, about; or one transaction.
const WEIGHT_MAX: usize = 16 << 20;
/// A transaction's client, author and numbers, at most.
const OTHER: usize = 512;

/// Where transactions queue.
#[derive(Debug)]
pub(super) struct PassOn {
    queue: mpsc::UnboundedSender<Waiting>,
}

/// A transaction for a leader.
#[derive(Debug)]
pub(super) struct Waiting {
    leader: u64,
    txn: Judged,
    until: Instant,
    answer: oneshot::Sender<Forwarded>,
}

/// The queue, and what [`serve`] takes from it.
pub(super) fn queue() -> (PassOn, mpsc::UnboundedReceiver<Waiting>) {
    let (queue, waiting) = mpsc::unbounded_channel();
    (PassOn { queue }, waiting)
}

impl PassOn {
    /// The leader's answer to a transaction.
    pub(super) async fn ask(&self, leader: u64, txn: Judged, limit: Duration) -> Forwarded {
        let until = Instant::now() + limit;
        let (answer, answered) = oneshot::channel();
        if self.queue.send(Waiting { leader, txn, until, answer }).is_err() {
            return Forwarded::Unavailable("this node is at its end".to_owned());
        }
        match tokio::time::timeout_at(until, answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Forwarded::Unknown("this node is at its end".to_owned()),
            Err(_) => Forwarded::Unknown("the leader did not answer in time".to_owned()),
        }
    }
}

/// Runs for as long as the member does.
pub(super) async fn serve(node: Arc<Node>, mut queue: mpsc::UnboundedReceiver<Waiting>) {
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    while let Some(first) = queue.recv().await {
        let turn = tokio::time::timeout(OVERTAKE, turns.clone().acquire_owned()).await;
        let turn = Arc::new(turn.ok().and_then(Result::ok));
        let mut waiting = vec![first];
        while let Ok(next) = queue.try_recv() {
            waiting.push(next);
        }
        for message in messages(waiting) {
            let (node, turn) = (node.clone(), turn.clone());
            tokio::spawn(async move {
                send(&node, message).await;
                drop(turn);
            });
        }
    }
}

/// Transactions by leader, in their order, as many in one message as it takes.
fn messages(waiting: Vec<Waiting>) -> Vec<Vec<Waiting>> {
    let (mut full, mut open) = (Vec::new(), BTreeMap::<u64, (Vec<Waiting>, usize)>::new());
    for one in waiting.into_iter().filter(|one| !one.answer.is_closed()) {
        let (message, weight) = open.entry(one.leader).or_default();
        let more = weight_of(&one.txn);
        if !message.is_empty() && *weight + more > WEIGHT_MAX {
            full.push(std::mem::take(message));
            *weight = 0;
        }
        *weight += more;
        message.push(one);
    }
    full.extend(open.into_values().map(|(message, _)| message));
    full
}

/// A compare that fails is answered with the key's value; what it rests on is not.
fn weight_of(Judged { txn, .. }: &Judged) -> usize {
    txn.bytes() + txn.compares.len() * VALUE_MAX + OTHER
}

async fn send(node: &Node, message: Vec<Waiting>) {
    let Some(first) = message.first() else { return };
    let (leader, now) = (first.leader, Instant::now());
    let last = message.iter().map(|one| one.until).max().unwrap_or(now);
    let limit = last.saturating_duration_since(now);
    let (txns, answers): (Vec<_>, Vec<_>) =
        message.into_iter().map(|one| (one.txn, one.answer)).unzip();
    // Whoever waits asks the next leader by itself.
    let known = node.leader();
    let txns = Forward::Txns(txns);
    let answer = tokio::select! {
        answer = node.ask_member(leader, &txns, limit) => answer,
        () = node.another_leads([Some(leader), known]) => {
            Forwarded::Unknown(format!("node {leader} led no more before it answered"))
        }
    };
    let each = match answer {
        Forwarded::Each(each) if each.len() == answers.len() => each,
        Forwarded::Each(each) => {
            let why = format!("{} answers to {} transactions", each.len(), answers.len());
            vec![Forwarded::Unknown(why); answers.len()]
        }
        other => vec![other; answers.len()],
    };
    for (answer, here) in answers.into_iter().zip(each) {
        // Who does not wait any more needs no answer.
        let _ = answer.send(here);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{KeyWrite, TxnCommand, VALUE_MAX};

    fn txn(bytes: usize, compares: usize) -> Judged {
        let txn = TxnCommand {
            compares: (0..compares).map(|n| (format!("key/{n}"), 1)).collect(),
            writes: vec![KeyWrite { key: String::new(), value: Some(vec![0; bytes]) }],
            client: String::new(),
            sequence: 0,
            author: String::new(),
            at_ms: 0,
        };
        Judged { txn, rests_on: vec![("status/administration".to_owned(), 7)] }
    }

    #[test]
    fn a_message_goes_to_one_leader_and_is_bounded() {
        let (mut waiting, mut kept) = (Vec::new(), Vec::new());
        let mut add = |leader, txn| {
            let (answer, answered) = oneshot::channel();
            waiting.push(Waiting { leader, txn, until: Instant::now(), answer });
            kept.push(answered);
        };
        add(1, txn(10, 0));
        add(2, txn(20, 0));
        add(1, txn(30, 0));
        add(1, txn(WEIGHT_MAX - 3 * OTHER - 39, 0));
        add(2, txn(1, 16));
        // Nobody waits for this one.
        add(2, txn(40, 0));
        drop(kept.pop());
        let sizes: Vec<(u64, Vec<usize>)> = messages(waiting)
            .iter()
            .map(|message| {
                let size = |one: &Waiting| (weight_of(&one.txn) - OTHER) % VALUE_MAX;
                (message[0].leader, message.iter().map(size).collect())
            })
            .collect();
        let large = (WEIGHT_MAX - 3 * OTHER - 39) % VALUE_MAX;
        // The keys compared have 5 bytes, from the tenth on 6.
        let compared = 1 + 10 * 5 + 6 * 6;
        let wanted = [(1, vec![10, 30]), (2, vec![20]), (1, vec![large]), (2, vec![compared])];
        assert_eq!(sizes, wanted);
    }
}
