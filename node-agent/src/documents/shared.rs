//! Documents that others rest on: storage, networks, access.

use std::collections::BTreeMap;

use proto::document::parse;
use proto::documents::DocumentPath;
use proto::documents::{AccessDocument, Role};
use proto::{Name, ValidatedVmSpec, keys, parse_image};
use tonic::Code;

use super::Refusal;
use super::plan::{Plan, Present, extend};
use crate::vms::image_uses;

fn refuse(path: &str, reason: String) -> Result<(), Refusal> {
    Err(Refusal::new(path, Code::FailedPrecondition, reason))
}

/// The VM that uses a pool, if there is one.
fn user_of_pool<'a>(specs: &'a BTreeMap<Name, ValidatedVmSpec>, pool: &Name) -> Option<&'a Name> {
    let uses = |spec: &ValidatedVmSpec| {
        image_uses(spec).any(|used| parse_image(used.image).is_ok_and(|(name, _)| name == *pool))
    };
    specs.iter().find(|(_, spec)| uses(spec)).map(|(vm, _)| vm)
}

/// A pool that VMs use stays where and what it is.
pub(super) fn storage(plan: &mut Plan, present: &Present, after: &Present) -> Result<(), Refusal> {
    let (old, new) = (present.storage(), after.storage());
    let specs = after.specs();
    for (name, pool) in &old.pools {
        if new.pools.get(name) != Some(pool)
            && let Some(vm) = user_of_pool(&specs, name)
        {
            let reason = format!(
                "pool `{name}` is used by VM `{vm}`: it can be neither changed nor removed"
            );
            return refuse(keys::STORAGE_DOCUMENT, reason);
        }
    }
    let made = new
        .records()
        .into_iter()
        .filter(|record| old.pools.get(&record.name) != new.pools.get(&record.name));
    plan.new_pools.extend(made.map(|record| (keys::STORAGE_DOCUMENT.to_owned(), record)));
    Ok(())
}

/// A network that VMs use stays what it is.
pub(super) fn networks(present: &Present, after: &Present) -> Result<(), Refusal> {
    let (old, new) = (present.networks(), after.networks());
    let specs = after.specs();
    for (name, network) in &old.networks {
        let user =
            || specs.iter().find(|(_, spec)| spec.nics.iter().any(|nic| nic.network == *name));
        if new.networks.get(name) != Some(network)
            && let Some((vm, _)) = user()
        {
            let reason = format!(
                "network `{name}` is used by VM `{vm}`: it can be neither changed nor removed"
            );
            return refuse(keys::NETWORKS_DOCUMENT, reason);
        }
    }
    Ok(())
}

/// Who holds which role.
fn roles(present: &Present) -> BTreeMap<String, Role> {
    let of = |(path, file): (&String, &crate::store::Versioned<Vec<u8>>)| {
        let Some(DocumentPath::Access(_)) = DocumentPath::of(path) else { return None };
        let text = std::str::from_utf8(&file.value).ok()?;
        Some((path.clone(), parse::<AccessDocument>(text).ok()?.role))
    };
    present.files.iter().filter_map(of).collect()
}

/// Somebody stays an administrator as long as roles are given at all.
pub(super) fn access(
    plan: &mut Plan,
    present: &Present,
    after: &Present,
    path: &str,
) -> Result<(), Refusal> {
    let roles = roles(after);
    let admin = roles.iter().find(|(_, role)| **role == Role::Admin).map(|(admin, _)| admin);
    match admin {
        None if !roles.is_empty() => refuse(
            path,
            "no certificate would be an administrator's any more: give somebody role = \"admin\" \
             first"
                .to_owned(),
        ),
        // Whoever is counted on is still there when this is committed.
        Some(admin) if admin != path => {
            let revision = present.revision(admin);
            extend(plan, |txn| match txn.names(admin) {
                true => txn,
                false => txn.if_revision(admin.as_str(), revision),
            });
            Ok(())
        }
        _ => Ok(()),
    }
}
