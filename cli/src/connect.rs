//! Finding an agent and talking to it: the local one over its Unix socket, or a cluster's nodes
//! over TLS 1.3 with both sides verified.
//!
//! Invariant: over TCP, nothing is sent to a server whose certificate is not from one of the
//! context's CAs, or does not name a node of the cluster that our own certificate belongs to.

use std::fmt;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::RootCertStore;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::args::Global;
use crate::contexts::{self, Context, Contexts};
use crate::failure::{Exit, Failure, tls_alert};

/// Where the local agent listens if nothing else is said.
pub(crate) const DEFAULT_SOCKET: &str = "/run/holdfast/agent.sock";
/// For one address: TCP and TLS.
const CONNECT_LIMIT: Duration = Duration::from_secs(4);
/// For one answer. Agents refuse sooner when there is no quorum.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// A connection to the cluster, and how the user wants to see things.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    pub(crate) channel: Channel,
    pub(crate) global: Global,
}

/// Whom to talk to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    Socket(PathBuf),
    Context(String),
}

impl Target {
    /// The first that is given: flags, then the environment, then the context in use, then the
    /// local agent.
    pub(crate) fn choose(
        global: &Global,
        environment: impl Fn(&str) -> Option<String>,
        current: Option<&str>,
    ) -> Self {
        if let Some(socket) = &global.socket {
            return Self::Socket(socket.clone());
        }
        if let Some(context) = &global.context {
            return Self::Context(context.clone());
        }
        let given = |name| environment(name).filter(|value| !value.is_empty());
        if let Some(socket) = given("HOLDFAST_SOCKET") {
            return Self::Socket(socket.into());
        }
        match given("HOLDFAST_CONTEXT").or(current.map(str::to_owned)) {
            Some(context) => Self::Context(context),
            None => Self::Socket(DEFAULT_SOCKET.into()),
        }
    }
}

impl Session {
    /// Connects to whom the flags, the environment and the contexts say.
    pub(crate) async fn open(global: &Global) -> Result<Self, Failure> {
        let folder = contexts::folder();
        let known = match &folder {
            Ok(folder) => Contexts::load(folder)?,
            // Without a home there are no contexts; the local socket still works.
            Err(_) => Contexts::default(),
        };
        let environment = |name: &str| std::env::var(name).ok();
        let channel = match Target::choose(global, environment, known.current.as_deref()) {
            Target::Socket(path) => connect_socket(&path).await?,
            Target::Context(name) => connect_context(known.get(&name)?, &folder?, &name).await?,
        };
        Ok(Self { channel, global: global.clone() })
    }

    /// Reads something that may go on for ever no longer than `--timeout` says.
    pub(crate) async fn within(
        &self,
        what: &str,
        reading: impl Future<Output = Result<(), Failure>>,
    ) -> Result<(), Failure> {
        let Some(limit) = self.global.timeout else { return reading.await };
        tokio::time::timeout(limit, reading).await.unwrap_or_else(|_| {
            Err(Failure::new(Exit::Timeout, format!("stopped: {what}"))
                .why("the time limit passed; whatever goes on there goes on"))
        })
    }

    /// Waits for an answer, with a limit, and says `cannot WHAT` if it is a refusal.
    pub(crate) async fn call<T>(
        &self,
        what: &str,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Failure> {
        match tokio::time::timeout(ANSWER_LIMIT, answer).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(Failure::status(what, &status)),
            Err(_) => Err(Failure::new(Exit::Timeout, format!("cannot {what}"))
                .why(format!("no answer within {} s", ANSWER_LIMIT.as_secs()))
                .remedy(
                    "see `clusterctl cluster status` and `clusterctl task list`, then try again",
                )),
        }
    }
}

fn endpoint() -> Endpoint {
    // The connectors below ignore the address; it only becomes the requests' authority.
    Endpoint::from_static("http://holdfast")
        .connect_timeout(CONNECT_LIMIT)
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(10))
}

