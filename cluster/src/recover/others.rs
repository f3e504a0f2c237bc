//! Whether anybody else of a cluster is there, before its survivor is recovered.
//!
//! Gone is only who is silent: a connection that leads nowhere. One that is refused says that the
//! machine is on, without an agent: that is told to the person who decides. Whatever else comes is
//! somebody, whether or not this node's certificate is good there, or the other's here: a
//! certificate that has expired or was revoked says nothing of who lives.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use proto::NodeId;
use tokio::sync::watch;
use tokio::time::Instant;

use super::RecoverError;
use crate::consensus::{Peers, hello};
use crate::host::Host;
use crate::identity::Identity;
use crate::tls::{Credentials, Trust, member_client};
use crate::{ClusterConfig, Member, OpenError};

/// How long members may take to answer; one that is silent is tried again meanwhile.
const ANSWER: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(500);
/// Sooner, no neighbour was looked for.
const AT_ONCE: Duration = Duration::from_millis(500);

/// A member that is not known to be gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    /// Its name.
    pub name: String,
    /// The `host:port` at which it was asked.
    pub address: String,
    /// What was heard there.
    pub seen: String,
}

/// For a message.
pub(super) fn list(heard: &[Heard]) -> String {
    let one = |heard: &Heard| format!("{} ({}: {})", heard.name, heard.address, heard.seen);
    heard.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Asks every other member, voter or not: one that is up knows of a majority where there is one, or
/// goes on in the old cluster once its others are back. Gone is only who is silent: a connection
/// that is refused or leads nowhere. Whatever else comes is somebody, whether or not this node's
/// certificate is good there, or the other's here. Returns whose machine is on though no agent
/// listens there.
pub(super) async fn nobody_answers(
    config: &ClusterConfig,
    identity: &Identity,
    others: &[Member],
) -> Result<Vec<NodeId>, RecoverError> {
    let unusable = |error: &dyn std::fmt::Display| OpenError::Unusable {
        path: config.data_dir.clone(),
        detail: error.to_string(),
    };
    let own =
        Credentials::new(&identity.pair, &identity.trusted).map_err(|error| unusable(&error))?;
    let tls = member_client(&own).map_err(|error| unusable(&error))?;
    // Whoever answers is there, whatever became of its certificate.
    let (trust, cluster_id) = (Arc::new(Trust::default()), identity.record.cluster_id.clone());
    let peers = Peers::new(config.host.clone(), tls, trust, cluster_id);
    let removed = watch::channel(false).0;
    let asked = others.iter().map(|member| heard(config.host.as_ref(), &peers, member, &removed));
    let (mut heard, mut powered) = (Vec::new(), Vec::new());
    for (member, found) in others.iter().zip(futures::future::join_all(asked).await) {
        match found {
            Found::Nothing => {}
            Found::Refusal => powered.push(member.node_id),
            Found::Somebody(somebody) => heard.push(somebody),
        }
    }
    if *removed.borrow() {
        return Err(OpenError::Removed { path: config.data_dir.clone() }.into());
    }
    if heard.is_empty() { Ok(powered) } else { Err(RecoverError::Answers(heard)) }
}

/// What there is at a member's address.
enum Found {
    Nothing,
    /// A machine on which no agent listens.
    Refusal,
    Somebody(Heard),
}

async fn heard(
    host: &dyn Host,
    peers: &Peers,
    member: &Member,
    removed: &watch::Sender<bool>,
) -> Found {
    let address = &member.api_address;
    let seen = match reach(host, address).await {
        Reach::Silent => return Found::Nothing,
        Reach::Refused => return Found::Refusal,
        Reach::Unknown(error) => format!(
            "it cannot be asked: {error}; where there is no route, this node may be the one that is cut off; where a name is not found, put it into /etc/hosts"
        ),
        Reach::Listens => match peers.shared(member.node_id.0, address) {
            Some(channel) => said(channel, removed).await,
            None => "something listens there".to_owned(),
        },
    };
    Found::Somebody(Heard { name: member.name.clone(), address: address.clone(), seen })
}

/// In words, what is said at an address where something listens.
async fn said(channel: tonic::transport::Channel, removed: &watch::Sender<bool>) -> String {
    match tokio::time::timeout(2 * ANSWER, hello(channel, removed)).await {
        Ok(Ok(())) => "it answers".to_owned(),
        Ok(Err(why)) => format!("something listens there, and a greeting came to this: {why}"),
        Err(_) => "something listens there and says nothing".to_owned(),
    }
}

/// What comes of a connection to an address.
#[derive(Debug)]
enum Reach {
    /// Nobody is there.
    Silent,
    /// A machine is there, and nothing listens.
    Refused,
    /// It was taken.
    Listens,
    /// It could not be tried, or failed in a way that does not say that nobody is there.
    Unknown(io::Error),
}

impl Reach {
    fn weight(&self) -> u8 {
        match self {
            Self::Silent => 0,
            Self::Unknown(_) => 1,
            Self::Refused => 2,
            Self::Listens => 3,
        }
    }
}

/// Tries for a while: an agent that is just being restarted is there.
async fn reach(host: &dyn Host, address: &str) -> Reach {
    // By itself: that a name server is silent does not say that the member is.
    if address.parse::<SocketAddr>().is_err() {
        match tokio::time::timeout(ANSWER, tokio::net::lookup_host(address)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Reach::Unknown(error),
            Err(_) => return Reach::Unknown(io::Error::other("its name is not resolved in time")),
        }
    }
    let (until, mut best) = (Instant::now() + ANSWER, Reach::Silent);
    loop {
        let begun = Instant::now();
        let found = match tokio::time::timeout_at(until, host.dial(address)).await {
            Err(_) => Reach::Silent,
            Ok(Ok(_)) => Reach::Listens,
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Reach::Refused,
            Ok(Err(error)) if is_silence(&error, begun.elapsed()) => Reach::Silent,
            Ok(Err(error)) => Reach::Unknown(error),
        };
        // What says most counts: a machine that refused once is on.
        if found.weight() >= best.weight() {
            best = found;
        }
        if matches!(best, Reach::Listens) || Instant::now() + PAUSE >= until {
            return best;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Whether a connection failed, after so long, as it does where nobody is. Not where there is no
/// route: then nothing left this machine, and it is perhaps the one that is cut off. That a host is
/// unreachable takes its neighbours seconds to find (ARP); a router or a firewall says so at once.
fn is_silence(error: &io::Error, after: Duration) -> bool {
    match error.kind() {
        io::ErrorKind::TimedOut => true,
        io::ErrorKind::HostUnreachable => after >= AT_ONCE,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;
    use tonic::service::Routes;

    use super::*;
    use crate::identity::{Ca, Life, NodeIdentity, Pair, Trusted, request};
    use crate::tls::{Admit, incoming, member_server};

    type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

    const CLUSTER: &str = "c1";
    const YEAR_S: u64 = 365 * 24 * 3600;

    fn good() -> Life {
        Life::from_now(Duration::from_secs(3600))
    }

    fn expired() -> Life {
        Life { from_unix_s: good().from_unix_s - YEAR_S, lasts_s: 3600 }
    }

    fn not_yet_valid() -> Life {
        Life { from_unix_s: good().from_unix_s + YEAR_S, lasts_s: 3600 }
    }

    fn identity(ca: &Ca, node: u64, life: Life) -> Outcome<Identity> {
        let (key, csr) = request()?;
        Ok(Identity {
            pair: Pair::new(&key, &ca.sign_node(CLUSTER, NodeId(node), &csr, life)?),
            previous: None,
            trusted: Trusted::only(&ca.certificate_pem),
            record: NodeIdentity {
                cluster_id: CLUSTER.to_owned(),
                cluster_name: "test".to_owned(),
                node_id: NodeId(node),
                node_name: format!("n{node}"),
            },
        })
    }

    fn member(node: u64, address: impl Into<String>) -> Member {
        Member {
            node_id: NodeId(node),
            name: format!("n{node}"),
            api_address: address.into(),
            enrol_address: String::new(),
            voter: true,
            zone: String::new(),
            witness: false,
        }
    }

    async fn listener() -> Outcome<(TcpListener, String)> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        Ok((listener, address))
    }

    /// Listens as an agent does; that no service is behind it is an answer as well.
    async fn agent(identity: &Identity) -> Outcome<String> {
        let (listener, address) = listener().await?;
        let credentials = Credentials::new(&identity.pair, &identity.trusted)?;
        let admit = Admit::Members(CLUSTER.to_owned(), Arc::new(Trust::default()));
        let connections = incoming(listener, member_server(&credentials)?, admit);
        let server = tonic::transport::Server::builder().add_routes(Routes::default());
        tokio::spawn(server.serve_with_incoming(connections));
        Ok(address)
    }

    async fn ask(own: &Identity, others: &[Member]) -> Outcome<Vec<Heard>> {
        let folder = tempfile::tempdir()?;
        let address = || "127.0.0.1:1".to_owned();
        let config = ClusterConfig::new(folder.path().to_owned(), address(), address());
        match nobody_answers(&config, own, others).await {
            Ok(powered) => {
                let refusing: Vec<NodeId> = others.iter().map(|member| member.node_id).collect();
                assert_eq!(powered, refusing, "a port of this machine is refused");
                Ok(Vec::new())
            }
            Err(RecoverError::Answers(heard)) => Ok(heard),
            Err(other) => Err(other.into()),
        }
    }
    fn names(heard: &[Heard]) -> Vec<&str> {
        heard.iter().map(|heard| heard.name.as_str()).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn whoever_takes_a_connection_is_there_whatever_its_certificate_says() -> Outcome {
        let (ca, another) = (Ca::make(CLUSTER)?, Ca::make(CLUSTER)?);
        let own = identity(&ca, 9, good())?;
        let (_hung, hung) = listener().await?;
        let (hangs_up, deaf) = listener().await?;
        tokio::spawn(async move { while hangs_up.accept().await.is_ok() {} });
        let (gone, nobody) = listener().await?;
        drop(gone);
        let others = [
            member(1, agent(&identity(&ca, 1, good())?).await?),
            member(2, agent(&identity(&ca, 2, expired())?).await?),
            member(3, agent(&identity(&ca, 3, not_yet_valid())?).await?),
            member(4, agent(&identity(&another, 4, good())?).await?),
            // At an address that another node has now.
            member(5, agent(&identity(&ca, 6, good())?).await?),
            member(6, hung),
            member(7, deaf),
            member(8, nobody),
        ];
        let heard = ask(&own, &others).await?;
        assert_eq!(names(&heard), ["n1", "n2", "n3", "n4", "n5", "n6", "n7"], "{heard:?}");
        for (place, words) in [(1, "xpired"), (2, "alid"), (3, "invalid peer certificate")] {
            assert!(heard[place].seen.contains(words), "{:?}", heard[place]);
        }
        let text = RecoverError::Answers(heard).to_string();
        for words in ["n2 (127.0.0.1:", "Nothing was changed", "power their machines off"] {
            assert!(text.contains(words), "{words}: {text}");
        }
        // This node's own certificate may be as old as it likes, too.
        let heard = ask(&identity(&ca, 9, expired())?, &others[..1]).await?;
        assert_eq!(names(&heard), ["n1"], "{heard:?}");
        assert_eq!(ask(&own, &others[7..]).await?, [], "nobody listens there");
        Ok(())
    }

    #[tokio::test]
    async fn who_cannot_be_asked_is_not_gone() -> Outcome {
        let own = identity(&Ca::make(CLUSTER)?, 9, good())?;
        let heard = ask(&own, &[member(1, "no-port")]).await?;
        assert!(heard[0].seen.contains("cannot be asked"), "{heard:?}");
        assert!(heard[0].seen.contains("/etc/hosts"), "{heard:?}");
        Ok(())
    }

    #[test]
    fn only_connections_that_lead_nowhere_are_silence() {
        use io::ErrorKind;
        let of = |kind: ErrorKind| is_silence(&kind.into(), Duration::from_secs(1));
        assert!([ErrorKind::HostUnreachable, ErrorKind::TimedOut].into_iter().all(of));
        let at_once = is_silence(&ErrorKind::HostUnreachable.into(), Duration::from_millis(1));
        assert!(!at_once, "a router or a firewall said it");
        // Somebody there ended it; or it never left this machine.
        let doubt = [
            ErrorKind::ConnectionReset,
            ErrorKind::ConnectionAborted,
            ErrorKind::NetworkDown,
            ErrorKind::NetworkUnreachable,
            ErrorKind::AddrNotAvailable,
            ErrorKind::PermissionDenied,
            ErrorKind::Other,
        ];
        assert!(!doubt.into_iter().any(of));
    }
}
