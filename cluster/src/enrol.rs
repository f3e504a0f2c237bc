//! The joining node's side: find a member, make sure it is of the token's cluster, ask to be let in.

use std::path::Path;
use std::sync::Arc;

use proto::v1::enrolment_client::EnrolmentClient;
use proto::v1::{EnrolRequest, EnrolResponse};
use proto::{Name, NodeId};
use tonic::Code;

use crate::host::Host;
use crate::identity::token::Token;
use crate::identity::{
    Identity, NodeIdentity, Pair, SealingKey, Trusted, any_node, fingerprint, request, request_for,
    write_private,
};
use crate::membership::unix_now_s;
use crate::tls::{channel, connect, enrol_client};
use crate::{ClusterConfig, JoinError};

/// Holds this node's key until it is a member, so that a repeated attempt is the same node's.
pub(crate) const KEY: &str = "joining.key";

/// Gets this node an identity, and the key that seals the CA's.
pub(crate) async fn enrol(
    config: &ClusterConfig,
    token: &str,
    name: &Name,
) -> Result<(Identity, SealingKey), JoinError> {
    let token = Token::decode(token).map_err(JoinError::Malformed)?;
    let (key_pem, csr_pem) = key(&config.data_dir)?;
    let (mut tried, mut wrong) = (Vec::new(), None);
    for address in &token.addresses {
        let request = EnrolRequest {
            token_id: token.id.clone(),
            token_secret: token.secret.clone(),
            node_name: name.to_string(),
            csr_pem: csr_pem.clone(),
            api_address: config.api_address.clone(),
            enrol_address: config.enrol_address.clone(),
            now_unix_s: unix_now_s(),
            zone: config.zone.clone(),
            witness: config.witness,
        };
        match ask(&config.host, &token, address, request).await {
            Ok(answer) => return identity(&token, name, &key_pem, answer),
            Err(Failed::Here(why)) => tried.push(format!("{address}: {why}")),
            // While the CA is replaced, one member shows a new certificate sooner than another.
            Err(Failed::Everywhere(error @ JoinError::WrongCluster { .. })) => {
                wrong.get_or_insert(error);
            }
            Err(Failed::Everywhere(error)) => return Err(error),
        }
    }
    Err(wrong.unwrap_or(JoinError::Unreachable(tried)))
}

enum Failed {
    /// Another member may still do it.
    Here(String),
    /// No member will.
    Everywhere(JoinError),
}

async fn ask(
    host: &Arc<dyn Host>,
    token: &Token,
    address: &str,
    request: EnrolRequest,
) -> Result<EnrolResponse, Failed> {
    let malformed =
        || Failed::Everywhere(JoinError::Malformed("its cluster id is not valid".into()));
    let expect = any_node(&token.cluster_id).ok_or_else(malformed)?;
    let tls = enrol_client(&token.ca_fingerprint)
        .map_err(|error| Failed::Everywhere(JoinError::Identity(error.to_string())))?;
    // Once by hand first: gRPC's own error does not tell a wrong CA from a closed port.
    if let Err(error) = connect(host.as_ref(), tls.clone(), address, expect.clone()).await {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        return Err(not_connected(address, tls).unwrap_or(Failed::Here(error.to_string())));
    }
    let there = address.to_owned();
    let channel = channel(host.clone(), tls, None, move || there.clone(), expect);
    let mut client = EnrolmentClient::new(channel);
    match client.enrol(request).await {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) => Err(match status.code() {
            Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Unknown
            | Code::Cancelled
            | Code::ResourceExhausted => Failed::Here(status.message().to_owned()),
            _ => Failed::Everywhere(JoinError::Refused(status.message().to_owned())),
        }),
    }
}

/// What a certificate says that was not accepted, if that is why.
fn not_connected(address: &str, error: Option<&rustls::Error>) -> Option<Failed> {
    use rustls::CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    let rustls::Error::InvalidCertificate(why) = error? else { return None };
    Some(match why {
        Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. } => {
            Failed::Here(format!(
                "its certificate is not good at this node's time ({why}): set the clock that is wrong (`timedatectl set-ntp true`)"
            ))
        }
        _ => Failed::Everywhere(JoinError::WrongCluster { address: address.to_owned() }),
    })
}

fn identity(
    token: &Token,
    name: &Name,
    key_pem: &str,
    answer: EnrolResponse,
) -> Result<(Identity, SealingKey), JoinError> {
    let revision = answer.ca_revision;
    let trusted = Trusted { revision, ..Trusted::parse(&answer.ca_pem) };
    let pinned = |root: &String| fingerprint(root).as_ref() == Some(&token.ca_fingerprint);
    let same_ca = trusted.roots.iter().any(pinned);
    if !same_ca || answer.cluster_id != token.cluster_id {
        return Err(JoinError::Identity("the answer does not fit the token".to_owned()));
    }
    let unreadable = || JoinError::Identity("the answer holds no sealing key".to_owned());
    let sealing_key = SealingKey::from_bytes(&answer.sealing_key).ok_or_else(unreadable)?;
    let identity = Identity {
        record: NodeIdentity {
            cluster_id: answer.cluster_id,
            cluster_name: answer.cluster_name,
            node_id: NodeId(answer.node_id),
            node_name: name.to_string(),
        },
        pair: Pair::new(key_pem, &answer.certificate_pem),
        previous: None,
        trusted,
    };
    Ok((identity, sealing_key))
}

/// This node's key and a request on it; the key of an earlier attempt where there is one.
fn key(folder: &Path) -> Result<(String, String), JoinError> {
    let path = folder.join(KEY);
    let failed = |error: &dyn std::fmt::Display| JoinError::Identity(error.to_string());
    if let Ok(key) = std::fs::read_to_string(&path)
        && let Ok(csr) = request_for(&key)
    {
        return Ok((key, csr));
    }
    let (key, csr) = request().map_err(|error| failed(&error))?;
    write_private(&path, key.as_bytes()).map_err(|error| failed(&error))?;
    Ok((key, csr))
}

/// The node is a member: its key is kept with its identity now.
pub(crate) fn forget_key(folder: &Path) {
    if let Err(error) = std::fs::remove_file(folder.join(KEY))
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(%error, "{KEY} could not be removed");
    }
}
