//! What only the leader can answer or do: it is found, asked, and left alone once it is dead.
//!
//! A leader that lost its power, or is cut off, refuses nothing: what was sent to it hangs until
//! HTTP/2's own keep-alive gives up, long after another one leads. So whoever waits for its answer
//! looks meanwhile whether it still leads and lives.

use std::time::{Duration, Instant};

use proto::NodeId;
use tonic::transport::Channel;
use tonic::{Response, Status};

use super::forward::{broke_on_the_way, channel, no_quorum};
use crate::node::Node;

/// How long a leader may take to give a sign of life before it counts as silent.
const SIGN_OF_LIFE: Duration = Duration::from_millis(1500);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(50);

/// Why there is no answer.
enum Lost {
    /// The request did not leave this node.
    Unsent,
    /// It may have been done.
    Unanswered,
}

/// Asks the leader a question, and where it stops answering the next leader. `None`: this node
/// leads.
///
/// # Errors
/// The leader's; `UNAVAILABLE` if none answers within the configured wait.
pub async fn ask<T, F>(
    node: &Node,
    call: impl Fn(Channel) -> F,
) -> Result<Option<Response<T>>, Status>
where
    F: Future<Output = Result<Response<T>, Status>>,
{
    let until = deadline(node);
    loop {
        let Some((leader, channel)) = found(node, until).await? else { return Ok(None) };
        match attempt(node, leader, SIGN_OF_LIFE, call(channel)).await {
            Ok(answer) => return answer.map(Some),
            Err(_) if Instant::now() >= until => return Err(silent(node, leader)),
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// Has the leader do something, once. It is sent only to one that has just given a sign of life, so
/// that the leader's death seldom leaves open what became of it. `None`: this node leads.
///
/// # Errors
/// The leader's; `UNAVAILABLE` if none answers within the configured wait, and nothing was sent;
/// `DEADLINE_EXCEEDED` if it stopped answering afterwards.
pub async fn have_done<T, F>(
    node: &Node,
    call: impl Fn(Channel) -> F,
) -> Result<Option<Response<T>>, Status>
where
    F: Future<Output = Result<Response<T>, Status>>,
{
    let until = deadline(node);
    loop {
        let Some((leader, channel)) = living(node, until).await? else { return Ok(None) };
        match attempt(node, leader, wait(node), call(channel)).await {
            Ok(answer) => return answer.map(Some),
            Err(Lost::Unanswered) => return Err(unknown(node, leader)),
            Err(Lost::Unsent) if Instant::now() >= until => return Err(silent(node, leader)),
            Err(Lost::Unsent) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// The way to a leader that has just given a sign of life; `None`: this node leads. What is then asked
/// there is not watched over, as [`ask`] does.
///
/// # Errors
/// `UNAVAILABLE` if none gives one within the configured wait.
pub async fn channel_to_living(node: &Node) -> Result<Option<Channel>, Status> {
    Ok(living(node, deadline(node)).await?.map(|(_, channel)| channel))
}

async fn living(node: &Node, until: Instant) -> Result<Option<(NodeId, Channel)>, Status> {
    loop {
        let Some((leader, channel)) = found(node, until).await? else { return Ok(None) };
        if node.cluster().leader_alive(leader, SIGN_OF_LIFE).await {
            return Ok(Some((leader, channel)));
        }
        if Instant::now() >= until {
            return Err(silent(node, leader));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// How long a leader is looked for.
fn wait(node: &Node) -> Duration {
    Duration::from_millis(node.config.timing.quorum_wait_ms)
}

fn deadline(node: &Node) -> Instant {
    Instant::now() + wait(node)
}

/// Who leads, and the way there; `None` if this node does. Waits for an election that is under way.
async fn found(node: &Node, until: Instant) -> Result<Option<(NodeId, Channel)>, Status> {
    loop {
        match node.cluster().leader() {
            Some(leader) if leader == node.id => return Ok(None),
            Some(leader) => return channel(node, leader).map(|channel| Some((leader, channel))),
            None if Instant::now() >= until => return Err(no_quorum(node)),
            None => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// What a leader answers, for as long as it leads and lives.
async fn attempt<T>(
    node: &Node,
    leader: NodeId,
    patience: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<Result<Response<T>, Status>, Lost> {
    let answer = tokio::select! {
        answer = call => answer,
        () = node.cluster().leader_lost(leader, patience) => return Err(Lost::Unanswered),
    };
    match answer {
        Err(status) if cluster::never_connected(&status) => Err(Lost::Unsent),
        Err(status) if broke_on_the_way(&status) => Err(Lost::Unanswered),
        answer => Ok(answer),
    }
}

fn silent(node: &Node, leader: NodeId) -> Status {
    Status::unavailable(format!(
        "the leader, {}, does not answer {}, and in {} ms no other was elected: {1} is cut off, or no \
         majority of the voters is up",
        node.name_of(leader),
        node.name(),
        node.config.timing.quorum_wait_ms,
    ))
}

fn unknown(node: &Node, leader: NodeId) -> Status {
    Status::deadline_exceeded(format!(
        "the leader, {}, stopped answering while it was at it: whether it was done is not known; look \
         before repeating it",
        node.name_of(leader)
    ))
}
