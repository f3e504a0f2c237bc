//! What people say about a node.

use std::collections::BTreeMap;

use crate::document::Document;
use crate::schema::table;
use crate::{ByteSize, Name};

table! {
    /// What people say about a node; the file's name is the node's. What the node says of itself,
    /// and its maintenance, is in `clusterctl node show`.
    #[derive(Default)]
    pub struct NodeDocument {
        /// Words to tell nodes apart, as in `zone = "east"`; shown by `node show`.
        #[serde(default)]
        labels: BTreeMap<Name, String>, otherwise "none",
            where "at most 64 labels of 256 bytes each" => |labels| {
                labels.len() <= 64 && labels.values().all(|value| value.len() <= 256)
            };
        /// Anything worth knowing; shown by `node show`.
        #[serde(default)]
        notes: String, default "\"\"", where "at most 4096 bytes" => |notes| notes.len() <= 4096;
        /// Memory that VMs do not get; the rest is what placement counts with. VMs that run are
        /// not touched by a change.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reserved_memory: Option<ByteSize>,
            otherwise "`reserve_memory_mib` of the node's own configuration",
            where "at most 16TiB" => |size| size.is_none_or(|size| size.0 <= 1 << 44);
    }
}

impl Document for NodeDocument {}
