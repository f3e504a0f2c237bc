//! There is always one administrator, and one with a certificate, once there was one.
//!
//! Two changes that each leave one may together leave none. So every transaction that changes who
//! has which role compares and writes one record, and of two such changes the later one is judged
//! again.

use proto::documents::Role;
use proto::record::AdministrationRecord;
use proto::{Name, keys};
use tonic::Code;

use super::Refusal;
use super::plan::{Plan, Present, extend};
use crate::store::json;

/// Adds the record to a plan that changes roles.
///
/// # Errors
/// The documents that would be there name no administrator; or they would all go at once, and with
/// them whatever limits those who are no administrators.
pub(super) fn keep_one(plan: &mut Plan, present: &Present, after: &Present) -> Result<(), Refusal> {
    let (before, now) = (present.roles(), after.roles());
    if before == now {
        return Ok(());
    }
    let administrators: Vec<Name> = now
        .iter()
        .filter(|(_, role)| **role == Some(Role::Admin))
        .map(|(name, _)| name.clone())
        .collect();
    let changed = before
        .keys()
        .chain(now.keys())
        .find(|name| before.get(*name) != now.get(*name))
        .map(keys::access_document)
        .unwrap_or_default();
    let refused = |why: &str| Err(Refusal::new(&changed, Code::FailedPrecondition, why));
    if now.is_empty() && before.len() > 1 {
        return refused(
            "without any document under access/ every client certificate is an administrator's: \
             remove the others first, an administrator's last, in a change of its own",
        );
    }
    if administrators.is_empty() && !now.is_empty() {
        return refused(match before.is_empty() {
            true => {
                "the first documents under access/ name no administrator, and whoever has no \
                 document may do nothing from then on: make one with `role = \"admin\"` first, or \
                 in the same commit"
            }
            false => {
                "no administrator would be left: give somebody else `role = \"admin\"` first \
                 (`clusterctl config set access/NAME role=admin`)"
            }
        });
    }
    let can_come = |name: &Name| present.certified.contains(name.as_str());
    let could_come = before.iter().any(|(name, role)| *role == Some(Role::Admin) && can_come(name));
    if !now.is_empty() && could_come && !administrators.iter().any(can_come) {
        return refused(
            "no administrator would be left who has a certificate that lets him in: make one for \
             another administrator first (`clusterctl context create-admin NAME --client-name NAME`)",
        );
    }
    let record = AdministrationRecord { administrators };
    extend(plan, |txn| {
        txn.if_revision(keys::ADMINISTRATION, present.administration)
            .put(keys::ADMINISTRATION, json(&record))
    });
    Ok(())
}
