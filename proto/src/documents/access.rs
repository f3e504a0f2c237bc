//! Who may do what.

use serde::{Deserialize, Serialize};

use crate::document::Document;
use crate::schema::{Described, Shape, table};

table! {
    /// Not supported yet: writing such a document is refused. What the holder of a client
    /// certificate may do; the file's name is the certificate's. While
    /// there is no such document at all, every client certificate is an administrator's; with the
    /// first one, certificates without a document may do nothing. There is always one
    /// administrator; root on a node, over the agent's local socket, may do everything.
    pub struct AccessDocument {
        /// `viewer` sees everything but changes nothing. `operator` also makes, changes, runs and
        /// removes VMs and images, and writes files that are not documents. `admin` may do
        /// everything.
        role: Role, required;
    }
}

impl Document for AccessDocument {}

/// What somebody may do; each may do what the one before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// See.
    Viewer,
    /// Work with VMs and images.
    Operator,
    /// Everything.
    Admin,
}

impl Role {
    /// The word in the document.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

impl Described for Role {
    const SHAPE: Shape = Shape::Words(&["viewer", "operator", "admin"]);
}
