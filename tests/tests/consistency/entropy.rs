//! The system's randomness and clocks, made repeatable on simulation threads. Election timeouts, the
//! order in which branches of a `select!` are polled, hash maps, TLS keys: all of them begin at
//! `getrandom`. Members count their deadlines on tokio's clock; what lies under them (HTTP/2's memory
//! of streams that were reset, certificates' validity) asks `clock_gettime`.

use std::cell::{Cell, RefCell};
use std::ffi::{c_int, c_uint, c_void};

use super::rng::Rng;

thread_local! {
    static SEEDED: RefCell<Option<Rng>> = const { RefCell::new(None) };
    static NOW_MS: Cell<Option<u64>> = const { Cell::new(None) };
}

/// When each simulation begins: seconds since 1970, 1 November 2026.
const EPOCH_S: u64 = 1_793_491_200;
/// The same on clocks that count from the machine's start, seconds. Earlier than the real ones: a
/// deadline that is really waited for has passed.
const UPTIME_S: u64 = 1000;

/// From here on this thread's randomness comes from the seed. To be called on a fresh thread: what
/// was drawn before stays.
pub(crate) fn seed_this_thread(seed: u64) {
    SEEDED.with(|seeded| *seeded.borrow_mut() = Some(Rng::new(seed)));
    set_clock(0);
}

/// What this thread's clocks show from now on, milliseconds since the simulation began.
pub(crate) fn set_clock(now_ms: u64) {
    NOW_MS.with(|now| now.set(Some(now_ms)));
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

/// What a clock shows in the simulation on this thread, if there is one.
fn simulated(clock: libc::clockid_t) -> Option<libc::timespec> {
    let now_ms = NOW_MS.try_with(Cell::get).ok()??;
    let began_s = match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE => EPOCH_S,
        libc::CLOCK_MONOTONIC
        | libc::CLOCK_MONOTONIC_COARSE
        | libc::CLOCK_MONOTONIC_RAW
        | libc::CLOCK_BOOTTIME => UPTIME_S,
        _ => return None,
    };
    Some(libc::timespec {
        tv_sec: i64::try_from(began_s + now_ms / 1000).ok()?,
        tv_nsec: i64::try_from(now_ms % 1000 * 1_000_000).ok()?,
    })
}

/// Stands in for libc's function in this test's binary alone.
///
/// # Safety
/// As clock_gettime(2): `time` is valid for a write.
// SAFETY: the symbol has libc's signature and meaning; no other in this binary has its name.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn clock_gettime(
    clock: libc::clockid_t,
    time: *mut libc::timespec,
) -> c_int {
    if let Some(now) = simulated(clock).filter(|_| !time.is_null()) {
        // SAFETY: the caller gives room for one, by clock_gettime's contract.
        unsafe { time.write(now) };
        return 0;
    }
    // SAFETY: the arguments are the caller's own, passed on unchanged.
    let got = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) };
    c_int::try_from(got).unwrap_or(-1)
}
