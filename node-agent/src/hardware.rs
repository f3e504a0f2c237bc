//! What this machine has: CPUs, memory, KVM. Read once at the start, from `/proc` and KVM itself.

use proto::record::CpuidRecord;
use vmm_core::cpuid::{CpuidEntry, CpuidList};

use crate::supervisor::CpuidLeaf;

/// A value of `/proc/meminfo` in bytes; 0 if it is not there.
fn meminfo_bytes(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    parse_meminfo(&text, key).unwrap_or(0)
}

fn parse_meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// All memory of the machine.
#[must_use]
pub fn memory_total_bytes() -> u64 {
    meminfo_bytes("MemTotal")
}

/// What could be used now.
#[must_use]
pub fn memory_available_bytes() -> u64 {
    meminfo_bytes("MemAvailable")
}

/// Logical CPUs that this process may use.
#[must_use]
pub fn cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
}

/// Which hardware virtualization KVM has here: svm, vmx, pvm (KVM without either), none.
#[must_use]
pub fn kvm() -> String {
    if !std::path::Path::new("/dev/kvm").exists() {
        return "none".to_owned();
    }
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_ascii_whitespace().any(|word| word == flag);
    match (has("svm"), has("vmx")) {
        (true, _) => "svm",
        (false, true) => "vmx",
        (false, false) => "pvm",
    }
    .to_owned()
}

/// What KVM offers guests here; empty without KVM.
#[must_use]
pub fn cpuid() -> Vec<CpuidRecord> {
    let Ok(kvm) = kvm_ioctls::Kvm::new() else { return Vec::new() };
    match CpuidList::supported(&kvm) {
        Ok(list) => list.entries.iter().map(record).collect(),
        Err(error) => {
            tracing::warn!("{error}");
            Vec::new()
        }
    }
}

fn record(entry: &CpuidEntry) -> CpuidRecord {
    let CpuidEntry { leaf, subleaf, eax, ebx, ecx, edx } = *entry;
    CpuidRecord { leaf, subleaf, eax, ebx, ecx, edx }
}

fn list(records: &[CpuidRecord]) -> CpuidList {
    let entry = |record: &CpuidRecord| {
        let CpuidRecord { leaf, subleaf, eax, ebx, ecx, edx } = *record;
        CpuidEntry { leaf, subleaf, eax, ebx, ecx, edx }
    };
    CpuidList { entries: records.iter().map(entry).collect() }
}

/// The CPU features that all these nodes share; empty where there are none to share.
///
/// # Errors
/// If no CPU model fits them all: their makers differ.
pub fn intersect(reports: &[Vec<CpuidRecord>]) -> Result<Vec<CpuidLeaf>, String> {
    let Some((first, others)) = reports.split_first() else { return Ok(Vec::new()) };
    let mut shared = list(first);
    for other in others {
        shared = shared.intersect(&list(other)).map_err(|error| error.to_string())?;
    }
    Ok(shared.entries.iter().map(leaf).collect())
}

/// As KVM takes it: `flags` says whether the subleaf counts (KVM_CPUID_FLAG_SIGNIFCANT_INDEX).
fn leaf(entry: &CpuidEntry) -> CpuidLeaf {
    CpuidLeaf {
        function: entry.leaf,
        index: entry.subleaf.unwrap_or(0),
        flags: u32::from(entry.subleaf.is_some()),
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:        1024 kB\nMemAvailable:     12 kB\nHugePages_Total:       0\n";
        assert_eq!(parse_meminfo(text, "MemTotal"), Some(1 << 20));
        assert_eq!(parse_meminfo(text, "MemAvailable"), Some(12 << 10));
        assert_eq!(parse_meminfo(text, "Mem"), None);
        assert_eq!(parse_meminfo(text, "HugePages_Total"), None);
        assert!(memory_total_bytes() > 0 && cpus() > 0);
    }
}
