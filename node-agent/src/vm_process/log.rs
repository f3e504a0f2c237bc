//! The process's own log: standard error, a file that the agent opened. Bounded, since a guest can
//! cause messages without end.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::unistd::ftruncate;
use tracing_subscriber::EnvFilter;

/// The file is cut when it has grown by this.
const LIMIT_BYTES: u64 = 4 << 20;

static WRITTEN: AtomicU64 = AtomicU64::new(0);

/// Sends this process's messages there; `RUST_LOG` says which.
pub(super) fn install() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false);
    // Fails only where a subscriber is set already, which then takes the logs.
    let _ = logs.with_writer(|| Bounded).try_init();
}

/// Standard error, which was opened for appending.
struct Bounded;

impl Write for Bounded {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let length = text.len() as u64;
        let before = WRITTEN.fetch_add(length, Ordering::Relaxed);
        if before / LIMIT_BYTES != before.saturating_add(length) / LIMIT_BYTES {
            // Not a file where a person runs this by hand: then nothing needs cutting.
            let _ = ftruncate(io::stderr(), 0);
        }
        io::stderr().write(text)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
