//! Who is who: the cluster's certificate authority, certificates of nodes and clients, join tokens,
//! and the files that hold this node's own identity and the key that seals the CA's.
//!
//! A certificate names its holder in a URI (`holdfast://CLUSTER/node/ID` or
//! `holdfast://CLUSTER/client/NAME`). A node's also carries two DNS names, so that an ordinary TLS
//! client can verify it: `node-ID.CLUSTER.holdfast` (this very node) and `CLUSTER.holdfast` (any
//! node of the cluster).

mod ca;
mod certificate;
mod files;
mod names;
mod seal;
pub(crate) mod token;
mod trusted;

pub(crate) use ca::BACKDATE_S;
pub(crate) use ca::{
    Ca, Life, SignError, check_renewal, fingerprint, fingerprint_der, key_id, renewal_request,
    request, request_for, request_key_hash,
};
pub(crate) use certificate::{Certificate, Standing, dates};
pub(crate) use files::{CA_FILE, Identity, NodeIdentity, Pair, store_trusted, write_private};
pub(crate) use names::{any_node, node_host, subject_of};
pub(crate) use seal::{SEALING_KEY, SealError, SealedCa, SealingKey};
pub(crate) use trusted::Trusted;
