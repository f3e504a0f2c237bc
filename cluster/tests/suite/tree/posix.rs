//! What a file system promises, on one member.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use cluster::Txn;
use nix::errno::Errno;
use nix::fcntl::RenameFlags;

use super::harness::{Mounted, can_mount, close, create, errno, failure, names, open, wait, write};
use crate::common::Outcome;

#[test]
fn files_are_written_read_and_shared_by_all_who_have_them_open() -> Outcome {
    if !can_mount("files_are_written_read_and_shared_by_all_who_have_them_open") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    let path = tree.path("notes.txt");
    write(&path, b"hello")?;
    assert_eq!(fs::read(&path)?, b"hello");

    // Holes, overwriting, truncating to less and to more.
    let mut file = open(&path, true, 0)?;
    file.write_at(b"J", 0)?;
    file.write_at(b"end", 8)?;
    assert_eq!(fs::read(&path)?, b"Jello\0\0\0end", "unsaved changes are seen here");
    file.set_len(3)?;
    file.set_len(6)?;
    assert_eq!(file.metadata()?.len(), 6);
    file.seek(SeekFrom::End(-1))?;
    file.write_all(b"!")?;
    let mut other = open(&path, false, 0)?;
    let mut text = String::new();
    other.read_to_string(&mut text)?;
    assert_eq!(text, "Jel\0\0!");
    close(file)?;
    nix::unistd::truncate(&path, 2)?;
    assert_eq!(fs::read(&path)?, b"Je");
    let mut byte = [0; 4];
    assert_eq!(other.read_at(&mut byte, 0)?, 2, "an open file sees it, too");

    // Appending, whatever the position.
    let mut log = create(&path, libc::O_APPEND)?;
    log.seek(SeekFrom::Start(0))?;
    log.write_all(b"++")?;
    close(log)?;
    assert_eq!(fs::read(&path)?, b"Je++");

    // O_TRUNC replaces at close, not before.
    let truncated = open(&path, true, libc::O_TRUNC)?;
    assert_eq!(fs::metadata(&path)?.len(), 0);
    let stored = tree.lab.nodes[0].cluster()?;
    let get = || {
        let cluster = stored.clone();
        tree.lab.nodes[0].run(|_| async move {
            cluster.get("notes.txt", cluster::Consistency::Linearizable).await
        })
    };
    assert_eq!(get()??.0.ok_or("gone")?.value, b"Je++");
    (&truncated).write_all(b"new")?;
    truncated.sync_all()?;
    assert_eq!(get()??.0.ok_or("gone")?.value, b"new", "fsync replicates");
    close(truncated)?;

    // A file that is only created or emptied is so after its last close.
    drop(create(&tree.path("empty"), 0)?);
    drop(open(&path, true, libc::O_TRUNC)?);
    wait("both are empty in the store", || {
        let value = |key: &'static str| {
            let cluster = stored.clone();
            let got = tree.lab.nodes[0]
                .run(|_| async move { cluster.get(key, cluster::Consistency::Stale).await });
            got.ok().and_then(Result::ok).and_then(|(kv, _)| Some(kv?.value))
        };
        value("empty") == Some(Vec::new()) && value("notes.txt") == Some(Vec::new())
    });
    Ok(())
}

#[test]
fn creating_exclusively_is_exclusive() -> Outcome {
    if !can_mount("creating_exclusively_is_exclusive") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    let lock = tree.path("lock");
    close(create(&lock, libc::O_EXCL)?)?;
    assert_eq!(failure(create(&lock, libc::O_EXCL)), Errno::EEXIST);
    fs::remove_file(&lock)?;
    close(create(&lock, libc::O_EXCL)?)?;
    // A document is not committed before it is whole: who is too late learns it at close.
    let document = tree.path("vms/web.toml");
    let mut file = create(&document, libc::O_EXCL)?;
    assert_eq!(failure(create(&document, libc::O_EXCL)), Errno::EEXIST);
    tree.txn(0, Txn::new().put("vms/web.toml", "theirs"))?;
    file.write_all(b"mine")?;
    assert_eq!(close(file), Err(Errno::EEXIST));
    wait("theirs is shown", || fs::read(&document).is_ok_and(|text| text == b"theirs"));
    assert_eq!(failure(create(&document, libc::O_EXCL)), Errno::EEXIST);
    Ok(())
}

