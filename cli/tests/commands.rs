//! The binary against a scripted agent: what it prints, and its exit codes.

mod mock;

use std::io::Write;
use std::process::Stdio;
use std::sync::atomic::Ordering;

use mock::{Mock, Ran, command};

#[test]
fn a_list_as_table_json_and_yaml() {
    let mock = Mock::start();
    let table = mock.run(&["vm", "list"]);
    assert_eq!(table.exit, Some(0), "{table:?}");
    let lines: Vec<_> = table.stdout.lines().collect();
    assert!(
        lines[0].starts_with("VM ") && lines[1].starts_with("web ") && lines.len() == 3,
        "{table:?}"
    );
    assert!(lines[1].contains("512 MiB"));
    assert_eq!(mock.run(&["vm", "ls"]).stdout, table.stdout);
    let (short, long) = (mock.run(&["node", "ls"]), mock.run(&["node", "list"]));
    assert_eq!((short.exit, short.stderr), (long.exit, long.stderr));
    let json = mock.run(&["-o", "json", "vm", "list"]);
    let json: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(json["vms"][1]["name"], "database");
    assert_eq!(json["vms"][0]["memory_bytes"], 512 << 20);
    let yaml = mock.run(&["vm", "list", "-o", "yaml"]);
    let yaml: serde_json::Value = serde_yaml_ng::from_str(&yaml.stdout).unwrap();
    assert_eq!(yaml, json);
}

#[test]
fn refusals_have_their_exit_codes_reasons_and_remedies() {
    let mock = Mock::start();
    let cases: [(&[&str], i32, &str); 7] = [
        (&["cluster", "status"], 4, "belongs to no cluster yet"),
        (&["vm", "show", "nope"], 3, "there is no VM `nope`"),
        (&["vm", "migrate", "web", "node1"], 4, "is on node1 already"),
        (&["vm", "start", "no-quorum"], 5, "no quorum: 1 of 3 voters answers"),
        (&["vm", "start", "broken"], 1, "kernel shared/vmlinuz is missing"),
        (&["task", "wait", "9-9"], 3, "there is no task 9-9"),
        (&["vm", "strat", "web"], 2, "start"),
    ];
    for (arguments, exit, reason) in cases {
        let ran = mock.run(arguments);
        assert_eq!(ran.exit, Some(exit), "{arguments:?}: {ran:?}");
        assert!(ran.stderr.contains(reason), "{arguments:?}: {ran:?}");
        assert_eq!(ran.stdout, "", "{arguments:?}");
    }
}

#[test]
fn a_node_without_a_cluster_fails_its_status_in_every_format() {
    let mock = Mock::start();
    let ran = mock.run(&["cluster", "status", "-o", "json"]);
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((ran.exit, &json["initialized"]), (Some(4), &false.into()), "{ran:?}");
    assert!(ran.stderr.contains("do: `clusterctl cluster init`"), "{ran:?}");
}

#[test]
fn a_task_is_waited_for_with_its_log_on_stderr() {
    let mock = Mock::start();
    let ran = mock.run(&["vm", "start", "web"]);
    assert_eq!((ran.exit, ran.stdout.as_str()), (Some(0), "done: start vm web (1.5 s)\n"));
    assert_eq!(ran.stderr, "first\nround 1\n");
    let ran = mock.run(&["vm", "start", "web", "--no-wait"]);
    assert_eq!((ran.exit, ran.stdout.as_str()), (Some(0), "1-1\n"));
}

#[test]
fn a_migration_prints_exactly_its_figures() {
    let mock = Mock::start();
    let ran = mock.run(&["vm", "migrate", "web", "node2", "-o", "json"]);
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let expected = serde_json::json!(
        {"total_ms": 1400, "downtime_ms": 64, "bytes": 268_435_456, "rounds": 4}
    );
    assert_eq!(json, expected);
}

#[test]
fn a_connection_that_breaks_is_made_again_and_the_log_not_repeated() {
    let mock = Mock::start();
    let ran = mock.run(&["vm", "start", "flaky"]);
    assert_eq!(ran.exit, Some(0), "{ran:?}");
    assert_eq!(ran.stderr, "first\nconnection lost, trying again …\nsecond\n");
    assert_eq!(mock.agent.0.follows.load(Ordering::SeqCst), 2);
}

