//! Ports for members that tests stop and start again. A port that the kernel chooses may meanwhile
//! become that of somebody's outgoing connection, and stay taken for as long as that lasts; these
//! lie below the range from which the kernel takes those (`ip_local_port_range`, from 32768 on).

use std::net::TcpListener;
use std::sync::atomic::{AtomicU32, Ordering};

/// A loopback port that nobody listens on, and that this process has not given out before.
///
/// # Panics
/// If none is free.
#[must_use]
pub fn free_port() -> u16 {
    const FIRST: u32 = 10_000;
    const COUNT: u32 = 22_000;
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    // Processes with ids in a row begin far from each other.
    let start = std::process::id().wrapping_mul(7_919);
    for _ in 0..COUNT {
        let step = GIVEN.fetch_add(1, Ordering::Relaxed);
        let port = FIRST + start.wrapping_add(step) % COUNT;
        let Ok(port) = u16::try_from(port) else { continue };
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no port of {FIRST} to {} is free", FIRST + COUNT);
}