#[test]
fn removed_and_replaced_files_live_on_for_who_has_them_open() -> Outcome {
    if !can_mount("removed_and_replaced_files_live_on_for_who_has_them_open") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    let (path, other) = (tree.path("f"), tree.path("other"));
    write(&path, b"first")?;
    let file = open(&path, true, 0)?;
    fs::remove_file(&path)?;
    assert_eq!(failure(fs::metadata(&path)), Errno::ENOENT);
    assert_eq!(file.metadata()?.nlink(), 0);
    let mut bytes = [0; 5];
    file.read_exact_at(&mut bytes, 0)?;
    assert_eq!(&bytes, b"first");
    file.write_at(b"lost", 0)?;
    close(file)?;
    assert!(!path.exists(), "what nobody can see is not saved");

    write(&path, b"old")?;
    write(&other, b"new")?;
    let old = open(&path, false, 0)?;
    let inode = fs::metadata(&other)?.ino();
    let mut moving = open(&other, true, libc::O_APPEND)?;
    fs::rename(&other, &path)?;
    assert_eq!(fs::metadata(&path)?.ino(), inode, "what moves stays what it is");
    moving.write_all(b"er")?;
    close(moving)?;
    assert_eq!((fs::read(&path)?, other.exists()), (b"newer".to_vec(), false));
    let mut bytes = [0; 3];
    old.read_exact_at(&mut bytes, 0)?;
    assert_eq!(&bytes, b"old");

    // Renamed before it was ever saved.
    let mut fresh = create(&tree.path("fresh"), 0)?;
    fresh.write_all(b"one")?;
    fs::rename(tree.path("fresh"), tree.path("fresh2"))?;
    fresh.write_all(b"two")?;
    close(fresh)?;
    assert_eq!(fs::read(tree.path("fresh2"))?, b"onetwo");
    Ok(())
}

#[test]
fn folders_are_made_moved_and_removed() -> Outcome {
    if !can_mount("folders_are_made_moved_and_removed") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    fs::create_dir_all(tree.path("a/b/c"))?;
    assert_eq!(failure(fs::create_dir(tree.path("a"))), Errno::EEXIST);
    write(&tree.path("a/b/f"), b"f")?;
    assert_eq!(failure(fs::remove_dir(tree.path("a/b"))), Errno::ENOTEMPTY);
    assert_eq!(failure(fs::remove_dir(tree.path("a/b/f"))), Errno::ENOTDIR);
    assert_eq!(failure(fs::remove_file(tree.path("a/b"))), Errno::EISDIR);
    assert_eq!(failure(fs::rename(tree.path("a"), tree.path("a/b/x"))), Errno::EINVAL);
    fs::remove_file(tree.path("a/b/f"))?;
    assert!(tree.path("a/b").is_dir(), "an empty folder stays");
    write(&tree.path("a/b/c/deep"), b"deep")?;
    let inode = fs::metadata(tree.path("a/b/c/deep"))?.ino();

    // Onto nothing, onto an empty folder, onto what is not empty, onto a file.
    fs::rename(tree.path("a"), tree.path("z"))?;
    assert_eq!(fs::read(tree.path("z/b/c/deep"))?, b"deep");
    assert_eq!(fs::metadata(tree.path("z/b/c/deep"))?.ino(), inode);
    assert!(!tree.path("a").exists());
    fs::create_dir(tree.path("empty"))?;
    fs::rename(tree.path("z"), tree.path("empty"))?;
    fs::create_dir(tree.path("full"))?;
    write(&tree.path("full/f"), b"")?;
    assert_eq!(failure(fs::rename(tree.path("empty"), tree.path("full"))), Errno::ENOTEMPTY);
    assert_eq!(failure(fs::rename(tree.path("full/f"), tree.path("empty"))), Errno::EISDIR);
    assert_eq!(failure(fs::rename(tree.path("empty"), tree.path("full/f"))), Errno::ENOTDIR);
    let flags = RenameFlags::RENAME_NOREPLACE;
    let (from, to) = (tree.path("full/f"), tree.path("empty/b/c/deep"));
    let here = nix::fcntl::AT_FDCWD;
    let refused = nix::fcntl::renameat2(here, &from, here, &to, flags);
    assert_eq!(refused, Err(Errno::EEXIST));

    // A folder that another client made by what is in it stays when its last file goes.
    tree.txn(0, Txn::new().put("implicit/sub/file", "x"))?;
    wait("it is shown", || tree.path("implicit/sub/file").exists());
    fs::remove_file(tree.path("implicit/sub/file"))?;
    fs::remove_dir(tree.path("implicit/sub"))?;
    assert!(tree.path("implicit").is_dir());
    fs::remove_dir(tree.path("implicit"))?;
    assert!(!tree.path("implicit").exists());

    // What every cluster has stays.
    assert_eq!(failure(fs::remove_dir(tree.path("vms"))), Errno::EBUSY);
    assert_eq!(failure(fs::rename(tree.path("vms"), tree.path("v"))), Errno::EBUSY);
    Ok(())
}

