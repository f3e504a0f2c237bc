//! A promise that was seen broken (two writers of one disk) stays seen: a suite that passes at a
//! second try does not hide it. One line each in the file that `tests/run` names, which fails by it.

use std::io::Write;

/// The environment variable that names the file.
pub const FILE_VARIABLE: &str = "HOLDFAST_VIOLATIONS";

/// Records a broken promise.
///
/// # Panics
/// If the file cannot be written.
pub fn report(what: &str) {
    println!("VIOLATION: {what}");
    let Some(path) = std::env::var_os(FILE_VARIABLE) else { return };
    let file = std::fs::OpenOptions::new().append(true).create(true).open(&path);
    let written = file.and_then(|mut file| writeln!(file, "VIOLATION: {what}"));
    assert!(written.is_ok(), "cannot record it in {}: {written:?}", path.display());
}
