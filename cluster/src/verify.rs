//! Whether all members have the same copy: a checksum of each at one place of the log
//! ([`crate::consensus`] computes them), compared, and written down for `cluster status`.
//!
//! The leader does it by itself each hour. Nothing is repaired: that a copy differs means a fault
//! of a machine or of this program, and which copy is right is for a person to see.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proto::record::{MemberVerification, VerificationOutcome, VerificationRecord};
use proto::{keys, v1};
use tokio::time::Instant;

use crate::consensus::{Checked, Checksum, Forward, Forwarded};
use crate::machine::{Read, Record, Reply, Table, decode};
use crate::membership::to_json;
use crate::node::Node;
use crate::{Member, StoreError, Txn};

/// A member that answers nothing for so long is given up.
const SILENCE: Duration = Duration::from_secs(10);
/// A member whose checksum takes longer is given up.
const LIMIT: Duration = Duration::from_secs(300);
const PAUSE: Duration = Duration::from_millis(200);
/// Characters.
const DETAIL_MAX: usize = 500;
/// The first check of a leader, however rarely it checks.
const FIRST: Duration = Duration::from_secs(60);

/// Has every member compute its checksum, and compares them.
pub(crate) async fn verify(node: &Arc<Node>) -> Result<VerificationRecord, StoreError> {
    let deadline = Instant::now() + node.config().request_timeout;
    let asked = node.ask_leader(Forward::Check, deadline).await;
    let (index, revision) = match asked.map_err(nothing_to_learn)? {
        Forwarded::Reply(Reply::CheckAt { index, revision }) => (index, revision),
        other => {
            let why = format!("the leader gave an answer that does not fit ({other:?})");
            return Err(StoreError::UnknownOutcome { why });
        }
    };
    let members = node.members();
    let asked = members.iter().map(|member| checksum_of(node, member, index));
    let answers = futures::future::join_all(asked).await;
    // Where a check that was under way serves, the leader names a later revision.
    let revision = answers.iter().flatten().next().map_or(revision, |sum| sum.revision);
    let record = VerificationRecord {
        at_unix_ms: crate::node::unix_now_ms(),
        log_index: index,
        revision,
        members: compare(members.iter().zip(answers)),
    };
    report(&record);
    let txn = Txn::new().by("system").put(keys::VERIFICATION, to_json(&record)?);
    if let Err(error) = node.txn(txn).await {
        tracing::warn!(%error, "how the copies compare could not be written down");
    }
    Ok(record)
}

/// A check changes nothing: where it is not known whether it was begun, another one may begin.
fn nothing_to_learn(error: StoreError) -> StoreError {
    match error {
        StoreError::UnknownOutcome { why } => StoreError::NoQuorum { why },
        error => error,
    }
}

/// Why a member has no checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Missing {
    /// That says nothing of its copy.
    Unknown(String),
    /// Its copy cannot be read.
    Faulty(String),
}

