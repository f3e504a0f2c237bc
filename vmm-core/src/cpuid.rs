//! CPUID of a guest: what the host's KVM supports, made equal on all nodes of a cluster, with the
//! topology of this VM.
//!
//! Owns which features a guest sees. Never shows a feature whose state this VMM does not save:
//! nested virtualization and the performance counters are hidden.
//!
//! Facts: Intel SDM volume 2A "CPUID", AMD APM volume 3 appendix E, the kernel's
//! Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

/// One answer of the CPUID instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input, if the leaf has subleaves.
    pub subleaf: Option<u32>,
    /// EAX on output.
    pub eax: u32,
    /// EBX on output.
    pub ebx: u32,
    /// ECX on output.
    pub ecx: u32,
    /// EDX on output.
    pub edx: u32,
}

/// A list of CPUID answers, each leaf and subleaf once.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CpuidList {
    /// The answers.
    pub entries: Vec<CpuidEntry>,
}

/// Which CPU model a guest sees.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum CpuidPolicy {
    /// All that this host supports. Such a VM may not be able to move elsewhere.
    #[default]
    Host,
    /// The features that all nodes share, as [`CpuidList::intersect`] found them.
    Baseline(CpuidList),
}

/// Why a CPU model cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// KVM does not say what it supports.
    #[error("KVM does not say which CPUID features it supports")]
    Supported(#[source] kvm_ioctls::Error),
    /// Different makers.
    #[error(
        "the processors are of different makers ({ours} and {theirs}): no CPU model fits both, \
         a VM cannot move between them while it runs"
    )]
    Vendor {
        /// The first maker.
        ours: String,
        /// The other.
        theirs: String,
    },
    /// The baseline asks for what this host does not have.
    #[error(
        "this host lacks a feature of the CPU model: leaf {leaf:#x} register {register} needs \
         {wanted:#010x}, the host has {have:#010x}; renew the cluster's baseline or choose another node"
    )]
    Lacking {
        /// CPUID leaf.
        leaf: u32,
        /// Register.
        register: &'static str,
        /// The bits that are asked for.
        wanted: u32,
        /// The bits that are there.
        have: u32,
    },
    /// Too many entries.
    #[error("the CPU model has {0} CPUID entries, KVM takes at most {KVM_MAX_CPUID_ENTRIES}")]
    TooMany(usize),
}

/// What one bit of a CPUID register means when two processors are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meaning {
    /// Each bit is a feature: both must have it.
    Features,
    /// A number or name: it comes from the first processor.
    Value,
}

/// Meaning of EAX, EBX, ECX, EDX of a leaf.
fn meaning(leaf: u32, subleaf: u32) -> [Meaning; 4] {
    use Meaning::{Features as F, Value as V};
    match (leaf, subleaf) {
        (1 | 0x8000_0001, _) => [V, V, F, F],
        (6, _) => [F, V, V, V],
        (7, 0) => [V, F, F, F],
        (7, _) | (0x14 | 0x19, _) => [F, F, F, F],
        (0xd, 0) => [F, V, V, F],
        (0xd, 1) => [F, V, F, F],
        (0x4000_0001, _) => [F, V, V, V],
        (0x8000_0007, _) => [V, V, V, F],
        (0x8000_0008, _) => [V, F, V, V],
        (0x8000_000a, _) => [V, V, V, F],
        (0x8000_0021, _) => [F, V, V, V],
        (0xc000_0001, _) => [V, V, V, F],
        _ => [V, V, V, V],
    }
}

const REGISTERS: [&str; 4] = ["eax", "ebx", "ecx", "edx"];

impl CpuidEntry {
    fn registers(&self) -> [u32; 4] {
        [self.eax, self.ebx, self.ecx, self.edx]
    }

    fn set_registers(&mut self, [eax, ebx, ecx, edx]: [u32; 4]) {
        (self.eax, self.ebx, self.ecx, self.edx) = (eax, ebx, ecx, edx);
    }

    fn meaning(&self) -> [Meaning; 4] {
        meaning(self.leaf, self.subleaf.unwrap_or(0))
    }
}

impl From<&kvm_cpuid_entry2> for CpuidEntry {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        let indexed = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
        Self {
            leaf: entry.function,
            subleaf: indexed.then_some(entry.index),
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        }
    }
}

impl From<&CpuidEntry> for kvm_cpuid_entry2 {
    fn from(entry: &CpuidEntry) -> Self {
        Self {
            function: entry.leaf,
            index: entry.subleaf.unwrap_or(0),
            flags: if entry.subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
            ..Self::default()
        }
    }
}

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const EXT1_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXT1_ECX_SVM: u32 = 1 << 2;
const EXT1_ECX_PERFCTR: u32 = 0b11_1001 << 23;

