//! `clusterctl config`: each verb against a scripted store, with the ways in which it goes wrong.

mod mock;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use mock::config::{Fault, Store};
use mock::{Mock, Ran, command};

const WEB: &str = "# the shop\nname = \"web\"\ncpus = 2 # enough\nmemory = \"512MiB\"\n\n[boot]\nkernel = \"shared/vmlinuz\"\n";

fn store(mock: &Mock) -> &Store {
    &mock.agent.0.config
}

/// With a VM, a pool and a record of the system's.
fn filled() -> Mock {
    let mock = Mock::start();
    store(&mock).put("vms/web.toml", WEB);
    store(&mock).put("storage.toml", "[pools.shared]\nkind = \"shared-dir\"\n");
    store(&mock).put("notes/readme", "hello\n");
    store(&mock).put("status/vms/web", "{}");
    mock
}

fn good(ran: Ran) -> String {
    assert_eq!(ran.exit, Some(0), "{ran:?}");
    ran.stdout
}

fn json(ran: Ran) -> serde_json::Value {
    serde_json::from_str(&good(ran)).unwrap()
}

/// Refused with this exit code and these words; nothing on stdout.
fn refused(ran: &Ran, exit: i32, words: &[&str]) {
    assert_eq!(ran.exit, Some(exit), "{ran:?}");
    for word in words {
        assert!(ran.stderr.contains(word), "no `{word}`: {ran:?}");
    }
    assert_eq!(ran.stdout, "", "{ran:?}");
}

fn write(folder: &Path, name: &str, content: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, content).unwrap();
    path
}

/// With an editor that is a shell script; `$1` is the file.
fn edit(mock: &Mock, script: &str, arguments: &[&str]) -> Ran {
    let editor = write(mock.folder.path(), "editor", script);
    let mut command = command(mock.folder.path());
    command.env("HOLDFAST_SOCKET", mock.socket()).env("TMPDIR", mock.folder.path());
    command.env("VISUAL", format!("sh {}", editor.display())).env_remove("EDITOR");
    Ran::of(command.args(arguments).output().unwrap())
}

/// The file that a message says the text is kept in.
fn kept(ran: &Ran) -> String {
    let line = ran.stderr.lines().find_map(|line| line.split_once("your text is kept in "));
    std::fs::read_to_string(line.unwrap_or_else(|| panic!("nothing kept: {ran:?}")).1).unwrap()
}

/// Files that the editing left behind.
fn left_behind(mock: &Mock) -> usize {
    let entries = std::fs::read_dir(mock.folder.path()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("clusterctl-")).count()
}

#[test]
fn files_are_listed_and_read_to_the_byte() {
    let mock = filled();
    let list = good(mock.run(&["config", "ls"]));
    assert!(list.contains("vms/web.toml") && !list.contains("status/"), "{list}");
    assert!(good(mock.run(&["config", "ls", "--all"])).contains("status/vms/web"));
    assert!(good(mock.run(&["config", "ls", "status/"])).contains("status/vms/web"));
    for path in ["vms/web", "vms/web.toml", "/vms/web.toml"] {
        assert_eq!(good(mock.run(&["config", "get", path])), WEB);
    }
    store(&mock).put_bytes("notes/raw", b"no newline");
    assert_eq!(good(mock.run(&["config", "get", "notes/raw"])), "no newline");
    store(&mock).put_bytes("notes/raw", b"\xff\0");
    let raw = json(mock.run(&["config", "get", "notes/raw", "-o", "json"]));
    assert_eq!(
        (raw["key"].as_str(), raw["value_base64"].as_str()),
        (Some("notes/raw"), Some("/wA="))
    );
    refused(&mock.run(&["config", "get", "vms/none"]), 3, &["there is no vms/none.toml"]);
}

