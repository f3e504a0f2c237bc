//! Who may do what.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::DocumentPath;
use crate::Name;
use crate::document::{Document, parse};
use crate::schema::{Described, Shape, table};

table! {
    /// What the holder of a client certificate may do; the file's name is the certificate's. While
    /// there is no such document at all, every client certificate is an administrator's; with the
    /// first one, certificates without a document may do nothing. There is always one
    /// administrator: the first document is one's, and the last one's is removed only when it is the
    /// only document. Root on a node, over the agent's local socket, may do everything. A change
    /// counts on each node as soon as the node has it, on open connections too.
    pub struct AccessDocument {
        /// `viewer` sees everything but changes nothing. `operator` also makes, changes, runs,
        /// migrates and removes VMs and images, attaches to consoles, and writes files that are not
        /// documents. `admin` may do everything.
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

/// Who has which role, by the name in the certificate. Of a document that does not hold: none.
pub type RolesByName = BTreeMap<Name, Option<Role>>;

/// The roles that documents give, of files with their contents.
#[must_use]
pub fn roles<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> RolesByName {
    let role = |text: &[u8]| {
        let text = std::str::from_utf8(text).ok()?;
        parse::<AccessDocument>(text).ok().map(|document| document.role)
    };
    let entries = files.into_iter().filter_map(|(path, text)| match DocumentPath::of(path) {
        Some(DocumentPath::Access(name)) => Some((name, role(text))),
        _ => None,
    });
    entries.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_document_gives_no_role_and_a_broken_one_none_either() {
        let given = roles([
            ("access/ann.toml", "role = \"admin\"".as_bytes()),
            ("access/bob.toml", b"role = \"king\""),
            ("access/eve.toml", b"\xff"),
            ("access/.ann.toml.swp", b"role = \"admin\""),
            ("access/README", b""),
            ("vms/ann.toml", b"role = \"admin\""),
        ]);
        let given: Vec<_> = given.iter().map(|(name, role)| (name.as_str(), *role)).collect();
        assert_eq!(given, [("ann", Some(Role::Admin)), ("bob", None), ("eve", None)]);
        assert!(Role::Viewer < Role::Operator && Role::Operator < Role::Admin);
    }
}