impl CpuidList {
    /// What this host can show to a guest: what KVM supports, without that which cannot be saved.
    ///
    /// # Errors
    /// [`CpuidError::Supported`] if KVM does not answer.
    pub fn supported(kvm: &Kvm) -> Result<Self, CpuidError> {
        let supported =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(CpuidError::Supported)?;
        let mut list =
            Self { entries: supported.as_slice().iter().map(CpuidEntry::from).collect() };
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        for entry in &mut list.entries {
            match entry.leaf {
                1 => {
                    entry.ecx &= !LEAF1_ECX_VMX;
                    entry.ecx |= LEAF1_ECX_HYPERVISOR | LEAF1_ECX_X2APIC;
                    if tsc_deadline {
                        entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
                    }
                }
                0xa | 0x8000_000a | 0x8000_0022 => entry.set_registers([0; 4]),
                0x8000_0001 => entry.ecx &= !(EXT1_ECX_SVM | EXT1_ECX_PERFCTR),
                _ => {}
            }
        }
        Ok(list)
    }

    fn find(&self, leaf: u32, subleaf: Option<u32>) -> Option<&CpuidEntry> {
        self.entries.iter().find(|entry| entry.leaf == leaf && entry.subleaf == subleaf)
    }

    /// The maker of the processor, as in leaf 0.
    #[must_use]
    pub fn vendor(&self) -> String {
        let leaf = self.entries.iter().find(|entry| entry.leaf == 0);
        let bytes = leaf.map_or([[0; 4]; 3], |entry| {
            [entry.ebx.to_le_bytes(), entry.edx.to_le_bytes(), entry.ecx.to_le_bytes()]
        });
        String::from_utf8_lossy(bytes.as_flattened()).into_owned()
    }

    /// The features that both lists have. Names and numbers are those of `self`; the highest leaf
    /// of each range is the lower of both. Call it over all nodes in a fixed order, so that all
    /// come to the same baseline.
    ///
    /// # Errors
    /// [`CpuidError::Vendor`] if the makers differ.
    pub fn intersect(&self, other: &Self) -> Result<Self, CpuidError> {
        if self.vendor() != other.vendor() {
            return Err(CpuidError::Vendor { ours: self.vendor(), theirs: other.vendor() });
        }
        let mut entries = Vec::new();
        for ours in &self.entries {
            let Some(theirs) = other.find(ours.leaf, ours.subleaf) else { continue };
            let mut both = *ours;
            let mut registers = ours.registers();
            for ((value, their), meaning) in
                registers.iter_mut().zip(theirs.registers()).zip(ours.meaning())
            {
                if meaning == Meaning::Features {
                    *value &= their;
                }
            }
            // Highest leaf of the basic, hypervisor, extended and Centaur ranges.
            if ours.leaf & 0x3fff_ffff == 0 {
                registers[0] = registers[0].min(theirs.eax);
            }
            both.set_registers(registers);
            entries.push(both);
        }
        Ok(Self { entries })
    }

    /// Says whether a host that supports `self` can show all features of `wanted`.
    ///
    /// # Errors
    /// [`CpuidError::Vendor`] or [`CpuidError::Lacking`] with the first feature that is missing.
    pub fn covers(&self, wanted: &Self) -> Result<(), CpuidError> {
        if self.vendor() != wanted.vendor() {
            return Err(CpuidError::Vendor { ours: self.vendor(), theirs: wanted.vendor() });
        }
        for entry in &wanted.entries {
            let have = self.find(entry.leaf, entry.subleaf).map_or([0; 4], CpuidEntry::registers);
            let parts = entry.registers().into_iter().zip(have).zip(entry.meaning()).zip(REGISTERS);
            for (((wanted, have), meaning), register) in parts {
                if meaning == Meaning::Features && wanted & !have != 0 {
                    return Err(CpuidError::Lacking { leaf: entry.leaf, register, wanted, have });
                }
            }
        }
        Ok(())
    }

