//! The replicated configuration as typed things: documents, placements, node, pool and network
//! records. One thin layer over [`cluster::Cluster`], so that nobody else spells keys or JSON.
//!
//! Never: caches (the [`Board`] is a view kept by a watch, and says so), decides.

mod board;
mod documents;
mod error;
mod records;

pub use board::{Board, BoardView};
pub use error::{RecordError, UpdateError, store_status};
pub(crate) use records::json;
pub use records::{Store, Versioned, giving_to};
