//! Backup, restore and recovery through whole agents: what a VM of the old cluster is in the new one,
//! who may take a backup or restore one, and what it takes to recover.

use crate::rig::Rig;
use proto::v1::membership_client::MembershipClient;
use proto::v1::{
    BackupRequest, ClusterStatusRequest, CreateVmRequest, RestoreNames, RestoreRequest,
    RestoreResponse, VerifyRequest,
};
use tonic::{Code, Request, Status};

/// A VM as its document says.
const WEB: &str = "name = \"web\"\ncpus = 1\nmemory = \"64MiB\"\n[boot]\nkernel = \"shared/vmlinuz\"\n[[disks]]\nimage = \"shared/web.raw\"\nsize = \"1MiB\"\n[ha]\nenabled = true\n";

async fn backup(rig: &Rig) -> Vec<u8> {
    let mut client = MembershipClient::new(rig.channel.clone());
    let mut chunks = client.backup(BackupRequest { stale: false }).await.unwrap().into_inner();
    let mut bytes = Vec::new();
    while let Some(chunk) = chunks.message().await.unwrap() {
        bytes.extend(chunk.data);
    }
    bytes
}

async fn restore(rig: &Rig, bytes: &[u8]) -> Result<RestoreResponse, Status> {
    let names = RestoreNames { cluster_name: "again".into(), node_name: "r1".into() };
    let first = RestoreRequest { names: Some(names), data: Vec::new() };
    let rest = bytes.chunks(1000).map(|data| RestoreRequest { names: None, data: data.to_vec() });
    let messages: Vec<_> = std::iter::once(first).chain(rest).collect();
    let mut client = MembershipClient::new(rig.channel.clone());
    Ok(client.restore(futures::stream::iter(messages)).await?.into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_cluster_has_the_vms_and_starts_none_by_itself() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let old = Rig::new(dir.path()).await;
    old.init("n1").await;
    old.online(1).await;
    old.pool("shared", "shared-dir", &dir.path().join("shared")).await;
    old.image("shared", "vmlinuz", "kernel", b"\x7fELF".to_vec()).await;
    old.create(WEB).await.unwrap();
    let before = old.vm("web").await;
    let bytes = backup(&old).await;
    let verified = MembershipClient::new(old.channel.clone()).verify(VerifyRequest {}).await;
    let verified = verified.unwrap().into_inner();
    assert!(!verified.differs && verified.members.len() == 1, "{verified:?}");
    let already = restore(&old, &bytes).await.unwrap_err();
    assert_eq!(already.code(), Code::AlreadyExists, "{already}");

    let new = Rig::new(other.path()).await;
    let damaged = restore(&new, &bytes[..bytes.len() - 1]).await.unwrap_err();
    assert_eq!(damaged.code(), Code::InvalidArgument, "{damaged}");
    assert!(damaged.message().contains("cut off"), "{damaged}");
    let mut membership = MembershipClient::new(new.channel.clone());
    let status = membership.status(ClusterStatusRequest {}).await.unwrap().into_inner();
    assert!(!status.initialized, "it is still in no cluster");

    let restored = restore(&new, &bytes).await.unwrap();
    assert_eq!((restored.cluster_name.as_str(), restored.vms), ("again", 1));
    new.online(1).await;
    let after = new.vm("web").await;
    assert_eq!((after.id, after.document), (before.id, before.document));
    assert_eq!((after.phase.as_str(), after.node.as_str()), ("stopped", "r1"));
    assert!(after.generation > before.generation + 100_000, "{}", after.generation);
    assert!(after.message.contains("old cluster"), "{}", after.message);
    let status = membership.status(ClusterStatusRequest {}).await.unwrap().into_inner();
    assert_ne!(status.cluster_id, restored.from_cluster_id);
    let names: Vec<_> = status.members.into_iter().filter_map(|of| Some(of.member?.name)).collect();
    assert_eq!(names, ["r1"]);
    // Its image and its disk are still its own.
    let taken = new.create(&WEB.replace("\"web\"", "\"other\"")).await.unwrap_err();
    assert!(taken.message().contains("web"), "{taken}");
    old.agent.end().await;
    new.agent.end().await;
}

/// Neither another node nor whomever it speaks for takes a backup, or restores one.
async fn secrets_stay(of: &Rig, with: &Rig) {
    let id = of.agent.node().unwrap().id;
    let channel = with.agent.node().unwrap().cluster().peer_channel(id).unwrap();
    let mut remote = MembershipClient::new(channel);
    remote.status(ClusterStatusRequest {}).await.unwrap();
    for user in ["root", "ann"] {
        let mut request = Request::new(BackupRequest { stale: true });
        request.metadata_mut().insert("holdfast-user", user.parse().unwrap());
        let refused = remote.backup(request).await.map(drop).unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
        for words in ["secrets under priv/", "as root", "clusterctl --socket /"] {
            assert!(refused.message().contains(words), "{refused}");
        }
    }
    let restored = remote.restore(futures::stream::empty()).await.unwrap_err();
    assert_eq!(restored.code(), Code::PermissionDenied, "{restored}");
    assert!(restored.message().contains("--socket"), "{restored}");
}

/// A recovery that must be refused, and change nothing.
async fn refused(rig: &Rig, confirm: Option<&str>, why: &str) {
    let error = node_agent::recover::recover(rig.config.clone(), "", confirm).await.unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains(why), "{text}");
    let names = std::fs::read_dir(&rig.config.data_dir).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let made: Vec<_> = names.filter(|name| name.contains("recover")).collect();
    assert_eq!(made, [""; 0], "after {why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_survivor_is_recovered_only_alone_and_by_its_name_and_starts_no_vm_of_others() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let lost = Rig::new(dir.path()).await;
    lost.init("n1").await;
    lost.online(1).await;
    let survivor = Rig::new(other.path()).await;
    survivor.join(&lost, "n2").await;
    lost.online(2).await;
    secrets_stay(&lost, &survivor).await;
    lost.pool("shared", "shared-dir", &dir.path().join("shared")).await;
    lost.image("shared", "vmlinuz", "kernel", b"\x7fELF".to_vec()).await;
    let own = WEB.replace("\"web\"", "\"own\"").replace("web.raw", "own.raw");
    let own = own.replace("[ha]\nenabled = true\n", "");
    for (node, document) in [("n1", WEB), ("n2", &own)] {
        let document = document.to_owned();
        let request = CreateVmRequest { document, node: node.into(), ..CreateVmRequest::default() };
        lost.vm_client().create(request).await.unwrap();
    }
    // Asked there: what it answers it knows to be agreed to.
    let (theirs, own) = (survivor.vm("web").await, survivor.vm("own").await);
    assert_eq!((theirs.node.as_str(), own.node.as_str()), ("n1", "n2"));

    let confirm = Some("test/n2");
    refused(&survivor, confirm, "must be stopped first").await;
    survivor.agent.end().await;
    refused(&survivor, confirm, "not all others of the old cluster are gone: n1 (").await;
    lost.agent.end().await;
    for confirm in [None, Some("recover"), Some("test/n1"), Some("n2"), Some("")] {
        refused(&survivor, confirm, "--confirm test/n2").await;
    }
    node_agent::recover::recover(survivor.config.clone(), "", confirm).await.unwrap();

    let survivor = Rig::with(survivor.config.clone()).await;
    survivor.online(1).await;
    let (theirs_now, own_now) = (survivor.vm("web").await, survivor.vm("own").await);
    assert_eq!((theirs_now.phase.as_str(), theirs_now.node.as_str()), ("stopped", "n2"));
    assert!(theirs_now.generation > theirs.generation + 100_000, "{}", theirs_now.generation);
    assert_eq!((own_now.generation, own_now.node.as_str()), (own.generation, "n2"));
    let mut membership = MembershipClient::new(survivor.channel.clone());
    let status = membership.status(ClusterStatusRequest {}).await.unwrap().into_inner();
    let names: Vec<_> = status.members.into_iter().filter_map(|of| Some(of.member?.name)).collect();
    assert_eq!((names, status.quorum), (vec!["n2".to_owned()], true));
    // What was lost comes back: it is in the old cluster, and the two are strangers.
    let lost = Rig::with(lost.config.clone()).await;
    let mut membership = MembershipClient::new(lost.channel.clone());
    let old = membership.status(ClusterStatusRequest {}).await.unwrap().into_inner();
    assert_ne!(old.cluster_id, status.cluster_id, "{old:?}");
    assert_eq!(old.members.len(), 2, "{old:?}");
    survivor.agent.end().await;
    lost.agent.end().await;
}
