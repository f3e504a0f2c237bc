//! The programs that people edit files with, for real.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cluster::Consistency;

use super::harness::{Mounted, can_mount, names, wait};
use crate::common::Outcome;

/// Runs a script in a folder; fails with what it said.
fn run(folder: &Path, script: &str) -> Outcome<String> {
    let mut command = Command::new("bash");
    command.args(["-ec", script]).current_dir(folder).stdin(Stdio::null());
    command.env("LC_ALL", "C").env("GIT_CONFIG_NOSYSTEM", "1").env("HOME", "/nonexistent");
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        Ok(text + &error)
    } else {
        Err(format!("`{script}` failed ({}): {text}{error}", output.status).into())
    }
}

/// Whether a program is installed; says so if not.
fn has(test: &str, program: &str) -> bool {
    let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
    if found.is_ok_and(|output| output.status.success()) {
        return true;
    }
    crate::skip::skip(test, &format!("{program} is not installed"));
    false
}

/// Compares two folders with all that is in them, byte by byte.
fn same(one: &Path, other: &Path) -> Outcome<usize> {
    let (left, right) = (names(one)?, names(other)?);
    assert_eq!(left, right, "{} and {}", one.display(), other.display());
    let mut files = 0;
    for name in left {
        let (one, other) = (one.join(&name), other.join(&name));
        files += if one.is_dir() {
            same(&one, &other)?
        } else {
            assert!(fs::read(&one)? == fs::read(&other)?, "{} differs", one.display());
            1
        };
    }
    Ok(files)
}

/// What the store has at a path.
fn stored(tree: &Mounted, path: &str) -> Outcome<Option<String>> {
    let path = path.to_owned();
    let got = tree.lab.nodes[0]
        .run(|cluster| async move { cluster.get(&path, Consistency::Linearizable).await })??;
    Ok(got.0.map(|kv| String::from_utf8_lossy(&kv.value).into_owned()))
}

#[test]
fn the_shells_programs_work() -> Outcome {
    if !can_mount("the_shells_programs_work") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    let top = tree.path("");
    run(&top, "echo 'name = \"web\"' > vms/web.toml; echo 'cpus = 2' >> vms/web.toml")?;
    assert_eq!(stored(&tree, "vms/web.toml")?.as_deref(), Some("name = \"web\"\ncpus = 2\n"));
    run(&top, "sed -i 's/cpus = 2/cpus = 4/' vms/web.toml && grep -q 'cpus = 4' vms/web.toml")?;
    assert_eq!(stored(&tree, "vms/web.toml")?.as_deref(), Some("name = \"web\"\ncpus = 4\n"));
    let refused = run(&top, "sed -i 's/cpus = 4/BAD/' vms/web.toml").err().ok_or("accepted")?;
    assert!(refused.to_string().contains("Bad message"), "{refused}");
    run(&top, "grep -q 'line 2' vms/web.toml.error")?;
    run(&top, "cat vms/web.toml > tmp && mv tmp vms/web.toml && test ! -e vms/web.toml.error")?;
    run(
        &top,
        "cp vms/web.toml vms/copy.toml && cp -p vms/web.toml vms/kept.toml && cp -a vms saved",
    )?;
    run(&top, "diff -r vms saved && rm -r saved && test ! -e saved")?;
    run(
        &top,
        "install -m 644 vms/web.toml installed && touch installed fresh && test -s installed",
    )?;
    run(&top, "tar -cf /dev/null . 2>&1 && find . -type f | wc -l && du -sh . && df . && ls -laR")?;
    run(&top, "mkdir -p x/y && (cd x/y && echo hi > f) && mv x z && cat z/y/f && rm -rf z")?;
    run(&top, "truncate -s 100 installed && test $(stat -c %s installed) = 100 && : > installed")?;
    run(
        &top,
        "dd if=/dev/zero of=blocks bs=4k count=10 conv=fsync 2>&1 && test $(stat -c %s blocks) = 40960",
    )?;
    run(&top, "flock lockfile true && mktemp -p . && mktemp -d -p . && test -d vms")?;
    let out = tree.folder().join("out");
    run(
        &top,
        &format!("cp -r . {0} && diff -r vms {0}/vms && cp -rp {0}/vms back", out.display()),
    )?;
    run(&top, "diff -r vms back")?;
    // What an editor leaves half-written by a crash is not committed.
    let killed = run(&top, "(echo BAD; kill -9 $BASHPID) > vms/killed.toml").is_err();
    assert!(killed && stored(&tree, "vms/killed.toml")?.is_none());
    Ok(())
}

