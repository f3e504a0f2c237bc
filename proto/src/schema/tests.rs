//! The descriptions against what serde really reads.

use toml::{Table as Toml, Value};

use super::*;
use crate::document::DocumentError;
use crate::documents::{AnyDocument, DocumentKind};

/// A document of each type in which every key is given.
fn example(kind: DocumentKind) -> &'static str {
    match kind {
        DocumentKind::Vm => {
            "name = \"web\"\ncpus = 2\nmemory = \"1GiB\"\ncpu = \"host\"\n\
             [boot]\nkernel = \"a/k\"\ninitrd = \"a/i\"\ncmdline = \"quiet\"\n\
             [[disks]]\nimage = \"a/web\"\nsize = \"1GiB\"\nreadonly = true\n\
             [[nics]]\nnetwork = \"lan\"\nmac = \"52:54:00:12:34:56\"\n[ha]\nenabled = true\n\
             priority = 5\nmax_restarts = 2\nmax_relocations = 3\n"
        }
        DocumentKind::Node => {
            "notes = \"rack 4\"\nreserved_memory = \"1GiB\"\n[labels]\nzone = \"east\"\n"
        }
        DocumentKind::Storage => "[pools.a]\nkind = \"shared-dir\"\npath = \"/mnt/a\"\n",
        DocumentKind::Networks => "[networks.lan]\nbridge = \"br0\"\nuplink = \"eno1\"\n",
        DocumentKind::Cluster => {
            "[history]\nversions = 7\nage = \"7d\"\n\
             [limits]\nlargest_file = \"2KiB\"\nfiles = 700\nfiles_size = \"2MiB\"\n\
             records = 7000\nrecords_size = \"3MiB\"\n\
             [migration]\ndowntime = \"1s\"\nbandwidth = \"1GiB\"\n\
             [ha]\nrequire_watchdog = false\nbalance = \"static\"\nauto_rebalance = true\n"
        }
        DocumentKind::Access => "role = \"admin\"\n",
    }
}

fn parse(kind: DocumentKind, document: &Toml) -> Result<AnyDocument, DocumentError> {
    AnyDocument::parse(kind, &toml::to_string(document).unwrap())
}

/// Follows a described path to the table that holds its last key, taking the first of a list and
/// whatever name a map has.
fn holder<'a>(document: &'a mut Toml, path: &[&str]) -> &'a mut Toml {
    let Some((first, rest)) = path.split_first() else { return document };
    let mut value = match *first {
        "*" => document.iter_mut().next().unwrap().1,
        key => document.get_mut(key).unwrap_or_else(|| panic!("no {key} in the example")),
    };
    if let Value::Array(array) = value {
        value = &mut array[0];
    }
    holder(value.as_table_mut().unwrap(), rest)
}

/// Calls `look` with the path of the holder of each described field.
fn walk<'a>(
    shape: &'static Shape,
    path: &mut Vec<&'a str>,
    look: &mut impl FnMut(&[&'a str], &'static Field),
) {
    match shape {
        Shape::Value(_) | Shape::Words(_) => {}
        Shape::List(below) => walk(below, path, look),
        Shape::Map(below) => {
            path.push("*");
            walk(below, path, look);
            path.pop();
        }
        Shape::Table(table) => {
            for field in table.fields {
                look(path, field);
                path.push(field.name);
                walk(&field.shape, path, look);
                path.pop();
            }
        }
    }
}

#[test]
fn the_declared_presence_is_what_serde_does() {
    for kind in DocumentKind::ALL {
        let full: Toml = example(kind).parse().unwrap();
        walk(kind.shape(), &mut Vec::new(), &mut |path, field| {
            if field.name == "firmware" {
                return; // not beside `kernel`
            }
            let mut without = full.clone();
            let removed = holder(&mut without, path).remove(field.name);
            assert!(removed.is_some(), "the example of {kind:?} has no {path:?} {}", field.name);
            let parsed = parse(kind, &without);
            match field.default {
                Default::Required => {
                    let error = parsed.unwrap_err().to_string();
                    assert!(error.contains("missing field"), "{path:?} {}: {error}", field.name);
                }
                Default::Is(value) => {
                    let mut stated = without.clone();
                    let value: Toml = format!("x = {value}").parse().unwrap();
                    holder(&mut stated, path).insert(field.name.to_owned(), value["x"].clone());
                    assert_eq!(parse(kind, &stated), parsed, "{path:?} {}", field.name);
                    assert!(parsed.is_ok(), "{path:?} {}: {parsed:?}", field.name);
                }
                // A kernel may be left out for a firmware only.
                Default::Otherwise(_) if field.name == "kernel" => {}
                Default::Otherwise(words) => {
                    assert!(!words.is_empty() && parsed.is_ok(), "{path:?} {}", field.name);
                }
            }
        });
    }
}

#[test]
fn every_word_is_read_and_no_other() {
    for kind in DocumentKind::ALL {
        let full: Toml = example(kind).parse().unwrap();
        walk(kind.shape(), &mut Vec::new(), &mut |path, field| {
            let Shape::Words(words) = &field.shape else { return };
            for word in words.iter().chain([&"no-such-word"]) {
                let mut document = full.clone();
                holder(&mut document, path).insert(field.name.to_owned(), Value::from(*word));
                let parsed = parse(kind, &document);
                assert_eq!(parsed.is_ok(), words.contains(word), "{path:?} {word}: {parsed:?}");
            }
        });
    }
}