    /// The answers for one vCPU of a VM with `vcpus` cores in one package, one thread each.
    #[must_use]
    pub fn for_vcpu(&self, vcpu: u8, vcpus: u8) -> Self {
        let apic_id = u32::from(vcpu);
        let cores = u32::from(vcpus.max(1));
        let core_bits = cores.next_power_of_two().trailing_zeros();
        let amd = matches!(self.vendor().as_str(), "AuthenticAMD" | "HygonGenuine");
        let mut list = self.clone();
        list.entries.retain(|entry| !matches!(entry.leaf, 0xb | 0x1f));
        for entry in &mut list.entries {
            match entry.leaf {
                0 => entry.eax = entry.eax.max(0xb),
                1 => {
                    let count = cores.next_power_of_two();
                    entry.ebx = entry.ebx & 0xffff | count << 16 | apic_id << 24;
                    entry.edx &= !LEAF1_EDX_HTT;
                    if cores > 1 {
                        entry.edx |= LEAF1_EDX_HTT;
                    }
                }
                4 if entry.eax & 0x1f != 0 => {
                    let level = entry.eax >> 5 & 7;
                    let sharing = if level >= 3 { (1 << core_bits) - 1 } else { 0 };
                    entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << core_bits) - 1) << 26;
                }
                0x8000_0001 if amd => {
                    entry.ecx &= !EXT1_ECX_CMP_LEGACY;
                    if cores > 1 {
                        entry.ecx |= EXT1_ECX_CMP_LEGACY;
                    }
                }
                0x8000_0008 if amd => {
                    entry.ecx = entry.ecx & !0xf0ff | core_bits << 12 | (cores - 1);
                }
                0x8000_001d if entry.eax & 0x1f != 0 => {
                    let level = entry.eax >> 5 & 7;
                    let sharing = if level >= 3 { cores - 1 } else { 0 };
                    entry.eax = entry.eax & 0x3fff | sharing << 14;
                }
                0x8000_001e => {
                    entry.eax = apic_id;
                    entry.ebx = apic_id;
                    entry.ecx = 0;
                }
                _ => {}
            }
        }
        // Extended topology: one thread a core, all cores in one package.
        let topology = [(0, 0, 1, 1), (1, core_bits, cores, 2), (2, 0, 0, 0)];
        for (level, shift, count, kind) in topology {
            list.entries.push(CpuidEntry {
                leaf: 0xb,
                subleaf: Some(level),
                eax: shift,
                ebx: count,
                ecx: kind << 8 | level,
                edx: apic_id,
            });
        }
        list
    }

    /// In KVM's form.
    ///
    /// # Errors
    /// [`CpuidError::TooMany`].
    pub fn to_kvm(&self) -> Result<CpuId, CpuidError> {
        let entries: Vec<kvm_cpuid_entry2> = self.entries.iter().map(Into::into).collect();
        CpuId::from_entries(&entries).map_err(|_| CpuidError::TooMany(entries.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(leaf: u32, subleaf: Option<u32>, registers: [u32; 4]) -> CpuidEntry {
        let mut entry = CpuidEntry { leaf, subleaf, eax: 0, ebx: 0, ecx: 0, edx: 0 };
        entry.set_registers(registers);
        entry
    }

    fn list(max: u32, leaf1_ecx: u32, leaf7_ebx: Option<u32>) -> CpuidList {
        let amd = [0x6874_7541, 0x444d_4163, 0x6974_6e65];
        let mut entries = vec![
            entry(0, None, [max, amd[0], amd[1], amd[2]]),
            entry(1, None, [0x00a2_0f12, 0x0300_0800, leaf1_ecx, 1 << 25]),
        ];
        entries.extend(leaf7_ebx.map(|ebx| entry(7, Some(0), [0, ebx, 0, 0])));
        CpuidList { entries }
    }

    #[test]
    fn intersection_keeps_only_shared_features_and_is_covered_by_both() {
        let old = list(7, 0b1100, Some(0b01));
        let new = list(0x10, 0b0110, Some(0b11));
        let both = old.intersect(&new).unwrap();
        assert_eq!(both.vendor(), "AuthenticAMD");
        assert_eq!(both.find(0, None).unwrap().eax, 7);
        assert_eq!(both.find(1, None).unwrap().ecx, 0b0100);
        assert_eq!(both.find(7, Some(0)).unwrap().ebx, 0b01);
        old.covers(&both).unwrap();
        new.covers(&both).unwrap();
        assert!(matches!(old.covers(&new), Err(CpuidError::Lacking { leaf: 1, .. })));
        let without = list(7, 0b1100, None);
        assert!(old.intersect(&without).unwrap().find(7, Some(0)).is_none());
        assert!(matches!(without.covers(&old), Err(CpuidError::Lacking { leaf: 7, .. })));
    }

    #[test]
    fn different_makers_have_no_common_model() {
        let amd = list(7, 0, None);
        let mut intel = amd.clone();
        intel.entries[0].ebx = 0x756e_6547;
        assert!(matches!(amd.intersect(&intel), Err(CpuidError::Vendor { .. })));
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_and_all_share_the_package() {
        for vcpus in 1..=8u8 {
            for vcpu in 0..vcpus {
                let cpuid = list(7, 0, None).for_vcpu(vcpu, vcpus);
                let leaf1 = cpuid.find(1, None).unwrap();
                assert_eq!(leaf1.ebx >> 24, u32::from(vcpu));
                assert_eq!(leaf1.edx & LEAF1_EDX_HTT != 0, vcpus > 1);
                let cores = cpuid.find(0xb, Some(1)).unwrap();
                assert_eq!((cores.ebx, cores.edx), (u32::from(vcpus), u32::from(vcpu)));
                assert_eq!(u32::from(vcpu) >> cores.eax, 0, "one package");
                assert_eq!(cpuid.find(0, None).unwrap().eax, 0xb);
            }
        }
    }
}
