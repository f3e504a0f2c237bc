//! KVM ioctls that kvm-ioctls does not have: KVM_CLEAR_DIRTY_LOG, extended state of any size
//! (KVM_GET_XSAVE2 into a buffer), and a vCPU's TSC offset.
//!
//! Facts are from the kernel's Documentation/virt/kvm/api.rst and include/uapi/linux/kvm.h.

use std::io;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_device_attr, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Clears the dirty bits that are set in `bitmap` (bit 0 of word 0 is `first_page` of the slot)
/// and protects those pages again. Needs manual dirty log protection.
///
/// # Errors
/// What the ioctl says; EINVAL if `first_page` is no multiple of 64.
pub fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    num_pages: u32,
    bitmap: &mut [u64],
) -> io::Result<()> {
    if u64::from(num_pages) > 64 * bitmap.len() as u64 {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let mut clear = kvm_clear_dirty_log {
        slot,
        num_pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bitmap.as_mut_ptr().cast(),
        },
    };
    // SAFETY: the bitmap holds at least `num_pages` bits, rounded up to words, as checked above,
    // and outlives the call; the kernel only reads it.
    checked(unsafe { ioctl_with_mut_ref(vm, KVM_CLEAR_DIRTY_LOG(), &mut clear) })
}

/// Smallest buffer that KVM_GET_XSAVE2 and KVM_SET_XSAVE may touch.
const XSAVE_MIN: usize = 4096;

/// The extended state (x87, SSE, AVX, ...) of a vCPU. `size` is what KVM_CAP_XSAVE2 of the VM says;
/// a smaller number means the host has only the classic 4096 bytes.
///
/// # Errors
/// What the ioctl says.
pub fn get_xsave(vcpu: &VcpuFd, size: usize) -> io::Result<Vec<u8>> {
    if size <= XSAVE_MIN {
        let xsave = vcpu.get_xsave().map_err(io::Error::from)?;
        return Ok(xsave.region.iter().flat_map(|word| word.to_ne_bytes()).collect());
    }
    let mut words = vec![0u64; size.div_ceil(8)];
    // SAFETY: the kernel writes as many bytes as KVM_CAP_XSAVE2 reported, which is `size`.
    checked(unsafe { ioctl_with_ptr_mut(vcpu, KVM_GET_XSAVE2(), &mut words) })?;
    Ok(words.iter().flat_map(|word| word.to_ne_bytes()).collect())
}

/// Sets the extended state. `size` is what KVM_CAP_XSAVE2 of this VM says.
///
/// # Errors
/// `InvalidInput` if the state is larger than this host's; else what the ioctl says.
pub fn set_xsave(vcpu: &VcpuFd, size: usize, state: &[u8]) -> io::Result<()> {
    let size = size.max(XSAVE_MIN);
    if state.len() > size.next_multiple_of(8) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "the extended processor state has {} bytes, this host's KVM takes {size}: \
                 use a CPU model that both hosts have",
                state.len()
            ),
        ));
    }
    let mut words = vec![0u64; size.div_ceil(8)];
    for (word, bytes) in words.iter_mut().zip(state.chunks(8)) {
        let mut whole = [0; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_ne_bytes(whole);
    }
    // SAFETY: the buffer has at least 4096 bytes and at least as many as KVM_CAP_XSAVE2 reported,
    // which is all that the kernel reads.
    checked(unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE(), words.as_ptr().cast::<kvm_xsave>()) })
}

/// # Safety
/// The ioctl must write no more than `words` holds.
unsafe fn ioctl_with_ptr_mut(vcpu: &VcpuFd, request: libc::c_ulong, words: &mut [u64]) -> i32 {
    // SAFETY: by this function's contract.
    unsafe {
        vmm_sys_util::ioctl::ioctl_with_mut_ptr(
            vcpu,
            request,
            words.as_mut_ptr().cast::<kvm_xsave>(),
        )
    }
}

fn tsc_offset_attr(address: *const u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: address as u64,
        ..Default::default()
    }
}

/// What KVM adds to the host's TSC for this vCPU; none where the host's KVM cannot say.
///
/// # Errors
/// What the ioctl says.
pub fn tsc_offset(vcpu: &VcpuFd) -> io::Result<Option<u64>> {
    let mut offset = 0u64;
    let attribute = tsc_offset_attr(&raw mut offset);
    // SAFETY: the kernel only looks whether it knows the attribute.
    if checked(unsafe { ioctl_with_ref(vcpu, KVM_HAS_DEVICE_ATTR(), &attribute) }).is_err() {
        return Ok(None);
    }
    // SAFETY: the kernel writes 8 bytes to `addr`, which is `offset`, alive until after the call.
    checked(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) })?;
    Ok(Some(offset))
}

/// Sets what KVM adds to the host's TSC for this vCPU.
///
/// # Errors
/// What the ioctl says.
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> io::Result<()> {
    let attribute = tsc_offset_attr(&raw const offset);
    // SAFETY: the kernel reads 8 bytes from `addr`, which is `offset`, alive until after the call.
    checked(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) })
}

/// Sends `signal` to a thread of this process.
///
/// # Errors
/// What pthread_kill says.
pub(crate) fn signal_thread(thread: libc::pthread_t, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: the caller keeps the thread joinable (its JoinHandle is not yet joined), so that the
    // id names it.
    match unsafe { libc::pthread_kill(thread, signal) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}
