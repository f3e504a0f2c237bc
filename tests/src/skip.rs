//! Tests that cannot run here say so: one line per test in the file that `tests/run` names, which
//! prints and counts them. Nothing is ever skipped silently.

use std::io::Write;

/// The environment variable that names the file.
pub const FILE_VARIABLE: &str = "HOLDFAST_SKIPPED";

/// Records that the calling test (libtest names its thread after it) did not run, and why.
///
/// # Panics
/// As [`skip`].
pub fn this_test(reason: &str) {
    skip(std::thread::current().name().unwrap_or("a test without a name"), reason);
}

/// Records that `test` did not run, and why.
///
/// # Panics
/// If the file cannot be written: a skip that nobody sees must not pass.
pub fn skip(test: &str, reason: &str) {
    let line = format!("SKIPPED: {test}: {reason}\n");
    print!("{line}");
    let Some(path) = std::env::var_os(FILE_VARIABLE) else { return };
    let file = std::fs::OpenOptions::new().append(true).create(true).open(&path);
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
    assert!(written.is_ok(), "cannot record the skip in {}: {written:?}", path.display());
}