#[test]
fn a_folder_too_large_to_move_in_one_commit_is_refused_whole() -> Outcome {
    if !can_mount("a_folder_too_large_to_move_in_one_commit_is_refused_whole") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    let many = (0..2100).fold(Txn::new(), |txn, number| txn.put(format!("many/{number}"), "x"));
    tree.txn(0, many)?;
    for number in 0..3 {
        tree.txn(0, Txn::new().put(format!("big/{number}"), vec![0; 1 << 20]))?;
    }
    let fit = (0..1900).fold(Txn::new(), |txn, number| txn.put(format!("fit/{number}"), "x"));
    tree.txn(0, fit)?;
    wait("all are shown", || tree.path("fit/1899").exists());
    assert_eq!(failure(fs::rename(tree.path("many"), tree.path("m"))), Errno::E2BIG);
    assert_eq!(failure(fs::rename(tree.path("big"), tree.path("b"))), Errno::E2BIG);
    assert_eq!((names(&tree.path("many"))?.len(), names(&tree.path("big"))?.len()), (2100, 3));
    fs::rename(tree.path("fit"), tree.path("fits"))?;
    assert_eq!(names(&tree.path("fits"))?.len(), 1900);
    Ok(())
}

#[test]
fn limits_have_their_own_errors() -> Outcome {
    if !can_mount("limits_have_their_own_errors") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    let long = "x".repeat(256);
    assert_eq!(failure(create(&tree.path(&long), 0)), Errno::ENAMETOOLONG);
    close(create(&tree.path(&long[..255]), 0)?)?;
    let deep = vec!["d".repeat(200); 6].join("/");
    assert_eq!(failure(fs::create_dir_all(tree.path(&deep))), Errno::ENAMETOOLONG);
    assert_eq!(failure(create(&tree.path("a\nb"), 0)), Errno::EINVAL);
    let path = tree.path("large");
    let mut file = create(&path, 0)?;
    file.write_all(&vec![7; 1 << 20])?;
    assert_eq!(failure(file.write_all(b"x")), Errno::EFBIG);
    assert_eq!(failure(file.set_len((1 << 20) + 1)), Errno::EFBIG);
    close(file)?;
    assert_eq!(fs::read(&path)?, vec![7; 1 << 20]);
    let symlink = std::os::unix::fs::symlink("a", tree.path("link"));
    assert_eq!(failure(symlink), Errno::EPERM);
    assert_eq!(failure(fs::hard_link(&path, tree.path("hard"))), Errno::EPERM);
    let fifo = nix::unistd::mkfifo(&tree.path("fifo"), nix::sys::stat::Mode::S_IRWXU);
    assert_eq!(fifo, Err(Errno::EPERM));
    assert_eq!(failure(create(&tree.path("status"), 0)), Errno::EPERM);
    let stat = nix::sys::statvfs::statvfs(&tree.path(""))?;
    let real = nix::sys::statvfs::statvfs(tree.lab.folder())?;
    assert_eq!((stat.blocks(), stat.name_max()), (real.blocks(), 255));
    Ok(())
}

