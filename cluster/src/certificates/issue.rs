//! Signing: for a node the leader does it, and judges the request first; for a client any member.

use std::collections::BTreeSet;

use proto::record::{CertificateHolder, CertificateRecord, RemovalRecord, RemovalState};
use proto::v1::RenewRequest;
use proto::{NodeId, Revision, keys};
use tonic::Status;

use super::{ATTEMPTS, Known, all, not_signed, recorded};
use crate::authority::{self, CaRecord};
use crate::consensus::{REMOVED, lead};
use crate::identity::{Life, check_renewal, request_key_hash};
use crate::membership::{from_json, unix_now_s};
use crate::node::Node;
use crate::{Consistency, MembershipError, Txn};

/// How far the clock of a node that renews may be off the leader's, seconds. Also how old a request
/// may be.
const CLOCK_MAX_S: u64 = 300;

/// Good certificates that a client's name may have.
const LIVE_MAX: usize = 256;

/// What the leader knows as it judges a request.
#[derive(Debug)]
struct Facts<'a> {
    cluster_id: &'a str,
    now_unix_s: u64,
    member: bool,
    removed: bool,
    /// SHA-256 of each key that has a certificate.
    keys: BTreeSet<&'a str>,
}

/// Whether a node gets its next certificate.
fn judge(request: &RenewRequest, facts: &Facts<'_>) -> Result<(), Status> {
    let id = NodeId(request.node_id);
    if facts.removed {
        return Err(Status::permission_denied(REMOVED));
    }
    if !facts.member {
        return Err(Status::permission_denied(format!("node {id} is no member of this cluster")));
    }
    let off_s = request.now_unix_s.abs_diff(facts.now_unix_s);
    if off_s > CLOCK_MAX_S {
        return Err(Status::failed_precondition(format!(
            "the request was made {off_s} s from now by the leader's clock, at most {CLOCK_MAX_S} s are allowed: set node {id}'s clock, or the leader's (`timedatectl set-ntp true`)"
        )));
    }
    check_renewal(facts.cluster_id, id, &request.csr_pem).map_err(|error| not_signed(&error))?;
    let key_hash = request_key_hash(&request.csr_pem).map_err(|error| not_signed(&error))?;
    if facts.keys.contains(key_hash.as_str()) {
        return Err(Status::already_exists(
            "there is a certificate on this key already: this request was made before; a renewal brings a new key",
        ));
    }
    Ok(())
}

/// Signs a node's next certificate, if this node leads. PEM. Nobody shows it yet: whether its node
/// ever does, it says itself.
pub(crate) async fn issue_next(node: &Node, request: &RenewRequest) -> Result<String, Status> {
    let metrics = node.metrics();
    if !lead::leads(&metrics) {
        return Err(Status::unavailable("this node does not lead: ask the one that does"));
    }
    // Two requests on one key do not pass each other.
    let _one = node.issuing().await;
    let id = NodeId(request.node_id);
    let removal = keys::removal(id);
    let (leaving, _) = node.get(&removal, Consistency::Linearizable).await?;
    let removed = match &leaving {
        Some(kv) => from_json::<RemovalRecord>(kv)?.state == RemovalState::Removed,
        None => false,
    };
    let known = all(node, Consistency::Stale).await?;
    let cluster_id = &node.identity().cluster_id;
    let facts = Facts {
        cluster_id,
        now_unix_s: unix_now_s(),
        member: node.members().iter().any(|member| member.node_id == id),
        removed,
        keys: known.iter().map(|known| known.record.key_hash.as_str()).collect(),
    };
    judge(request, &facts).inspect_err(|status| {
        tracing::warn!(node = %id, why = status.message(), "it gets no new certificate");
    })?;
    let life = Life::from_now(node.config().certificates.node);
    let signer = authority::signer(node).await?;
    let signed = signer
        .ca
        .sign_node(cluster_id, id, &request.csr_pem, life)
        .map_err(|error| not_signed(&error))?;
    let still = leaving.map_or(Revision(0), |kv| kv.mod_revision);
    let txn = signer.unchanged(Txn::new().by("system").if_revision(removal, still));
    if node.txn(recorded(txn, &signed)?).await?.committed() {
        return Ok(signed);
    }
    Err(Status::aborted("the node is being removed, or the CA rotated; ask again"))
}

/// Signs a client's certificate. PEM; and the CA's record that it was signed by. `caller`: the serial
/// number of the certificate that a client asks with, which must count at that very moment.
pub(crate) async fn issue_client(
    node: &Node,
    name: &str,
    csr_pem: &str,
    caller: Option<&str>,
) -> Result<(String, CaRecord), MembershipError> {
    let known = all(node, Consistency::Linearizable).await?;
    check_number(&known, name, unix_now_s())?;
    for _ in 0..ATTEMPTS {
        let signer = authority::signer(node).await?;
        let mut txn = signer.unchanged(Txn::new());
        if let Some(serial) = caller {
            // A revocation that comes before this, by however little, makes it come to nothing.
            let key = keys::certificate(serial);
            txn = txn.if_revision(key.clone(), unrevoked(node, &key).await?);
        }
        let life = Life::from_now(node.config().certificates.client);
        let signed = signer
            .ca
            .sign_client(&node.identity().cluster_id, name, csr_pem, life)
            .map_err(|error| MembershipError::Invalid(error.to_string()))?;
        // Not where the CA was rotated meanwhile.
        if node.txn(recorded(txn, &signed)?).await?.committed() {
            return Ok((signed, signer.record));
        }
    }
    let why = "the cluster's CA is being rotated; ask again";
    Err(MembershipError::Invalid(why.to_owned()))
}

