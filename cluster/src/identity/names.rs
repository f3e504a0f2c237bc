//! How holders are named in certificates.

use proto::NodeId;
use rustls_pki_types::ServerName;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::tls::PeerIdentity;

const SCHEME: &str = "holdfast://";

/// The URI of a node.
pub(crate) fn node_uri(cluster_id: &str, node: NodeId) -> String {
    format!("{SCHEME}{cluster_id}/node/{node}")
}

/// The URI of a client.
pub(crate) fn client_uri(cluster_id: &str, name: &str) -> String {
    format!("{SCHEME}{cluster_id}/client/{name}")
}

/// The DNS name of one node.
pub(crate) fn node_dns(cluster_id: &str, node: NodeId) -> String {
    format!("node-{node}.{cluster_id}.holdfast")
}

/// The DNS name that every node of the cluster answers to.
pub(crate) fn cluster_dns(cluster_id: &str) -> String {
    format!("{cluster_id}.holdfast")
}

/// [`node_dns`] as a TLS server name.
pub(crate) fn node_host(cluster_id: &str, node: NodeId) -> Option<ServerName<'static>> {
    ServerName::try_from(node_dns(cluster_id, node)).ok()
}

/// [`cluster_dns`] as a TLS server name.
pub(crate) fn any_node(cluster_id: &str) -> Option<ServerName<'static>> {
    ServerName::try_from(cluster_dns(cluster_id)).ok()
}

/// The cluster id and holder that a certificate names, if it names exactly one.
/// The certificate's signature is not looked at: TLS has verified it.
pub(crate) fn subject_of(der: &[u8]) -> Option<(String, PeerIdentity)> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let mut found = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => parse_uri(uri),
        _ => None,
    });
    let subject = found.next()?;
    found.next().is_none().then_some(subject)
}

fn parse_uri(uri: &str) -> Option<(String, PeerIdentity)> {
    let mut parts = uri.strip_prefix(SCHEME)?.splitn(3, '/');
    let cluster_id = parts.next().filter(|id| !id.is_empty())?;
    let identity = match (parts.next()?, parts.next()?) {
        ("node", id) => PeerIdentity::Node(NodeId(id.parse().ok()?)),
        ("client", name) if !name.is_empty() => PeerIdentity::Client(name.to_owned()),
        _ => return None,
    };
    Some((cluster_id.to_owned(), identity))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_name_one_holder() {
        assert_eq!(
            parse_uri(&node_uri("c1", NodeId(7))),
            Some(("c1".to_owned(), PeerIdentity::Node(NodeId(7))))
        );
        assert_eq!(
            parse_uri(&client_uri("c1", "ann")),
            Some(("c1".to_owned(), PeerIdentity::Client("ann".to_owned())))
        );
        for bad in [
            "",
            "http://c1/node/1",
            "holdfast://c1/node/x",
            "holdfast:///node/1",
            "holdfast://c1/client/",
        ] {
            assert_eq!(parse_uri(bad), None, "{bad}");
        }
    }
}
