//! The complete state of a vCPU, and the order in which it is read and written.
//!
//! Order when reading: events first (reading others may change them), then mp_state (reading it
//! makes KVM act on a pending INIT or SIPI), then the registers.
//!
//! Order when writing: CPUID, TSC frequency, SREGS, REGS, XCRS, XSAVE, LAPIC, MSRs with the TSC
//! first and TSC_DEADLINE last (it is dropped if the LAPIC's timer is not yet in that mode; a 0
//! stays a 0: no timer was armed), debug registers, events, mp_state.
//!
//! The offsets between the vCPUs' TSCs are kept exactly, see [`VcpuState::restore_tsc_offset`].

use std::io;

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use crate::cpuid::{CpuidError, CpuidList};
use crate::kvm_ext;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Names of the KVM clock before 0x4b564d00; the same values as the new ones.
const MSR_OLD_KVMCLOCK: [u32; 2] = [0x11, 0x12];
/// KVM's own MSRs: clock, steal time, asynchronous page faults, ...
const MSR_KVM: std::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;
/// MSRs in one ioctl.
const BATCH: usize = 128;
/// Most MSRs that a saved state may have.
const MSRS_MAX: usize = 4096;

/// Why a vCPU's state cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// One part failed.
    #[error("cannot {action} the {what} of a vCPU")]
    Part {
        /// "save" or "restore".
        action: &'static str,
        /// Which part.
        what: &'static str,
        /// What the ioctl said.
        #[source]
        source: io::Error,
    },
    /// An MSR that this host does not take.
    #[error(
        "this host's KVM refuses MSR {index:#x} = {value:#x}: the VM needs a CPU model that both \
         hosts have"
    )]
    Msr {
        /// Which one.
        index: u32,
        /// The saved value.
        value: u64,
    },
    /// The CPU model.
    #[error("the CPU model cannot be set")]
    Cpuid(#[from] CpuidError),
    /// Nonsense.
    #[error("the saved state of a vCPU has {0} MSRs, more than there can be")]
    TooManyMsrs(usize),
}

fn part<E: Into<io::Error>>(
    action: &'static str,
    what: &'static str,
) -> impl FnOnce(E) -> VcpuStateError {
    move |source| VcpuStateError::Part { action, what, source: source.into() }
}

/// Which MSRs are saved: those of KVM's list that can be read on this host.
#[derive(Debug, Clone, Default)]
pub struct MsrIndices(Vec<u32>);

impl MsrIndices {
    /// Finds out with a vCPU that has its CPUID.
    ///
    /// # Errors
    /// [`VcpuStateError::Part`] if KVM does not list its MSRs.
    pub fn probe(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self, VcpuStateError> {
        let list = kvm.get_msr_index_list().map_err(part("save", "list of MSRs"))?;
        let mut indices: Vec<u32> = list.as_slice().to_vec();
        indices.extend(MSR_KVM);
        indices.retain(|index| !MSR_OLD_KVMCLOCK.contains(index));
        indices.sort_unstable_by_key(|index| msr_order(*index));
        indices.dedup();
        indices.retain(|index| {
            let entry = kvm_msr_entry { index: *index, ..Default::default() };
            Msrs::from_entries(&[entry])
                .is_ok_and(|mut msrs| vcpu.get_msrs(&mut msrs).is_ok_and(|count| count == 1))
        });
        Ok(Self(indices))
    }
}

/// The TSC first, its deadline last.
fn msr_order(index: u32) -> (u8, u32) {
    match index {
        MSR_TSC => (0, index),
        MSR_TSC_DEADLINE => (2, index),
        _ => (1, index),
    }
}

/// All state of a vCPU.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: CpuidList,
    tsc_khz: Option<u32>,
    tsc_offset: Option<u64>,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: Option<kvm_xcrs>,
    xsave: Vec<u8>,
    lapic: kvm_lapic_state,
    msrs: Vec<(u32, u64)>,
    debug_regs: kvm_debugregs,
}

