//! Whole agents in this process, on loopback: forming a cluster, the checks of `vm create`, what is
//! refused without a quorum. VM processes are not needed here. Root is: the local socket is its.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::rig::Rig;
use cluster::{Consistency, Txn};
use node_agent::agent::Agent;
use proto::record::HaLeaderRecord;
use proto::v1::membership_client::MembershipClient;
use proto::v1::storage_client::StorageClient;
use proto::v1::vms_client::VmsClient;
use proto::v1::{
    ClusterStatusRequest, CreateNetworkRequest, CreateTokenRequest, CreateVmRequest,
    HeartbeatRequest, InitRequest, ListVmsRequest, MigrateVmRequest, Network, RemoveNodeRequest,
    VmRequest,
};
use proto::{NodeId, keys};
use tokio_util::sync::CancellationToken;
use tonic::Code;

const WEB: &str = "name = \"web\"\ncpus = 2\nmemory = \"64MiB\"\n[boot]\nkernel = \"shared/vmlinuz\"\n[[disks]]\nimage = \"shared/web.raw\"\nsize = \"1MiB\"\n[[nics]]\nnetwork = \"lan\"\n[ha]\nenabled = true\n";

async fn ready(dir: &Path) -> Rig {
    let rig = Rig::new(dir).await;
    rig.init("n1").await;
    rig.online(1).await;
    rig.pool("shared", "shared-dir", &dir.join("shared")).await;
    rig.pool("local", "local-dir", &dir.join("local")).await;
    for pool in ["shared", "local"] {
        rig.image(pool, "vmlinuz", "kernel", b"\x7fELF".to_vec()).await;
    }
    rig.image("shared", "data.raw", "disk", vec![7; 4096]).await;
    let network = Network { name: "lan".into(), bridge: "hf-test".into(), uplink: String::new() };
    let mut storage = StorageClient::new(rig.channel.clone());
    storage.create_network(CreateNetworkRequest { network: Some(network) }).await.unwrap();
    rig
}

