//! VM processes and their supervisor, on the host's own KVM.

use std::fs;
use std::time::Duration;

use crate::common::{
    LIMIT, Node, config, disk, is_in_order, lacks_kvm_or_root, launch, name, wait_for,
};
use futures::StreamExt;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use node_agent::clock::boottime_ns;
use node_agent::supervisor::{ExitReason, StartError, Stop, Supervisor, VmError, VmState};
use proto::Generation;

const MS: u64 = 1_000_000;

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_starts_pauses_resumes_resets_and_stops() {
    if lacks_kvm_or_root() {
        return;
    }
    let mut node = Node::new();
    let vm = name("web");
    node.supervisor.start(launch(node.folder.path(), "web")).await.unwrap();
    node.printed(&vm, 60).await;
    let status = node.supervisor.status(&vm).await.unwrap();
    assert_eq!((status.state, status.generation), (VmState::Running, Generation(1)));

    node.supervisor.pause(&vm).await.unwrap();
    assert_eq!(node.supervisor.get(&vm).unwrap().state, VmState::Paused);
    let paused = node.console(&vm).len();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(node.console(&vm).len(), paused, "it prints while it is paused");
    node.supervisor.resume(&vm).await.unwrap();
    let text = node.printed(&vm, paused + 30).await;
    assert!(is_in_order(&text), "{text}");

    node.supervisor.reset(&vm).await.unwrap();
    assert_eq!(node.supervisor.status(&vm).await.unwrap().pid, status.pid, "another process");
    let again = node.console(&vm).len();
    node.printed(&vm, again + 5).await;

    let again = node.supervisor.start(launch(node.folder.path(), "web")).await;
    assert!(matches!(again, Err(StartError::AlreadyRunning(_))), "{again:?}");
    node.supervisor.stop(&vm, Stop::Graceful).await.unwrap();
    assert_eq!(node.exit().await.reason, ExitReason::Stopped);
    assert!(node.supervisor.running().is_empty());
    assert!(matches!(node.supervisor.pause(&vm).await, Err(VmError::NotRunning(_))));
    node.supervisor.stop(&vm, Stop::Kill).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_takes_and_gives() {
    if lacks_kvm_or_root() {
        return;
    }
    let node = Node::new();
    let vm = name("web");
    node.supervisor.start(launch(node.folder.path(), "web")).await.unwrap();
    let input = futures::stream::iter([b"hello".to_vec()]).chain(futures::stream::pending());
    let mut output = node.supervisor.console(&vm, input).await.unwrap();
    let mut typed = String::new();
    let echo = async {
        while !typed.contains("HELLO") {
            let chunk = output.next().await.unwrap().unwrap();
            let text = String::from_utf8(chunk.data).unwrap();
            typed.extend(text.chars().filter(char::is_ascii_uppercase));
        }
    };
    tokio::time::timeout(LIMIT, echo).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_jail_is_closed() {
    if lacks_kvm_or_root() {
        return;
    }
    let node = Node::new();
    let vm = name("web");
    let mut wanted = launch(node.folder.path(), "web");
    wanted.disks.push(disk(node.folder.path(), "web.raw"));
    node.supervisor.start(wanted).await.unwrap();
    node.printed(&vm, 10).await;
    let pid = node.supervisor.get(&vm).unwrap().pid;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |label: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(label)).unwrap();
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let uids = field("Uid:");
    assert!(uids.iter().all(|uid| (100_000..150_000).contains(&uid.parse().unwrap())), "{uids:?}");
    assert_eq!(field("Groups:"), Vec::<String>::new());
    assert_eq!(field("NoNewPrivs:"), ["1"]);
    assert_eq!(field("Seccomp:"), ["2"]);
    for set in ["CapPrm:", "CapEff:", "CapBnd:", "CapInh:", "CapAmb:"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    for thread in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        assert!(status.contains("Seccomp:\t2") && status.contains("NoNewPrivs:\t1"), "{status}");
    }
    let root = fs::read_link(format!("/proc/{pid}/root")).unwrap();
    assert!(root.ends_with("vms/web/root"), "{}", root.display());
    assert_eq!(fs::read_dir(root).unwrap().count(), 0);
    let session = nix::unistd::getsid(Some(Pid::from_raw(i32::try_from(pid).unwrap()))).unwrap();
    assert_eq!(session.as_raw().unsigned_abs(), pid);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_agent_adopts_what_runs_and_forgets_what_ended() {
    if lacks_kvm_or_root() {
        return;
    }
    let mut node = Node::new();
    let (kept, lost) = (name("kept"), name("lost"));
    node.supervisor.start(launch(node.folder.path(), "kept")).await.unwrap();
    node.supervisor.start(launch(node.folder.path(), "lost")).await.unwrap();
    let before = node.supervisor.get(&kept).unwrap();
    let dead = node.supervisor.get(&lost).unwrap().pid;
    // Another supervisor over the same folder stands for the agent's next life.
    let (second, mut exits) = Supervisor::new(config(node.folder.path())).unwrap();
    signal(dead, Signal::SIGKILL);
    assert!(matches!(node.exit().await.reason, ExitReason::Failed(_)));
    let adopted = second.adopt_all().unwrap();
    assert_eq!(adopted.len(), 1, "{adopted:?}");
    assert_eq!((adopted[0].pid, adopted[0].vm_id), (before.pid, before.vm_id));
    assert_eq!(second.status(&kept).await.unwrap().state, VmState::Running);
    let printed = node.console(&kept).len();
    node.printed(&kept, printed + 30).await;
    second.stop(&kept, Stop::Graceful).await.unwrap();
    assert_eq!(exits.recv().await.unwrap().reason, ExitReason::Stopped);
    let (third, _exits) = Supervisor::new(config(node.folder.path())).unwrap();
    assert_eq!(third.adopt_all().unwrap(), Vec::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_that_is_renewed_holds_and_one_that_passes_ends_the_process() {
    if lacks_kvm_or_root() {
        return;
    }
    let mut node = Node::new();
    let vm = name("web");
    let mut wanted = launch(node.folder.path(), "web");
    (wanted.ha, wanted.spec.ha.enabled) = (true, true);
    let refused = node.supervisor.start(wanted.clone()).await;
    assert!(matches!(refused, Err(StartError::NoLease(_))), "{refused:?}");
    wanted.deadline_ns = Some(boottime_ns() + 3000 * MS);
    node.supervisor.start(wanted).await.unwrap();
    let last = boottime_ns() + 5000 * MS;
    node.supervisor.renew_deadlines(last);
    let exited = node.exit().await;
    assert_eq!((exited.name, exited.reason), (vm, ExitReason::Lease));
    assert!(boottime_ns() >= last, "it ended before its renewed deadline");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_slept_past_its_deadline_does_nothing_more() {
    if lacks_kvm_or_root() {
        return;
    }
    let mut node = Node::new();
    let vm = name("web");
    let mut wanted = launch(node.folder.path(), "web");
    (wanted.ha, wanted.spec.ha.enabled) = (true, true);
    let deadline = boottime_ns() + 4000 * MS;
    wanted.deadline_ns = Some(deadline);
    node.supervisor.start(wanted).await.unwrap();
    node.printed(&vm, 10).await;
    // All that was printed is in the log, to the letter.
    node.supervisor.pause(&vm).await.unwrap();
    let pid = node.supervisor.get(&vm).unwrap().pid;
    signal(pid, Signal::SIGSTOP);
    let printed = wait_for("the deadline to pass", || {
        (boottime_ns() > deadline + 200 * MS).then(|| node.console(&vm).len())
    })
    .await;
    // Too late, both: the renewal must not be taken, and the request to run on does nothing.
    node.supervisor.renew_deadlines(boottime_ns() + 60_000 * MS);
    let supervisor = node.supervisor.clone();
    let resumed = tokio::spawn({
        let vm = vm.clone();
        async move { supervisor.resume(&vm).await }
    });
    tokio::task::yield_now().await;
    signal(pid, Signal::SIGCONT);
    assert_eq!(node.exit().await.reason, ExitReason::Lease);
    drop(resumed.await);
    let more = node.console(&vm).len() - printed;
    assert_eq!(more, 0, "the guest ran after its deadline");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_hangs_is_found_and_one_that_works_is_not() {
    if lacks_kvm_or_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.probe_every = std::time::Duration::from_millis(300);
    config.hang_limit = std::time::Duration::from_secs(3);
    let mut node = Node::with(folder, config);
    let (hung, well) = (name("hung"), name("well"));
    for vm in [&hung, &well] {
        let mut wanted = launch(node.folder.path(), vm.as_str());
        (wanted.ha, wanted.spec.ha.enabled) = (true, true);
        wanted.deadline_ns = Some(boottime_ns() + 120_000 * MS);
        node.supervisor.start(wanted).await.unwrap();
        node.printed(vm, 10).await;
    }
    // Its vCPU stays in the guest for longer than the limit, and is asked for a sign of life there.
    tokio::time::sleep(std::time::Duration::from_secs(4)).await;
    assert_eq!(node.supervisor.running().len(), 2);
    signal(node.supervisor.get(&hung).unwrap().pid, Signal::SIGSTOP);
    let exited = node.exit().await;
    assert_eq!(exited.name, hung);
    let ExitReason::Hung(why) = &exited.reason else { panic!("{exited:?}") };
    assert!(why.contains("does not answer for 3 s"), "{why}");
    assert_eq!(node.supervisor.status(&well).await.unwrap().state, VmState::Running);
    // It can be started again, on the same disks.
    let mut again = launch(node.folder.path(), "hung");
    again.generation = proto::Generation(2);
    node.supervisor.start(again).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_has_one_writer() {
    if lacks_kvm_or_root() {
        return;
    }
    let mut node = Node::new();
    let mut first = launch(node.folder.path(), "first");
    first.disks.push(disk(node.folder.path(), "data.raw"));
    let mut second = launch(node.folder.path(), "second");
    second.disks.push(disk(node.folder.path(), "data.raw"));
    node.supervisor.start(first).await.unwrap();
    let refused = node.supervisor.start(second.clone()).await.unwrap_err().to_string();
    assert!(refused.contains("data.raw") && refused.contains("in use"), "{refused}");
    assert_eq!(node.supervisor.running().len(), 1);
    node.supervisor.stop(&name("first"), Stop::Kill).await.unwrap();
    assert_eq!(node.exit().await.reason, ExitReason::Killed);
    node.supervisor.start(second).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_start_says_why_and_leaves_nothing() {
    if lacks_kvm_or_root() {
        return;
    }
    let node = Node::new();
    let mut missing = launch(node.folder.path(), "web");
    missing.boot.firmware = Some(node.folder.path().join("nothing.bin"));
    let refused = node.supervisor.start(missing).await.unwrap_err().to_string();
    assert!(refused.contains("nothing.bin"), "{refused}");
    let mut damaged = launch(node.folder.path(), "web");
    let kernel = node.folder.path().join("vmlinuz");
    fs::write(&kernel, b"not a kernel at all").unwrap();
    damaged.boot.firmware = None;
    damaged.boot.kernel = Some(kernel);
    let refused = node.supervisor.start(damaged).await.unwrap_err().to_string();
    assert!(refused.contains("kernel"), "{refused}");
    let mut huge = launch(node.folder.path(), "web");
    huge.spec.memory = proto::ByteSize(1 << 44);
    let refused = node.supervisor.start(huge).await.unwrap_err().to_string();
    assert!(refused.contains("needs 16TiB of memory") || refused.contains("left"), "{refused}");
    assert!(node.supervisor.running().is_empty() && !node.supervisor.is_busy(&name("web")));
    assert!(!node.folder.path().join("vms/web/state.json").exists());
    node.supervisor.start(launch(node.folder.path(), "web")).await.unwrap();
}
