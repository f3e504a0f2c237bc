//! What the leader decides about old history and the size of the data. The decision is in the
//! command that it proposes: the state machine knows no clock and no settings.

use std::io;

use super::Node;
use super::settings::Settings;
use super::write::unix_now_ms;
use crate::ClusterConfig;
use crate::consensus::{Forwarded, lead};
use crate::machine::{
    Command, Lane, Read, Span, floor, journal, kept, limits, revision, unswept, written_at_ms,
};

/// The system's history is compacted when it is this much longer than wanted: in bulk. That of
/// files keeps as many revisions, however large.
const SLACK: u64 = 1024;
/// Changes of people's files whose age is looked at in one turn.
const LOOKED_AT: usize = 64;
/// Steps of one turn: the sweep takes its time between them, but not the whole second.
const STEPS: usize = 8;

/// One turn, once a second.
pub(super) async fn keep(node: &Node) {
    for _ in 0..STEPS {
        let now_ms = unix_now_ms();
        let wanted = node.db.view(|view| next_step(view, &node.config, now_ms));
        let command = match wanted {
            Ok(Some(command)) => command,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(%error, "the history cannot be read");
                return;
            }
        };
        tracing::debug!(%command, "history compaction");
        let (limit, silence) = (node.config.request_timeout, node.silence_limit());
        match lead::propose(&node.raft, command, limit, silence).await {
            Forwarded::Reply(_) => {}
            answer => {
                tracing::debug!(?answer, "history was not compacted");
                return;
            }
        }
    }
}

/// The next thing to do, if any.
fn next_step(read: &impl Read, config: &ClusterConfig, now_ms: u64) -> io::Result<Option<Command>> {
    let Settings { retention, limits: wanted } = Settings::read(read, config)?;
    if limits(read)? != Some(wanted) {
        return Ok(Some(Command::Limit(wanted)));
    }
    for lane in Lane::ALL {
        let (floor, last) = (floor(read, lane)?, revision(read)?);
        let (before, keep) = match lane {
            Lane::Files => {
                let age_ms = u64::try_from(retention.file_age.as_millis()).unwrap_or(u64::MAX);
                let too_much = kept(read)?.bytes > retention.file_history_bytes;
                let than_ms = if too_much { u64::MAX } else { now_ms.saturating_sub(age_ms) };
                let mut before = first_younger(read, floor, than_ms)?;
                if too_much {
                    // Watches that are a little behind, and reads of a moment ago, go on.
                    before = before.min(last.saturating_sub(SLACK)).max(floor);
                }
                (before, retention.file_versions)
            }
            Lane::Status | Lane::Private => {
                let wanted = retention.system_revisions;
                let slack = SLACK.min(wanted);
                let long = last.saturating_sub(floor) > wanted.saturating_add(slack);
                (if long { last.saturating_sub(wanted) } else { floor }, 1)
            }
        };
        if before > floor || unswept(read, lane)? {
            return Ok(Some(Command::Compact { lane, before, keep }));
        }
    }
    Ok(None)
}

/// How far the changes of people's files, from a revision on, were made before a time. Stamps are
/// those of several clocks: the first one that is young enough ends it.
fn first_younger(read: &impl Read, from: u64, than_ms: u64) -> io::Result<u64> {
    let (rows, _) = journal(read, &[Lane::Files.folder()], Span::From(from), LOOKED_AT)?;
    let mut old_to = from;
    for (at, key) in rows {
        if written_at_ms(read, &key, at.revision)? >= than_ms {
            break;
        }
        old_to = at.revision + 1;
    }
    Ok(old_to.min(revision(read)?.max(from)))
}