#[test]
fn a_file_is_put_and_removed() {
    let mock = filled();
    let file = write(mock.folder.path(), "new", "text\n");
    let file = file.to_str().unwrap();
    assert!(
        good(mock.run(&["config", "put", "notes/new", "-f", file, "--dry-run"])).contains("would")
    );
    assert_eq!(store(&mock).get("notes/new"), None);
    let put = json(mock.run(&["config", "put", "notes/new", "-f", file, "-o", "json"]));
    assert_eq!((put["path"].as_str(), put["revision"].as_u64()), (Some("notes/new"), Some(5)));
    assert_eq!(store(&mock).get("notes/new").as_deref(), Some("text\n"));
    // Whatever is there, also what comes between the look and the commit.
    store(&mock).set_rival("notes/new", "theirs");
    good(mock.run(&["config", "put", "notes/new", "-f", file]));
    assert_eq!(store(&mock).get("notes/new").as_deref(), Some("text\n"));
    let late = mock.run(&["config", "put", "notes/new", "-f", file, "--expect", "1"]);
    refused(&late, 4, &["changed in the meantime", "look again"]);
    good(mock.run(&["config", "put", "notes/new", "-f", file, "--expect", "7"]));
    good(mock.run(&["config", "rm", "notes/new"]));
    assert_eq!(store(&mock).get("notes/new"), None);
    refused(&mock.run(&["config", "rm", "notes/new"]), 3, &["there is no notes/new"]);
    refused(&mock.run(&["config", "put", "x", "-f", "/nowhere/x"]), 3, &["/nowhere/x"]);
}

#[test]
fn a_bad_document_is_refused_with_its_place() {
    let mock = filled();
    let file = write(mock.folder.path(), "web.toml", &WEB.replace("512MiB", "2GB"));
    let file = file.to_str().unwrap();
    let place = format!("{file}:4:10");
    let lines = ["4 | memory = \"2GB\"", "|          ^ this is not a size"];
    for arguments in [
        &["config", "put", "vms/web", "-f", file][..],
        &["config", "apply", "-f", file],
        &["config", "apply", "-f", file, "--dry-run"],
    ] {
        refused(&mock.run(arguments), 2, &[&place, lines[0], lines[1]]);
    }
    std::fs::write(file, "name = \n").unwrap();
    refused(&mock.run(&["config", "put", "vms/web", "-f", file]), 2, &[":1:", "1 | name ="]);
    let set = mock.run(&["config", "set", "vms/web", "memory=2GB"]);
    refused(&set, 2, &["vms/web.toml:4:10", lines[0]]);
    assert_eq!(store(&mock).get("vms/web.toml").as_deref(), Some(WEB));
}

#[test]
fn keys_are_set_with_comments_kept_and_the_difference_shown() {
    let mock = filled();
    let arguments = ["config", "set", "vms/web", "memory=2GiB", "disks[+].image=shared/a"];
    let dry = good(mock.run(&[&arguments[..], &["--dry-run"]].concat()));
    assert!(dry.contains("-memory = \"512MiB\"\n+memory = \"2GiB\"\n"), "{dry}");
    assert!(dry.contains("would be changed"), "{dry}");
    assert_eq!(store(&mock).get("vms/web.toml").as_deref(), Some(WEB));
    let done = good(mock.run(&arguments));
    assert!(done.contains("+memory = \"2GiB\"\n") && done.ends_with("revision 5\n"), "{done}");
    let expected = WEB.replace("512MiB", "2GiB") + "\n[[disks]]\nimage = \"shared/a\"\n";
    assert_eq!(store(&mock).get("vms/web.toml"), Some(expected.clone()));
    let again = good(mock.run(&["vm", "set", "web", "memory=2GiB"]));
    assert_eq!((again.as_str(), store(&mock).revision()), ("nothing to change\n", 5));
    good(mock.run(&["vm", "set", "web", "cpus=4", "--unset", "disks[0]"]));
    let now = store(&mock).get("vms/web.toml").unwrap();
    assert!(now.contains("cpus = 4 # enough") && !now.contains("disks"), "{now}");
    for (arguments, exit) in [
        (&["config", "set", "vms/web", "disks[7].image=x"][..], 2),
        (&["config", "set", "vms/web", "memory"], 2),
        (&["config", "set", "vms/web"], 2),
        (&["vm", "set", "../x", "a=1"], 2),
        (&["vm", "set", "none", "a=1"], 3),
    ] {
        assert_eq!(mock.run(arguments).exit, Some(exit), "{arguments:?}");
    }
}

#[test]
fn a_role_is_given_by_setting_it() {
    let mock = filled();
    let done = good(mock.run(&["config", "set", "access/ann", "role=operator"]));
    assert!(done.contains("access/ann.toml") && done.ends_with("revision 5\n"), "{done}");
    let ann = || store(&mock).get("access/ann.toml");
    assert_eq!(ann().as_deref(), Some("role = \"operator\"\n"));
    good(mock.run(&["config", "set", "access/ann", "role=admin"]));
    assert_eq!(ann().as_deref(), Some("role = \"admin\"\n"));
}

