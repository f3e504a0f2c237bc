//! Real VM processes on this host's KVM, under agents in this process: start, pause, adoption by
//! the next agent, live migration between two agents, stop. The guest is a flat firmware image that
//! counts in memory for ever, which runs on every KVM (an emulated one too).

use std::path::Path;
use std::time::{Duration, Instant};

use crate::rig::Rig;
use proto::v1::nodes_client::NodesClient;
use proto::v1::{
    CreateVmRequest, FenceNodeRequest, MigrateVmRequest, ReleasedVm, ShutdownVmRequest, TaskRef,
    VmRequest,
};
use tonic::Status;

/// Real mode, from the reset vector: `inc word [0x1000]; jmp` back to it.
fn firmware() -> Vec<u8> {
    let mut image = vec![0; 64 << 10];
    let vector = image.len() - 16;
    image[vector..vector + 6].copy_from_slice(&[0xff, 0x06, 0x00, 0x10, 0xeb, 0xfa]);
    image
}

fn document(name: &str, ha: bool) -> String {
    format!(
        "name = \"{name}\"\ncpus = 1\nmemory = \"64MiB\"\n[boot]\nfirmware = \"shared/count\"\n\
         [[disks]]\nimage = \"shared/{name}.raw\"\nsize = \"1MiB\"\n[ha]\nenabled = {ha}\n"
    )
}

fn config(dir: &Path, uid_base: u32) -> node_agent::config::Config {
    node_agent::config::Config {
        vm_program: Some(env!("CARGO_BIN_EXE_node-agent").into()),
        uid_base,
        ..crate::rig::config(dir)
    }
}

fn kvm_is_here() -> bool {
    let here = Path::new("/dev/kvm").exists();
    if !here {
        crate::skip::this_test("no /dev/kvm");
    }
    here
}

async fn first(dir: &Path) -> Rig {
    first_with(dir, config(dir, 910_000)).await
}

async fn first_with(dir: &Path, config: node_agent::config::Config) -> Rig {
    // VM processes run as users of their own and must reach their files.
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    let rig = Rig::with(config).await;
    rig.init("n1").await;
    rig.online(1).await;
    rig.pool("shared", "shared-dir", &dir.join("shared")).await;
    rig.image("shared", "count", "firmware", firmware()).await;
    rig
}

async fn start(rig: &Rig, name: &str, ha: bool, node: &str) {
    let request = CreateVmRequest {
        document: document(name, ha),
        start: true,
        node: node.into(),
        dry_run: false,
    };
    let task_id = rig.vm_client().create(request).await.unwrap().into_inner().task_id;
    rig.done(proto::v1::TaskRef { task_id }).await;
    let vm = rig.vm(name).await;
    assert_eq!((vm.phase.as_str(), vm.requested.as_str()), ("started", "started"));
}

