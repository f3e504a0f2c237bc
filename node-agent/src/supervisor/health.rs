//! Whether a VM's process still lives: it is asked every few seconds, and answers for its vCPUs too.
//!
//! A process that hangs keeps its VM's disks locked and its name in use, and nothing else would
//! ever end it: its own deadline thread may hang with it, and the lease of its node goes on. That
//! of an HA VM is killed, which its owner tells and the plan answers with a new start. That of
//! another VM is left to people, as everything about such a VM is.

use std::time::Duration;

use super::{ExitReason, Live, SupervisorConfig};

impl Live {
    /// Looks after the process until it hangs and, being an HA VM's, has been killed. Where that
    /// does not happen this never returns.
    pub(super) async fn watch_health(&self, config: &SupervisorConfig) {
        let mut misses = Misses::new(config);
        loop {
            let status = self.refresh_within(config.probe_every).await;
            let silent = status.map(|status| Duration::from_millis(status.silent_ms));
            if let Some(why) = misses.note(silent)
                && self.end_if_ha(&why)
            {
                return;
            }
            tokio::time::sleep(config.probe_every).await;
        }
    }

    /// `false`: it goes on.
    fn end_if_ha(&self, why: &str) -> bool {
        let vm = &self.state.name;
        if !self.state.ha {
            tracing::warn!(%vm, "its process hangs: {why}; `clusterctl vm stop {vm}` ends it");
            return false;
        }
        tracing::error!(%vm, "its process hangs: {why}; killing it, to be started again");
        match self.kill_as(ExitReason::Hung(why.to_owned())) {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(%vm, "{error}");
                false
            }
        }
    }
}

/// Counts looks that found no life. By looks and not by the clock: an agent that did not run for an
/// hour has not asked for an hour.
#[derive(Debug)]
struct Misses {
    limit: u32,
    hang_limit: Duration,
    count: u32,
    told: bool,
}

impl Misses {
    fn new(config: &SupervisorConfig) -> Self {
        // A look that fails takes as long as the pause after it.
        let look_ms = (config.probe_every.as_millis() * 2).max(1);
        let looks = config.hang_limit.as_millis().div_ceil(look_ms);
        let limit = u32::try_from(looks).unwrap_or(u32::MAX).max(2);
        Self { limit, hang_limit: config.hang_limit, count: 0, told: false }
    }

    /// Takes one look: for how long a vCPU was silent, or `None` for no answer. Says once, until it
    /// lives again, why the process hangs.
    fn note(&mut self, silent: Option<Duration>) -> Option<String> {
        let why = match silent {
            None => {
                self.count += 1;
                let seconds = self.hang_limit.as_secs();
                (self.count >= self.limit).then(|| format!("it does not answer for {seconds} s"))
            }
            Some(silent) => {
                self.count = 0;
                let seconds = silent.as_secs();
                (silent >= self.hang_limit)
                    .then(|| format!("a vCPU gave no sign of life for {seconds} s"))
            }
        };
        let tell = why.is_some() && !self.told;
        self.told = why.is_some();
        why.filter(|_| tell)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_missed_looks_in_a_row_are_a_hang() {
        let mut misses = Misses::new(&SupervisorConfig::new("/nowhere"));
        assert_eq!(misses.limit, 3, "30 s by looks that take 10 s each");
        let lives = Some(Duration::ZERO);
        assert_eq!(
            [None, None, lives, None, None].map(|look| misses.note(look)),
            [const { None }; 5]
        );
        assert_eq!(misses.note(None).as_deref(), Some("it does not answer for 30 s"));
        assert_eq!(misses.note(None), None, "said once");
        assert_eq!(misses.note(lives), None);
        assert_eq!(misses.note(Some(Duration::from_secs(29))), None);
        let silent = misses.note(Some(Duration::from_secs(30)));
        assert_eq!(silent.as_deref(), Some("a vCPU gave no sign of life for 30 s"));
    }
}
