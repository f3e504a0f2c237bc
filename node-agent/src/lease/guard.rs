//! The watchdog in this agent's hands: taken over, petted, given back.
//!
//! Owns the open device. Decides nothing about leases: the caller says each time what is allowed.
//!
//! Invariant: to open a watchdog is to pet it, so it is not opened when it may not be petted.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::config::Watchdog as Choice;
use crate::watchdog::Watchdog;

/// What the watchdog is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Duty {
    /// It is not known yet whether this node is a member: one that an earlier agent left running is
    /// taken over, none is started.
    Keep,
    /// This node belongs to no cluster: one that was left running is stopped.
    Release,
    /// This node is a member: one is started.
    Guard,
}

/// What the leases allow at present.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowed {
    /// To give the machine another timeout.
    pub(super) pet: bool,
    /// No HA VM process is alive: to stop it.
    pub(super) stop: bool,
}

/// An open, running watchdog.
pub(super) trait Device {
    /// Starts its time anew.
    fn pet(&self) -> io::Result<()>;
    /// Stops it; `false`: it cannot be stopped while it is open.
    fn stop(&self) -> bool;
    /// Stops it for good.
    fn disarm(self);
    fn identity(&self) -> String;
}

/// Where a watchdog comes from.
pub(super) trait Source {
    type Device: Device;
    /// Whether one may be running that this agent has not opened. Starts none.
    fn may_be_armed(&self) -> bool;
    /// Opens and so starts it; `None` where there is none to be had, or is to be none.
    fn open(&self) -> Option<Self::Device>;
}

impl Device for Watchdog {
    fn pet(&self) -> io::Result<()> {
        Self::pet(self)
    }
    fn stop(&self) -> bool {
        Self::stop(self)
    }
    fn disarm(self) {
        Self::disarm(self);
    }
    fn identity(&self) -> String {
        Self::identity(self)
    }
}

/// The watchdog that the configuration names.
#[derive(Debug, Clone)]
pub(super) struct Configured {
    pub(super) choice: Choice,
    pub(super) timeout: Duration,
}

impl Configured {
    fn device(&self) -> Option<&Path> {
        match &self.choice {
            Choice::Device(path) => Some(path),
            Choice::None | Choice::Auto => None,
        }
    }
}

impl Source for Configured {
    type Device = Watchdog;

    fn may_be_armed(&self) -> bool {
        self.choice != Choice::None && Watchdog::may_be_armed(self.device())
    }

    fn open(&self) -> Option<Watchdog> {
        if self.choice == Choice::None {
            return None;
        }
        match Watchdog::open(self.device(), self.timeout) {
            Ok(watchdog) => {
                tracing::info!(
                    "the watchdog `{}` resets this node {} s after the last sign of life",
                    watchdog.identity(),
                    watchdog.timeout().as_secs()
                );
                if watchdog.has_reset_this_machine() {
                    tracing::warn!(
                        "this machine's last start was a reset by its watchdog: for that long \
                         no sign of life had come"
                    );
                }
                Some(watchdog)
            }
            Err(error) => {
                tracing::warn!("{error}; HA VMs are guarded by the lease alone");
                None
            }
        }
    }
}

/// The watchdog, or its absence, for the agent's whole life.
#[derive(Debug)]
pub(super) struct Guard<S: Source> {
    source: S,
    duty: Duty,
    held: Option<S::Device>,
    /// Opening it was tried, or is of no use, for the present duty.
    tried: bool,
    /// It was tried to stop it, in vain.
    unstoppable: bool,
    pet_every: Duration,
    next_pet: Instant,
    identity: watch::Sender<String>,
}

impl<S: Source> Guard<S> {
    /// Nothing is held yet.
    pub(super) fn new(source: S, pet_every: Duration, now: Instant) -> Self {
        Self {
            source,
            duty: Duty::Keep,
            held: None,
            tried: false,
            unstoppable: false,
            pet_every,
            next_pet: now,
            identity: watch::Sender::new(String::new()),
        }
    }

    /// What guards this node as a member; empty: nothing (yet).
    pub(super) fn identity(&self) -> watch::Receiver<String> {
        self.identity.subscribe()
    }

    /// Takes another duty; it is acted on by the next [`Self::look`].
    pub(super) fn set_duty(&mut self, duty: Duty) {
        self.duty = duty;
        self.tried = false;
        self.publish();
    }

    /// Does what is due and allowed.
    pub(super) fn look(&mut self, allowed: Allowed, now: Instant) {
        if self.held.is_none() && !self.tried && allowed.pet {
            self.tried = true;
            if self.duty == Duty::Guard || self.source.may_be_armed() {
                self.held = self.source.open();
                self.next_pet = now + self.pet_every;
                self.publish();
            }
        }
        if self.duty == Duty::Release && allowed.stop && !self.unstoppable {
            self.release();
        }
        let Some(device) = &self.held else { return };
        if allowed.pet && now >= self.next_pet {
            self.next_pet = now + self.pet_every;
            if let Err(error) = device.pet() {
                tracing::error!("cannot pet the watchdog: {error}");
            }
        }
    }

    fn release(&mut self) {
        let Some(device) = self.held.take() else { return };
        self.tried = true; // what is stopped is not to be taken over once more
        if device.stop() {
            tracing::info!("the watchdog that an earlier agent left running is stopped");
            device.disarm();
        } else {
            tracing::info!(
                "the watchdog that an earlier agent left running is petted on: it cannot be stopped"
            );
            self.unstoppable = true;
            self.held = Some(device);
        }
    }

