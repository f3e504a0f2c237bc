//! What an operator can choose for the whole cluster.

use serde::{Deserialize, Serialize};

use crate::lease::Timing;

/// What an operator can choose. The defaults are the product's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Live migrations under way at once in the whole cluster, those of people included.
    pub parallel_migrations: usize,
    /// Of these, those that one node takes part in, as source or target.
    pub node_migrations: usize,
    /// Starts under way at once in the whole cluster.
    pub parallel_starts: usize,
    /// Of these, those on one node.
    pub node_starts: usize,
    /// Wait after a failed start; doubled by each further one, at most 64 times it. The owner
    /// forgets the failures when the VM has run for a while.
    pub start_backoff_ms: u64,
    /// Wait after a failed migration; doubled by each further one, at most 64 times it.
    pub migration_backoff_ms: u64,
    /// What happens to the HA VMs of a node that is shut down or rebooted as planned.
    pub shutdown: Shutdown,
    /// A frozen VM whose node has been silent for so long is started elsewhere.
    pub frozen_limit_ms: u64,
    /// How load is counted.
    pub balance: Balance,
    /// A VM that is started by a person goes to the least loaded node instead of where it was.
    pub rebalance_on_start: bool,
    /// Running VMs are moved when the load is uneven.
    pub auto_rebalance: bool,
    /// Uneven: the highest and the lowest load differ by so much of a node, in percent; counted by
    /// VMs ([`Balance::Count`]), by two VMs or more.
    pub rebalance_threshold_percent: u64,
    /// For so long, without a break, before something is moved.
    pub rebalance_hold_ms: u64,
    /// A move that evens the load out by less, in percent of a node, is not worth it.
    pub rebalance_gain_percent: u64,
    /// A node that can be switched off from outside is, when it has been silent for so long.
    pub power_fence_after_ms: u64,
    /// HA VMs run only on nodes that a watchdog resets when they hang, or that something outside
    /// can switch off.
    pub require_watchdog: bool,
}

/// What happens to the HA VMs of a node that is shut down or rebooted as planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shutdown {
    /// They move while they run, and return when the node is back.
    #[default]
    Migrate,
    /// They are stopped, and started elsewhere at once.
    Failover,
    /// They are stopped, and started again on the node when it is back.
    Freeze,
    /// Reboot: freeze; shutdown: failover.
    Conditional,
}

/// How load is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// By the number of VMs.
    #[default]
    Count,
    /// By what VMs are configured with: the larger of the share of the CPUs and of the memory.
    Static,
    /// By what they use, in the same way; what is not known is taken from the configuration.
    Dynamic,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            parallel_migrations: 8,
            node_migrations: 2,
            parallel_starts: 64,
            node_starts: 8,
            start_backoff_ms: 2_000,
            migration_backoff_ms: 5_000,
            shutdown: Shutdown::default(),
            frozen_limit_ms: 600_000,
            balance: Balance::default(),
            rebalance_on_start: false,
            auto_rebalance: false,
            rebalance_threshold_percent: 20,
            rebalance_hold_ms: 60_000,
            rebalance_gain_percent: 10,
            power_fence_after_ms: power_fence_after_ms(Timing::default()),
            require_watchdog: true,
        }
    }
}

/// Half a heartbeat after the moment it is called unknown: a leader that was just elected must have
/// heard all that are well by then.
fn power_fence_after_ms(timing: Timing) -> u64 {
    timing.unknown_after_ms() + timing.heartbeat_interval_ms() / 2
}

impl Policy {
    /// The defaults, where the lease time is another.
    #[must_use]
    pub fn with_timing(timing: Timing) -> Self {
        Self { power_fence_after_ms: power_fence_after_ms(timing), ..Self::default() }
    }

    /// How long to wait after so many failed starts, 1 or more.
    #[must_use]
    pub fn start_backoff_ms(&self, failures: u32) -> u64 {
        doubled(self.start_backoff_ms, failures)
    }

    pub(crate) fn migration_backoff_ms(&self, failures: u32) -> u64 {
        doubled(self.migration_backoff_ms, failures)
    }
}

/// `first_ms`, doubled by each failure after the first, at most 64 times it.
fn doubled(first_ms: u64, failures: u32) -> u64 {
    first_ms.saturating_mul(1 << failures.saturating_sub(1).min(6))
}
