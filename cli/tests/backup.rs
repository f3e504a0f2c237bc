//! `cluster backup` against a scripted agent: the file is whole, or it is not there.

mod mock;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use mock::{BackupEnd, Mock, Ran, command};
use proto::backup::{Header, Reader, Writer};

fn backup(keys: usize) -> Vec<u8> {
    let header = Header {
        cluster_name: "prod".to_owned(),
        cluster_id: "c1".to_owned(),
        revision: 42,
        at_unix_ms: 1,
        node: "n1".to_owned(),
        agent_version: "0.1.0".to_owned(),
        about_bytes: 1000,
    };
    let (mut writer, mut bytes) = Writer::begin(&header).unwrap();
    for number in 0..keys {
        let ready = writer.row(&format!("vms/{number:06}.toml"), &[b'x'; 500]).unwrap();
        bytes.extend(ready.unwrap_or_default());
    }
    bytes.extend(writer.finish());
    bytes
}

/// The names in a folder but for the socket and clusterctl's own.
fn files(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> =
        names.filter(|name| name != "agent.sock" && name != "config").collect();
    names.sort();
    names
}

fn run(mock: &Mock, arguments: &[&str]) -> Ran {
    let mut command = command(mock.folder.path());
    command.env("HOLDFAST_SOCKET", mock.socket()).current_dir(mock.folder.path());
    Ran::of(command.args(["cluster", "backup"]).args(arguments).output().unwrap())
}

#[test]
fn the_file_is_what_was_sent_and_for_its_owner_alone() {
    let mock = Mock::start();
    let bytes = backup(2000);
    *mock.agent.0.backup.lock().unwrap() = (bytes.clone(), BackupEnd::Ends);
    let ran = run(&mock, &["prod.hfb"]);
    assert_eq!(ran.exit, Some(0), "{ran:?}");
    assert!(
        ran.stdout.contains("revision  42") && ran.stdout.contains("keys      2000"),
        "{ran:?}"
    );
    let path = mock.folder.path().join("prod.hfb");
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(files(mock.folder.path()), ["prod.hfb"]);
    let mut reader = Reader::default();
    assert_eq!(reader.push(&bytes).unwrap().len(), 2000);

    let again = run(&mock, &["prod.hfb"]);
    assert_eq!(again.exit, Some(4), "{again:?}");
    assert!(again.stderr.contains("--force"), "{again:?}");
    let ran = run(&mock, &["none/prod.hfb"]);
    assert_eq!(ran.exit, Some(3), "{ran:?}");
    assert!(
        ran.stderr.contains("no folder none") && ran.stderr.contains("mkdir -p none"),
        "{ran:?}"
    );
    *mock.agent.0.backup.lock().unwrap() = (backup(1), BackupEnd::Ends);
    let forced = run(&mock, &["prod.hfb", "--force", "-o", "json"]);
    assert_eq!(forced.exit, Some(0), "{forced:?}");
    let json: serde_json::Value = serde_json::from_str(&forced.stdout).unwrap();
    assert_eq!((json["keys"].as_u64(), json["cluster_name"].as_str()), (Some(1), Some("prod")));
    assert_eq!(std::fs::read(&path).unwrap(), backup(1));
}

#[test]
fn what_does_not_come_whole_leaves_no_file_and_keeps_the_old_one() {
    let mock = Mock::start();
    let path = mock.folder.path().join("prod.hfb");
    std::fs::write(&path, "the old one").unwrap();
    let (whole, mut wrong) = (backup(100), backup(100));
    wrong[20_000] ^= 1;
    let cases = [
        (whole[..30_000].to_vec(), BackupEnd::Ends, "cut off"),
        (Vec::new(), BackupEnd::Ends, "cut off"),
        (wrong, BackupEnd::Ends, "damaged"),
        (whole[..30_000].to_vec(), BackupEnd::Breaks, "its disk failed"),
        (b"something else".to_vec(), BackupEnd::Ends, "not a backup"),
    ];
    for (bytes, end, expected) in cases {
        *mock.agent.0.backup.lock().unwrap() = (bytes, end);
        let ran = run(&mock, &["--force", "prod.hfb"]);
        assert_eq!(ran.exit, Some(1), "{ran:?}");
        assert!(ran.stderr.contains(expected), "{ran:?}");
        assert_eq!(files(mock.folder.path()), ["prod.hfb"]);
        assert_eq!(std::fs::read(&path).unwrap(), b"the old one");
    }
}

