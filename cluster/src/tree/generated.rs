//! Files that nobody wrote: what this node knows, as text for scripts and people.

use proto::record::Placement;
use proto::{Revision, keys};
use serde::Serialize;

use super::inode::Generated;
use super::state::{LogLine, State, Tree};
use crate::{Cluster, Member};

#[derive(Serialize)]
struct Members<'a> {
    cluster: &'a str,
    node: String,
    quorum: bool,
    leader: Option<String>,
    members: Vec<MemberLine>,
}

#[derive(Serialize)]
struct MemberLine {
    id: u64,
    name: String,
    address: String,
    voter: bool,
}

#[derive(Serialize)]
struct Vm<'a> {
    name: &'a str,
    owner: Option<String>,
    owner_id: u64,
    generation: u64,
    state: &'static str,
    ha: bool,
}

#[derive(Serialize)]
struct Version<'a> {
    version: &'static str,
    cluster: &'a str,
    cluster_id: &'a str,
    node: String,
    revision: Revision,
}

impl Tree {
    /// The content of a generated file now.
    pub(super) fn generate(&self, state: &State, generated: &Generated) -> Vec<u8> {
        let cluster = &self.cluster;
        match generated {
            Generated::Members => members(cluster, !self.quorum.seems_lost()),
            Generated::Vms => vms(state, &cluster.members()),
            Generated::Version => json(&Version {
                version: env!("CARGO_PKG_VERSION"),
                cluster: cluster.cluster_name(),
                cluster_id: cluster.cluster_id(),
                node: cluster.node_name().borrow().clone(),
                revision: Revision(state.names.revision),
            }),
            Generated::Log => log(state.log.iter()),
            Generated::Note(reason) => format!("{reason}\n").into_bytes(),
        }
    }
}

fn json(value: &impl Serialize) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).unwrap_or_default();
    text.push(b'\n');
    text
}

fn members(cluster: &Cluster, quorum: bool) -> Vec<u8> {
    let all = cluster.members();
    let leader = cluster.leader();
    let name_of = |id| all.iter().find(|one| one.node_id == id).map(|one| one.name.clone());
    json(&Members {
        cluster: cluster.cluster_name(),
        node: cluster.node_name().borrow().clone(),
        quorum,
        leader: leader.and_then(name_of),
        members: all
            .iter()
            .map(|member| MemberLine {
                id: member.node_id.0,
                name: member.name.clone(),
                address: member.api_address.clone(),
                voter: member.voter,
            })
            .collect(),
    })
}

fn vms(state: &State, members: &[Member]) -> Vec<u8> {
    let placements = state.placements.iter().filter_map(|(key, value)| {
        let placement: Placement = serde_json::from_slice(value).ok()?;
        Some((&key[keys::PLACEMENTS.len()..], placement))
    });
    let line = |(name, placement): (_, Placement)| Vm {
        name,
        owner: members
            .iter()
            .find(|member| member.node_id == placement.owner)
            .map(|member| member.name.clone()),
        owner_id: placement.owner.0,
        generation: placement.generation.0,
        state: placement.phase.word(),
        ha: placement.ha,
    };
    json(&placements.map(line).collect::<Vec<_>>())
}

/// One line a change: revision, time (UTC), author, what happened, path; separated by tabs.
fn log<'a>(lines: impl Iterator<Item = &'a LogLine>) -> Vec<u8> {
    let mut text = String::new();
    for line in lines {
        let author = if line.origin.author.is_empty() { "-" } else { &line.origin.author };
        let done = if line.removed { "removed" } else { "written" };
        let time = utc(line.origin.seconds);
        text += &format!("{}\t{time}\t{author}\t{done}\t{}\n", line.revision, line.path);
    }
    text.into_bytes()
}

/// RFC 3339, by the civil calendar.
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01, in eras of 400 years: a leap day is then the last of its year.
    let day = days + 719_468;
    let (era, of_era) = (day / 146_097, day % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::super::source::Origin;
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_827_696, "2000-02-29T12:34:56Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), expected);
        }
    }

    #[test]
    fn a_change_is_a_line() {
        let line = LogLine {
            revision: 7,
            origin: Origin { author: "uid 0 (root) on n1".to_owned(), seconds: 0 },
            path: "vms/web.toml".to_owned(),
            removed: false,
        };
        let text = String::from_utf8(log([&line].into_iter())).unwrap();
        assert_eq!(text, "7\t1970-01-01T00:00:00Z\tuid 0 (root) on n1\twritten\tvms/web.toml\n");
    }
}
