//! Changes of people's files: what everything that writes documents says, and what it hears when
//! it is refused. The agent implements [`FileWriter`] (it knows the documents' schemas); the
//! mounted tree, the API and the commands use it.

use async_trait::async_trait;
use proto::Revision;

/// One file to write or to remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileChange {
    /// The store's key: a path without a leading slash. An empty folder is its path with a slash
    /// at the end and empty content.
    pub path: String,
    /// What must be there now. `None`: whatever is there; `Some(Revision(0))`: nothing.
    pub expected: Option<Revision>,
    /// What to write. `None`: remove it.
    pub content: Option<Vec<u8>>,
}

impl FileChange {
    /// Writes a file, whatever is there.
    #[must_use]
    pub fn write(path: impl Into<String>, content: impl Into<Vec<u8>>) -> Self {
        Self { path: path.into(), expected: None, content: Some(content.into()) }
    }
    /// Removes a file, whatever is there.
    #[must_use]
    pub fn remove(path: impl Into<String>) -> Self {
        Self { path: path.into(), expected: None, content: None }
    }
    /// Only if the file's last change is this revision (0: absent).
    #[must_use]
    pub fn if_revision(mut self, expected: Revision) -> Self {
        self.expected = Some(expected);
        self
    }
}

/// Commits changes of people's files.
#[async_trait]
pub trait FileWriter: Send + Sync + 'static {
    /// Commits all the changes, or none of them. `author` is shown in the history. The answer is
    /// the revision of the commit.
    ///
    /// # Errors
    /// [`FileRefused`]; only after [`FileRefused::Unknown`] may the changes be there all the same.
    async fn commit(&self, changes: Vec<FileChange>, author: &str)
    -> Result<Revision, FileRefused>;
}

/// Why changes were not committed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileRefused {
    /// A document breaks its schema, or does not go with the others.
    #[error("{path}{}: {reason}", position(*line, *column))]
    Invalid {
        /// The document.
        path: String,
        /// What is wrong, and what to do.
        reason: String,
        /// Line, from 1, where one is to blame.
        line: Option<u32>,
        /// Column, from 1.
        column: Option<u32>,
    },
    /// A file is not what was expected.
    #[error("{path} was changed in the meantime ({}); look at it again, then repeat the change", described(*present))]
    Conflict {
        /// The file.
        path: String,
        /// Its last change; 0: it is absent.
        present: Revision,
    },
    /// The author may not do this.
    #[error("denied: {0}")]
    Denied(String),
    /// A file, or all of the changes together, are larger than the store takes.
    #[error("too large: {0}")]
    TooLarge(String),
    /// The data, or the disk it is on, is full; nothing was written.
    #[error("no space: {0}")]
    Full(String),
    /// No majority of the voters is reachable; nothing was written.
    #[error("no quorum: {0}")]
    NoQuorum(String),
    /// Whether the changes were committed is not known; look before repeating them.
    #[error("the outcome is unknown: {0}")]
    Unknown(String),
    /// The store takes nothing at present (it is shutting down, others changed
    /// the same files again and again); nothing was written.
    #[error("the store is busy: {0}")]
    Busy(String),
}

fn position(line: Option<u32>, column: Option<u32>) -> String {
    match (line, column) {
        (Some(line), Some(column)) => format!(", line {line}, column {column}"),
        (Some(line), None) => format!(", line {line}"),
        (None, _) => String::new(),
    }
}

fn described(present: Revision) -> String {
    if present.0 == 0 { "it is gone".to_owned() } else { format!("revision {}", present.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_where_and_why() {
        let refused = |line, column| FileRefused::Invalid {
            path: "vms/web.toml".to_owned(),
            reason: "`cpus` is missing".to_owned(),
            line,
            column,
        };
        let shown = [
            (refused(Some(3), Some(7)), "vms/web.toml, line 3, column 7: `cpus` is missing"),
            (refused(Some(3), None), "vms/web.toml, line 3: `cpus` is missing"),
            (refused(None, None), "vms/web.toml: `cpus` is missing"),
            (
                FileRefused::Conflict { path: "a".to_owned(), present: Revision(9) },
                "a was changed in the meantime (revision 9); look at it again, then repeat the change",
            ),
            (
                FileRefused::Conflict { path: "a".to_owned(), present: Revision(0) },
                "a was changed in the meantime (it is gone); look at it again, then repeat the change",
            ),
        ];
        for (refused, expected) in shown {
            assert_eq!(refused.to_string(), expected);
        }
    }
}
