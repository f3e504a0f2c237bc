//! The lines of a VM's history: when, and what happened. The time is for people only.

/// An event with the time in front.
#[must_use]
pub fn stamped(event: &str) -> String {
    let now = humantime::format_rfc3339_seconds(std::time::SystemTime::now());
    format!("{now} {event}")
}
