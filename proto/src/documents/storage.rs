//! The storage pools.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use crate::Name;
use crate::document::{Document, Faults};
use crate::record::PoolRecord;
use crate::schema::{Described, Shape, table};

table! {
    /// The storage pools, which hold kernels, firmware and disks.
    #[derive(Default)]
    pub struct StorageDocument {
        /// Each pool, as in `[pools.fast]`.
        #[serde(default)]
        pools: BTreeMap<Name, PoolSpec>, otherwise "none",
            where "at most 1000 pools" => |pools| pools.len() <= 1000;
    }

    /// A storage pool: a folder.
    pub struct PoolSpec {
        /// `local-dir`: a folder of each node's own. `shared-dir`: one folder that all nodes mount
        /// (NFS, a cluster file system); only VMs whose files are all in such pools can move.
        kind: PoolKind, required;
        /// The folder, at the same path on every node.
        path: String, required, where "an absolute path without `..`" => |path| is_folder(path);
    }
}

/// Whether a pool's content is the same on all nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PoolKind {
    /// A folder of each node's own.
    LocalDir,
    /// One folder that all nodes mount (NFS, 9p, a cluster file system).
    SharedDir,
}

impl PoolKind {
    /// The word in the document.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::LocalDir => "local-dir",
            Self::SharedDir => "shared-dir",
        }
    }
}

impl Described for PoolKind {
    const SHAPE: Shape = Shape::Words(&["local-dir", "shared-dir"]);
}

impl StorageDocument {
    /// The pools in the form that the rest of the system reads.
    #[must_use]
    pub fn records(&self) -> Vec<PoolRecord> {
        let record = |(name, pool): (&Name, &PoolSpec)| PoolRecord {
            name: name.clone(),
            kind: pool.kind,
            path: pool.path.clone(),
        };
        self.pools.iter().map(record).collect()
    }
}

impl Document for StorageDocument {
    fn check_whole(&self, faults: &mut Faults) {
        for (name, pool) in &self.pools {
            let before = self.pools.iter().take_while(|(other, _)| *other < name);
            let same =
                |path: &str| Path::new(path).components().eq(Path::new(&pool.path).components());
            let Some((other, _)) = before.into_iter().find(|(_, other)| same(&other.path)) else {
                continue;
            };
            faults.within("pools", |faults| {
                faults.within(name, |faults| {
                    faults.within("path", |faults| {
                        faults
                            .add(format!("pool `{other}` has the same folder: give each its own"));
                    });
                });
            });
        }
    }
}

fn is_folder(path: &str) -> bool {
    let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
    let path = Path::new(path);
    path.is_absolute()
        && path.components().count() > 1
        && path.components().all(plain)
        && path.as_os_str().len() <= 4096
        && !path.to_string_lossy().chars().any(char::is_control)
}
