//! Path rules: which keys of the store are files and folders of the tree, and what their modes are.
//! Pure.

use std::ffi::OsStr;

use nix::errno::Errno;
use proto::documents::DocumentPath;
use proto::keys;

/// Longest name of one file or folder, bytes.
pub(super) const NAME_MAX: usize = 255;
/// Longest path, bytes: the store's longest key.
pub(super) const PATH_MAX: usize = 1024;
/// Largest file, bytes: the store's largest value.
pub(super) const FILE_MAX: usize = 1 << 20;
/// The system's records; the tree does not show them.
pub(super) const STATUS: &str = "status/";
/// Folders that are there in every cluster, empty or not, and stay.
pub(super) const FIXED: [&str; 5] = ["access", "ha", "nodes", "priv", "vms"];
/// What a note about a refused file is called: the file's name and this.
pub(super) const NOTE: &str = ".error";

/// Where a key stands in the tree.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place<'a> {
    /// Folders from the top.
    pub(super) folders: Vec<&'a str>,
    /// The file; None: the key marks the last folder.
    pub(super) file: Option<&'a str>,
}

/// A key's place; None where the tree cannot show it.
pub(super) fn place(key: &str) -> Option<Place<'_>> {
    if key.starts_with(STATUS) || key.len() > PATH_MAX {
        return None;
    }
    let mut parts: Vec<&str> = key.split('/').collect();
    let last = parts.pop()?;
    let file = (!last.is_empty()).then_some(last);
    let shown = |part: &&str| check(part).is_ok();
    let whole = parts.iter().all(shown) && file.iter().all(shown);
    // The key "" would be the root's own marker.
    (whole && !(parts.is_empty() && file.is_none())).then_some(Place { folders: parts, file })
}

/// A name that a program gave.
pub(super) fn name(name: &OsStr) -> Result<&str, Errno> {
    let text = name.to_str().ok_or(Errno::EILSEQ)?;
    check(text)?;
    Ok(text)
}

fn check(name: &str) -> Result<(), Errno> {
    if name.len() > NAME_MAX {
        return Err(Errno::ENAMETOOLONG);
    }
    let bad = name.is_empty() || name == "." || name == ".." || name.contains('/');
    if bad || name.chars().any(char::is_control) { Err(Errno::EINVAL) } else { Ok(()) }
}

/// The path of something in a folder (`""`: the root), if it is not too long.
pub(super) fn join(folder: &str, name: &str) -> Result<String, Errno> {
    let path = if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") };
    // A folder's marker has one byte more.
    if path.len() < PATH_MAX { Ok(path) } else { Err(Errno::ENAMETOOLONG) }
}

/// The key that marks a folder.
pub(super) fn marker(path: &str) -> String {
    format!("{path}/")
}

/// Whether a path is the system's own records.
pub(super) fn is_status(path: &str) -> bool {
    path.starts_with(STATUS) || path == STATUS.trim_end_matches('/')
}

/// Whether a path is for root alone.
pub(super) fn is_private(path: &str) -> bool {
    path.starts_with(keys::PRIV) || path == keys::PRIV.trim_end_matches('/')
}

/// Whether a file may be a document: one is never committed half-written, so not empty at its
/// creation.
pub(super) fn is_document(path: &str) -> bool {
    path.ends_with(".toml")
}

/// Whether a file stands for something: a VM, the cluster's storage. To take it from its path is
/// to remove that.
pub(super) fn is_object(path: &str) -> bool {
    DocumentPath::of(path).is_some()
}

/// Permission bits. Everything belongs to root; nothing stores modes, they follow from the path.
/// Others see what is at the top, and read nothing that people wrote: so no `chmod` can promise a
/// secrecy that is not there.
///
/// What stands for nothing (a draft, an editor's own file) has another mode than a document, which
/// editors notice: one that would rename a file to its backup and make a new one (vim) tries first
/// whether a new file would come out like the old. It does not, so the editor copies, and writes into
/// the file itself. A VM must not go, not even while it is edited. (A second link would tell editors
/// the same, but has `cp -a` remove the file before it writes.)
pub(super) fn mode(path: &str, folder: bool) -> u16 {
    match (is_private(path), folder) {
        (true, true) => 0o700,
        (true, false) => 0o600,
        (false, true) if path.is_empty() => 0o755,
        (false, true) => 0o750,
        (false, false) if is_object(path) => 0o640,
        (false, false) => 0o600,
    }
}

/// Whether `chmod` may answer that it did what was asked: modes do not change, and programs that
/// copy or install files insist. What gives other users' rights away is never said to be done.
pub(super) fn mode_fits(wanted: u32) -> bool {
    wanted & 0o7000 == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_places_or_are_not_shown() {
        let place_of = |key| place(key).map(|place| (place.folders, place.file));
        assert_eq!(place_of("vms/web.toml"), Some((vec!["vms"], Some("web.toml"))));
        assert_eq!(place_of("storage.toml"), Some((vec![], Some("storage.toml"))));
        assert_eq!(place_of("a/b/"), Some((vec!["a", "b"], None)));
        let long = format!("a/{}", "x".repeat(256));
        for hidden in ["", "/", "/a", "a//b", "a/../b", "./a", "status/vms/web", long.as_str()] {
            assert_eq!(place_of(hidden), None, "{hidden}");
        }
    }

    #[test]
    fn names_are_checked() {
        assert_eq!(name(OsStr::new("web.toml")), Ok("web.toml"));
        assert_eq!(name(OsStr::new(&"x".repeat(255))).map(str::len), Ok(255));
        assert_eq!(name(OsStr::new(&"x".repeat(256))), Err(Errno::ENAMETOOLONG));
        assert_eq!(name(OsStr::new("a\nb")), Err(Errno::EINVAL));
        use std::os::unix::ffi::OsStrExt as _;
        assert_eq!(name(OsStr::from_bytes(b"\xff")), Err(Errno::EILSEQ));
        assert_eq!(join(&"d".repeat(1000), &"x".repeat(30)), Err(Errno::ENAMETOOLONG));
    }

    #[test]
    fn modes_follow_from_the_path() {
        let modes = [
            ("", true, 0o755),
            ("vms/web.toml", false, 0o640),
            ("vms", true, 0o750),
            ("priv", true, 0o700),
            ("priv/ca", false, 0o600),
            ("private", false, 0o600),
            ("vms/web.toml", false, 0o640),
        ];
        for (path, folder, expected) in modes {
            assert_eq!(mode(path, folder), expected, "{path}");
        }
        assert!(mode_fits(0o600) && mode_fits(0o755) && !mode_fits(0o4755));
    }

    #[test]
    fn what_stands_for_something_is_told_from_editors_files() {
        for path in ["vms/web.toml", "nodes/n1.toml", "storage.toml"] {
            assert!(is_object(path), "{path}");
        }
        for path in
            ["vms/web.toml~", "vms/.web.toml.swp", "vms/sedAbC", "notes.toml", "x/storage.toml"]
        {
            assert!(!is_object(path), "{path}");
        }
    }
}
