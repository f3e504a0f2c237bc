//! `clusterctl cluster cert`: who has which certificate, and until when.

use clap::Subcommand;
use proto::v1;
use proto::v1::membership_client::MembershipClient;

use crate::connect::Session;
use crate::failure::{Exit, Failure};
use crate::output;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// All certificates: the CA's, the nodes', the clients'
    #[command(
        visible_alias = "ls",
        after_help = "Examples:\n  clusterctl cluster cert list\n  clusterctl cluster cert list -o json"
    )]
    List,
    /// Have a node get a new certificate and key now; every node where none is named. They do so by
    /// themselves after two thirds of a certificate's life
    #[command(
        after_help = "Examples:\n  clusterctl cluster cert renew\n  clusterctl cluster cert renew node3"
    )]
    Renew {
        /// The node; all of them where absent
        #[arg(default_value = "", hide_default_value = true)]
        node: String,
    },
    /// Have a client's certificates count no more, at once and everywhere; its connections are cut
    #[command(
        after_help = "Examples:\n  clusterctl cluster cert revoke ann\n  clusterctl cluster cert revoke 4f3a9c01d2"
    )]
    Revoke {
        /// The client's name, or a certificate's serial number (8 characters of it are enough)
        #[arg(value_name = "CLIENT|SERIAL")]
        what: String,
    },
}

pub(super) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    let mut client = MembershipClient::new(session.channel.clone());
    let format = session.global.output;
    match command {
        Command::List => {
            let listed = client.list_certificates(v1::ListCertificatesRequest {});
            let listed = session.call("list the certificates", listed).await?;
            output::print(format, &listed, |listed| table(&listed.certificates))
        }
        Command::Renew { node } => {
            let renewed = client.renew_certificates(v1::RenewCertificatesRequest { node });
            let renewed = session.call("renew certificates", renewed).await?;
            output::print(format, &renewed, renewals)?;
            let failed: Vec<_> = renewed.renewed.iter().filter(|of| !of.error.is_empty()).collect();
            if failed.is_empty() {
                return Ok(());
            }
            let names: Vec<_> = failed.iter().map(|of| of.node.as_str()).collect();
            let what = format!("no new certificate for {}", names.join(", "));
            Err(Failure::new(Exit::Failed, what)
                .why("it goes on with the one that it has, and tries again by itself")
                .remedy("see `clusterctl cluster status` and the node's log"))
        }
        Command::Revoke { what } => {
            let revoked =
                client.revoke_certificates(v1::RevokeCertificatesRequest { what: what.clone() });
            let revoked = session.call(&format!("revoke {what}"), revoked).await?;
            output::print(format, &revoked, |revoked| {
                let lines = revoked.revoked.iter().map(|certificate| {
                    format!("revoked: {}, serial {}", holder(certificate), certificate.serial)
                });
                lines.collect::<Vec<_>>().join("\n")
            })
        }
    }
}

fn holder(certificate: &v1::Certificate) -> String {
    match certificate.kind.as_str() {
        "ca" => format!("CA of {}", certificate.name),
        "node" => format!("node {} (id {})", certificate.name, certificate.node_id),
        kind => format!("{kind} {}", certificate.name),
    }
}

/// Of a CA only the dates are known by which it counts, which begin long before it was made: machines
/// whose clocks are behind take it as well.
fn issued(certificate: &v1::Certificate) -> String {
    match certificate.kind.as_str() {
        "ca" => "-".to_owned(),
        _ => output::ago(certificate.issued_unix_s.saturating_mul(1000)),
    }
}

fn table(certificates: &[v1::Certificate]) -> String {
    let rows = certificates.iter().map(|certificate| {
        let state = match certificate.state.as_str() {
            "expiring" => "expiring soon",
            "future" => "not valid yet",
            "replaced-ca" => "valid until the old CA is dropped",
            "next-ca" => "signs soon",
            "untrusted" => "its CA was replaced",
            state => state,
        };
        [
            holder(certificate),
            certificate.serial.clone(),
            issued(certificate),
            output::from_now(certificate.expires_unix_s.saturating_mul(1000)),
            state.to_owned(),
        ]
    });
    let table = output::columns(["HOLDER", "SERIAL", "ISSUED", "EXPIRES", "STATE"], rows);
    let trouble = certificates.iter().filter(|certificate| !certificate.trouble.is_empty()).map(
        |certificate| {
            format!("{} has no new certificate yet: {}", certificate.name, certificate.trouble)
        },
    );
    let trouble: Vec<_> = trouble.collect();
    let gap = if trouble.is_empty() { "" } else { "\n\n" };
    format!("{}{gap}{}", table.trim_end(), trouble.join("\n"))
}

fn renewals(renewed: &v1::RenewCertificatesResponse) -> String {
    let rows = renewed.renewed.iter().map(|of| {
        let new = of.certificate.clone().unwrap_or_default();
        let expires = match of.certificate {
            Some(_) => output::from_now(new.expires_unix_s.saturating_mul(1000)),
            None => String::new(),
        };
        let result = if of.error.is_empty() { "renewed" } else { &of.error };
        [
            of.node.clone(),
            output::or_dash(&new.serial),
            output::or_dash(&expires),
            result.to_owned(),
        ]
    });
    output::columns(["NODE", "SERIAL", "EXPIRES", "RESULT"], rows)
}
