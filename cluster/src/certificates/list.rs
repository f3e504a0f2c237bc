//! What is shown of certificates, and of their states.

use std::collections::{BTreeMap, BTreeSet};

use proto::record::{CertificateHolder, CertificateRecord};
use proto::{NodeId, Revision, v1};

use super::{Known, all, record_of, removed, shown_since};
use crate::identity::{BACKDATE_S, Certificate, Trusted, dates, key_id};
use crate::membership::unix_now_s;
use crate::node::Node;
use crate::{Consistency, StoreError};

/// How a certificate's CA stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Issuer {
    /// It signs.
    Present,
    /// It is trusted until the end of its rotation.
    Trusted,
    /// It was replaced.
    Dropped,
}

fn issuer(record: &CertificateRecord, trusted: &Trusted) -> Issuer {
    let place = trusted.roots.iter().position(|ca| key_id(ca).as_ref() == Some(&record.authority));
    match place {
        Some(0) => Issuer::Present,
        Some(_) => Issuer::Trusted,
        None => Issuer::Dropped,
    }
}

/// How a certificate is shown. `replaced`: its node shows a later one. `removed`: its node is no
/// member.
fn state(
    record: &CertificateRecord,
    now_unix_s: u64,
    replaced: bool,
    removed: bool,
    issuer: Issuer,
) -> &'static str {
    let life_s = record.expires_unix_s.saturating_sub(record.issued_unix_s);
    let left_s = record.expires_unix_s.saturating_sub(now_unix_s);
    match record.holder {
        _ if record.revoked.is_some() || removed => "revoked",
        _ if left_s == 0 => "expired",
        _ if issuer == Issuer::Dropped => "untrusted",
        CertificateHolder::Node(_) if !record.in_use && replaced => "replaced",
        CertificateHolder::Node(_) if !record.in_use => "unused",
        _ if now_unix_s < record.issued_unix_s.saturating_sub(BACKDATE_S) => "future",
        _ if issuer == Issuer::Trusted => "replaced-ca",
        // A node asks for the next one with a third left.
        CertificateHolder::Node(_) if left_s < life_s / 4 => "expiring",
        CertificateHolder::Client(_) if left_s < life_s / 8 => "expiring",
        _ => "valid",
    }
}

/// All certificates: the CAs' first, then the nodes', then the clients', the newest of each first.
pub(crate) async fn list(node: &Node) -> Result<Vec<v1::Certificate>, StoreError> {
    let now_unix_s = unix_now_s();
    let mut known = all(node, Consistency::Linearizable).await?;
    known.sort_by(|a, b| {
        let order = |known: &Known| (known.record.holder.clone(), std::cmp::Reverse(known.created));
        order(a).cmp(&order(b))
    });
    let removed = removed(node).await?;
    let since = shown_since(&known);
    let mut shown = authorities(node, now_unix_s);
    shown.extend(known.iter().map(|one| show(node, one, now_unix_s, &since, &removed)));
    Ok(shown)
}

/// The clients that a certificate lets in now, as this node has applied the records.
pub(crate) async fn clients(node: &Node) -> Result<BTreeSet<String>, StoreError> {
    let (now_unix_s, trusted) = (unix_now_s(), node.trusted());
    let good =
        all(node, Consistency::Stale).await?.into_iter().filter_map(|Known { record, .. }| {
            let good = record.revoked.is_none() && record.expires_unix_s > now_unix_s;
            let good = good && issuer(&record, &trusted) != Issuer::Dropped;
            match record.holder {
                CertificateHolder::Client(name) if good => Some(name),
                CertificateHolder::Client(_) | CertificateHolder::Node(_) => None,
            }
        });
    Ok(good.collect())
}

/// The one that signs first.
fn authorities(node: &Node, now_unix_s: u64) -> Vec<v1::Certificate> {
    let trusted = node.trusted();
    // Once the other one signs, it is certified by the one before.
    let other = if trusted.cross.is_some() { "replaced-ca" } else { "next-ca" };
    let show = |(place, pem): (usize, &String)| {
        let (serial, issued_unix_s, expires_unix_s) = dates(pem)?;
        let state = match place {
            _ if expires_unix_s <= now_unix_s => "expired",
            0 => "valid",
            _ => other,
        };
        Some(v1::Certificate {
            kind: "ca".to_owned(),
            name: node.identity().cluster_name.clone(),
            serial,
            issued_unix_s,
            expires_unix_s,
            state: state.to_owned(),
            ..v1::Certificate::default()
        })
    };
    trusted.roots.iter().enumerate().filter_map(show).collect()
}

