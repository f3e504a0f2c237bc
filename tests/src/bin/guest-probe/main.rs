//! The program in the test guest: answers on TCP port 7777, checks its memory all the time, writes
//! numbered records to its disk, and powers off at the power button. `std` and libc only: it is
//! the whole user space of a guest that may run on emulated hardware inside emulated hardware.
//!
//! Settings come on the kernel command line: `probe.memory-mib=64 probe.memory-rate=4
//! probe.record-ms=100 probe.count-ms=0`. With a count it prints `COUNT N` that often.

mod button;
mod memory;
mod records;
mod second;
mod server;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use tests::guest::client::{SecondDisk, Status};

/// What the threads know of each other.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    memory_rounds: AtomicU64,
    memory_errors: AtomicU64,
    last_record: AtomicU64,
    disk_error: Mutex<String>,
    second_disk: Option<SecondDisk>,
}

impl Shared {
    fn set_disk_error(&self, text: String) {
        eprintln!("guest-probe: {text}");
        *self.disk_error.lock().unwrap_or_else(PoisonError::into_inner) = text;
    }

    fn status(&self) -> Status {
        Status {
            boot_id: boot_id(),
            cpus: u64::try_from(thread::available_parallelism().map_or(0, usize::from))
                .unwrap_or(0),
            uptime_ms: clock_ns(libc::CLOCK_BOOTTIME) / 1_000_000,
            memory_rounds: self.memory_rounds.load(Ordering::Relaxed),
            memory_errors: self.memory_errors.load(Ordering::Relaxed),
            last_record: self.last_record.load(Ordering::Relaxed),
            disk_error: self.disk_error.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            second_disk: self.second_disk.clone(),
        }
    }
}

fn main() -> std::io::Result<()> {
    let second_disk = second::look().unwrap_or_else(|error| {
        eprintln!("guest-probe: the second disk: {error}");
        None
    });
    let shared = Arc::new(Shared { second_disk, ..Shared::default() });
    let memory_mib = setting("probe.memory-mib", 64);
    let rate_mib_s = setting("probe.memory-rate", 4);
    let record_ms = setting("probe.record-ms", 100);
    if memory_mib > 0 {
        let shared = Arc::clone(&shared);
        thread::spawn(move || memory::keep_checking(&shared, memory_mib, rate_mib_s));
    }
    let for_disk = Arc::clone(&shared);
    thread::spawn(move || {
        if let Err(error) = records::keep_writing(&for_disk, record_ms) {
            for_disk.set_disk_error(format!("no more records: {error}"));
        }
    });
    thread::spawn(button::watch);
    let count_ms = setting("probe.count-ms", 0);
    if count_ms > 0 {
        thread::spawn(move || count(count_ms));
    }
    server::serve(&shared)
}

/// Counts on the console for ever, so that what is seen there shows a gap or a restart.
fn count(every_ms: u64) {
    for number in 1_u64.. {
        println!("COUNT {number}");
        thread::sleep(std::time::Duration::from_millis(every_ms));
    }
}

/// The kernel's boot id.
fn boot_id() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

/// A clock, nanoseconds.
fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec that the call may write to.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    let part = |number: i64| u64::try_from(number).unwrap_or(0);
    part(time.tv_sec) * 1_000_000_000 + part(time.tv_nsec)
}

/// `name=NUMBER` on the kernel command line.
fn setting(name: &str, default: u64) -> u64 {
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    line.split_whitespace()
        .filter_map(|word| word.split_once('='))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.parse().ok())
        .unwrap_or(default)
}
