//! The documents that people write, one type each, and which path is which.

mod access;
mod cluster;
mod networks;
mod node;
mod path;
mod storage;
mod vm;

pub use access::{AccessDocument, Role, RolesByName, roles};
pub use cluster::{
    BalanceBy, ClusterDocument, HaSettings, HistorySettings, LimitSettings, MigrationSettings,
};
pub use networks::{NetworkSpec, NetworksDocument};
pub use node::NodeDocument;
pub use path::{DocumentPath, PATH_MAX, PathKind, PathRefused, SEGMENT_MAX, classify};
pub use storage::{PoolKind, PoolSpec, StorageDocument};
pub use vm::{
    BootSpec, CMDLINE_MAX, CPUS_MAX, CpuModel, DiskSpec, HaSpec, InvalidImage, MEMORY_MIN, NicSpec,
    ValidatedVmSpec, VmSpec, parse_image, parse_mac,
};

use crate::document::{DocumentError, parse};
use crate::schema::{Described as _, Shape};

/// A type of document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DocumentKind {
    /// A virtual machine.
    Vm,
    /// What people say about a node.
    Node,
    /// The storage pools.
    Storage,
    /// The networks.
    Networks,
    /// The cluster's settings.
    Cluster,
    /// Who may do what.
    Access,
}

impl DocumentKind {
    /// All of them, in the order that people learn them in.
    pub const ALL: [Self; 6] =
        [Self::Vm, Self::Storage, Self::Networks, Self::Node, Self::Cluster, Self::Access];

    /// The word it is explained under.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Vm => "vm",
            Self::Node => "node",
            Self::Storage => "storage",
            Self::Networks => "networks",
            Self::Cluster => "cluster",
            Self::Access => "access",
        }
    }

    /// Which files are of this type.
    #[must_use]
    pub fn pattern(self) -> &'static str {
        match self {
            Self::Vm => "vms/NAME.toml",
            Self::Node => "nodes/NAME.toml",
            Self::Storage => "storage.toml",
            Self::Networks => "networks.toml",
            Self::Cluster => "cluster.toml",
            Self::Access => "access/NAME.toml",
        }
    }

    /// The type by its word, in the singular or the plural.
    #[must_use]
    pub fn by_word(word: &str) -> Option<Self> {
        let plain = word.trim_end_matches('s');
        Self::ALL.into_iter().find(|kind| kind.word().trim_end_matches('s') == plain)
    }

    /// What its documents look like.
    #[must_use]
    pub fn shape(self) -> &'static Shape {
        match self {
            Self::Vm => &VmSpec::SHAPE,
            Self::Node => &NodeDocument::SHAPE,
            Self::Storage => &StorageDocument::SHAPE,
            Self::Networks => &NetworksDocument::SHAPE,
            Self::Cluster => &ClusterDocument::SHAPE,
            Self::Access => &AccessDocument::SHAPE,
        }
    }
}

/// A document of any type, checked by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AnyDocument {
    /// `vms/NAME.toml`
    Vm(ValidatedVmSpec),
    /// `nodes/NAME.toml`
    Node(NodeDocument),
    /// `storage.toml`
    Storage(StorageDocument),
    /// `networks.toml`
    Networks(NetworksDocument),
    /// `cluster.toml`
    Cluster(ClusterDocument),
    /// `access/NAME.toml`
    Access(AccessDocument),
}

impl AnyDocument {
    /// Reads and checks a document of a type.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn parse(kind: DocumentKind, text: &str) -> Result<Self, DocumentError> {
        Ok(match kind {
            DocumentKind::Vm => Self::Vm(VmSpec::parse(text)?),
            DocumentKind::Node => Self::Node(parse(text)?),
            DocumentKind::Storage => Self::Storage(parse(text)?),
            DocumentKind::Networks => Self::Networks(parse(text)?),
            DocumentKind::Cluster => Self::Cluster(parse(text)?),
            DocumentKind::Access => Self::Access(parse(text)?),
        })
    }
}
