//! The wire: gRPC services and the plain types that every crate shares.
//!
//! [`v1`] is generated from `proto/holdfast/v1/*.proto`. The rest are the types whose rules are
//! checked when they are made: ids, revisions, generations, VM documents, the records that the
//! system keeps in the replicated configuration, the keys they live under, and the format of
//! backups.
//!
//! Architecture invariant: no I/O, no clock, no async of its own.

pub mod backup;
pub mod document;
pub mod documents;
mod ids;
pub mod keys;
pub mod methods;
pub mod record;
pub mod schema;
mod size;
mod time_span;

pub use document::DocumentError;
pub use documents::{
    BootSpec, CMDLINE_MAX, CPUS_MAX, CpuModel, DiskSpec, HaSpec, InvalidImage, MEMORY_MIN, NicSpec,
    ValidatedVmSpec, VmSpec, parse_image, parse_mac,
};
pub use ids::{Generation, InvalidName, Name, NodeId, Revision, VmId};
pub use size::{ByteSize, InvalidSize, VM_OVERHEAD_BYTES, vm_needs_bytes};
pub use time_span::{InvalidTimeSpan, TimeSpan};

/// Generated messages, clients and servers of the package `holdfast.v1`.
#[allow(clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("holdfast.v1");
}