#[test]
fn names_that_no_file_may_have_are_refused_everywhere() -> Outcome {
    use std::os::unix::ffi::OsStrExt as _;
    if !can_mount("names_that_no_file_may_have_are_refused_everywhere") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    write(&tree.path("good"), b"content")?;
    let before = names(&tree.path(""))?;
    let long = "x".repeat(300);
    let cases: [(&[u8], Errno); 7] = [
        (b"bad\xff", Errno::EILSEQ),
        (b"bad\xc3\x28.toml", Errno::EILSEQ),
        (b"a\nb", Errno::EINVAL),
        (b"a\x7fb", Errno::EINVAL),
        (b"\x1b[2J", Errno::EINVAL),
        ("a\u{85}b".as_bytes(), Errno::EINVAL),
        (long.as_bytes(), Errno::ENAMETOOLONG),
    ];
    for (bytes, expected) in cases {
        let name = std::ffi::OsStr::from_bytes(bytes);
        let path = tree.path("").join(name);
        assert_eq!(failure(create(&path, 0)), expected, "create {name:?}");
        assert_eq!(failure(create(&path, libc::O_EXCL)), expected, "create {name:?}");
        assert_eq!(failure(fs::create_dir(&path)), expected, "mkdir {name:?}");
        assert_eq!(failure(fs::rename(tree.path("good"), &path)), expected, "rename {name:?}");
        assert_eq!(failure(fs::rename(&path, tree.path("other"))), expected, "from {name:?}");
        assert_eq!(failure(fs::remove_file(&path)), expected, "unlink {name:?}");
        assert_eq!(failure(fs::remove_dir(&path)), expected, "rmdir {name:?}");
        assert_eq!(failure(fs::metadata(&path)), expected, "stat {name:?}");
    }
    // Not above its top: that is the folder it is mounted in.
    assert_eq!(fs::canonicalize(tree.path("vms/../.."))?, fs::canonicalize(tree.folder())?);
    assert_eq!(
        (names(&tree.path(""))?, fs::read(tree.path("good"))?),
        (before, b"content".to_vec())
    );
    // What the store has of such keys (by another way in) is not shown, and harms nothing.
    tree.txn(0, Txn::new().put("a/../b", "x").put("//", "x").put("a//b", "x").put("ok/f", "x"))?;
    wait("what can be shown is", || tree.path("ok/f").exists());
    assert!(!names(&tree.path(""))?.contains(&"a".to_owned()));
    Ok(())
}

/// Reads what a watch of this kind has seen, waiting for it: masks and names.
fn seen(inotify: libc::c_int) -> Outcome<Vec<(u32, String)>> {
    let mut ready = libc::pollfd { fd: inotify, events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, as said.
    if unsafe { libc::poll(&raw mut ready, 1, 20_000) } != 1 {
        return Err("nothing was seen".into());
    }
    let mut bytes = vec![0u8; 64 << 10];
    // SAFETY: the buffer has the length given.
    let length = unsafe { libc::read(inotify, bytes.as_mut_ptr().cast(), bytes.len()) };
    let length = usize::try_from(length).map_err(|_| std::io::Error::last_os_error())?;
    let (mut events, mut rest) = (Vec::new(), &bytes[..length]);
    // Watch, mask, cookie, length of the name, the name with zeros after it.
    while let Some((head, tail)) = rest.split_at_checked(16) {
        let mask = u32::from_ne_bytes(head[4..8].try_into()?);
        let size = usize::try_from(u32::from_ne_bytes(head[12..16].try_into()?))?;
        let (name, after) = tail.split_at_checked(size).ok_or("an event is cut off")?;
        let name = String::from_utf8_lossy(name).trim_end_matches('\0').to_owned();
        events.push((mask, name));
        rest = after;
    }
    Ok(events)
}

/// What is done on this node is seen as of any file system; of what others do, that a file went. For
/// everything there is `clusterctl config watch`.
#[test]
fn who_watches_by_inotify_hears_of_changes() -> Outcome {
    use std::os::fd::{FromRawFd as _, OwnedFd};
    use std::os::unix::ffi::OsStrExt as _;
    if !can_mount("who_watches_by_inotify_hears_of_changes") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    write(&tree.path("vms/web.toml"), b"one")?;
    // SAFETY: a new descriptor, owned here alone.
    let inotify = unsafe { OwnedFd::from_raw_fd(libc::inotify_init1(libc::IN_CLOEXEC)) };
    let watch = |path: &std::path::Path, mask: u32| -> Outcome {
        let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: the path ends with a zero byte.
        let added = unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), mask) };
        if added < 0 { Err(std::io::Error::last_os_error().into()) } else { Ok(()) }
    };
    let folder = libc::IN_CLOSE_WRITE | libc::IN_MOVED_TO | libc::IN_DELETE;
    watch(&tree.path("vms"), folder)?;
    let hears = |wanted: (u32, &str)| -> Outcome {
        loop {
            let events = seen(inotify.as_raw_fd())?;
            if events.iter().any(|(mask, name)| mask & wanted.0 != 0 && name == wanted.1) {
                return Ok(());
            }
        }
    };
    write(&tree.path("vms/web.toml"), b"two")?;
    hears((libc::IN_CLOSE_WRITE, "web.toml"))?;
    write(&tree.path("new"), b"three")?;
    fs::rename(tree.path("new"), tree.path("vms/web.toml"))?;
    hears((libc::IN_MOVED_TO, "web.toml"))?;
    write(&tree.path("vms/db.toml"), b"x")?;
    fs::remove_file(tree.path("vms/db.toml"))?;
    hears((libc::IN_DELETE, "db.toml"))?;
    watch(&tree.path("vms/web.toml"), libc::IN_DELETE_SELF)?;
    tree.txn(0, Txn::new().delete("vms/web.toml"))?;
    hears((libc::IN_DELETE_SELF, ""))?;
    Ok(())
}

