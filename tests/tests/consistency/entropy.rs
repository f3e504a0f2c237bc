//! The system's randomness, made repeatable on simulation threads: election timeouts, the order in
//! which branches of a `select!` are polled, hash maps, TLS keys. All of them begin at `getrandom`.

use std::cell::RefCell;
use std::ffi::{c_uint, c_void};

use super::rng::Rng;

thread_local! {
    static SEEDED: RefCell<Option<Rng>> = const { RefCell::new(None) };
}

/// From here on this thread's randomness comes from the seed. To be called on a fresh thread: what
/// was drawn before stays.
pub(crate) fn seed_this_thread(seed: u64) {
    SEEDED.with(|seeded| *seeded.borrow_mut() = Some(Rng::new(seed)));
}

fn seeded_bytes(buffer: &mut [u8]) -> bool {
    SEEDED
        .try_with(|seeded| {
            let Ok(mut seeded) = seeded.try_borrow_mut() else { return false };
            let Some(rng) = seeded.as_mut() else { return false };
            for chunk in buffer.chunks_mut(8) {
                let bytes = rng.next().to_le_bytes();
                chunk.copy_from_slice(&bytes[..chunk.len()]);
            }
            true
        })
        .unwrap_or(false)
}

/// Stands in for libc's function in this test's binary alone.
///
/// # Safety
/// As getrandom(2): `buffer` is valid for writes of `length` bytes.
// SAFETY: the symbol has libc's signature and meaning; no other in this binary has its name.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn getrandom(
    buffer: *mut c_void,
    length: usize,
    flags: c_uint,
) -> isize {
    if !buffer.is_null() && length > 0 {
        // SAFETY: the caller gives a buffer of this length, by getrandom's contract; it is only
        // written to, and bytes have no invalid values.
        let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
        if seeded_bytes(bytes) {
            return isize::try_from(length).unwrap_or(isize::MAX);
        }
    }
    // SAFETY: the arguments are the caller's own, passed on unchanged.
    let got = unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) };
    isize::try_from(got).unwrap_or(-1)
}
