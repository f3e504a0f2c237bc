//! Reads that wait at the same time are confirmed together: a round asks the leader once, for all
//! that came before it began. (What it names is fresh enough for those; not for who comes while it
//! is under way.)

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::Node;
use crate::StoreError;
use crate::consensus::{Forward, Forwarded};

/// A round that takes longer is not waited for by the next one: it may hang on a leader that died.
const OVERTAKE: Duration = Duration::from_millis(50);
/// A round ends with its readers' deadlines, and says why; so much later nobody says anything.
const GRACE: Duration = Duration::from_millis(200);

type Index = Result<u64, StoreError>;

/// Where reads queue.
#[derive(Debug)]
pub(super) struct Confirm {
    queue: mpsc::UnboundedSender<Waiting>,
}

/// A read that waits for an index.
#[derive(Debug)]
pub(super) struct Waiting {
    deadline: Instant,
    answer: oneshot::Sender<Index>,
}

/// The queue, and what [`serve`] takes from it.
pub(super) fn queue() -> (Confirm, mpsc::UnboundedReceiver<Waiting>) {
    let (queue, waiting) = mpsc::unbounded_channel();
    (Confirm { queue }, waiting)
}

impl Confirm {
    /// The log index that this node must have applied for a read that begins now.
    pub(super) async fn index(&self, deadline: Instant) -> Index {
        let (answer, answered) = oneshot::channel();
        if self.queue.send(Waiting { deadline, answer }).is_err() {
            return Err(StoreError::Shutdown);
        }
        match tokio::time::timeout_at(deadline + GRACE, answered).await {
            Ok(Ok(index)) => index,
            Ok(Err(_)) => Err(StoreError::Shutdown),
            Err(_) => Err(StoreError::NoQuorum { why: "the leader did not answer".to_owned() }),
        }
    }
}

/// Runs for as long as the member does.
pub(super) async fn serve(node: Arc<Node>, mut queue: mpsc::UnboundedReceiver<Waiting>) {
    while let Some(first) = queue.recv().await {
        let mut waiting = vec![first];
        while let Ok(next) = queue.try_recv() {
            waiting.push(next);
        }
        // Dropping the handle ends nothing: an overtaken round answers its own readers.
        let round = tokio::spawn(round(node.clone(), waiting));
        let _ = tokio::time::timeout(OVERTAKE, round).await;
    }
}

async fn round(node: Arc<Node>, mut waiting: Vec<Waiting>) {
    waiting.retain(|read| !read.answer.is_closed());
    let Some(deadline) = waiting.iter().map(|read| read.deadline).max() else { return };
    let index = match node.ask_leader(Forward::ReadIndex, deadline).await {
        Ok(Forwarded::ReadIndex(index)) => Ok(index),
        Ok(other) => Err(StoreError::NoQuorum { why: format!("{other:?}") }),
        // A read has no outcome to be unknown.
        Err(StoreError::UnknownOutcome { why }) => Err(StoreError::NoQuorum { why }),
        Err(error) => Err(error),
    };
    for read in waiting {
        // Who does not wait any more needs no answer.
        let _ = read.answer.send(index.clone());
    }
}
