//! Documents stand for something: a VM must not go because an editor makes a backup of its file.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use nix::errno::Errno;

use super::harness::{Mounted, can_mount, failure, wait, write};
use crate::common::Outcome;

#[test]
fn documents_are_not_moved_away_and_say_so() -> Outcome {
    if !can_mount("documents_are_not_moved_away_and_say_so") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    let (web, note) = (tree.path("vms/web.toml"), tree.path("vms/web.toml.error"));
    write(&web, b"name = 'web'\n")?;
    let mode = |path: &str| fs::metadata(tree.path(path)).map(|meta| meta.mode() & 0o777);
    write(&tree.path("plain.toml"), b"x")?;
    assert_ne!(mode("vms/web.toml")?, mode("plain.toml")?);
    for backup in ["vms/web.toml~", "vms/.web.toml.bak", "web.toml", "vms/web.old"] {
        assert_eq!(failure(fs::rename(&web, tree.path(backup))), Errno::EPERM, "{backup}");
        assert!(!tree.path(backup).exists() && fs::read(&web)? == b"name = 'web'\n");
        let reason = fs::read_to_string(&note)?;
        assert!(reason.contains(backup) && reason.contains("would remove"), "{reason}");
    }
    // What copies the file because it could not be renamed does not remove it either; once.
    fs::copy(&web, tree.path("vms/web.toml~"))?;
    assert_eq!(failure(fs::remove_file(&web)), Errno::EPERM);
    write(&web, b"name = 'web' # new\n")?;
    assert!(!note.exists(), "it is well again");
    fs::rename(tree.path("vms/web.toml~"), &web)?;
    assert_eq!(fs::read(&web)?, b"name = 'web'\n");
    // Who removes it without more ado means it; what is no document moves where it likes.
    fs::remove_file(&web)?;
    assert!(!web.exists());
    fs::rename(tree.path("plain.toml"), tree.path("moved.toml"))?;
    // One document may become another: whether that goes is the writer's to say.
    write(&tree.path("nodes/a.toml"), b"x = 1\n")?;
    fs::rename(tree.path("nodes/a.toml"), tree.path("nodes/b.toml"))?;
    assert_eq!(fs::read(tree.path("nodes/b.toml"))?, b"x = 1\n");
    Ok(())
}

#[test]
fn another_program_may_remove_what_one_could_not_move() -> Outcome {
    if !can_mount("another_program_may_remove_what_one_could_not_move") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    let web = tree.path("vms/web.toml");
    write(&web, b"name = 'web'\n")?;
    assert_eq!(failure(fs::rename(&web, tree.path("web.old"))), Errno::EPERM);
    let removed = std::process::Command::new("rm").arg(&web).output()?;
    assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
    assert!(!web.exists());
    Ok(())
}

/// `flock FILE` opens so.
#[test]
fn a_file_made_by_who_may_only_read_it_is_saved() -> Outcome {
    if !can_mount("a_file_made_by_who_may_only_read_it_is_saved") {
        return Ok(());
    }
    let mut tree = Mounted::new(1)?;
    let path = tree.path("lock");
    let file = nix::fcntl::open(
        &path,
        nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_CREAT,
        nix::sys::stat::Mode::from_bits_truncate(0o644),
    )?;
    drop(file);
    let stored = || {
        let got = tree.lab.nodes[0]
            .run(|cluster| async move { cluster.get("lock", cluster::Consistency::Stale).await });
        got.is_ok_and(|got| got.is_ok_and(|(kv, _)| kv.is_some()))
    };
    wait("it is in the store", stored);
    tree.unmount(0);
    tree.mount(0)?;
    assert_eq!(fs::read(&path)?, b"");
    Ok(())
}
