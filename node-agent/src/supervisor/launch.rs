//! What a VM process is told when it starts: everything it needs, resolved to paths and names of
//! this node. Written as JSON to a file that only root can read.

use std::net::SocketAddr;
use std::path::PathBuf;

use proto::record::NetworkRecord;
use proto::{Generation, Name, VmId, VmSpec, parse_mac};
use serde::{Deserialize, Serialize};

use crate::storage::{ImageKind, Pools, StorageError};

/// One VM to be started on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// The VM's name.
    pub name: Name,
    /// Its id for life.
    pub vm_id: VmId,
    /// The placement's generation that this process acts for.
    pub generation: Generation,
    /// Bound by the node lease: needs `deadline_ns`.
    pub ha: bool,
    /// The document, for vCPUs, memory and command line.
    pub spec: VmSpec,
    /// Files to boot from.
    pub boot: BootFiles,
    /// Disks in the guest's order.
    pub disks: Vec<DiskFile>,
    /// Network cards in the guest's order.
    pub nics: Vec<Nic>,
    /// The CPUID that the guest sees; empty: all that this host supports.
    pub cpuid: Vec<CpuidLeaf>,
    /// HA VMs: no vCPU and no disk write after this moment (`CLOCK_BOOTTIME`) unless renewed.
    pub deadline_ns: Option<u64>,
    /// Set where the VM is to be received by live migration instead of booted.
    pub incoming: Option<IncomingLaunch>,
}

/// Boot files as paths of this node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootFiles {
    /// bzImage or PVH ELF.
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// Flat firmware.
    pub firmware: Option<PathBuf>,
}

/// A raw disk image on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFile {
    /// Path on this node.
    pub path: PathBuf,
    /// The guest cannot write.
    pub readonly: bool,
    /// The `pool/name` it stands for, for messages.
    pub image: String,
}

/// A network card and the bridge it is plugged into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Bridge interface of this node.
    pub bridge: String,
    /// Physical NIC that a bridge made for it enslaves; empty: none.
    #[serde(default)]
    pub uplink: String,
    /// Unicast.
    pub mac: [u8; 6],
}

/// One CPUID leaf, as KVM takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// EAX on entry.
    pub function: u32,
    /// ECX on entry, where `flags` says that it matters.
    pub index: u32,
    /// KVM's flags.
    pub flags: u32,
    /// Result.
    pub eax: u32,
    /// Result.
    pub ebx: u32,
    /// Result.
    pub ecx: u32,
    /// Result.
    pub edx: u32,
}

/// The receiving end of a live migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncomingLaunch {
    /// Names this attempt.
    pub migration_id: String,
    /// SHA-256 of the source's one-off certificate, hexadecimal; no other peer is accepted.
    pub source_fingerprint: String,
    /// Where to listen; port 0 lets the kernel choose.
    pub listen: SocketAddr,
    /// The wire version both sides agreed on.
    pub protocol: u32,
}

/// Why a document cannot be turned into a launch on this node.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// A file or pool is missing here.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A NIC's network is not defined.
    #[error(
        "network `{0}` does not exist: create it with `clusterctl network create`, or change the VM's [[nics]]"
    )]
    UnknownNetwork(Name),
    /// A MAC address of the document.
    #[error("`{0}` is not a unicast MAC address")]
    Mac(String),
}

impl Launch {
    /// Resolves a document to this node's files and bridges. Disks that are missing and have a
    /// size are made (sparse) in their pool. With `booting` unset (an incoming migration) disks
    /// must exist; boot files must always, a guest's reset reads them again.
    ///
    /// # Errors
    /// [`ResolveError`]: names the pool, the path or the network.
    pub fn resolve(
        spec: &VmSpec,
        vm_id: VmId,
        generation: Generation,
        pools: &Pools,
        networks: &[NetworkRecord],
        booting: bool,
    ) -> Result<Self, ResolveError> {
        let boot_file = |image: &Option<String>, kind| match image {
            Some(image) => pools.existing_as(image, kind).map(Some),
            None => Ok(None),
        };
        let boot = BootFiles {
            kernel: boot_file(&spec.boot.kernel, ImageKind::Kernel)?,
            initrd: boot_file(&spec.boot.initrd, ImageKind::Initrd)?,
            firmware: boot_file(&spec.boot.firmware, ImageKind::Firmware)?,
        };
        let mut disks = Vec::with_capacity(spec.disks.len());
        for disk in &spec.disks {
            let path = match disk.size {
                Some(size) if booting => pools.ensure_disk(&disk.image, size.0)?,
                _ => pools.existing(&disk.image)?,
            };
            disks.push(DiskFile { path, readonly: disk.readonly, image: disk.image.clone() });
        }
        let mut nics = Vec::with_capacity(spec.nics.len());
        for (index, nic) in spec.nics.iter().enumerate() {
            let network = networks
                .iter()
                .find(|network| network.name == nic.network)
                .ok_or_else(|| ResolveError::UnknownNetwork(nic.network.clone()))?;
            let mac = match &nic.mac {
                Some(text) => parse_mac(text).ok_or_else(|| ResolveError::Mac(text.clone()))?,
                None => mac_of(vm_id, index),
            };
            let (bridge, uplink) = (network.bridge.clone(), network.uplink.clone());
            nics.push(Nic { bridge, uplink, mac });
        }
        Ok(Self {
            name: spec.name.clone(),
            vm_id,
            generation,
            ha: spec.ha.enabled,
            spec: spec.clone(),
            boot,
            disks,
            nics,
            cpuid: Vec::new(),
            deadline_ns: None,
            incoming: None,
        })
    }
}

/// The MAC address of a NIC whose document gives none: QEMU's locally known prefix 52:54:00, then
/// three octets of the VM's id with the NIC's number mixed in. The same on every node.
#[must_use]
pub fn mac_of(vm_id: VmId, index: usize) -> [u8; 6] {
    let id = vm_id.0.as_bytes();
    let number = u8::try_from(index).unwrap_or(u8::MAX);
    [
        0x52,
        0x54,
        0x00,
        id[0] ^ id[3] ^ id[10],
        id[1] ^ id[4] ^ id[12],
        (id[2] ^ id[15]).wrapping_add(number),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_are_stable_unicast_and_differ_by_card() {
        let vm = VmId(uuid::Uuid::from_u128(0x1234_5678_9abc_def0_1122_3344_5566_7788));
        assert_eq!(mac_of(vm, 0), mac_of(vm, 0));
        assert_ne!(mac_of(vm, 0), mac_of(vm, 1));
        assert_eq!(mac_of(vm, 7)[0] & 1, 0);
    }
}
