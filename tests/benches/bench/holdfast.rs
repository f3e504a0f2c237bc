//! Holdfast: three agents as plain processes, and clients of their gRPC API.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use hyper_util::rt::TokioIo;
use proto::v1;
use proto::v1::config_client::ConfigClient;
use proto::v1::membership_client::MembershipClient;
use tempfile::TempDir;
use tests::lab::loopback;
use tests::lab::process::Lifetime;
use tests::ports::free_port;
use tokio::net::UnixStream;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use crate::load::CLIENTS;
use crate::member::{Connection, Members, Process};
use crate::tls::Tls;

const LIMIT: Duration = Duration::from_secs(60);

/// Three agents.
pub(crate) struct Agents {
    folder: PathBuf,
    /// API and enrolment.
    ports: Vec<(u16, u16)>,
    /// Each has a certificate of its own: what a client may ask in a second is limited by its name.
    clients: Vec<Tls>,
    processes: Vec<Process>,
    /// Their run folders: in memory, as `/run` is.
    run: TempDir,
}

/// Forms a cluster and waits until all three vote.
pub(crate) async fn start(folder: &Path) -> anyhow::Result<Agents> {
    let ports = (0..3).map(|_| (free_port(), free_port())).collect();
    let run = tempfile::tempdir_in("/dev/shm").context("no folder in memory")?;
    let mut agents = Agents {
        folder: folder.to_owned(),
        ports,
        clients: Vec::new(),
        processes: Vec::new(),
        run,
    };
    for member in 0..3 {
        agents.begin(member, false).await?;
    }
    agents.ctl(0, &["cluster", "init", "--name", "bench"])?;
    for member in 1..3 {
        agents.join(member)?;
    }
    let until = Instant::now() + LIMIT;
    let cluster_id = loop {
        let status = agents.status().await?;
        let members = status.members.iter().filter_map(|of| of.member.as_ref());
        if members.filter(|member| member.voter).count() == 3 {
            break status.cluster_id;
        }
        ensure!(Instant::now() < until, "three voters did not come about within {LIMIT:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let mut membership = MembershipClient::new(agents.local(0)?);
    for client in 0..CLIENTS {
        let key = rcgen::KeyPair::generate()?;
        let csr_pem = rcgen::CertificateParams::default().serialize_request(&key)?.pem()?;
        let request = v1::IssueClientRequest { name: format!("client{client}"), csr_pem };
        let issued = membership.issue_client(request).await?.into_inner();
        let server = format!("{cluster_id}.holdfast");
        let key = key.serialize_pem();
        agents.clients.push(Tls::new(&issued.ca_pem, &issued.certificate_pem, &key, &server)?);
    }
    Ok(agents)
}

impl Agents {
    fn place_run_folder(&self, member: usize) -> anyhow::Result<()> {
        let number = number(member)?.to_string();
        let (own, place) = (self.folder.join(&number), self.run.path().join(&number));
        std::fs::create_dir_all(&own)?;
        std::fs::create_dir(&place)?;
        std::os::unix::fs::symlink(place, own.join("run"))?;
        Ok(())
    }

    async fn begin(&mut self, member: usize, witness: bool) -> anyhow::Result<()> {
        self.place_run_folder(member)?;
        let process = self.spawn(member, witness)?;
        self.processes.push(process);
        self.until_it_listens(member).await
    }

    fn join(&self, member: usize) -> anyhow::Result<()> {
        let token = self.ctl(0, &["-o", "json", "cluster", "token", "create"])?;
        let token: v1::CreateTokenResponse = serde_json::from_str(&token)?;
        self.ctl(member, &["cluster", "join", &token.token])?;
        Ok(())
    }

    /// One more member, a witness; answers its process.
    pub(crate) async fn add_witness(&mut self) -> anyhow::Result<&Process> {
        let member = self.processes.len();
        self.ports.push((free_port(), free_port()));
        self.begin(member, true).await?;
        self.join(member)?;
        self.processes.last().context("no process")
    }

    fn spawn(&self, member: usize, witness: bool) -> anyhow::Result<Process> {
        let (api, enrol) = self.ports[member];
        let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let number = number(member)?;
        let id =
            loopback::start(&self.folder, number, at(api), at(enrol), Lifetime::WithUs, witness)?;
        Ok(Process(id))
    }

    pub(crate) fn ctl(&self, member: usize, arguments: &[&str]) -> anyhow::Result<String> {
        let argv = [&["clusterctl"], arguments].concat();
        Ok(loopback::run(&self.folder, number(member)?, &argv, b"")?.ok()?)
    }

    fn socket(&self, member: usize) -> anyhow::Result<PathBuf> {
        Ok(self.folder.join(number(member)?.to_string()).join("run/agent.sock"))
    }

    async fn until_it_listens(&self, member: usize) -> anyhow::Result<()> {
        let (socket, until) = (self.socket(member)?, Instant::now() + LIMIT);
        while UnixStream::connect(&socket).await.is_err() {
            ensure!(Instant::now() < until, "an agent does not listen after {LIMIT:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// As root on that node.
    fn local(&self, member: usize) -> anyhow::Result<Channel> {
        let socket = self.socket(member)?;
        let connect = service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        Ok(Endpoint::from_static("http://agent").connect_with_connector_lazy(connect))
    }

    async fn status(&self) -> anyhow::Result<v1::ClusterStatus> {
        let mut client = MembershipClient::new(self.local(0)?);
        Ok(client.status(v1::ClusterStatusRequest {}).await?.into_inner())
    }
}

fn number(member: usize) -> anyhow::Result<u32> {
    Ok(u32::try_from(member)? + 1)
}

impl Members for Agents {
    type Connection = Client;

    fn connect(&self, client: usize, member: usize) -> Client {
        Client(ConfigClient::new(self.clients[client].channel(self.ports[member].0)))
    }

    fn leader(&self) -> BoxFuture<'_, anyhow::Result<usize>> {
        Box::pin(async {
            let status = self.status().await?;
            let members = status.members.iter().filter_map(|of| of.member.as_ref());
            let mut leading = members.filter(|member| Some(member.node_id) == status.leader);
            let address = &leading.next().context("nobody leads")?.api_address;
            let port = address.rsplit(':').next().and_then(|port| port.parse().ok());
            let place = self.ports.iter().position(|(api, _)| Some(*api) == port);
            place.context("the leader is none of ours")
        })
    }

    fn processes(&self) -> &[Process] {
        &self.processes
    }

    fn start(&mut self, member: usize) -> anyhow::Result<()> {
        self.processes[member] = self.spawn(member, false)?;
        Ok(())
    }
}

/// A client's connection to a member.
#[derive(Clone)]
pub(crate) struct Client(ConfigClient<Channel>);

impl Connection for Client {
    fn put(&mut self, key: &str, value: Vec<u8>) -> BoxFuture<'_, anyhow::Result<()>> {
        let put = v1::write_op::Op::Put(v1::Put { key: key.to_owned(), value });
        let writes = vec![v1::WriteOp { op: Some(put) }];
        let request = v1::TxnRequest { writes, ..Default::default() };
        Box::pin(async move {
            let answer = self.0.txn(request).await?.into_inner();
            ensure!(answer.succeeded, "a put without a compare was refused");
            Ok(())
        })
    }

    fn get(&mut self, key: &str) -> BoxFuture<'_, anyhow::Result<bool>> {
        let request = v1::GetRequest { key: key.to_owned(), ..Default::default() };
        Box::pin(async move { Ok(self.0.get(request).await?.into_inner().kv.is_some()) })
    }

    fn watch(
        &mut self,
        prefix: &str,
    ) -> BoxFuture<'_, anyhow::Result<BoxStream<'static, anyhow::Result<Vec<u8>>>>> {
        let request = v1::WatchRequest { prefix: prefix.to_owned(), from_revision: 0 };
        Box::pin(async move {
            let stream = self.0.watch(request).await?.into_inner();
            let values = stream.flat_map(|batch| {
                let values: Vec<anyhow::Result<Vec<u8>>> = match batch {
                    Err(status) => vec![Err(status.into())],
                    Ok(batch) => batch.events.into_iter().filter_map(value).map(Ok).collect(),
                };
                futures::stream::iter(values)
            });
            Ok(values.boxed())
        })
    }
}

fn value(event: v1::WatchEvent) -> Option<Vec<u8>> {
    match event.event? {
        v1::watch_event::Event::Put(kv) => Some(kv.value),
        v1::watch_event::Event::Deleted(_) => None,
    }
}
