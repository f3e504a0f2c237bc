//! etcd: three processes of Debian's etcd-server, and clients of its gRPC API.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tonic::transport::Channel;

use crate::process::{Process, free_port};
use crate::store::{Connection, Members};
use crate::tls::Tls;

/// etcd's messages, as far as they are spoken here.
#[allow(unreachable_pub, missing_debug_implementations, reason = "generated")]
mod api {
    tonic::include_proto!("etcdserverpb");
}

use api::kv_client::KvClient;
use api::maintenance_client::MaintenanceClient;
use api::watch_client::WatchClient;
use api::watch_request::RequestUnion;

/// The one name in every member's certificate.
const SERVER: &str = "localhost";

/// Whether etcd is installed; says how to get it where it is not.
pub(crate) fn present() -> anyhow::Result<()> {
    let found = Command::new("etcd").arg("--version").stdout(Stdio::null()).status();
    found.map(drop).context("etcd is not installed: apt-get install etcd-server")
}

/// Three members of etcd.
pub(crate) struct Etcd {
    folder: PathBuf,
    ports: Vec<(u16, u16)>,
    tls: Tls,
    processes: Vec<Process>,
}

/// Makes one certificate for servers, peers and clients; answers it with its CA and key.
fn certificates(folder: &Path) -> anyhow::Result<[String; 3]> {
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let names = vec![SERVER.to_owned(), "127.0.0.1".to_owned()];
    let certificate = CertificateParams::new(names)?.signed_by(&key, &ca)?;
    let made = [ca.pem(), certificate.pem(), key.serialize_pem()];
    for (name, text) in ["ca.pem", "cert.pem", "key.pem"].iter().zip(&made) {
        std::fs::write(folder.join(name), text)?;
    }
    Ok(made)
}

/// Starts a cluster and waits until it answers.
pub(crate) async fn start(folder: &Path) -> anyhow::Result<Etcd> {
    let [ca, certificate, key] = certificates(folder)?;
    let tls = Tls::new(&ca, &certificate, &key, SERVER)?;
    let ports = (0..3).map(|_| Ok((free_port()?, free_port()?)));
    let ports = ports.collect::<anyhow::Result<Vec<_>>>()?;
    let mut etcd = Etcd { folder: folder.to_owned(), ports, tls, processes: Vec::new() };
    for member in 0..3 {
        let process = Process::start(&mut etcd.command(member))?;
        etcd.processes.push(process);
    }
    crate::load::until_it_answers(|| etcd.connect(0)).await?;
    Ok(etcd)
}

impl Etcd {
    /// Client certificates are asked for and verified by members and peers; fsync is on, as always.
    fn command(&self, member: usize) -> Command {
        let url = |port: u16| format!("https://127.0.0.1:{port}");
        let (client, peer) = self.ports[member];
        let cluster = self.ports.iter().enumerate();
        let cluster: Vec<String> =
            cluster.map(|(index, (_, peer))| format!("n{index}={}", url(*peer))).collect();
        let mut command = Command::new("etcd");
        command.args(["--name", &format!("n{member}")]);
        command.arg("--data-dir").arg(self.folder.join(format!("n{member}")));
        command.args(["--listen-client-urls", &url(client)]);
        command.args(["--advertise-client-urls", &url(client)]);
        command.args(["--listen-peer-urls", &url(peer)]);
        command.args(["--initial-advertise-peer-urls", &url(peer)]);
        command.args(["--initial-cluster", &cluster.join(",")]);
        command.args(["--initial-cluster-state", "new", "--log-level", "error"]);
        for of in ["", "peer-"] {
            command.arg(format!("--{of}cert-file")).arg(self.folder.join("cert.pem"));
            command.arg(format!("--{of}key-file")).arg(self.folder.join("key.pem"));
            command.arg(format!("--{of}trusted-ca-file")).arg(self.folder.join("ca.pem"));
            command.arg(format!("--{of}client-cert-auth"));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    fn channel(&self, member: usize) -> Channel {
        self.tls.channel(self.ports[member].0)
    }
}

impl Members for Etcd {
    type Connection = EtcdConnection;

    fn connect(&self, member: usize) -> EtcdConnection {
        let channel = self.channel(member);
        EtcdConnection { kv: KvClient::new(channel.clone()), watch: WatchClient::new(channel) }
    }

    fn leader(&self) -> BoxFuture<'_, anyhow::Result<usize>> {
        Box::pin(async {
            for member in 0..self.ports.len() {
                let mut client = MaintenanceClient::new(self.channel(member));
                let status = client.status(api::StatusRequest {}).await?.into_inner();
                if status.header.is_some_and(|header| header.member_id == status.leader) {
                    return Ok(member);
                }
            }
            bail!("no member of etcd leads")
        })
    }

    fn processes(&self) -> &[Process] {
        &self.processes
    }

    fn restart(&mut self, member: usize) -> BoxFuture<'_, anyhow::Result<Duration>> {
        Box::pin(async move {
            self.processes[member].end()?;
            let began = Instant::now();
            self.processes[member] = Process::start(&mut self.command(member))?;
            crate::load::until_it_answers(|| self.connect(member)).await?;
            Ok(began.elapsed())
        })
    }
}

/// A client's connection to a member.
#[derive(Clone)]
pub(crate) struct EtcdConnection {
    kv: KvClient<Channel>,
    watch: WatchClient<Channel>,
}

impl Connection for EtcdConnection {
    fn put(&mut self, key: &str, value: Vec<u8>) -> BoxFuture<'_, anyhow::Result<()>> {
        let request = api::PutRequest { key: key.as_bytes().to_vec(), value };
        Box::pin(async move {
            self.kv.put(request).await?;
            Ok(())
        })
    }

    fn get(&mut self, key: &str) -> BoxFuture<'_, anyhow::Result<()>> {
        let key = key.as_bytes().to_vec();
        let request = api::RangeRequest { key, range_end: Vec::new() };
        Box::pin(async move {
            let answer = self.kv.range(request).await?.into_inner();
            answer.kvs.into_iter().next().context("the key is not there")?;
            Ok(())
        })
    }

    fn watch(
        &mut self,
        prefix: &str,
    ) -> BoxFuture<'_, anyhow::Result<BoxStream<'static, anyhow::Result<Vec<u8>>>>> {
        let key = prefix.as_bytes().to_vec();
        let mut range_end = key.clone();
        if let Some(last) = range_end.last_mut() {
            *last += 1;
        }
        let create = api::WatchCreateRequest { key, range_end };
        let request = api::WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        Box::pin(async move {
            // The request stream stays open: its end would end the watch.
            let requests = futures::stream::iter([request]).chain(futures::stream::pending());
            let mut answers = self.watch.watch(requests).await?.into_inner();
            let first = answers.message().await?.context("the watch ended")?;
            if !first.created || first.canceled {
                bail!("etcd refused the watch");
            }
            let values = answers.flat_map(|answer| {
                let values: Vec<anyhow::Result<Vec<u8>>> = match answer {
                    Err(status) => vec![Err(status.into())],
                    Ok(answer) => {
                        let entries = answer.events.into_iter().filter_map(|event| event.kv);
                        entries.map(|entry| Ok(entry.value)).collect()
                    }
                };
                futures::stream::iter(values)
            });
            Ok(values.boxed())
        })
    }
}
