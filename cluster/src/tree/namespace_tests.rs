//! The names against a plain map of keys, and what they must tell.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use proptest::prelude::*;

use super::inode::{Body, ROOT};
use super::namespace::{Change, Move, Namespace, Stale};

fn put(key: &str, content: &str) -> Change {
    Change { key: key.to_owned(), content: Some(content.as_bytes().to_vec()) }
}

fn gone(key: &str) -> Change {
    Change { key: key.to_owned(), content: None }
}

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(5)
}

#[test]
fn folders_live_by_what_is_in_them_or_by_a_mark() {
    let mut names = Namespace::new();
    names.apply(1, 10, &[put("a/b/c.toml", "x"), put("kept/", "")]);
    let (a, kept) = (names.resolve("a").unwrap(), names.resolve("kept").unwrap());
    assert!(names.folder(a).is_ok() && names.folder(kept).is_ok());
    names.apply(2, 10, &[gone("a/b/c.toml")]);
    assert_eq!((names.resolve("a"), names.resolve("kept")), (None, Some(kept)));
    names.apply(3, 10, &[gone("kept/")]);
    assert_eq!(names.resolve("kept"), None);
    for fixed in super::names::FIXED {
        assert!(names.resolve(fixed).is_some(), "{fixed}");
    }
}

#[test]
fn a_path_keeps_its_inode_and_an_open_file_its_life() {
    let mut names = Namespace::new();
    names.apply(1, 10, &[put("f", "one")]);
    let inode = names.resolve("f").unwrap();
    names.looked_up(inode);
    let stale = names.apply(2, 10, &[put("f", "three")]);
    assert_eq!(names.resolve("f"), Some(inode));
    assert_eq!(stale, [Stale::Inode(inode)]);
    assert_eq!(names.file(inode).unwrap().size(), 5);
    names.pin(inode);
    let stale = names.apply(3, 10, &[gone("f")]);
    let entry = Stale::Entry { parent: ROOT, name: "f".to_owned(), inode };
    assert!(stale.contains(&entry), "{stale:?}");
    assert_eq!(names.path(inode), Err(Errno::ENOENT));
    names.forget(inode, 1);
    assert!(names.get(inode).is_ok(), "still open");
    names.unpin(inode);
    assert_eq!(names.get(inode).map(|_| ()), Err(Errno::ESTALE));
    names.apply(4, 10, &[put("f", "new")]);
    assert_ne!(names.resolve("f"), Some(inode));
}

#[test]
fn what_moves_keeps_its_inode_if_the_move_is_known() {
    let mut names = Namespace::new();
    names.apply(1, 10, &[put("d/f", "x"), put("d/sub/g", "y"), put("e/", ""), put("t", "old")]);
    let (d, g, t) = (
        names.resolve("d").unwrap(),
        names.resolve("d/sub/g").unwrap(),
        names.resolve("t").unwrap(),
    );
    let e = names.resolve("e").unwrap();
    names.expect_move(Move {
        inode: d,
        to_parent: e,
        to_name: "moved".to_owned(),
        from_key: "d/f".to_owned(),
        to_key: "e/moved/f".to_owned(),
    });
    // Another commit does not set it off.
    names.apply(2, 10, &[put("d/other", "")]);
    assert_eq!(names.resolve("d"), Some(d));
    let changes = [
        gone("d/f"),
        put("e/moved/f", "x"),
        gone("d/other"),
        put("e/moved/other", ""),
        gone("d/sub/g"),
        put("e/moved/sub/g", "y"),
    ];
    names.apply(3, 10, &changes);
    assert_eq!(names.resolve("e/moved"), Some(d));
    assert_eq!(names.resolve("e/moved/sub/g"), Some(g));
    assert_eq!((names.resolve("d"), names.path(g).as_deref()), (None, Ok("e/moved/sub/g")));
    let f = names.resolve("e/moved/f").unwrap();
    names.looked_up(t);
    let over = Move {
        inode: f,
        to_parent: ROOT,
        to_name: "t".to_owned(),
        from_key: "e/moved/f".to_owned(),
        to_key: "t".to_owned(),
    };
    names.expect_move(over);
    names.apply(4, 10, &[gone("e/moved/f"), put("t", "x")]);
    assert_eq!(names.resolve("t"), Some(f));
    assert_eq!(names.path(t), Err(Errno::ENOENT));
}

#[test]
fn a_folder_hides_a_file_of_the_same_path() {
    let mut names = Namespace::new();
    names.apply(1, 10, &[put("a", "file")]);
    names.apply(2, 10, &[put("a/b", "")]);
    let a = names.resolve("a").unwrap();
    assert!(matches!(names.get(a).unwrap().body, Body::Folder(_)));
    names.apply(3, 10, &[gone("a/b")]);
    let a = names.resolve("a").unwrap();
    assert_eq!(names.file(a).unwrap().size(), 4);
    names.apply(4, 10, &[put("a/b", ""), gone("a")]);
    assert!(names.folder(names.resolve("a").unwrap()).is_ok());
}

