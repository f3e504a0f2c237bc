//! What the architecture forbids, checked on the sources: dependency directions, the purity of the
//! cores, versions in one place, no stray files. Each rule carries its reason.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which crate may depend on which other of the workspace. The three cores never meet.
const DIRECTIONS: [(&str, &[&str]); 9] = [
    ("proto", &[]),
    ("cluster/histogram", &[]),
    ("cluster", &["proto"]),
    ("vmm-core", &["proto"]),
    ("ha-manager", &["proto"]),
    ("ha-manager/simulator", &["ha-manager", "proto"]),
    ("node-agent", &["cluster", "ha-manager", "proto", "vmm-core"]),
    ("cli", &["ha-manager/simulator", "proto"]),
    ("tests", &["cluster", "ha-manager", "node-agent", "proto", "vmm-core", "cli"]),
];

/// In place of a crate of another project, under its name and version: `[patch.crates-io]`.
const STAND_IN: &str = "cluster/histogram";

/// What may stand at the top, beside files that begin with a dot.
const TOP_LEVEL: [&str; 15] = [
    "Cargo.toml",
    "Cargo.lock",
    "LICENSE",
    "README.md",
    "clippy.toml",
    "cli",
    "cluster",
    "deny.toml",
    "deploy",
    "ha-manager",
    "node-agent",
    "proto",
    "rustfmt.toml",
    "tests",
    "vmm-core",
];

/// Words that must not occur in the code under a folder (comments do not count).
struct Ban {
    folder: &'static str,
    words: &'static [&'static str],
    reason: &'static str,
}

const CLOCK_AND_CHANCE: &[&str] = &[
    "Instant::now",
    "SystemTime::now",
    "UNIX_EPOCH",
    "HashMap",
    "HashSet",
    "RandomState",
    "getrandom",
    "Uuid::new_v4",
];
const EFFECTS: &[&str] = &[
    "tokio",
    "async fn",
    "async move",
    ".await",
    "std::fs",
    "std::net",
    "std::thread",
    "std::process",
    "thread::spawn",
];

const BANS: [Ban; 10] = [
    Ban {
        folder: "ha-manager/src",
        words: CLOCK_AND_CHANCE,
        reason: "time and order come in as arguments, so that a plan can be repeated",
    },
    Ban { folder: "ha-manager/src", words: EFFECTS, reason: "plans are values; executors act" },
    Ban {
        folder: "ha-manager/simulator/src",
        words: CLOCK_AND_CHANCE,
        reason: "a scenario and its seed are all that a run depends on",
    },
    Ban {
        folder: "ha-manager/simulator/src",
        words: EFFECTS,
        reason: "who asks for a run reads and prints",
    },
    Ban {
        folder: "cluster/src/machine",
        words: CLOCK_AND_CHANCE,
        reason: "every node must apply the same command to the same result",
    },
    Ban { folder: "cluster/src/machine", words: EFFECTS, reason: "apply does no I/O of its own" },
    Ban {
        folder: "vmm-core/src",
        words: &["tokio", "tonic", "hyper::", "cluster::", ".await"],
        reason: "the monitor is a library of threads and system calls; the agent brings gRPC",
    },
    Ban {
        folder: "vmm-core/src/migrate/converge.rs",
        words: &["Instant", "SystemTime", "std::io", "std::net", "tracing", "HashMap"],
        reason: "the decision when to stop is a pure function",
    },
    Ban {
        folder: "vmm-core/src/state",
        words: &["Instant", "SystemTime", "std::fs", "HashMap", "unsafe"],
        reason: "the codec of saved states is pure",
    },
    Ban { folder: "proto/src", words: EFFECTS, reason: "plain types: no I/O, no async" },
];

