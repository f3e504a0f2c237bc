//! The mounted tree of whole agents, on a real kernel: what people's programs do to it goes the one
//! guarded way in. Where there is no `/dev/fuse`, or no right to mount, each test says that it was
//! skipped.

mod harness;

use std::time::{Duration, Instant};

use crate::rig::Rig;
use harness::{Mounted, WEB, can_mount, has, is_mounted, run, until};
use node_agent::config::{Config, Tree};

#[tokio::test(flavor = "multi_thread")]
async fn the_last_administrators_document_stays_by_the_tree_too() {
    if !can_mount("the_last_administrators_document_stays_by_the_tree_too") {
        return;
    }
    let node = Mounted::new().await;
    let first = "echo 'role = \"operator\"' > access/bob.toml; \
                 grep 'name no administrator' access/bob.toml.error";
    node.shell(first).await.unwrap();
    node.shell("echo 'role = \"admin\"' > access/ann.toml").await.unwrap();
    node.shell("echo 'role = \"operator\"' > access/bob.toml").await.unwrap();
    for script in [
        "rm access/ann.toml",
        "sed -i s/admin/viewer/ access/ann.toml",
        "echo 'role = \"viewer\"' > $OUTSIDE/new && cp $OUTSIDE/new access/ann.toml",
        "rm -r access/ann.toml access",
        "mv access/bob.toml access/ann.toml",
    ] {
        let said = node.shell(script).await;
        assert!(said.is_err(), "{script}: {said:?}");
        let ann = node.shell("cat access/ann.toml").await.unwrap();
        assert_eq!(ann, "role = \"admin\"\n", "{script}: {said:?}");
        node.shell("echo 'role = \"operator\"' > access/bob.toml").await.unwrap();
    }
    let demoted = "echo 'role = \"viewer\"' > access/ann.toml; cat access/ann.toml.error";
    let reason = node.shell(demoted).await.unwrap();
    assert!(reason.contains("no administrator would be left"), "{reason}");
    // Another one first, then it goes; and the only one that is left, too.
    node.shell("sed -i s/operator/admin/ access/bob.toml && rm access/ann.toml").await.unwrap();
    node.shell("rm access/bob.toml").await.unwrap();
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_program_saves_a_vms_document_and_the_vm_stays_the_same() {
    if !can_mount("every_program_saves_a_vms_document_and_the_vm_stays_the_same") {
        return;
    }
    let node = Mounted::new().await;
    node.shell(&format!("cat > vms/web.toml <<'END'\n{WEB}END")).await.unwrap();
    let made = node.rig.vm("web").await;
    assert_eq!((made.cpus, made.node.as_str(), made.phase.as_str()), (1, "n1", "stopped"));
    let vim = |backup: &str, cpus: u32| {
        format!(
            "vim.tiny -u NONE -es -c 'set backupcopy={backup} writebackup backup swapfile \
             directory=. backupdir=.' -c '%s/^cpus = .*/cpus = {cpus}/' -c 'wq' vms/web.toml"
        )
    };
    let edit = |cpus: u32| format!("sed 's/^cpus = .*/cpus = {cpus}/' vms/web.toml");
    let ways = [
        ("sed", "sed -i 's/^cpus = .*/cpus = 2/' vms/web.toml".to_owned()),
        ("sh", format!("text=$({}); echo \"$text\" > vms/web.toml", edit(3))),
        ("cp", format!("{} > $OUTSIDE/new && cp $OUTSIDE/new vms/web.toml", edit(4))),
        ("cp", format!("{} > $OUTSIDE/new && cp -a $OUTSIDE/new vms/web.toml", edit(5))),
        ("mv", format!("{} > vms/web.tmp && mv vms/web.tmp vms/web.toml", edit(6))),
        ("mv", format!("{} > web.tmp && mv -f web.tmp vms/web.toml", edit(7))),
        (
            "dd",
            format!("{} > $OUTSIDE/new && dd if=$OUTSIDE/new of=vms/web.toml conv=fsync", edit(8)),
        ),
        ("vim.tiny", vim("auto", 2)),
        ("vim.tiny", vim("yes", 3)),
        ("vim.tiny", vim("no", 4)),
        ("python3", harness::nano(5)),
        ("busybox", "busybox sed -i 's/^cpus = .*/cpus = 6/' vms/web.toml".to_owned()),
        ("sh", "echo '# kept by sh' >> vms/web.toml".to_owned()),
    ];
    let mut cpus = 1;
    for (program, script) in &ways {
        if !has(program) || program == &"python3" && !has("nano") {
            crate::skip::skip("every_program_saves_a_vms_document", &format!("no {program} here"));
            continue;
        }
        let said = node.shell(script).await.unwrap();
        let vm = node.rig.vm("web").await;
        assert_ne!(node.text().await, "", "{script}");
        assert_eq!((&vm.id, vm.generation), (&made.id, made.generation), "{script}: {said}");
        if !script.contains(">>") {
            assert_ne!(vm.cpus, cpus, "{script} changed nothing: {said}");
            cpus = vm.cpus;
        }
        assert!(node.text().await.contains(&format!("cpus = {cpus}\n")), "{script}: {said}");
    }
    assert!(node.text().await.ends_with("# kept by sh\n"));
    let (author, path) = node.last_change("vms/web.toml").await;
    assert_eq!((author.as_str(), path.as_str()), ("uid 0 (root) on n1", "vms/web.toml"));
    // Removed by its name it is gone, and so is the VM.
    node.shell("rm -f vms/web.toml~ vms/*.error && rm vms/web.toml && ls -A vms").await.unwrap();
    assert!(node.rig.vms().await.is_empty());
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_says_why_beside_the_file_and_changes_nothing() {
    if !can_mount("what_is_refused_says_why_beside_the_file_and_changes_nothing") {
        return;
    }
    let node = Mounted::new().await;
    let refused = format!("cat > vms/web.toml <<'END'\n{}END", WEB.replace("cpus = 1", "cpus = 0"));
    let said = node.shell(&refused).await.unwrap_err();
    assert!(said.contains("Invalid argument"), "{said}");
    let reason = node.shell("cat vms/web.toml.error").await.unwrap();
    assert!(reason.contains("vms/web.toml, line 2") && reason.contains("cpus"), "{reason}");
    until("a document that never was is gone", async || {
        node.shell("test ! -e vms/web.toml").await.is_ok()
    })
    .await;
    assert!(node.rig.vms().await.is_empty());

    node.shell(&format!("cat > vms/web.toml <<'END'\n{WEB}END")).await.unwrap();
    node.shell("test ! -e vms/web.toml.error").await.unwrap();
    for (script, words, reason) in [
        ("sed -i 's/cpus = 1/cpuss = 1/' vms/web.toml", "Bad message", "cpuss"),
        ("sed 's/lan/wan/' vms/web.toml > x; cp x vms/web.toml", "Invalid argument", "`wan`"),
        ("sed 's/cpus = 1/cpus = [/' vms/web.toml > x; mv x vms/web.toml", "Bad message", "line "),
        ("mv vms/web.toml vms/db.toml", "Bad message", "cannot be renamed"),
        ("mv vms/web.toml vms/web.toml.bak", "not permitted", "remove what the document stands"),
        ("mv vms/web.toml web.old", "not permitted", "remove what the document stands for"),
        ("sed -i.bak 's/cpus = 1/cpus = 2/' vms/web.toml", "not permitted", "a backup is a copy"),
        ("echo 'x = 1' | tee ha/web.toml", "denied", "HA rules are not supported"),
        ("mkdir status; echo x > status", "not permitted", ""),
    ] {
        let said = node.shell(script).await.unwrap_err();
        assert!(said.contains(words), "{script}: {said}");
        if !reason.is_empty() {
            let noted = node.shell("cat */*.error; rm -f */*.error x").await.unwrap();
            assert!(noted.contains(reason), "{script}: {noted}");
        }
        assert_eq!(node.text().await, WEB, "{script}");
        assert_eq!(node.rig.vms().await, ["web"], "{script}");
    }
    // The shell's own `echo` hears nothing of a failed close; the note is there all the same.
    node.shell("echo nonsense > vms/web.toml; grep -q 'line 1' vms/web.toml.error").await.unwrap();
    until("what was accepted last is back", async || node.text().await == WEB).await;
    assert_eq!(node.text().await, WEB);
    // A pool in the tree itself would have the agent wait for itself.
    let pool = format!(
        "printf '[pools.own]\\nkind = \"shared-dir\"\\npath = \"{0}/pool\"\\n' >> storage.toml; \
         cat storage.toml.error",
        node.top().display()
    );
    let reason = node.shell(&pool).await.unwrap();
    assert!(reason.contains("is in the mounted tree"), "{reason}");
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_on_one_node_is_seen_on_the_others_mount_and_by_the_commands() {
    if !can_mount("a_change_on_one_node_is_seen_on_the_others_mount_and_by_the_commands") {
        return;
    }
    let first = Mounted::new().await;
    let second = first.another("n2").await;
    // The second is not the leader: a VM's document is judged there.
    second.shell(&format!("cat > vms/web.toml <<'END'\n{WEB}END")).await.unwrap();
    assert_eq!(first.rig.vms().await, ["web"]);
    for cpus in 2..6 {
        let script = format!("sed -i 's/^cpus = .*/cpus = {cpus}/' vms/web.toml");
        let (from, to) = if cpus % 2 == 0 { (&second, &first) } else { (&first, &second) };
        from.shell(&script).await.unwrap();
        let begin = Instant::now();
        let wanted = format!("grep -q '^cpus = {cpus}$' vms/web.toml");
        until("the other mount shows it", async || to.shell(&wanted).await.is_ok()).await;
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
        assert_eq!(to.rig.vm("web").await.cpus, cpus);
    }
    let said = second.shell("sed -i 's/^cpus = .*/cpus = 0/' vms/web.toml").await.unwrap_err();
    assert!(said.contains("Bad message"), "{said}");
    let reason = second.shell("cat vms/web.toml.error").await.unwrap();
    assert!(reason.contains("line 2") && reason.contains("cpus"), "{reason}");
    let (author, _) = first.last_change("vms/web.toml").await;
    assert_eq!(author, "uid 0 (root) on n1");
    second.shell("sed -i 's/^cpus = .*/cpus = 1/' vms/web.toml").await.unwrap();
    assert_eq!(first.last_change("vms/web.toml").await.0, "uid 0 (root) on n2");
    // By the commands, seen in both.
    first.rig.delete("web").await;
    for node in [&first, &second] {
        until("it is gone", async || node.shell("test ! -e vms/web.toml").await.is_ok()).await;
    }
    second.end().await;
    first.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_ends_unmounts_and_the_next_one_mounts_again() {
    if !can_mount("an_agent_that_ends_unmounts_and_the_next_one_mounts_again") {
        return;
    }
    let node = Mounted::new().await;
    node.shell("echo hello > notes").await.unwrap();
    let (top, config) = (node.top(), node.rig.config.clone());
    // Somebody stands in it, and has a file open.
    let held = std::fs::File::open(top.join("notes")).unwrap();
    let folder = node.end().await;
    assert!(!is_mounted(&top) && !top.join("notes").exists(), "it is still mounted");
    drop(held);
    let rig = Rig::with(config).await;
    let notes = top.join("notes");
    until("it is mounted again", async || notes.exists()).await;
    assert_eq!(run(&top, "cat notes").await.unwrap(), "hello\n");
    rig.agent.end().await;
    assert!(!is_mounted(&top));
    drop(folder);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_it_cannot_be_mounted_the_agent_goes_on() {
    if !can_mount("where_it_cannot_be_mounted_the_agent_goes_on") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "x").unwrap();
    let mount = dir.path().join("file/tree");
    let rig = Rig::with(Config { tree: Tree { mount }, ..crate::rig::config(dir.path()) }).await;
    rig.init("n1").await;
    rig.online(1).await;
    assert!(rig.vms().await.is_empty());
    rig.agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_fuse_the_agent_says_so_once_and_goes_on() {
    if !can_mount("without_fuse_the_agent_says_so_once_and_goes_on") {
        return;
    }
    let agent = harness::Process::start("mount -t tmpfs none /dev && mknod /dev/null c 1 3").await;
    let said = agent.log_line("the tree is not mounted").await;
    assert!(said.contains("/dev/fuse cannot be used") && said.contains("module `fuse`"), "{said}");
    // It answers.
    agent.init_is_known().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_agent_leaves_fails_at_once_and_is_replaced() {
    if !can_mount("what_a_killed_agent_leaves_fails_at_once_and_is_replaced") {
        return;
    }
    let mut agent = harness::Process::start("true").await;
    let top = agent.top();
    until("it is mounted", async || top.join("vms").is_dir()).await;
    run(&top, "echo hello > notes").await.unwrap();
    for _ in 0..2 {
        agent.kill();
        let begin = Instant::now();
        let said = run(&top, "ls").await.unwrap_err();
        assert!(said.contains("not connected"), "{said}");
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
        agent.start_again();
        until("it is mounted again", async || top.join("notes").exists()).await;
        assert_eq!(run(&top, "cat notes").await.unwrap(), "hello\n");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let here = mounts.lines().filter(|line| line.contains(&*top.to_string_lossy()));
        assert_eq!(here.count(), 1, "the remains are gone");
    }
    agent.terminate();
    assert!(!is_mounted(&top), "a graceful end unmounts");
}

/// A process that lives on when its agent has gone must not keep the agent's tree mounted.
#[test]
fn a_vm_process_leaves_the_tree() {
    if !can_mount("a_vm_process_leaves_the_tree") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let node = runtime.block_on(Mounted::new());
    let top = node.top();
    let jailed = std::thread::spawn(|| {
        let before = std::fs::read_link("/proc/thread-self/ns/mnt").unwrap();
        node_agent::jail::enter_namespaces().unwrap();
        let after = std::fs::read_link("/proc/thread-self/ns/mnt").unwrap();
        let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        (before != after, mounts.contains(" - fuse.holdfast "))
    });
    let (own, holds) = jailed.join().unwrap();
    if own {
        assert!(!holds, "it holds the tree");
    } else {
        crate::skip::skip("a_vm_process_leaves_the_tree", "no mount namespaces here");
    }
    assert!(is_mounted(&top) && top.join("vms").is_dir(), "the host's own mount went");
    runtime.block_on(node.end());
}
