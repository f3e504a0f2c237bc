//! Backup and restore through whole agents: what a VM of the old cluster is in the new one, and who
//! may restore.

use crate::rig::Rig;
use proto::v1::membership_client::MembershipClient;
use proto::v1::{
    BackupRequest, ClusterStatusRequest, RestoreNames, RestoreRequest, RestoreResponse,
    VerifyRequest,
};
use tonic::{Code, Status};

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
