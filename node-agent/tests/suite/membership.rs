//! Nodes that leave: drain, removal, coming back. Whole agents in this process, on loopback.

use std::time::{Duration, Instant};

use crate::rig::Rig;
use proto::record::{Phase, Placement, RemovalRecord, RemovalState, Requested};
use proto::v1::membership_client::MembershipClient;
use proto::v1::nodes_client::NodesClient;
use proto::v1::vms_client::VmsClient;
use proto::v1::{
    ClusterStatusRequest, CreateVmRequest, DrainNodeRequest, RemoveNodeRequest, RenameNodeRequest,
    TransferLeaderRequest,
};
use proto::{NodeId, keys};
use tempfile::TempDir;
use tonic::{Code, Status};

/// A stopped VM whose files are in `pool`.
fn document(name: &str, pool: &str) -> String {
    format!(
        "name = \"{name}\"\ncpus = 1\nmemory = \"64MiB\"\n[boot]\nkernel = \"{pool}/vmlinuz\"\n[[disks]]\nimage = \"{pool}/{name}.raw\"\nsize = \"1MiB\"\n"
    )
}

/// So many agents in one cluster, with a shared and a local pool.
async fn cluster(count: usize) -> (Vec<TempDir>, Vec<Rig>) {
    let dirs: Vec<_> = (0..count).map(|_| tempfile::tempdir().unwrap()).collect();
    let first = Rig::new(dirs[0].path()).await;
    first.init("n1").await;
    first.online(1).await;
    let mut rigs = vec![first];
    for (place, dir) in dirs.iter().enumerate().skip(1) {
        let rig = Rig::new(dir.path()).await;
        rig.join(&rigs[0], &format!("n{}", place + 1)).await;
        rigs.push(rig);
    }
    rigs[0].online(count).await;
    let shared = dirs[0].path();
    rigs[0].pool("shared", "shared-dir", &shared.join("shared")).await;
    rigs[0].pool("local", "local-dir", &shared.join("local")).await;
    rigs[0].image("shared", "vmlinuz", "kernel", b"\x7fELF".to_vec()).await;
    rigs[0].image("local", "vmlinuz", "kernel", b"\x7fELF".to_vec()).await;
    (dirs, rigs)
}

async fn create_on(rig: &Rig, node: &str, document: String) {
    let request = CreateVmRequest { document, node: node.into(), ..CreateVmRequest::default() };
    VmsClient::new(rig.channel.clone()).create(request).await.unwrap();
}

async fn remove(rig: &Rig, node: &str) -> Result<(), Status> {
    let request = RemoveNodeRequest { node: node.into() };
    MembershipClient::new(rig.channel.clone()).remove_node(request).await.map(drop)
}

