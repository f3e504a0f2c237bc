//! `clusterctl cluster whoami`: who asks, and what it may do.

use proto::v1;
use proto::v1::membership_client::MembershipClient;
use tonic::transport::Channel;

use crate::connect::Session;
use crate::failure::Failure;
use crate::output::{self, or_dash, yes};

pub(super) const AFTER_HELP: &str = "\
Roles are documents, access/NAME.toml; see `clusterctl config explain access`.

Examples:
  clusterctl cluster whoami
  clusterctl cluster whoami --calls
  clusterctl config set access/ann role=operator";

pub(super) async fn run(
    session: &Session,
    mut client: MembershipClient<Channel>,
    calls: bool,
) -> Result<(), Failure> {
    let told = client.who_am_i(v1::WhoAmIRequest {});
    let told = session.call("see who you are", told).await?;
    output::print(session.global.output, &told, |told| table(told, calls))
}

fn table(told: &v1::WhoAmIResponse, calls: bool) -> String {
    let who = match told.kind.as_str() {
        "root" => "root on the node".to_owned(),
        kind => format!("{kind} {}", told.name),
    };
    let role = if told.role.is_empty() { "none: you may do nothing" } else { &told.role };
    let head = output::fields([
        ("you are", who),
        ("role", role.to_owned()),
        ("because", told.reason.clone()),
    ]);
    if !calls {
        return head;
    }
    let rows = told.calls.iter().map(|right| {
        [right.call.clone(), right.needs.clone(), yes(right.allowed), or_dash(&right.detail)]
    });
    let rows = output::columns(["CALL", "NEEDS", "ALLOWED", "BUT"], rows);
    format!("{head}\n\n{}", rows.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_no_role_is_told_how_to_get_one() {
        let right = v1::CallRight {
            call: "Vms.Start".into(),
            needs: "operator".into(),
            ..v1::CallRight::default()
        };
        let told = v1::WhoAmIResponse {
            kind: "client".into(),
            name: "eve".into(),
            reason: "there is no access/eve.toml; ask".into(),
            calls: vec![right],
            ..v1::WhoAmIResponse::default()
        };
        let text = table(&told, false);
        assert!(text.contains("client eve") && text.contains("may do nothing"), "{text}");
        assert!(text.contains("no access/eve.toml; ask") && !text.contains("Vms.Start"), "{text}");
        let text = table(&told, true);
        let row = text.lines().last().unwrap_or_default();
        let cells: Vec<_> = row.split_whitespace().collect();
        assert_eq!(cells, ["Vms.Start", "operator", "no", "-"]);
    }
}
