//! What people get wrong, through the whole way: refused with its reason, and nothing is changed.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use super::rig::{Node, WEB, can_run};

#[test]
fn bad_documents_are_refused_with_their_place_and_change_nothing() {
    if !can_run("bad_documents_are_refused_with_their_place_and_change_nothing") {
        return;
    }
    let node = Node::with_vm();
    let before = node.files();
    let text = |from: &str, to: &str| WEB.replace(from, to).into_bytes();
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        // Invalid TOML.
        ("vms/web", text("cpus = 2", "cpus = "), &[":3:"]),
        ("vms/web", text("[boot]", "[boot"), &[":6:"]),
        ("vms/web", text("# the shop\n", "name = \"web\"\n"), &[":2:", "duplicate"]),
        ("vms/web", b"\0\0\0".to_vec(), &[":1:"]),
        ("cluster", b"[history".to_vec(), &[":1:"]),
        // Wrong types and values.
        ("vms/web", text("cpus = 2", "cpus = \"two\""), &[":3:8", "invalid type"]),
        ("vms/web", text("cpus = 2", "cpus = -1"), &[":3:8"]),
        ("vms/web", text("cpus = 2", "cpus = 99999999999999999999"), &[":3:8"]),
        ("vms/web", text("\"64MiB\"", "[]"), &[":4:10", "invalid type"]),
        ("vms/web", text("\"web\"", "\"Web Server\""), &[":2:8", "name"]),
        ("networks", b"networks = 3\n".to_vec(), &[":1:12"]),
        ("cluster", b"[limits]\nfiles = 3\n".to_vec(), &[":2:9", "100 to 1000000"]),
        // Unknown keys.
        ("vms/web", text("cpus", "cpuss"), &[":3:1", "did you mean `cpus`"]),
        ("storage", b"[pool.a]\nkind = \"shared-dir\"\n".to_vec(), &[":1:2", "did you mean"]),
        // No text, and too large.
        ("vms/web", b"name = \"\xff\"".to_vec(), &["UTF-8"]),
        ("vms/web", vec![b'#'; 2 << 20], &["2097152 bytes", "1048576"]),
        ("notes/large", vec![b'x'; 2 << 20], &["2097152 bytes", "1048576"]),
        ("notes/larger", vec![b'x'; 6 << 20], &["1048576"]),
    ];
    for (path, content, words) in cases {
        let file = node.write("input", &content);
        for command in [
            &["config", "put", path, "-f"][..],
            &["config", "put", path, "--dry-run", "-f"],
            &["config", "apply", path, "-f"],
        ] {
            let ran = node.ctl(&[command, &[file.to_str().unwrap()]].concat());
            ran.refused(2, words);
            assert!(ran.stderr.len() < 2000, "it repeats the document: {}", ran.stderr);
        }
        assert_eq!(node.files(), before, "{path}: {words:?}");
    }
}

#[test]
fn names_that_no_file_may_have_are_refused() {
    if !can_run("names_that_no_file_may_have_are_refused") {
        return;
    }
    let node = Node::with_vm();
    let before = node.files();
    let file = node.write("input", b"x");
    let long = format!("notes/{}", "x".repeat(300));
    let deep = vec!["d".repeat(200); 6].join("/");
    let cases: [(&[u8], i32); 13] = [
        (b"../x", 2),
        (b"a/../../etc/passwd", 2),
        (b"a/./b", 2),
        (b"a//b", 2),
        (b"notes/a\nb", 2),
        (b"notes/\x1b[2J", 2),
        (b"notes/\x7f", 2),
        (long.as_bytes(), 2),
        (deep.as_bytes(), 2),
        (b"notes/\xff", 2),
        (b"vms/We b.toml", 2),
        (b"status/vms/web", 4),
        (b"priv/ca", 4),
    ];
    for (name, exit) in cases {
        let name = OsStr::from_bytes(name);
        let put = [OsStr::new("config"), "put".as_ref(), name, "-f".as_ref(), file.as_ref()];
        let ran = node.ctl(&put);
        assert_eq!((ran.exit, ran.stdout.as_str()), (Some(exit), ""), "{name:?}: {ran:?}");
        assert!(ran.stderr.contains("error"), "{name:?}: {ran:?}");
        let control = |letter: char| letter.is_control() && letter != '\n';
        assert!(!ran.stderr.chars().any(control), "{name:?} is repeated raw: {ran:?}");
        assert_eq!(node.files(), before, "{name:?}");
    }
    node.ctl(&["config", "get", "priv/ca"]).refused(4, &["agents alone"]);
    // In a folder that is applied, too.
    node.write("conf/notes/ok", b"x");
    node.write(&format!("conf/notes/{}", "x".repeat(250)), b"x");
    std::fs::write(node.path("conf/notes").join(OsStr::from_bytes(b"bad\xff")), "x").unwrap();
    let conf = node.path("conf").display().to_string();
    let ran = node.ctl(&["config", "apply", "-f", &conf]);
    assert!(ran.exit != Some(0) && ran.stderr.contains("bad"), "{ran:?}");
    assert_eq!(node.files(), before);
}

#[test]
fn a_commit_of_ten_thousand_files_is_refused_whole_or_done_in_parts_that_are_named() {
    if !can_run("a_commit_of_ten_thousand_files_is_refused_whole_or_done_in_parts_that_are_named") {
        return;
    }
    let node = Node::first("");
    for number in 0..10_000 {
        let folder = node.path(&format!("conf/many/{}", number / 1000));
        if number % 1000 == 0 {
            std::fs::create_dir_all(&folder).unwrap();
        }
        std::fs::write(folder.join(number.to_string()), "x").unwrap();
    }
    let conf = node.path("conf").display().to_string();
    let done = node.ctl(&["config", "apply", "-f", &conf, "-o", "json"]).json();
    assert_eq!(done["changes"].as_array().unwrap().len(), 10_000);
    assert_eq!(node.ctl(&["config", "apply", "-f", &conf]).good(), "nothing to change\n");
    let listed = node.ctl(&["config", "ls", "many/", "-o", "json"]).json();
    assert_eq!(listed.as_array().map(Vec::len), Some(10_000));
}
