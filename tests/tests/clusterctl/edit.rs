//! `config edit`: what the cluster refuses comes back, what somebody else did meanwhile is merged,
//! and no text is lost.

use super::rig::{Node, Ran, WEB, can_run};

/// The file that a message says the text is kept in.
fn kept(ran: &Ran) -> String {
    let line = ran.stderr.lines().find_map(|line| line.split_once("your text is kept in "));
    std::fs::read_to_string(line.unwrap_or_else(|| panic!("nothing kept: {ran:?}")).1).unwrap()
}

#[test]
fn a_refused_text_comes_back_with_the_clusters_reason() {
    if !can_run("a_refused_text_comes_back_with_the_clusters_reason") {
        return;
    }
    let node = Node::with_vm();
    // A key that is unknown, then a pool that is: the second is known to the cluster alone.
    let script = "n=$(cat \"$0.n\" 2>/dev/null || echo 0); echo $((n+1)) >\"$0.n\"\n\
                  case $n in\n\
                  0) sed -i 's/^cpus = 2/cpuss = 4/' \"$1\";;\n\
                  1) grep -q '^#~.*did you mean' \"$1\" && grep -q '^cpuss = 4' \"$1\" || exit 9\n\
                     sed -i -e 's/^cpuss/cpus/' -e 's,shared/,gone/,' \"$1\";;\n\
                  2) grep -q '^#~.*pool `gone`' \"$1\" && grep -q '^cpus = 4 # enough' \"$1\" || exit 9\n\
                     sed -i 's,gone/,shared/,' \"$1\";;\n\
                  *) exit 9;; esac";
    let ran = node.edit(script, "vms/web");
    assert!(ran.stderr.contains("pool `gone`"), "{ran:?}");
    ran.good();
    assert_eq!(node.get("vms/web"), WEB.replace("cpus = 2", "cpus = 4"));
    // Saved as it is, it is given up, and kept.
    let before = node.last_change("vms/web");
    let script = "grep -q '^#~' \"$1\" || sed -i 's/64MiB/64MB/' \"$1\"";
    let ran = node.edit(script, "vms/web");
    ran.refused(2, &["4 | memory = \"64MB\"", "config put vms/web.toml -f"]);
    assert!(kept(&ran).contains("memory = \"64MB\""));
    assert_eq!(node.last_change("vms/web"), before);
    let ran = node.edit("true", "vms/web");
    assert!(ran.stderr.contains("nothing changed"), "{ran:?}");
    // A new one.
    node.edit("echo 'hello' > \"$1\"", "notes/new").good();
    assert_eq!(node.get("notes/new"), "hello\n");
}

#[test]
fn an_edit_that_meets_another_is_shown_all_three_and_merged() {
    if !can_run("an_edit_that_meets_another_is_shown_all_three_and_merged") {
        return;
    }
    let node = Node::with_vm();
    // Other lines: both changes are there, after a second look.
    let script = "if grep -q '^#~' \"$1\"; then\n\
                  grep -q '^#~ -memory = \"64MiB\"' \"$1\" && grep -q '^#~ +memory = \"96MiB\"' \"$1\" || exit 9\n\
                  else sed -i 's/^# the shop/# my shop/' \"$1\"; \"$ctl\" config set vms/web memory=96MiB >&2; fi";
    let ran = node.edit(script, "vms/web");
    assert!(ran.stderr.contains("changed by somebody else"), "{ran:?}");
    ran.good();
    let both = WEB.replace("# the shop", "# my shop").replace("64MiB", "96MiB");
    assert_eq!(node.get("vms/web"), both);
    // The same line: mine, the one it was, and theirs; what is left unresolved is not written.
    let script = "n=$(cat \"$0.n\" 2>/dev/null || echo 0); echo $((n+1)) >\"$0.n\"\n\
                  case $n in\n\
                  0) sed -i 's/^cpus = 2/cpus = 4/' \"$1\"; \"$ctl\" config set vms/web cpus=8 >&2;;\n\
                  1) for line in '^<<<<<<< yours' '^cpus = 4' '^=======' '^cpus = 8' '^>>>>>>>' '^#~ -cpus = 2'; do\n\
                     grep -q \"$line\" \"$1\" || exit 9; done;;\n\
                  *) grep -q '^<<<<<<< yours' \"$1\" || exit 9\n\
                     sed -i -e '/^<<<<<<</,/^=======/d' -e '/^>>>>>>>/d' \"$1\"; echo '# both' >>\"$1\";; esac";
    node.edit(script, "vms/web").good();
    assert_eq!(node.get("vms/web"), format!("{}# both\n", both.replace("cpus = 2", "cpus = 8")));
}

#[test]
fn a_text_that_finds_no_quorum_is_kept() {
    if !can_run("a_text_that_finds_no_quorum_is_kept") {
        return;
    }
    let node = Node::with_vm();
    let mut other = node.join("n2");
    super::rig::wait("both vote", || {
        let status = node.ctl(&["cluster", "status", "-o", "json"]).good();
        status.matches("\"voter\": true").count() == 2
    });
    // The other one is gone while the editor is open.
    let script = format!(
        "sed -i 's/cpus = 2/cpus = 4/' \"$1\"; touch {0}; while [ -e {0} ]; do sleep 0.05; done",
        node.path("open").display()
    );
    let ran = std::thread::scope(|scope| {
        let editing = scope.spawn(|| node.edit(&script, "vms/web"));
        super::rig::wait("the editor is open", || node.path("open").exists());
        other.kill();
        std::fs::remove_file(node.path("open")).unwrap();
        editing.join().unwrap()
    });
    // Refused; or given up while nobody could know yet, which is said.
    assert!(matches!(ran.exit, Some(5 | 6)), "{ran:?}");
    assert!(ran.exit == Some(5) || ran.stderr.contains("the outcome is unknown"), "{ran:?}");
    assert!(kept(&ran).contains("cpus = 4 # enough"), "{ran:?}");
    let stale = node.ctl(&["config", "get", "vms/web", "--stale"]).good();
    assert_eq!(stale, WEB);
    other.start_again();
    super::rig::wait("there is a quorum", || {
        node.ctl(&["config", "get", "vms/web"]).exit == Some(0)
    });
}