pub(super) fn show(
    node: &Node,
    known: &Known,
    now_unix_s: u64,
    since: &BTreeMap<NodeId, Revision>,
    removed: &BTreeMap<NodeId, String>,
) -> v1::Certificate {
    let Known { serial, record, .. } = known;
    let (kind, name, id) = match &record.holder {
        CertificateHolder::Client(name) => ("client", name.clone(), NodeId(0)),
        CertificateHolder::Node(id) => {
            let members = node.members();
            let member = members.into_iter().find(|member| member.node_id == *id);
            let name = member.map(|member| member.name).or_else(|| removed.get(id).cloned());
            ("node", name.unwrap_or_else(|| format!("node id {id}")), *id)
        }
    };
    let gone = removed.contains_key(&id);
    let replaced = since.get(&id).is_some_and(|since| known.created < *since);
    v1::Certificate {
        kind: kind.to_owned(),
        name,
        node_id: id.0,
        serial: serial.clone(),
        issued_unix_s: record.issued_unix_s,
        expires_unix_s: record.expires_unix_s,
        state: state(record, now_unix_s, replaced, gone, issuer(record, &node.trusted()))
            .to_owned(),
        trouble: record.trouble.clone().unwrap_or_default(),
    }
}

/// A node's own certificate as the list shows it.
pub(crate) fn shown_own(node: &Node, own: &Certificate) -> Option<v1::Certificate> {
    let record = CertificateRecord { in_use: true, ..record_of(own)? };
    let (created, revision) = (Revision(0), Revision(0));
    let known = Known { serial: own.serial.clone(), record, created, revision };
    Some(show(node, &known, unix_now_s(), &BTreeMap::new(), &BTreeMap::new()))
}

#[cfg(test)]
mod tests {
    use proto::record::Revocation;

    use super::super::tests::{NOW, known};
    use super::*;

    #[test]
    fn states_say_what_a_certificate_is_good_for() {
        let unused = known("aa", CertificateHolder::Node(NodeId(1)), NOW).record;
        let node = CertificateRecord { in_use: true, ..unused.clone() };
        let client = known("bb", CertificateHolder::Client("ann".to_owned()), NOW).record;
        let cases = [
            (state(&node, NOW, false, false, Issuer::Present), "valid"),
            (state(&node, NOW + 850, false, false, Issuer::Present), "valid"),
            (state(&node, NOW + 950, false, false, Issuer::Present), "expiring"),
            // While it changes from one to the other it may show either.
            (state(&node, NOW, true, false, Issuer::Present), "valid"),
            (state(&unused, NOW + 950, true, false, Issuer::Present), "replaced"),
            (state(&unused, NOW + 950, false, false, Issuer::Present), "unused"),
            (state(&node, NOW - 3601, false, false, Issuer::Present), "future"),
            (state(&node, NOW + 1200, false, false, Issuer::Present), "expired"),
            (state(&node, NOW, false, true, Issuer::Present), "revoked"),
            (state(&client, NOW + 1000, false, false, Issuer::Present), "valid"),
            (state(&client, NOW + 1100, false, false, Issuer::Present), "expiring"),
            (state(&client, NOW + 9999, false, false, Issuer::Present), "expired"),
            (state(&client, NOW, false, false, Issuer::Trusted), "replaced-ca"),
            (state(&unused, NOW, true, false, Issuer::Trusted), "replaced"),
            (state(&client, NOW, false, false, Issuer::Dropped), "untrusted"),
            (state(&client, NOW + 9999, false, false, Issuer::Dropped), "expired"),
        ];
        for (place, (shown, expected)) in cases.into_iter().enumerate() {
            assert_eq!(shown, expected, "case {place}");
        }
        let by = "root".to_owned();
        let revoked = Some(Revocation { at_unix_s: NOW, by });
        let revoked = CertificateRecord { revoked, ..client };
        assert_eq!(state(&revoked, NOW, false, false, Issuer::Dropped), "revoked");
    }
}
