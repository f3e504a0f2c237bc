//! Tokens, certificates and bad input from strangers.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use crate::common::{LIMIT, Lab, Outcome, TestNode};
use cluster::{JoinError, OpenError, Opened, open};
use proto::v1;
use proto::v1::enrolment_client::EnrolmentClient;
use proto::v1::raft_client::RaftClient;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint, Uri};

fn refused(result: Outcome) -> Outcome<String> {
    match result {
        Ok(()) => Err("it was let in".into()),
        Err(error) => Ok(error.to_string()),
    }
}

#[test]
fn bad_tokens_and_taken_names_are_refused_with_the_reason() -> Outcome {
    let lab = Lab::new(1)?;
    let mut node = TestNode::new(lab.folder(), "n1")?;
    node.folder = lab.folder().join("other");
    node.config.data_dir = node.folder.clone();
    let token = lab.token(0)?;
    let why = refused(node.join(&token))?;
    assert!(why.contains("named `n1` is in the cluster already"), "{why}");
    node.name = "n2".to_owned();
    // The refused attempt has not used the token up.
    node.join(&token)?;
    assert_eq!(node.cluster()?.node_id().0, 2);

    let mut third = TestNode::new(lab.folder(), "n3")?;
    let why = refused(third.join(&token))?;
    assert!(why.contains("used already, by node `n2`"), "{why}");
    let why = refused(third.join("hf1-AAAA"))?;
    assert!(why.contains("not a join token"), "{why}");
    let mut forged = lab.token(0)?;
    // Another secret, well-formed otherwise: one letter in the middle of it.
    let at = 30;
    let letter = if &forged[at..=at] == "A" { "B" } else { "A" };
    forged.replace_range(at..=at, letter);
    let why = refused(third.join(&forged))?;
    assert!(why.contains("not known here") || why.contains("not a join token"), "{why}");
    let made = lab.nodes[0].run(|c| async move { c.create_token(1).await })??;
    let expires = std::time::UNIX_EPOCH + Duration::from_secs(made.expires_unix_s);
    lab.wait("it has expired", |_| Ok(std::time::SystemTime::now() > expires))?;
    let short = made.token;
    let why = refused(third.join(&short))?;
    assert!(why.contains("expired"), "{why}");
    third.join(&lab.token(0)?)?;
    Ok(())
}

#[test]
fn a_used_token_does_not_bring_a_removed_node_back() -> Outcome {
    // The fourth gets no vote, so it may come and go.
    let lab = Lab::new(3)?;
    let used = lab.token(0)?;
    let key = {
        let mut node = TestNode::new(lab.folder(), "n4")?;
        node.join(&used)?;
        let pem = std::fs::read_to_string(node.config.data_dir.join("node.pem"))?;
        let at = pem.find("-----BEGIN PRIVATE KEY").ok_or("no key")?;
        pem[at..].to_owned()
    };
    // As one that did not get the answer: the same key, name and token.
    let again = |folder: &str| {
        let mut node = TestNode::new(&lab.folder().join(folder), "n4")?;
        std::fs::create_dir_all(&node.folder)?;
        std::fs::write(node.folder.join("joining.key"), &key)?;
        let joined = node.join(&used);
        Outcome::Ok((node, joined))
    };
    let (node, joined) = again("first")?;
    joined?;
    assert_eq!(node.cluster()?.node_id().0, 4, "its own token answers it again");
    drop(node);
    lab.nodes[0].run(|c| async move { c.remove_node("n4").await })??;
    let (_, joined) = again("second")?;
    let why = refused(joined)?;
    assert!(why.contains("node 4") && why.contains("was removed"), "{why}");
    assert_eq!(lab.members(0)?.len(), 3, "it is listed again");
    // With another token it is a new node.
    let mut node = TestNode::new(&lab.folder().join("third"), "n4")?;
    node.join(&lab.token(0)?)?;
    assert_eq!(node.cluster()?.node_id().0, 5);
    Ok(())
}

#[test]
fn a_token_of_another_cluster_is_not_told_to_this_one() -> Outcome {
    let (one, two) = (Lab::new(1)?, Lab::new(1)?);
    // The other cluster now answers where the token points to.
    let token = one.token(0)?;
    let address = one.nodes[0].config.enrol_address.clone();
    drop(one);
    let mut node = TestNode::new(two.folder(), "n2")?;
    let cluster = two.nodes[0].cluster()?;
    two.nodes[0].run(move |_| async move {
        let listener = tokio::net::TcpListener::bind(&address).await?;
        let server = tonic::transport::Server::builder().add_service(cluster.enrolment_service());
        tokio::spawn(server.serve_with_incoming(cluster.enrol_incoming(listener)?));
        Outcome::Ok(())
    })??;
    let why = refused(node.join(&token))?;
    assert!(why.contains("does not belong to the cluster that made this token"), "{why}");
    Ok(())
}

/// A TLS client's identity, PEM.
#[derive(Clone)]
pub(crate) struct Papers {
    pub(crate) key: String,
    pub(crate) certificate: String,
}