fn request(vm: &str) -> VmRequest {
    VmRequest { vm: vm.into() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_outlives_its_agent_and_is_adopted() {
    if !kvm_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let rig = first(dir.path()).await;
    start(&rig, "web", true, "").await;
    let name = "web".parse().unwrap();
    let before = rig.agent.node().unwrap().supervisor.get(&name).unwrap();

    let paused = rig.vm_client().pause(request("web")).await.unwrap().into_inner();
    rig.done(paused).await;
    assert!(rig.vm("web").await.paused);
    let resumed = rig.vm_client().resume(request("web")).await.unwrap().into_inner();
    rig.done(resumed).await;

    let config = rig.config.clone();
    rig.agent.end().await;
    drop(rig);
    let rig = Rig::with(config).await;
    rig.online(1).await;
    let after = rig.agent.node().unwrap().supervisor.get(&name).unwrap();
    assert_eq!((after.pid, after.generation), (before.pid, before.generation), "not adopted");
    let vm = rig.vm("web").await;
    assert_eq!(vm.phase, "started", "{vm:?}");

    let refused = rig.vm_client().delete(request("web")).await.unwrap_err();
    assert!(refused.message().contains("stop it first"), "{refused}");
    let stopped = rig.vm_client().stop(request("web")).await.unwrap().into_inner();
    rig.done(stopped).await;
    assert_eq!(rig.vm("web").await.phase, "stopped");
    rig.delete("web").await;
    rig.agent.end().await;
}

/// Begins a shutdown that the guest ignores, and waits until it is under way.
async fn shutdown(rig: &Rig, vm: &str) -> TaskRef {
    let request = ShutdownVmRequest { vm: vm.into(), timeout_s: 600, force: false };
    let task = rig.vm_client().shutdown(request).await.unwrap().into_inner();
    let begin = Instant::now();
    while rig.vm(vm).await.phase != "stopping" {
        assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", rig.vm(vm).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    task
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_and_a_reset_wait_for_no_shutdown() {
    if !kvm_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let rig = first(dir.path()).await;
    start(&rig, "web", false, "").await;

    let ignored = shutdown(&rig, "web").await;
    let begin = Instant::now();
    let reset = rig.vm_client().reset(request("web")).await.unwrap().into_inner();
    rig.done(reset).await;
    let ended = rig.ended(ignored).await;
    assert_eq!(ended.state, "cancelled");
    assert!(ended.error.contains("reset asked by root"), "{}", ended.error);
    let vm = rig.vm("web").await;
    assert_eq!((vm.phase.as_str(), vm.requested.as_str()), ("started", "started"));

    let (first, second) = (shutdown(&rig, "web").await, shutdown(&rig, "web").await);
    let stop = rig.vm_client().stop(request("web")).await.unwrap().into_inner();
    rig.done(stop).await;
    for ignored in [first, second] {
        let ended = rig.ended(ignored).await;
        assert_eq!(ended.state, "cancelled");
        assert!(ended.error.contains("stop asked by root"), "{}", ended.error);
    }
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
    let vm = rig.vm("web").await;
    assert_eq!((vm.phase.as_str(), vm.requested.as_str()), ("stopped", "stopped"));
    rig.agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_whose_process_hangs_is_started_again() {
    if !kvm_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), 910_000);
    config.timing.hang_limit_ms = 3_000;
    let rig = first_with(dir.path(), config).await;
    start(&rig, "web", true, "").await;
    let before = rig.vm("web").await;
    let process = rig.agent.node().unwrap().supervisor.get(&"web".parse().unwrap()).unwrap();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(process.pid).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let begin = Instant::now();
    let after = loop {
        let now = rig.vm("web").await;
        if now.phase == "started" && now.generation > before.generation {
            break now;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{now:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let told = |words: &str| after.events.iter().any(|event| event.contains(words));
    assert!(told("hung and was killed: it does not answer for 3 s"), "{:?}", after.events);
    assert!(told("tried again in 2 s, try 2"), "{:?}", after.events);
    let stop = rig.vm_client().stop(request("web")).await.unwrap().into_inner();
    rig.done(stop).await;
    rig.agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_moves_live_and_a_crash_is_told() {
    if !kvm_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let rig = first(dir.path()).await;
    let other_dir = tempfile::tempdir().unwrap();
    let second = Rig::with(config(other_dir.path(), 960_000)).await;
    second.join(&rig, "n2").await;
    rig.online(2).await;
    start(&rig, "web", true, "n1").await;

    let migrate = |target: &str| MigrateVmRequest {
        vm: "web".into(),
        target: target.into(),
        ..MigrateVmRequest::default()
    };
    for (target, words) in [("n1", "already there"), ("n9", "no node `n9`")] {
        let refused = rig.vm_client().migrate(migrate(target)).await.unwrap_err();
        assert!(refused.message().contains(words), "{refused}");
    }
    // Asked at the node that does not own it.
    let moved = second.vm_client().migrate(migrate("n2")).await.unwrap().into_inner();
    let task = second.done(moved).await;
    let result: serde_json::Value = serde_json::from_str(&task.result).unwrap();
    assert!(result["bytes"].as_u64().is_some() && result["rounds"].as_u64() >= Some(1), "{result}");
    let vm = rig.vm("web").await;
    assert_eq!((vm.node.as_str(), vm.phase.as_str()), ("n2", "started"), "{vm:?}");
    let name = "web".parse().unwrap();
    // The source's process ends by itself; until then it is one that can never run again.
    let begin = Instant::now();
    while let Ok(source) = rig.agent.node().unwrap().supervisor.status(&name).await {
        assert_ne!(source.state, node_agent::supervisor::VmState::Running, "it runs at both");
        assert!(begin.elapsed() < Duration::from_secs(10), "the source's process stays");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let there = second.agent.node().unwrap().supervisor.get(&name).unwrap();
    assert_eq!(there.generation.0, vm.generation);

    // Its process is killed from outside: the plan starts it again at a new generation.
    let pid = nix::unistd::Pid::from_raw(i32::try_from(there.pid).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    let begin = Instant::now();
    loop {
        let now = rig.vm("web").await;
        if now.phase == "started" && now.generation > vm.generation {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "{now:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let stopped = rig.vm_client().stop(request("web")).await.unwrap().into_inner();
    rig.done(stopped).await;
    rig.agent.end().await;
    second.agent.end().await;
}

async fn fence(rig: &Rig, node: &str, machine_is_off: bool) -> Result<Vec<ReleasedVm>, Status> {
    let request = FenceNodeRequest { node: node.into(), machine_is_off };
    let answer = NodesClient::new(rig.channel.clone()).fence(request).await;
    answer.map(|answer| answer.into_inner().vms)
}

/// As [`fence`] once the node has been silent for long enough.
async fn fence_silent(
    rig: &Rig,
    node: &str,
    machine_is_off: bool,
) -> Result<Vec<ReleasedVm>, Status> {
    let begin = Instant::now();
    loop {
        let answer = fence(rig, node, machine_is_off).await;
        let early = |status: &Status| {
            ["the node is alive", "lease may still run"]
                .into_iter()
                .any(|why| status.message().contains(why))
        };
        if !answer.as_ref().is_err_and(early) {
            return answer;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{answer:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_lost_for_good_is_fenced_by_hand() {
    if !kvm_is_here() {
        return;
    }
    let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let with_lease = |dir: &Path, uid_base| {
        let mut config = config(dir, uid_base);
        config.timing.lease_ms = 3_000;
        config
    };
    let rig = first_with(dirs[0].path(), with_lease(dirs[0].path(), 910_000)).await;
    let mut others = Vec::new();
    for (number, uid_base) in [(2, 960_000), (3, 1_010_000)] {
        let other = Rig::with(with_lease(dirs[number - 1].path(), uid_base)).await;
        other.join(&rig, &format!("n{number}")).await;
        others.push(other);
    }
    rig.online(3).await;
    start(&rig, "web", false, "n3").await;
    start(&rig, "db", false, "n3").await;

    let lost = others.pop().unwrap();
    let alive = fence(&rig, "n3", true).await.unwrap_err();
    assert!(alive.message().contains("the node is alive"), "{alive}");
    // The agent is gone; of the VMs one goes with it, the other runs on: the person was wrong.
    let config = lost.config.clone();
    let web = lost.agent.node().unwrap().supervisor.get(&"web".parse().unwrap()).unwrap();
    let db = lost.agent.node().unwrap().supervisor.get(&"db".parse().unwrap()).unwrap();
    lost.agent.end().await;
    drop(lost);
    let kill = |pid: u32, signal| {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap()), signal)
    };
    kill(web.pid, Some(nix::sys::signal::Signal::SIGKILL)).unwrap();
    let unsure = fence_silent(&rig, "n3", false).await.unwrap_err();
    assert!(unsure.message().contains("--yes-it-is-off"), "{unsure}");
    assert_eq!(rig.vm("web").await.phase, "started", "nothing was changed");
    let released = fence_silent(&rig, "n3", true).await.unwrap();
    let names: Vec<_> = released.iter().map(|vm| (vm.vm.as_str(), vm.ha, vm.bound)).collect();
    assert_eq!(names, [("db", false, false), ("web", false, false)]);

    let task = rig.vm_client().start(request("web")).await.unwrap().into_inner();
    rig.done(task).await;
    let vm = rig.vm("web").await;
    assert_ne!(vm.node, "n3");
    assert_eq!(vm.phase, "started");

    // It comes back with a process of a generation that is over, ends it, and is clean only then.
    assert!(kill(db.pid, None).is_ok(), "it was to run on");
    let back = Rig::with(config).await;
    rig.online(3).await;
    assert!(back.agent.node().unwrap().supervisor.running().is_empty());
    assert_eq!(rig.vm("db").await.phase, "stopped");
    let task = rig.vm_client().stop(request("web")).await.unwrap().into_inner();
    rig.done(task).await;
    for agent in [&rig.agent, &others[0].agent, &back.agent] {
        agent.end().await;
    }
}
