//! Taking the stand-ins in, serving what voters dial to them, and what they ask the leader for: their
//! lease and, each second, whether they are members still.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use cluster::Cluster;
use futures::StreamExt;
use hyper_util::rt::TokioIo;
use prost::Message;
use proto::v1::enrolment_client::EnrolmentClient;
use proto::v1::peer_client::PeerClient;
use proto::v1::raft_client::RaftClient;
use proto::v1::raft_server::RaftServer;
use proto::v1::{EnrolRequest, EnrolResponse, HeartbeatRequest, NodeReport, RaftMessage};
use rustls::crypto::ring;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::transport::{Channel, Endpoint, Server, Uri};
use tower::service_fn;

use super::count::{Counts, Kind, Link, Wire};
use super::net::Net;
use super::standin::{Incoming, Responder, StandIn};
use super::voters::{LEASE_EVERY, Voter, address};
use super::wire;

/// A heartbeat is given up after so long (0.6 L).
const PATIENCE: Duration = Duration::from_secs(6);

/// All stand-ins.
#[derive(Debug)]
pub(crate) struct Learners {
    pub(crate) counts: Arc<Counts>,
    /// The term of each one's last acknowledged heartbeat.
    terms: Vec<Arc<AtomicU64>>,
    runtime: Runtime,
}

impl Learners {
    /// Has as many join as are asked for, and keep their leases.
    pub(crate) fn join(count: usize, voters: &[Voter], net: &Net) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("stand-ins")
            .enable_all()
            .build()?;
        let counts = Arc::new(Counts::default());
        let (arrive, arrivals) = mpsc::unbounded_channel();
        runtime.spawn({
            let counts = counts.clone();
            let incoming = futures::stream::unfold(arrivals, |mut arrivals| async move {
                let next: Option<Incoming> = arrivals.recv().await;
                next.map(|next| (std::io::Result::Ok(next), arrivals))
            });
            let service = RaftServer::new(Responder(counts)).max_decoding_message_size(64 << 20);
            Server::builder().add_service(service).serve_with_incoming(incoming.boxed())
        });
        let addresses: HashMap<u64, String> = (0..)
            .zip(voters)
            .map(|(number, voter)| (voter.cluster.node_id().0, address(number)))
            .collect();
        let addresses = Arc::new(addresses);
        let leader = voters.iter().find(|voter| voter.leads()).context("nobody leads")?;
        let key = rcgen::KeyPair::generate()?;
        let mut terms = Vec::new();
        // Nobody keeps a lease before all have come: who joins would wait for the leases' rounds.
        let (begin, begun) = watch::channel(false);
        for number in 0..count {
            let standin = StandIn::new();
            let cluster = leader.cluster.clone();
            let csr_pem = rcgen::CertificateParams::default().serialize_request(&key)?.pem()?;
            let answer = leader.runtime.block_on(enrol(cluster, number, csr_pem))?;
            let tls = Tls::new(&answer, &key.serialize_pem())?;
            serve(&runtime, net, number, &tls, standin.clone(), counts.clone(), arrive.clone());
            let term = Arc::new(AtomicU64::new(0));
            terms.push(term.clone());
            let caller = Caller {
                id: answer.node_id,
                cluster_id: answer.cluster_id,
                standin,
                tls,
                net: net.clone(),
                addresses: addresses.clone(),
                counts: counts.clone(),
                term,
            };
            // Spread over the second as nodes that were started by people are: by chance, but the
            // same in each run.
            let phase = LEASE_EVERY.mul_f64(chance(number));
            runtime.spawn(caller.keep(begun.clone(), phase));
        }
        begin.send_replace(true);
        Ok(Self { counts, terms, runtime })
    }

    /// How many have been acknowledged in this term or a later one.
    pub(crate) fn acknowledged_since(&self, term: u64) -> usize {
        self.terms.iter().filter(|own| own.load(Ordering::Relaxed) >= term).count()
    }

    pub(crate) fn end(self) {
        self.runtime.shutdown_timeout(Duration::from_secs(5));
    }
}

/// From 0 to 1, without a pattern over the numbers (splitmix64).
fn chance(number: usize) -> f64 {
    let mut mixed = u64::try_from(number).unwrap_or(0).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    f64::from(u32::try_from((mixed ^ mixed >> 31) >> 32).unwrap_or(0)) / f64::from(u32::MAX)
}

/// As a node joins, but for the connection: the leader's own service is called here.
async fn enrol(cluster: Cluster, number: usize, csr_pem: String) -> anyhow::Result<EnrolResponse> {
    let token = cluster.create_token(0).await?.token;
    let (token_id, token_secret) = wire::token(&token).context("the token cannot be read")?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let request = EnrolRequest {
        token_id,
        token_secret,
        node_name: format!("s{number}"),
        csr_pem,
        api_address: format!("s{number}:1"),
        enrol_address: "s:1".to_owned(),
        now_unix_s: now.as_secs(),
        zone: String::new(),
        witness: false,
    };
    let mut client = EnrolmentClient::new(cluster.enrolment_service());
    Ok(client.enrol(request).await?.into_inner())
}