/// What a client (or nobody) shakes hands with, trusting `ca_pem`.
pub(crate) fn client_tls(
    ca_pem: &str,
    papers: Option<Papers>,
) -> Outcome<Arc<rustls::ClientConfig>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca_pem.as_bytes())?)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let mut tls = match papers {
        Some(papers) => builder.with_client_auth_cert(
            vec![CertificateDer::from_pem_slice(papers.certificate.as_bytes())?],
            PrivateKeyDer::from_pem_slice(papers.key.as_bytes())?,
        )?,
        None => builder.with_no_client_auth(),
    };
    tls.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(tls))
}

/// Dials as the given client (or as nobody), trusting `ca_pem`.
pub(crate) fn dial(
    address: &str,
    ca_pem: &str,
    name: &str,
    papers: Option<Papers>,
) -> Outcome<Channel> {
    let tls = client_tls(ca_pem, papers)?;
    let name = ServerName::try_from(name.to_owned())?;
    let address = address.to_owned();
    let endpoint = Endpoint::from_static("http://member.holdfast").timeout(LIMIT);
    Ok(endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let (tls, name, address) = (tls.clone(), name.clone(), address.clone());
        async move {
            let tcp = TcpStream::connect(address).await?;
            let stream = tokio_rustls::TlsConnector::from(tls).connect(name, tcp).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    })))
}

pub(crate) fn papers(lab: &Lab, client: &str) -> Outcome<(Papers, String)> {
    papers_from(lab, 0, client)
}

/// A client's papers, signed by one member, and the CA's certificate.
pub(crate) fn papers_from(lab: &Lab, on: usize, client: &str) -> Outcome<(Papers, String)> {
    let key = rcgen::KeyPair::generate()?;
    let csr = rcgen::CertificateParams::default().serialize_request(&key)?.pem()?;
    let client = client.to_owned();
    let issued =
        lab.nodes[on].run(move |c| async move { c.issue_client(&client, &csr, None).await })??;
    let papers = Papers { key: key.serialize_pem(), certificate: issued.certificate_pem };
    Ok((papers, issued.ca_pem))
}

/// What a service for nodes alone says; `None`: nothing, since the connection was refused. With TLS
/// 1.3 that may come before or after the request was sent, under several codes; a status that was
/// made on this side has a source, one that the server sent has none.
pub(crate) async fn answered(channel: Channel) -> Option<tonic::Code> {
    let vote = RaftClient::new(channel).vote(v1::RaftMessage { payload: vec![1, 2, 3] }).await;
    match vote {
        Ok(_) => Some(tonic::Code::Ok),
        Err(status) if std::error::Error::source(&status).is_some() => None,
        Err(status) => Some(status.code()),
    }
}

#[test]
fn clients_get_what_their_certificate_is_good_for() -> Outcome {
    let (one, two) = (Lab::new(1)?, Lab::new(1)?);
    let (mine, foreign) = (papers(&one, "ann")?, papers(&two, "eve")?);
    // A runtime of the client's own, gone before the labs and theirs are.
    tokio::runtime::Runtime::new()?.block_on(clients(&one, mine, foreign.0))
}

async fn clients(one: &Lab, (mine, ca): (Papers, String), foreign: Papers) -> Outcome {
    let cluster_id = one.nodes[0].cluster()?.cluster_id().to_owned();
    let (api, enrol) =
        (one.nodes[0].config.api_address.clone(), one.nodes[0].config.enrol_address.clone());
    let any = format!("{cluster_id}.holdfast");

    // Garbage on both ports first: nobody after it may notice.
    for address in [&api, &enrol] {
        for _ in 0..20 {
            let mut garbage = std::net::TcpStream::connect(address)?;
            // In one piece: after the first bytes the member may have hung up on it.
            garbage.write_all(b"\x16\x03\x01\xff\xff\x09\x09\x09\x09GET / HTTP/1.1\r\n\r\n")?;
        }
        // These say nothing, and stay.
        for _ in 0..20 {
            std::mem::forget(std::net::TcpStream::connect(address)?);
        }
    }

    let good = dial(&api, &ca, &any, Some(mine.clone()))?;
    assert_eq!(answered(good).await, Some(tonic::Code::PermissionDenied));

    for nobody in [None, Some(foreign)] {
        let channel = dial(&api, &ca, &any, nobody)?;
        assert_eq!(answered(channel).await, None, "a stranger was answered");
    }
    // A certificate is good for no other node than its own.
    let wrong = dial(&api, &ca, &format!("node-2.{cluster_id}.holdfast"), Some(mine))?;
    assert_eq!(answered(wrong).await, None, "node 1 passed for node 2");

    // The joining node's clock, and what is no request at all.
    let key = rcgen::KeyPair::generate()?;
    let csr_pem = rcgen::CertificateParams::default().serialize_request(&key)?.pem()?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    let request = v1::EnrolRequest {
        token_id: "00".to_owned(),
        token_secret: "x".to_owned(),
        node_name: "late".to_owned(),
        csr_pem,
        api_address: "127.0.0.1:1".to_owned(),
        enrol_address: "127.0.0.1:2".to_owned(),
        now_unix_s: now - 3600,
        ..v1::EnrolRequest::default()
    };
    let mut stranger = EnrolmentClient::new(dial(&enrol, &ca, &any, None)?);
    let late = stranger.enrol(request.clone()).await.err().ok_or("let in")?;
    assert!(
        late.message().contains("3600 s behind") || late.message().contains("behind this cluster"),
        "{late}"
    );
    assert!(late.message().contains("timedatectl"), "{late}");
    let unknown = stranger.enrol(v1::EnrolRequest { now_unix_s: now, ..request.clone() }).await;
    assert_eq!(unknown.err().map(|s| s.code()), Some(tonic::Code::PermissionDenied));
    let garbled = v1::EnrolRequest { now_unix_s: now, csr_pem: "no request".to_owned(), ..request };
    let garbled = stranger.enrol(garbled).await;
    assert_eq!(garbled.err().map(|s| s.code()), Some(tonic::Code::InvalidArgument));
    Ok(())
}