async fn connect_socket(path: &Path) -> Result<Channel, Failure> {
    let what = || format!("cannot reach the agent at {}", path.display());
    // A first try by hand: its error is plain, and the channel's is not.
    UnixStream::connect(path).await.map_err(|error| {
        let failure = Failure::new(Exit::Unreachable, what());
        match error.kind() {
            std::io::ErrorKind::PermissionDenied => failure
                .why("the socket is for root only")
                .remedy("run it as root, or use a context: `clusterctl context list`"),
            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => failure
                .why("no agent runs there")
                .remedy(
                    "start it (`systemctl start holdfast-node-agent`), name its socket with --socket, or use a context (`clusterctl context list`)",
                ),
            _ => failure.why(error.to_string()),
        }
    })?;
    let path = path.to_owned();
    let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    endpoint()
        .connect_with_connector(connector)
        .await
        .map_err(|error| Failure::new(Exit::Unreachable, what()).why(error.to_string()))
}

/// What a context's files hold, ready for use.
#[derive(Clone)]
struct Identity {
    tls: TlsConnector,
    cluster_id: String,
    server_name: ServerName<'static>,
    addresses: Arc<[String]>,
}

/// None of the addresses could be used; each with its reason.
#[derive(Debug, thiserror::Error)]
struct NoNode(Vec<(String, std::io::Error)>);

impl fmt::Display for NoNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<_> = self.0.iter().map(|(at, error)| format!("{at}: {error}")).collect();
        f.write_str(&lines.join("\n"))
    }
}

async fn connect_context(context: &Context, folder: &Path, name: &str) -> Result<Channel, Failure> {
    let identity = Identity::load(context, folder, name)?;
    let what = format!("reach the cluster of context `{name}`");
    // A first try by hand: the channel below swallows what it fails with.
    identity.probe().await.map_err(|no_node| {
        match no_node.0.iter().find_map(|(_, error)| tls_alert(error)) {
            Some(alert) => Failure::alert(&what, alert),
            None => Failure::new(Exit::Unreachable, format!("cannot {what}"))
                .why(no_node.to_string())
                .remedy(format!("is a node up, and its API port open? Change the addresses with `clusterctl context add {name} --force`")),
        }
    })?;
    let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
        let identity = identity.clone();
        async move { identity.connect().await.map(TokioIo::new) }
    });
    endpoint().connect_with_connector(connector).await.map_err(|error| match tls_alert(&error) {
        Some(alert) => Failure::alert(&what, alert),
        None => Failure::new(Exit::Unreachable, format!("cannot {what}")).why(error.to_string()),
    })
}

impl Identity {
    fn load(context: &Context, folder: &Path, name: &str) -> Result<Self, Failure> {
        let bad = |path: &Path, why: String| {
            Failure::new(Exit::Usage, format!("context `{name}`: cannot use {}", path.display()))
                .why(why)
                .remedy("make the context again on one of the cluster's nodes, as root: `clusterctl context create-admin NAME`")
        };
        let (ca_path, key_path) = (folder.join(&context.ca), folder.join(&context.key));
        let certificate_path = folder.join(&context.certificate);
        // While the cluster's CA is rotated there are two.
        let cas: Vec<_> = CertificateDer::pem_file_iter(&ca_path)
            .and_then(Iterator::collect)
            .map_err(|error| bad(&ca_path, error.to_string()))?;
        if cas.is_empty() {
            return Err(bad(&ca_path, "it holds no certificate".to_owned()));
        }
        let chain: Vec<_> = CertificateDer::pem_file_iter(&certificate_path)
            .and_then(Iterator::collect)
            .map_err(|error| bad(&certificate_path, error.to_string()))?;
        let key =
            PrivateKeyDer::from_pem_file(&key_path).map_err(|e| bad(&key_path, e.to_string()))?;
        let cluster_id =
            chain.first().and_then(|own| holder(own)).map(|(cluster_id, _)| cluster_id);
        let cluster_id = cluster_id
            .ok_or_else(|| bad(&certificate_path, "it names no Holdfast cluster".to_owned()))?;
        let server_name = ServerName::try_from(format!("{cluster_id}.holdfast"))
            .map_err(|error| bad(&certificate_path, error.to_string()))?;
        let mut roots = RootCertStore::empty();
        for ca in cas {
            roots.add(ca).map_err(|error| bad(&ca_path, error.to_string()))?;
        }
        let mut config =
            rustls::ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
                .with_root_certificates(roots)
                .with_client_auth_cert(chain, key)
                .map_err(|error| bad(&key_path, error.to_string()))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        let addresses = context.addresses.clone().into();
        Ok(Self { tls: TlsConnector::from(Arc::new(config)), cluster_id, server_name, addresses })
    }

