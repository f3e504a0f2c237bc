//! `clusterctl cluster`: form it, join it, see how it is.

mod backup;
mod ca;
mod certificates;
mod restore;
mod verify;
mod whoami;

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use proto::v1;
use proto::v1::membership_client::MembershipClient;

use crate::args::Format;
use crate::connect::Session;
use crate::failure::{Exit, Failure};
use crate::output::{self, or_dash};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make this node the first of a new cluster
    #[command(
        after_help = "Examples:\n  clusterctl cluster init\n  clusterctl cluster init --name prod"
    )]
    Init {
        /// What people call the cluster, in its status and backups; it stays. Clusters are told apart by
        /// their ids and certificates
        #[arg(long, default_value = "holdfast")]
        name: String,
        /// This node's name; as configured where absent
        #[arg(long, default_value = "", hide_default_value = true)]
        node_name: String,
    },
    /// Let this node join a cluster
    #[command(
        after_help = "Examples:\n  clusterctl cluster join TOKEN\n  ssh node1 clusterctl cluster token create | clusterctl cluster join -"
    )]
    Join {
        /// What `clusterctl cluster token create` printed on a member; `-` reads it from stdin
        token: String,
        /// This node's name; as configured where absent
        #[arg(long, default_value = "", hide_default_value = true)]
        node_name: String,
    },
    /// Tokens for nodes that are to join
    #[command(subcommand)]
    Token(Token),
    /// Members, leader, quorum
    #[command(
        after_help = "Exit code 4 where the node belongs to no cluster yet.\n\nExamples:\n  clusterctl cluster status\n  clusterctl cluster status -o json"
    )]
    Status,
    /// Who you are to the cluster, by your certificate, and what you may do
    #[command(visible_alias = "who-am-i", after_help = whoami::AFTER_HELP)]
    Whoami {
        /// Each call of the API with what it needs
        #[arg(long)]
        calls: bool,
    },
    /// Compare the members' copies of the configuration, each at the same place of the log
    #[command(
        after_help = "The leader does the same each hour; `clusterctl cluster status` shows how the last one ended.\nExit code 1 where copies differ, or a member could not be compared.\n\nExamples:\n  clusterctl cluster verify"
    )]
    Verify,
    /// Write the configuration, secrets included, into a file
    #[command(after_help = backup::AFTER_HELP)]
    Backup {
        /// The file; it is made with mode 0600
        file: PathBuf,
        /// What the asked node has, also without a quorum
        #[arg(long)]
        stale: bool,
        /// Replace the file
        #[arg(long)]
        force: bool,
    },
    /// Make this node the first of a new cluster with the data of a backup
    #[command(after_help = restore::AFTER_HELP)]
    Restore {
        /// What `clusterctl cluster backup` wrote
        file: PathBuf,
        /// The new cluster's name; the old one's where absent
        #[arg(long, default_value = "", hide_default_value = true)]
        name: String,
        /// This node's name; as configured where absent
        #[arg(long, default_value = "", hide_default_value = true)]
        node_name: String,
        /// All VMs of the old cluster are off: do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Have another node lead: the one that is named, else the one that is furthest
    #[command(
        after_help = "Examples:\n  clusterctl cluster transfer-leader\n  clusterctl cluster transfer-leader node2"
    )]
    TransferLeader {
        /// The node; any voter where absent
        #[arg(default_value = "", hide_default_value = true)]
        node: String,
    },
    /// The CA that signs certificates, and another one in its place
    #[command(subcommand)]
    Ca(ca::Command),
    /// Certificates of nodes and clients: who has which, until when
    #[command(subcommand)]
    Cert(certificates::Command),
    /// Remove a node that owns no VMs; drain it first
    #[command(
        after_help = "Examples:\n  clusterctl node drain node3 && clusterctl cluster remove node3"
    )]
    Remove {
        /// The node
        node: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Token {
    /// Make a token that lets one node join, once
    #[command(
        after_help = "Examples:\n  clusterctl cluster token create\n  clusterctl cluster token create --ttl 10m"
    )]
    Create {
        /// How long it is valid
        #[arg(long, default_value = "1h", value_parser = humantime::parse_duration)]
        ttl: Duration,
    },
}

pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    let mut client = MembershipClient::new(session.channel.clone());
    let format = session.global.output;
    match command {
        Command::Init { name, node_name } => {
            let request = v1::InitRequest { cluster_name: name, node_name };
            let made = session.call("form a cluster", client.init(request)).await?;
            output::print(format, &made, |made| {
                output::fields([
                    ("cluster", made.cluster_id.clone()),
                    ("node id", made.node_id.to_string()),
                    ("CA SHA-256", made.ca_fingerprint.clone()),
                    ("next", "`clusterctl cluster token create`, then `clusterctl cluster join TOKEN` on the others".to_owned()),
                ])
            })
        }
        Command::Join { token, node_name } => {
            let token = read_token(token)?;
            let request = v1::JoinRequest { token, node_name };
            let joined = session.call("join the cluster", client.join(request)).await?;
            output::print(format, &joined, |joined| {
                let (cluster, id) = (&joined.cluster_id, joined.node_id);
                let rest = match joined.caught_up {
                    true => "",
                    false => {
                        "; its copy of the configuration is still on its way: see `clusterctl cluster status`"
                    }
                };
                format!("joined cluster {cluster} as node id {id}{rest}")
            })
        }
        Command::Token(Token::Create { ttl }) => {
            let ttl_s = u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX).max(1);
            let request = v1::CreateTokenRequest { ttl_s };
            let made = session.call("make a join token", client.create_token(request)).await?;
            // The token alone, so that it can be piped into `cluster join -`.
            output::print(format, &made, |made| made.token.clone())
        }
        Command::Status => {
            let status = client.status(v1::ClusterStatusRequest {});
            let status = session.call("see the cluster's status", status).await?;
            match (status.initialized, format) {
                (true, _) => output::print(format, &status, status_table),
                (false, Format::Table) => Err(no_cluster()),
                (false, Format::Json | Format::Yaml) => {
                    output::print(format, &status, |_| String::new())?;
                    Err(no_cluster())
                }
            }
        }
        Command::Whoami { calls } => whoami::run(session, client, calls).await,
        Command::Verify => verify::run(session, client).await,
        Command::Backup { file, stale, force } => {
            backup::run(session, client, &file, stale, force).await
        }
        Command::Restore { file, name, node_name, yes } => {
            let wanted = restore::Wanted { name, node_name, yes };
            restore::run(session, client, &file, wanted).await
        }
        Command::TransferLeader { node } => {
            let moved = client.transfer_leader(v1::TransferLeaderRequest { node });
            let moved = session.call("move leadership", moved).await?;
            output::print(format, &moved, |moved| format!("{} leads", moved.leader))
        }
        Command::Ca(command) => ca::run(session, command).await,
        Command::Cert(command) => certificates::run(session, command).await,
        Command::Remove { node } => {
            let request = v1::RemoveNodeRequest { node: node.clone() };
            let what = format!("remove node {node}");
            let removed = session.call(&what, client.remove_node(request)).await?;
            output::print(format, &removed, |_| format!("removed {node}"))
        }
    }
}

fn read_token(token: String) -> Result<String, Failure> {
    if token != "-" {
        return Ok(token);
    }
    let mut line = String::new();
    match std::io::stdin().read_line(&mut line) {
        Ok(_) if !line.trim().is_empty() => Ok(line.trim().to_owned()),
        Ok(_) => Err(Failure::new(Exit::Usage, "there is no token on stdin")),
        Err(error) => {
            Err(Failure::new(Exit::Failed, "cannot read the token").why(error.to_string()))
        }
    }
}

fn no_cluster() -> Failure {
    Failure::new(Exit::Refused, "there is no cluster to see the status of")
        .why("the agent works, but this node belongs to no cluster yet")
        .remedy("`clusterctl cluster init` makes a new one; `clusterctl cluster join TOKEN` joins one, with what `clusterctl cluster token create` printed there")
}