/// A member's checksum, or why there is none.
async fn checksum_of(node: &Node, member: &Member, index: u64) -> Result<Checksum, Missing> {
    let unknown = |why: String| Err(Missing::Unknown(why));
    let (begin, mut heard) = (Instant::now(), Instant::now());
    let me = member.node_id == node.id();
    loop {
        let answer = if me {
            Forwarded::Checked(node.checked(index))
        } else {
            node.ask_member(member.node_id.0, &Forward::Checked { index }, SILENCE / 4).await
        };
        let silent = match answer {
            Forwarded::Checked(Checked::Done(checksum)) => return Ok(checksum),
            Forwarded::Checked(Checked::Failed(why)) => return unknown(why),
            Forwarded::Checked(Checked::Faulty(why)) => return Err(Missing::Faulty(why)),
            Forwarded::Checked(Checked::Absent { applied }) if applied >= index => {
                return unknown("it restarted, or caught up by a snapshot, meanwhile".to_owned());
            }
            Forwarded::Checked(Checked::Absent { .. } | Checked::Running) => None,
            Forwarded::Unavailable(why) | Forwarded::Unknown(why) => Some(why),
            other => Some(format!("it gave an answer that does not fit ({other:?})")),
        };
        match silent {
            None => heard = Instant::now(),
            Some(why) if heard.elapsed() >= SILENCE => {
                return unknown(format!("it does not answer: {why}"));
            }
            Some(_) => {}
        }
        if begin.elapsed() >= LIMIT {
            return unknown(format!("it was not ready within {} s", LIMIT.as_secs()));
        }
        if node.alive().is_err() {
            return unknown("the node that compares is ending".to_owned());
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// What the checksums say. The copy that more members have than any other counts as right.
fn compare<'a>(
    answers: impl Iterator<Item = (&'a Member, Result<Checksum, Missing>)>,
) -> Vec<MemberVerification> {
    let answers: Vec<_> = answers.collect();
    let mut groups: BTreeMap<String, (usize, &Checksum)> = BTreeMap::new();
    for checksum in answers.iter().filter_map(|(_, answer)| answer.as_ref().ok()) {
        groups.entry(checksum.whole()).or_insert((0, checksum)).0 += 1;
    }
    let most = groups.values().map(|(count, _)| *count).max().unwrap_or(0);
    let mut largest = groups.values().filter(|(count, _)| *count == most);
    let right = match (largest.next(), largest.next()) {
        (Some((_, checksum)), None) => Some((*checksum).clone()),
        _ => None,
    };
    let one = |(member, answer): (&Member, Result<Checksum, Missing>)| {
        let (outcome, checksum, detail) = match (answer, &right) {
            (Err(Missing::Unknown(why)), _) => (VerificationOutcome::Unknown, String::new(), why),
            (Err(Missing::Faulty(why)), _) => (VerificationOutcome::Faulty, String::new(), why),
            (Ok(own), Some(right)) if own == *right => {
                (VerificationOutcome::Same, own.whole(), String::new())
            }
            (Ok(own), Some(right)) => {
                let detail = format!("its {} differ", own.differences(right).join(", "));
                (VerificationOutcome::Differs, own.whole(), detail)
            }
            (Ok(own), None) => {
                let detail = "no copy is in the majority: it cannot be told which is right";
                (VerificationOutcome::Differs, own.whole(), detail.to_owned())
            }
        };
        let (node, name) = (member.node_id, member.name.clone());
        // It may be another member's word.
        let detail = detail.chars().filter(|char| !char.is_control()).take(DETAIL_MAX).collect();
        MemberVerification { node, name, outcome, checksum, detail }
    };
    answers.into_iter().map(one).collect()
}

fn with(record: &VerificationRecord, outcome: VerificationOutcome) -> Vec<&MemberVerification> {
    record.members.iter().filter(|member| member.outcome == outcome).collect()
}

/// One sentence for people.
fn summary(record: &VerificationRecord) -> String {
    let named = |members: &[&MemberVerification]| {
        let one = |member: &&MemberVerification| format!("{} ({})", member.name, member.detail);
        members.iter().map(one).collect::<Vec<_>>().join(", ")
    };
    let differ = with(record, VerificationOutcome::Differs);
    let unknown = with(record, VerificationOutcome::Unknown);
    let faulty = with(record, VerificationOutcome::Faulty);
    let same = with(record, VerificationOutcome::Same).len();
    let mut text = if !differ.is_empty() {
        format!(
            "THE COPIES DIFFER: {}; keep a backup, then remove the node whose copy is wrong, empty its data folder and let it join again",
            named(&differ)
        )
    } else if same == 1 && record.members.len() == 1 {
        "the only copy can be read; there is no other to compare it with".to_owned()
    } else {
        format!("{same} of {} copies are the same", record.members.len())
    };
    if !faulty.is_empty() {
        text = format!(
            "A COPY IS DAMAGED: {}; look at that node's disk and memory, then remove the node, empty its data folder and let it join again; {text}",
            named(&faulty)
        );
    }
    if !unknown.is_empty() {
        text = format!("{text}; not compared: {}", named(&unknown));
    }
    text
}

fn report(record: &VerificationRecord) {
    let (index, revision) = (record.log_index, record.revision);
    let text = summary(record);
    let any = |outcome| !with(record, outcome).is_empty();
    if any(VerificationOutcome::Differs) || any(VerificationOutcome::Faulty) {
        tracing::error!(index, revision, "{text}");
    } else if any(VerificationOutcome::Unknown) {
        tracing::warn!(index, revision, "{text}");
    } else {
        tracing::info!(index, revision, "{text}");
    }
}

/// As the API says it.
pub(crate) fn to_api(record: VerificationRecord) -> v1::Verification {
    let any = |outcome| !with(&record, outcome).is_empty();
    let (differs, faulty) = (any(VerificationOutcome::Differs), any(VerificationOutcome::Faulty));
    let summary = summary(&record);
    let members = record.members.into_iter().map(|member| v1::MemberVerification {
        node_id: member.node.0,
        node: member.name,
        outcome: member.outcome.word().to_owned(),
        checksum: member.checksum,
        detail: member.detail,
    });
    v1::Verification {
        at_unix_ms: record.at_unix_ms,
        log_index: record.log_index,
        revision: record.revision,
        members: members.collect(),
        differs,
        summary,
        faulty,
    }
}

/// The last one that this node knows of, without those who are no members any more.
pub(crate) fn last(node: &Node) -> Option<v1::Verification> {
    let row = node.db().view(|view| view.get(Table::Data, keys::VERIFICATION.as_bytes()));
    let kept: Record = decode(&row.ok()??).ok()?;
    let mut record: VerificationRecord = serde_json::from_slice(&kept.value).ok()?;
    let members = node.members();
    record.members.retain(|of| members.iter().any(|member| member.node_id == of.node));
    Some(to_api(record))
}

/// When the leader checks by itself: soon after it was elected, then every so often.
#[derive(Debug)]
pub(crate) struct Turns {
    term: u64,
    due: Instant,
    running: Option<tokio::task::JoinHandle<()>>,
}

impl Turns {
    pub(crate) fn new() -> Self {
        Self { term: 0, due: Instant::now(), running: None }
    }

    /// Once a second, on the leader.
    pub(crate) fn tend(&mut self, node: &Arc<Node>, term: u64) {
        let (now, every) = (Instant::now(), node.config().verify_every);
        if self.term != term {
            (self.term, self.due) = (term, now + every.min(FIRST));
        }
        let busy = self.running.as_ref().is_some_and(|running| !running.is_finished());
        if now < self.due || busy {
            return;
        }
        self.due = now + every;
        let node = node.clone();
        self.running = Some(tokio::spawn(async move {
            if let Err(error) = verify(&node).await {
                tracing::warn!(%error, "the members' copies could not be compared");
            }
        }));
    }
}

impl Drop for Turns {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::NodeId;

    fn member(id: u64) -> Member {
        Member {
            node_id: NodeId(id),
            name: format!("n{id}"),
            api_address: String::new(),
            enrol_address: String::new(),
            voter: true,
            zone: String::new(),
            witness: false,
        }
    }

    fn checksum(data: u8) -> Checksum {
        let tables = vec![("data".to_owned(), [data; 32]), ("journal".to_owned(), [0; 32])];
        Checksum { revision: 9, tables }
    }

    fn compared(answers: &[Option<u8>]) -> VerificationRecord {
        let members: Vec<Member> = (1..).take(answers.len()).map(member).collect();
        let off = || Missing::Unknown("it is off".to_owned());
        of(&members, answers.iter().map(|sum| sum.map(checksum).ok_or_else(off)))
    }

    fn of(
        members: &[Member],
        answers: impl Iterator<Item = Result<Checksum, Missing>>,
    ) -> VerificationRecord {
        let members = compare(members.iter().zip(answers));
        VerificationRecord { at_unix_ms: 1, log_index: 2, revision: 9, members }
    }

    fn outcomes(record: &VerificationRecord) -> Vec<&str> {
        record.members.iter().map(|member| member.outcome.word()).collect()
    }

    #[test]
    fn the_one_that_differs_from_most_is_named() {
        let record = compared(&[Some(1), Some(2), Some(1)]);
        assert_eq!(outcomes(&record), ["same", "differs", "same"]);
        let api = to_api(record);
        assert!(api.differs, "{api:?}");
        assert!(api.summary.contains("n2 (its data differ)"), "{}", api.summary);
        assert!(!api.summary.contains("n1") && !api.summary.contains("n3"), "{}", api.summary);
    }

    #[test]
    fn without_a_majority_no_copy_is_called_right() {
        let record = compared(&[Some(1), Some(2)]);
        assert_eq!(outcomes(&record), ["differs", "differs"]);
        assert!(to_api(record).summary.contains("cannot be told"));
        let record = compared(&[Some(1), Some(1), Some(2), Some(2), None]);
        assert_eq!(outcomes(&record)[4], "unknown");
        assert_eq!(with(&record, VerificationOutcome::Differs).len(), 4);
    }

    #[test]
    fn who_gives_no_checksum_is_not_called_the_same() {
        let api = to_api(compared(&[Some(1), Some(1), None]));
        assert!(!api.differs);
        assert_eq!(api.summary, "2 of 3 copies are the same; not compared: n3 (it is off)");
        let api = to_api(compared(&[None]));
        assert_eq!(api.summary, "0 of 1 copies are the same; not compared: n1 (it is off)");
        assert!(to_api(compared(&[Some(1)])).summary.contains("no other"));
    }
    #[test]
    fn a_copy_that_cannot_be_read_is_a_fault_of_its_node() {
        let members: Vec<Member> = (1..=3).map(member).collect();
        let damaged = Missing::Faulty(format!("Corruption:\n{}", "x".repeat(2 * DETAIL_MAX)));
        let answers = [Ok(checksum(1)), Err(damaged), Ok(checksum(1))];
        let record = of(&members, answers.into_iter());
        assert_eq!(outcomes(&record), ["same", "faulty", "same"]);
        assert_eq!(record.members[1].detail.len(), DETAIL_MAX);
        let api = to_api(record);
        assert!(api.faulty && !api.differs, "{api:?}");
        assert!(api.summary.starts_with("A COPY IS DAMAGED: n2 (Corruption:x"), "{}", api.summary);
        assert!(api.summary.ends_with("; 2 of 3 copies are the same"), "{}", api.summary);
    }
}