impl VcpuState {
    /// Reads the state of a vCPU that is not in the guest. `cpuid` is what it was given,
    /// `xsave_size` what KVM_CAP_XSAVE2 says.
    ///
    /// # Errors
    /// [`VcpuStateError::Part`] with what failed.
    pub fn save(
        vcpu: &VcpuFd,
        cpuid: &CpuidList,
        indices: &MsrIndices,
        xsave_size: usize,
    ) -> Result<Self, VcpuStateError> {
        let failed = |what| move |source: kvm_ioctls::Error| part("save", what)(source);
        let events = vcpu.get_vcpu_events().map_err(failed("events"))?;
        let mp_state = vcpu.get_mp_state().map_err(failed("run state"))?;
        let regs = vcpu.get_regs().map_err(failed("registers"))?;
        let sregs = vcpu.get_sregs().map_err(failed("system registers"))?;
        let debug_regs = vcpu.get_debug_regs().map_err(failed("debug registers"))?;
        // A host without XSAVE has none, and takes none.
        let xcrs = vcpu.get_xcrs().ok().filter(|xcrs| xcrs.nr_xcrs > 0);
        let xsave = kvm_ext::get_xsave(vcpu, xsave_size).map_err(part("save", "XSAVE area"))?;
        let lapic = vcpu.get_lapic().map_err(failed("local APIC"))?;
        let msrs = get_msrs(vcpu, indices)?;
        let tsc_offset = kvm_ext::tsc_offset(vcpu).map_err(part("save", "TSC offset"))?;
        let tsc_khz = vcpu.get_tsc_khz().ok();
        let cpuid = cpuid.clone();
        Ok(Self {
            cpuid,
            tsc_khz,
            tsc_offset,
            events,
            mp_state,
            regs,
            sregs,
            xcrs,
            xsave,
            lapic,
            msrs,
            debug_regs,
        })
    }

    /// The CPU model that the vCPU had.
    #[must_use]
    pub fn cpuid(&self) -> &CpuidList {
        &self.cpuid
    }

    /// Writes the state to a vCPU that has not run yet, or, with `reset`, to one that has and keeps
    /// its CPUID (KVM takes no other then).
    ///
    /// # Errors
    /// [`VcpuStateError`] with what this host refuses; the vCPU is not usable then.
    pub fn restore(
        &self,
        vcpu: &VcpuFd,
        xsave_size: usize,
        reset: bool,
    ) -> Result<(), VcpuStateError> {
        let failed = |what| move |source: kvm_ioctls::Error| part("restore", what)(source);
        if !reset {
            let cpuid = self.cpuid.to_kvm()?;
            vcpu.set_cpuid2(&cpuid).map_err(failed("CPUID"))?;
            self.restore_tsc_frequency(vcpu);
        }
        vcpu.set_sregs(&self.sregs).map_err(failed("system registers"))?;
        vcpu.set_regs(&self.regs).map_err(failed("registers"))?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(failed("extended control registers"))?;
        }
        kvm_ext::set_xsave(vcpu, xsave_size, &self.xsave).map_err(part("restore", "XSAVE area"))?;
        vcpu.set_lapic(&self.lapic).map_err(failed("local APIC"))?;
        self.restore_msrs(vcpu)?;
        vcpu.set_debug_regs(&self.debug_regs).map_err(failed("debug registers"))?;
        vcpu.set_vcpu_events(&self.events).map_err(failed("events"))?;
        vcpu.set_mp_state(self.mp_state).map_err(failed("run state"))
    }

    /// A host that cannot scale to the saved frequency is no reason to lose the VM: its clock is
    /// KVM's, which knows each host's frequency.
    fn restore_tsc_frequency(&self, vcpu: &VcpuFd) {
        let (Some(saved), Ok(current)) = (self.tsc_khz, vcpu.get_tsc_khz()) else { return };
        if saved != current
            && let Err(error) = vcpu.set_tsc_khz(saved)
        {
            tracing::warn!(saved, current, %error, "the TSC runs at another frequency than before");
        }
    }

    fn restore_msrs(&self, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
        if self.msrs.len() > MSRS_MAX {
            return Err(VcpuStateError::TooManyMsrs(self.msrs.len()));
        }
        let mut ordered = self.msrs.clone();
        ordered.sort_by_key(|(index, _)| msr_order(*index));
        let mut rest = ordered.as_slice();
        while !rest.is_empty() {
            let batch = &rest[..rest.len().min(BATCH)];
            let entries: Vec<kvm_msr_entry> = batch
                .iter()
                .map(|(index, data)| kvm_msr_entry {
                    index: *index,
                    data: *data,
                    ..Default::default()
                })
                .collect();
            let msrs = Msrs::from_entries(&entries)
                .map_err(|_| VcpuStateError::TooManyMsrs(entries.len()))?;
            let done = vcpu.set_msrs(&msrs).map_err(part("restore", "MSRs"))?.min(batch.len());
            rest = &rest[done..];
            if let (true, Some(((index, value), after))) = (done < batch.len(), rest.split_first())
            {
                skip_msr(vcpu, *index, *value)?;
                rest = after;
            }
        }
        Ok(())
    }

    /// Makes the TSC of this vCPU differ from the first one's by as much as when they were saved:
    /// usually by nothing. Call it for all vCPUs after all were restored.
    ///
    /// # Errors
    /// [`VcpuStateError::Part`].
    pub fn restore_tsc_offset(
        &self,
        vcpu: &VcpuFd,
        first_saved: &Self,
        first: &VcpuFd,
    ) -> Result<(), VcpuStateError> {
        let failed = part("restore", "TSC offset");
        let now = kvm_ext::tsc_offset(first).map_err(part("restore", "TSC offset"))?;
        let (Some(now), Some(own), Some(base)) = (now, self.tsc_offset, first_saved.tsc_offset)
        else {
            return Ok(());
        };
        kvm_ext::set_tsc_offset(vcpu, now.wrapping_add(own.wrapping_sub(base))).map_err(failed)
    }
}

