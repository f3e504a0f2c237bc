//! `Membership.WhoAmI`: who asks, and what it may do, by the same table that judges it.

use cluster::tls::{PeerIdentity, require_any};
use proto::v1::{CallRight, WhoAmIRequest, WhoAmIResponse};
use tonic::{Request, Status};

use super::Api;
use crate::access::{Has, Needs, Roles, has, judge, rules};

pub(super) fn answer(
    api: &Api,
    request: &Request<WhoAmIRequest>,
) -> Result<WhoAmIResponse, Status> {
    let peer = require_any(request)?;
    // Before there is a cluster root alone asks, whom no document limits.
    let roles = api.node().map_or(Roles::Unread, |node| node.access.roles());
    let has = has(&peer, &roles);
    let (kind, name) = match &peer {
        PeerIdentity::Client(name) => ("client", name.clone()),
        PeerIdentity::Node(id) => ("node", id.to_string()),
        PeerIdentity::LocalRoot => ("root", "root".to_owned()),
    };
    // What nodes say to each other is nobody's question.
    let calls = rules().filter(|rule| rule.needs != Needs::Node).map(|rule| CallRight {
        call: rule.call.clone(),
        needs: rule.needs.words().to_owned(),
        detail: rule.detail.to_owned(),
        allowed: judge(rule, &peer, &roles).is_ok(),
    });
    Ok(WhoAmIResponse {
        kind: kind.to_owned(),
        reason: reason(&peer, has),
        role: has.role().map(|role| role.word().to_owned()).unwrap_or_default(),
        name,
        calls: calls.collect(),
    })
}

fn reason(peer: &PeerIdentity, has: Has) -> String {
    let PeerIdentity::Client(name) = peer else {
        return "no document under access/ limits it".to_owned();
    };
    let ask = format!("ask an administrator for `clusterctl config set access/{name} role=viewer`");
    match has {
        Has::Everything => {
            "there is no document under access/: every client certificate is an administrator's"
                .to_owned()
        }
        Has::Role(_) => format!("access/{name}.toml"),
        Has::Nothing => format!("there is no access/{name}.toml; {ask}"),
        Has::Broken => format!("access/{name}.toml does not hold; {ask}"),
        Has::Unread => "this node does not know yet whether access/ is empty; try again".to_owned(),
    }
}
