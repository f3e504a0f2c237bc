//! Revocation: written into the records; each member follows them (`node/denied.rs`).

use proto::record::{CertificateHolder, Revocation};
use proto::{keys, v1};

use super::list::show;
use super::{ATTEMPTS, Known, all, removed, shown_since};
use crate::membership::{to_json, unix_now_s};
use crate::node::Node;
use crate::{Consistency, MembershipError, Txn};

/// Fewer characters of a serial number could be those of several.
const SERIAL_MIN: usize = 8;

/// The certificates that are meant: all of a client, or the one with this serial number.
fn meant<'a>(known: &'a [Known], wanted: &str) -> Vec<&'a Known> {
    let serial = wanted.to_ascii_lowercase();
    let by_serial: Vec<_> = known
        .iter()
        .filter(|known| serial.len() >= SERIAL_MIN && known.serial.starts_with(&serial))
        .collect();
    if by_serial.len() == 1 {
        return by_serial;
    }
    let of = CertificateHolder::Client(wanted.to_owned());
    known.iter().filter(|known| known.record.holder == of).collect()
}

/// Has a client's certificates, or one by its serial number, count no more, everywhere at once.
pub(crate) async fn revoke(
    node: &Node,
    wanted: &str,
    by: &str,
) -> Result<Vec<v1::Certificate>, MembershipError> {
    for _ in 0..ATTEMPTS {
        let known = all(node, Consistency::Linearizable).await?;
        let (now_unix_s, since) = (unix_now_s(), shown_since(&known));
        // Those that have expired as well: by this node's clock they might only seem to.
        let chosen = meant(&known, wanted);
        if chosen.is_empty() {
            return Err(MembershipError::UnknownCertificate(wanted.to_owned()));
        }
        let removed = removed(node).await?;
        let (mut txn, mut shown) = (Txn::new().by(by), Vec::new());
        for one in chosen {
            let mut one = one.clone();
            check_revocable(node, &one)?;
            if one.record.revoked.is_none() {
                let key = keys::certificate(&one.serial);
                let by = by.to_owned();
                one.record.revoked = Some(Revocation { at_unix_s: now_unix_s, by });
                txn = txn.if_revision(key.clone(), one.revision).put(key, to_json(&one.record)?);
            }
            shown.push(show(node, &one, now_unix_s, &since, &removed));
        }
        if txn.is_empty() || node.txn(txn).await?.committed() {
            return Ok(shown);
        }
    }
    Err(MembershipError::Invalid("its records are being changed by others; try again".to_owned()))
}

/// What a member works with is replaced first: without it the node would be out of the cluster. That
/// it begins to work with it changes the record, so this transaction comes to nothing.
fn check_revocable(node: &Node, known: &Known) -> Result<(), MembershipError> {
    let CertificateHolder::Node(id) = known.record.holder else { return Ok(()) };
    let member = node.members().into_iter().find(|member| member.node_id == id);
    match member {
        Some(member) if known.record.in_use => Err(MembershipError::Invalid(format!(
            "node `{name}` works with this certificate; have it get another one first (`clusterctl cluster cert renew {name}`), or remove the node",
            name = member.name
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proto::NodeId;

    use super::super::tests::{NOW, known};
    use super::*;

    #[test]
    fn a_name_means_all_of_a_client_and_a_serial_number_one_certificate() {
        let ann = || CertificateHolder::Client("ann".to_owned());
        let all = [
            known("4aaaaaaaaaaaaaaa", ann(), NOW),
            known("4aaaaaaabbbbbbbb", ann(), NOW),
            known("4ccccccccccccccc", CertificateHolder::Node(NodeId(1)), NOW),
            known("4ddddddddddddddd", CertificateHolder::Node(NodeId(1)), NOW + 1),
        ];
        let count = |wanted: &str| meant(&all, wanted).len();
        assert_eq!(count("ann"), 2);
        assert_eq!(count("4AAAAAAABBBBBBBB"), 1);
        assert_eq!(count("4ccccccc"), 1);
        // Too short, ambiguous, unknown.
        for nothing in ["4ccc", "4aaaaaaa", "", "bob", "node 1"] {
            assert_eq!(count(nothing), 0, "{nothing}");
        }
    }
}