#[test]
fn modes_owners_and_times_answer_as_programs_need_it() -> Outcome {
    if !can_mount("modes_owners_and_times_answer_as_programs_need_it") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    let path = tree.path("vms/web.toml");
    write(&path, b"name = 'web'\n")?;
    let mode = |path: &str| fs::metadata(tree.path(path)).map(|meta| meta.mode() & 0o7777);
    assert_eq!((mode("vms/web.toml")?, mode("vms")?, mode("")?), (0o640, 0o750, 0o755));
    assert_eq!((mode("priv")?, mode("priv/ca")?), (0o700, 0o600));
    // Programs that install files insist on a mode; none is kept.
    for wanted in [0o755, 0o600, 0o644] {
        fs::set_permissions(&path, fs::Permissions::from_mode(wanted))?;
        assert_eq!(mode("vms/web.toml")?, 0o640);
    }
    let special = fs::set_permissions(&path, fs::Permissions::from_mode(0o4755));
    assert_eq!(failure(special), Errno::EPERM);
    std::os::unix::fs::chown(&path, Some(0), Some(0))?;
    let others = std::os::unix::fs::chown(&path, Some(1000), None);
    assert_eq!(failure(others), Errno::EPERM);
    let before = fs::metadata(&path)?.modified()?;
    open(&path, true, 0)?.set_modified(SystemTime::UNIX_EPOCH)?;
    assert_eq!(fs::metadata(&path)?.modified()?, before, "times are those of the revision");

    // In the order of revisions, and stable once a file is closed.
    let mut last = before;
    for number in 0..20 {
        let path = tree.path(&format!("f{number}"));
        write(&path, b"x")?;
        let time = fs::metadata(&path)?.modified()?;
        assert!(time > last, "{number}");
        last = time;
    }
    assert!(last.elapsed()? < Duration::from_secs(60));
    let revision = |path: &std::path::Path| -> Outcome<u64> {
        let output = Command::new("getfattr")
            .args(["--only-values", "-n", "user.holdfast.revision"])
            .arg(path)
            .output();
        match output {
            Ok(output) => Ok(String::from_utf8(output.stdout)?.parse()?),
            // The program may not be installed: ask by the call.
            Err(_) => Ok(getxattr(path, "user.holdfast.revision")?.parse()?),
        }
    };
    let first = revision(&path)?;
    write(&path, b"name = 'web'\n")?;
    assert!(revision(&path)? > first);
    Ok(())
}

fn getxattr(path: &std::path::Path, name: &str) -> Outcome<String> {
    use std::os::unix::ffi::OsStrExt as _;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let name = std::ffi::CString::new(name)?;
    let mut value = vec![0u8; 64];
    // SAFETY: both names end with a zero byte, and the buffer has the length given.
    let length = unsafe {
        libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len())
    };
    let length = usize::try_from(length).map_err(|_| std::io::Error::last_os_error())?;
    value.truncate(length);
    Ok(String::from_utf8(value)?)
}

