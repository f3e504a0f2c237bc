//! Who asks, and where a request goes: any node takes any request and passes it to the node that
//! can answer it.
//!
//! A forwarded request says for whom it is made and how often it was passed on. Both are believed
//! from nodes only.

use std::sync::Arc;

use cluster::tls::{PeerIdentity, require_any};
use futures::StreamExt as _;
use proto::documents::Role;
use proto::{NodeId, Revision};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

use super::Answers;
pub use super::leader::channel_to_living as leader_channel;
use crate::access::Granted;
use crate::node::Node;

const USER: &str = "holdfast-user";
const HOPS: &str = "holdfast-hops";
/// A request that was passed on this often is going round in circles: owners change.
const HOPS_MAX: u32 = 3;

/// Who asked for something, and how often it was passed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// For tasks and logs.
    pub user: String,
    /// What it may do. A node may do all: whomever it asks for was judged there.
    pub role: Role,
    /// What it was judged by, where that may be old, see [`Granted::rests_on`].
    pub rests_on: Option<Revision>,
    hops: u32,
    /// Whose names for transactions are its own: `client/ann`, `node/2`, `root`.
    pub names: String,
}

/// Says for whom a request to another node is made.
pub fn set_user<T>(request: &mut Request<T>, user: &str) {
    if let Ok(value) = MetadataValue::<Ascii>::try_from(user) {
        request.metadata_mut().insert(USER, value);
    }
}

impl Caller {
    /// The caller of a request.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` where the connection carries no identity, `PERMISSION_DENIED` where no guard
    /// let the request through.
    pub fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        let granted = request.extensions().get::<Granted>();
        let role = granted.map(|granted| granted.role()).ok_or_else(|| {
            Status::permission_denied("nobody has judged whether this call may be made")
        });
        let text = |key| request.metadata().get(key).and_then(|value| value.to_str().ok());
        Ok(match require_any(request)? {
            PeerIdentity::Node(id) => Self {
                user: text(USER).map_or_else(|| format!("node {id}"), str::to_owned),
                role: role?,
                rests_on: None,
                names: format!("node/{id}"),
                hops: text(HOPS).and_then(|hops| hops.parse().ok()).unwrap_or(1),
            },
            PeerIdentity::Client(user) => {
                let rests_on = granted.and_then(|granted| granted.rests_on());
                let names = format!("client/{user}");
                Self { user, role: role?, rests_on, hops: 0, names }
            }
            PeerIdentity::LocalRoot => Self { role: role?, ..Self::local("root") },
        })
    }

    /// The same caller by what it may do now.
    ///
    /// # Errors
    /// `PERMISSION_DENIED`: nothing.
    pub fn with_role(&self, role: Option<Role>) -> Result<Self, Status> {
        let none = || Status::permission_denied(format!("`{}` may do nothing any more", self.user));
        Ok(Self { role: role.ok_or_else(none)?, ..self.clone() })
    }

    /// Somebody on this very node, such as a user of the mounted tree, who is root.
    #[must_use]
    pub fn local(user: &str) -> Self {
        Self {
            user: user.to_owned(),
            role: Role::Admin,
            rests_on: None,
            hops: 0,
            names: "root".to_owned(),
        }
    }

    /// Whether another node passed this on.
    #[must_use]
    pub fn is_forwarded(&self) -> bool {
        self.hops > 0
    }

    /// A request to another node on this caller's behalf.
    ///
    /// # Errors
    /// `ABORTED` if it was passed on too often.
    pub fn request<T>(&self, message: T) -> Result<Request<T>, Status> {
        if self.hops >= HOPS_MAX {
            return Err(Status::aborted(
                "the request was passed from node to node without reaching its owner, which keeps \
                 changing; try again",
            ));
        }
        let mut request = Request::new(message);
        set_user(&mut request, &self.user);
        if let Ok(hops) = MetadataValue::<Ascii>::try_from((self.hops + 1).to_string()) {
            request.metadata_mut().insert(HOPS, hops);
        }
        Ok(request)
    }
}

/// A channel to another node.
///
/// # Errors
/// `UNAVAILABLE` if it is not a member any more.
pub fn channel(node: &Node, to: NodeId) -> Result<Channel, Status> {
    node.cluster().peer_channel(to).map_err(|error| Status::unavailable(error.to_string()))
}

/// What is said when the cluster cannot decide.
#[must_use]
pub fn no_quorum(node: &Node) -> Status {
    let voters = node.cluster().members().iter().filter(|member| member.voter).count();
    Status::unavailable(format!(
        "no quorum: no leader among the {voters} voters answers node {}; the cluster accepts no \
         changes until a majority of them is up and connected (see `clusterctl cluster status`)",
        node.name()
    ))
}

/// Whether a forwarded call failed on the way: what the other node says has no source here.
pub(super) fn broke_on_the_way(status: &Status) -> bool {
    let wordless = status.code() == tonic::Code::Unavailable && status.message().is_empty();
    wordless || std::error::Error::source(status).is_some()
}

/// What a forwarded call's transport error means to the caller.
#[must_use]
pub fn unreachable(node: &Node, to: NodeId, status: &Status) -> Status {
    if broke_on_the_way(status) {
        return Status::unavailable(format!(
            "node {} does not answer; look at `clusterctl node list`",
            node.name_of(to)
        ));
    }
    status.clone()
}

/// Another node's answers, one by one, to their end or to where the way to it breaks.
pub(super) fn relayed<T: Send + 'static>(
    node: &Arc<Node>,
    from: NodeId,
    answers: Streaming<T>,
) -> Answers<T> {
    let node = node.clone();
    answers.map(move |answer| answer.map_err(|status| unreachable(&node, from, &status))).boxed()
}
