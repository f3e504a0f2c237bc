//! Real VM processes on this host's KVM, under agents in this process: start, pause, adoption by
//! the next agent, live migration between two agents, stop. The guest is a flat firmware image that
//! counts in memory for ever, which runs on every KVM (an emulated one too).

mod rig;

use std::path::Path;
use std::time::{Duration, Instant};

use proto::v1::{CreateVmRequest, MigrateVmRequest, VmRequest};
use rig::Rig;

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
        ..rig::config(dir)
    }
}

fn kvm_is_here() -> bool {
    let here = Path::new("/dev/kvm").exists();
    if !here {
        eprintln!("SKIPPED: this host has no /dev/kvm; the lab's nodes run these steps");
    }
    here
}

async fn first(dir: &Path) -> Rig {
    // VM processes run as users of their own and must reach their files.
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    let rig = Rig::with(config(dir, 910_000)).await;
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
