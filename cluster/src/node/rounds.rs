//! Who needs this node's leadership confirmed at the same time has it confirmed by one round of
//! messages: a heartbeat to every member, learners too. A member's lease heartbeat and each read
//! need one, so a round each would be as many messages as the square of the members.
//!
//! A round serves those who asked before it began, and nobody else: its messages are sent after they
//! asked, which is what a lease and a linearizable read rest on. Who comes while it is under way
//! waits for the next one.
//!
//! One round at a time, which costs nothing: openraft has one heartbeat under way to a member, and a
//! second round would wait for it there. In large clusters the beginnings of two rounds are apart by
//! [`pause`], and with that the messages of all rounds are bounded.

use std::future::Future;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::consensus::Forwarded;
use crate::types::Confirmed;

/// A round that takes longer is not waited for by the next one: it may hang on voters that died.
pub(super) const OVERTAKE: Duration = Duration::from_millis(50);
/// Up to as many members rounds are not spaced.
const SMALL: usize = 16;
/// Between the beginnings of two rounds, for each member more.
const PAUSE_EACH: Duration = Duration::from_micros(500);
/// The longest pause; a lease heartbeat or a read waits for as long at most before its round.
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// What came of a round, or why nothing did.
pub(super) type Outcome = Result<Confirmed, Forwarded>;

/// Where those wait that need leadership confirmed.
#[derive(Debug)]
pub(super) struct Rounds {
    queue: mpsc::UnboundedSender<Waiting>,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Waiting {
    until: Instant,
    answer: oneshot::Sender<Outcome>,
}

/// The queue, and what [`serve`] takes from it.
pub(super) fn queue() -> (Rounds, mpsc::UnboundedReceiver<Waiting>) {
    let (queue, waiting) = mpsc::unbounded_channel();
    (Rounds { queue }, waiting)
}

/// How far apart the beginnings of two rounds are.
pub(super) fn pause(members: usize) -> Duration {
    let more = u32::try_from(members.saturating_sub(SMALL)).unwrap_or(u32::MAX);
    PAUSE_EACH.saturating_mul(more).min(PAUSE_MAX)
}

impl Rounds {
    /// Confirms with a quorum, by messages sent after this call began, that this node leads.
    pub(super) async fn confirm(&self, limit: Duration) -> Outcome {
        let until = Instant::now() + limit;
        let (answer, answered) = oneshot::channel();
        let ends = || Forwarded::Unavailable("this node is at its end".to_owned());
        if self.queue.send(Waiting { until, answer }).is_err() {
            return Err(ends());
        }
        match tokio::time::timeout_at(until, answered).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(ends()),
            Err(_) => Err(Forwarded::Unavailable(
                "no majority of the voters answered the leader".to_owned(),
            )),
        }
    }
}

