//! Which paths people may write, and which of them are documents with a schema.

use super::DocumentKind;
use crate::{Name, keys};

/// Longest path, bytes.
pub const PATH_MAX: usize = 1024;
/// Longest name between two slashes, bytes (Linux' `NAME_MAX`).
pub const SEGMENT_MAX: usize = 255;

/// A path that has a schema.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum DocumentPath {
    /// `vms/NAME.toml`
    Vm(Name),
    /// `nodes/NAME.toml`
    Node(Name),
    /// `storage.toml`
    Storage,
    /// `networks.toml`
    Networks,
    /// `cluster.toml`
    Cluster,
    /// `access/NAME.toml`
    Access(Name),
}

impl DocumentPath {
    /// The document at a path, if a document is what belongs there.
    #[must_use]
    pub fn of(path: &str) -> Option<Self> {
        match classify(path) {
            Ok(PathKind::Document(document)) => Some(document),
            Ok(PathKind::Plain | PathKind::Folder) | Err(_) => None,
        }
    }

    /// Its type.
    #[must_use]
    pub fn kind(&self) -> DocumentKind {
        match self {
            Self::Vm(_) => DocumentKind::Vm,
            Self::Node(_) => DocumentKind::Node,
            Self::Storage => DocumentKind::Storage,
            Self::Networks => DocumentKind::Networks,
            Self::Cluster => DocumentKind::Cluster,
            Self::Access(_) => DocumentKind::Access,
        }
    }
}

/// What a path that people may write is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathKind {
    /// A document: its content must fit its schema.
    Document(DocumentPath),
    /// Any other file: any content.
    Plain,
    /// An empty folder: a path that ends with a slash; its content is empty.
    Folder,
}

/// Why a path is not to be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PathRefused {
    /// No path at all.
    #[error("{0}")]
    Invalid(String),
    /// It is not people's.
    #[error("{0}")]
    Denied(String),
}

/// Folders of the layout: no file may have their name.
const FOLDERS: [&str; 6] = ["vms", "nodes", "access", "ha", "status", "priv"];
/// Files that the mounted tree makes up.
const GENERATED: [&str; 4] = [".members", ".vms", ".version", ".log"];

/// What a path is.
///
/// # Errors
/// [`PathRefused`]: it is no path, or none that people may write.
pub fn classify(path: &str) -> Result<PathKind, PathRefused> {
    check_form(path)?;
    let (first, rest) = match path.split_once('/') {
        Some((first, rest)) => (first, Some(rest)),
        None => (path, None),
    };
    match (first, rest) {
        ("status", _) => return Err(denied(path, "the system writes it, nobody else")),
        ("priv", _) => return Err(denied(path, "it is for the agents alone")),
        (name, None) if FOLDERS.contains(&name) => {
            return Err(denied(path, "it is a folder of the cluster's layout"));
        }
        ("storage.toml" | "networks.toml" | "cluster.toml", Some(_)) => {
            return Err(denied(path, "the document of this name is a file"));
        }
        (name, _) if GENERATED.contains(&name) => {
            return Err(denied(path, "the mounted tree makes it up"));
        }
        _ => {}
    }
    if path.ends_with('/') {
        return Ok(PathKind::Folder);
    }
    let document = match (first, rest) {
        ("storage.toml", None) => DocumentPath::Storage,
        ("networks.toml", None) => DocumentPath::Networks,
        ("cluster.toml", None) => DocumentPath::Cluster,
        ("vms", Some(file)) => return named(path, file, DocumentPath::Vm),
        ("nodes", Some(file)) => return named(path, file, DocumentPath::Node),
        ("access", Some(file)) => return named(path, file, DocumentPath::Access),
        ("ha", Some(file)) if is_document(file) => {
            return Err(PathRefused::Denied(format!(
                "`{path}`: HA rules are not supported yet; nothing would enforce them"
            )));
        }
        _ => return Ok(PathKind::Plain),
    };
    Ok(PathKind::Document(document))
}

/// `NAME.toml` in a folder of documents. Editors' own files beside it are plain ones.
fn named(
    path: &str,
    file: &str,
    document: impl FnOnce(Name) -> DocumentPath,
) -> Result<PathKind, PathRefused> {
    if !is_document(file) {
        return Ok(PathKind::Plain);
    }
    let stem = file.strip_suffix(".toml").unwrap_or(file);
    match stem.parse() {
        Ok(name) => Ok(PathKind::Document(document(name))),
        Err(error) => Err(PathRefused::Invalid(format!("`{}`: {error}", path.escape_debug()))),
    }
}