#[test]
fn a_time_limit_ends_the_waiting_not_the_task() {
    let mock = Mock::start();
    let ran = mock.run(&["vm", "start", "slow", "--timeout", "300ms"]);
    assert_eq!(ran.exit, Some(6), "{ran:?}");
    assert!(ran.stderr.contains("task 1-4 goes on"), "{ran:?}");
    assert_eq!(mock.agent.0.cancels.load(Ordering::SeqCst), 0);
}

#[test]
fn ctrl_c_leaves_the_task_and_says_how_to_go_on() {
    let mock = Mock::start();
    let mut command = command(mock.folder.path());
    command.env("HOLDFAST_SOCKET", mock.socket()).args(["vm", "start", "slow"]);
    let mut child = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // Its first line of log says that it waits.
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut stderr, &mut line).unwrap();
    assert_eq!(line, "first\n");
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut stderr, &mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest}");
    assert!(
        rest.contains("clusterctl task wait 1-4") && rest.contains("task cancel 1-4"),
        "{rest}"
    );
}

#[test]
fn documents_are_judged_by_the_cluster() {
    let mock = Mock::start();
    let file = mock.folder.path().join("web.toml");
    let good = "name = \"web\"\nmemory = \"512MiB\"\n[boot]\nkernel = \"shared/vmlinuz\"\n";
    std::fs::write(&file, good.replace("memory", "memry")).unwrap();
    let file = file.to_str().unwrap();
    let ran = mock.run(&["vm", "create", "-f", file]);
    assert_eq!(ran.exit, Some(2), "{ran:?}");
    assert!(ran.stderr.contains("line 2") && ran.stderr.contains("memry"), "{ran:?}");
    std::fs::write(file, good).unwrap();
    let ran = mock.run(&["vm", "create", "-f", file, "--dry-run"]);
    assert_eq!((ran.exit, ran.stdout.as_str()), (Some(0), "vm web could be created on node1\n"));
    let ran = mock.run(&["vm", "create", "-f", file, "--start"]);
    assert_eq!(ran.stdout, "vm web created and started on node1\n");
    let ran = mock.run(&["vm", "create", "-f", "/nowhere/web.toml"]);
    assert_eq!(ran.exit, Some(3), "{ran:?}");
}

#[test]
fn an_image_is_imported_whole() {
    let mock = Mock::start();
    let file = mock.folder.path().join("vmlinuz");
    let bytes: Vec<u8> = (0..700_001_u32).map(|n| n.to_le_bytes()[0]).collect();
    std::fs::write(&file, &bytes).unwrap();
    let import = |pool: &str| {
        let file = file.to_str().unwrap();
        mock.run(&[
            "image", "import", file, "--pool", pool, "--name", "vmlinuz", "--kind", "kernel",
        ])
    };
    let ran = import("shared");
    assert_eq!(ran.exit, Some(0), "{ran:?}");
    assert!(*mock.agent.0.imported.lock().unwrap() == bytes);
    let ran = import("full");
    assert_eq!(ran.exit, Some(4), "{ran:?}");
    assert!(ran.stderr.contains("no space left"), "{ran:?}");
}

#[test]
fn an_image_has_its_files_name_and_its_contents_kind_unless_said() {
    let mock = Mock::start();
    let file = mock.folder.path().join("vmlinuz-6.1");
    std::fs::write(&file, "x").unwrap();
    let ran = mock.run(&["image", "import", file.to_str().unwrap(), "--pool", "shared"]);
    assert_eq!(ran.exit, Some(0), "{ran:?}");
    let header = mock.agent.0.header.lock().unwrap().clone();
    assert_eq!((header.name.as_str(), header.kind.as_str()), ("vmlinuz-6.1", ""));
    let odd = mock.folder.path().join("my kernel");
    std::fs::write(&odd, "x").unwrap();
    let ran = mock.run(&["image", "import", odd.to_str().unwrap(), "--pool", "shared"]);
    assert_eq!(ran.exit, Some(2), "{ran:?}");
    assert!(ran.stderr.contains("--name"), "{ran:?}");
    let list = mock.run(&["image", "list"]).stdout;
    let rows: Vec<Vec<&str>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[1][..2], ["shared/vmlinuz", "kernel"], "{list}");
    assert_eq!(rows[2][..2], ["shared/odd", "unknown"], "{list}");
}