#[test]
fn keys_are_set_in_what_somebody_else_made_of_it_meanwhile() {
    let mock = filled();
    let theirs = WEB.replace("cpus = 2", "cpus = 3");
    store(&mock).set_rival("vms/web.toml", &theirs);
    good(mock.run(&["config", "set", "vms/web", "memory=2GiB"]));
    let expected = theirs.replace("512MiB", "2GiB");
    assert_eq!(store(&mock).get("vms/web.toml"), Some(expected));
}

#[test]
fn what_is_edited_is_written() {
    let mock = filled();
    let ran = edit(&mock, "sed -i s/512MiB/1GiB/ \"$1\"", &["vm", "edit", "web"]);
    assert_eq!(good(ran), "vms/web.toml changed (+1 -1)\nrevision 5\n");
    assert_eq!(store(&mock).get("vms/web.toml"), Some(WEB.replace("512MiB", "1GiB")));
    // A new one; the editor replaces the file, and sees how it is called.
    let script = "case \"$1\" in *-new.toml) ;; *) exit 9;; esac\necho 'x = 1' >\"$1.n\"\nmv \"$1.n\" \"$1\"";
    let ran = edit(&mock, script, &["config", "edit", "ha/new"]);
    assert!(good(ran).starts_with("ha/new.toml created"));
    assert_eq!(left_behind(&mock), 0);
}

#[test]
fn nothing_is_written_where_nothing_changed() {
    let mock = filled();
    for script in ["true", "touch \"$1\""] {
        let ran = edit(&mock, script, &["config", "edit", "vms/web"]);
        assert!(ran.stderr.contains("nothing changed"), "{ran:?}");
        good(ran);
    }
    let ran = edit(&mock, "echo more >>\"$1\"; exit 3", &["config", "edit", "notes/readme"]);
    refused(&ran, 1, &["the editor `sh ", "failed"]);
    assert_eq!(kept(&ran), "hello\nmore\n");
    assert_eq!((store(&mock).commits(), store(&mock).revision()), (0, 4));
    store(&mock).put_bytes("notes/raw", b"\xff");
    refused(&edit(&mock, "true", &["config", "edit", "notes/raw"]), 2, &["it is no text"]);
}

#[test]
fn a_refused_text_comes_back_with_the_reason_at_its_top() {
    let mock = filled();
    // Wrong at first; then the reason is there to be read, and it is put right.
    let script = "if grep -q '^#~' \"$1\"; then\n\
                  grep -q '^#~.*4 | memory = \"2GB\"' \"$1\" || exit 9\n\
                  sed -i s/2GB/2GiB/ \"$1\"\nelse sed -i s/512MiB/2GB/ \"$1\"; fi";
    let ran = edit(&mock, script, &["config", "edit", "vms/web"]);
    assert!(ran.stderr.contains("this is not a size"), "{ran:?}");
    good(ran);
    assert_eq!(store(&mock).get("vms/web.toml"), Some(WEB.replace("512MiB", "2GiB")));
    assert_eq!(left_behind(&mock), 0);
}

#[test]
fn a_text_that_is_given_up_is_kept() {
    let mock = filled();
    let script = "grep -q '^#~' \"$1\" || sed -i s/512MiB/2GB/ \"$1\"";
    let ran = edit(&mock, script, &["config", "edit", "vms/web"]);
    refused(&ran, 2, &["this is not a size", "config put vms/web.toml -f"]);
    assert_eq!(kept(&ran), WEB.replace("512MiB", "2GB"));
    assert_eq!(store(&mock).get("vms/web.toml").as_deref(), Some(WEB));
    store(&mock).set_fault(Fault::NoQuorum);
    let ran = edit(&mock, "sed -i s/512MiB/1GiB/ \"$1\"", &["config", "edit", "vms/web"]);
    refused(&ran, 5, &["no quorum"]);
    assert_eq!(kept(&ran), WEB.replace("512MiB", "1GiB"));
}

