//! Settings of the whole cluster.

use serde::{Deserialize, Serialize};

use crate::document::Document;
use crate::schema::{Described, Shape, table};
use crate::{ByteSize, TimeSpan};

table! {
    /// Settings of the whole cluster. They take effect at once.
    #[derive(Default)]
    pub struct ClusterDocument {
        /// How much of the documents' history is kept.
        #[serde(default)]
        history: HistorySettings, otherwise "the defaults below";
        /// How much the configuration may take.
        #[serde(default)]
        limits: LimitSettings, otherwise "the defaults below";
        /// Live migrations whose request says nothing else.
        #[serde(default)]
        migration: MigrationSettings, otherwise "the defaults below";
        /// High availability.
        #[serde(default)]
        ha: HaSettings, otherwise "the defaults below";
    }

    /// High availability.
    pub struct HaSettings {
        /// HA VMs run only on nodes with a watchdog, which resets a machine that hangs. Without one,
        /// a node that falls silent may hang with its VMs and wake again: then nothing of it starts
        /// elsewhere before a person says that it is off (`node fence`). `false`: silence is enough,
        /// and that the VM's own deadline stops it is relied on.
        #[serde(default = "yes")]
        require_watchdog: bool, default "true";
        /// How the load of nodes is counted: by their VMs, or by the larger share of CPUs and memory
        /// that their VMs are configured with (`static`).
        #[serde(default)]
        balance: BalanceBy, default "\"count\"";
        /// HA VMs move, while they run, from the most to the least loaded node when the load has been
        /// uneven for a minute: by two VMs, or by a fifth of a node (`balance = "static"`).
        #[serde(default)]
        auto_rebalance: bool, default "false";
    }

    /// How much of the documents' history is kept. A version is given up when it is older than
    /// `age` and not among the newest `versions` of its file.
    pub struct HistorySettings {
        /// Versions of each file that stay, however old they are.
        #[serde(default = "default_versions")]
        versions: u64, default "100", where "1 to 100000" => |count| (1..=100_000).contains(count);
        /// How long every version stays.
        #[serde(default = "default_age")]
        age: TimeSpan, default "\"90d\"",
            where "1min to 3650d" => |age| (60_000..=3650 * DAY_MS).contains(&age.as_ms());
    }

    /// How much the configuration may take: what would go beyond is refused, on every node alike.
    /// What is there already stays, and what makes it smaller is always taken. Each node's own
    /// limits (watches, requests of a client) are in its agent's configuration.
    pub struct LimitSettings {
        /// The largest file.
        #[serde(default = "default_largest_file")]
        largest_file: ByteSize, default "\"1MiB\"",
            where "1KiB to 1MiB" => |size| (1 << 10..=1 << 20).contains(&size.0);
        /// How many files there may be, empty folders included.
        #[serde(default = "default_files")]
        files: u64, default "100000", where "100 to 1000000" => |count| (100..=1_000_000).contains(count);
        /// All files with their paths, as they are now; their history has limits of its own.
        #[serde(default = "default_files_size")]
        files_size: ByteSize, default "\"1GiB\"",
            where "1MiB to 16GiB" => |size| (1 << 20..=16 << 30).contains(&size.0);
        /// How many records the system may hold (VMs, disks, nodes, join tokens). Only what people
        /// make more of is refused for it; nothing keeps a node from being fenced.
        #[serde(default = "default_records")]
        records: u64, default "200000",
            where "1000 to 2000000" => |count| (1_000..=2_000_000).contains(count);
        /// All of the system's records.
        #[serde(default = "default_records_size")]
        records_size: ByteSize, default "\"256MiB\"",
            where "1MiB to 4GiB" => |size| (1 << 20..=4 << 30).contains(&size.0);
    }

    /// Live migrations whose request says nothing else: those of `node drain`, of HA, and of
    /// `vm migrate` without such options.
    pub struct MigrationSettings {
        /// How long a VM may stand still at the end of its migration.
        #[serde(default = "default_downtime")]
        downtime: TimeSpan, default "\"50ms\"",
            where "1ms to 60s" => |downtime| (1..=60_000).contains(&downtime.as_ms());
        /// What each migration may send in a second.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bandwidth: Option<ByteSize>, otherwise "no limit",
            where "a multiple of 1MiB, at most 1TiB" => |limit| limit.is_none_or(|limit| {
                limit.0.is_multiple_of(1 << 20) && (1 << 20..=1 << 40).contains(&limit.0)
            });
    }
}

const DAY_MS: u64 = 86_400_000;

fn default_versions() -> u64 {
    100
}

fn default_age() -> TimeSpan {
    TimeSpan::from_ms(90 * DAY_MS)
}

fn default_downtime() -> TimeSpan {
    TimeSpan::from_ms(50)
}

impl Default for HistorySettings {
    fn default() -> Self {
        Self { versions: default_versions(), age: default_age() }
    }
}

fn default_largest_file() -> ByteSize {
    ByteSize(1 << 20)
}

fn default_files() -> u64 {
    100_000
}

fn default_files_size() -> ByteSize {
    ByteSize(1 << 30)
}

fn default_records() -> u64 {
    200_000
}

fn default_records_size() -> ByteSize {
    ByteSize(256 << 20)
}

impl Default for LimitSettings {
    fn default() -> Self {
        Self {
            largest_file: default_largest_file(),
            files: default_files(),
            files_size: default_files_size(),
            records: default_records(),
            records_size: default_records_size(),
        }
    }
}

impl Default for HaSettings {
    fn default() -> Self {
        Self { require_watchdog: true, balance: BalanceBy::default(), auto_rebalance: false }
    }
}

/// How the load of nodes is counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BalanceBy {
    /// By their VMs.
    #[default]
    Count,
    /// By what the VMs are configured with.
    Static,
}

impl Described for BalanceBy {
    const SHAPE: Shape = Shape::Words(&["count", "static"]);
}

fn yes() -> bool {
    true
}

impl Default for MigrationSettings {
    fn default() -> Self {
        Self { downtime: default_downtime(), bandwidth: None }
    }
}

impl Document for ClusterDocument {}
