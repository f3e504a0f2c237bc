//! Whole agents in the test's process, on loopback.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its share")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use node_agent::agent::Agent;
use node_agent::config::{Config, Tree, Watchdog};
use proto::v1::membership_client::MembershipClient;
use proto::v1::nodes_client::NodesClient;
use proto::v1::storage_client::StorageClient;
use proto::v1::tasks_client::TasksClient;
use proto::v1::vms_client::VmsClient;
use proto::v1::{
    ClusterStatusRequest, CreatePoolRequest, CreateTokenRequest, CreateVmRequest, GetTaskRequest,
    Image, ImportImageRequest, InitRequest, JoinRequest, ListNodesRequest, ListVmsRequest, Pool,
    Task, TaskRef, Vm, VmRequest,
};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::ports::free_port;

pub struct Rig {
    pub config: Config,
    pub agent: Arc<Agent>,
    pub socket: PathBuf,
    pub channel: Channel,
}

pub fn config(dir: &Path) -> Config {
    Config {
        listen: ([127, 0, 0, 1], free_port()).into(),
        enrol_listen: ([127, 0, 0, 1], free_port()).into(),
        data_dir: dir.join("data"),
        run_dir: dir.join("run"),
        watchdog: Watchdog::None,
        allow_ha_without_watchdog: true,
        tree: Tree { mount: "off".into() },
        ..Config::default()
    }
}

pub async fn connect(socket: PathBuf) -> Channel {
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://agent").connect_with_connector(connector).await.unwrap()
}

impl Rig {
    pub async fn new(dir: &Path) -> Self {
        Self::with(config(dir)).await
    }

    pub async fn with(config: Config) -> Self {
        drop(rustls::crypto::ring::default_provider().install_default());
        let socket = config.socket_path();
        let (agent, _failures) =
            Agent::start(config.clone(), CancellationToken::new()).await.unwrap();
        let channel = connect(socket.clone()).await;
        Self { config, agent, socket, channel }
    }

    pub async fn init(&self, node: &str) {
        let request = InitRequest { cluster_name: "test".into(), node_name: node.into() };
        MembershipClient::new(self.channel.clone()).init(request).await.unwrap();
    }

    /// Waits until the node may start VMs: a lease, and the leader knows it.
    pub async fn online(&self, nodes: usize) {
        let mut client = NodesClient::new(self.channel.clone());
        let begin = Instant::now();
        loop {
            let list = client.list(ListNodesRequest {}).await;
            let online = list.as_ref().map_or(0, |list| {
                list.get_ref().nodes.iter().filter(|node| node.state == "online").count()
            });
            if online == nodes {
                return;
            }
            assert!(begin.elapsed() < Duration::from_secs(30), "not online: {list:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    pub async fn pool(&self, name: &str, kind: &str, path: &Path) {
        let pool = Pool {
            name: name.into(),
            kind: kind.into(),
            path: path.display().to_string(),
            ..Pool::default()
        };
        let mut client = StorageClient::new(self.channel.clone());
        client
            .create_pool(CreatePoolRequest { pool: Some(pool), create_folder: true })
            .await
            .unwrap();
        self.without_watchdogs().await;
    }

    /// HA VMs run here all the same: no agent of a test has a watchdog.
    async fn without_watchdogs(&self) {
        let document = b"[ha]\nrequire_watchdog = false\n".to_vec();
        let txn = cluster::Txn::new().put(proto::keys::CLUSTER_DOCUMENT, document);
        let done = self.agent.node().unwrap().cluster().txn(txn).await.unwrap();
        assert!(done.committed());
    }

    pub async fn image(&self, pool: &str, name: &str, kind: &str, data: Vec<u8>) {
        let header =
            Image { pool: pool.into(), name: name.into(), kind: kind.into(), ..Image::default() };
        let messages = futures::stream::iter([
            ImportImageRequest { header: Some(header), data: Vec::new() },
            ImportImageRequest { header: None, data },
        ]);
        StorageClient::new(self.channel.clone()).import_image(messages).await.unwrap();
    }

    pub async fn create(&self, document: &str) -> Result<String, Status> {
        let request = CreateVmRequest { document: document.into(), ..CreateVmRequest::default() };
        let created = VmsClient::new(self.channel.clone()).create(request).await?;
        Ok(created.into_inner().vm.map(|vm| vm.name).unwrap_or_default())
    }

    pub async fn vms(&self) -> Vec<String> {
        let list = VmsClient::new(self.channel.clone()).list(ListVmsRequest {}).await.unwrap();
        list.into_inner().vms.into_iter().map(|vm| vm.name).collect()
    }

    /// Joins the cluster of `member`.
    pub async fn join(&self, member: &Rig, node: &str) {
        let mut membership = MembershipClient::new(member.channel.clone());
        let token = membership.create_token(CreateTokenRequest { ttl_s: 60 }).await.unwrap();
        let join = JoinRequest { token: token.into_inner().token, node_name: node.into() };
        let mut membership = MembershipClient::new(self.channel.clone());
        let joined = membership.join(join).await.unwrap().into_inner();
        // What it was told, it sees at once.
        let status = membership.status(ClusterStatusRequest {}).await.unwrap().into_inner();
        let sees = |id: u64| {
            status.members.iter().any(|of| of.member.as_ref().is_some_and(|of| of.node_id == id))
        };
        let of_member = member.agent.node().unwrap().id.0;
        assert!(joined.caught_up && sees(joined.node_id) && sees(of_member), "{status:?}");
    }

    pub fn vm_client(&self) -> VmsClient<Channel> {
        VmsClient::new(self.channel.clone())
    }

    pub async fn vm(&self, vm: &str) -> Vm {
        let show = proto::v1::ShowVmRequest { vm: vm.into() };
        self.vm_client().show(show).await.unwrap().into_inner()
    }

    /// Waits for a task's end.
    pub async fn ended(&self, task: TaskRef) -> Task {
        let task_id = task.task_id;
        let mut tasks = TasksClient::new(self.channel.clone());
        let mut updates =
            tasks.follow(GetTaskRequest { task_id: task_id.clone() }).await.unwrap().into_inner();
        while let Some(update) = updates.message().await.unwrap() {
            eprintln!("{task_id}: {update:?}");
        }
        tasks.get(GetTaskRequest { task_id }).await.unwrap().into_inner()
    }

    /// Waits for a task that must succeed.
    pub async fn done(&self, task: TaskRef) -> Task {
        let ended = self.ended(task).await;
        assert_eq!(ended.state, "done", "{}: {}", ended.kind, ended.error);
        ended
    }

    pub async fn delete(&self, vm: &str) {
        let request = VmRequest { vm: vm.into() };
        let task = self.vm_client().delete(request).await.unwrap().into_inner();
        self.done(task).await;
    }
}
