//! Certificates of nodes and clients: they change while the cluster works, and count no more at once
//! when they are revoked or their node is removed.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cluster::{Cluster, ClusterConfig, MembershipError, Txn};
use proto::record::{RemovalRecord, RemovalState};
use proto::v1::raft_client::RaftClient;
use proto::{keys, v1};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tonic::Code;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::common::{LIMIT, Lab, Outcome};
use crate::joining::{Papers, client_tls, dial, papers};

/// Long enough for a busy machine, short enough for a test.
const LIFE: Duration = Duration::from_secs(15);

fn short_lives(config: &mut ClusterConfig) {
    config.certificates.node = LIFE;
    config.certificates.memory = Duration::from_secs(1);
    config.request_timeout = Duration::from_secs(15);
}

fn now_unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What a member shows in handshakes, as it says itself.
fn own(lab: &Lab, on: usize) -> Outcome<v1::Certificate> {
    Ok(lab.nodes[on].cluster()?.certificate())
}

pub(crate) fn list(lab: &Lab, on: usize) -> Outcome<Vec<v1::Certificate>> {
    Ok(lab.nodes[on].run(|c| async move { c.certificates().await })??)
}

/// The name that every member answers to.
pub(crate) fn any(lab: &Lab) -> Outcome<String> {
    Ok(format!("{}.holdfast", lab.nodes[0].cluster()?.cluster_id()))
}

/// A TLS connection that nothing was said on yet.
pub(crate) type Silent = tokio_rustls::client::TlsStream<TcpStream>;

pub(crate) async fn connect(
    address: &str,
    name: &str,
    ca: &str,
    papers: Papers,
) -> Outcome<Silent> {
    let tls = client_tls(ca, Some(papers))?;
    let tcp = TcpStream::connect(address).await?;
    let name = ServerName::try_from(name.to_owned())?;
    Ok(tokio_rustls::TlsConnector::from(tls).connect(name, tcp).await?)
}

/// Serial number and end of a certificate.
fn of_der(der: &[u8]) -> Outcome<(String, u64)> {
    let (_, parsed) = X509Certificate::from_der(der)?;
    let serial = parsed.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((serial, u64::try_from(parsed.validity().not_after.timestamp())?))
}

fn parts(pem: &str) -> Outcome<(String, u64)> {
    of_der(&CertificateDer::from_pem_slice(pem.as_bytes())?)
}

/// The serial number that the other end of a new connection shows.
fn shown(stream: &Silent) -> Outcome<String> {
    let all = stream.get_ref().1.peer_certificates().ok_or("no certificate")?;
    Ok(of_der(&all[0])?.0)
}

/// Reads until the other end hangs up, within the limit.
pub(crate) async fn hangs_up(stream: &mut Silent) -> bool {
    let mut rest = Vec::new();
    tokio::time::timeout(LIMIT, stream.read_to_end(&mut rest)).await.is_ok()
}

/// What is answered to a request that only nodes may make.
async fn answer(channel: tonic::transport::Channel) -> (Code, String) {
    let vote = RaftClient::new(channel).vote(v1::RaftMessage { payload: vec![1, 2, 3] }).await;
    match vote {
        Ok(_) => (Code::Ok, String::new()),
        Err(status) => (status.code(), status.message().to_owned()),
    }
}

