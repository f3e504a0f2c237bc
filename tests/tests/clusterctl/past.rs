//! `set`, `diff`, `history`, `show`, `rollback`.

use super::rig::{Node, WEB, can_run, wait};

fn memory(node: &Node) -> String {
    node.ctl(&["vm", "show", "web", "-o", "json"]).json()["memory_bytes"].to_string()
}

#[test]
fn a_document_is_set_compared_and_brought_back() {
    if !can_run("a_document_is_set_compared_and_brought_back") {
        return;
    }
    let node = Node::with_vm();
    assert_eq!((node.get("vms/web").as_str(), memory(&node).as_str()), (WEB, "67108864"));
    let first = node.last_change("vms/web");
    let changed = WEB.replace("64MiB", "2GiB");

    let set = ["config", "set", "vms/web", "memory=2GiB"];
    let dry = node.ctl(&[&set[..], &["--dry-run"]].concat()).good();
    assert!(dry.contains("-memory = \"64MiB\"\n+memory = \"2GiB\"\n"), "{dry}");
    assert_eq!(node.last_change("vms/web"), first, "a dry run changes nothing");
    let done = node.ctl(&set).good();
    assert!(done.contains("+memory = \"2GiB\"\n"), "{done}");
    assert_eq!((node.get("vms/web"), memory(&node)), (changed.clone(), (2u64 << 30).to_string()));
    let second = node.last_change("vms/web");
    assert_eq!(node.ctl(&set).good(), "nothing to change\n");
    assert_eq!(node.last_change("vms/web"), second);
    node.ctl(&["config", "set", "vms/web", "cpus=0"]).refused(2, &["vms/web.toml:3:8", "cpus"]);

    let huge = ["config", "set", "vms/web", "memory=8TiB"];
    node.ctl(&huge).refused(2, &["more than any node has", "n1"]);

    // What differs: from what it was, from what it is, from a file.
    let diff = node.ctl(&["config", "diff", &format!("vms/web@{first}..{second}")]).good();
    assert!(diff.contains("-memory = \"64MiB\"\n+memory = \"2GiB\"\n"), "{diff}");
    assert_eq!(node.ctl(&["config", "diff", &format!("vms/web@{first}")]).good(), diff);
    let file = node.path("web.toml").display().to_string();
    let with_file = node.ctl(&["config", "diff", "vms/web", "-f", &file, "--exit-code"]);
    assert_eq!(with_file.exit, Some(1), "{with_file:?}");
    assert!(with_file.stdout.contains("+memory = \"64MiB\""), "{with_file:?}");

    let history = node.ctl(&["config", "history", "vms/web", "-o", "json"]).json();
    let seen: Vec<_> = history.as_array().unwrap().iter().collect();
    let of = |key: &str| -> Vec<String> {
        seen.iter().map(|change| change[key].to_string().replace('"', "")).collect()
    };
    assert_eq!(of("change"), ["changed", "created"]);
    assert_eq!(of("revision"), [second.to_string(), first.to_string()]);
    assert!(of("author").iter().all(|author| !author.is_empty()), "{history}");
    let patch = node.ctl(&["config", "history", "vms/web", "--patch"]).good();
    assert!(patch.contains("+memory = \"2GiB\"") && patch.contains("+# the shop"), "{patch}");
    assert_eq!(node.ctl(&["config", "show", &format!("vms/web@{first}")]).good(), WEB);

    let to = first.to_string();
    let back = ["config", "rollback", "vms/web", "--to", &to];
    assert!(node.ctl(&[&back[..], &["--dry-run"]].concat()).good().contains("+memory = \"64MiB\""));
    assert_eq!(node.last_change("vms/web"), second);
    node.ctl(&back).good();
    assert_eq!((node.get("vms/web").as_str(), memory(&node).as_str()), (WEB, "67108864"));
    assert_eq!(node.ctl(&back).good(), "nothing to change\n");

    // What is brought back is judged as it is now: a VM comes back, of a kernel that is there.
    node.ctl(&["config", "rm", "vms/web"]).good();
    node.ctl(&["vm", "show", "web"]).refused(3, &["web"]);
    node.ctl(&back).good();
    assert_eq!(memory(&node), "67108864");
    let ahead = (node.last_change("vms/web") + 1_000_000).to_string();
    node.ctl(&["config", "rollback", "vms/web", "--to", &ahead]).refused(2, &["is at revision"]);
}

#[test]
fn what_is_compacted_cannot_be_brought_back_and_says_so() {
    if !can_run("what_is_compacted_cannot_be_brought_back_and_says_so") {
        return;
    }
    let node = Node::first("");
    let put = |text: &str| {
        let file = node.write("text", text.as_bytes());
        node.ctl(&["config", "put", "notes/a", "-f", file.to_str().unwrap()]).good();
        node.last_change("notes/a").to_string()
    };
    let first = put("1");
    let last = (put("2"), put("3")).1;
    node.ctl(&["config", "set", "cluster", "history.versions=1", "history.age=1min"]).good();
    let back = || node.ctl(&["config", "rollback", "notes/a", "--to", &first, "--dry-run"]);
    assert_eq!(back().exit, Some(0), "younger than a minute");
    // The least age that may be set is a minute.
    wait("it is compacted", || back().exit != Some(0));
    back().refused(3, &["compacted", "config history notes/a"]);
    let at = format!("notes/a@{first}");
    node.ctl(&["config", "show", &at]).refused(3, &["compacted"]);
    node.ctl(&["config", "diff", &at]).refused(3, &["compacted"]);
    assert_eq!(
        (node.get("notes/a").as_str(), node.last_change("notes/a").to_string()),
        ("3", last)
    );
}