/// Both sides of a stand-in's TLS.
#[derive(Debug, Clone)]
struct Tls {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl Tls {
    fn new(answer: &EnrolResponse, key_pem: &str) -> anyhow::Result<Self> {
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(answer.ca_pem.as_bytes()) {
            roots.add(root?)?;
        }
        let roots = Arc::new(roots);
        let chain = CertificateDer::pem_slice_iter(answer.certificate_pem.as_bytes());
        let chain = chain.collect::<Result<Vec<_>, _>>()?;
        let key = || PrivateKeyDer::from_pem_slice(key_pem.as_bytes());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build()?;
        let versions = [&rustls::version::TLS13];
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&versions)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key()?)?;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key()?)?;
        server.alpn_protocols = vec![b"h2".to_vec()];
        client.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self { server: Arc::new(server), client: Arc::new(client) })
    }
}

fn serve(
    runtime: &Runtime,
    net: &Net,
    number: usize,
    tls: &Tls,
    standin: Arc<StandIn>,
    counts: Arc<Counts>,
    arrive: mpsc::UnboundedSender<Incoming>,
) {
    let (acceptor, runtime) = (TlsAcceptor::from(tls.server.clone()), runtime.handle().clone());
    net.serve(&format!("s{number}:1"), move |stream| {
        let (to, link) = (standin.clone(), Link::of(None));
        let shaking = acceptor.accept(Wire::new(stream, link.clone(), counts.clone()));
        let arrive = arrive.clone();
        runtime.spawn(async move {
            if let Ok(stream) = shaking.await {
                let _ = arrive.send(Incoming { stream, to, link });
            }
        });
        true
    });
}

/// What a stand-in asks the leader for.
struct Caller {
    id: u64,
    cluster_id: String,
    standin: Arc<StandIn>,
    tls: Tls,
    net: Net,
    /// Of the voters, by id.
    addresses: Arc<HashMap<u64, String>>,
    counts: Arc<Counts>,
    term: Arc<AtomicU64>,
}

/// A leader, and the two connections to it that a node has.
type Links = Option<(u64, Channel, Channel)>;

impl Caller {
    async fn keep(self, mut begun: watch::Receiver<bool>, phase: Duration) {
        let caller = Arc::new(self);
        let links = Mutex::<Links>::default();
        if begun.wait_for(|begun| *begun).await.is_err() {
            return;
        }
        tokio::time::sleep(phase).await;
        let mut ticks = tokio::time::interval(LEASE_EVERY);
        for sequence in 1.. {
            ticks.tick().await;
            let Some(leader) = caller.standin.leader() else { continue };
            let Some((lease, membership)) = caller.links(&links, leader) else { continue };
            tokio::spawn(caller.clone().beat(lease, sequence));
            tokio::spawn(caller.clone().hello(membership));
        }
    }

    fn links(&self, links: &Mutex<Links>, leader: u64) -> Option<(Channel, Channel)> {
        let mut links = links.lock().unwrap_or_else(PoisonError::into_inner);
        if links.as_ref().is_none_or(|(to, _, _)| *to != leader) {
            let (lease, hello) =
                (self.channel(leader, Kind::Lease)?, self.channel(leader, Kind::Hello)?);
            *links = Some((leader, lease, hello));
        }
        links.as_ref().map(|(_, lease, hello)| (lease.clone(), hello.clone()))
    }

    fn channel(&self, leader: u64, kind: Kind) -> Option<Channel> {
        let address = self.addresses.get(&leader)?.clone();
        let name = format!("node-{leader}.{}.holdfast", self.cluster_id);
        let expect = ServerName::try_from(name).ok()?;
        let (net, counts) = (self.net.clone(), self.counts.clone());
        let connector = TlsConnector::from(self.tls.client.clone());
        let endpoint = Endpoint::from_static("http://member.holdfast");
        Some(endpoint.connect_with_connector_lazy(service_fn(move |_: Uri| {
            let (net, counts) = (net.clone(), counts.clone());
            let (address, connector, expect) = (address.clone(), connector.clone(), expect.clone());
            async move {
                let link = Link::of(None);
                let stream = Wire::new(net.dial(&address)?, link.clone(), counts);
                let stream = connector.connect(expect, stream).await?;
                link.carries(kind);
                std::io::Result::Ok(TokioIo::new(stream))
            }
        })))
    }

    async fn beat(self: Arc<Self>, channel: Channel, sequence: u64) {
        // As an agent on a small node without VMs reports.
        let report = NodeReport {
            cpus: 16,
            memory_bytes: 64 << 30,
            memory_free_bytes: 60 << 30,
            watchdog: "Software Watchdog".to_owned(),
            kvm: "svm".to_owned(),
            version: "0.1.0".to_owned(),
            ..NodeReport::default()
        };
        let request = HeartbeatRequest { node_id: self.id, sequence, report: Some(report) };
        let (size, begin) = (request.encoded_len(), Instant::now());
        let mut client = PeerClient::new(channel);
        let answer = tokio::time::timeout(PATIENCE, client.heartbeat(request)).await;
        match answer {
            Ok(Ok(answer)) => {
                let answer = answer.into_inner();
                self.counts.message(Kind::Lease, size, answer.encoded_len());
                self.counts.acknowledged.fetch_add(1, Ordering::Relaxed);
                let waited = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
                self.counts.waited_us.fetch_add(waited, Ordering::Relaxed);
                self.term.fetch_max(answer.term, Ordering::Relaxed);
            }
            _ => {
                self.counts.refused.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    async fn hello(self: Arc<Self>, channel: Channel) {
        let payload = wire::hello();
        let size = payload.len();
        let mut client = RaftClient::new(channel);
        let asked = client.forward(RaftMessage { payload });
        if let Ok(Ok(answer)) = tokio::time::timeout(PATIENCE, asked).await {
            self.counts.message(Kind::Hello, size, answer.get_ref().payload.len());
        }
    }
}