#[test]
fn an_edit_that_meets_another_is_merged() {
    let mock = filled();
    let theirs = WEB.replace("vmlinuz", "vmlinuz-2");
    store(&mock).set_rival("vms/web.toml", &theirs);
    let script = "if grep -q '^#~' \"$1\"; then grep -q '^#~ +kernel = \"shared/vmlinuz-2\"' \"$1\" || exit 9\n\
                  else sed -i 's/cpus = 2/cpus = 4/' \"$1\"; fi";
    let ran = edit(&mock, script, &["config", "edit", "vms/web"]);
    assert!(ran.stderr.contains("changed by somebody else"), "{ran:?}");
    good(ran);
    let both = theirs.replace("cpus = 2", "cpus = 4");
    assert_eq!(store(&mock).get("vms/web.toml"), Some(both));
}

#[test]
fn changes_of_the_same_line_are_left_to_the_person() {
    let theirs = WEB.replace("cpus = 2", "cpus = 8");
    // Leaves the marks at first, which is refused; then takes the other's line.
    let resolved =
        "sed -i -e '/^<<<<<<</,/^=======/d' -e '/^>>>>>>>/d' \"$1\"; echo '# both' >>\"$1\"";
    for (last, exit) in [(resolved, 0), ("true", 4)] {
        let mock = filled();
        store(&mock).set_rival("vms/web.toml", &theirs);
        let script = format!(
            "n=$(cat \"$0.n\" 2>/dev/null || echo 0); echo $((n+1)) >\"$0.n\"\n\
             case $n in\n0) sed -i 's/cpus = 2/cpus = 4/' \"$1\";;\n\
             1) grep -q '^<<<<<<< yours' \"$1\" || exit 9;;\n\
             *) grep -q 'marks of the merge' \"$1\" || exit 9\n{last};; esac"
        );
        let ran = edit(&mock, &script, &["config", "edit", "vms/web"]);
        assert_eq!(ran.exit, Some(exit), "{ran:?}");
        if exit == 0 {
            assert_eq!(store(&mock).get("vms/web.toml"), Some(format!("{theirs}# both\n")));
        } else {
            assert!(kept(&ran).contains("<<<<<<< yours\ncpus = 4"), "{ran:?}");
            assert_eq!(store(&mock).get("vms/web.toml").as_ref(), Some(&theirs));
        }
    }
}