/// Runs for as long as the member does. `round` confirms within a limit, by messages that it sends
/// once it is polled; `pause` says how far apart the beginnings of rounds are at present, `overtake`
/// how long a round keeps the next one waiting.
pub(super) async fn serve<F>(
    mut queue: mpsc::UnboundedReceiver<Waiting>,
    overtake: Duration,
    pause: impl Fn() -> Duration,
    round: impl Fn(Duration) -> F,
) where
    F: Future<Output = Outcome> + Send + 'static,
{
    let mut next = Instant::now();
    while let Some(first) = queue.recv().await {
        // A timer would take up to a millisecond even where there is nothing to wait for.
        if Instant::now() < next {
            tokio::time::sleep_until(next).await;
        }
        // Invariant: nobody is added once the round has begun.
        let mut waiting = vec![first];
        while let Ok(one) = queue.try_recv() {
            waiting.push(one);
        }
        waiting.retain(|one| !one.answer.is_closed());
        let Some(last) = waiting.iter().map(|one| one.until).max() else { continue };
        let begun = Instant::now();
        next = begun + pause();
        let confirming = round(last.saturating_duration_since(begun));
        // Dropping the handle ends nothing: a round that is overtaken answers those it serves.
        let answering = tokio::spawn(async move {
            let outcome = confirming.await;
            for one in waiting {
                // Who does not wait any more needs no answer.
                let _ = one.answer.send(outcome.clone());
            }
        });
        let _ = tokio::time::timeout(overtake, answering).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// A round that has begun: whoever holds it says what comes of it.
    type Begun = oneshot::Sender<Outcome>;

    /// A queue whose rounds the test ends.
    struct Desk {
        rounds: Arc<Rounds>,
        begun: mpsc::UnboundedReceiver<Begun>,
    }

    const LONG: Duration = Duration::from_secs(20);

    impl Desk {
        fn open(overtake: Duration, pause: Duration) -> Self {
            let (rounds, waiting) = queue();
            let (begin, begun) = mpsc::unbounded_channel();
            tokio::spawn(serve(
                waiting,
                overtake,
                move || pause,
                move |_| {
                    let begin = begin.clone();
                    async move {
                        let (end, ended) = oneshot::channel();
                        let _ = begin.send(end);
                        ended.await.unwrap_or(Err(Forwarded::Done))
                    }
                },
            ));
            Self { rounds: Arc::new(rounds), begun }
        }

        /// Somebody who asks. It has asked once this returns.
        async fn ask(&self) -> tokio::task::JoinHandle<Outcome> {
            let (rounds, (asked, has_asked)) = (self.rounds.clone(), oneshot::channel());
            let asking = tokio::spawn(async move {
                let confirm = rounds.confirm(LONG);
                tokio::pin!(confirm);
                let first = futures::poll!(confirm.as_mut());
                assert!(first.is_pending());
                let _ = asked.send(());
                confirm.await
            });
            has_asked.await.expect("it asks");
            asking
        }

        async fn next(&mut self) -> Begun {
            let begun = tokio::time::timeout(LONG, self.begun.recv()).await;
            begun.expect("a round begins").expect("rounds are served")
        }
    }

    fn confirmed(index: u64) -> Outcome {
        Ok(Confirmed { term: 3, index })
    }

    fn index(outcome: Result<Outcome, tokio::task::JoinError>) -> u64 {
        outcome.expect("no panic").expect("it is confirmed").index
    }

    #[tokio::test]
    async fn who_comes_during_a_round_is_served_by_the_next_one() {
        let mut desk = Desk::open(LONG, Duration::ZERO);
        let first = desk.ask().await;
        let running = desk.next().await;
        let second = desk.ask().await;
        let third = desk.ask().await;
        running.send(confirmed(1)).expect("the round waits");
        assert_eq!(index(first.await), 1);
        let next = desk.next().await;
        assert!(!second.is_finished() && !third.is_finished(), "the first round served them");
        next.send(confirmed(2)).expect("the round waits");
        assert_eq!((index(second.await), index(third.await)), (2, 2));
        assert!(desk.begun.try_recv().is_err(), "one round serves both");
    }

    #[tokio::test]
    async fn a_round_that_hangs_holds_up_nobody_and_answers_late() {
        let mut desk = Desk::open(OVERTAKE, Duration::ZERO);
        let first = desk.ask().await;
        let hanging = desk.next().await;
        let second = desk.ask().await;
        desk.next().await.send(confirmed(2)).expect("the round waits");
        assert_eq!(index(second.await), 2);
        assert!(!first.is_finished(), "a later round served it");
        hanging.send(Err(Forwarded::NotLeader { leader: None })).expect("the round waits");
        let outcome = first.await.expect("no panic");
        assert!(matches!(outcome, Err(Forwarded::NotLeader { .. })), "{outcome:?}");
    }

    #[tokio::test]
    async fn a_thousand_who_wait_share_one_round() {
        let mut desk = Desk::open(LONG, Duration::ZERO);
        let mut asking = vec![desk.ask().await];
        let first = desk.next().await;
        for _ in 0..1000 {
            asking.push(desk.ask().await);
        }
        first.send(confirmed(1)).expect("the round waits");
        desk.next().await.send(confirmed(2)).expect("the round waits");
        let mut indexes = Vec::new();
        for one in asking {
            indexes.push(index(one.await));
        }
        assert_eq!((indexes[0], &indexes[1..]), (1, [2; 1000].as_slice()));
        assert!(desk.begun.try_recv().is_err(), "nobody was left to wait for a round");
    }

    #[tokio::test]
    async fn rounds_begin_apart() {
        let pause = Duration::from_millis(40);
        let mut desk = Desk::open(LONG, pause);
        let begin = Instant::now();
        let mut at = Vec::new();
        for number in 0..4 {
            let one = desk.ask().await;
            desk.next().await.send(confirmed(number)).expect("the round waits");
            at.push(begin.elapsed());
            assert_eq!(index(one.await), number);
        }
        assert!(at[3] >= 3 * pause, "{at:?}");
    }

    #[tokio::test]
    async fn who_waits_no_more_begins_no_round() {
        let mut desk = Desk::open(LONG, Duration::ZERO);
        let first = desk.ask().await;
        let running = desk.next().await;
        let second = desk.ask().await;
        second.abort();
        assert!(second.await.expect_err("it was ended").is_cancelled());
        running.send(confirmed(1)).expect("the round waits");
        assert_eq!(index(first.await), 1);
        let third = desk.ask().await;
        desk.next().await.send(confirmed(3)).expect("the round waits");
        assert_eq!(index(third.await), 3);
        assert!(desk.begun.try_recv().is_err());
    }

    #[test]
    fn small_clusters_do_not_pause_and_large_ones_not_for_long() {
        let millis = |members| pause(members).as_secs_f64() * 1000.0;
        assert_eq!([1, 3, 16].map(millis), [0.0; 3]);
        assert_eq!([17, 36, 116].map(millis), [0.5, 10.0, 50.0]);
        assert_eq!([216, 5000, usize::MAX].map(millis), [100.0; 3]);
    }
}
