//! One thing at a time for each VM: who works on a VM's process or placement here holds its job.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use proto::Name;
use tokio::sync::Notify;

/// The VMs that are being worked on at this node. Clones share the set.
#[derive(Debug, Clone, Default)]
pub struct Jobs {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    held: Mutex<BTreeSet<Name>>,
    freed: Notify,
}

/// Held while a VM is worked on; dropped, it lets the next one in.
#[derive(Debug)]
pub struct Job {
    shared: Arc<Shared>,
    vm: Name,
}

impl Jobs {
    /// The VM's job, if nobody has it.
    #[must_use]
    pub fn try_begin(&self, vm: &Name) -> Option<Job> {
        let mut held = self.shared.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.insert(vm.clone()).then(|| Job { shared: self.shared.clone(), vm: vm.clone() })
    }

    /// Waits for the VM's job.
    pub async fn begin(&self, vm: &Name) -> Job {
        loop {
            let freed = self.shared.freed.notified();
            tokio::pin!(freed);
            // Registered before the look, so that a release in between is not missed.
            freed.as_mut().enable();
            if let Some(job) = self.try_begin(vm) {
                return job;
            }
            freed.await;
        }
    }

    /// Waits until some job has ended.
    pub async fn freed(&self) {
        self.shared.freed.notified().await;
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.shared.held.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.vm);
        self.shared.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_second_waits_for_the_first() {
        let jobs = Jobs::default();
        let vm: Name = "web".parse().unwrap();
        let first = jobs.try_begin(&vm).unwrap();
        assert!(jobs.try_begin(&vm).is_none());
        assert!(jobs.try_begin(&"db".parse().unwrap()).is_some());
        let waiting = tokio::spawn({
            let (jobs, vm) = (jobs.clone(), vm.clone());
            async move { drop(jobs.begin(&vm).await) }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(first);
        waiting.await.unwrap();
        assert!(jobs.try_begin(&vm).is_some());
    }
}
