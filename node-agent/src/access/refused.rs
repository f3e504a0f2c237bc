//! Why somebody may not do something, and who can change that.

use std::path::Path;

use proto::documents::{PathRefused, Role};
use tonic::Status;

use super::Has;

/// Why a call is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is not in the table.
    #[error("the agent has no call {0} for others")]
    Unknown(String),
    /// Nobody is at the other end.
    #[error("no identity on this connection")]
    Nobody,
    /// The documents were not read, or that there are none is not confirmed.
    #[error(
        "this node does not know yet who may do what: no quorum has told it since it started whether \
         access/ is empty; try again, ask another node, or work as root on the node"
    )]
    Unread,
    /// What a client may change is asked of a quorum, and none answers.
    #[error(
        "{call} changes something, and that `{client}` may still do so cannot be confirmed: {why}; as root \
         on the node no role is asked for"
    )]
    Unconfirmed {
        /// The call.
        call: String,
        /// Who asked.
        client: String,
        /// The store's error.
        why: String,
    },
    /// A client's role is too small, or it has none.
    #[error(
        "{what} needs the role `{}`, and the certificate `{client}` has {}: an administrator can \
         give it with `clusterctl config set access/{client} role={}`",
        needs.word(), held(*has, client), needs.word()
    )]
    Role {
        /// The name in the certificate.
        client: String,
        /// What was to be done.
        what: String,
        /// The role it takes.
        needs: Role,
        /// What the client has.
        has: Has,
    },
    /// It is for nodes.
    #[error("{call} is for the cluster's nodes only; you are {who}")]
    NotANode {
        /// The call.
        call: String,
        /// Who asked.
        who: String,
    },
    /// It is for root on the node.
    #[error("{call} is for root on a node alone{}", because(why))]
    NotRoot {
        /// The call.
        call: String,
        /// Why.
        why: &'static str,
    },
    /// Nobody writes there.
    #[error(transparent)]
    Path(PathRefused),
}

fn held(has: Has, client: &str) -> String {
    match has {
        Has::Role(role) => format!("the role `{}`", role.word()),
        Has::Broken => format!("none (access/{client}.toml does not hold)"),
        Has::Unread | Has::Everything | Has::Nothing => {
            format!("none (there is no access/{client}.toml)")
        }
    }
}

fn because(why: &str) -> String {
    if why.is_empty() { String::new() } else { format!(" ({why})") }
}

impl Refused {
    /// For whoever asked. `socket`: where root is served on this node.
    #[must_use]
    pub fn status(&self, socket: Option<&Path>) -> Status {
        let text = self.to_string();
        match self {
            Self::Unknown(_) => Status::unimplemented(text),
            Self::Nobody => Status::unauthenticated(text),
            Self::Unread | Self::Unconfirmed { .. } => Status::unavailable(text),
            Self::Role { .. } | Self::NotANode { .. } => Status::permission_denied(text),
            Self::NotRoot { .. } => Status::permission_denied(match socket {
                Some(socket) => format!(
                    "{text}: run it there, as root, over the agent's local socket (`clusterctl --socket {} …`)",
                    socket.display()
                ),
                None => text,
            }),
            Self::Path(PathRefused::Denied(_)) => Status::permission_denied(text),
            Self::Path(PathRefused::Invalid(_)) => Status::invalid_argument(text),
        }
    }
}
