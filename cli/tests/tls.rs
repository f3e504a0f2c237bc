//! Contexts over TLS: only nodes of the context's own cluster are talked to, and a cluster that
//! does not know us is understood.

mod mock;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use mock::{Mock, Ran, command};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, SanType,
};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::{TcpListener, UnixStream};
use tokio_rustls::TlsAcceptor;

/// A cluster's CA, and what it signs.
struct Cluster {
    id: &'static str,
    ca: CertifiedIssuer<'static, KeyPair>,
}

struct Issued {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Cluster {
    fn new(id: &'static str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.distinguished_name.push(DnType::CommonName, id);
        Self { id, ca: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    fn issue(&self, holder: &str) -> Issued {
        let mut params = CertificateParams::default();
        let uri = format!("holdfast://{}/{holder}", self.id);
        let dns = format!("{}.holdfast", self.id);
        params.subject_alt_names =
            vec![SanType::URI(uri.try_into().unwrap()), SanType::DnsName(dns.try_into().unwrap())];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.ca).unwrap();
        Issued { certificate, key }
    }
}

/// A TLS listener of `cluster` as `server`, in front of the mock.
fn listen(mock: &Mock, cluster: &Cluster, server: &Issued) -> SocketAddr {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut roots = RootCertStore::empty();
    roots.add(cluster.ca.der().clone()).unwrap();
    let verifier = WebPkiClientVerifier::builder(roots.into()).build().unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(server.key.serialize_der()));
    let mut config = ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![server.certificate.der().clone()], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = mock.runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    let socket = mock.socket();
    mock.runtime.spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (acceptor, socket) = (acceptor.clone(), socket.clone());
            tokio::spawn(async move {
                let mut tls = acceptor.accept(tcp).await?;
                let mut agent = UnixStream::connect(socket).await?;
                tokio::io::copy_bidirectional(&mut tls, &mut agent).await
            });
        }
    });
    address
}

/// `context add` with files of `ca` and `client`, then `vm list` by it.
fn list_by(folder: &Path, ca: &Cluster, client: &Issued, addresses: &[SocketAddr]) -> Ran {
    let file = |name: &str, text: String| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let mut add = command(folder);
    add.args(["context", "add", "lab", "--use", "--force"]);
    add.args(["--ca", &file("ca.pem", ca.ca.pem())]);
    add.args(["--certificate", &file("cert.pem", client.certificate.pem())]);
    add.args(["--key", &file("key.pem", client.key.serialize_pem())]);
    for address in addresses {
        add.args(["--address", &address.to_string()]);
    }
    let added = Ran::of(add.output().unwrap());
    assert_eq!(added.exit, Some(0), "{added:?}");
    Ran::of(command(folder).args(["vm", "list"]).output().unwrap())
}

#[test]
fn the_next_address_is_tried_when_one_is_down() {
    let (mock, cluster) = (Mock::start(), Cluster::new("c1"));
    let down = {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        taken.local_addr().unwrap()
    };
    let up = listen(&mock, &cluster, &cluster.issue("node/2"));
    let client = cluster.issue("client/ann");
    let ran = list_by(mock.folder.path(), &cluster, &client, &[down, up]);
    assert_eq!(ran.exit, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("web"), "{ran:?}");
    let ran = list_by(mock.folder.path(), &cluster, &client, &[down]);
    assert_eq!(ran.exit, Some(5), "{ran:?}");
    assert!(ran.stderr.contains(&down.to_string()), "{ran:?}");
}

#[test]
fn a_server_that_is_no_node_of_the_cluster_is_not_talked_to() {
    let (mock, ours, theirs) = (Mock::start(), Cluster::new("c1"), Cluster::new("c2"));
    let client = ours.issue("client/ann");
    // Another cluster's node; a client of ours that plays the node.
    for server in [theirs.issue("node/1"), ours.issue("client/mallory")] {
        let address = listen(&mock, &ours, &server);
        let ran = list_by(mock.folder.path(), &ours, &client, &[address]);
        assert_eq!(ran.exit, Some(5), "{ran:?}");
        assert_eq!(ran.stdout, "");
    }
}

#[test]
fn a_cluster_that_does_not_know_us_says_so() {
    let (mock, ours, theirs) = (Mock::start(), Cluster::new("c1"), Cluster::new("c1"));
    // The right server, but our certificate is from another CA.
    let address = listen(&mock, &ours, &ours.issue("node/1"));
    let ran = list_by(mock.folder.path(), &ours, &theirs.issue("client/ann"), &[address]);
    assert_eq!(ran.exit, Some(4), "{ran:?}");
    assert!(ran.stderr.contains("does not accept this client certificate"), "{ran:?}");
    assert!(ran.stderr.contains("create-admin"), "{ran:?}");
}

#[test]
fn a_context_is_renewed_for_the_ca_that_signs_now() {
    let (mock, old, new) = (Mock::start(), Cluster::new("c1"), Cluster::new("c1"));
    let (before, after) =
        (listen(&mock, &old, &old.issue("node/1")), listen(&mock, &new, &new.issue("node/2")));
    let ran = list_by(mock.folder.path(), &old, &old.issue("client/ann"), &[before]);
    assert_eq!(ran.exit, Some(0), "{ran:?}");
    let run =
        |arguments: &[&str]| Ran::of(command(mock.folder.path()).args(arguments).output().unwrap());
    // Nobody signs: it stays as it is.
    let ran = run(&["context", "renew"]);
    assert_eq!(ran.exit, Some(4), "{ran:?}");
    let issuer = (new.ca.key().serialize_pem(), new.ca.pem(), after.to_string());
    *mock.agent.0.issuer.lock().unwrap() = Some(issuer);
    // Not while nodes change: what it got now could be of the CA that goes.
    mock.agent.0.ca.lock().unwrap().phase = "trusting".to_owned();
    let ran = run(&["context", "renew", "lab"]);
    assert!(ran.exit == Some(4) && ran.stderr.contains("renewing"), "{ran:?}");
    assert_eq!(run(&["vm", "list"]).exit, Some(0), "it works as before");
    let ran = run(&["context", "renew", "lab"]);
    assert_eq!(ran.exit, Some(0), "{ran:?}");
    assert!(ran.stdout.contains(&before.to_string()), "{ran:?}");
    // Nodes of the old CA are not trusted any more: the next address is tried.
    let ran = run(&["vm", "list"]);
    assert!(ran.exit == Some(0) && ran.stdout.contains("web"), "{ran:?}");
    // Again, by the new one; what it had before is removed.
    let ran = run(&["context", "renew"]);
    assert_eq!(ran.exit, Some(0), "{ran:?}");
    assert_eq!(run(&["vm", "list"]).exit, Some(0));
    let files = std::fs::read_dir(mock.folder.path().join("config/lab")).unwrap();
    assert_eq!(files.count(), 3);
}
