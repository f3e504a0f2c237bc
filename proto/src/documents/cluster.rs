//! Settings of the whole cluster.

use crate::document::Document;
use crate::schema::table;
use crate::{ByteSize, TimeSpan};

table! {
    /// Settings of the whole cluster. They take effect at once.
    #[derive(Default)]
    pub struct ClusterDocument {
        /// How much of the documents' history is kept.
        #[serde(default)]
        history: HistorySettings, otherwise "the defaults below";
        /// Live migrations whose request says nothing else.
        #[serde(default)]
        migration: MigrationSettings, otherwise "the defaults below";
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

impl Default for MigrationSettings {
    fn default() -> Self {
        Self { downtime: default_downtime(), bandwidth: None }
    }
}

impl Document for ClusterDocument {}
