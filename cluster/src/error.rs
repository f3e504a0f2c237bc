//! Why an operation on the replicated configuration did not happen: one enum per operation.

use std::path::PathBuf;
use std::time::Duration;

use proto::{NodeId, Revision};

/// A read or a transaction that was not answered.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// Nothing was written: no leader could be reached or confirmed in time.
    #[error(
        "no quorum: {why}; the cluster accepts no changes until a majority of its voters is up and connected (see `clusterctl cluster status`)"
    )]
    NoQuorum {
        /// What was tried last.
        why: String,
    },
    /// The transaction may or may not have been written. Ask again with the same client and
    /// sequence to learn which.
    #[error("the outcome is unknown: {why}; look whether it was done before you repeat it")]
    UnknownOutcome {
        /// What was tried last.
        why: String,
    },
    /// The transaction was repeated so late that its answer is forgotten; whether it was applied
    /// can be told only by reading.
    #[error(
        "transaction {sequence} of client `{client}` is older than the answers that are kept; read the keys to learn whether it was applied"
    )]
    Forgotten {
        /// Who asked.
        client: String,
        /// Which transaction.
        sequence: u64,
    },
    /// The request breaks a rule of the store and was not proposed.
    #[error("invalid request: {0}")]
    Invalid(String),
    /// A value, or the whole transaction, is larger than allowed.
    #[error("too large: {0}")]
    TooLarge(String),
    /// The data is as large as it may be.
    #[error(
        "no space: {what} would be over their limit of {limit_bytes} bytes and {limit_keys} keys ({used_bytes} and {used_keys} are used), nothing was written; delete what is not needed (deletes are always taken), or raise the limit: see `clusterctl config explain cluster.limits`"
    )]
    NoSpace {
        /// `the files` or `the system's records`.
        what: &'static str,
        /// In use.
        used_bytes: u64,
        /// In use.
        used_keys: u64,
        /// Allowed.
        limit_bytes: u64,
        /// Allowed.
        limit_keys: u64,
    },
    /// A client asks too often.
    #[error(
        "`{client}` asks more often than {per_s} times a second; nothing was done: wait a moment, then ask again, or raise `client_requests_per_s` under [limits] of the agent's configuration"
    )]
    TooOften {
        /// Who.
        client: String,
        /// How often it may ask.
        per_s: u32,
    },
    /// Nothing was written: what the request was let through by has changed since, see
    /// [`Txn::resting_on`](crate::Txn::resting_on).
    #[error(
        "who may do what was changed meanwhile, and nothing was written; repeat the request to have it judged anew"
    )]
    Overtaken,
    /// This node does as much of it as it can.
    #[error("this node is busy: {0}")]
    Busy(String),
    /// A key under `priv/`.
    #[error("`{0}` is private to the cluster's agents and can be neither read nor written here")]
    Private(String),
    /// The disk under the data folder is (nearly) full.
    #[error("the disk under {} is full ({free_bytes} bytes free): nothing was written; free some space, the node goes on by itself", path.display())]
    DiskFull {
        /// The data folder.
        path: PathBuf,
        /// What is left.
        free_bytes: u64,
    },
    /// The machine lost power, and this node has not caught up with a quorum since: it could
    /// answer with less than it once answered.
    #[error(
        "this node restarted after a power loss and has not caught up with a quorum yet; ask another node, or again when a majority is up"
    )]
    Recovering,
    /// The local database failed; the node takes no part any more.
    #[error(
        "this node's database failed: {why}; see the agent's log, repair the cause and restart the agent"
    )]
    Failed {
        /// The cause.
        why: String,
    },
    /// This node was removed from the cluster.
    #[error(
        "this node was removed from the cluster; to use it again, empty its data folder and join anew"
    )]
    Removed,
    /// The cluster object was shut down.
    #[error("the agent is shutting down")]
    Shutdown,
}

/// The first revision that was asked for is no longer kept.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "revision {asked} is compacted: the history begins at {oldest}; read the present state, and watch from its revision + 1"
)]
pub struct Compacted {
    /// First revision wanted.
    pub asked: Revision,
    /// First revision that is kept.
    pub oldest: Revision,
}

/// A read of the past that was not answered.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadAtError {
    /// That long ago is not kept.
    #[error(transparent)]
    Compacted(#[from] Compacted),
    /// The store has not come that far.
    #[error("revision {asked} does not exist yet: the store is at {present}")]
    Future {
        /// What was asked for.
        asked: Revision,
        /// The store's revision.
        present: Revision,
    },
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a watch ended, or could not begin.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WatchError {
    /// History was compacted past the watch's position.
    #[error(transparent)]
    Compacted(#[from] Compacted),
    /// This node has as many clients' watches as it takes.
    #[error(
        "this node has {limit} watches of clients, as many as it takes; end some, ask another node, or raise `client_watches` under [limits] of its agent's configuration"
    )]
    TooMany {
        /// How many it takes.
        limit: usize,
    },
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why leadership could not be confirmed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum NotLeader {
    /// Another node leads, or none is known to.
    #[error("this node is not the leader{}", leader.map(|id| format!("; node {id} is")).unwrap_or_default())]
    Elsewhere {
        /// Who leads, as far as is known.
        leader: Option<NodeId>,
    },
    /// A quorum did not answer in time.
    #[error("this node could not confirm its leadership with a quorum: {0}")]
    Unconfirmed(String),
}

/// Why a data folder was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process holds the folder.
    #[error("{} is in use by another node-agent{}; each agent needs a data folder of its own", path.display(), holder.map(|pid| format!(" (process {pid})")).unwrap_or_default())]
    InUse {
        /// The data folder.
        path: PathBuf,
        /// Who holds it, where that is known.
        holder: Option<u32>,
    },
    /// The database cannot be read.
    #[error("the database in {} is damaged ({detail}); this node's copy cannot be trusted: remove the node from the cluster, empty the folder and join again", path.display())]
    Corrupt {
        /// The data folder.
        path: PathBuf,
        /// What RocksDB or a checksum says.
        detail: String,
    },
    /// No room for the database.
    #[error("the disk under {} is full ({detail}); free some space and start the agent again", path.display())]
    DiskFull {
        /// The data folder.
        path: PathBuf,
        /// What the system said.
        detail: String,
    },
    /// The node was taken out of its cluster.
    #[error(
        "this node was removed from its cluster; to use it again, empty {} and join anew",
        path.display()
    )]
    Removed {
        /// The data folder.
        path: PathBuf,
    },
    /// Files that belong together are not all there, or written by a newer version.
    #[error("{}: {detail}", path.display())]
    Unusable {
        /// The data folder.
        path: PathBuf,
        /// What is wrong and what to do.
        detail: String,
    },
    /// The system refused.
    #[error("cannot use {}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// Raft could not start.
    #[error("Raft could not start: {0}")]
    Raft(String),
}

