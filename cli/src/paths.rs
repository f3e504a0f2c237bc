//! Paths of the configuration as people write them: `vms/web` for `vms/web.toml`, `PATH@REV` for a
//! file as it was.

use std::str::FromStr;

/// Folders in which every file is a document.
const DOCUMENT_FOLDERS: [&str; 4] = ["vms", "nodes", "access", "ha"];
/// Documents at the top.
const DOCUMENTS: [&str; 3] = ["storage", "networks", "cluster"];
/// The system's records and secrets: not people's files.
const NOT_PEOPLES: [&str; 2] = ["status/", "priv/"];

/// The store's key of a path that a person wrote.
pub(crate) fn key(path: &str) -> String {
    let path = path.trim_start_matches('/');
    let parts: Vec<&str> = path.split('/').collect();
    let short = match parts.as_slice() {
        [name] => DOCUMENTS.contains(name),
        [folder, name] => {
            DOCUMENT_FOLDERS.contains(folder) && !name.is_empty() && !name.contains('.')
        }
        _ => false,
    };
    if short { format!("{path}.toml") } else { path.to_owned() }
}

/// A prefix: as [`key`], but nothing is added.
pub(crate) fn prefix(path: &str) -> String {
    path.trim_start_matches('/').to_owned()
}

/// Whether a key is a file of people's, not the system's.
pub(crate) fn is_peoples(key: &str) -> bool {
    !NOT_PEOPLES.iter().any(|folder| key.starts_with(folder))
}

/// Whether a file is left behind by an editor or belongs to a version control system: such files
/// are neither exported nor applied nor pruned.
pub(crate) fn is_scratch(key: &str) -> bool {
    key.split('/').any(|part| {
        part == ".git"
            || part.starts_with(".#")
            || part.ends_with('~')
            || [".swp", ".swo", ".swx"].iter().any(|end| part.ends_with(end))
    })
}

/// Where a local file belongs: by the end of its own path, or by what it holds.
pub(crate) fn guess(file: &std::path::Path, content: &[u8]) -> Option<String> {
    let parts: Vec<&str> = file.iter().filter_map(|part| part.to_str()).collect();
    if let [.., folder, name] = parts.as_slice()
        && DOCUMENT_FOLDERS.contains(folder)
        && name.ends_with(".toml")
    {
        return Some(format!("{folder}/{name}"));
    }
    let name = parts.last()?.strip_suffix(".toml")?;
    if DOCUMENTS.contains(&name) {
        return Some(format!("{name}.toml"));
    }
    // A VM's document says its name; nothing else has something to boot.
    let document: toml::Table = std::str::from_utf8(content).ok()?.parse().ok()?;
    let vm = document.get("name")?.as_str()?.parse::<proto::Name>().ok()?;
    document.contains_key("boot").then(|| proto::keys::vm_document(&vm))
}

/// `PATH` or `PATH@REVISION`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct At {
    pub(crate) key: String,
    /// `None`: as it is now.
    pub(crate) revision: Option<u64>,
}

impl FromStr for At {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.rsplit_once('@') {
            // A name may hold an @; what follows the last one is a revision only if it is a number.
            Some((path, revision)) if !revision.is_empty() && is_number(revision) => {
                Ok(Self { key: key(path), revision: Some(number(revision)?) })
            }
            _ => Ok(Self { key: key(text), revision: None }),
        }
    }
}

/// `PATH@A..B`, `PATH@A` (to now), or `PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) key: String,
    /// From, and to; `None`: to now.
    pub(crate) revisions: Option<(u64, Option<u64>)>,
}

impl FromStr for Span {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((path, revisions)) = text.rsplit_once('@')
            && let Some((from, to)) = revisions.split_once("..")
            && is_number(from)
            && is_number(to)
            && !from.is_empty()
        {
            let to = if to.is_empty() { None } else { Some(number(to)?) };
            return Ok(Self { key: key(path), revisions: Some((number(from)?, to)) });
        }
        let At { key, revision } = text.parse()?;
        Ok(Self { key, revisions: revision.map(|from| (from, None)) })
    }
}

fn is_number(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

fn number(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err(format!("`{text}` is not a revision: they begin with 1")),
        Ok(number) => Ok(number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_may_be_named_without_their_ending() {
        for (path, expected) in [
            ("vms/web", "vms/web.toml"),
            ("/vms/web.toml", "vms/web.toml"),
            ("storage", "storage.toml"),
            ("notes/storage", "notes/storage"),
            ("vms/", "vms/"),
            ("vms/a/b", "vms/a/b"),
            ("vms/.web.swp", "vms/.web.swp"),
        ] {
            assert_eq!(key(path), expected);
        }
        assert_eq!(prefix("/storage"), "storage");
    }

    #[test]
    fn revisions_follow_the_last_at() {
        let at = |text: &str| text.parse::<At>().map(|at| (at.key, at.revision));
        assert_eq!(at("vms/web@7"), Ok(("vms/web.toml".into(), Some(7))));
        assert_eq!(at("notes/me@home"), Ok(("notes/me@home".into(), None)));
        assert!(at("vms/web@0").is_err() && at("vms/web@99999999999999999999").is_err());
        let span = |text: &str| text.parse::<Span>().map(|span| (span.key, span.revisions));
        assert_eq!(span("vms/web@3..7"), Ok(("vms/web.toml".into(), Some((3, Some(7))))));
        assert_eq!(span("vms/web@3.."), Ok(("vms/web.toml".into(), Some((3, None)))));
        assert_eq!(span("vms/web@3"), Ok(("vms/web.toml".into(), Some((3, None)))));
        assert_eq!(span("vms/web"), Ok(("vms/web.toml".into(), None)));
        assert_eq!(span("a@b..c"), Ok(("a@b..c".into(), None)));
    }

    #[test]
    fn a_files_place_is_told_from_its_path_or_its_content() {
        let guess = |file: &str, content: &str| guess(file.as_ref(), content.as_bytes());
        let vm = "name = \"web\"\n[boot]\nkernel = \"a/b\"\n";
        assert_eq!(guess("conf/vms/db.toml", ""), Some("vms/db.toml".into()));
        assert_eq!(guess("/tmp/storage.toml", ""), Some("storage.toml".into()));
        assert_eq!(guess("my-web.toml", vm), Some("vms/web.toml".into()));
        assert_eq!(guess("my-web.toml", "name = \"../x\"\n[boot]\n"), None);
        assert_eq!(guess("notes.txt", vm), None);
        assert_eq!(guess("other.toml", "not toml"), None);
    }

    #[test]
    fn editors_leavings_are_known() {
        for scratch in ["vms/.web.toml.swp", "a~", ".git/config", "x/.#lock"] {
            assert!(is_scratch(scratch), "{scratch}");
        }
        assert!(!is_scratch("vms/web.toml") && !is_scratch(".gitignore"));
        assert!(is_peoples("vms/web.toml") && !is_peoples("status/vms/web"));
    }
}