/// Crates that must not be among a crate's dependencies, tests included.
const CRATE_BANS: [(&str, &[&str]); 3] = [
    ("vmm-core", &["tokio", "tonic", "prost", "hyper", "futures", "async-trait", "openraft"]),
    ("ha-manager", &["tokio", "tonic", "rand", "getrandom", "libc", "nix", "uuid", "futures"]),
    ("cli", &["rocksdb", "openraft", "kvm-ioctls"]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies in the workspace")
        .to_owned()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn manifest(crate_name: &str) -> toml::Table {
    let path = root().join(crate_name).join("Cargo.toml");
    read(&path).parse().unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All dependencies of a manifest, whatever they are for: name and entry.
fn dependencies(manifest: &toml::Table) -> Vec<(String, toml::Value)> {
    let mut tables: Vec<&toml::Table> = vec![manifest];
    let targets = manifest.get("target").and_then(toml::Value::as_table);
    tables.extend(
        targets.into_iter().flat_map(|targets| targets.values()).filter_map(toml::Value::as_table),
    );
    let kinds = ["dependencies", "dev-dependencies", "build-dependencies"];
    let entries =
        tables.into_iter().flat_map(|table| kinds.iter().filter_map(|kind| table.get(*kind)));
    entries
        .filter_map(toml::Value::as_table)
        .flat_map(|table| table.iter().map(|(name, entry)| (name.clone(), entry.clone())))
        .collect()
}

/// All Rust files under a folder, or the file itself.
fn rust_files(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
    let mut files: Vec<PathBuf> =
        entries.flat_map(|entry| rust_files_of(&entry.expect("a folder entry").path())).collect();
    files.sort();
    files
}

fn rust_files_of(path: &Path) -> Vec<PathBuf> {
    let is_rust = path.extension().is_some_and(|extension| extension == "rs");
    if path.is_dir() && !path.ends_with("target") {
        rust_files(path)
    } else if is_rust {
        vec![path.to_owned()]
    } else {
        Vec::new()
    }
}

/// A line without its comment. A `//` inside a text ends the line here too; that hides nothing
/// that a rule of this file looks for.
fn code(line: &str) -> &str {
    line.split_once("//").map_or(line, |(code, _)| code)
}

/// The banned words of a source, as `line: word`.
fn banned_words(source: &str, words: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for (index, line) in source.lines().enumerate() {
        let hits = words.iter().filter(|word| code(line).contains(**word));
        found.extend(hits.map(|word| format!("{}: {word}", index + 1)));
    }
    found
}

/// The lines with an `unsafe` block, function or impl that no `SAFETY` (or `# Safety`) precedes closely.
fn unexplained_unsafe(source: &str) -> Vec<usize> {
    const ABOVE: usize = 12;
    let lines: Vec<&str> = source.lines().collect();
    let is_unsafe = |line: &str| {
        ["unsafe {", "unsafe impl", "unsafe fn"].iter().any(|word| code(line).contains(word))
    };
    let is_explained = |index: usize| {
        let above = &lines[index.saturating_sub(ABOVE)..=index];
        above.iter().any(|line| line.contains("SAFETY:") || line.contains("# Safety"))
    };
    let indexes =
        (0..lines.len()).filter(|index| is_unsafe(lines[*index]) && !is_explained(*index));
    indexes.map(|index| index + 1).collect()
}

fn assert_none(problems: &[String], rule: &str) {
    assert!(problems.is_empty(), "{rule}:\n  {}", problems.join("\n  "));
}

#[test]
fn dependencies_point_one_way() {
    let members: BTreeSet<String> = manifest("")["workspace"]["members"]
        .as_array()
        .expect("members is an array")
        .iter()
        .filter_map(|member| member.as_str().map(str::to_owned))
        .collect();
    let named: BTreeSet<String> = DIRECTIONS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(members, named, "a crate of the workspace has no direction here");
    let mut problems = Vec::new();
    for (name, allowed) in DIRECTIONS {
        for (dependency, _) in dependencies(&manifest(name)) {
            if members.contains(&dependency) && !allowed.contains(&dependency.as_str()) {
                problems.push(format!("{name} depends on {dependency}"));
            }
        }
    }
    for (name, banned) in CRATE_BANS {
        let all = dependencies(&manifest(name));
        let hits = all.iter().filter(|(dependency, _)| banned.contains(&dependency.as_str()));
        problems.extend(hits.map(|(dependency, _)| format!("{name} depends on {dependency}")));
    }
    assert_none(&problems, "only node-agent wires the cores, and the cores stay pure");
}

#[test]
fn versions_and_lints_live_in_the_workspace() {
    let mut problems = Vec::new();
    for (name, _) in DIRECTIONS {
        let manifest = manifest(name);
        for (dependency, entry) in dependencies(&manifest) {
            let inherits = entry.get("workspace").and_then(toml::Value::as_bool) == Some(true);
            let own = ["version", "path", "git"].iter().any(|key| entry.get(key).is_some());
            if !inherits || own {
                problems.push(format!("{name}: {dependency} must be `workspace = true`"));
            }
        }
        let lints = manifest.get("lints").and_then(|lints| lints.get("workspace"));
        if lints.and_then(toml::Value::as_bool) != Some(true) {
            problems.push(format!("{name}: needs `[lints] workspace = true`"));
        }
        for key in ["version", "edition", "rust-version", "license", "publish"] {
            let inherited = manifest["package"].get(key).and_then(|value| value.get("workspace"));
            if (name, key) == (STAND_IN, "version") {
                continue;
            }
            if inherited.is_none() {
                problems.push(format!("{name}: package.{key} must be inherited"));
            }
        }
    }
    let root = manifest("");
    let versions = root["workspace"]["dependencies"].as_table().expect("dependencies is a table");
    let used: BTreeSet<String> = DIRECTIONS
        .iter()
        .flat_map(|(name, _)| dependencies(&manifest(name)))
        .map(|(dependency, _)| dependency)
        .collect();
    let unused = versions.keys().filter(|name| !used.contains(*name) && !is_member(name));
    problems.extend(
        unused.map(|name| format!("{name} is named in the workspace, and no crate uses it")),
    );
    assert_none(&problems, "dependencies, versions and lints are named once, in the workspace");
}

fn is_member(name: &str) -> bool {
    DIRECTIONS.iter().any(|(member, _)| *member == name)
}

#[test]
fn pure_code_stays_pure() {
    let mut problems = Vec::new();
    for Ban { folder, words, reason } in BANS {
        let files = rust_files(&root().join(folder));
        assert!(!files.is_empty(), "{folder} has no Rust file: this rule looks at nothing");
        for file in files {
            let shown = file.strip_prefix(root()).unwrap_or(&file).display().to_string();
            let hits = banned_words(&read(&file), words);
            problems.extend(hits.into_iter().map(|hit| format!("{shown}:{hit} ({reason})")));
        }
    }
    assert_none(&problems, "banned words");
}

#[test]
fn the_pure_crates_lints_ban_clocks_and_hash_maps() {
    let path = root().join("ha-manager/clippy.toml");
    let lints: toml::Table = read(&path).parse().expect("ha-manager/clippy.toml is TOML");
    let paths = |key: &str| -> Vec<String> {
        let entries = lints.get(key).and_then(toml::Value::as_array).into_iter().flatten();
        entries.filter_map(|entry| entry.get("path")?.as_str().map(str::to_owned)).collect()
    };
    for method in ["std::time::Instant::now", "std::time::SystemTime::now"] {
        assert!(
            paths("disallowed-methods").iter().any(|path| path == method),
            "{method} is allowed"
        );
    }
    for kind in ["std::collections::HashMap", "std::collections::HashSet"] {
        assert!(paths("disallowed-types").iter().any(|path| path == kind), "{kind} is allowed");
    }
}

#[test]
fn every_unsafe_says_why_it_is_sound() {
    let mut problems = Vec::new();
    for (name, _) in DIRECTIONS {
        for file in rust_files(&root().join(name)) {
            if file.ends_with("tests/tests/tidy.rs") {
                continue; // names the words it looks for
            }
            let lines = unexplained_unsafe(&read(&file));
            problems.extend(lines.iter().map(|line| format!("{}:{line}", file.display())));
        }
    }
    assert_none(&problems, "`unsafe` without a SAFETY comment");
}

#[test]
fn every_module_says_what_it_owns() {
    let mut problems = Vec::new();
    for (name, _) in DIRECTIONS {
        for file in rust_files(&root().join(name).join("src")) {
            let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            let is_test = stem == "tests"
                || stem.ends_with("_tests")
                || stem.starts_with("test_")
                || file.components().any(|part| part.as_os_str() == "tests" && name != "tests");
            if !is_test && !read(&file).starts_with("//!") {
                problems.push(file.display().to_string());
            }
        }
    }
    assert_none(&problems, "modules without `//!`");
}

#[test]
fn nothing_is_left_to_do() {
    let words = ["todo!", "unimplemented!", "dbg!"];
    let marks = ["TODO", "FIXME", "XXX"];
    let mut problems = Vec::new();
    for (name, _) in DIRECTIONS {
        for file in rust_files(&root().join(name)) {
            if file.ends_with("tests/tests/tidy.rs") {
                continue; // names the words it looks for
            }
            let source = read(&file);
            let hits = banned_words(&source, &words);
            let marked = source.lines().enumerate().filter(|(_, line)| {
                marks.iter().any(|mark| {
                    line.split(|letter: char| !letter.is_ascii_alphanumeric())
                        .any(|word| word == *mark)
                })
            });
            let marked = marked.map(|(index, line)| format!("{}: {}", index + 1, line.trim()));
            problems.extend(
                hits.into_iter().chain(marked).map(|hit| format!("{}:{hit}", file.display())),
            );
        }
    }
    assert_none(&problems, "unfinished code");
}

#[test]
fn the_top_level_holds_what_the_layout_names() {
    let mut stray = Vec::new();
    for name in top_level() {
        if !name.starts_with('.') && !TOP_LEVEL.contains(&name.as_str()) {
            stray.push(name);
        }
    }
    assert_none(&stray, "files at the top that the layout does not know");
}

/// The names at the top: of what git tracks, or of what is there where this is no git clone.
fn top_level() -> BTreeSet<String> {
    let tracked = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output();
    let names: BTreeSet<String> = match tracked {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout)
            .split('\0')
            .filter_map(|path| path.split('/').next().map(str::to_owned))
            .filter(|name| !name.is_empty())
            .collect(),
        _ => {
            let entries = fs::read_dir(root()).expect("the workspace can be listed");
            let names = entries.map(|entry| entry.expect("an entry").file_name());
            names
                .map(|name| name.to_string_lossy().into_owned())
                .filter(|name| name != "target")
                .collect()
        }
    };
    assert!(names.contains("Cargo.toml"), "the workspace was not found");
    names
}

#[test]
fn the_rules_find_what_they_look_for() {
    let source = "fn f() { Instant::now(); }\n// Instant::now in a comment\nlet x = 1;\n";
    assert_eq!(banned_words(source, &["Instant::now"]), ["1: Instant::now"]);
    let bare = "fn f() {\n    unsafe { g() }\n}\n";
    assert_eq!(unexplained_unsafe(bare), [2]);
    let explained = "    // SAFETY: g needs nothing.\n    unsafe { g() }\n";
    assert!(unexplained_unsafe(explained).is_empty());
    let manifest: toml::Table =
        "[dependencies]\na = '1'\n[target.'cfg(unix)'.dev-dependencies]\nb = '1'\n"
            .parse()
            .expect("this is TOML");
    let found: BTreeMap<String, toml::Value> = dependencies(&manifest).into_iter().collect();
    assert_eq!(found.keys().collect::<Vec<_>>(), ["a", "b"]);
}

#[test]
fn what_the_unit_points_to_is_installed() {
    let readme = read(&root().join("README.md"));
    let unit = read(&root().join("deploy/systemd/holdfast-node-agent.service"));
    let value = |key: &str| {
        let line = unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.unwrap_or_else(|| panic!("the unit has no {key}")).to_owned()
    };
    let documentation = value("Documentation");
    let page = documentation.strip_prefix("file:").expect("a local page");
    for path in [page, "/etc/systemd/system/", "/etc/holdfast/node-agent.toml"] {
        assert!(readme.contains(path), "the README's installation does not put {path} there");
    }
    let program = value("ExecStart");
    let folder = Path::new(&program).parent().and_then(Path::to_str).expect("an absolute path");
    assert!(readme.contains(&format!("clusterctl {folder}/")), "{program} is not installed");
}
