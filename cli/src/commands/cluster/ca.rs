//! `clusterctl cluster ca`: which CA signs, and another one for a cluster that works.

use std::io::IsTerminal;
use std::time::Duration;

use clap::Subcommand;
use proto::v1;
use proto::v1::membership_client::MembershipClient;
use tonic::transport::Channel;

use crate::commands::context;
use crate::connect::Session;
use crate::failure::{Exit, Failure};
use crate::output::{self, or_dash};
use crate::wait::interrupt;

const ROTATE_HELP: &str = "\
Do this where the CA's key may be known to somebody: a node was removed whose machine others have, a
disk got lost. Nothing is interrupted:

  trusting   a new CA is made, and every node learns to trust it beside the old one
  renewing   the new CA signs; every node gets a certificate of it
  renewed    every client has time to get one: `clusterctl context renew`
  stable     `--finish`: the old CA is trusted no more; what it signed is refused, connections are cut

A node that is down holds the first two up until it is back or was removed. It goes on without this
command, and the same command shows it again. Join tokens from before are good until `--finish`.

Examples:
  clusterctl cluster ca rotate
  clusterctl cluster ca rotate --yes --no-wait
  clusterctl context renew
  clusterctl cluster ca rotate --finish";

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Which CA signs, and how far its rotation is
    #[command(
        after_help = "Examples:\n  clusterctl cluster ca status\n  clusterctl cluster ca status -o json"
    )]
    Status,
    /// Replace the cluster's CA while the cluster works
    #[command(after_help = ROTATE_HELP)]
    Rotate {
        /// End it: what the old CA signed is refused from now on
        #[arg(long)]
        finish: bool,
        /// With --finish: also where no administrator's certificate would be let in any more
        #[arg(long, requires = "finish")]
        force: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

pub(super) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    let mut client = MembershipClient::new(session.channel.clone());
    let status = look(session, &mut client).await?;
    match command {
        Command::Status => print(session, &status),
        Command::Rotate { finish: true, force, yes } => {
            finish(session, client, &status, Finish { force, yes }).await
        }
        Command::Rotate { finish: false, yes, .. } => rotate(session, client, &status, yes).await,
    }
}

async fn look(
    session: &Session,
    client: &mut MembershipClient<Channel>,
) -> Result<v1::CaStatus, Failure> {
    let status = client.get_ca_status(v1::CaStatusRequest {});
    session.call("see which CA signs", status).await
}

async fn rotate(
    session: &Session,
    mut client: MembershipClient<Channel>,
    before: &v1::CaStatus,
    yes: bool,
) -> Result<(), Failure> {
    if before.phase == "stable" && !yes {
        let text = "The cluster gets a new CA, and all nodes certificates of it. Clients keep working, and need a\nnew certificate (`clusterctl context renew`) before you end it with --finish.";
        confirmed(text, "rotate").await?;
    }
    let begun = client.rotate_ca(v1::RotateCaRequest::default());
    let mut status = session.call("rotate the CA", begun).await?;
    if session.global.no_wait {
        return print(session, &status);
    }
    let mut said = String::new();
    let waiting = async {
        while matches!(status.phase.as_str(), "trusting" | "renewing") {
            let now = progress(&status);
            if now != said {
                eprintln!("{now}");
                said = now;
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = interrupt() => {
                    return Err(Failure::new(Exit::Interrupted, "stopped watching")
                        .why("the rotation goes on by itself")
                        .remedy("see `clusterctl cluster ca status`"));
                }
            }
            // A node that changes its certificate, or its leader, may be silent for a moment.
            if let Ok(next) = look(session, &mut client).await {
                status = next;
            }
        }
        Ok(())
    };
    session.within("watching the rotation of the CA", waiting).await?;
    context::renew_in_use(&session.global).await?;
    let status = look(session, &mut client).await?;
    print(session, &status)
}

/// How a rotation is ended.
struct Finish {
    force: bool,
    yes: bool,
}

async fn finish(
    session: &Session,
    mut client: MembershipClient<Channel>,
    before: &v1::CaStatus,
    how: Finish,
) -> Result<(), Failure> {
    match before.phase.as_str() {
        "stable" => eprintln!("no rotation of the CA is under way: there is nothing to finish"),
        "renewed" => {
            let text = format!("The old CA is trusted no more.\n{}", locked_out(&before.clients));
            if how.yes {
                eprintln!("{text}");
            } else {
                confirmed(&text, "finish").await?;
            }
        }
        // Refused over there, with the reason.
        _ => {}
    }
    let ended = client.rotate_ca(v1::RotateCaRequest { finish: true, force: how.force });
    let ended = session.call("end the rotation of the CA", ended).await?;
    print(session, &ended)
}

/// Whom the end of a rotation locks out.
fn locked_out(clients: &[String]) -> String {
    match clients {
        [] => "No client needs it any more, as far as the cluster knows.".to_owned(),
        clients => format!(
            "These clients have no certificate of the new one, and WILL BE LOCKED OUT: {}.",
            clients.join(", ")
        ),
    }
}

/// Refused where a person does not type the word.
async fn confirmed(text: &str, word: &'static str) -> Result<(), Failure> {
    if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
        return Err(Failure::new(Exit::Usage, "nobody can be asked: there is no terminal")
            .remedy("confirm it with --yes"));
    }
    eprint!("{text}\n\nType `{word}` to go on: ");
    let answer = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).map(|_| line).unwrap_or_default()
    });
    let agreed = tokio::select! {
        answer = answer => answer.is_ok_and(|line| line.trim() == word),
        () = interrupt() => false,
    };
    if agreed {
        return Ok(());
    }
    Err(Failure::new(Exit::Refused, "nothing was changed").why("it was not confirmed"))
}

fn print(session: &Session, status: &v1::CaStatus) -> Result<(), Failure> {
    output::print(session.global.output, status, table)
}

/// In one line, how far it is.
pub(super) fn progress(status: &v1::CaStatus) -> String {
    let what = match status.phase.as_str() {
        "trusting" => "the nodes learn to trust the new CA",
        "renewing" => "the nodes get certificates of the new CA",
        "renewed" => {
            "the nodes have certificates of the new CA; the old one is trusted until `clusterctl cluster ca rotate --finish`"
        }
        _ => "one CA, which signs",
    };
    match status.waiting_for.as_slice() {
        [] => format!("{}: {what}", status.phase),
        nodes => format!("{}: {what}; waiting for {}", status.phase, nodes.join(", ")),
    }
}

fn table(status: &v1::CaStatus) -> String {
    let other = match status.phase.as_str() {
        "trusting" => "next SHA-256",
        _ => "old SHA-256",
    };
    let clients = match status.clients.as_slice() {
        [] => String::new(),
        clients if status.phase == "trusting" => {
            format!("{} (to be renewed once the new CA signs)", clients.join(", "))
        }
        clients => {
            format!("{} (to be renewed: `clusterctl context renew`)", clients.join(", "))
        }
    };
    output::fields([
        ("phase", progress(status)),
        ("CA SHA-256", status.fingerprint.clone()),
        ("expires", output::from_now(status.expires_unix_s.saturating_mul(1000))),
        (other, or_dash(&status.other_fingerprint)),
        ("old clients", clients),
    ])
}