/// Asks until an answer comes that is one: a connection that was cut has to be made anew.
async fn told(channel: &tonic::transport::Channel, words: &str) -> Outcome {
    let mut last = String::new();
    let asked = async {
        loop {
            let (code, text) = answer(channel.clone()).await;
            if code == Code::PermissionDenied && text.contains(words) {
                return;
            }
            last = format!("{code}: {text}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(LIMIT, asked)
        .await
        .map_err(|_| format!("not told `{words}`, but {last}").into())
}

/// A member's own papers, as they are on its disk.
pub(crate) fn node_papers(lab: &Lab, on: usize) -> Outcome<Papers> {
    let pem = std::fs::read_to_string(lab.nodes[on].config.data_dir.join("node.pem"))?;
    Ok(Papers { key: pem.clone(), certificate: pem })
}

fn ca(lab: &Lab) -> Outcome<String> {
    Ok(std::fs::read_to_string(lab.nodes[0].config.data_dir.join("ca.crt"))?)
}

/// Writes on one member until it is told to stop; counts what was written, and what was not.
fn write(
    lab: &Lab,
    on: usize,
    stop: &Arc<AtomicBool>,
) -> Outcome<(Arc<AtomicU64>, Arc<AtomicU64>)> {
    let (good, bad) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (stop, counts) = (stop.clone(), (good.clone(), bad.clone()));
    lab.nodes[on].run(move |c: Cluster| async move {
        tokio::spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                let number = good.load(Ordering::SeqCst).to_string();
                let written = c.txn(Txn::new().put(format!("written/{on}"), number)).await;
                if let Err(error) = &written {
                    eprintln!("n{}: {error}", on + 1);
                }
                let counter = if written.is_ok() { &good } else { &bad };
                counter.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
    })?;
    Ok(counts)
}

#[test]
fn nodes_change_their_certificates_while_writes_go_on() -> Outcome {
    let mut lab = Lab::with(3, short_lives)?;
    let stop = Arc::new(AtomicBool::new(false));
    let writers = (0..3).map(|on| write(&lab, on, &stop)).collect::<Outcome<Vec<_>>>()?;
    let (ann, ca) = papers(&lab, "ann")?;
    let name = any(&lab)?;
    let client = tokio::runtime::Runtime::new()?;
    // Connections from before the first change.
    let mut early = Vec::new();
    for on in 0..3 {
        let address = lab.nodes[on].config.api_address.clone();
        early.push(client.block_on(connect(&address, &name, &ca, ann.clone()))?);
    }
    let mut seen = Vec::new();
    for on in 0..3 {
        seen.push(vec![own(&lab, on)?.serial]);
    }
    for _ in 0..2 {
        lab.wait("each node has another certificate", |lab| {
            let mut changed = true;
            for (on, seen) in seen.iter().enumerate() {
                changed &= own(lab, on)?.serial != *seen.last().ok_or("none")?;
            }
            Ok(changed)
        })?;
        for (on, seen) in seen.iter_mut().enumerate() {
            seen.push(own(&lab, on)?.serial);
        }
    }
    for on in 0..3 {
        let address = lab.nodes[on].config.api_address.clone();
        // It may change once more between the two looks.
        lab.wait("new connections are shown the new one", |lab| {
            let stream = client.block_on(connect(&address, &name, &ca, ann.clone()))?;
            Ok(shown(&stream)? == own(lab, on)?.serial)
        })?;
    }
    // The old connections are still there: nothing to read, and no end.
    client.block_on(async {
        for stream in &mut early {
            // The server's first words in HTTP/2 may be there to read; an end is not.
            let mut some = [0; 64];
            let silence = Duration::from_millis(200);
            while let Ok(read) = tokio::time::timeout(silence, stream.read(&mut some)).await {
                assert!(read.is_ok_and(|length| length > 0), "an old connection was dropped");
            }
        }
    });
    stop.store(true, Ordering::SeqCst);
    for (on, (good, bad)) in writers.iter().enumerate() {
        let (good, bad) = (good.load(Ordering::SeqCst), bad.load(Ordering::SeqCst));
        assert!(good > 10 && bad == 0, "n{}: {good} written, {bad} not", on + 1);
    }

    // On disk there is one file of both parts, for the owner alone, and it is what is shown.
    let folder = lab.nodes[1].config.data_dir.clone();
    let mode = std::fs::metadata(folder.join("node.pem"))?.permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    lab.nodes[1].stop();
    lab.nodes[1].start()?;
    lab.wait("it goes on with what is on its disk", |lab| {
        lab.nodes[1].run(|c| async move { c.txn(Txn::new().put("back", "1")).await.is_ok() })
    })?;
    lab.wait("those from before are forgotten, and each node is listed", |lab| {
        let listed = list(lab, 0)?;
        let gone = seen.iter().all(|seen| listed.iter().all(|one| one.serial != seen[0]));
        let nodes = listed.iter().filter(|one| one.kind == "node" && one.state == "valid");
        Ok(gone && nodes.count() == 3 && listed[0].kind == "ca")
    })
}

#[test]
fn a_renewal_that_fails_is_shown_and_tried_again() -> Outcome {
    let lab = Lab::with(1, short_lives)?;
    let before = own(&lab, 0)?;
    // It cannot be written: something is in its way.
    let obstacle = lab.nodes[0].config.data_dir.join("node.tmp");
    std::fs::create_dir(&obstacle)?;
    let refused = lab.nodes[0].run(|c| async move { c.renew_certificate().await })?;
    let Err(error @ MembershipError::NotRenewed(_)) = refused else {
        return Err(format!("{refused:?}").into());
    };
    assert!(error.to_string().contains("cannot be kept"), "{error}");
    assert_eq!(own(&lab, 0)?.serial, before.serial, "what is not on disk is not shown");
    // The one that it works with is not replaced by one that it does not have.
    let serial = before.serial.clone();
    let refused =
        lab.nodes[0].run(|c| async move { c.revoke_certificates(&serial, "root").await })?;
    let refused = refused.err().ok_or("a member was locked out")?.to_string();
    assert!(refused.contains("cert renew n1"), "{refused}");
    lab.wait("the list says why there is none", |lab| {
        Ok(list(lab, 0)?
            .iter()
            .any(|one| one.serial == before.serial && one.trouble.contains("kept")))
    })?;
    std::fs::remove_dir(&obstacle)?;
    lab.wait("it got one by itself", |lab| Ok(own(lab, 0)?.serial != before.serial))?;
    let now = own(&lab, 0)?.serial;
    let asked = lab.nodes[0].run(|c| async move { c.renew_certificate().await })??;
    assert_ne!(asked.serial, now, "another one on request");
    let listed = list(&lab, 0)?;
    let state =
        |serial: &str| listed.iter().find(|one| one.serial == serial).map(|one| one.state.clone());
    assert_eq!(state(&asked.serial).as_deref(), Some("valid"));
    assert!(matches!(state(&now).as_deref(), Some("replaced")), "{listed:?}");
    Ok(())
}

#[test]
fn a_cluster_that_was_off_for_longer_than_its_certificates_last_comes_back() -> Outcome {
    let mut lab = Lab::with(3, short_lives)?;
    let mut last = 0;
    for on in 0..3 {
        lab.nodes[on].stop();
    }
    for on in 0..3 {
        last = last.max(parts(&node_papers(&lab, on)?.certificate)?.1);
    }
    lab.wait("all have expired", |_| Ok(now_unix_s() > last))?;
    for on in 0..3 {
        lab.nodes[on].start()?;
    }
    lab.wait("they work again", |lab| {
        lab.nodes[0].run(|c| async move { c.txn(Txn::new().put("again", "1")).await.is_ok() })
    })?;
    lab.wait("what they signed themselves is in the list", |lab| {
        let listed = list(lab, 0)?;
        Ok(listed.iter().filter(|one| one.kind == "node" && one.state == "valid").count() == 3)
    })
}

/// A request for a certificate on a new key, for whoever is named.
fn csr(names: &[String]) -> Outcome<String> {
    let key = rcgen::KeyPair::generate()?;
    let mut params = rcgen::CertificateParams::default();
    for name in names {
        params.subject_alt_names.push(rcgen::SanType::URI(name.as_str().try_into()?));
    }
    Ok(params.serialize_request(&key)?.pem()?)
}

#[test]
fn a_node_gets_its_own_next_certificate_only_and_only_while_it_is_a_member() -> Outcome {
    let mut lab = Lab::new(3)?;
    let leader = lab.leader()?;
    let (asker, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let id = lab.nodes[asker].cluster()?.node_id().0;
    let others = lab.nodes[other].cluster()?.node_id().0;
    let (cluster_id, name, ca) =
        (lab.nodes[0].cluster()?.cluster_id().to_owned(), any(&lab)?, ca(&lab)?);
    let papers_of = node_papers(&lab, asker)?;
    let (ann, _) = papers(&lab, "ann")?;
    let (at_leader, elsewhere) =
        (lab.nodes[leader].config.api_address.clone(), lab.nodes[other].config.api_address.clone());
    let uri = |node: u64| format!("holdfast://{cluster_id}/node/{node}");
    let client = tokio::runtime::Runtime::new()?;
    let ask = |address: &str, papers: &Papers, node_id: u64, csr_pem: &str, now_unix_s: u64| {
        let request = v1::RenewRequest { node_id, csr_pem: csr_pem.to_owned(), now_unix_s };
        client.block_on(async {
            let channel = dial(address, &ca, &name, Some(papers.clone()))?;
            let renewed = RaftClient::new(channel).renew(request).await;
            Outcome::Ok(match renewed {
                Ok(_) => (Code::Ok, String::new()),
                Err(status) => (status.code(), status.message().to_owned()),
            })
        })
    };
    let now = now_unix_s();
    let good = csr(&[uri(id)])?;
    let both = csr(&[uri(id), uri(others)])?;
    let cases: [(&str, &Papers, u64, &str, u64, Code, &str); 9] = [
        (&at_leader, &papers_of, others, &good, now, Code::PermissionDenied, "its own only"),
        (&at_leader, &papers_of, id, &csr(&[uri(others)])?, now, Code::InvalidArgument, "names"),
        (&at_leader, &papers_of, id, &both, now, Code::InvalidArgument, "names"),
        (&at_leader, &papers_of, id, &csr(&[])?, now, Code::InvalidArgument, "names"),
        (&at_leader, &papers_of, id, "garbage", now, Code::InvalidArgument, "not valid"),
        (&at_leader, &papers_of, id, &good, now - 3600, Code::FailedPrecondition, "clock"),
        (&at_leader, &ann, id, &good, now, Code::PermissionDenied, "nodes only"),
        (&elsewhere, &papers_of, id, &good, now, Code::Unavailable, "does not lead"),
        // A clock that is a minute off is nobody's fault.
        (&at_leader, &papers_of, id, &good, now - 60, Code::Ok, ""),
    ];
    for (place, (address, papers, node, csr, at, code, words)) in cases.into_iter().enumerate() {
        let (got, text) = ask(address, papers, node, csr, at)?;
        assert!(got == code && text.contains(words), "case {place}: {got}: {text}");
    }
    let (code, text) = ask(&at_leader, &papers_of, id, &good, now)?;
    assert!(code == Code::AlreadyExists && text.contains("made before"), "{code}: {text}");

    // Once removed it gets nothing, and hears why.
    lab.nodes[asker].kill();
    lab.nodes[leader].run(move |c| async move { c.remove_node(&id.to_string()).await })??;
    let (code, text) = ask(&at_leader, &papers_of, id, &csr(&[uri(id)])?, now)?;
    assert!(code == Code::PermissionDenied && text.contains("was removed"), "{code}: {text}");
    Ok(())
}

#[test]
fn a_removed_node_is_cut_off_everywhere_at_once() -> Outcome {
    let mut lab = Lab::new(3)?;
    let leader = lab.leader()?;
    let gone = (leader + 1) % 3;
    let stays: Vec<usize> = (0..3).filter(|on| *on != gone).collect();
    let (name, ca, stolen) = (any(&lab)?, ca(&lab)?, node_papers(&lab, gone)?);
    let id = lab.nodes[gone].cluster()?.node_id();
    // From here on only the test speaks in its name.
    lab.nodes[gone].kill();
    let client = tokio::runtime::Runtime::new()?;
    let mut connections = Vec::new();
    for on in &stays {
        let address = lab.nodes[*on].config.api_address.clone();
        let (channel, silent, streaming) = client.block_on(async {
            let channel = dial(&address, &ca, &name, Some(stolen.clone()))?;
            let (code, text) = answer(channel.clone()).await;
            assert_eq!(code, Code::InvalidArgument, "a member is listened to: {text}");
            let silent = connect(&address, &name, &ca, stolen.clone()).await?;
            // A stream as Raft's leader has one to each follower.
            let mut raft = RaftClient::new(channel.clone());
            let stream = raft.append(futures::stream::pending());
            let mut stream = tokio::time::timeout(LIMIT, stream).await??.into_inner();
            let quiet = tokio::time::timeout(Duration::from_millis(200), stream.message());
            assert!(quiet.await.is_err(), "the stream did not stay open");
            Outcome::Ok((channel, silent, stream))
        })?;
        connections.push((channel, silent, streaming));
    }
    lab.nodes[leader].run(move |c| async move { c.remove_node(&id.to_string()).await })??;
    client.block_on(async {
        for (channel, silent, streaming) in &mut connections {
            assert!(hangs_up(silent).await, "an open connection was left to it");
            let ended = tokio::time::timeout(LIMIT, streaming.message()).await;
            assert!(ended.is_ok(), "an open stream was left to it");
            told(channel, "was removed").await?;
        }
        Outcome::Ok(())
    })?;
    let listed = list(&lab, leader)?;
    let its = listed.iter().find(|one| one.node_id == id.0).ok_or("it is not listed")?;
    assert_eq!(its.state, "revoked");
    // A member that starts anew knows it before it is reached.
    let again = stays.iter().copied().find(|on| *on != leader).ok_or("no other")?;
    lab.nodes[again].stop();
    lab.nodes[again].start()?;
    let address = lab.nodes[again].config.api_address.clone();
    client.block_on(async {
        let channel = dial(&address, &ca, &name, Some(stolen.clone()))?;
        told(&channel, "was removed").await
    })
}

#[test]
fn a_revoked_client_is_cut_off_everywhere_at_once_and_for_good() -> Outcome {
    let mut lab = Lab::new(3)?;
    let ((first, ca), (second, _)) = (papers(&lab, "ann")?, papers(&lab, "ann")?);
    let (bob, _) = papers(&lab, "bob")?;
    let name = any(&lab)?;
    let listed = list(&lab, 1)?;
    let anns: Vec<_> = listed.iter().filter(|one| one.name == "ann").collect();
    assert!(anns.len() == 2 && anns.iter().all(|one| one.state == "valid"), "{listed:?}");
    let (serial, _) = parts(&first.certificate)?;
    let client = tokio::runtime::Runtime::new()?;
    let connect_all = |lab: &Lab, papers: &Papers| {
        let addresses = lab.nodes.iter().map(|node| node.config.api_address.clone());
        addresses
            .map(|address| {
                client.block_on(async {
                    let channel = dial(&address, &ca, &name, Some(papers.clone()))?;
                    let (_, text) = answer(channel.clone()).await;
                    let silent = connect(&address, &name, &ca, papers.clone()).await?;
                    Outcome::Ok((channel, silent, text))
                })
            })
            .collect::<Outcome<Vec<_>>>()
    };
    let (mut one, mut two, mut bobs) =
        (connect_all(&lab, &first)?, connect_all(&lab, &second)?, connect_all(&lab, &bob)?);
    for (_, _, text) in one.iter().chain(&two).chain(&bobs) {
        assert!(text.contains("nodes only"), "each is known: {text}");
    }
    let revoke = |lab: &Lab, what: String| {
        lab.nodes[2].run(move |c| async move { c.revoke_certificates(&what, "root").await })
    };
    // Unknown ones, and the one that a member works with.
    for what in ["nobody", "", "4f"] {
        let refused = revoke(&lab, what.to_owned())?;
        assert!(matches!(refused, Err(MembershipError::UnknownCertificate(_))), "{refused:?}");
    }
    let refused = revoke(&lab, own(&lab, 0)?.serial)?;
    let refused = refused.err().ok_or("a member was cut off")?.to_string();
    assert!(refused.contains("cert renew n1"), "{refused}");

    let revoked = revoke(&lab, serial.clone())??;
    assert_eq!(revoked.iter().map(|one| &one.serial).collect::<Vec<_>>(), [&serial]);
    client.block_on(async {
        for (channel, silent, _) in &mut one {
            assert!(hangs_up(silent).await, "an open connection was left to it");
            told(channel, "was revoked").await?;
        }
        // The same client's other certificate is good, and its connections are as they were.
        for (channel, _, _) in &two {
            assert!(answer(channel.clone()).await.1.contains("nodes only"));
        }
        Outcome::Ok(())
    })?;
    assert_eq!(revoke(&lab, "ann".to_owned())??.len(), 2);
    client.block_on(async {
        for (channel, silent, _) in &mut two {
            assert!(hangs_up(silent).await, "an open connection was left to it");
            told(channel, "was revoked").await?;
        }
        for (channel, _, _) in &mut bobs {
            assert!(answer(channel.clone()).await.1.contains("nodes only"));
        }
        Outcome::Ok(())
    })?;
    let listed = list(&lab, 0)?;
    assert!(listed.iter().filter(|one| one.name == "ann").all(|one| one.state == "revoked"));
    // It survives restarts.
    lab.nodes[1].stop();
    lab.nodes[1].start()?;
    let address = lab.nodes[1].config.api_address.clone();
    client.block_on(async {
        let channel = dial(&address, &ca, &name, Some(first))?;
        told(&channel, "was revoked").await
    })
}

#[test]
fn what_has_expired_is_forgotten_but_no_revocation() -> Outcome {
    let lab = Lab::with(1, |config| {
        short_lives(config);
        config.certificates.client = Duration::from_secs(4);
    })?;
    papers(&lab, "ann")?;
    papers(&lab, "bob")?;
    let revoke = |name: &'static str| {
        lab.nodes[0].run(move |c| async move { c.revoke_certificates(name, "root").await })
    };
    let revoked = revoke("ann")??;
    assert_eq!((revoked.len(), revoked[0].state.as_str()), (1, "revoked"));
    lab.wait("the other one's record is gone", |lab| {
        Ok(list(lab, 0)?.iter().all(|one| one.name != "bob"))
    })?;
    let listed = list(&lab, 0)?;
    let ann = listed.iter().find(|one| one.name == "ann").ok_or("it would be good again")?;
    assert_eq!(ann.state, "revoked");
    assert!(matches!(revoke("bob")?, Err(MembershipError::UnknownCertificate(_))));
    Ok(())
}

/// Whoever removed it lost its power between the two steps: out of Raft, and not recorded as removed.
#[test]
fn a_node_whose_removal_was_interrupted_is_let_in_no_more_and_the_next_removal_ends_it() -> Outcome
{
    let lab = Lab::new(3)?;
    let (leader, name) = (lab.leader()?, any(&lab)?);
    let goes = (leader + 1) % 3;
    let (id, called) = (lab.nodes[goes].cluster()?.node_id(), lab.nodes[goes].name.clone());
    let (papers, ca) = (node_papers(&lab, goes)?, ca(&lab)?);
    let remove = |called: String| {
        lab.nodes[leader].run(move |c| async move { c.remove_node(&called).await })
    };
    let before = lab.nodes[leader].run(|c| async move {
        c.range("status/", "", 0, cluster::Consistency::Linearizable).await
    })??;
    remove(called.clone())??;
    let record = RemovalRecord { name: called.clone(), state: RemovalState::Leaving };
    let record = serde_json::to_vec(&record)?;
    let node_record = before.kvs.into_iter().find(|kv| kv.key == keys::node(id));
    lab.nodes[leader].run(move |c| async move {
        let txn = Txn::new().put(keys::removal(id), record);
        c.txn(node_record.into_iter().fold(txn, |txn, kv| txn.put(kv.key, kv.value))).await
    })??;
    let client = tokio::runtime::Runtime::new()?;
    let channel = {
        let _inside = client.enter();
        dial(&lab.nodes[leader].config.api_address, &ca, &name, Some(papers))?
    };
    client.block_on(told(&channel, "no member any more"))?;
    remove(called)??;
    client.block_on(told(&channel, "was removed from the cluster"))?;
    Ok(())
}
