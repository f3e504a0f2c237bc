//! The shutdowns that wait for their guests, so that a stop or a reset need not wait for them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proto::Name;
use tokio::sync::watch;

/// What takes a shutdown's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Overrule {
    /// Who asked for what, for the shutdown's task.
    pub(super) why: String,
    /// It ends the VM as well, so that nothing says meanwhile that the VM runs on.
    pub(super) ends: bool,
}

type Waiting = BTreeMap<Name, Vec<Arc<watch::Sender<Option<Overrule>>>>>;

/// The shutdowns under way at this node. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Shutdowns {
    waiting: Arc<Mutex<Waiting>>,
}

impl Shutdowns {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A shutdown begins; it is under way until the returned value is dropped.
    pub(super) fn begin(&self, vm: &Name) -> Shutdown {
        let overruled = Arc::new(watch::Sender::new(None));
        self.lock().entry(vm.clone()).or_default().push(overruled.clone());
        Shutdown { all: self.clone(), vm: vm.clone(), overruled }
    }

    /// Ends every shutdown of this VM; says how many there were.
    pub(super) fn overrule(&self, vm: &Name, overrule: &Overrule) -> usize {
        let waiting = self.lock();
        let of_vm = waiting.get(vm).map(Vec::as_slice).unwrap_or_default();
        for shutdown in of_vm {
            shutdown.send_if_modified(|present| {
                let first = present.is_none();
                present.get_or_insert_with(|| overrule.clone());
                first
            });
        }
        of_vm.len()
    }
}

/// One shutdown.
#[derive(Debug)]
pub(super) struct Shutdown {
    all: Shutdowns,
    vm: Name,
    overruled: Arc<watch::Sender<Option<Overrule>>>,
}

impl Shutdown {
    /// Waits until something takes its place.
    pub(super) async fn overruled(&self) -> Overrule {
        let mut watch = self.overruled.subscribe();
        let overrule = watch.wait_for(Option::is_some).await.ok().and_then(|told| told.clone());
        match overrule {
            Some(overrule) => overrule,
            // The sender lives in `self`: this does not happen.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Shutdown {
    fn drop(&mut self) {
        let mut waiting = self.all.lock();
        if let Some(of_vm) = waiting.get_mut(&self.vm) {
            of_vm.retain(|other| !Arc::ptr_eq(other, &self.overruled));
            if of_vm.is_empty() {
                waiting.remove(&self.vm);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_of_the_vms_shutdowns_are_overruled_and_no_others() {
        let shutdowns = Shutdowns::default();
        let (web, db): (Name, Name) = ("web".parse().unwrap(), "db".parse().unwrap());
        let (first, second) = (shutdowns.begin(&web), shutdowns.begin(&web));
        let other = shutdowns.begin(&db);
        let stop = Overrule { why: "stop asked by ann".into(), ends: true };
        assert_eq!(shutdowns.overrule(&web, &stop), 2);
        let reset = Overrule { why: "reset asked by bob".into(), ends: false };
        assert_eq!(shutdowns.overrule(&web, &reset), 2);
        assert_eq!((first.overruled().await, second.overruled().await), (stop.clone(), stop));
        tokio::select! {
            biased;
            overrule = other.overruled() => panic!("{overrule:?}"),
            () = std::future::ready(()) => {}
        }
        drop((first, second));
        assert_eq!(shutdowns.overrule(&web, &reset), 0);
        drop(other);
        assert!(shutdowns.lock().is_empty());
    }
}
