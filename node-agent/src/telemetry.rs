//! Logs to standard error, and the messages to the service manager.
//!
//! Never fails an agent: a node without systemd (an initramfs, a container) runs the same.

use tracing_subscriber::EnvFilter;

use crate::config::Log;

/// Installs tracing's subscriber once; `RUST_LOG` overrides the configured filter.
pub fn install(log: &Log) {
    let filter = EnvFilter::try_from_default_env()
        .or_else(|_| EnvFilter::try_new(&log.filter))
        .unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let installed =
        if log.json { builder.json().try_init() } else { builder.with_ansi(false).try_init() };
    // A second call (tests) keeps the first subscriber.
    drop(installed);
}

/// Tells systemd that the agent is up, and pets systemd's own watchdog if the unit asks for it.
pub fn notify_ready() {
    notify(&[sd_notify::NotifyState::Ready]);
    let Some(period) = sd_notify::watchdog_enabled() else { return };
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(period / 3);
        loop {
            ticks.tick().await;
            notify(&[sd_notify::NotifyState::Watchdog]);
        }
    });
}

/// Tells systemd that the agent is going; its VMs stay.
pub fn notify_stopping() {
    notify(&[sd_notify::NotifyState::Stopping]);
}

/// Tells systemd, and whoever asks for the unit's status, what the agent is doing.
pub fn notify_status(text: &str) {
    notify(&[sd_notify::NotifyState::Status(text)]);
}

fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return;
    }
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!("cannot notify the service manager: {error}");
    }
}