/// Whether a file directly in a folder of documents is meant as one: not hidden (`.web.toml.swp`,
/// `.#web.toml`) and not a draft of Emacs (`#web.toml#`).
fn is_document(file: &str) -> bool {
    file.ends_with(".toml") && !file.contains('/') && !file.starts_with(['.', '#'])
}

fn denied(path: &str, why: &str) -> PathRefused {
    PathRefused::Denied(format!("`{path}` cannot be written: {why}"))
}

fn check_form(path: &str) -> Result<(), PathRefused> {
    let invalid = |why: &str| {
        let shown: String = path.chars().take(120).collect();
        Err(PathRefused::Invalid(format!("`{}` is not a path: {why}", shown.escape_debug())))
    };
    if path.is_empty() || path.len() > PATH_MAX {
        return invalid("it has 1 to 1024 bytes");
    }
    if path.chars().any(char::is_control) {
        return invalid("it has no control characters");
    }
    for segment in path.strip_suffix('/').unwrap_or(path).split('/') {
        match segment {
            "" => return invalid("it does not begin with a slash, and none follows another"),
            "." | ".." => return invalid("`.` and `..` are no names"),
            name if name.len() > SEGMENT_MAX => {
                return invalid("a name between two slashes has at most 255 bytes");
            }
            _ => {}
        }
    }
    Ok(())
}

impl std::fmt::Display for DocumentPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Vm(name) => f.write_str(&keys::vm_document(name)),
            Self::Node(name) => f.write_str(&keys::node_document(name)),
            Self::Storage => f.write_str(keys::STORAGE_DOCUMENT),
            Self::Networks => f.write_str(keys::NETWORKS_DOCUMENT),
            Self::Cluster => f.write_str(keys::CLUSTER_DOCUMENT),
            Self::Access(name) => f.write_str(&keys::access_document(name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_told_from_plain_files() {
        for path in [
            "vms/web.toml",
            "nodes/n1.toml",
            "storage.toml",
            "networks.toml",
            "cluster.toml",
            "access/ann.toml",
        ] {
            let Ok(PathKind::Document(document)) = classify(path) else { panic!("{path}") };
            assert_eq!(document.to_string(), path);
        }
        for path in [
            "notes/a",
            "vms/.web.toml.swp",
            "vms/#web.toml#",
            "vms/.#web.toml",
            "vms/4913",
            "vms/web.toml~",
            "vms/old/web.toml",
            "ha/README",
            "a/storage.toml",
            ".git/HEAD",
        ] {
            assert_eq!(classify(path), Ok(PathKind::Plain), "{path}");
        }
        assert_eq!(classify("notes/"), Ok(PathKind::Folder));
        assert_eq!(classify("vms/"), Ok(PathKind::Folder));
    }

    #[test]
    fn what_is_no_path_or_not_peoples_is_refused() {
        let long = format!("notes/{}", "a".repeat(300));
        let deep = "a/".repeat(600);
        for path in
            ["", "/", "/etc", "a//b", "a/../b", "..", ".", "./a", "a/.", "a\0b", "a\nb", "\u{7f}"]
                .into_iter()
                .chain([long.as_str(), deep.as_str(), "vms/Web.toml", "vms/a.b.toml"])
        {
            let refused = classify(path);
            assert!(matches!(refused, Err(PathRefused::Invalid(_))), "{path:?}: {refused:?}");
            let text = refused.unwrap_err().to_string();
            assert!(text.len() < 600 && !text.chars().any(char::is_control), "{text}");
        }
        for path in [
            "status/vms/web",
            "status",
            "priv/ca.key",
            "priv",
            "priv/",
            "vms",
            "access",
            ".vms",
            ".members",
            "ha/web.toml",
        ] {
            let refused = classify(path);
            assert!(matches!(refused, Err(PathRefused::Denied(_))), "{path:?}: {refused:?}");
        }
        assert!(classify("ha/web.toml").unwrap_err().to_string().contains("not supported yet"));
    }
}