/// Where the node to be removed leads, leadership moves first; a change may be under way.
async fn removed(rig: &Rig, node: &str) {
    let begin = Instant::now();
    while let Err(status) = remove(rig, node).await {
        assert!(begin.elapsed() < Duration::from_secs(30), "{status}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn removal(rig: &Rig, id: NodeId) -> Option<RemovalRecord> {
    let store = &rig.agent.node().unwrap().store;
    let record = store.record(&keys::removal(id), cluster::Consistency::Linearizable).await;
    record.unwrap().map(|record| record.value)
}

#[tokio::test(flavor = "multi_thread")]
async fn stopped_vms_leave_a_drained_node_and_it_can_be_removed() {
    let (_dirs, rigs) = cluster(2).await;
    create_on(&rigs[1], "n1", document("web", "shared")).await;
    create_on(&rigs[1], "n1", document("own", "local")).await;
    let refused = remove(&rigs[1], "n1").await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("own, web"), "{refused}");
    // The refusal leaves nothing behind.
    assert_eq!(removal(&rigs[1], NodeId(1)).await, None);

    let mut nodes = NodesClient::new(rigs[1].channel.clone());
    let task = nodes.drain(DrainNodeRequest { node: "n1".into() }).await.unwrap().into_inner();
    let drained = rigs[1].done(task).await;
    assert_eq!(rigs[1].vm("web").await.node, "n2");
    assert_eq!(rigs[1].vm("own").await.node, "n1");
    assert!(drained.result.contains("own") && !drained.result.contains("web"), "{drained:?}");
    let refused = remove(&rigs[1], "n1").await.unwrap_err();
    assert!(refused.message().contains("owns VMs: own;"), "{refused}");
    rigs[1].delete("own").await;
    removed(&rigs[1], "n1").await;
    assert_eq!(rigs[1].vms().await, ["web"]);
    for rig in rigs {
        rig.agent.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_was_interrupted_gives_the_node_nothing_and_is_repeated() {
    let (dirs, rigs) = cluster(2).await;
    let id = rigs[1].agent.node().unwrap().id;
    let cluster = rigs[0].agent.node().unwrap().cluster().clone();
    let leaving = RemovalRecord { name: "n2".into(), state: RemovalState::Leaving };
    let leaving = serde_json::to_vec(&leaving).unwrap();
    // Announced, and got no further: whoever decided before on this node comes to nothing.
    let announce = cluster::Txn::new().put(keys::removal(id), leaving.clone());
    cluster.txn(announce).await.unwrap();
    let request = CreateVmRequest {
        document: document("web", "shared"),
        node: "n2".into(),
        ..CreateVmRequest::default()
    };
    let refused = VmsClient::new(rigs[0].channel.clone()).create(request).await.unwrap_err();
    assert!(rigs[0].vms().await.is_empty(), "{refused}");
    // A migration to it, at its commit.
    create_on(&rigs[0], "n1", document("web", "shared")).await;
    let store = &rigs[0].agent.node().unwrap().store;
    let web = "web".parse().unwrap();
    let give = |placement: &mut Placement| {
        placement.owner = id;
        Ok(())
    };
    let guard = || node_agent::store::giving_to(cluster::Txn::new(), id);
    assert!(store.update_placement_if(&web, give, guard).await.is_err());

    // Asked of the node itself, too: another one does it.
    removed(&rigs[1], "n2").await;
    assert_eq!(removal(&rigs[0], id).await.unwrap().state, RemovalState::Removed);
    let gone = rigs[1].agent.node().unwrap().cluster().clone();
    let why = tokio::time::timeout(Duration::from_secs(30), gone.failed()).await.unwrap();
    assert!(matches!(why, cluster::StoreError::Removed), "{why}");
    rigs[1].agent.end().await;
    let again = node_agent::agent::Agent::start(
        rigs[1].config.clone(),
        tokio_util::sync::CancellationToken::new(),
    );
    let ended = again.await.map(drop).unwrap_err();
    let ended = ended.downcast::<node_agent::agent::Ended>().unwrap();
    assert!(matches!(&ended, node_agent::agent::Ended::Removed(why) if why.contains("join anew")));

    // As if the first attempt had ended after Raft's part: the name still finds it.
    let stale = serde_json::to_vec(&rigs[0].agent.node().unwrap().record(None));
    let stale =
        String::from_utf8(stale.unwrap()).unwrap().replace("\"node_id\":1,", "\"node_id\":2,");
    let half = cluster::Txn::new().put(keys::removal(id), leaving).put(keys::node(id), stale);
    cluster.txn(half).await.unwrap();
    assert_eq!(remove(&rigs[0], "n3").await.unwrap_err().code(), Code::NotFound);
    remove(&rigs[0], "n2").await.unwrap();
    let nodes = store.nodes(cluster::Consistency::Linearizable).await.unwrap();
    assert_eq!(nodes.keys().copied().collect::<Vec<_>>(), [NodeId(1)]);
    assert_eq!(remove(&rigs[0], "n2").await.unwrap_err().code(), Code::NotFound);

    // Emptied, it joins again under its old name, as another node.
    std::fs::remove_dir_all(dirs[1].path().join("data")).unwrap();
    let back = Rig::new(dirs[1].path()).await;
    back.join(&rigs[0], "n2").await;
    rigs[0].online(2).await;
    assert!(back.agent.node().unwrap().id > id);
    rigs[0].agent.end().await;
    back.agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_node_is_called_so_everywhere_and_leadership_leaves_a_drained_one() {
    let (_dirs, rigs) = cluster(2).await;
    let mut nodes = NodesClient::new(rigs[0].channel.clone());
    let rename =
        |node: &str, name: &str| RenameNodeRequest { node: node.into(), name: name.into() };
    let refused = nodes.rename(rename("n2", "n1")).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    let renamed = nodes.rename(rename("n2", "two")).await.unwrap().into_inner();
    assert_eq!((renamed.node_id, renamed.name.as_str()), (2, "two"));
    create_on(&rigs[0], "two", document("web", "shared")).await;
    assert_eq!(rigs[1].vm("web").await.node, "two");
    let node = rigs[1].agent.node().unwrap();
    assert_eq!(node.name().as_str(), "two");
    let records = node.store.nodes(cluster::Consistency::Linearizable).await.unwrap();
    assert_eq!(records[&node.id].value.name.as_str(), "two");

    let mut membership = MembershipClient::new(rigs[0].channel.clone());
    let to = TransferLeaderRequest { node: "two".into() };
    // A vote is given once the node has kept up for a while.
    let begin = Instant::now();
    while let Err(status) = membership.transfer_leader(to.clone()).await {
        assert!(begin.elapsed() < Duration::from_secs(30), "{status}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(node.cluster().leader(), Some(node.id));
    let status = membership.status(ClusterStatusRequest {}).await.unwrap().into_inner();
    let fails: Vec<_> = status.if_fails.iter().map(|fails| (&*fails.node, fails.quorum)).collect();
    assert_eq!(fails, [("n1", false), ("two", false)], "{status:?}");
    assert_eq!(status.members[1].health, "leader", "{status:?}");
    let task = nodes.drain(DrainNodeRequest { node: "two".into() }).await.unwrap().into_inner();
    rigs[0].done(task).await;
    let first = rigs[0].agent.node().unwrap();
    assert_eq!(first.cluster().leader(), Some(NodeId(1)));
    assert_eq!(rigs[1].vm("web").await.node, "n1");

    // With all of them drained, the lead stays: passed to and fro, no leader would ever have waited
    // long enough to call a node dead. Each looks every two seconds.
    let term = first.cluster().term();
    let mut nodes = NodesClient::new(rigs[1].channel.clone());
    nodes.drain(DrainNodeRequest { node: "n1".into() }).await.unwrap();
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(7) {
        let leader = first.cluster().leader();
        assert_eq!((leader, first.cluster().term()), (Some(NodeId(1)), term));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for rig in rigs {
        rig.agent.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_witness_is_given_no_vm_and_runs_none() {
    let (_dirs, rigs) = cluster(1).await;
    let dir = tempfile::tempdir().unwrap();
    let mut config = crate::rig::config(dir.path());
    config.node.witness = true;
    let witness = Rig::with(config).await;
    witness.join(&rigs[0], "w").await;
    rigs[0].online(2).await;
    let request = CreateVmRequest {
        document: document("web", "shared"),
        node: "w".into(),
        ..CreateVmRequest::default()
    };
    let refused = VmsClient::new(rigs[0].channel.clone()).create(request).await.unwrap_err();
    assert!(refused.message().contains("witness"), "{refused}");
    create_on(&rigs[0], "n1", document("web", "shared")).await;
    // Whoever gives it one all the same, as before it became a witness.
    let store = &rigs[0].agent.node().unwrap().store;
    let (web, id) = ("web".parse().unwrap(), witness.agent.node().unwrap().id);
    let given = store.update_placement_if(
        &web,
        |placement| {
            placement.owner = id;
            placement.generation = placement.generation.next();
            placement.phase = Phase::Starting;
            placement.requested = Requested::Started;
            Ok::<_, String>(())
        },
        cluster::Txn::new,
    );
    given.await.unwrap();
    let begin = Instant::now();
    loop {
        let vm = rigs[0].vm("web").await;
        if vm.message.contains("witness") {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "{vm:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    rigs[0].agent.end().await;
    witness.agent.end().await;
}