fn status_table(status: &v1::ClusterStatus) -> String {
    let name_of = |id: u64| {
        let mut members = status.members.iter().filter_map(|member| member.member.as_ref());
        let found = members.find(|member| member.node_id == id);
        found.map_or_else(|| format!("node id {id}"), |member| member.name.clone())
    };
    let quorum = if status.quorum {
        format!("yes, {} more failure(s) tolerated", status.failures_tolerated)
    } else {
        "NO: the configuration cannot be changed, HA VMs stop; bring voters back".to_owned()
    };
    let head = output::fields([
        ("cluster", format!("{} ({})", status.cluster_name, status.cluster_id)),
        ("quorum", quorum),
        ("leader", status.leader.map_or_else(|| "none".to_owned(), name_of)),
        ("term", status.term.to_string()),
        ("revision", status.revision.to_string()),
        ("answered by", name_of(status.answered_by)),
        ("copies", status.verification.as_ref().map(copies).unwrap_or_default()),
        ("CA rotation", status.ca.as_ref().map(ca::progress).unwrap_or_default()),
    ]);
    let rows = status.members.iter().map(|status_of| {
        let member = status_of.member.clone().unwrap_or_default();
        let contact =
            status_of.last_contact_ms.map(|ms| format!("{} ago", output::duration_ms(ms)));
        [
            member.name,
            member.node_id.to_string(),
            role(member.voter, member.witness).to_owned(),
            or_dash(&member.zone),
            or_dash(&member.api_address),
            status_of.lag.map_or_else(|| "-".to_owned(), |lag| lag.to_string()),
            contact.unwrap_or_else(|| "-".to_owned()),
            or_dash(&status_of.health),
        ]
    });
    let headings = ["NODE", "ID", "VOTE", "ZONE", "ADDRESS", "LAG", "HEARD", "HEALTH"];
    let members = output::columns(headings, rows);
    let outlook: Vec<&str> = status.if_fails.iter().map(|fails| fails.summary.as_str()).collect();
    let gap = if outlook.is_empty() { "" } else { "\n\n" };
    format!("{head}\n\n{}{gap}{}", members.trim_end(), outlook.join("\n"))
}

fn copies(found: &v1::Verification) -> String {
    let when = output::ago(found.at_unix_ms);
    format!("{}; at revision {}, {when}", found.summary, found.revision)
}

fn role(voter: bool, witness: bool) -> &'static str {
    match (voter, witness) {
        (true, true) => "witness",
        (true, false) => "voter",
        (false, true) => "learner (witness)",
        (false, false) => "learner",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_without_quorum_cannot_be_overlooked() {
        let member =
            v1::Member { node_id: 1, name: "node1".into(), voter: true, ..v1::Member::default() };
        let status = v1::ClusterStatus {
            initialized: true,
            cluster_name: "lab".into(),
            cluster_id: "c1".into(),
            answered_by: 1,
            members: vec![v1::MemberStatus { member: Some(member), ..v1::MemberStatus::default() }],
            if_fails: vec![v1::NodeFailure {
                summary: "if node1 fails: quorum is lost".into(),
                ..v1::NodeFailure::default()
            }],
            verification: Some(v1::Verification {
                revision: 9,
                differs: true,
                summary: "THE COPIES DIFFER: n2 (its data differ)".into(),
                ..v1::Verification::default()
            }),
            ca: Some(v1::CaStatus {
                phase: "trusting".into(),
                waiting_for: vec!["n2 (silent)".into()],
                ..v1::CaStatus::default()
            }),
            ..v1::ClusterStatus::default()
        };
        let text = status_table(&status);
        assert!(
            text.contains("copies       THE COPIES DIFFER: n2") && text.contains("revision 9"),
            "{text}"
        );
        assert!(text.contains("quorum       NO:") && text.contains("leader       none"), "{text}");
        assert!(text.contains("answered by  node1"), "{text}");
        assert!(text.contains("CA rotation  trusting: ") && text.contains("n2 (silent)"), "{text}");
        assert!(
            text.contains("voter") && text.ends_with("if node1 fails: quorum is lost"),
            "{text}"
        );
    }
}