#[test]
fn a_folder_is_applied_once() {
    let mock = filled();
    let conf = mock.folder.path().join("conf");
    write(&conf, "vms/web.toml", &WEB.replace("cpus = 2", "cpus = 4"));
    write(&conf, "vms/db.toml", WEB);
    write(&conf, "vms/.db.toml.swp", "scratch");
    write(&conf, "storage.toml", "[pools.shared]\nkind = \"shared-dir\"\n");
    std::fs::create_dir(conf.join("empty")).unwrap();
    let apply = |more: &[&str]| {
        mock.run(&[&["config", "apply", "-f", conf.to_str().unwrap()], more].concat())
    };
    let dry = good(apply(&["--dry-run"]));
    assert!(dry.contains("+cpus = 4 # enough") && dry.contains("vms/db.toml would be created"));
    assert_eq!(store(&mock).revision(), 4);
    let done = json(apply(&["-o", "json"]));
    let changes: Vec<_> = done["changes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| (c["change"].as_str().unwrap(), c["path"].as_str().unwrap()))
        .collect();
    let expected = [("created", "empty/"), ("created", "vms/db.toml"), ("changed", "vms/web.toml")];
    assert_eq!(changes, expected);
    assert_eq!((store(&mock).revision(), done["revision"].as_u64()), (5, Some(5)), "one commit");
    assert_eq!(good(apply(&[])), "nothing to change\n");
    assert_eq!(store(&mock).revision(), 5);
    refused(&apply(&["--prune"]), 2, &["notes/readme", "--yes"]);
    assert!(good(apply(&["--prune", "--dry-run"])).contains("notes/readme would be removed"));
    good(apply(&["--prune", "--yes"]));
    let left = ["empty/", "status/vms/web", "storage.toml", "vms/db.toml", "vms/web.toml"];
    assert_eq!(store(&mock).paths(), left);
}

#[test]
fn all_of_an_apply_is_written_or_nothing() {
    let mock = filled();
    let conf = mock.folder.path().join("conf");
    write(&conf, "vms/web.toml", &WEB.replace("cpus = 2", "cpus = 4"));
    let bad = write(&conf, "vms/bad.toml", "memory = \"1GB\"\n");
    let apply = || mock.run(&["config", "apply", "-f", conf.to_str().unwrap()]);
    refused(&apply(), 2, &[&format!("{}:1:10", bad.display())]);
    assert_eq!(store(&mock).get("vms/web.toml").as_deref(), Some(WEB));
    std::fs::remove_file(bad).unwrap();
    store(&mock).set_rival("vms/web.toml", "x = 1\n");
    refused(&apply(), 4, &["vms/web.toml: it was changed in the meantime"]);
    store(&mock).set_fault(Fault::NoQuorum);
    refused(&apply(), 5, &["no quorum", "clusterctl cluster status"]);
    write(&conf, "status/x", "");
    refused(&apply(), 2, &["written by the system"]);
}

#[test]
fn a_single_file_finds_its_place() {
    let mock = filled();
    let file = write(mock.folder.path(), "anything.toml", &WEB.replace("cpus = 2", "cpus = 4"));
    let file = file.to_str().unwrap();
    assert!(good(mock.run(&["config", "apply", "-f", file])).starts_with("vms/web.toml changed"));
    let other = write(mock.folder.path(), "x.txt", "hi\n");
    let other = other.to_str().unwrap();
    refused(&mock.run(&["config", "apply", "-f", other]), 2, &["where does", "name the path"]);
    good(mock.run(&["config", "apply", "notes/x", "-f", other]));
    assert_eq!(store(&mock).get("notes/x").as_deref(), Some("hi\n"));
    refused(&mock.run(&["config", "apply", "-f", other, "--prune"]), 2, &["--prune"]);
}

#[test]
fn what_is_exported_is_applied_without_a_change() {
    let mock = filled();
    store(&mock).put_bytes("notes/raw", b"\xff\0\n");
    store(&mock).put("empty/", "");
    let conf = mock.folder.path().join("conf");
    let folder = conf.to_str().unwrap();
    assert!(good(mock.run(&["config", "export", folder])).starts_with("5 files of revision 6"));
    assert_eq!(std::fs::read(conf.join("notes/raw")).unwrap(), b"\xff\0\n");
    assert!(conf.join("empty").is_dir() && !conf.join("status").exists());
    let apply = good(mock.run(&["config", "apply", "-f", folder, "--prune"]));
    assert_eq!(apply, "nothing to change\n");
    refused(&mock.run(&["config", "export", folder]), 4, &["is not empty", "--force"]);
    good(mock.run(&["config", "export", folder, "--force"]));
}

#[test]
fn differences_are_shown_and_told_by_an_exit_code_where_asked() {
    let mock = filled();
    let file = write(mock.folder.path(), "web.toml", &WEB.replace("cpus = 2", "cpus = 4"));
    let file = file.to_str().unwrap();
    let diff = good(mock.run(&["config", "diff", "-f", file]));
    assert!(diff.contains("-cpus = 2 # enough\n+cpus = 4 # enough\n"), "{diff}");
    assert_eq!(mock.run(&["config", "diff", "-f", file, "--exit-code"]).exit, Some(1));
    std::fs::write(file, WEB).unwrap();
    assert_eq!(good(mock.run(&["config", "diff", "vms/web", "-f", file, "--exit-code"])), "");
    store(&mock).put("vms/web.toml", &WEB.replace("cpus = 2", "cpus = 6"));
    let diff = good(mock.run(&["config", "diff", "vms/web@1..5"]));
    assert!(diff.contains("+cpus = 6"), "{diff}");
    assert_eq!(good(mock.run(&["config", "diff", "vms/web@1"])), diff);
    assert_eq!(good(mock.run(&["config", "diff", "vms/web@1..4"])), "");
    refused(&mock.run(&["config", "diff", "vms/web"]), 2, &["vms/web@12..40"]);
}

#[test]
fn the_past_is_told_shown_and_brought_back() {
    let mock = filled();
    store(&mock).put("vms/web.toml", &WEB.replace("cpus = 2", "cpus = 6"));
    store(&mock).remove("vms/web.toml");
    let history = good(mock.run(&["config", "history", "vms/web"]));
    let rows: Vec<Vec<&str>> =
        history.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[1], ["6", "2023-11-14T22:13:26Z", "ann", "removed", "vms/web.toml"]);
    let verbs: Vec<_> = rows.iter().skip(1).map(|row| (row[0], row[3])).collect();
    assert_eq!(verbs, [("6", "removed"), ("5", "changed"), ("1", "created")]);
    let patch = good(mock.run(&["config", "history", "vms/web", "--patch", "-n", "2"]));
    assert!(
        patch.contains("-cpus = 2 # enough\n+cpus = 6") && !patch.contains("created"),
        "{patch}"
    );
    let all = json(mock.run(&["config", "history", "-o", "json"]));
    let paths: Vec<_> =
        all.as_array().unwrap().iter().map(|c| c["path"].as_str().unwrap()).collect();
    assert_eq!(
        paths,
        ["vms/web.toml", "vms/web.toml", "notes/readme", "storage.toml", "vms/web.toml"]
    );
    assert_eq!(good(mock.run(&["config", "show", "vms/web@4"])), WEB);
    let rollback = good(mock.run(&["config", "rollback", "vms/web", "--to", "4"]));
    assert!(rollback.contains("vms/web.toml created") && rollback.ends_with("revision 7\n"));
    assert_eq!(store(&mock).get("vms/web.toml").as_deref(), Some(WEB));
    let again = good(mock.run(&["config", "rollback", "vms/web", "--to", "4"]));
    assert_eq!(again, "nothing to change\n");
    refused(&mock.run(&["config", "history", "vms/never"]), 3, &["was none"]);
    refused(&mock.run(&["config", "rollback", "vms/web", "--to", "99"]), 2, &["is at revision 7"]);
}

