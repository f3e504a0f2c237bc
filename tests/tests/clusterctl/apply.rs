//! `apply` and `export`: what is applied twice changes nothing the second time.

use super::rig::{Node, WEB, can_run};

#[test]
fn a_folder_is_applied_pruned_and_exported_and_the_second_time_nothing_changes() {
    if !can_run("a_folder_is_applied_pruned_and_exported_and_the_second_time_nothing_changes") {
        return;
    }
    let node = Node::with_vm();
    let storage = node.get("storage");
    node.write("conf/storage.toml", storage.as_bytes());
    node.write("conf/networks.toml", b"[networks.lan]\nbridge = \"hf-e2e\"\n");
    node.write("conf/vms/web.toml", WEB.replace("cpus = 2", "cpus = 4").as_bytes());
    // It names a network that comes in the same commit.
    let db = format!("{}[[nics]]\nnetwork = \"lan\"\n", WEB.replace("\"web\"", "\"db\""));
    node.write("conf/vms/db.toml", db.as_bytes());
    node.write("conf/notes/raw", b"\xff\0\n");
    std::fs::create_dir(node.path("conf/empty")).unwrap();
    let conf = node.path("conf").display().to_string();
    let apply =
        |more: &[&str]| node.ctl(&[&["config", "apply", "-f", conf.as_str()][..], more].concat());

    let before = node.files();
    let dry = apply(&["--dry-run"]).good();
    assert!(dry.contains("+cpus = 4 # enough") && dry.contains("vms/db.toml would be created"));
    assert_eq!(node.files(), before, "a dry run changes nothing");
    let done = apply(&["-o", "json"]).json();
    assert_eq!(done["changes"].as_array().unwrap().len(), 5, "{done}");
    let vms = node.ctl(&["vm", "list", "-o", "json"]).good();
    assert!(vms.contains("\"db\"") && vms.contains("\"web\""), "{vms}");
    let after = node.files();
    assert_eq!(apply(&[]).good(), "nothing to change\n");
    assert_eq!(apply(&["--prune"]).good(), "nothing to change\n");
    assert_eq!(node.files(), after, "no revision is new");

    // What is exported is what was applied, byte for byte.
    let out = node.path("out").display().to_string();
    node.ctl(&["config", "export", &out]).good();
    let compare = std::process::Command::new("diff").args(["-r", &conf, &out]).output().unwrap();
    assert!(compare.status.success(), "{}", String::from_utf8_lossy(&compare.stdout));
    assert_eq!(node.ctl(&["config", "apply", "-f", &out, "--prune"]).good(), "nothing to change\n");

    // One bad document of several, and nothing is written.
    node.write("conf/vms/bad.toml", b"name = \"bad\"\nmemory = \"1GB\"\n");
    node.write("conf/notes/more", b"x");
    apply(&[]).refused(2, &["conf/vms/bad.toml:2:10"]);
    assert_eq!(node.files(), after);
    std::fs::remove_file(node.path("conf/vms/bad.toml")).unwrap();

    // Pruning asks; then the VM goes with its document.
    std::fs::remove_file(node.path("conf/vms/db.toml")).unwrap();
    apply(&["--prune"]).refused(2, &["vms/db.toml", "--yes"]);
    assert!(apply(&["--prune", "--dry-run"]).good().contains("vms/db.toml would be removed"));
    apply(&["--prune", "--yes"]).good();
    assert_eq!(apply(&["--prune", "--yes"]).good(), "nothing to change\n");
    let vms = node.ctl(&["vm", "list", "-o", "json"]).good();
    assert!(!vms.contains("\"db\"") && vms.contains("\"web\""), "{vms}");
}