    /// The first address that answers as a node of the cluster.
    async fn connect(&self) -> Result<TlsStream<TcpStream>, NoNode> {
        let mut refused = Vec::new();
        for address in self.addresses.iter() {
            let attempt = tokio::time::timeout(CONNECT_LIMIT, self.connect_to(address)).await;
            match attempt {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => refused.push((address.clone(), error)),
                Err(_) => refused.push((
                    address.clone(),
                    std::io::Error::new(std::io::ErrorKind::TimedOut, "no answer"),
                )),
            }
        }
        Err(NoNode(refused))
    }

    /// Connects, and waits for the server's word. In TLS 1.3 a client has finished its handshake
    /// before the server has looked at its certificate: a refusal comes as an alert on the first
    /// read, where an HTTP/2 server that accepts us sends its settings.
    async fn probe(&self) -> Result<(), NoNode> {
        let mut stream = self.connect().await?;
        let mut settings = [0; 1];
        let word = tokio::time::timeout(CONNECT_LIMIT, stream.read(&mut settings)).await;
        if let Ok(Err(error)) = word {
            return Err(NoNode(vec![("the node that answered".to_owned(), error)]));
        }
        // A courtesy: the node sees a close, not a broken connection.
        let _ = stream.shutdown().await;
        Ok(())
    }

    async fn connect_to(&self, address: &str) -> std::io::Result<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        // The CA and the cluster's own DNS name, which every node's certificate carries …
        let stream = self.tls.connect(self.server_name.clone(), tcp).await?;
        // … and the URI: a node of this cluster, not a client of it.
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let node = certificates.first().and_then(|certificate| holder(certificate)).is_some_and(
            |(cluster_id, rest)| cluster_id == self.cluster_id && rest.starts_with("node/"),
        );
        if !node {
            let why =
                format!("its certificate does not name a node of cluster {}", self.cluster_id);
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, why));
        }
        Ok(stream)
    }
}

/// The cluster id, and `node/ID` or `client/NAME`, of the one `holdfast://` URI in a certificate.
pub(crate) fn holder(certificate: &[u8]) -> Option<(String, String)> {
    use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix("holdfast://")?.split_once('/'),
        _ => None,
    });
    let (cluster_id, rest) = uris.next()?;
    (uris.next().is_none() && !cluster_id.is_empty())
        .then(|| (cluster_id.to_owned(), rest.to_owned()))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Cli;

    fn choose(line: &str, environment: &[(&str, &str)], current: Option<&str>) -> Target {
        let cli = Cli::try_parse_from(line.split(' ')).unwrap();
        let lookup = |name: &str| {
            let found = environment.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        Target::choose(&cli.global, lookup, current)
    }

    #[test]
    fn flags_win_over_the_environment_over_the_context_in_use() {
        let socket = |path: &str| Target::Socket(path.into());
        let context = |name: &str| Target::Context(name.into());
        let (flag_s, flag_c) = ("clusterctl --socket /f version", "clusterctl --context f version");
        let both = [("HOLDFAST_SOCKET", "/e"), ("HOLDFAST_CONTEXT", "e")];
        let plain = "clusterctl version";
        assert_eq!(choose(flag_s, &both, Some("c")), socket("/f"));
        assert_eq!(choose(flag_c, &both, Some("c")), context("f"));
        assert_eq!(choose(plain, &both, Some("c")), socket("/e"));
        assert_eq!(choose(plain, &both[1..], Some("c")), context("e"));
        assert_eq!(choose(plain, &[("HOLDFAST_SOCKET", "")], Some("c")), context("c"));
        assert_eq!(choose(plain, &[], None), socket(DEFAULT_SOCKET));
    }
}