#[test]
fn one_agent_per_data_folder_and_no_damaged_database() -> Outcome {
    let mut lab = Lab::new(1)?;
    let config = lab.nodes[0].config.clone();
    let second = lab.nodes[0].run({
        let config = config.clone();
        move |_| async move { open(config).await }
    })?;
    let Err(error @ OpenError::InUse { .. }) = second else { return Err("opened twice".into()) };
    assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");

    // Enough rows that table files are written, then one of them is damaged.
    for round in 0..40u32 {
        lab.nodes[0].run(|c| async move {
            c.txn(cluster::Txn::new().put(format!("k/{round}"), noise(900_000, round))).await
        })??;
    }
    lab.nodes[0].stop();
    let runtime = tokio::runtime::Runtime::new()?;
    // A second one, so that it is opened from table files.
    let Opened::Member(cluster) = runtime.block_on(open(config.clone()))? else {
        return Err("not a member".into());
    };
    runtime.block_on(cluster.shutdown());
    drop(cluster);
    let tables: Vec<_> = std::fs::read_dir(config.data_dir.join("db"))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|ext| ext == "sst"))
        .collect();
    let table = tables.iter().max_by_key(|path| path.metadata().map_or(0, |m| m.len()));
    let table = table.ok_or("no table file")?;
    let mut bytes = std::fs::read(table)?;
    let middle = bytes.len() / 3;
    for byte in &mut bytes[middle..middle + 64] {
        *byte ^= 0x5a;
    }
    std::fs::write(table, bytes)?;
    let damaged = runtime.block_on(open(config.clone()));
    let Err(error @ OpenError::Corrupt { .. }) = damaged else {
        return Err(format!("a damaged database was opened: {damaged:?}").into());
    };
    assert!(error.to_string().contains("join again"), "{error}");
    // A member without its database must not start from nothing: it would give its vote twice.
    for part in ["log", "db"] {
        let (database, gone) = (config.data_dir.join(part), config.data_dir.join("gone"));
        let name = std::fs::read(database.join("CURRENT"))?;
        std::fs::remove_file(database.join("CURRENT"))?;
        let nameless = runtime.block_on(open(config.clone()));
        assert!(matches!(nameless, Err(OpenError::Unusable { .. })), "{part}: {nameless:?}");
        // Moved, not removed: what failed to open may still be closing its files.
        std::fs::rename(&database, &gone)?;
        std::fs::create_dir(&database)?;
        let empty = runtime.block_on(open(config.clone()));
        assert!(matches!(empty, Err(OpenError::Unusable { .. })), "{part}: {empty:?}");
        std::fs::remove_dir_all(&database)?;
        let missing = runtime.block_on(open(config.clone()));
        assert!(matches!(missing, Err(OpenError::Unusable { .. })), "{part}: {missing:?}");
        std::fs::rename(&gone, &database)?;
        std::fs::write(database.join("CURRENT"), name)?;
    }
    Ok(())
}

/// Bytes that do not compress.
fn noise(length: usize, seed: u32) -> Vec<u8> {
    let mut state = u64::from(seed) | 1;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}

#[test]
fn nobody_at_the_address_is_said_so() -> Outcome {
    let lab = Lab::new(1)?;
    let token = lab.token(0)?;
    let config = {
        let node = TestNode::new(lab.folder(), "n2")?;
        node.config.clone()
    };
    drop(lab);
    let runtime = tokio::runtime::Runtime::new()?;
    let Opened::Fresh(fresh) = runtime.block_on(open(config))? else {
        return Err("not fresh".into());
    };
    let error = runtime.block_on(fresh.join(&token, "n2"));
    assert!(matches!(error, Err(JoinError::Unreachable(_))), "{error:?}");
    Ok(())
}
