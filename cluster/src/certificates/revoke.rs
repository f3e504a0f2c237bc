//! Revocation: written into the records; each member follows them (`node/denied.rs`).

use std::collections::BTreeSet;

use proto::documents::{Role, roles};
use proto::record::{AdministrationRecord, CertificateHolder, CertificateRecord, Revocation};
use proto::{Name, Revision, keys, v1};

use super::list::show;
use super::{Known, all, removed, shown_since};
use crate::identity::key_id;
use crate::membership::{to_json, unix_now_s};
use crate::node::Node;
use crate::{Consistency, MembershipError, StoreError, Txn};

/// Fewer characters of a serial number could be those of several.
const SERIAL_MIN: usize = 8;
/// Certificates that one transaction revokes: far from what one may hold.
const PART_MAX: usize = 500;
/// Transactions of one revocation.
const PARTS_MAX: usize = 64;

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

/// Has a client's certificates, or one by its serial number, count no more, everywhere at once. Many
/// are revoked in parts; afterwards it is looked again, until none is left: one may have been made
/// meanwhile.
pub(crate) async fn revoke(
    node: &Node,
    wanted: &str,
    by: &str,
) -> Result<Vec<v1::Certificate>, MembershipError> {
    for _ in 0..PARTS_MAX {
        let known = all(node, Consistency::Linearizable).await?;
        let (now_unix_s, since) = (unix_now_s(), shown_since(&known));
        // Those that have expired as well: by this node's clock they might only seem to.
        let chosen = meant(&known, wanted);
        if chosen.is_empty() {
            return Err(MembershipError::UnknownCertificate(wanted.to_owned()));
        }
        let removed = removed(node).await?;
        let administration = Administration::read(node).await?;
        administration.without(&known, &chosen, now_unix_s)?;
        chosen.iter().try_for_each(|one| check_revocable(node, one))?;
        let left = chosen.iter().filter(|one| one.record.revoked.is_none()).take(PART_MAX);
        let mut txn = Txn::new().by(by);
        for one in left {
            let revoked = Some(Revocation { at_unix_s: now_unix_s, by: by.to_owned() });
            let record = CertificateRecord { revoked, ..one.record.clone() };
            let key = keys::certificate(&one.serial);
            txn = txn.if_revision(key.clone(), one.revision).put(key, to_json(&record)?);
        }
        if txn.is_empty() {
            let shown = |one: &&Known| show(node, one, now_unix_s, &since, &removed);
            return Ok(chosen.iter().map(shown).collect());
        }
        // Where somebody was faster, it is looked at again as well. The record is written in any case:
        // what a client asks for rests on it, and a member that has not heard of this yet may ask for
        // the client.
        node.txn(administration.compared(txn)?).await?;
    }
    Err(MembershipError::Invalid(format!(
        "`{wanted}` has certificates left: others change them, or make new ones, all the time; try again"
    )))
}

/// Who administers by the documents under `access/`, and the revision of the record that every change
/// of that compares and writes.
#[derive(Debug)]
pub(crate) struct Administration {
    administrators: BTreeSet<Name>,
    /// The CAs whose certificates let somebody in, by the identifiers of their keys.
    authorities: BTreeSet<String>,
    revision: Revision,
}

impl Administration {
    pub(crate) async fn read(node: &Node) -> Result<Self, StoreError> {
        // Before the documents: a change between the two reads makes the transaction come to nothing.
        let (record, _) = node.get(keys::ADMINISTRATION, Consistency::Linearizable).await?;
        let files = node.range(keys::ACCESS, "", 0, Consistency::Stale, false).await?.kvs;
        let roles = roles(files.iter().map(|kv| (kv.key.as_str(), kv.value.as_slice())));
        let administrators = roles.into_iter().filter(|(_, role)| *role == Some(Role::Admin));
        Ok(Self {
            administrators: administrators.map(|(name, _)| name).collect(),
            authorities: node.trusted().roots.iter().filter_map(|ca| key_id(ca)).collect(),
            revision: record.map_or(Revision(0), |kv| kv.mod_revision),
        })
    }

    /// An error where the last certificate that they have would go; what is over, by this node's
    /// clock, or of a CA that was dropped lets nobody in.
    fn without(
        &self,
        known: &[Known],
        chosen: &[&Known],
        now_unix_s: u64,
    ) -> Result<(), MembershipError> {
        let goes = |of: &Known| chosen.iter().any(|chosen| chosen.serial == of.serial);
        let good = || self.good(known, now_unix_s);
        match good().find(|(of, _)| goes(of)) {
            Some((_, lost)) if !good().any(|(of, _)| !goes(of)) => {
                Err(MembershipError::LastAdministrator(lost.to_string()))
            }
            _ => Ok(()),
        }
    }