#[test]
fn a_folder_is_brought_back_whole() {
    let mock = filled();
    store(&mock).put("vms/web.toml", "x = 1\n");
    store(&mock).put("vms/new.toml", "x = 1\n");
    refused(&mock.run(&["config", "rollback", "vms/", "--to", "4"]), 2, &["vms/new.toml", "--yes"]);
    good(mock.run(&["config", "rollback", "vms/", "--to", "4", "--yes"]));
    assert_eq!(store(&mock).get("vms/web.toml").as_deref(), Some(WEB));
    assert_eq!(store(&mock).get("vms/new.toml"), None);
    assert_eq!(store(&mock).revision(), 7, "one commit");
}

#[test]
fn a_compacted_past_is_a_clear_refusal() {
    let mock = filled();
    store(&mock).put("vms/web.toml", "x = 1\n");
    store(&mock).compact(5);
    for arguments in [
        &["config", "show", "vms/web@2"][..],
        &["config", "diff", "vms/web@2..5"],
        &["config", "rollback", "vms/web", "--to", "2"],
        &["config", "watch", "--from-revision", "2"],
    ] {
        refused(&mock.run(arguments), 3, &["compacted", "clusterctl config history"]);
    }
    let ran = mock.run(&["config", "history", "vms/web", "--patch"]);
    assert!(ran.stderr.contains("before revision 5 may be missing"), "{ran:?}");
    assert!(good(ran).contains("was before is compacted"));
}

#[test]
fn a_lost_answer_is_asked_for_again_and_written_once() {
    let mock = filled();
    store(&mock).set_fault(Fault::LostAnswers(2));
    let done = good(mock.run(&["config", "set", "vms/web", "cpus=4"]));
    assert!(done.ends_with("revision 5\n"), "{done}");
    assert_eq!(store(&mock).revision(), 5);
    // Somebody else was faster than the answer: nobody knows what became of it.
    store(&mock).set_fault(Fault::LostAnswers(1));
    store(&mock).set_rival("notes/readme", "theirs");
    let file = write(mock.folder.path(), "new", "ours");
    let ran = mock.run(&["config", "put", "notes/readme", "-f", file.to_str().unwrap()]);
    refused(&ran, 4, &["the outcome is unknown", "somebody else"]);
    assert_eq!(store(&mock).get("notes/readme").as_deref(), Some("theirs"));
}

#[test]
fn an_unknown_outcome_is_said_to_be_unknown() {
    let mock = filled();
    store(&mock).set_fault(Fault::Unknown);
    let file = write(mock.folder.path(), "new", "text\n");
    for arguments in [
        &["config", "set", "vms/web", "cpus=4"][..],
        &["config", "put", "notes/new", "-f", file.to_str().unwrap()],
        &["config", "rm", "notes/readme"],
    ] {
        let ran = mock.run(&[arguments, &["--timeout", "600ms"]].concat());
        refused(&ran, 6, &["the outcome is unknown", "may or may not", "config history"]);
    }
    store(&mock).set_fault(Fault::NoQuorum);
    let ran = mock.run(&["config", "set", "vms/web", "cpus=4"]);
    refused(&ran, 5, &["no quorum"]);
    assert!(!ran.stderr.contains("unknown"), "{ran:?}");
}