/// Why a cluster was not made.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// A name that is not a DNS label.
    #[error(transparent)]
    Name(#[from] proto::InvalidName),
    /// Keys or certificates could not be made.
    #[error("cannot make the cluster's identity: {0}")]
    Identity(String),
    /// The data folder.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The first records could not be written.
    #[error("cannot write the first records: {0}")]
    Store(#[from] StoreError),
}

/// Why a node did not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// A name that is not a DNS label.
    #[error(transparent)]
    Name(#[from] proto::InvalidName),
    /// Not a token at all.
    #[error(
        "this is not a join token: {0}; make one with `clusterctl cluster token create` on a member"
    )]
    Malformed(String),
    /// A member refused; the message is its own.
    #[error("the cluster refused: {0}")]
    Refused(String),
    /// No member could be reached.
    #[error("no member of the cluster could be reached: {}; check the addresses, and that port is open", .0.join("; "))]
    Unreachable(Vec<String>),
    /// The server is not of the cluster that made the token.
    #[error(
        "{address} does not belong to the cluster that made this token, or the cluster's CA was replaced since (it has another fingerprint); nothing was sent to it. Where it is the right cluster, make a new token with `clusterctl cluster token create`"
    )]
    WrongCluster {
        /// Who answered.
        address: String,
    },
    /// Keys or certificates could not be made or stored.
    #[error("cannot make this node's identity: {0}")]
    Identity(String),
    /// The data folder.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// Why a membership operation (token, removal, client certificate) was refused.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    /// No such node.
    #[error("no node `{0}` in this cluster")]
    UnknownNode(String),
    /// The cluster would stop.
    #[error(
        "removing node {node} would leave {left} of {voters} voters reachable, too few for a quorum; bring other nodes back first"
    )]
    QuorumAtRisk {
        /// Who was to go.
        node: NodeId,
        /// Reachable voters that would be left.
        left: usize,
        /// Voters that would be left.
        voters: usize,
    },
    /// The last one.
    #[error(
        "node {0} is the only member; to end the cluster stop the agent and empty its data folder"
    )]
    LastNode(NodeId),
    /// They would be nobody's.
    #[error(
        "node `{node}` still owns VMs: {}; move them away with `clusterctl node drain {node}`, or delete them, first",
        vms.join(", ")
    )]
    OwnsVms {
        /// Who was to go.
        node: String,
        /// Some of them.
        vms: Vec<String>,
    },
    /// A node was asked to remove itself: it could not see the removal through.
    #[error(
        "node {0} cannot remove itself: once it is no member it cannot finish the removal; ask another node for it"
    )]
    Itself(NodeId),
    /// No such certificate.
    #[error(
        "no certificate is of a client `{0}` or has this serial number; see `clusterctl cluster cert list`"
    )]
    UnknownCertificate(String),
    /// The cluster would have no administrator who can come in.
    #[error(
        "`{0}` would be without a certificate, and no other administrator (access/NAME.toml) has one: give somebody else who has a certificate the role first (`clusterctl config set access/NAME role=admin`), or, on a node as root, make `{0}` another certificate (`clusterctl context create-admin NAME --client-name {0}`) and revoke the old one by its serial number"
    )]
    LastAdministrator(String),
    /// Nobody would be let in any more who may do what an administrator may.
    #[error(
        "no administrator (access/NAME.toml) has a certificate of the CA that stays, and nobody could administer but root on a node: {names} first has to get one, by `clusterctl context renew` where the context is or, on a node as root, by `clusterctl context create-admin NAME --client-name {first}`; or go on without, with --force",
        names = .0.join(", "),
        first = .0.first().map_or("NAME", String::as_str)
    )]
    NoAdministratorLeft(Vec<String>),
    /// A node goes on with the certificate that it has.
    #[error("the node did not get a new certificate: {0}; it goes on with the one that it has")]
    NotRenewed(String),
    /// The node that was asked has no use of the CA's key.
    #[error("node `{node}` cannot sign certificates: {why}")]
    CannotSign {
        /// Who was asked.
        node: String,
        /// Why, and what helps.
        why: String,
    },
    /// The request breaks a rule.
    #[error("{0}")]
    Invalid(String),
    /// The cluster did not take the change within this time.
    #[error(
        "the change was not confirmed within {0:?}; look at `clusterctl cluster status` before trying again"
    )]
    Timeout(Duration),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}
