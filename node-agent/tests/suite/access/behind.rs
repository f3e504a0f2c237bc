//! A node that has not heard of the last change of roles, and one without a quorum.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use cluster::tls::{ConnectInfo, PeerIdentity};
use node_agent::access::{Access, Guard, Has};
use node_agent::api::Api;
use proto::documents::Role;
use proto::v1::config_client::ConfigClient;
use proto::v1::config_server::ConfigServer;
use proto::v1::tasks_client::TasksClient;
use proto::v1::vms_client::VmsClient;
use proto::v1::vms_server::VmsServer;
use proto::v1::{GetTaskRequest, ListVmsRequest, TxnRequest};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::service::{InterceptorLayer, Routes};
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Request};

use super::client::{client, committed, denied, get, has_role, role};
use super::{put, two, vm};
use crate::rig::Rig;

/// A node's services for one client, behind a guard that judges by `access`.
async fn serve(rig: &Rig, access: &Access, name: &str) -> Channel {
    let node = rig.agent.node().unwrap();
    let guard = Guard::new(access.clone(), &rig.socket).confirming(node.store.clone());
    let api = Api::new(Arc::new(ArcSwapOption::from(Some(node))));
    let routes = Routes::new(ConfigServer::new(api.clone())).add_service(VmsServer::new(api));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let remote = listener.local_addr().unwrap();
    let peer = PeerIdentity::Client(name.to_owned());
    let identity = InterceptorLayer::new(move |mut request: Request<()>| {
        let info = ConnectInfo { peer: peer.clone(), serial: "aa".into(), remote };
        request.extensions_mut().insert(Some(info));
        Ok(request)
    });
    let serve = Server::builder().layer(identity).layer(guard).add_routes(routes);
    tokio::spawn(serve.serve_with_incoming(TcpListenerStream::new(listener)));
    Endpoint::from_shared(format!("http://{remote}")).unwrap().connect_lazy()
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_changes_anything_by_a_role_that_was_lost_however_late_a_node_hears_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::new(dir.path()).await;
    rig.init("n1").await;
    rig.online(1).await;
    committed(&rig.channel, &[role("ann", "admin"), role("olga", "operator")]).await;
    let node = rig.agent.node().unwrap();
    // What it has heard of once, and hears of by asking alone: it follows nothing.
    let behind = || async {
        let access = Access::default();
        access.catch_up(&node.store).await.unwrap();
        (serve(&rig, &access, "olga").await, access)
    };
    let txn = async |channel: &Channel, key: &str| {
        ConfigClient::new(channel.clone()).txn(put(key)).await.map(|done| {
            assert!(done.into_inner().succeeded);
        })
    };
    let start = async |channel: &Channel| VmsClient::new(channel.clone()).start(vm("no")).await;
    let (writes, of_writes) = behind().await;
    let (starts, of_starts) = behind().await;
    txn(&writes, "notes/a").await.unwrap();
    assert_eq!(start(&starts).await.unwrap_err().code(), Code::NotFound);

    committed(&rig.channel, &[role("olga", "viewer")]).await;
    for access in [&of_writes, &of_starts] {
        assert_eq!(access.of("olga"), Has::Role(Role::Operator), "it was to be behind");
    }
    denied(txn(&writes, "notes/b").await, "olga", "operator");
    denied(start(&starts).await, "olga", "operator");
    // What only shows goes on by what was heard.
    assert!(!get(&writes, "notes/b").await.unwrap());
    VmsClient::new(writes.clone()).list(ListVmsRequest {}).await.unwrap();

    // Who has got a role meanwhile is not refused for want of news, either.
    committed(&rig.channel, &[role("olga", "operator")]).await;
    assert_eq!(of_starts.of("olga"), Has::Role(Role::Viewer));
    txn(&starts, "notes/c").await.unwrap();
    // A change that takes nothing from her: it is judged again, and done.
    committed(&rig.channel, &[role("vera", "viewer")]).await;
    txn(&starts, "notes/d").await.unwrap();
    assert!(get(&starts, "notes/d").await.unwrap());
    rig.agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_clients_see_and_root_works() {
    let (_dirs, first, second) = two().await;
    committed(&first.channel, &[role("ann", "admin"), role("vera", "viewer")]).await;
    let (ann, vera) = (client(&second, "ann").await, client(&second, "vera").await);
    has_role(&ann, "admin").await;
    has_role(&vera, "viewer").await;
    // The one voter of two.
    first.agent.end().await;
    let begin = Instant::now();
    let refused = VmsClient::new(ann.clone()).stop(vm("no")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    for words in ["Vms.Stop", "`ann`", "no quorum", "as root"] {
        assert!(refused.message().contains(words), "{words}: {refused}");
    }
    // Whoever may not in any case is told that.
    denied(VmsClient::new(vera).stop(vm("no")).await, "vera", "operator");
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    VmsClient::new(ann).list(ListVmsRequest {}).await.unwrap();
    let task = GetTaskRequest { task_id: "1-1".into() };
    let root = TasksClient::new(second.channel.clone()).cancel(task).await.unwrap_err();
    assert!(!root.message().contains("cannot be confirmed"), "{root}");
    second.agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clients_transactions_are_named_among_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::new(dir.path()).await;
    rig.init("n1").await;
    let (ann, eve) = (client(&rig, "ann").await, client(&rig, "eve").await);
    has_role(&eve, "admin").await;
    // Who knows another's name, and its next number, takes nothing from it.
    let named = |key: &str| TxnRequest { client: "import-7".into(), sequence: 1, ..put(key) };
    let mut revisions = Vec::new();
    for (channel, key) in [(&eve, "notes/eve"), (&ann, "notes/ann"), (&rig.channel, "notes/root")] {
        for _ in 0..2 {
            let done = ConfigClient::new(channel.clone()).txn(named(key)).await.unwrap();
            revisions.push(done.into_inner().revision);
        }
        assert!(get(channel, key).await.unwrap(), "{key} was taken for a repetition");
    }
    // Its own repetition is one.
    assert!(revisions.chunks(2).all(|pair| pair[0] == pair[1]), "{revisions:?}");
    let long = TxnRequest { client: "x".repeat(100), ..named("notes/long") };
    let refused = ConfigClient::new(ann).txn(long).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    rig.agent.end().await;
}
