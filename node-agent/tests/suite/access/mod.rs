//! Roles: whole members over real TLS, a client of each role and one without.

mod behind;
mod client;

use std::time::{Duration, Instant};

use client::{
    LIMIT, client, commit, committed, denied, dial, dial_at, file, get, has_role, not_committed,
    papers, role, who,
};
use proto::v1::config_client::ConfigClient;
use proto::v1::ha_client::HaClient;
use proto::v1::membership_client::MembershipClient;
use proto::v1::nodes_client::NodesClient;
use proto::v1::peer_client::PeerClient;
use proto::v1::raft_client::RaftClient;
use proto::v1::storage_client::StorageClient;
use proto::v1::tasks_client::TasksClient;
use proto::v1::vms_client::VmsClient;
use proto::v1::{
    BackupRequest, ClusterStatusRequest, ConsoleInput, CreatePoolRequest, CreateTokenRequest,
    CreateVmRequest, DrainNodeRequest, GetTaskRequest, HaStatusRequest, HeartbeatRequest, Image,
    ImportImageRequest, InitRequest, ListTasksRequest, ListVmsRequest, MigrateVmRequest, Put,
    RaftMessage, ResumeNodeRequest, RevokeCertificatesRequest, TxnRequest, VerifyRequest,
    VmLogRequest, VmRequest, WatchRequest, WriteOp, write_op,
};
use tempfile::TempDir;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::rig::Rig;

const WEB: &str = "name = \"web\"\ncpus = 1\nmemory = \"64MiB\"\n[boot]\nkernel = \"shared/vmlinuz\"\n[[disks]]\nimage = \"shared/web.raw\"\nsize = \"1MiB\"\n";

/// Two members with a pool and a kernel.
async fn two() -> (Vec<TempDir>, Rig, Rig) {
    let dirs: Vec<_> = (0..2).map(|_| tempfile::tempdir().unwrap()).collect();
    let first = Rig::new(dirs[0].path()).await;
    first.init("n1").await;
    first.online(1).await;
    let second = Rig::new(dirs[1].path()).await;
    second.join(&first, "n2").await;
    first.online(2).await;
    first.pool("shared", "shared-dir", &dirs[0].path().join("shared")).await;
    first.image("shared", "vmlinuz", "kernel", b"\x7fELF".to_vec()).await;
    (dirs, first, second)
}

fn web(vm: &str) -> CreateVmRequest {
    let document = WEB.replace("web", vm);
    CreateVmRequest { document, ..CreateVmRequest::default() }
}

fn vm(name: &str) -> VmRequest {
    VmRequest { vm: name.into() }
}

fn put(key: &str) -> TxnRequest {
    let put = Put { key: key.into(), value: b"x".to_vec() };
    let writes = vec![WriteOp { op: Some(write_op::Op::Put(put)) }];
    TxnRequest { writes, ..TxnRequest::default() }
}

fn drain() -> DrainNodeRequest {
    DrainNodeRequest { node: "n2".into() }
}

async fn token(channel: &Channel) -> Result<(), Status> {
    let request = CreateTokenRequest { ttl_s: 60 };
    MembershipClient::new(channel.clone()).create_token(request).await.map(drop)
}

fn image(name: &str) -> ImportImageRequest {
    let header = Image { pool: "shared".into(), name: name.into(), ..Image::default() };
    ImportImageRequest { header: Some(Image { kind: "disk".into(), ..header }), data: Vec::new() }
}

/// What a role that sees may see, and nobody writes.
async fn sees(channel: &Channel) {
    assert!(get(channel, "storage.toml").await.unwrap());
    let watch = WatchRequest { prefix: "notes/".into(), from_revision: 0 };
    ConfigClient::new(channel.clone()).watch(watch).await.unwrap();
    VmsClient::new(channel.clone()).list(ListVmsRequest {}).await.unwrap();
    TasksClient::new(channel.clone()).list(ListTasksRequest { limit: 9 }).await.unwrap();
    HaClient::new(channel.clone()).status(HaStatusRequest {}).await.unwrap();
    let status = MembershipClient::new(channel.clone()).status(ClusterStatusRequest {}).await;
    assert!(status.unwrap().into_inner().initialized);
    let secret = get(channel, "priv/ca").await.unwrap_err();
    assert_eq!(secret.code(), Code::PermissionDenied, "{secret}");
}

