//! Our store: three processes, and clients of its gRPC API.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use proto::v1;
use proto::v1::config_client::ConfigClient;
use proto::v1::membership_client::MembershipClient;
use tonic::transport::Channel;

use crate::member::Made;
use crate::process::{Process, free_port};
use crate::store::{Connection, Members};
use crate::tls::Tls;

/// Three members of our store.
pub(crate) struct Ours {
    folder: PathBuf,
    ports: Vec<(u16, u16)>,
    tls: Tls,
    processes: Vec<Process>,
}

/// Starts a cluster and waits until all three vote.
pub(crate) async fn start(folder: &Path) -> anyhow::Result<Ours> {
    let key = rcgen::KeyPair::generate()?;
    let csr = rcgen::CertificateParams::default().serialize_request(&key)?.pem()?;
    let csr_file = folder.join("csr");
    std::fs::write(&csr_file, csr)?;
    let ports = (0..3).map(|_| Ok((free_port()?, free_port()?)));
    let ports = ports.collect::<anyhow::Result<Vec<_>>>()?;
    let mut first = command(folder, 0, ports[0])?;
    first.arg("--csr").arg(&csr_file).stdout(Stdio::piped());
    let mut first = Process::start(&mut first)?;
    let output = first.child().stdout.take().context("no standard output")?;
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line)?;
    let made: Made = serde_json::from_str(&line).context("the first member did not start")?;
    let server = format!("{}.holdfast", made.cluster_id);
    let tls = Tls::new(&made.ca_pem, &made.certificate_pem, &key.serialize_pem(), &server)?;
    let mut processes = vec![first];
    for (index, token) in (1..3).zip(&made.tokens) {
        let mut joins = command(folder, index, ports[index])?;
        processes.push(Process::start(joins.arg("--token").arg(token))?);
    }
    let ours = Ours { folder: folder.to_owned(), ports, tls, processes };
    let until = Instant::now() + Duration::from_secs(60);
    while ours.voters().await.unwrap_or(0) < 3 {
        if Instant::now() > until {
            bail!("three voters did not come about within a minute");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(ours)
}

fn command(folder: &Path, index: usize, (api, enrol): (u16, u16)) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    let name = format!("n{}", index + 1);
    command.arg("member").arg("--dir").arg(folder.join(&name)).args(["--name", &name]);
    command.args(["--api", &api.to_string(), "--enrol", &enrol.to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    Ok(command)
}

impl Ours {
    async fn status(&self) -> anyhow::Result<v1::ClusterStatus> {
        let mut client = MembershipClient::new(self.tls.channel(self.ports[0].0));
        Ok(client.status(v1::ClusterStatusRequest {}).await?.into_inner())
    }

    async fn voters(&self) -> anyhow::Result<usize> {
        let members = self.status().await?.members;
        let voters = members.iter().filter(|m| m.member.as_ref().is_some_and(|m| m.voter));
        Ok(voters.count())
    }
}

impl Members for Ours {
    type Connection = OurConnection;

    fn connect(&self, member: usize) -> OurConnection {
        OurConnection(ConfigClient::new(self.tls.channel(self.ports[member].0)))
    }

    fn leader(&self) -> BoxFuture<'_, anyhow::Result<usize>> {
        Box::pin(async {
            let status = self.status().await?;
            let leader = usize::try_from(status.leader.context("no leader")?)?;
            // Node ids are given in the order of joining, which is not that of the processes.
            let member = status.members.iter().filter_map(|m| m.member.as_ref());
            let mut leading = member.filter(|m| usize::try_from(m.node_id) == Ok(leader));
            let address = &leading.next().context("the leader is no member")?.api_address;
            let port = address.rsplit(':').next().and_then(|port| port.parse().ok());
            let place = self.ports.iter().position(|(api, _)| Some(*api) == port);
            place.context("the leader is none of ours")
        })
    }

    fn processes(&self) -> &[Process] {
        &self.processes
    }

    fn restart(&mut self, member: usize) -> BoxFuture<'_, anyhow::Result<Duration>> {
        Box::pin(async move {
            self.processes[member].end()?;
            let began = Instant::now();
            let mut again = command(&self.folder, member, self.ports[member])?;
            self.processes[member] = Process::start(&mut again)?;
            crate::load::until_it_answers(|| self.connect(member)).await?;
            Ok(began.elapsed())
        })
    }
}

/// A client's connection to a member.
#[derive(Clone)]
pub(crate) struct OurConnection(ConfigClient<Channel>);

impl Connection for OurConnection {
    fn put(&mut self, key: &str, value: Vec<u8>) -> BoxFuture<'_, anyhow::Result<()>> {
        let put = v1::write_op::Op::Put(v1::Put { key: key.to_owned(), value });
        let request =
            v1::TxnRequest { writes: vec![v1::WriteOp { op: Some(put) }], ..Default::default() };
        Box::pin(async move {
            self.0.txn(request).await?;
            Ok(())
        })
    }

    fn get(&mut self, key: &str) -> BoxFuture<'_, anyhow::Result<()>> {
        let request = v1::GetRequest { key: key.to_owned(), ..Default::default() };
        Box::pin(async move {
            self.0.get(request).await?.into_inner().kv.context("the key is not there")?;
            Ok(())
        })
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
                    Ok(batch) => batch.events.into_iter().filter_map(put_value).map(Ok).collect(),
                };
                futures::stream::iter(values)
            });
            Ok(values.boxed())
        })
    }
}

fn put_value(event: v1::WatchEvent) -> Option<Vec<u8>> {
    match event.event? {
        v1::watch_event::Event::Put(kv) => Some(kv.value),
        v1::watch_event::Event::Deleted(_) => None,
    }
}