#[test]
fn a_document_may_stand_without_its_flag() {
    let mock = Mock::start();
    let file = mock.folder.path().join("web.toml");
    std::fs::write(&file, "name = \"web\"\nmemory = \"1GiB\"\n[boot]\nkernel = \"a/b\"\n").unwrap();
    let file = file.to_str().unwrap();
    for arguments in
        [&["vm", "create", file, "--dry-run"][..], &["vm", "create", "--dry-run", "-f", file]]
    {
        let ran = mock.run(arguments);
        assert_eq!(ran.stdout, "vm web could be created on node1\n", "{ran:?}");
    }
    assert_eq!(mock.run(&["vm", "create"]).exit, Some(2));
    assert_eq!(mock.run(&["vm", "create", file, "-f", file]).exit, Some(2));
    std::fs::write(file, "name = \"web\"\ncpu = 2\nmemory = \"1GiB\"\n[boot]\nkernel = \"a/b\"\n")
        .unwrap();
    let ran = mock.run(&["vm", "create", file]);
    assert_eq!(ran.exit, Some(2), "{ran:?}");
    assert!(ran.stderr.contains("write `cpus = 2`"), "{ran:?}");
}

#[test]
fn a_refused_join_gives_no_advice_about_contexts() {
    let mock = Mock::start();
    let ran = mock.run(&["cluster", "join", "TOKEN"]);
    assert_eq!(ran.exit, Some(4), "{ran:?}");
    assert!(ran.stderr.contains("the token was used already"), "{ran:?}");
    assert!(!ran.stderr.contains("context"), "{ran:?}");
}

#[test]
fn the_log_of_a_task_is_read_no_longer_than_asked() {
    let mock = Mock::start();
    let ran = mock.run(&["task", "log", "1-4", "--timeout", "300ms"]);
    assert_eq!((ran.exit, ran.stdout.as_str()), (Some(6), "first\n"), "{ran:?}");
    assert!(ran.stderr.contains("the time limit passed"), "{ran:?}");
    let ran = mock.run(&["task", "log", "1-1", "--timeout", "60s"]);
    assert_eq!((ran.exit, ran.stdout.as_str()), (Some(0), "first\n"), "{ran:?}");
}

#[test]
fn a_list_of_tasks_notes_what_runs_and_what_failed() {
    let mock = Mock::start();
    let list = mock.run(&["task", "list"]).stdout;
    let notes: Vec<_> = list.lines().skip(1).map(|line| line.split("  ").last().unwrap()).collect();
    assert_eq!(notes, ["round 1", "kernel shared/vmlinuz is missing", "-"], "{list}");
}

#[test]
fn a_pools_folder_is_made_only_where_asked() {
    let mock = Mock::start();
    let create = |more: &[&str]| {
        let pool = ["storage", "create", "new", "--path", "/missing"];
        mock.run(&[&pool, more].concat())
    };
    let ran = create(&["--kind", "shared-dir"]);
    assert_eq!(ran.exit, Some(4), "{ran:?}");
    assert!(ran.stderr.contains("--create"), "{ran:?}");
    assert_eq!(create(&["--kind", "shared-dir", "--create"]).exit, Some(0));
    let ran = create(&["--kind", "local-dir", "--create"]);
    assert!(ran.stderr.contains("each node makes /missing"), "{ran:?}");
}

#[test]
fn pools_and_networks_are_deleted_unless_they_are_used() {
    let mock = Mock::start();
    for noun in ["storage", "network"] {
        let ran = mock.run(&[noun, "delete", "old"]);
        assert_eq!(ran.exit, Some(0), "{ran:?}");
        let ran = mock.run(&[noun, "delete", "used"]);
        assert_eq!(ran.exit, Some(4), "{ran:?}");
        assert!(ran.stderr.contains("is used by VM `web`"), "{ran:?}");
    }
}

#[test]
fn consoles_and_logs_are_passed_on_as_they_are() {
    let mock = Mock::start();
    assert_eq!(mock.run(&["vm", "log", "web"]).stdout, "boot\r\nlogin: ");
    let mut command = command(mock.folder.path());
    command.env("HOLDFAST_SOCKET", mock.socket()).args(["vm", "console", "web"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"hello\n").unwrap();
    let mut echo = [0; 6];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut echo).unwrap();
    assert_eq!(&echo, b"HELLO\n");
    stdin.write_all(b"q").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn no_agent_is_a_clear_refusal() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = folder.path().join("none.sock");
    let run =
        |arguments: &[&str]| Ran::of(command(folder.path()).args(arguments).output().unwrap());
    let ran = run(&["--socket", nowhere.to_str().unwrap(), "vm", "list"]);
    assert_eq!(ran.exit, Some(5), "{ran:?}");
    assert!(
        ran.stderr.contains("no agent runs there") && ran.stderr.contains("--socket"),
        "{ran:?}"
    );
    let ran = run(&["--context", "prod", "vm", "list"]);
    assert_eq!(ran.exit, Some(3), "{ran:?}");
    assert_eq!(run(&["version"]).exit, Some(0));
    assert!(run(&["completion", "bash"]).stdout.contains("_clusterctl"));
}