/// An MSR that cannot be written is no loss if it has the value already, or had none.
fn skip_msr(vcpu: &VcpuFd, index: u32, value: u64) -> Result<(), VcpuStateError> {
    let entry = kvm_msr_entry { index, ..Default::default() };
    let current = Msrs::from_entries(&[entry]).ok().and_then(|mut msrs| {
        let count = vcpu.get_msrs(&mut msrs).ok()?;
        (count == 1).then(|| msrs.as_slice().first().map(|entry| entry.data)).flatten()
    });
    if value == 0 || current == Some(value) {
        tracing::debug!(index, value, "MSR not restored: it is not writable");
        return Ok(());
    }
    Err(VcpuStateError::Msr { index, value })
}

fn get_msrs(vcpu: &VcpuFd, indices: &MsrIndices) -> Result<Vec<(u32, u64)>, VcpuStateError> {
    let mut values = Vec::with_capacity(indices.0.len());
    for batch in indices.0.chunks(BATCH) {
        let mut rest = batch;
        while !rest.is_empty() {
            let entries: Vec<kvm_msr_entry> = rest
                .iter()
                .map(|index| kvm_msr_entry { index: *index, ..Default::default() })
                .collect();
            let mut msrs = Msrs::from_entries(&entries)
                .map_err(|_| VcpuStateError::TooManyMsrs(entries.len()))?;
            let done = vcpu.get_msrs(&mut msrs).map_err(part("save", "MSRs"))?.min(rest.len());
            values.extend(msrs.as_slice().iter().take(done).map(|entry| (entry.index, entry.data)));
            // One that could be read when the machine was made and no more is one that the guest
            // gave up; it has no value to keep.
            rest = rest.get(done + 1..).unwrap_or(&[]);
            if done < entries.len() {
                tracing::debug!(index = entries[done].index, "MSR not saved: it cannot be read");
            }
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tsc_comes_first_and_its_deadline_last() {
        let mut indices = [MSR_TSC_DEADLINE, 0xc000_0080, 0x4b56_4d01, MSR_TSC, 1];
        indices.sort_unstable_by_key(|index| msr_order(*index));
        assert_eq!(indices, [MSR_TSC, 1, 0x4b56_4d01, 0xc000_0080, MSR_TSC_DEADLINE]);
    }
}