    fn publish(&self) {
        let held = self.held.as_ref().filter(|_| self.duty == Duty::Guard);
        self.identity.send_replace(held.map(Device::identity).unwrap_or_default());
    }

    /// The agent ends: stopped where that is allowed, else left running.
    pub(super) fn end(self, allowed: Allowed) {
        if let Some(device) = self.held
            && allowed.stop
        {
            device.disarm();
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A watchdog that writes down what is done to it.
    #[derive(Debug, Clone, Default)]
    pub(in crate::lease) struct Fake {
        pub(in crate::lease) done: Arc<Mutex<Vec<&'static str>>>,
        pub(in crate::lease) armed: bool,
        pub(in crate::lease) nowayout: bool,
    }

    impl Fake {
        fn note(&self, what: &'static str) {
            self.done.lock().unwrap().push(what);
        }
        pub(in crate::lease) fn done(&self) -> Vec<&'static str> {
            self.done.lock().unwrap().clone()
        }
    }

    impl Device for Fake {
        fn pet(&self) -> io::Result<()> {
            self.note("pet");
            Ok(())
        }
        fn stop(&self) -> bool {
            self.note("stop");
            !self.nowayout
        }
        fn disarm(self) {
            self.note("disarm");
        }
        fn identity(&self) -> String {
            "fake".to_owned()
        }
    }

    impl Source for Fake {
        type Device = Self;
        fn may_be_armed(&self) -> bool {
            self.armed
        }
        fn open(&self) -> Option<Self> {
            self.note("open");
            Some(self.clone())
        }
    }

    const ALL: Allowed = Allowed { pet: true, stop: true };
    const PET: Allowed = Allowed { pet: true, stop: false };
    const NOTHING: Allowed = Allowed { pet: false, stop: false };
    const SECOND: Duration = Duration::from_secs(1);

    fn guard(fake: &Fake) -> (Guard<Fake>, Instant) {
        let now = Instant::now();
        (Guard::new(fake.clone(), SECOND, now), now)
    }

    #[test]
    fn what_an_earlier_agent_left_running_is_petted_from_the_first_moment() {
        let fake = Fake { armed: true, ..Fake::default() };
        let (mut guard, now) = guard(&fake);
        guard.look(PET, now);
        guard.look(PET, now + SECOND / 2);
        guard.look(PET, now + SECOND);
        assert_eq!(fake.done(), ["open", "pet"]);
        assert_eq!(*guard.identity().borrow(), "", "it guards no member yet");
        guard.look(NOTHING, now + 3 * SECOND);
        assert_eq!(fake.done().len(), 2, "not a moment longer than it may be");
        guard.set_duty(Duty::Guard);
        guard.look(PET, now + 4 * SECOND);
        assert_eq!(fake.done(), ["open", "pet", "pet"], "it is open already");
        assert_eq!(*guard.identity().borrow(), "fake");
    }

    #[test]
    fn none_is_opened_while_it_may_not_be_petted() {
        let fake = Fake { armed: true, ..Fake::default() };
        let (mut guard, now) = guard(&fake);
        guard.look(NOTHING, now);
        guard.set_duty(Duty::Guard);
        guard.look(NOTHING, now);
        assert!(fake.done().is_empty());
        guard.look(PET, now);
        assert_eq!(fake.done(), ["open"]);
    }

    #[test]
    fn a_node_without_a_cluster_stops_what_was_left_running_once_nothing_needs_it() {
        let fake = Fake { armed: true, ..Fake::default() };
        let (mut guard, now) = guard(&fake);
        guard.look(PET, now);
        guard.set_duty(Duty::Release);
        guard.look(PET, now);
        assert_eq!(fake.done(), ["open"], "an HA VM of the earlier agent may run");
        guard.look(ALL, now);
        assert_eq!(fake.done(), ["open", "stop", "disarm"]);
        guard.look(ALL, now + 9 * SECOND);
        assert_eq!(fake.done().len(), 3, "nor is it started again");
        guard.set_duty(Duty::Guard);
        guard.look(ALL, now + 9 * SECOND);
        assert_eq!(fake.done().last(), Some(&"open"), "it becomes a member");
    }

    #[test]
    fn one_that_cannot_be_stopped_is_petted_on() {
        let fake = Fake { armed: true, nowayout: true, ..Fake::default() };
        let (mut guard, now) = guard(&fake);
        guard.set_duty(Duty::Release);
        (0..3).for_each(|second| guard.look(ALL, now + second * SECOND));
        assert_eq!(fake.done(), ["open", "stop", "pet", "pet"]);
    }

    #[test]
    fn a_node_without_a_cluster_arms_nothing_that_was_not() {
        let fake = Fake::default();
        let (mut guard, now) = guard(&fake);
        guard.look(ALL, now);
        guard.set_duty(Duty::Release);
        guard.look(ALL, now);
        guard.end(ALL);
        assert!(fake.done().is_empty());
    }

    #[test]
    fn an_end_leaves_it_running_for_the_ha_vms_that_go_on() {
        for (allowed, last) in [(ALL, "disarm"), (PET, "open"), (NOTHING, "open")] {
            let fake = Fake::default();
            let (mut guard, now) = guard(&fake);
            guard.set_duty(Duty::Guard);
            guard.look(ALL, now);
            guard.end(allowed);
            assert_eq!(fake.done().last(), Some(&last));
        }
    }
}
