//! Folders on this machine: read for `apply` and `diff`, written by `export`.

use std::fs::{self, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::change::Wanted;
use crate::failure::{Exit, Failure};
use crate::files::{File, Files, Read};
use crate::{output, paths};

/// Largest file that the cluster keeps, bytes.
const FILE_MAX: u64 = 1 << 20;

/// All files of a folder by their keys. Editors' leavings and links are left out, and said.
pub(super) fn read_folder(root: &Path) -> Result<Wanted, Failure> {
    let mut wanted = Wanted::default();
    read_into(root, "", &mut wanted)?;
    Ok(wanted)
}

fn read_into(folder: &Path, prefix: &str, wanted: &mut Wanted) -> Result<(), Failure> {
    let unreadable = |error: std::io::Error| Failure::file("read", folder, &error);
    let mut entries: Vec<_> =
        fs::read_dir(folder).map_err(unreadable)?.collect::<Result<_, _>>().map_err(unreadable)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let name = entry.file_name().into_string().map_err(|_| {
            Failure::new(Exit::Usage, format!("cannot apply {}", path.display()))
                .why("its name is not UTF-8")
        })?;
        let key = format!("{prefix}{name}");
        let found = entry.file_type().map_err(unreadable)?;
        if paths::is_scratch(&key) {
            eprintln!("note: {} is left out", path.display());
        } else if found.is_dir() {
            let key = format!("{key}/");
            if !paths::is_peoples(&key) {
                return Err(Failure::new(Exit::Usage, format!("cannot apply {}", path.display()))
                    .why(format!("{key} is written by the system, nobody else")));
            }
            wanted.folders.insert(key.clone());
            read_into(&path, &key, wanted)?;
        } else if found.is_file() {
            wanted.files.insert(key, read_file(&path)?);
        } else {
            eprintln!("note: {} is left out: it is no plain file", path.display());
        }
    }
    Ok(())
}

/// A file's content, if it is not larger than a file can be.
pub(super) fn read_file(path: &Path) -> Result<Vec<u8>, Failure> {
    let failed = |error: std::io::Error| Failure::file("read", path, &error);
    let size = fs::metadata(path).map_err(failed)?.len();
    if size > FILE_MAX {
        return Err(too_large(&path.display().to_string(), &format!("{size} bytes")));
    }
    fs::read(path).map_err(failed)
}

/// A file's content, or what comes from stdin for `-`, if it is not larger than a file can be.
pub(super) fn read_input(file: &Path) -> Result<Vec<u8>, Failure> {
    if file.as_os_str() != "-" {
        return read_file(file);
    }
    let mut content = Vec::new();
    let read = std::io::stdin().take(FILE_MAX + 1).read_to_end(&mut content);
    read.map_err(|error| Failure::new(Exit::Failed, "cannot read stdin").why(error.to_string()))?;
    if content.len() as u64 > FILE_MAX {
        return Err(too_large("what comes from stdin", &format!("more than {FILE_MAX} bytes")));
    }
    Ok(content)
}

fn too_large(what: &str, size: &str) -> Failure {
    Failure::new(Exit::Usage, format!("cannot take {what}"))
        .why(format!("it has {size}; the cluster keeps files up to 1 MiB ({FILE_MAX} bytes)"))
}

/// `config export`: all of people's files at one revision.
pub(super) async fn export(
    files: &mut Files<'_>,
    folder: &Path,
    force: bool,
) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::file("write into", folder, &error);
    fs::create_dir_all(folder).map_err(failed)?;
    let empty = fs::read_dir(folder).map_err(failed)?.next().is_none();
    if !empty && !force {
        return Err(Failure::new(Exit::Refused, format!("{} is not empty", folder.display()))
            .remedy("name another folder, or give --force: files of the same names are replaced"));
    }
    let (all, revision) = files.peoples(Read::Linearizable).await?;
    let mut written = Vec::new();
    for file in all.iter().filter(|file| !paths::is_scratch(&file.key)) {
        write(folder, file)?;
        written.push(file.key.clone());
    }
    let exported = Exported { revision, files: written };
    output::print(files.session.global.output, &exported, |exported| {
        let count = exported.files.len();
        format!("{count} files of revision {revision} are in {}", folder.display())
    })
}

#[derive(Debug, serde::Serialize)]
struct Exported {
    revision: u64,
    files: Vec<String>,
}

fn write(root: &Path, file: &File) -> Result<(), Failure> {
    let path = place(root, &file.key)?;
    let failed = |error: std::io::Error| Failure::file("write", &path, &error);
    if file.key.ends_with('/') {
        return fs::create_dir_all(&path).map_err(failed);
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    // A link that stands there already is not followed out of the folder.
    let mut target = OpenOptions::new();
    target.write(true).create(true).truncate(true).custom_flags(nix::libc::O_NOFOLLOW);
    target.open(&path).and_then(|mut target| target.write_all(&file.content)).map_err(failed)
}

/// Where a key goes. What the cluster says is not trusted: nothing leaves the folder.
fn place(root: &Path, key: &str) -> Result<PathBuf, Failure> {
    let parts: Vec<&str> = key.trim_end_matches('/').split('/').collect();
    let plain = |part: &&str| !matches!(*part, "" | "." | "..") && !part.contains('\0');
    if parts.iter().all(plain) {
        return Ok(parts.iter().fold(root.to_owned(), |path, part| path.join(part)));
    }
    Err(Failure::new(Exit::Failed, format!("cannot export `{}`", key.escape_debug()))
        .why("it is no path inside a folder"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(key: &str, content: &[u8]) -> File {
        let content = content.to_vec();
        File { key: key.to_owned(), content, create_revision: 1, revision: 1 }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        for (key, content) in
            [("vms/web.toml", &b"x = 1\n"[..]), ("notes/a/b", b"\xff\0"), ("empty/", b"")]
        {
            write(folder.path(), &file(key, content)).unwrap();
        }
        fs::write(folder.path().join("vms/.web.toml.swp"), "").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("link")).unwrap();
        let wanted = read_folder(folder.path()).unwrap();
        let keys: Vec<_> = wanted.files.keys().map(String::as_str).collect();
        assert_eq!(keys, ["notes/a/b", "vms/web.toml"]);
        assert_eq!(wanted.files["notes/a/b"], b"\xff\0");
        let folders: Vec<_> = wanted.folders.iter().map(String::as_str).collect();
        assert_eq!(folders, ["empty/", "notes/", "notes/a/", "vms/"]);
    }

    #[test]
    fn nothing_leaves_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        for key in ["../x", "a/../../x", "a//b", "/etc/x", ".", "", "a\0b"] {
            assert!(write(folder.path(), &file(key, b"")).is_err(), "{key:?}");
        }
        let outside = tempfile::NamedTempFile::new().unwrap();
        std::os::unix::fs::symlink(outside.path(), folder.path().join("link")).unwrap();
        assert!(write(folder.path(), &file("link", b"x")).is_err());
        assert_eq!(fs::read(outside.path()).unwrap(), b"");
    }

    #[test]
    fn what_the_cluster_would_refuse_is_refused_here() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("status")).unwrap();
        assert_eq!(read_folder(folder.path()).unwrap_err().exit, Exit::Usage);
        let large = folder.path().join("large");
        fs::File::create(&large).unwrap().set_len(FILE_MAX + 1).unwrap();
        assert!(read_file(&large).unwrap_err().to_string().contains("1 MiB"));
    }
}