#[test]
fn secrets_are_for_root_alone_and_the_systems_records_are_not_shown() -> Outcome {
    if !can_mount("secrets_are_for_root_alone_and_the_systems_records_are_not_shown") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    tree.txn(0, Txn::new().put("status/vms/web", "{}").put("public.txt", "hello"))?;
    wait("it is shown", || tree.path("public.txt").exists());
    assert!(!names(&tree.path(""))?.contains(&"status".to_owned()));
    assert_eq!(failure(fs::metadata(tree.path("status"))), Errno::ENOENT);
    let ca = fs::read(tree.path("priv/ca"))?;
    assert!(String::from_utf8(ca)?.contains("sealed_key"));
    // A token made now is seen now.
    let before = names(&tree.path("priv"))?;
    tree.lab.token(0)?;
    let tokens = names(&tree.path("priv/tokens"))?;
    assert_eq!(tokens.len(), 1, "{before:?}");
    assert_eq!(failure(open(&tree.path("priv/ca"), true, 0)), Errno::EACCES);
    assert_eq!(failure(create(&tree.path("priv/mine"), 0)), Errno::EACCES);
    assert_eq!(failure(fs::rename(tree.path("priv/ca"), tree.path("ca"))), Errno::EPERM);
    assert_eq!(failure(fs::rename(tree.path("public.txt"), tree.path("priv/p"))), Errno::EPERM);
    assert_eq!(failure(fs::remove_file(tree.path("priv/ca"))), Errno::EACCES);

    // The mount point's folder is private to root in this test's place: others look from inside.
    let as_nobody = |script: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", script]).current_dir(tree.path(""));
        command.uid(65_534).gid(65_534).output()
    };
    let public = as_nobody("cat .members && ls . >/dev/null")?;
    assert!(public.status.success(), "{}", String::from_utf8_lossy(&public.stderr));
    for refused in [
        "cat public.txt",
        "ls vms",
        "ls priv",
        "cat priv/ca",
        "echo x >public.txt",
        "rm public.txt",
        "mkdir x",
    ] {
        let output = as_nobody(refused)?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && text.contains("Permission denied"),
            "{refused}: {text}"
        );
    }
    Ok(())
}

#[test]
fn a_refused_document_fails_close_and_fsync_and_says_why_beside_it() -> Outcome {
    if !can_mount("a_refused_document_fails_close_and_fsync_and_says_why_beside_it") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    let (path, note) = (tree.path("vms/web.toml"), tree.path("vms/web.toml.error"));
    assert_eq!(write(&path, b"ok\nBAD\n"), Err(Errno::EINVAL));
    wait("a document that was never accepted is gone", || !path.exists());
    assert!(fs::read_to_string(&note)?.contains("vms/web.toml, line 2, column 1"));
    write(&path, b"good")?;
    assert!(!note.exists());
    let mut file = open(&path, true, 0)?;
    file.write_all(b"BAD")?;
    assert_eq!(failure(file.sync_all()), Errno::EINVAL);
    assert!(note.exists());
    file.set_len(0)?;
    file.write_at(b"better", 0)?;
    file.sync_all()?;
    assert!(!note.exists());
    file.write_at(b"BAD", 0)?;
    assert_eq!(close(file), Err(Errno::EINVAL));
    wait("what was accepted last is back", || fs::read(&path).is_ok_and(|text| text == b"better"));
    assert_eq!(failure(open(&note, true, 0)), Errno::EACCES);
    fs::remove_file(&note)?;
    assert!(!note.exists());
    // By renaming, as `sed -i` does.
    write(&tree.path("vms/sedAbC"), b"BAD")?;
    assert_eq!(failure(fs::rename(tree.path("vms/sedAbC"), &path)), Errno::EBADMSG);
    assert_eq!(fs::read(&path)?, b"better");
    assert!(note.exists() && tree.path("vms/sedAbC").exists());
    assert!(!fs::read_to_string(&note)?.contains("removed before"));
    // As `mv` from another file system does.
    fs::remove_file(&path)?;
    assert!(!note.exists());
    assert_eq!(write(&path, b"BAD"), Err(Errno::EINVAL));
    let removed = fs::read_to_string(&note)?;
    for words in ["line 1", "vms/web.toml was removed before", "config rollback vms/web.toml --to"]
    {
        assert!(removed.contains(words), "{removed}");
    }
    write(&path, b"good")?;
    assert_eq!(write(&path, b"BAD"), Err(Errno::EINVAL));
    assert!(!fs::read_to_string(&note)?.contains("removed before"));
    Ok(())
}

