//! What a member does by itself, once a second: measure the disk, ask whether it is still a member,
//! say where it is reached now; and as the leader: look after who votes, forget old history, have
//! the copies compared.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::voting::Voting;
use super::{Node, authorities, denied, renewal, retention, snapshots};
use crate::consensus::lead;
use crate::{Leadership, StoreError, verify};

const EVERY: Duration = Duration::from_secs(1);

/// Starts the member's own tasks.
pub(super) fn spawn(node: &Arc<Node>) -> Vec<tokio::task::JoinHandle<()>> {
    vec![
        tokio::spawn(follow_raft(node.clone())),
        tokio::spawn(wait_for_recovery(node.clone())),
        tokio::spawn(wait_for_removal(node.clone())),
        tokio::spawn(each_second(node.clone())),
        tokio::spawn(denied::follow(node.clone())),
        tokio::spawn(authorities::follow(node.clone())),
        tokio::spawn(renewal::keep(node.clone())),
    ]
}

async fn follow_raft(node: Arc<Node>) {
    let me = node.clone();
    lead::watch_metrics(node.raft.clone(), move |metrics| {
        me.follow_members(metrics);
        me.known_leader.send_if_modified(|known| {
            let changed = *known != metrics.current_leader;
            *known = metrics.current_leader;
            changed
        });
        let is_leader = lead::leads(metrics);
        me.leadership.send_if_modified(|now| {
            let same = now.is_leader == is_leader && now.term == metrics.current_term;
            if !same {
                // A new term begins anew even where the same node leads again.
                let since = Instant::now().into_std();
                *now = Leadership { is_leader, term: metrics.current_term, since };
            }
            !same
        });
        if let Some(why) = lead::fatal(metrics)
            && !me.stopping.load(std::sync::atomic::Ordering::SeqCst)
            && !*me.removed.borrow()
        {
            tracing::error!(%why, "Raft stopped on this node");
            me.failure.send_if_modified(|failure| match failure {
                Some(_) => false,
                None => {
                    *failure = Some(StoreError::Failed { why });
                    true
                }
            });
        }
    })
    .await;
    node.leadership.send_modify(|now| {
        *now = Leadership { is_leader: false, term: now.term, since: Instant::now().into_std() };
    });
}

async fn wait_for_recovery(node: Arc<Node>) {
    if !*node.recovered.borrow() && lead::recovered(node.raft.clone()).await {
        if let Err(error) = node.db.tail_is_back() {
            tracing::warn!(%error, "that this node has caught up after a power loss is not noted");
        }
        node.recovered.send_replace(true);
    }
}

async fn wait_for_removal(node: Arc<Node>) {
    let mut removed = node.removed.subscribe();
    if removed.wait_for(|removed| *removed).await.is_err() {
        return;
    }
    tracing::error!("this node was removed from the cluster and stops");
    // First: whoever hears of it may end this process.
    let marker = node.config.data_dir.join("removed");
    if let Err(error) = crate::identity::write_private(&marker, b"removed from the cluster\n") {
        tracing::warn!(%error, "the removal could not be noted in the data folder");
    }
    node.failure.send_replace(Some(StoreError::Removed));
    lead::stop(&node.raft).await;
}

async fn each_second(node: Arc<Node>) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut turn = 0;
    let mut voting = Voting::new(0);
    let mut checks = verify::Turns::new();
    loop {
        ticks.tick().await;
        if node.alive().is_err() {
            return;
        }
        let low = node.db.measure(node.config.min_free_bytes);
        snapshots::keep(&node).await;
        if node.leads() {
            if low {
                node.hand_over().await;
                continue;
            }
            voting.tend(&node).await;
            retention::keep(&node).await;
            checks.tend(&node, node.term());
        } else {
            turn += 1;
            node.say_hello(turn).await;
        }
        node.describe().await;
    }
}