/// All that the client `name` cannot do, who has less than the role `operator`.
async fn works_with_nothing(channel: &Channel, name: &str) {
    let mut vms = VmsClient::new(channel.clone());
    denied(vms.create(web("other")).await, name, "operator");
    denied(vms.start(vm("web")).await, name, "operator");
    denied(vms.stop(vm("web")).await, name, "operator");
    denied(vms.delete(vm("web")).await, name, "operator");
    let migrate = MigrateVmRequest { vm: "web".into(), ..MigrateVmRequest::default() };
    denied(vms.migrate(migrate).await, name, "operator");
    let input = ConsoleInput { vm: "web".into(), data: Vec::new() };
    denied(vms.console(futures::stream::iter([input])).await.map(drop), name, "operator");
    denied(commit(channel, &[file("notes/a", "x")]).await, name, "operator");
    denied(ConfigClient::new(channel.clone()).txn(put("notes/a")).await, name, "operator");
    let mut storage = StorageClient::new(channel.clone());
    denied(storage.import_image(futures::stream::iter([image("a")])).await, name, "operator");
    let task = GetTaskRequest { task_id: "1-1".into() };
    denied(TasksClient::new(channel.clone()).cancel(task).await, name, "operator");
}

/// All that the client `name` cannot do, who has less than the role `admin`.
async fn administers_nothing(channel: &Channel, name: &str) {
    denied(token(channel).await, name, "admin");
    denied(NodesClient::new(channel.clone()).drain(drain()).await, name, "admin");
    let pool = CreatePoolRequest::default();
    denied(StorageClient::new(channel.clone()).create_pool(pool).await, name, "admin");
    let mut membership = MembershipClient::new(channel.clone());
    denied(membership.verify(VerifyRequest {}).await, name, "admin");
    let revoke = RevokeCertificatesRequest { what: "ann".into() };
    denied(membership.revoke_certificates(revoke).await, name, "admin");
    // Whatever it says of itself: that is believed from nodes.
    let mut forged = Request::new(CreateTokenRequest { ttl_s: 60 });
    for (key, value) in [("holdfast-user", "ann"), ("holdfast-hops", "1")] {
        forged.metadata_mut().insert(key, value.parse().unwrap());
    }
    denied(membership.create_token(forged).await, name, "admin");
}

/// What no client may do, an administrator neither.
async fn is_no_node_and_not_root(channel: &Channel) {
    let beat = PeerClient::new(channel.clone()).heartbeat(HeartbeatRequest::default()).await;
    let vote = RaftClient::new(channel.clone()).vote(RaftMessage { payload: vec![] }).await;
    for refused in [beat.map(drop).unwrap_err(), vote.map(drop).unwrap_err()] {
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
        assert!(refused.message().contains("nodes only"), "{refused}");
    }
    let mut membership = MembershipClient::new(channel.clone());
    let init = membership.init(InitRequest::default()).await.map(drop).unwrap_err();
    let backup = membership.backup(BackupRequest { stale: true }).await.map(drop).unwrap_err();
    for refused in [init, backup] {
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
        assert!(refused.message().contains("as root, over the agent's local socket"), "{refused}");
    }
    let mut raw = tonic::client::Grpc::new(channel.clone());
    raw.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<ListVmsRequest, ListVmsRequest>::default();
    let path = "/holdfast.v1.Vms/Explode".parse().unwrap();
    let unknown = raw.unary(Request::new(ListVmsRequest {}), path, codec).await.unwrap_err();
    assert_eq!(unknown.code(), Code::Unimplemented, "{unknown}");
}

