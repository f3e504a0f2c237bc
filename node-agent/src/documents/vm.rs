//! A VM's document: what its placement and its claims on disks become.

use std::collections::BTreeSet;

use cluster::Txn;
use proto::record::{DiskClaim, Phase, Placement, PoolKind, Requested};
use proto::{
    ByteSize, Generation, Name, VM_OVERHEAD_BYTES, ValidatedVmSpec, VmId, VmSpec, keys,
    parse_image, vm_needs_bytes,
};
use tonic::Code;

use super::Refusal;
use super::plan::{Choose, Largest, Plan, Present, extend};
use crate::storage::StorageError;
use crate::store::{Versioned, giving_to, json};
use crate::vms::{check_sharing, image_uses};

/// A document that is there afterwards: a new VM, or one that is changed.
pub(super) fn write(
    plan: &mut Plan,
    present: &Present,
    after: &Present,
    (path, name): (&str, &Name),
    spec: ValidatedVmSpec,
    choose: &mut Choose<'_>,
) -> Result<(), Refusal> {
    let refuse = |code, reason: String| Refusal::new(path, code, reason);
    if spec.name != *name {
        let reason = format!(
            "name = \"{}\", but the file is {name}.toml: a VM's name is its file's, and it cannot be renamed",
            spec.name
        );
        return Err(refuse(Code::InvalidArgument, reason));
    }
    let before = present.specs().remove(name);
    let placement = present.placements.get(name);
    if before.as_ref() == Some(&spec) && placement.is_some() {
        return Ok(());
    }
    references(after, path, &spec)?;
    if before.as_ref().is_none_or(|before| before.memory != spec.memory) {
        size(present, path, &spec)?;
    }
    match placement {
        None => create(plan, present, path, spec.clone(), choose)?,
        Some(placement) => {
            edit(plan, present, path, (before.as_ref(), spec.clone()), placement)?;
        }
    }
    let others = after.specs();
    check_sharing(&spec, others.values().map(|other| other.get()))
        .map_err(|error| refuse(Code::FailedPrecondition, error.to_string()))
}

fn create(
    plan: &mut Plan,
    present: &Present,
    path: &str,
    spec: ValidatedVmSpec,
    choose: &mut Choose<'_>,
) -> Result<(), Refusal> {
    let new = choose(&spec).map_err(|(code, reason)| Refusal::new(path, code, reason))?;
    let placement = Placement {
        vm_id: new.id,
        owner: new.owner,
        generation: Generation(1),
        phase: Phase::Stopped,
        requested: Requested::Stopped,
        ha: spec.ha.enabled,
        cpus: spec.cpus,
        memory_bytes: spec.memory.0,
        message: None,
        events: vec![new.event],
        start_failures: 0,
        tried: Vec::new(),
        home: None,
        lock: None,
        retry_at_unix_ms: None,
    };
    claims(plan, present, path, None, Some(&spec), new.id)?;
    let key = keys::placement(&spec.name);
    extend(plan, |txn| {
        let txn = giving_to(txn, new.owner);
        txn.if_absent(key.clone()).put(key, json(&placement))
    });
    compare_references(plan, present);
    plan.look_at.push((path.to_owned(), spec, new.owner));
    Ok(())
}

fn edit(
    plan: &mut Plan,
    present: &Present,
    path: &str,
    (before, spec): (Option<&ValidatedVmSpec>, ValidatedVmSpec),
    placement: &Versioned<Placement>,
) -> Result<(), Refusal> {
    at_rest(path, &spec.name, &placement.value, "change")?;
    let old = before.map(ValidatedVmSpec::get);
    claims(plan, present, path, old, Some(&spec), placement.value.vm_id)?;
    let mut changed = placement.value.clone();
    changed.ha = spec.ha.enabled;
    changed.cpus = spec.cpus;
    changed.memory_bytes = spec.memory.0;
    put_placement(plan, &spec.name, placement, Some(&changed));
    compare_references(plan, present);
    plan.look_at.push((path.to_owned(), spec, changed.owner));
    Ok(())
}

/// A document that is removed: the VM is deleted; its disk images stay.
pub(super) fn remove(
    plan: &mut Plan,
    present: &Present,
    path: &str,
    name: &Name,
) -> Result<(), Refusal> {
    let Some(placement) = present.placements.get(name) else { return Ok(()) };
    at_rest(path, name, &placement.value, "delete")?;
    let before = present.specs().remove(name);
    let old = before.as_ref().map(ValidatedVmSpec::get);
    claims(plan, present, path, old, None, placement.value.vm_id)?;
    put_placement(plan, name, placement, None);
    Ok(())
}

/// What runs keeps the document it was started with: it says how to receive it elsewhere.
fn at_rest(path: &str, name: &Name, placement: &Placement, verb: &str) -> Result<(), Refusal> {
    match placement.phase {
        Phase::Stopped | Phase::Error | Phase::Unplaceable => Ok(()),
        Phase::Starting
        | Phase::Started
        | Phase::Stopping
        | Phase::Migrating { .. }
        | Phase::Relocating { .. }
        | Phase::Recovering
        | Phase::Frozen => {
            let reason = format!(
                "VM `{name}` is {}: stop it first (`clusterctl vm shutdown {name}`), then {verb} it",
                placement.phase.word()
            );
            Err(Refusal::new(path, Code::FailedPrecondition, reason))
        }
    }
}