#[test]
fn unsaved_changes_stay_what_is_clean_follows() {
    let mut names = Namespace::new();
    names.apply(1, 10, &[put("f", "one")]);
    let inode = names.resolve("f").unwrap();
    let file = names.file(inode).unwrap();
    file.buffer = Some(super::buffer::Buffer::loaded(b"one".to_vec(), 1));
    names.apply(2, 10, &[put("f", "remote")]);
    let buffer = |names: &mut Namespace| {
        names.file(inode).unwrap().buffer.as_ref().map(|buffer| buffer.data().to_vec())
    };
    assert_eq!(buffer(&mut names).unwrap(), b"remote");
    let file = names.file(inode).unwrap();
    file.buffer.as_mut().unwrap().write(0, b"mine", false).unwrap();
    names.apply(3, 10, &[put("f", "again")]);
    assert_eq!(buffer(&mut names).unwrap(), b"minete");
}

#[test]
fn notes_stand_beside_files_and_keep_no_folder() {
    let mut names = Namespace::new();
    names.apply(1, 10, &[put("d/x.toml", "")]);
    names.note("d/x.toml", "line 3: no");
    names.note("d/new.toml", "line 1: no");
    let note = names.resolve("d/x.toml.error").unwrap();
    assert!(names.get(note).unwrap().is_note());
    names.apply(2, 10, &[gone("d/x.toml")]);
    assert_eq!((names.resolve("d/x.toml.error"), names.resolve("d")), (None, None));
    for number in 0..400 {
        names.note(&format!("vms/{number}.toml"), "no");
    }
    let vms = names.resolve("vms").unwrap();
    assert_eq!(names.folder(vms).unwrap().children.len(), 256, "as many as are allowed");
    names.apply(3, 10, &[put("vms/1.toml.error", "a file of this name")]);
    let own = names.resolve("vms/1.toml.error").unwrap();
    assert!(!names.get(own).unwrap().is_note());
}

#[test]
fn times_rise_with_revisions_whatever_the_clocks_say() {
    let mut names = Namespace::new();
    let mut last = UNIX_EPOCH;
    for (revision, seconds) in [(1, 100), (2, 90), (3, 100), (4, 101), (5, 0)] {
        names.apply(revision, seconds, &[put("f", "")]);
        let inode = names.resolve("f").unwrap();
        let time = names.file(inode).unwrap().time();
        assert!(time > last, "revision {revision}");
        last = time;
    }
}

#[test]
fn a_new_file_is_here_until_it_is_committed() {
    let mut names = Namespace::new();
    let inode = names.create(ROOT, "new", false, now()).unwrap();
    assert_eq!(names.create(ROOT, "new", false, now()), Err(Errno::EEXIST));
    assert!(names.keys("").is_empty());
    // A listing of the store does not know it.
    names.replace("", Vec::new());
    assert_eq!(names.resolve("new"), Some(inode));
    names.apply(1, 10, &[put("new", "x")]);
    assert_eq!(names.resolve("new"), Some(inode));
    assert_eq!(names.keys("").len(), 1);
}

fn key() -> impl Strategy<Value = String> {
    let part = prop_oneof![Just("a"), Just("b"), Just("vms"), Just("c.toml")];
    let parts = proptest::collection::vec(part, 1..4);
    (parts, any::<bool>()).prop_map(|(parts, folder)| {
        let path = parts.join("/");
        if folder { format!("{path}/") } else { path }
    })
}

proptest! {
    /// After any changes, in batches or by listings, the names know exactly the store's keys, and
    /// every folder has a reason to be there.
    #[test]
    fn the_names_are_those_of_the_store(
        batches in proptest::collection::vec(
            proptest::collection::btree_map(key(), any::<bool>(), 1..4), 1..30),
        listed in any::<u8>(),
    ) {
        let mut names = Namespace::new();
        let mut store = BTreeMap::new();
        for (revision, batch) in (1u64..).zip(&batches) {
            let mut changes = Vec::new();
            for (key, there) in batch {
                changes.push(if *there { put(key, "x") } else { gone(key) });
                if *there {
                    store.insert(key.clone(), revision);
                } else {
                    store.remove(key);
                }
            }
            if u64::from(listed) % 7 == revision % 7 {
                let listing = store.iter().map(|(key, at)| (key.clone(), *at, 1, 10)).collect();
                names.replace("", listing);
            } else {
                names.apply(revision, 10, &changes);
            }
            prop_assert_eq!(&names.keys(""), &store);
        }
        let changes: Vec<Change> = store.keys().map(|key| gone(key)).collect();
        names.apply(1000, 10, &changes);
        prop_assert!(names.keys("").is_empty());
        prop_assert_eq!(names.len(), Namespace::new().len(), "something stayed");
    }
}
