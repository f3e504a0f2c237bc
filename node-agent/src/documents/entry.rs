//! One table of a document that holds several (`storage.toml`, `networks.toml`): added or removed
//! with everything else in the document kept as people wrote it.

use std::sync::Arc;

use cluster::{Consistency, FileChange};
use proto::{Name, Revision};
use toml_edit::{DocumentMut, Item, Table, value};
use tonic::Status;

use super::{Refusal, Wanted, commit};
use crate::api::forward::Caller;
use crate::node::Node;

/// How often an entry is tried again when others write the same document.
const TRIES: usize = 8;

/// Where an entry is.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// The document's path.
    pub document: &'a str,
    /// The table of tables.
    pub section: &'a str,
    /// What one entry is called in front of people.
    pub noun: &'a str,
    /// The entry's name.
    pub name: &'a Name,
}

/// What becomes of an entry.
enum Change<'a> {
    Add(&'a [(&'a str, &'a str)]),
    Remove,
}

impl Entry<'_> {
    /// Adds it, with these keys and texts.
    ///
    /// # Errors
    /// `ALREADY_EXISTS`, or the document's refusal.
    pub async fn add(
        self,
        node: &Arc<Node>,
        caller: &Caller,
        fields: &[(&str, &str)],
        wanted: &Wanted,
    ) -> Result<(), Status> {
        self.change(node, caller, &Change::Add(fields), wanted).await
    }

    /// Removes it.
    ///
    /// # Errors
    /// `NOT_FOUND`, or the document's refusal.
    pub async fn remove(self, node: &Arc<Node>, caller: &Caller) -> Result<(), Status> {
        self.change(node, caller, &Change::Remove, &Wanted::default()).await
    }

    async fn change(
        self,
        node: &Arc<Node>,
        caller: &Caller,
        change: &Change<'_>,
        wanted: &Wanted,
    ) -> Result<(), Status> {
        for _ in 0..TRIES {
            let present = node.store.text(self.document, Consistency::Linearizable).await?;
            let (text, revision) =
                present.map_or((String::new(), Revision(0)), |file| (file.value, file.revision));
            let text = self.edit(&text, change)?;
            let file = FileChange::write(self.document, text).if_revision(revision);
            match commit(node, caller, &[file], wanted).await? {
                Ok(_) => return Ok(()),
                Err(refusals) if refusals.iter().any(|refusal| refusal.present.is_some()) => {}
                Err(refusals) => {
                    let first = refusals.first().map(Refusal::status);
                    return Err(first.unwrap_or_else(|| Status::internal("refused")));
                }
            }
        }
        Err(Status::aborted(format!("others keep changing {}; try again", self.document)))
    }

    /// The document's text with the entry added or removed.
    fn edit(self, text: &str, change: &Change<'_>) -> Result<String, Status> {
        let Self { document: path, section, noun, name } = self;
        let mut document: DocumentMut = text.parse().map_err(|error: toml_edit::TomlError| {
            Status::failed_precondition(format!("{path} cannot be read: {}", error.message()))
        })?;
        let entries = document.entry(section).or_insert_with(|| {
            let mut table = Table::new();
            table.set_implicit(true);
            Item::Table(table)
        });
        let entries = entries.as_table_like_mut().ok_or_else(|| {
            Status::failed_precondition(format!("`{section}` in {path} is not a table"))
        })?;
        match change {
            Change::Add(_) if entries.contains_key(name.as_str()) => {
                return Err(Status::already_exists(format!("{noun} `{name}` already exists")));
            }
            Change::Add(fields) => {
                let mut table = Table::new();
                for (key, text) in fields.iter().filter(|(_, text)| !text.is_empty()) {
                    table.insert(key, value(*text));
                }
                entries.insert(name.as_str(), Item::Table(table));
            }
            Change::Remove => {
                entries.remove(name.as_str()).ok_or_else(|| {
                    Status::not_found(format!("no {noun} `{name}` in this cluster"))
                })?;
            }
        }
        Ok(document.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_comes_and_goes_and_the_rest_stays() {
        let name = "lan".parse().unwrap();
        let entry =
            Entry { document: "networks.toml", section: "networks", noun: "network", name: &name };
        let before = "# ours\n[networks.wan] # the other\nbridge = \"br1\"\n";
        let fields = [("bridge", "br0"), ("uplink", "")];
        let with = entry.edit(before, &Change::Add(&fields)).unwrap();
        assert!(with.starts_with(before), "{with}");
        assert!(with.contains("[networks.lan]\nbridge = \"br0\"\n"), "{with}");
        assert!(!with.contains("uplink"), "{with}");
        let twice = entry.edit(&with, &Change::Add(&fields)).unwrap_err();
        assert_eq!(twice.code(), tonic::Code::AlreadyExists);
        let without = entry.edit(&with, &Change::Remove).unwrap();
        assert_eq!(without.trim(), before.trim());
        let gone = entry.edit(&without, &Change::Remove).unwrap_err();
        assert_eq!(gone.code(), tonic::Code::NotFound);
        let new = entry.edit("", &Change::Add(&fields)).unwrap();
        assert_eq!(new, "[networks.lan]\nbridge = \"br0\"\n");
        assert!(entry.edit("networks = 3", &Change::Add(&fields)).is_err());
        assert!(entry.edit("x = [", &Change::Add(&fields)).is_err());
    }
}