#[test]
fn generated_files_tell_and_cannot_be_written() -> Outcome {
    if !can_mount("generated_files_tell_and_cannot_be_written") {
        return Ok(());
    }
    let mut tree = Mounted::new(1)?;
    let placement = serde_json::json!({
        "vm_id": "0f0e0d0c-0b0a-4908-8706-050403020100", "owner": 1, "generation": 7,
        "phase": {"state": "started"}, "requested": "started", "ha": true, "cpus": 1,
        "memory_bytes": 1024,
    });
    let txn = Txn::new().put("status/vms/web", placement.to_string()).put("a.txt", "x");
    let revision = tree.txn(0, txn)?;
    write(&tree.path("b.txt"), b"x")?;
    let json = |name: &str| -> Outcome<serde_json::Value> {
        Ok(serde_json::from_slice(&fs::read(tree.path(name))?)?)
    };
    let members = json(".members")?;
    assert_eq!((&members["members"][0]["name"], &members["quorum"]), (&"n1".into(), &true.into()));
    let vms = json(".vms")?;
    assert_eq!((&vms[0]["name"], &vms[0]["owner"]), (&"web".into(), &"n1".into()), "{vms}");
    assert!(json(".version")?["revision"].as_u64() > Some(revision.0));
    let log = fs::read_to_string(tree.path(".log"))?;
    assert!(log.contains("\ta.txt\n"), "{log}");
    assert!(log.contains("\tuid 0 (root) on n1\twritten\tb.txt\n"), "{log}");
    let year = log.lines().next().and_then(|line| line.split('\t').nth(1)).unwrap_or_default();
    assert!(year.starts_with("20") && year.ends_with('Z'), "{log}");
    // Mounted again it knows what was before, and shows the same times.
    let time = fs::metadata(tree.path("a.txt"))?.modified()?;
    tree.unmount(0);
    tree.mount(0)?;
    assert_eq!(fs::metadata(tree.path("a.txt"))?.modified()?, time);
    wait("the log is read", || {
        fs::read_to_string(tree.path(".log")).is_ok_and(|again| again == log)
    });
    assert!(!log.contains("status/"));
    for name in [".members", ".vms", ".version", ".log"] {
        let path = tree.path(name);
        assert_eq!(fs::metadata(&path)?.mode() & 0o777, 0o444);
        assert_eq!(fs::metadata(&path)?.len(), fs::read(&path)?.len() as u64, "{name}");
        assert_eq!(failure(open(&path, true, 0)), Errno::EACCES);
        assert_eq!(failure(fs::remove_file(&path)), Errno::EPERM);
        assert_eq!(failure(fs::rename(&path, tree.path("x"))), Errno::EPERM);
        assert_eq!(failure(fs::rename(tree.path("a.txt"), &path)), Errno::EPERM);
    }
    Ok(())
}

#[test]
fn ten_thousand_entries_are_listed_once_each_while_others_come_and_go() -> Outcome {
    if !can_mount("ten_thousand_entries_are_listed_once_each_while_others_come_and_go") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    for part in 0..2 {
        let range = part * 5000..(part + 1) * 5000;
        let txn = range.fold(Txn::new(), |txn, at| txn.put(format!("many/{at:05}"), "content"));
        tree.txn(0, txn)?;
    }
    wait("all are shown", || tree.path("many/09999").exists());
    let begin = Instant::now();
    let mut entries = fs::read_dir(tree.path("many"))?;
    let mut seen = BTreeSet::new();
    for number in 0.. {
        let Some(entry) = entries.next() else { break };
        let entry = entry?;
        assert!(seen.insert(entry.file_name()), "{:?} twice", entry.file_name());
        if number % 1000 == 0 {
            tree.txn(0, Txn::new().put(format!("many/new{number}"), "").delete("many/00000"))?;
        }
    }
    let listed = begin.elapsed();
    let all = (1..10_000).all(|at| seen.contains(std::ffi::OsStr::new(&format!("{at:05}"))));
    assert!(all, "{} of 10000", seen.len());
    let begin = Instant::now();
    for at in (1..10_000).step_by(10) {
        assert_eq!(fs::metadata(tree.path(&format!("many/{at:05}")))?.len(), 7);
    }
    println!("10000 entries in {listed:?}, 1000 stats in {:?}", begin.elapsed());
    // Beginning anew shows what is there then.
    assert!(names(&tree.path("many"))?.contains(&"new9000".to_owned()));
    Ok(())
}

#[test]
fn files_can_be_mapped_into_memory() -> Outcome {
    if !can_mount("files_can_be_mapped_into_memory") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    let path = tree.path("pack");
    let content: Vec<u8> = (0..200_000u32).flat_map(|n| n.to_le_bytes()).collect();
    write(&path, &content)?;
    let file = open(&path, false, 0)?;
    // SAFETY: a new private mapping that is only read, and unmapped before the file is closed.
    let same = unsafe {
        let (length, fd) = (content.len(), file.as_raw_fd());
        let nowhere = std::ptr::null_mut();
        let at = libc::mmap(nowhere, length, libc::PROT_READ, libc::MAP_PRIVATE, fd, 0);
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        let same = std::slice::from_raw_parts(at.cast::<u8>(), length) == content;
        libc::munmap(at, length);
        same
    };
    assert!(same);
    Ok(())
}

