//! etcd: three processes of Debian's etcd-server, and clients of its gRPC API. The messages are
//! those of its published API (`rpc.proto`, `kv.proto`), as far as they are spoken here.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use prost::Message;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tests::lab::process::{Lifetime, spawn};
use tests::ports::free_port;
use tonic::Request;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic_prost::ProstCodec;

use crate::load::until_it_answers;
use crate::member::{Connection, Members, Process};
use crate::tls::Tls;

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
    /// For clients and for each other.
    ports: Vec<(u16, u16)>,
    tls: Tls,
    processes: Vec<Process>,
}

/// Makes one certificate for servers, peers and clients; gives its CA, itself and its key.
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
    let ports = (0..3).map(|_| (free_port(), free_port())).collect();
    let mut etcd = Etcd { folder: folder.to_owned(), ports, tls, processes: Vec::new() };
    for member in 0..3 {
        let process = etcd.spawn(member)?;
        etcd.processes.push(process);
    }
    for member in 0..3 {
        until_it_answers(&etcd, member).await?;
    }
    Ok(etcd)
}

impl Etcd {
    /// Client certificates are asked for and verified by members and peers; fsync is on, as always.
    fn spawn(&self, member: usize) -> anyhow::Result<Process> {
        let url = |port: u16| format!("https://127.0.0.1:{port}");
        let (client, peer) = self.ports[member];
        let cluster = self.ports.iter().enumerate();
        let cluster: Vec<String> =
            cluster.map(|(place, (_, peer))| format!("n{place}={}", url(*peer))).collect();
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
        let log = std::fs::File::create(self.folder.join(format!("n{member}.log")))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let (_child, id) = spawn(&mut command, Lifetime::WithUs).context("etcd does not start")?;
        Ok(Process(id))
    }
}

impl Members for Etcd {
    type Connection = Client;

    fn connect(&self, _client: usize, member: usize) -> Client {
        Client(self.tls.channel(self.ports[member].0))
    }

    fn leader(&self) -> BoxFuture<'_, anyhow::Result<usize>> {
        Box::pin(async {
            for member in 0..self.ports.len() {
                let client = self.connect(0, member);
                let status: StatusResponse = client.unary(STATUS, StatusRequest {}).await?;
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

    fn start(&mut self, member: usize) -> anyhow::Result<()> {
        self.processes[member] = self.spawn(member)?;
        Ok(())
    }
}

/// A client's connection to a member.
#[derive(Clone)]
pub(crate) struct Client(Channel);

impl Client {
    async fn unary<Q, A>(&self, path: &'static str, request: Q) -> anyhow::Result<A>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let mut grpc = Grpc::new(self.0.clone());
        grpc.ready().await?;
        let (path, codec) = (PathAndQuery::from_static(path), ProstCodec::<Q, A>::default());
        Ok(grpc.unary(Request::new(request), path, codec).await?.into_inner())
    }
}

impl Connection for Client {
    fn put(&mut self, key: &str, value: Vec<u8>) -> BoxFuture<'_, anyhow::Result<()>> {
        let request = PutRequest { key: key.as_bytes().to_vec(), value };
        Box::pin(async move {
            let PutResponse {} = self.unary(PUT, request).await?;
            Ok(())
        })
    }

    fn get(&mut self, key: &str) -> BoxFuture<'_, anyhow::Result<bool>> {
        let request = RangeRequest { key: key.as_bytes().to_vec() };
        Box::pin(async move {
            let answer: RangeResponse = self.unary(RANGE, request).await?;
            Ok(!answer.kvs.is_empty())
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
        let request = WatchRequest { create: Some(WatchCreateRequest { key, range_end }) };
        Box::pin(async move {
            // The request's stream stays open: its end would end the watch.
            let requests = futures::stream::iter([request]).chain(futures::stream::pending());
            let mut grpc = Grpc::new(self.0.clone());
            grpc.ready().await?;
            let path = PathAndQuery::from_static(WATCH);
            let codec = ProstCodec::<WatchRequest, WatchResponse>::default();
            let mut answers =
                grpc.streaming(Request::new(requests), path, codec).await?.into_inner();
            let first = answers.message().await?.context("the watch ended")?;
            ensure!(first.created && !first.canceled, "etcd refused the watch");
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

const PUT: &str = "/etcdserverpb.KV/Put";
const RANGE: &str = "/etcdserverpb.KV/Range";
const WATCH: &str = "/etcdserverpb.Watch/Watch";
const STATUS: &str = "/etcdserverpb.Maintenance/Status";

#[derive(Clone, PartialEq, Eq, Message)]
struct StatusRequest {}

#[derive(Clone, PartialEq, Eq, Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
    #[prost(uint64, tag = "4")]
    leader: u64,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct ResponseHeader {
    #[prost(uint64, tag = "2")]
    member_id: u64,
}

/// A linearizable read of one key.
#[derive(Clone, PartialEq, Eq, Message)]
struct RangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct Entry {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "5")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct RangeResponse {
    #[prost(message, repeated, tag = "2")]
    kvs: Vec<Entry>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct PutResponse {}

#[derive(Clone, PartialEq, Eq, Message)]
struct WatchRequest {
    /// One of a `oneof`, which looks the same on the wire.
    #[prost(message, optional, tag = "1")]
    create: Option<WatchCreateRequest>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct WatchCreateRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    range_end: Vec<u8>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct WatchResponse {
    #[prost(bool, tag = "3")]
    created: bool,
    #[prost(bool, tag = "4")]
    canceled: bool,
    #[prost(message, repeated, tag = "11")]
    events: Vec<Event>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct Event {
    #[prost(message, optional, tag = "2")]
    kv: Option<Entry>,
}
