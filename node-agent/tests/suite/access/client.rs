//! Clients with certificates of their own, over mutual TLS.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::v1::config_client::ConfigClient;
use proto::v1::membership_client::MembershipClient;
use proto::v1::{
    CommitRequest, FileChange, GetRequest, IssueClientRequest, Refusal, WhoAmIRequest,
    WhoAmIResponse,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::rig::Rig;

/// Longer than anything here takes on a slow machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// A certificate with its key, PEM.
pub(crate) struct Papers {
    key: String,
    certificate: String,
    ca: String,
    /// What the one who issued it said of its role.
    pub(crate) role: String,
}

/// Has the cluster sign a certificate.
pub(crate) async fn papers(rig: &Rig, name: &str) -> Papers {
    let key = rcgen::KeyPair::generate().unwrap();
    let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
    let request = IssueClientRequest { name: name.into(), csr_pem: csr.pem().unwrap() };
    let mut membership = MembershipClient::new(rig.channel.clone());
    let issued = membership.issue_client(request).await.unwrap().into_inner();
    let (certificate, ca) = (issued.certificate_pem, issued.ca_pem);
    Papers { key: key.serialize_pem(), certificate, ca, role: issued.role }
}

/// A connection to a node's API port.
pub(crate) fn dial(rig: &Rig, papers: &Papers) -> Channel {
    let node = rig.agent.node().unwrap();
    dial_at(rig.config.listen, node.cluster().cluster_id(), papers)
}

/// A connection to what may become a node of a cluster.
pub(crate) fn dial_at(address: SocketAddr, cluster: &str, papers: &Papers) -> Channel {
    let pem = |text: &str| CertificateDer::from_pem_slice(text.as_bytes()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(pem(&papers.ca)).unwrap();
    let key = PrivateKeyDer::from_pem_slice(papers.key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![pem(&papers.certificate)], key)
        .unwrap();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let tls = Arc::new(tls);
    let name = ServerName::try_from(format!("{cluster}.holdfast")).unwrap();
    let connector = tower::service_fn(move |_| {
        let (tls, name) = (tls.clone(), name.clone());
        async move {
            let tcp = TcpStream::connect(address).await?;
            let stream = tokio_rustls::TlsConnector::from(tls).connect(name, tcp).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    Endpoint::from_static("http://member.holdfast").connect_with_connector_lazy(connector)
}

/// A new client of this name.
pub(crate) async fn client(rig: &Rig, name: &str) -> Channel {
    dial(rig, &papers(rig, name).await)
}

/// A role's document; none: it is removed.
pub(crate) fn role(name: &str, role: &str) -> FileChange {
    let content = (!role.is_empty()).then(|| format!("role = \"{role}\"\n").into_bytes());
    FileChange { path: format!("access/{name}.toml"), content, expected_revision: None }
}

/// A file with any content.
pub(crate) fn file(path: &str, content: &str) -> FileChange {
    FileChange { path: path.into(), content: Some(content.into()), expected_revision: None }
}

/// Commits changes: what is refused of them.
pub(crate) async fn commit(
    channel: &Channel,
    changes: &[FileChange],
) -> Result<Vec<Refusal>, Status> {
    let request = CommitRequest { changes: changes.to_vec(), dry_run: false };
    let answer = ConfigClient::new(channel.clone()).commit(request).await?;
    Ok(answer.into_inner().refusals)
}

/// Commits changes that must be taken.
pub(crate) async fn committed(channel: &Channel, changes: &[FileChange]) {
    assert_eq!(commit(channel, changes).await.unwrap(), []);
}

/// Commits changes that must be refused by the documents' rules.
pub(crate) async fn not_committed(channel: &Channel, changes: &[FileChange], words: &str) {
    let refused = commit(channel, changes).await.unwrap();
    assert!(refused.iter().any(|of| of.reason.contains(words)), "{changes:?}: {refused:?}");
}

pub(crate) async fn get(channel: &Channel, key: &str) -> Result<bool, Status> {
    let request = GetRequest { key: key.into(), ..GetRequest::default() };
    let got = ConfigClient::new(channel.clone()).get(request).await?;
    Ok(got.into_inner().kv.is_some())
}

pub(crate) async fn who(channel: &Channel) -> WhoAmIResponse {
    let asked = MembershipClient::new(channel.clone()).who_am_i(WhoAmIRequest {}).await;
    asked.unwrap().into_inner()
}

/// Waits until the node at the other end gives this client this role (empty: none), and says how
/// long it took.
pub(crate) async fn has_role(channel: &Channel, role: &str) -> Duration {
    let begin = Instant::now();
    loop {
        let told = who(channel).await;
        if told.role == role {
            return begin.elapsed();
        }
        assert!(begin.elapsed() < LIMIT, "{role}: {told:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A call that must be refused for want of a role.
pub(crate) fn denied<T: std::fmt::Debug>(answer: Result<T, Status>, client: &str, needs: &str) {
    let status = answer.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    let remedy = format!("clusterctl config set access/{client} role={needs}");
    for words in [&format!("needs the role `{needs}`"), &format!("`{client}`"), &remedy] {
        assert!(status.message().contains(words.as_str()), "{words}: {status}");
    }
}