#[test]
fn a_writer_that_hangs_hangs_nobody_else() -> Outcome {
    if !can_mount("a_writer_that_hangs_hangs_nobody_else") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    write(&tree.path("f"), b"content")?;
    fs::create_dir(tree.path("d"))?;
    write(&tree.path("d/f"), b"content")?;
    tree.writers[0].store(true, std::sync::atomic::Ordering::SeqCst);
    let path = tree.path("f");
    let writing = std::thread::spawn(move || write(&path, b"never"));
    let moving = {
        let (from, to) = (tree.path("d/f"), tree.path("d/g"));
        std::thread::spawn(move || fs::rename(from, to).map_err(|error| errno(&error)))
    };
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(2) {
        let one = Instant::now();
        assert!(names(&tree.path(""))?.contains(&"vms".to_owned()));
        fs::metadata(tree.path("f"))?;
        fs::read(tree.path(".members"))?;
        fs::read(tree.path("f"))?;
        assert!(one.elapsed() < Duration::from_secs(1), "{:?}", one.elapsed());
    }
    // The kernel itself lets nobody into a folder in which something is being moved.
    assert!(names(&tree.path("d"))?.contains(&"f".to_owned()));
    assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
    let (written, moved) = (writing.join(), moving.join());
    assert_eq!((written.ok(), moved.ok()), (Some(Err(Errno::EIO)), Some(Err(Errno::EIO))));
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    // One of those waited for the other, and then no longer for its own answer. Alone each is told.
    assert_eq!(write(&tree.path("f"), b"never"), Err(Errno::EIO));
    let moved = fs::rename(tree.path("d/f"), tree.path("d/g"));
    assert_eq!(moved.map_err(|error| errno(&error)), Err(Errno::EIO));
    for note in ["f.error", "d/g.error"] {
        let reason = fs::read_to_string(tree.path(note));
        let reason = reason.map_err(|error| format!("{note}: {error}"))?;
        assert!(reason.contains("the outcome is unknown"), "{note}: {reason}");
    }
    tree.writers[0].store(false, std::sync::atomic::Ordering::SeqCst);
    write(&tree.path("f"), b"again")?;
    assert!(!tree.path("f.error").exists(), "it is well again");
    Ok(())
}

#[test]
fn a_full_disk_is_said_to_be_full() -> Outcome {
    if !can_mount("a_full_disk_is_said_to_be_full") {
        return Ok(());
    }
    let mut tree = Mounted::new(1)?;
    write(&tree.path("f"), b"content")?;
    tree.unmount(0);
    tree.lab.nodes[0].stop();
    let least = std::mem::replace(&mut tree.lab.nodes[0].config.min_free_bytes, u64::MAX);
    tree.lab.nodes[0].start()?;
    tree.mount(0)?;
    wait("there is a leader", || write(&tree.path("f"), b"more") == Err(Errno::ENOSPC));
    assert_eq!(failure(fs::create_dir(tree.path("d"))), Errno::ENOSPC);
    // The kernel ends a file's last close on its own time.
    wait("what was accepted last is back", || {
        fs::read(tree.path("f")).is_ok_and(|text| text == b"content")
    });
    tree.unmount(0);
    tree.lab.nodes[0].stop();
    tree.lab.nodes[0].config.min_free_bytes = least;
    tree.lab.nodes[0].start()?;
    tree.mount(0)?;
    wait("it can be written again", || write(&tree.path("f"), b"more").is_ok());
    Ok(())
}

#[test]
fn somebody_elses_unmount_is_noticed() -> Outcome {
    if !can_mount("somebody_elses_unmount_is_noticed") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    let ended = |limit| tree.ended_within(0, limit);
    assert!(!ended(Duration::from_millis(50))?);
    nix::mount::umount(&tree.path(""))?;
    assert!(ended(Duration::from_secs(10))?);
    Ok(())
}

#[test]
fn a_live_mount_is_not_taken_over() -> Outcome {
    if !can_mount("a_live_mount_is_not_taken_over") {
        return Ok(());
    }
    let mut tree = Mounted::new(1)?;
    let again = tree.mount(0).err().ok_or("mounted twice")?;
    assert!(again.to_string().contains("in use by another agent"), "{again}");
    assert!(tree.path("vms").is_dir());
    tree.unmount(0);
    assert!(!tree.path("vms").exists());
    tree.mount(0)?;
    assert!(tree.path("vms").is_dir());
    Ok(())
}