#[test]
fn vim_edits() -> Outcome {
    if !can_mount("vim_edits") || !has("vim_edits", "vim.tiny") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    let top = tree.path("");
    let vim = "timeout 60 vim.tiny -u NONE -n -es";
    run(&top, "printf 'one\\ntwo\\n' > vms/web.toml")?;
    for backup in ["auto", "yes", "no"] {
        let set = format!("set backupcopy={backup} writebackup backup swapfile directory=.");
        let vim = "timeout 60 vim.tiny -u NONE -es";
        run(&top, &format!("{vim} -c '{set}' -c '%s/two/two {backup}/' -c 'wq' vms/web.toml"))?;
        let text = stored(&tree, "vms/web.toml")?.unwrap_or_default();
        assert!(text.contains(&format!("two {backup}")), "{backup}: {text}");
    }
    run(&top, &format!("{vim} -c 'normal inew' -c 'wq' notes.txt"))?;
    assert_eq!(stored(&tree, "notes.txt")?.as_deref(), Some("new\n"));
    let refused = run(&top, &format!("{vim} -c '%s/one/BAD/' -c 'w' -c 'q!' vms/web.toml"));
    assert!(stored(&tree, "vms/web.toml")?.unwrap_or_default().starts_with("one"), "{refused:?}");
    assert!(tree.path("vms/web.toml.error").exists());
    run(&top, "rm -f vms/*~ && test -z \"$(find . -name '.*.sw?')\"")?;
    Ok(())
}

#[test]
fn nano_edits() -> Outcome {
    if !can_mount("nano_edits") || !has("nano_edits", "nano") || !has("nano_edits", "python3") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    let top = tree.path("");
    run(&top, "echo two > vms/web.toml")?;
    // nano wants a terminal: type `one`, Enter, then Ctrl-S and Ctrl-X.
    let script = r#"
import os, pty, select, sys, time
pid, fd = pty.fork()
if pid == 0:
    os.environ["TERM"] = "xterm"
    os.execvp("nano", ["nano", "-I", "-G", "vms/web.toml"])
end, keys, screen = time.time() + 40, [b"one\r", b"\x13", b"\x18"], b""
while time.time() < end:
    ready, _, _ = select.select([fd], [], [], 1.0)
    if ready:
        try:
            got = os.read(fd, 65536)
        except OSError:
            got = b""
        if not got:
            break
        screen += got
    elif keys:
        os.write(fd, keys.pop(0))
_, status = os.waitpid(pid, 0)
sys.stdout.write(repr(screen[-400:]))
sys.exit(os.waitstatus_to_exitcode(status))
"#;
    let program = tree.folder().join("nano.py");
    fs::write(&program, script)?;
    let said = run(&top, &format!("python3 {}", program.display()))?;
    assert_eq!(stored(&tree, "vms/web.toml")?.as_deref(), Some("one\ntwo\n"), "{said}");
    assert_eq!(names(&tree.path("vms"))?, ["web.toml"], "{said}");
    Ok(())
}

#[test]
fn git_clones_into_it_and_works_there() -> Outcome {
    if !can_mount("git_clones_into_it_and_works_there") || !has("git", "git") {
        return Ok(());
    }
    let tree = Mounted::new(1)?;
    let top = tree.path("");
    let origin = tree.folder().join("origin");
    fs::create_dir(&origin)?;
    let git = "git -c user.name=t -c user.email=t@t -c init.defaultBranch=main -c protocol.file.allow=always -c safe.directory='*'";
    let make = format!(
        "{git} init -q . && mkdir -p a/b && for i in $(seq 30); do seq $i 400 > a/b/f$i; done && ln -s a/b link && {git} add . && {git} commit -qm one && {git} gc -q"
    );
    run(&origin, &make)?;
    let begin = Instant::now();
    run(&top, &format!("{git} clone -q --no-local {} clone", origin.display()))?;
    println!("cloned in {:?}", begin.elapsed());
    let clone = tree.path("clone");
    assert_eq!(run(&clone, &format!("{git} status --porcelain"))?, "");
    run(&clone, &format!("{git} fsck --full && {git} log --stat -1 | cat"))?;
    assert_eq!(fs::read(clone.join("a/b/f7"))?, fs::read(origin.join("a/b/f7"))?);
    run(
        &clone,
        &format!(
            "echo new > a/new && {git} add a/new && {git} commit -qm two && {git} mv a c && {git} commit -qm three"
        ),
    )?;
    run(
        &clone,
        &format!(
            "{git} checkout -q HEAD~1 && test -e a/new && {git} checkout -q main && test -e c/new && {git} gc -q && {git} fsck"
        ),
    )?;
    run(
        &origin,
        &format!(
            "{git} clone -q --no-local {} ../back && diff -r {0}/c ../back/c",
            clone.display()
        ),
    )?;
    // Copied out it is the same, to the byte, and a sound repository.
    let copy = tree.folder().join("copy");
    run(&top, &format!("cp -r clone {}", copy.display()))?;
    let files = same(&clone, &copy)?;
    assert!(files > 40, "only {files} files were compared");
    run(&copy, &format!("{git} fsck --full --strict && test -z \"$({git} status --porcelain)\""))?;
    run(&copy, &format!("{git} log --format=%s | tr '\\n' ' ' | grep -qx 'three two one '"))?;
    run(&top, "rm -rf clone && test ! -e clone")?;
    wait("nothing of it is left in the store", || {
        stored(&tree, "clone/c/new").is_ok_and(|s| s.is_none())
    });
    assert!(begin.elapsed() < Duration::from_secs(150));
    Ok(())
}
