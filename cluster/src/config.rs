//! What a cluster member is told when it opens: where its data is, how others reach it, timings.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::host::{Host, ThisHost};

/// Settings of one member. Addresses are the advertised ones, as other nodes dial them.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// Folder of this node alone: key, certificate, database, snapshots. Made with mode 0700.
    pub data_dir: PathBuf,
    /// `host:port` of the mTLS gRPC listener.
    pub api_address: String,
    /// `host:port` of the enrolment listener (server-authenticated TLS).
    pub enrol_address: String,
    /// What fails together with this node (a rack, a room): voters are spread over zones. Empty:
    /// nothing else.
    pub zone: String,
    /// This node is here to vote: it gets a vote before others, and leads only where nobody else
    /// can.
    pub witness: bool,
    /// A voter that the leader has not heard for so long gives its vote to a learner.
    pub voter_patience: Duration,
    /// While this node leads, nobody gets a vote beyond so many; never more than seven vote.
    pub voters_max: usize,
    /// Raft's timings.
    pub timings: RaftTimings,
    /// How long a read or write may look for a quorum before it is refused.
    pub request_timeout: Duration,
    /// Below this much free space under `data_dir` the node takes no log entries, bytes.
    pub min_free_bytes: u64,
    /// How much history stays readable.
    pub retention: Retention,
    /// How often the leader has all members' copies compared.
    pub verify_every: Duration,
    /// How much there may be of everything.
    pub limits: Limits,
    /// How long certificates last.
    pub certificates: CertificateLives,
    /// A snapshot is made after so many log entries,
    pub snapshot_every: u64,
    /// once they are so many bytes: the state is written out, and the log cut off.
    pub snapshot_bytes: u64,
    /// Log entries kept behind a snapshot for followers that lag a little.
    pub snapshot_keep: u64,
    /// The machine under this member.
    pub host: Arc<dyn Host>,
}

impl ClusterConfig {
    /// Settings with the defaults of a LAN.
    #[must_use]
    pub fn new(data_dir: PathBuf, api_address: String, enrol_address: String) -> Self {
        Self {
            data_dir,
            api_address,
            enrol_address,
            zone: String::new(),
            witness: false,
            voter_patience: Duration::from_secs(30),
            voters_max: crate::voters::VOTERS_MAX,
            timings: RaftTimings::default(),
            request_timeout: Duration::from_secs(5),
            min_free_bytes: 32 << 20,
            retention: Retention::default(),
            verify_every: Duration::from_secs(3600),
            limits: Limits::default(),
            certificates: CertificateLives::default(),
            snapshot_every: 20_000,
            snapshot_bytes: 16 << 20,
            snapshot_keep: 5_000,
            host: Arc::new(ThisHost),
        }
    }
}

/// How much history is kept, where `cluster.toml` does not say; the leader's settings count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// Versions of each of people's files that stay, however old they are. Of a file that was
    /// deleted nothing stays longer than `file_age`.
    pub file_versions: u64,
    /// How long every version of people's files stays.
    pub file_age: Duration,
    /// Revisions of the store for which the changes of the system's own records (`status/`,
    /// `priv/`) stay: enough for a watch to go on where it was interrupted.
    pub system_revisions: u64,
    /// With more than this in versions of people's files, older ones go before `file_age`, bytes.
    pub file_history_bytes: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            file_versions: 100,
            file_age: Duration::from_secs(90 * 24 * 3600),
            system_revisions: 10_000,
            file_history_bytes: 2 << 30,
        }
    }
}

/// How much there may be of everything. For the data this holds where `cluster.toml` does not say,
/// and the leader's settings count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// People's files (their present content and paths), bytes.
    pub file_bytes: u64,
    /// Their number.
    pub files: u64,
    /// The largest one, bytes; never more than 1 MiB.
    pub largest_file_bytes: u64,
    /// The system's records, bytes. Only what people make more of is refused for it (new VMs, join
    /// tokens): nothing keeps a node from being fenced.
    pub record_bytes: u64,
    /// Their number.
    pub records: u64,
    /// Watches of clients on this node.
    pub client_watches: usize,
    /// Requests of one client in a second; twice as many at once after a pause. 0: no limit.
    pub client_requests_per_s: u32,
    /// After this time without a change a client's watch is told how far it has come.
    pub watch_progress: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            file_bytes: 1 << 30,
            files: 100_000,
            largest_file_bytes: 1 << 20,
            record_bytes: 256 << 20,
            records: 200_000,
            client_watches: 2_000,
            client_requests_per_s: 500,
            watch_progress: Duration::from_secs(10),
        }
    }
}

/// How long certificates last. The settings of the node that signs count: the leader's for nodes
/// that renew theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CertificateLives {
    /// A node's. It gets the next one after two thirds of this, so a node may be off for a third.
    pub node: Duration,
    /// A client's.
    pub client: Duration,
    /// So long after its end a certificate is still listed, and until each node has got its own since;
    /// one that was revoked for ever.
    pub memory: Duration,
}

impl Default for CertificateLives {
    fn default() -> Self {
        let day = Duration::from_secs(24 * 3600);
        Self { node: 365 * day, client: 365 * day, memory: 30 * day }
    }
}

/// Raft's timings, in milliseconds. The defaults held on a LAN with fsync at every commit; slow
/// machines (an emulated lab) want more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RaftTimings {
    /// Between two heartbeats of the leader.
    pub heartbeat_ms: u64,
    /// A follower that hears nothing for a time between these two starts an election.
    pub election_min_ms: u64,
    /// Upper end of that time.
    pub election_max_ms: u64,
}

impl RaftTimings {
    /// How long a member may be silent before it does not count as reachable.
    pub(crate) fn silence_limit(&self) -> Duration {
        Duration::from_millis(self.election_max_ms.saturating_mul(2))
    }
}

impl Default for RaftTimings {
    fn default() -> Self {
        Self { heartbeat_ms: 200, election_min_ms: 500, election_max_ms: 1000 }
    }
}