    /// An error where certificates of all CAs but one would count no more, and none of an
    /// administrator is of that one.
    pub(crate) fn with_only(
        &self,
        authority: &str,
        known: &[Known],
        now_unix_s: u64,
    ) -> Result<(), MembershipError> {
        let good = || self.good(known, now_unix_s);
        if good().any(|(of, _)| of.record.authority == authority) {
            return Ok(());
        }
        let lost: BTreeSet<String> = good().map(|(_, name)| name.to_string()).collect();
        match lost.is_empty() {
            true => Ok(()),
            false => Err(MembershipError::NoAdministratorLeft(lost.into_iter().collect())),
        }
    }

    /// The certificates that let an administrator in now, with his name.
    fn good<'a>(
        &'a self,
        known: &'a [Known],
        now_unix_s: u64,
    ) -> impl Iterator<Item = (&'a Known, &'a Name)> {
        known.iter().filter_map(move |of| {
            let record = &of.record;
            let good = record.revoked.is_none()
                && record.expires_unix_s > now_unix_s
                && self.authorities.contains(&record.authority);
            let CertificateHolder::Client(name) = &record.holder else { return None };
            let administrator = self.administrators.iter().find(|known| known.as_str() == name)?;
            good.then_some((of, administrator))
        })
    }

    /// Of two changes that each leave one, one is judged again.
    pub(crate) fn compared(&self, txn: Txn) -> Result<Txn, StoreError> {
        let administrators = self.administrators.iter().cloned().collect();
        let record = to_json(&AdministrationRecord { administrators })?;
        let key = keys::ADMINISTRATION;
        Ok(txn.if_revision(key, self.revision).put(key, record))
    }
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
    fn the_last_certificate_of_an_administrator_is_not_revoked() {
        let of = |serial: &str, name: &str, issued: u64| {
            known(serial, CertificateHolder::Client(name.to_owned()), issued)
        };
        let dropped = |mut one: Known| {
            one.record.authority = "dropped".to_owned();
            one
        };
        // All end 1200 s after their issue.
        let all = [
            of("a1", "ann", NOW),
            of("a2", "ann", NOW),
            of("b1", "bob", NOW),
            of("b0", "bob", NOW - 5000),
            of("e1", "eve", NOW),
            // Of a CA that was dropped.
            dropped(of("z1", "zeb", NOW)),
        ];
        let judged = |administrators: &[&str], goes: &[usize]| {
            let administrators = administrators.iter().map(|name| name.parse().unwrap()).collect();
            let chosen: Vec<&Known> = goes.iter().map(|index| &all[*index]).collect();
            let (authorities, revision) = ([String::new()].into(), Revision(0));
            let administration = Administration { administrators, authorities, revision };
            administration.without(&all, &chosen, NOW).map_err(|error| error.to_string())
        };
        // Without documents nobody is one, and a viewer's goes as it likes.
        assert_eq!(judged(&[], &[0, 1, 2, 4]), Ok(()));
        assert_eq!(judged(&["ann"], &[2, 4]), Ok(()));
        // Another of her own, or of another administrator.
        assert_eq!(judged(&["ann"], &[0]), Ok(()));
        assert_eq!(judged(&["ann", "bob"], &[0, 1]), Ok(()));
        let refused = judged(&["ann"], &[0, 1]).unwrap_err();
        assert!(refused.contains("`ann` would be without") && refused.contains("create-admin"));
        assert!(judged(&["ann", "bob"], &[0, 1, 2]).is_err(), "what is over lets nobody in");
        // Who never had a certificate is no help, and what is over is no loss.
        assert!(judged(&["ann", "zoe"], &[0, 1]).is_err());
        assert_eq!(judged(&["bob"], &[3]), Ok(()));
        assert!(judged(&["ann", "zeb"], &[0, 1]).is_err(), "zeb cannot come in");
        assert_eq!(judged(&["zeb"], &[5]), Ok(()));
    }

    #[test]
    fn an_administrator_has_a_certificate_of_the_ca_that_stays() {
        let of = |serial: &str, name: &str, authority: &str| {
            let mut one = known(serial, CertificateHolder::Client(name.to_owned()), NOW);
            one.record.authority = authority.to_owned();
            one
        };
        let judged = |administrators: &[&str], known: &[Known]| {
            let administration = Administration {
                administrators: administrators.iter().map(|name| name.parse().unwrap()).collect(),
                authorities: ["old".to_owned(), "new".to_owned()].into(),
                revision: Revision(0),
            };
            administration.with_only("new", known, NOW).map_err(|error| error.to_string())
        };
        let mut all = vec![of("a1", "ann", "old"), of("b1", "bob", "old"), of("o1", "olga", "new")];
        // Of the CA before that: it lets nobody in, as it is.
        all.push(of("a0", "ann", "older"));
        let refused = judged(&["ann", "bob"], &all).unwrap_err();
        for words in ["ann, bob", "context renew", "--force"] {
            assert!(refused.contains(words), "{refused}");
        }
        // Without documents, or administrators that come in, there is nobody to lose.
        assert_eq!(judged(&[], &all), Ok(()));
        assert_eq!(judged(&["zoe"], &all), Ok(()));
        // One is enough.
        all.push(of("b2", "bob", "new"));
        assert_eq!(judged(&["ann", "bob"], &all), Ok(()));
        assert!(judged(&["ann"], &all).is_err());
    }

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
