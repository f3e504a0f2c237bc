//! Which history a key belongs to, and under which folders its changes are found.

use proto::keys;
use serde::{Deserialize, Serialize};

/// Folders of one file that the Journal has rows for, the topmost ones. Changes under a deeper
/// folder are found in the deepest of these; without a limit a long path would be one row per slash.
const FOLDERS_MAX: usize = 5;
/// The system's records.
const STATUS: &str = "status/";

/// Keys whose history is kept by one rule. The system's churn does not push out people's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Lane {
    /// What people write.
    Files,
    /// What the system writes: `status/`.
    Status,
    /// Secrets: `priv/`.
    Private,
}

impl Lane {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Files, Self::Status, Self::Private];

    /// A key's.
    pub(crate) fn of(key: &str) -> Self {
        if key.starts_with(STATUS) {
            Self::Status
        } else if key.starts_with(keys::PRIV) {
            Self::Private
        } else {
            Self::Files
        }
    }

    /// The folder that has all of its changes.
    pub(crate) fn folder(self) -> &'static str {
        match self {
            Self::Files => "",
            Self::Status => STATUS,
            Self::Private => keys::PRIV,
        }
    }
}

/// The folders whose part of the Journal a key's changes are in, the topmost first.
pub(crate) fn folders(key: &str) -> impl Iterator<Item = &str> {
    let lane = Lane::of(key);
    let below = if lane == Lane::Files { FOLDERS_MAX - 1 } else { 0 };
    let inner = key.match_indices('/').map(|(at, _)| &key[..=at]).take(below);
    std::iter::once(lane.folder()).chain(inner)
}

/// The folders that together have all changes of keys with a prefix, without those of `priv/`, and
/// each one's lane.
pub(crate) fn folders_of_prefix(prefix: &str) -> Vec<(Lane, &str)> {
    let mut found = Vec::new();
    match Lane::of(prefix) {
        Lane::Files => {
            found.push((Lane::Files, folders(prefix).last().unwrap_or_default()));
            if STATUS.starts_with(prefix) {
                found.push((Lane::Status, STATUS));
            }
        }
        Lane::Status => found.push((Lane::Status, STATUS)),
        Lane::Private => {}
    }
    found
}