/// An operator's work, at one node.
async fn operates(channel: &Channel, name: &str, made: &str) {
    let mut vms = VmsClient::new(channel.clone());
    vms.create(web(made)).await.unwrap();
    // It is at rest: a reason of its own, not a matter of roles.
    let refused = vms.stop(vm(made)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    committed(channel, &[file(&format!("notes/{made}"), "x")]).await;
    let txn = ConfigClient::new(channel.clone()).txn(put("notes/txn")).await.unwrap();
    assert!(txn.into_inner().succeeded);
    // Several paths: one that it may not write is enough, and nothing is written.
    let own = role(name, "admin");
    denied(commit(channel, &[file("notes/no", "x"), own.clone()]).await, name, "admin");
    for path in ["storage.toml", "networks.toml", "cluster.toml", "nodes/n1.toml", "ha/README"] {
        denied(commit(channel, &[file("notes/no", "x"), file(path, "")]).await, name, "admin");
    }
    let txn = ConfigClient::new(channel.clone()).txn(put("access/README")).await;
    denied(txn, name, "admin");
    for path in ["priv/ca", "status/administration"] {
        let refused = commit(channel, &[file(path, "x")]).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    }
    assert!(!get(channel, "notes/no").await.unwrap());
    let import = [image(made), ImportImageRequest { header: None, data: vec![7; 512] }];
    let mut storage = StorageClient::new(channel.clone());
    storage.import_image(futures::stream::iter(import)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_client_may_do_what_its_role_says_at_every_node() {
    let (_dirs, first, second) = two().await;
    // Nobody has a document: everybody administers, and whoever has a certificate made is told so.
    let eve = papers(&first, "eve").await;
    assert_eq!(eve.role, "admin");
    let eve = [&first, &second].map(|rig| dial(rig, &eve));
    for eve in &eve {
        has_role(eve, "admin").await;
    }
    let told = who(&eve[0]).await;
    assert_eq!((told.kind.as_str(), told.name.as_str()), ("client", "eve"));
    assert!(told.reason.contains("no document under access/"), "{told:?}");
    token(&eve[1]).await.unwrap();
    first.create(WEB).await.unwrap();
    not_committed(&eve[0], &[role("vera", "viewer")], "name no administrator").await;
    let all = [role("ann", "admin"), role("olga", "operator"), role("vera", "viewer")];
    committed(&eve[1], &all).await;

    let of = async |name: &str| {
        let papers = papers(&first, name).await;
        [&first, &second].map(|rig| dial(rig, &papers))
    };
    let (ann, olga, vera) = (of("ann").await, of("olga").await, of("vera").await);
    assert_eq!(papers(&first, "zoe").await.role, "");
    for (clients, role) in [(&eve, ""), (&ann, "admin"), (&olga, "operator"), (&vera, "viewer")] {
        for channel in clients {
            has_role(channel, role).await;
        }
    }
    for (place, made) in ["one", "two"].into_iter().enumerate() {
        let (ann, olga, vera, eve) = (&ann[place], &olga[place], &vera[place], &eve[place]);
        denied(get(eve, "storage.toml").await, "eve", "viewer");
        let watch = WatchRequest::default();
        denied(ConfigClient::new(eve.clone()).watch(watch).await.map(drop), "eve", "viewer");
        let log = VmLogRequest { vm: "web".into(), ..VmLogRequest::default() };
        denied(VmsClient::new(eve.clone()).log(log).await.map(drop), "eve", "viewer");
        works_with_nothing(eve, "eve").await;
        administers_nothing(eve, "eve").await;
        sees(vera).await;
        works_with_nothing(vera, "vera").await;
        administers_nothing(vera, "vera").await;
        sees(olga).await;
        operates(olga, "olga", made).await;
        administers_nothing(olga, "olga").await;
        sees(ann).await;
        token(ann).await.unwrap();
        is_no_node_and_not_root(ann).await;
        let start = who(vera).await.calls.into_iter().find(|of| of.call == "Vms.Start").unwrap();
        assert!(!start.allowed && start.needs == "operator", "{start:?}");
    }
    // Tasks of machines are an administrator's, at whatever node they are.
    let task = NodesClient::new(ann[0].clone()).drain(drain()).await.unwrap().into_inner();
    let task = GetTaskRequest { task_id: task.task_id };
    for olga in &olga {
        let mut tasks = TasksClient::new(olga.clone());
        denied(tasks.cancel(task.clone()).await, "olga", "admin");
    }
    TasksClient::new(ann[1].clone()).cancel(task).await.unwrap();
    let resume = ResumeNodeRequest { node: "n2".into() };
    NodesClient::new(ann[1].clone()).resume(resume).await.unwrap();
    // No document limits nodes, or root.
    let node = second.agent.node().unwrap();
    let peer = node.cluster().peer_channel(first.agent.node().unwrap().id).unwrap();
    token(&peer).await.unwrap();
    token(&second.channel).await.unwrap();
    assert_eq!(who(&second.channel).await.kind, "root");
    first.agent.end().await;
    second.agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_roles_acts_on_open_connections_and_streams() {
    let (_dirs, first, second) = two().await;
    let all = [role("ann", "admin"), role("olga", "operator"), role("vera", "viewer")];
    committed(&first.channel, &all).await;
    let ann = client(&first, "ann").await;
    let (olga, vera) = (client(&second, "olga").await, client(&second, "vera").await);
    has_role(&olga, "operator").await;
    has_role(&vera, "viewer").await;
    let watch = || WatchRequest { prefix: "notes/".into(), from_revision: 0 };
    let watch_of = async |channel: &Channel| {
        ConfigClient::new(channel.clone()).watch(watch()).await.unwrap().into_inner()
    };
    let (mut of_ann, mut of_vera) = (watch_of(&ann).await, watch_of(&vera).await);
    committed(&ann, &[file("notes/a", "x")]).await;
    for watch in [&mut of_ann, &mut of_vera] {
        while watch.message().await.unwrap().unwrap().events.is_empty() {}
    }
    // An image that an operator is about to import.
    let (pieces, taken) = tokio::sync::mpsc::channel(4);
    pieces.send(image("half")).await.unwrap();
    let import = tokio::spawn({
        let mut storage = StorageClient::new(olga.clone());
        let pieces = tokio_stream::wrappers::ReceiverStream::new(taken);
        async move { storage.import_image(pieces).await.map(drop) }
    });
    let piece = || ImportImageRequest { header: None, data: vec![7; 512] };
    pieces.send(piece()).await.unwrap();

    let begin = Instant::now();
    committed(&ann, &[role("vera", ""), role("olga", "viewer")]).await;
    let cut = async {
        loop {
            match of_vera.message().await {
                Ok(message) => assert!(message.is_some(), "it ended without a word"),
                Err(status) => return status,
            }
        }
    };
    let cut = tokio::time::timeout(LIMIT, cut).await.unwrap();
    denied::<()>(Err(cut), "vera", "viewer");
    denied(tokio::time::timeout(LIMIT, import).await.unwrap().unwrap(), "olga", "operator");
    // The writer's answer and both ends: a follower is not behind for longer than a heartbeat.
    let took = begin.elapsed();
    eprintln!("a change of roles took {took:?} to act");
    assert!(took < Duration::from_secs(5), "{took:?}");
    // The same connections, and whatever is asked next.
    denied(get(&vera, "notes/a").await, "vera", "viewer");
    assert!(get(&olga, "notes/a").await.unwrap());
    denied(VmsClient::new(olga.clone()).create(web("web")).await, "olga", "operator");
    let images = proto::v1::ListImagesRequest { pool: "shared".into() };
    let images = StorageClient::new(olga.clone()).list_images(images).await.unwrap().into_inner();
    assert!(images.images.iter().all(|image| image.name != "half"), "{images:?}");
    // Whoever keeps the right keeps the stream.
    committed(&ann, &[file("notes/b", "x")]).await;
    while of_ann.message().await.unwrap().unwrap().events.is_empty() {}
    // And back.
    committed(&ann, &[role("vera", "viewer")]).await;
    has_role(&vera, "viewer").await;
    watch_of(&vera).await;
    first.agent.end().await;
    second.agent.end().await;
}

/// It begins without any document: that is not to be taken for a cluster without any.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_joins_lets_nobody_in_before_it_knows_who_may() {
    let (_dirs, first, second) = two().await;
    let eve = papers(&first, "eve").await;
    committed(&first.channel, &[role("ann", "admin")]).await;
    let dir = tempfile::tempdir().unwrap();
    let third = Rig::new(dir.path()).await;
    let node = first.agent.node().unwrap();
    let channel = dial_at(third.config.listen, node.cluster().cluster_id(), &eve);
    let knocking = tokio::spawn(async move {
        let (begin, mut served) = (Instant::now(), 0);
        loop {
            let status = token(&channel).await.unwrap_err();
            if std::error::Error::source(&status).is_none() {
                served += 1;
            }
            if status.code() == Code::PermissionDenied {
                denied::<()>(Err(status), "eve", "admin");
                return served;
            }
            assert!(begin.elapsed() < LIMIT, "{status}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    third.join(&first, "n3").await;
    let served = tokio::time::timeout(LIMIT, knocking).await.unwrap().unwrap();
    eprintln!("{served} answers until it knew");
    for rig in [first, second, third] {
        rig.agent.end().await;
    }
}

async fn revoke(channel: &Channel, what: &str) -> Result<(), Status> {
    let request = RevokeCertificatesRequest { what: what.into() };
    MembershipClient::new(channel.clone()).revoke_certificates(request).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn there_is_always_one_administrator_by_the_api_and_by_revocation() {
    let (_dirs, first, second) = two().await;
    let last = "no administrator would be left";
    let (ann, eve) = (client(&first, "ann").await, client(&second, "eve").await);
    has_role(&eve, "admin").await;
    committed(&eve, &[role("ann", "admin"), role("bob", "viewer")]).await;
    has_role(&ann, "admin").await;
    not_committed(&ann, &[role("ann", "")], last).await;
    not_committed(&ann, &[role("ann", "operator")], last).await;
    // Root is limited by no role, but by this.
    not_committed(&second.channel, &[role("ann", "viewer")], last).await;
    not_committed(&second.channel, &[role("ann", ""), role("bob", "")], "others first").await;
    assert!(get(&ann, "access/ann.toml").await.unwrap());

    // Her certificate is the last one that lets an administrator in; another one takes its place.
    let refused = revoke(&ann, "ann").await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("create-admin"), "{refused}");
    revoke(&ann, "bob").await.unwrap_err(); // he has none
    client(&first, "bob").await;
    revoke(&ann, "bob").await.unwrap();
    let second_of_ann = client(&first, "ann").await;
    assert!(revoke(&first.channel, "ann").await.is_err(), "both at once are the last");
    committed(&second_of_ann, &[role("olga", "admin")]).await;
    assert!(revoke(&first.channel, "ann").await.is_err(), "olga has no certificate");
    let olga = client(&second, "olga").await;
    has_role(&olga, "admin").await;
    revoke(&olga, "ann").await.unwrap();
    assert!(revoke(&olga, "olga").await.is_err());

    // Who has no certificate is no administrator that is left.
    committed(&olga, &[role("ann", "admin")]).await;
    not_committed(&first.channel, &[role("olga", "viewer")], "who has a certificate").await;
    client(&first, "ann").await;
    // Of two changes at two nodes that each leave one, one is taken.
    for _ in 0..5 {
        let both = [role("ann", "admin"), role("olga", "admin")];
        committed(&first.channel, &both).await;
        let (one, other) = ([role("ann", "viewer")], [role("olga", "viewer")]);
        let (one, other) =
            tokio::join!(commit(&first.channel, &one), commit(&second.channel, &other));
        let refused = [one.unwrap(), other.unwrap()].concat();
        assert_eq!(refused.len(), 1, "{refused:?}");
        assert!(refused[0].reason.contains(last), "{refused:?}");
    }
    committed(&first.channel, &[role("olga", "admin"), role("ann", ""), role("bob", "")]).await;
    has_role(&eve, "").await;
    // Back to before, on purpose: everybody administers.
    committed(&first.channel, &[role("olga", "")]).await;
    has_role(&eve, "admin").await;
    first.agent.end().await;
    second.agent.end().await;
}
