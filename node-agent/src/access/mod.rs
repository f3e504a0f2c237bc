//! Who may do what: every call of every connection is judged here, by one table, before a service
//! sees it.
//!
//! ```text
//!   connection ──► guard ── judge(rule, who, roles) ──► service ── may_write(paths) ──► documents
//!                    ▲            ▲          ▲             └─ with more than one path: each of them
//!              the path's rule  table   access/*.toml, followed
//! ```
//!
//! Owns: the decision. Never: who somebody is (`cluster::tls`), or what a change of documents may be
//! (`documents`).
//!
//! Invariants: what is not in the table is refused. Nobody changes anything by a role that it had: what
//! a quorum has confirmed since the request came in counts, or what is there when its transaction is
//! applied. (Without a quorum root goes on, over the local socket.) A client is judged by the node it is connected
//! to, before anything is passed on; what comes with a node's certificate was judged there. A
//! service that the guard does not stand before answers nobody ([`Granted`]).

mod guard;
mod refused;
mod roles;
mod stream;
mod table;
#[cfg(test)]
mod tests;

use cluster::Txn;
use cluster::tls::PeerIdentity;
use proto::documents::Role;
use proto::{Revision, keys};
use tonic::Status;

pub use guard::Guard;
pub use refused::Refused;
pub use roles::{Access, Has, Known, Roles};
pub use table::{Needs, Rule, rules, to_cancel, to_issue, to_write};

use crate::api::forward::Caller;

/// The guard's word for a request that it let through, as a request extension. Nobody else makes one.
#[derive(Debug, Clone, Copy)]
pub struct Granted {
    role: Role,
    rests_on: Option<Revision>,
}

impl Granted {
    /// The role that it was let through with.
    #[must_use]
    pub fn role(self) -> Role {
        self.role
    }

    /// The last write of [`keys::ADMINISTRATION`] that it was judged by, where it is a client's role
    /// that was not confirmed: a transaction has to name it.
    #[must_use]
    pub fn rests_on(self) -> Option<Revision> {
        self.rests_on
    }
}

/// A transaction that comes to nothing where its caller was let through by what is old.
#[must_use]
pub fn resting(txn: Txn, caller: &Caller) -> Txn {
    match caller.rests_on {
        Some(revision) => txn.resting_on(keys::ADMINISTRATION, revision),
        None => txn,
    }
}

/// A client's caller, judged by what is known now.
///
/// # Errors
/// It may not make the call any more.
pub fn again(caller: &Caller, call: &str, known: &Known) -> Result<Caller, Status> {
    let unknown = || Refused::Unknown(call.to_owned()).status(None);
    let rule = rules().find(|rule| rule.call == call).ok_or_else(unknown)?;
    let peer = PeerIdentity::Client(caller.user.clone());
    let role = judge(rule, &peer, &known.roles).map_err(|refused| refused.status(None))?;
    let mut caller = caller.with_role(role)?;
    caller.rests_on = Some(known.revision);
    Ok(caller)
}

/// What somebody has.
#[must_use]
pub fn has(peer: &PeerIdentity, roles: &Roles) -> Has {
    match peer {
        PeerIdentity::Client(name) => roles.of(name),
        PeerIdentity::Node(_) | PeerIdentity::LocalRoot => Has::Everything,
    }
}

/// Whether somebody may make a call, and with which role.
///
/// # Errors
/// [`Refused`]
pub fn judge(rule: &Rule, peer: &PeerIdentity, roles: &Roles) -> Result<Option<Role>, Refused> {
    let (call, has) = (|| rule.call.clone(), has(peer, roles));
    let judged = match (rule.needs, peer) {
        (Needs::Identity, _)
        | (Needs::Node, PeerIdentity::Node(_))
        | (Needs::Root, PeerIdentity::LocalRoot)
        | (Needs::Role(_), PeerIdentity::Node(_) | PeerIdentity::LocalRoot) => Ok(()),
        (Needs::Node, _) => Err(Refused::NotANode { call: call(), who: peer.to_string() }),
        (Needs::Root, _) => Err(Refused::NotRoot { call: call(), why: rule.detail }),
        (Needs::Role(needs), PeerIdentity::Client(client)) => {
            enough(has, needs, client, &rule.call)
        }
    };
    judged.map(|()| has.role())
}

fn enough(has: Has, needs: Role, client: &str, what: &str) -> Result<(), Refused> {
    match has.role() {
        Some(role) if role >= needs => Ok(()),
        _ if has == Has::Unread => Err(Refused::Unread),
        _ => {
            let (client, what) = (client.to_owned(), what.to_owned());
            Err(Refused::Role { client, what, needs, has })
        }
    }
}

/// Whether a caller may write all these paths.
///
/// # Errors
/// `PERMISSION_DENIED` with the first that it may not; what nobody may write is refused by the
/// documents' own rules where an administrator asks.
pub fn may_write<'a>(
    caller: &Caller,
    paths: impl IntoIterator<Item = &'a str>,
) -> Result<(), Status> {
    if caller.role == Role::Admin {
        return Ok(());
    }
    for path in paths {
        let needs = to_write(path).map_err(|refused| Refused::Path(refused).status(None))?;
        let shown: String = path.chars().take(120).collect();
        let what = format!("writing `{}`", shown.escape_debug());
        enough(Has::Role(caller.role), needs, &caller.user, &what)
            .map_err(|refused| refused.status(None))?;
    }
    Ok(())
}

/// Whether a caller may have a client certificate made with this name.
///
/// # Errors
/// `PERMISSION_DENIED`
pub fn may_issue(caller: &Caller, name: &str) -> Result<(), Status> {
    let shown: String = name.chars().take(64).collect();
    let what = format!("a certificate for `{}`", shown.escape_debug());
    enough(Has::Role(caller.role), to_issue(name, &caller.user), &caller.user, &what)
        .map_err(|refused| refused.status(None))
}

/// Whether a caller may cancel a task of this kind.
///
/// # Errors
/// `PERMISSION_DENIED`
pub fn may_cancel(caller: &Caller, kind: &str) -> Result<(), Status> {
    let what = format!("cancelling a task `{kind}`");
    enough(Has::Role(caller.role), to_cancel(kind), &caller.user, &what)
        .map_err(|refused| refused.status(None))
}