/// A watch, its lines, and what it says beside them.
struct Watch {
    child: Child,
    lines: std::sync::mpsc::Receiver<serde_json::Value>,
    said: std::sync::mpsc::Receiver<String>,
}

impl Watch {
    fn start(mock: &Mock, arguments: &[&str]) -> Self {
        let mut command = command(mock.folder.path());
        command.env("HOLDFAST_SOCKET", mock.socket()).args(["config", "watch", "-o", "json"]);
        let command = command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (send_line, lines) = std::sync::mpsc::channel();
        let (send_said, said) = std::sync::mpsc::channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let _ = send_line.send(serde_json::from_str(&line).unwrap());
            }
        });
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let _ = send_said.send(line);
            }
        });
        let watch = Self { child, lines, said };
        await_that(|| store(mock).watches() == 1);
        watch
    }

    /// The next line: `put KEY` and the like.
    fn next(&self) -> String {
        let line = self.lines.recv_timeout(Duration::from_secs(20)).unwrap();
        let (verb, rest) = line.as_object().unwrap().iter().next().unwrap();
        match rest["key"].as_str() {
            Some(key) => format!("{verb} {key}"),
            None => format!("{verb} {}", rest["revision"]),
        }
    }

    fn says(&self, words: &str) {
        loop {
            let line = self.said.recv_timeout(Duration::from_secs(20)).unwrap();
            if line.contains(words) {
                return;
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn await_that(condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < Duration::from_secs(20), "waited in vain");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_watch_goes_on_after_a_break_without_loss_or_double() {
    let mock = filled();
    let watch = Watch::start(&mock, &["vms/"]);
    store(&mock).put("vms/a.toml", "x = 1\n");
    store(&mock).put("notes/not-this", "");
    assert_eq!(watch.next(), "put vms/a.toml");
    store(&mock).break_watches();
    store(&mock).put("vms/b.toml", "x = 1\n");
    store(&mock).remove("vms/a.toml");
    watch.says("connection lost");
    assert_eq!(watch.next(), "put vms/b.toml");
    assert_eq!(watch.next(), "deleted vms/a.toml");
    store(&mock).put("vms/c.toml", "x = 1\n");
    assert_eq!(watch.next(), "put vms/c.toml");
}

#[test]
fn a_watch_that_missed_compacted_changes_says_so_and_catches_up() {
    let mock = filled();
    store(&mock).put("vms/gone.toml", "x = 1\n");
    let watch = Watch::start(&mock, &["vms/"]);
    store(&mock).break_watches();
    store(&mock).put("vms/new.toml", "x = 1\n");
    store(&mock).remove("vms/gone.toml");
    store(&mock).compact(8);
    store(&mock).put("notes/x", "");
    watch.says("compacted");
    assert_eq!(watch.next(), "resync 8");
    assert_eq!(watch.next(), "put vms/new.toml");
    assert_eq!(watch.next(), "deleted vms/gone.toml");
    await_that(|| store(&mock).watches() == 1);
    store(&mock).put("vms/later.toml", "x = 1\n");
    assert_eq!(watch.next(), "put vms/later.toml");
}

#[test]
fn documents_are_explained_without_a_cluster() {
    let mock = Mock::start();
    let explain = |arguments: &[&str]| {
        let mut command = command(mock.folder.path());
        Ran::of(command.args(["config", "explain"]).args(arguments).output().unwrap())
    };
    assert!(good(explain(&[])).contains("vms/"));
    let vm = good(explain(&["vm"]));
    assert!(vm.contains("memory  <size, required>"), "{vm}");
    assert!(!vm.contains("cmdline") && good(explain(&["vm", "-r"])).contains("cmdline"), "{vm}");
    let image = json(explain(&["vm.disk.image", "-o", "json"]));
    assert_eq!(image["path"].as_str(), Some("vm.disks.image"));
    refused(&explain(&["vm.disks.cachee"]), 3, &["no `cachee` in `vm.disks`", "image"]);
}

#[test]
fn a_watch_begins_where_it_is_told() {
    let mock = filled();
    let watch = Watch::start(&mock, &["--from-revision", "2", "--all"]);
    for key in ["storage.toml", "notes/readme", "status/vms/web"] {
        assert_eq!(watch.next(), format!("put {key}"));
    }
}