/// Refuses a name more certificates than it may have; by a few more where several are made at once.
fn check_number(known: &[Known], name: &str, now_unix_s: u64) -> Result<(), MembershipError> {
    let of = CertificateHolder::Client(name.to_owned());
    let live = known.iter().filter(|Known { record, .. }| {
        record.holder == of && record.revoked.is_none() && record.expires_unix_s > now_unix_s
    });
    if live.count() < LIVE_MAX {
        return Ok(());
    }
    Err(MembershipError::Invalid(format!(
        "`{name}` has {LIVE_MAX} certificates that are good, as many as a name may have: revoke what nobody uses (`clusterctl cluster cert list`, then `clusterctl cluster cert revoke SERIAL`, or `revoke {name}` for all of them)"
    )))
}

/// The revision of the record of a certificate that counts.
async fn unrevoked(node: &Node, key: &str) -> Result<Revision, MembershipError> {
    if let Some(kv) = node.get(key, Consistency::Linearizable).await?.0 {
        let record: CertificateRecord = from_json(&kv)?;
        if record.revoked.is_none() {
            return Ok(kv.mod_revision);
        }
    }
    Err(MembershipError::Invalid("the certificate that asks for it was revoked".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{NOW, known};
    use super::*;
    use crate::identity::renewal_request;

    fn facts() -> Facts<'static> {
        Facts {
            cluster_id: "c1",
            now_unix_s: NOW,
            member: true,
            removed: false,
            keys: BTreeSet::new(),
        }
    }

    fn refusal(request: &RenewRequest, facts: &Facts<'_>) -> (tonic::Code, String) {
        let status = judge(request, facts).expect_err("it was honoured");
        (status.code(), status.message().to_owned())
    }

    #[test]
    fn a_name_has_so_many_good_certificates_and_no_more() {
        let of = |name: &str| known("aa", CertificateHolder::Client(name.to_owned()), NOW);
        let mut all = vec![of("ann"); LIVE_MAX - 1];
        all.extend(vec![of("bob"); LIVE_MAX]);
        check_number(&all, "ann", NOW).unwrap();
        all.push(of("ann"));
        let refused = check_number(&all, "ann", NOW).unwrap_err().to_string();
        assert!(refused.contains("`ann` has 256") && refused.contains("cert revoke"), "{refused}");
        check_number(&all, "eve", NOW).unwrap();
        // What is over, or revoked, is none of them.
        check_number(&all, "ann", NOW + 1200).unwrap();
        let by = "root".to_owned();
        all[0].record.revoked = Some(proto::record::Revocation { at_unix_s: NOW, by });
        check_number(&all, "ann", NOW).unwrap();
    }

    #[test]
    fn a_renewal_is_honoured_once_in_time_and_for_a_member_only() {
        let csr_pem = renewal_request("c1", NodeId(3)).unwrap().1;
        let good = RenewRequest { node_id: 3, csr_pem, now_unix_s: NOW - 60 };
        judge(&good, &facts()).unwrap();
        judge(&RenewRequest { now_unix_s: NOW + 60, ..good.clone() }, &facts()).unwrap();

        let hash = request_key_hash(&good.csr_pem).unwrap();
        let replayed = Facts { keys: [hash.as_str()].into(), ..facts() };
        let (code, text) = refusal(&good, &replayed);
        assert!(code == tonic::Code::AlreadyExists && text.contains("made before"), "{text}");
        for now_unix_s in [NOW - 301, NOW + 301, 0, u64::MAX] {
            let (code, text) = refusal(&RenewRequest { now_unix_s, ..good.clone() }, &facts());
            assert!(code == tonic::Code::FailedPrecondition && text.contains("clock"), "{text}");
        }
        let (code, text) = refusal(&good, &Facts { removed: true, ..facts() });
        assert!(code == tonic::Code::PermissionDenied && text == REMOVED, "{text}");
        let (code, text) = refusal(&good, &Facts { member: false, ..facts() });
        assert!(code == tonic::Code::PermissionDenied && text.contains("no member"), "{text}");
        let others = RenewRequest { node_id: 4, ..good.clone() };
        let (code, text) = refusal(&others, &facts());
        assert!(code == tonic::Code::InvalidArgument && text.contains("/node/3"), "{text}");
        let (code, _) = refusal(&good, &Facts { cluster_id: "c2", ..facts() });
        assert_eq!(code, tonic::Code::InvalidArgument);
        for csr_pem in ["", "garbage", &good.csr_pem[..100], &"A".repeat(1 << 20)] {
            let garbage = RenewRequest { csr_pem: csr_pem.to_owned(), ..good.clone() };
            let (code, text) = refusal(&garbage, &facts());
            assert!(code == tonic::Code::InvalidArgument && text.len() < 1000, "{text}");
        }
    }
}