#[test]
fn copies_that_differ_are_a_failure_that_names_the_node() {
    let mock = Mock::start();
    let member = |node: &str, outcome: &str, detail: &str| proto::v1::MemberVerification {
        node: node.to_owned(),
        outcome: outcome.to_owned(),
        detail: detail.to_owned(),
        checksum: "0123456789abcdef0123".to_owned(),
        ..proto::v1::MemberVerification::default()
    };
    let same = vec![member("node1", "same", ""), member("node2", "same", "")];
    let found = |members, differs, summary: &str| proto::v1::Verification {
        revision: 42,
        log_index: 57,
        members,
        differs,
        summary: summary.to_owned(),
        ..proto::v1::Verification::default()
    };
    let set = |found| *mock.agent.0.verification.lock().unwrap() = found;
    set(found(same.clone(), false, "2 of 2 copies are the same"));
    let ran = mock.run(&["cluster", "verify"]);
    assert_eq!(ran.exit, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("node2  same  0123456789abcdef  -"), "{ran:?}");
    assert!(ran.stdout.contains("revision 42, log index 57: 2 of 2"), "{ran:?}");

    let mut members = same;
    members.push(member("node3", "differs", "its data differ"));
    set(found(members.clone(), true, "THE COPIES DIFFER: node3 (its data differ)"));
    let ran = mock.run(&["cluster", "verify"]);
    assert_eq!(ran.exit, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("node3 (its data differ)"), "{ran:?}");
    let json = mock.run(&["-o", "json", "cluster", "verify"]);
    assert_eq!(json.exit, Some(1));
    assert!(json.stdout.contains(r#""outcome": "differs""#), "{json:?}");

    members[2].outcome = "faulty".to_owned();
    let summary = "A COPY IS DAMAGED: node3 (its copy cannot be read: Corruption)";
    set(proto::v1::Verification { faulty: true, ..found(members.clone(), false, summary) });
    let ran = mock.run(&["cluster", "verify"]);
    assert_eq!(ran.exit, Some(1), "{ran:?}");
    assert!(ran.stdout.contains("node3  faulty"), "{ran:?}");
    assert!(
        ran.stderr.contains("a copy cannot be read") && ran.stderr.contains(summary),
        "{ran:?}"
    );

    members[2].outcome = "unknown".to_owned();
    set(found(members, false, "2 of 3 copies are the same; not compared: node3 (it is off)"));
    let ran = mock.run(&["cluster", "verify"]);
    assert_eq!(ran.exit, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("not every copy was compared"), "{ran:?}");
}

#[test]
fn one_is_told_who_one_is_and_what_one_may_do() {
    let mock = Mock::start();
    let ran = mock.run(&["cluster", "whoami"]);
    assert_eq!(ran.exit, Some(0), "{ran:?}");
    for words in ["client ann", "viewer", "access/ann.toml"] {
        assert!(ran.stdout.contains(words), "{ran:?}");
    }
    assert!(!ran.stdout.contains("Vms.Start"), "{ran:?}");
    let ran = mock.run(&["cluster", "whoami", "--calls"]);
    let last: Vec<_> = ran.stdout.lines().last().unwrap_or_default().split_whitespace().collect();
    assert_eq!(last, ["Vms.Start", "operator", "no", "-"], "{ran:?}");
    let json = mock.run(&["cluster", "whoami", "-o", "json"]);
    let json: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!((&json["role"], &json["calls"][0]["allowed"]), (&"viewer".into(), &true.into()));
}

#[test]
fn certificates_are_listed_renewed_and_revoked() {
    let mock = Mock::start();
    let ran = mock.run(&["cluster", "cert", "list"]);
    assert_eq!(ran.exit, Some(0), "{ran:?}");
    let lines: Vec<_> = ran.stdout.lines().collect();
    assert!(lines[0].starts_with("HOLDER ") && lines[1].starts_with("CA of lab "), "{ran:?}");
    assert!(lines[2].starts_with("node node1 (id 1) "), "{ran:?}");
    assert!(lines[2].contains("4a01") && lines[2].contains("expiring soon"), "{ran:?}");
    assert!(lines[2].contains("3 h ago") && lines[2].contains("in 29 h"), "{ran:?}");
    assert!(lines[3].starts_with("client ann ") && lines[3].contains("revoked"), "{ran:?}");
    assert!(ran.stdout.contains("node1 has no new certificate yet: no leader is known"), "{ran:?}");
    let json = mock.run(&["cluster", "cert", "list", "-o", "json"]);
    let json: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(json["certificates"][1]["state"], "expiring");
    assert_eq!(json["certificates"][2]["serial"], "4b02");

    let ran = mock.run(&["cluster", "cert", "renew", "node1"]);
    assert_eq!(ran.exit, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("node1") && ran.stdout.contains("4d04"), "{ran:?}");
    // What did not work out is in the answer and in the exit code.
    let ran = mock.run(&["cluster", "cert", "renew"]);
    assert_eq!(ran.exit, Some(1), "{ran:?}");
    assert!(ran.stdout.contains("4d04") && ran.stdout.contains("connection refused"), "{ran:?}");
    assert!(ran.stderr.contains("node2"), "{ran:?}");
    assert_eq!(mock.run(&["cluster", "cert", "renew", "node9"]).exit, Some(3));

    let ran = mock.run(&["cluster", "cert", "revoke", "ann"]);
    assert_eq!(ran.exit, Some(0), "{ran:?}");
    assert_eq!(ran.stdout, "revoked: client ann, serial 4b02\n");
    let ran = mock.run(&["cluster", "cert", "revoke", "bob"]);
    assert_eq!(ran.exit, Some(3), "{ran:?}");
    assert!(ran.stderr.contains("client `bob`"), "{ran:?}");
    for what in ["list", "renew", "revoke"] {
        let ran = mock.run(&["cluster", "cert", what, "--help"]);
        assert!(ran.stdout.contains("Examples:"), "{ran:?}");
    }
}

#[test]
fn the_ca_is_rotated_and_what_it_waits_for_is_shown() {
    let mock = Mock::start();
    let ran = mock.run(&["cluster", "ca", "status"]);
    assert!(ran.exit == Some(0) && ran.stdout.contains("stable"), "{ran:?}");
    // Nobody can be asked here.
    let ran = mock.run(&["cluster", "ca", "rotate"]);
    assert!(ran.exit == Some(2) && ran.stderr.contains("--yes"), "{ran:?}");
    assert_eq!(mock.agent.0.ca.lock().unwrap().phase, "stable");
    let ran = mock.run(&["cluster", "ca", "rotate", "--finish", "--yes"]);
    assert!(ran.exit == Some(0) && ran.stderr.contains("nothing to finish"), "{ran:?}");
    let ran = mock.run(&["cluster", "ca", "rotate", "--yes", "--no-wait"]);
    assert!(ran.exit == Some(0) && ran.stdout.contains("trusting: "), "{ran:?}");
    let ran = mock.run(&["cluster", "ca", "rotate", "--finish", "--yes"]);
    assert!(ran.exit != Some(0) && ran.stderr.contains("waits for node3"), "{ran:?}");
    let ran = mock.run(&["cluster", "ca", "rotate", "--yes"]);
    assert_eq!(ran.exit, Some(0), "{ran:?}");
    let shown: Vec<_> = ran.stderr.lines().collect();
    assert!(
        shown[0].starts_with("trusting: ") && shown[0].contains("waiting for node3"),
        "{ran:?}"
    );
    assert!(shown[1].starts_with("renewing: "), "{ran:?}");
    assert!(ran.stdout.contains("renewed: ") && ran.stdout.contains("ann"), "{ran:?}");
    // It locks ann out: that is confirmed.
    let ran = mock.run(&["cluster", "ca", "rotate", "--finish"]);
    assert!(ran.exit == Some(2) && ran.stderr.contains("--yes"), "{ran:?}");
    let ran = mock.run(&["cluster", "ca", "rotate", "--finish", "--yes"]);
    assert!(ran.exit == Some(0) && ran.stderr.contains("WILL BE LOCKED OUT: ann"), "{ran:?}");
    // The local agent asks for no certificate.
    let ran = mock.run(&["context", "renew"]);
    assert!(ran.exit == Some(3) && ran.stderr.contains("needs no certificate"), "{ran:?}");
}