#[test]
fn everything_is_explained() {
    walk_explained(&explain("").unwrap());
    let image = explain("vm.disks.image").unwrap();
    assert_eq!(image.type_words, "text");
    assert_eq!(image.default, "required");
    assert!(image.constraint.starts_with("pool/name"), "{image:?}");
    assert_eq!(explain("vm.disks.0.image"), Some(image.clone()));
    assert_eq!(explain("vms.disks[0].image"), Some(image));
    let kind = explain("storage.pools.kind").unwrap();
    assert_eq!(kind.type_words, "\"local-dir\" or \"shared-dir\"");
    assert_eq!(explain("storage.pools.fast.kind"), Some(kind));
    assert_eq!(explain("vm.cpus").unwrap().default, "1");
    assert_eq!(explain("vm.disks").unwrap().children.len(), 3);
    assert_eq!(explain("vm").unwrap().type_words, "file vms/NAME.toml");
    for nothing in ["vm.disk", "vm.cpus.x", "nothing", "vm..", "vm.disks.x.image", "ha"] {
        assert_eq!(explain(nothing).filter(|_| nothing != "vm.."), None, "{nothing}");
    }
}

fn walk_explained(explanation: &Explanation) {
    assert!(!explanation.documentation.is_empty(), "{}", explanation.path);
    assert!(!explanation.type_words.is_empty(), "{}", explanation.path);
    for child in &explanation.children {
        assert_eq!(explain(&child.path).as_ref(), Some(child));
        walk_explained(child);
    }
}

#[test]
fn the_stated_limits_are_the_checked_ones() {
    let cases = [
        (
            DocumentKind::Vm,
            "cpus = 2",
            &["cpus = 1", "cpus = 8"][..],
            &["cpus = 0", "cpus = 9"][..],
        ),
        (
            DocumentKind::Vm,
            "memory = \"1GiB\"",
            &["memory = \"64MiB\"", "memory = \"16TiB\""],
            &["memory = \"63MiB\"", "memory = \"65537KiB\"", "memory = \"17TiB\""],
        ),
        (DocumentKind::Vm, "size = \"1GiB\"", &["size = 512"], &["size = 0", "size = 513"]),
        (
            DocumentKind::Cluster,
            "versions = 7",
            &["versions = 1", "versions = 100000"],
            &["versions = 0", "versions = 100001"],
        ),
        (
            DocumentKind::Cluster,
            "age = \"7d\"",
            &["age = \"1min\"", "age = \"3650d\""],
            &["age = \"59s\"", "age = \"3651d\""],
        ),
        (
            DocumentKind::Cluster,
            "largest_file = \"2KiB\"",
            &["largest_file = \"1KiB\"", "largest_file = \"1MiB\""],
            &["largest_file = 1023", "largest_file = 1048577"],
        ),
        (
            DocumentKind::Cluster,
            "files = 700",
            &["files = 100", "files = 1000000"],
            &["files = 99", "files = 1000001", "files = -1", "files = \"700\""],
        ),
        (
            DocumentKind::Cluster,
            "files_size = \"2MiB\"",
            &["files_size = \"1MiB\"", "files_size = \"16GiB\""],
            &["files_size = \"1023KiB\"", "files_size = \"17GiB\""],
        ),
        (
            DocumentKind::Cluster,
            "records = 7000",
            &["records = 1000", "records = 2000000"],
            &["records = 999", "records = 2000001"],
        ),
        (
            DocumentKind::Cluster,
            "records_size = \"3MiB\"",
            &["records_size = \"1MiB\"", "records_size = \"4GiB\""],
            &["records_size = \"1023KiB\"", "records_size = \"5GiB\""],
        ),
        (
            DocumentKind::Cluster,
            "downtime = \"1s\"",
            &["downtime = \"1ms\"", "downtime = \"60s\""],
            &["downtime = \"0ms\"", "downtime = \"61s\""],
        ),
        (
            DocumentKind::Cluster,
            "bandwidth = \"1GiB\"",
            &["bandwidth = \"1MiB\"", "bandwidth = \"1TiB\""],
            &["bandwidth = 0", "bandwidth = \"1KiB\"", "bandwidth = \"2TiB\""],
        ),
    ];
    for (kind, from, good, bad) in cases {
        for (to, fits) in good.iter().map(|to| (to, true)).chain(bad.iter().map(|to| (to, false))) {
            let parsed = AnyDocument::parse(kind, &example(kind).replace(from, to));
            assert_eq!(parsed.is_ok(), fits, "{to}: {parsed:?}");
        }
    }
}

#[test]
fn a_near_word_is_found() {
    let known = ["cpus", "cpu", "memory", "disks"];
    let cases =
        [("cpuss", Some("cpus")), ("memroy", Some("memory")), ("disk", Some("disks")), ("x", None)];
    for (word, meant) in cases {
        assert_eq!(nearest(word, known.into_iter()), meant, "{word}");
    }
}