fn put_placement(
    plan: &mut Plan,
    name: &Name,
    is: &Versioned<Placement>,
    becomes: Option<&Placement>,
) {
    let key = keys::placement(name);
    extend(plan, |txn| {
        let txn = txn.if_revision(key.clone(), is.revision);
        match becomes {
            Some(placement) if *placement == is.value => txn,
            Some(placement) => txn.put(key, json(placement)),
            None => txn.delete(key),
        }
    });
}

/// What was judged by these documents holds only as long as they do.
fn compare_references(plan: &mut Plan, present: &Present) {
    for path in [keys::STORAGE_DOCUMENT, keys::NETWORKS_DOCUMENT] {
        extend(plan, |txn| match txn.names(path) {
            true => txn,
            false => txn.if_revision(path, present.revision(path)),
        });
    }
}

fn written(spec: Option<&VmSpec>) -> BTreeSet<&str> {
    let disks = spec.into_iter().flat_map(|spec| &spec.disks);
    disks.filter(|disk| !disk.readonly).map(|disk| disk.image.as_str()).collect()
}

/// Moves the claims on disks that are written from what the document was to what it becomes.
fn claims(
    plan: &mut Plan,
    present: &Present,
    path: &str,
    old: Option<&VmSpec>,
    new: Option<&VmSpec>,
    vm_id: VmId,
) -> Result<(), Refusal> {
    let (old_disks, new_disks) = (written(old), written(new));
    for image in old_disks.difference(&new_disks) {
        let key = keys::disk_claim(image);
        if let Some(claim) = present.claims.get(*image).filter(|claim| claim.value.vm_id == vm_id) {
            extend(plan, |txn| txn.if_revision(key.clone(), claim.revision).delete(key));
        }
    }
    let Some(spec) = new else { return Ok(()) };
    let claim = DiskClaim { vm_id, vm: spec.name.clone() };
    for disk in &spec.disks {
        let key = keys::disk_claim(&disk.image);
        match present.claims.get(&disk.image) {
            Some(held) if held.value.vm_id == vm_id => {}
            Some(held) => {
                let reason = format!(
                    "disk `{}` belongs to VM `{}`: use another image, delete that VM, or give both \
                     `readonly = true`",
                    disk.image, held.value.vm
                );
                return Err(Refusal::new(path, Code::FailedPrecondition, reason));
            }
            None => extend(plan, |txn: Txn| match (txn.names(&key), disk.readonly) {
                (true, _) => txn,
                (false, true) => txn.if_absent(key),
                (false, false) => txn.if_absent(key.clone()).put(key, json(&claim)),
            }),
        }
    }
    Ok(())
}

/// Some node could run it, were it empty. One that grew too large by the loss of a node may be
/// changed in all else.
fn size(present: &Present, path: &str, spec: &VmSpec) -> Result<(), Refusal> {
    let too_small = |largest: &&Largest| largest.memory_bytes < vm_needs_bytes(spec.memory.0);
    let Some(largest) = present.largest.as_ref().filter(too_small) else { return Ok(()) };
    let reason = format!(
        "memory = \"{}\", with {} for its process, is more than any node has: the largest, {}, has {} for VMs",
        spec.memory,
        ByteSize(VM_OVERHEAD_BYTES),
        largest.node,
        ByteSize(largest.memory_bytes >> 20 << 20)
    );
    Err(Refusal::new(path, Code::InvalidArgument, reason))
}

/// The pools and networks it names are there, and will do.
fn references(after: &Present, path: &str, spec: &VmSpec) -> Result<(), Refusal> {
    let refuse = |code, reason: String| Err(Refusal::new(path, code, reason));
    let pools = after.storage().pools;
    for image in image_uses(spec).map(|used| used.image) {
        let Ok((pool, _)) = parse_image(image) else { continue };
        match pools.get(&pool) {
            None => return refuse(Code::NotFound, StorageError::UnknownPool(pool).to_string()),
            Some(entry) if spec.ha.enabled && entry.kind == PoolKind::LocalDir => {
                return refuse(
                    Code::FailedPrecondition,
                    format!(
                        "`{image}` is in pool `{pool}`, which is local to each node: a highly \
                         available VM needs all its files in shared pools; move it, or set [ha] \
                         enabled = false"
                    ),
                );
            }
            Some(_) => {}
        }
    }
    let networks = after.networks().networks;
    match spec.nics.iter().find(|nic| !networks.contains_key(&nic.network)) {
        None => Ok(()),
        Some(nic) => refuse(
            Code::NotFound,
            format!(
                "network `{0}` does not exist: create it with `clusterctl network create {0}`, or \
                 change the VM's [[nics]]",
                nic.network
            ),
        ),
    }
}
