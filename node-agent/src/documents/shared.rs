//! Documents that others rest on: storage and networks.

use std::collections::BTreeMap;

use proto::{Name, ValidatedVmSpec, keys, parse_image};
use tonic::Code;

use super::Refusal;
use super::plan::{Plan, Present};
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