#[tokio::test(flavor = "multi_thread")]
async fn before_a_cluster_only_membership_answers() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::new(dir.path()).await;
    let mut membership = MembershipClient::new(rig.channel.clone());
    let status = membership.status(ClusterStatusRequest {}).await.unwrap().into_inner();
    assert!(!status.initialized);
    let refused = VmsClient::new(rig.channel.clone()).list(ListVmsRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("cluster init"), "{refused}");
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::metadata(&rig.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    rig.init("n1").await;
    let status = membership.status(ClusterStatusRequest {}).await.unwrap().into_inner();
    assert!(status.initialized && status.quorum);
    assert!(rig.vms().await.is_empty());
    let again = InitRequest { cluster_name: "x".into(), node_name: "n1".into() };
    let refused = membership.init(again).await.unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists, "{refused}");
    rig.agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_formed_to_its_end_though_nobody_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::new(dir.path()).await;
    let mut membership = MembershipClient::new(rig.channel.clone());
    let request = InitRequest { cluster_name: "test".into(), node_name: "n1".into() };
    // Long enough to be asked, and too short for a database to be made.
    let asked = membership.init(request);
    let hung_up = tokio::time::timeout(Duration::from_millis(10), asked).await;
    let begin = Instant::now();
    loop {
        let status = membership.status(ClusterStatusRequest {}).await.unwrap().into_inner();
        if status.initialized && status.quorum {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "{status:?}, {hung_up:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    rig.agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_folder_has_one_agent() {
    let dir = tempfile::tempdir().unwrap();
    let first = Rig::new(dir.path()).await;
    let second = || {
        let mut config = crate::rig::config(dir.path());
        config.data_dir = dir.path().join("other-data");
        config.socket = Some(dir.path().join("other.sock"));
        Agent::start(config, CancellationToken::new())
    };
    let refused = second().await.unwrap_err().to_string();
    assert!(refused.contains("another node-agent"), "{refused}");
    first.agent.end().await;
    let (agent, _failures) = second().await.unwrap();
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_vm_documents_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let rig = ready(dir.path()).await;
    let cases = [
        ("cpus = 2", "cpuss = 2", Code::InvalidArgument, "cpuss"),
        ("cpus = 2", "cpus = 0", Code::InvalidArgument, "`cpus` is refused"),
        ("64MiB", "8192GiB", Code::InvalidArgument, "more than any node has"),
        ("shared/vmlinuz", "shared/none", Code::NotFound, "shared/none"),
        ("shared/vmlinuz", "other/vmlinuz", Code::NotFound, "pool `other`"),
        ("shared/vmlinuz", "local/vmlinuz", Code::FailedPrecondition, "highly available"),
        ("\"lan\"", "\"wan\"", Code::NotFound, "network `wan`"),
        ("size = \"1MiB\"", "readonly = true", Code::NotFound, "shared/web.raw"),
        ("shared/vmlinuz", "shared/data.raw", Code::FailedPrecondition, "imported as disk"),
        ("shared/web.raw", "shared/vmlinuz", Code::FailedPrecondition, "cannot be a writable disk"),
    ];
    for (from, to, code, words) in cases {
        let refused = rig.create(&WEB.replace(from, to)).await.unwrap_err();
        assert_eq!(refused.code(), code, "{to}: {refused}");
        assert!(refused.message().contains(words), "{to}: {refused}");
        assert!(rig.vms().await.is_empty(), "{to}");
    }
    let request =
        CreateVmRequest { document: WEB.into(), node: "n9".into(), ..CreateVmRequest::default() };
    let refused = VmsClient::new(rig.channel.clone()).create(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused}");
    let request =
        CreateVmRequest { document: WEB.into(), dry_run: true, ..CreateVmRequest::default() };
    let checked = VmsClient::new(rig.channel.clone()).create(request).await.unwrap().into_inner();
    assert_eq!(checked.vm.unwrap().node, "n1");
    assert!(rig.vms().await.is_empty(), "a dry run creates nothing");
    rig.agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_and_disks_belong_to_one_vm_until_it_is_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let rig = ready(dir.path()).await;
    assert_eq!(rig.create(WEB).await.unwrap(), "web");
    let refused = rig.create(WEB).await.unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists, "{refused}");
    let thief = WEB.replace("\"web\"", "\"thief\"");
    let refused = rig.create(&thief).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("belongs to VM `web`"), "{refused}");

    // A kernel that is used cannot be written, nor a disk that is written be read.
    let writer = thief.replace("shared/web.raw", "shared/vmlinuz");
    let refused = rig.create(&writer).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("it is a kernel of VM"), "{refused}");
    let reader = thief.replace("size = \"1MiB\"", "readonly = true");
    let refused = rig.create(&reader).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");

    let migrate = |target: &str| MigrateVmRequest {
        vm: "web".into(),
        target: target.into(),
        ..MigrateVmRequest::default()
    };
    let mut vms = VmsClient::new(rig.channel.clone());
    let refused = vms.migrate(migrate("n1")).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("only a running VM"), "{refused}");
    let refused = vms.stop(VmRequest { vm: "web".into() }).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let refused = vms.stop(VmRequest { vm: "none".into() }).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused}");

    rig.delete("web").await;
    assert!(rig.vms().await.is_empty());
    assert_eq!(rig.create(&thief).await.unwrap(), "thief");
    rig.agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_node_is_answered_nothing() {
    let dirs: Vec<_> = (0..2).map(|_| tempfile::tempdir().unwrap()).collect();
    let first = Rig::new(dirs[0].path()).await;
    first.init("n1").await;
    first.online(1).await;
    let second = Rig::new(dirs[1].path()).await;
    second.join(&first, "n2").await;
    first.online(2).await;
    let ids = [&first, &second].map(|rig| rig.agent.node().unwrap().id);
    // A connection with the second node's certificate, to outlive its membership.
    let channel = second.agent.node().unwrap().cluster().peer_channel(ids[0]).unwrap();
    let mut vms = VmsClient::new(channel.clone());
    vms.list(ListVmsRequest {}).await.unwrap();
    let mut membership = MembershipClient::new(first.channel.clone());
    let begin = Instant::now();
    // Where the node to be removed leads, leadership moves first.
    while let Err(status) = membership.remove_node(RemoveNodeRequest { node: "n2".into() }).await {
        assert!(begin.elapsed() < Duration::from_secs(30), "{status}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // Its connection is refused answers, or gone already, and no other one comes about.
    let nothing = [Code::PermissionDenied, Code::Cancelled, Code::Unavailable];
    let refused = vms.list(ListVmsRequest {}).await.unwrap_err();
    assert!(nothing.contains(&refused.code()), "{refused}");
    let mut membership = MembershipClient::new(channel);
    let token = membership.create_token(CreateTokenRequest { ttl_s: 60 }).await.unwrap_err();
    assert!(nothing.contains(&token.code()), "{token}");
    let mut alive = VmsClient::new(first.channel.clone());
    alive.list(ListVmsRequest {}).await.unwrap();
    first.agent.end().await;
    second.agent.end().await;
}

/// A leader that was deposed while it wrote that it acts is answered by the next one.
#[tokio::test(flavor = "multi_thread")]
async fn a_leadership_does_not_act_where_a_later_one_does() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::new(dir.path()).await;
    rig.init("n1").await;
    rig.online(1).await;
    let later = HaLeaderRecord { node: NodeId(9), term: 1_000_000 };
    let write = async |rig: &Rig, record: &HaLeaderRecord| {
        let txn = Txn::new().put(keys::HA_LEADER, serde_json::to_vec(record).unwrap());
        rig.agent.node().unwrap().cluster().txn(txn).await.unwrap();
    };
    write(&rig, &later).await;
    rig.agent.end().await;
    let rig = Rig::with(rig.config).await;
    let node = rig.agent.node().unwrap();
    let begin = Instant::now();
    while node.cluster().confirm_leadership().await.is_err() {
        assert!(begin.elapsed() < Duration::from_secs(30), "nobody leads");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // It plans each second.
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(3) {
        let answer = node.leader.heartbeat(&node, node.id, HeartbeatRequest::default()).await;
        assert_eq!(answer.unwrap_err().code(), Code::Unavailable);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let record = node.store.record::<HaLeaderRecord>(keys::HA_LEADER, Consistency::Linearizable);
    assert_eq!(record.await.unwrap().unwrap().value, later);
    write(&rig, &HaLeaderRecord { term: 0, ..later }).await;
    rig.online(1).await;
    rig.agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_changes_are_refused_in_time_and_reads_answer() {
    let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let first = ready(dirs[0].path()).await;
    let mut others = Vec::new();
    for (number, dir) in [(2, &dirs[1]), (3, &dirs[2])] {
        let rig = Rig::new(dir.path()).await;
        rig.join(&first, &format!("n{number}")).await;
        others.push(rig);
    }
    first.online(3).await;
    let local_network = WEB.replace("\"web\"", "\"db\"").replace("web.raw", "db.raw");
    // Any node takes the request.
    assert_eq!(others[1].create(&local_network).await.unwrap(), "db");

    // Three voters first, or the two that go are no majority.
    let begin = Instant::now();
    loop {
        let mut membership = MembershipClient::new(first.channel.clone());
        let status = membership.status(ClusterStatusRequest {}).await.unwrap().into_inner();
        if status.failures_tolerated == 1 {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "no three voters: {status:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for other in &others {
        other.agent.end().await;
    }
    let begin = Instant::now();
    let refused = first.create(WEB).await.unwrap_err();
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(refused.message().contains("no quorum"), "{refused}");
    assert_eq!(first.vms().await, ["db"]);
    first.agent.end().await;
}
