//! The cluster's limits as people see, change and meet them.

use std::io::Write as _;
use std::os::fd::IntoRawFd as _;

use super::rig::{Node, can_run, wait};

#[test]
fn limits_are_explained_set_and_met() {
    if !can_run("limits_are_explained_set_and_met") {
        return;
    }
    let node = Node::first("[tree]\nmount = \"off\"\n[limits]\nclient_watches = 2\n");
    let explained = node.ctl(&["config", "explain", "cluster.limits"]).good();
    for words in ["largest_file", "files_size", "records", "1GiB", "100000", "1MiB to 16GiB"] {
        assert!(explained.contains(words), "no `{words}`: {explained}");
    }
    node.ctl(&["config", "set", "cluster", "limits.files=0"]).refused(2, &["100 to 1000000"]);
    node.ctl(&["config", "set", "cluster", "limits.files=100", "limits.largest_file=1KiB"]).good();
    let (large, small) = (node.write("large", &[b'x'; 1025]), node.write("small", b"x"));
    let put = |path: &str, file: &std::path::Path| {
        node.ctl(&["config", "put", path, "-f", file.to_str().unwrap()])
    };
    // One that is there may stay as large as it is.
    let mut tries = 1024;
    wait("they hold", || {
        tries += 1;
        put("notes/first", &node.write("first", &vec![b'x'; tries])).exit != Some(0)
    });
    put("notes/large", &large).refused(2, &["1025 bytes", "at most 1024", "cluster.limits"]);
    for number in 0..101 {
        node.write(&format!("conf/many/{number}"), b"");
    }
    let conf = node.path("conf").display().to_string();
    let before = node.files();
    let many = node.ctl(&["config", "apply", "-f", &conf]);
    assert!(many.exit != Some(0) && many.stderr.contains("limit of"), "{many:?}");
    assert!(many.stderr.contains("100 keys") && many.stderr.contains("cluster.limits"), "{many:?}");
    assert_eq!(node.files(), before, "nothing of it was written");
    node.ctl(&["config", "set", "cluster", "limits.files=1000"]).good();
    wait("they are raised", || node.ctl(&["config", "apply", "-f", &conf]).exit == Some(0));
    put("notes/small", &small).good();

    // Each node's own.
    let watch = || {
        let mut command = node.command();
        command.args(["config", "watch", "notes/"]).stdout(std::process::Stdio::null());
        command.stderr(std::process::Stdio::piped()).spawn().unwrap()
    };
    let mut watches = [watch(), watch(), watch(), watch()];
    // Two are taken; the others end with the reason.
    wait("two are refused", || {
        let ended = watches.iter_mut().filter_map(|one| one.try_wait().unwrap());
        ended.filter(|status| !status.success()).count() == 2
    });
    for mut one in watches {
        let refused = one.try_wait().unwrap().is_some();
        one.kill().unwrap();
        let said = String::from_utf8_lossy(&one.wait_with_output().unwrap().stderr).into_owned();
        assert_eq!(said.contains("client_watches"), refused, "{said}");
    }
}

#[test]
fn the_mounted_tree_says_which_limit_was_met() {
    if !can_run("the_mounted_tree_says_which_limit_was_met") {
        return;
    }
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/fuse") {
        tests::skip::skip(
            "the_mounted_tree_says_which_limit_was_met",
            &format!("/dev/fuse: {error}"),
        );
        return;
    }
    let node = Node::first("[tree]\nmount = \"FOLDER/tree\"\n");
    wait("it is mounted", || node.path("tree/storage.toml").exists());
    node.ctl(&["config", "set", "cluster", "limits.files=100", "limits.largest_file=1KiB"]).good();
    // As a program does it: what counts is what `close` says.
    let write = |name: &str, content: &[u8]| -> Result<(), nix::errno::Errno> {
        let errno = |error: std::io::Error| {
            nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or_default())
        };
        let mut file = std::fs::File::create(node.path("tree").join(name)).map_err(errno)?;
        file.write_all(content).map_err(errno)?;
        nix::unistd::close(file.into_raw_fd())
    };
    // One that is there may stay as large as it is.
    let mut tries = 1024;
    wait("they hold", || {
        tries += 1;
        write("large", &vec![b'x'; tries]) == Err(nix::errno::Errno::EFBIG)
    });
    let note = |name: &str| {
        std::fs::read_to_string(node.path("tree").join(format!("{name}.error"))).unwrap()
    };
    assert!(note("large").contains("at most 1024"), "{}", note("large"));
    let (mut written, full) = (0, nix::errno::Errno::ENOSPC);
    let refused = (0..200).find_map(|number| {
        let name = format!("small{number}");
        let outcome = write(&name, b"x");
        written += usize::from(outcome.is_ok());
        outcome.err().map(|errno| (name, errno))
    });
    let (name, errno) = refused.expect("two hundred files were taken");
    assert_eq!(errno, full);
    assert!(note(&name).contains("100 keys"), "{}", note(&name));
    assert!(written > 80, "only {written}");
    std::fs::remove_file(node.path("tree/small0")).unwrap();
    assert_eq!(write("again", b"x"), Ok(()));
}