#[test]
fn ctrl_c_and_the_time_limit_leave_no_half_file() {
    let mock = Mock::start();
    *mock.agent.0.backup.lock().unwrap() = (backup(100)[..30_000].to_vec(), BackupEnd::Stalls);
    let ran = run(&mock, &["prod.hfb", "--timeout", "1s"]);
    assert_eq!(ran.exit, Some(6), "{ran:?}");
    assert_eq!(files(mock.folder.path()), [""; 0]);

    let mut command = command(mock.folder.path());
    command.env("HOLDFAST_SOCKET", mock.socket()).current_dir(mock.folder.path());
    command.stderr(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let child = command.args(["cluster", "backup", "prod.hfb"]).spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    // Once it writes, it also listens for the signal.
    while !files(mock.folder.path()).iter().any(|name| {
        std::fs::metadata(mock.folder.path().join(name)).is_ok_and(|file| file.len() == 30_000)
    }) {
        assert!(Instant::now() < until, "it writes nothing");
        std::thread::sleep(Duration::from_millis(10));
    }
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!(ran.exit, Some(130), "{ran:?}");
    assert!(ran.stderr.contains("no file was left"), "{ran:?}");
    assert_eq!(files(mock.folder.path()), [""; 0]);
}

#[test]
fn a_restore_sends_the_file_as_it_is_and_says_what_must_be_off() {
    let mock = Mock::start();
    let (path, bytes) = (mock.folder.path().join("prod.hfb"), backup(2000));
    std::fs::write(&path, &bytes).unwrap();
    let file = path.to_str().unwrap();
    let ran = mock.run(&["cluster", "restore", file, "--name", "prod2", "--yes"]);
    assert_eq!(ran.exit, Some(0), "{ran:?}");
    assert_eq!(*mock.agent.0.restored.lock().unwrap(), bytes);
    assert!(ran.stderr.contains("ALL VMS OF THE OLD CLUSTER MUST BE OFF"), "{ran:?}");
    assert!(ran.stderr.contains("backup of  prod (c1)"), "{ran:?}");
    assert!(ran.stdout.contains("3, all stopped") && ran.stdout.contains("prod2"), "{ran:?}");

    let refused = mock.run(&["cluster", "restore", file, "--name", "member", "--yes"]);
    assert_eq!(refused.exit, Some(4), "{refused:?}");
    assert!(refused.stderr.contains("already belongs"), "{refused:?}");
}

#[test]
fn nothing_is_sent_of_a_file_that_is_not_good_or_without_consent() {
    let mock = Mock::start();
    let path = mock.folder.path().join("prod.hfb");
    let file = path.to_str().unwrap();
    let bytes = backup(100);
    let (mut wrong, mut newer) = (bytes.clone(), bytes.clone());
    wrong[20_000] ^= 1;
    newer[8] = 9;
    let cases = [
        (bytes[..30_000].to_vec(), "cut off"),
        (Vec::new(), "cut off"),
        (wrong, "damaged"),
        (newer, "format 9"),
        (b"[package]\nname = \"x\"\n".to_vec(), "not a backup"),
    ];
    for (content, expected) in cases {
        std::fs::write(&path, content).unwrap();
        let ran = mock.run(&["cluster", "restore", file, "--yes"]);
        assert_eq!(ran.exit, Some(2), "{ran:?}");
        assert!(
            ran.stderr.contains(expected) && ran.stderr.contains("nothing was changed"),
            "{ran:?}"
        );
    }
    std::fs::write(&path, &bytes).unwrap();
    let unasked = mock.run(&["cluster", "restore", file]);
    assert_eq!(unasked.exit, Some(2), "{unasked:?}");
    assert!(unasked.stderr.contains("--yes"), "{unasked:?}");
    let missing = mock.run(&["cluster", "restore", "/nowhere/prod.hfb", "--yes"]);
    assert_eq!(missing.exit, Some(3), "{missing:?}");
    assert!(mock.agent.0.restored.lock().unwrap().is_empty());
}
