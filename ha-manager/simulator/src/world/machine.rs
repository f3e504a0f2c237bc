//! A machine: power, clock, watchdog; boots, hangs, is reset.

use std::collections::BTreeMap;

use ha_manager::{Detector, NodeLease};
use proto::record::{Absence, AbsenceKind, NodeRecord};
use proto::{Name, NodeId};

use super::agent::{Job, JobId, Process};
use super::leader::Leadership;
use super::store::{NodeChange, Proposal, What};
use super::{Event, Index, World, node_id};
use crate::scenario::{NodeSpec, Switch};

#[derive(Debug)]
pub(super) struct Machine {
    pub(super) name: Name,
    pub(super) id: NodeId,
    pub(super) removed: bool,
    pub(super) power: bool,
    pub(super) network: bool,
    pub(super) storage: bool,
    /// Changes with each loss of power and each restart of the agent: what was under way is gone.
    pub(super) life: u64,
    pub(super) boots: bool,
    pub(super) agent: bool,
    pub(super) hangs_until_ms: u64,
    clock: Clock,
    pub(super) unix_offset_ms: i64,
    /// Resets it when it is not petted.
    pub(super) watchdog: bool,
    fires_ms: Option<u64>,
    pub(super) power_fencing: bool,
    pub(super) memory_bytes: u64,
    /// On its way down.
    pub(super) leaving: Option<(AbsenceKind, u64)>,
    pub(super) lease: NodeLease,
    /// When the last heartbeat was sent that was acknowledged, by the agent before this one.
    pub(super) former_ms: Option<u64>,
    /// Its lease binds its VMs: not while HA is disarmed.
    pub(super) enforces: bool,
    pub(super) cleaning: bool,
    pub(super) processes: BTreeMap<Name, Process>,
    pub(super) exits: BTreeMap<Name, ha_manager::owner::Ended>,
    pub(super) jobs: BTreeMap<Name, (JobId, Job)>,
    pub(super) term: u64,
    pub(super) detector: Detector,
    pub(super) leads: Option<Leadership>,
    /// When something was last wrong with it, or between it and the others.
    pub(super) unwell_ms: u64,
}

/// A clock that goes at its own rate.
#[derive(Debug)]
struct Clock {
    rate: u64,
    at_ms: u64,
    shows_ms: u64,
}

impl Clock {
    fn shows(&self, now_ms: u64) -> u64 {
        self.shows_ms + (now_ms - self.at_ms) * self.rate / 1000
    }

    /// How long, in true time, until it shows this.
    fn until(&self, now_ms: u64, shows_ms: u64) -> u64 {
        let left_ms = shows_ms.saturating_sub(self.shows(now_ms));
        (left_ms * 1000).div_ceil(self.rate)
    }
}

impl Machine {
    pub(super) fn clock(&self, now_ms: u64) -> u64 {
        self.clock.shows(now_ms)
    }

    pub(super) fn until(&self, now_ms: u64, clock_ms: u64) -> u64 {
        self.clock.until(now_ms, clock_ms)
    }

    pub(super) fn rate(&self) -> u64 {
        self.clock.rate
    }

    /// Its agent runs, now.
    pub(super) fn runs(&self, now_ms: u64) -> bool {
        self.power && self.agent && !self.removed && self.hangs_until_ms <= now_ms
    }

    pub(super) fn at_rest(&self, now_ms: u64) -> bool {
        self.removed
            || !self.boots
                && self.hangs_until_ms <= now_ms
                && self.leaving.is_none()
                && (!self.power || self.agent && self.jobs.is_empty())
    }
}

/// A node that cannot empty itself in so long goes down all the same.
const SHUTDOWN_LIMIT_MS: u64 = 180_000;

impl World {
    pub(super) fn add_machine(&mut self, name: &Name, spec: &NodeSpec) {
        let on = spec.power == Switch::On;
        let node = self.machines.len();
        let id = node_id(node);
        let boottime_ms = self.random.between(100_000, 100_000_000);
        self.machines.push(Machine {
            name: name.clone(),
            id,
            removed: false,
            power: on,
            network: on && spec.network == Switch::On,
            storage: true,
            life: 0,
            boots: false,
            agent: on,
            hangs_until_ms: 0,
            clock: Clock { rate: 1000, at_ms: self.now_ms, shows_ms: boottime_ms },
            unix_offset_ms: 1_700_000_000_000,
            watchdog: spec.watchdog,
            fires_ms: None,
            power_fencing: spec.power_fencing,
            memory_bytes: spec.memory_mib << 20,
            leaving: None,
            lease: NodeLease::new(self.timing),
            // As if it had been heard until now.
            former_ms: Some(boottime_ms),
            enforces: true,
            cleaning: false,
            processes: BTreeMap::new(),
            exits: BTreeMap::new(),
            jobs: BTreeMap::new(),
            term: 0,
            detector: Detector::new(id, self.timing),
            leads: None,
            unwell_ms: self.now_ms,
        });
        let record = NodeRecord {
            node_id: id,
            name: name.clone(),
            api_address: String::new(),
            cpus: spec.cpus,
            memory_bytes: spec.memory_mib << 20,
            maintenance: false,
            cpuid: Vec::new(),
            watchdog: if spec.watchdog { "model".to_owned() } else { String::new() },
            kvm: String::new(),
            version: String::new(),
            zone: String::new(),
            witness: false,
            absence: None,
        };
        self.store.nodes.insert(id, record);
        if on {
            self.begin_agent(node);
            self.pet_watchdog(node);
        }
    }

    /// The agent's loops begin.
    fn begin_agent(&mut self, node: Index) {
        for event in [Event::Beat(node), Event::Reconcile(node)] {
            let after_ms = self.random.between(0, 999);
            self.push(after_ms, event);
        }
        self.push(0, Event::Pet(node));
    }

    pub(super) fn pet(&mut self, node: Index) {
        let interval_ms = self.timing.pet_interval_ms();
        self.push(interval_ms, Event::Pet(node));
        let machine = &self.machines[node];
        let clock_ms = machine.clock(self.now_ms);
        let guarded = machine.processes.values().filter(|process| process.ha).count();
        let former = machine.former_ms.is_some_and(|former_ms| {
            machine.lease.age_ms(clock_ms).is_none()
                && clock_ms < former_ms + self.timing.pet_limit_ms()
        });
        let careless = match self.mistake {
            Some(super::Mistake::PetWithoutLease) => true,
            Some(super::Mistake::NoMargin) => {
                machine.lease.age_ms(clock_ms).is_some_and(|age| age < self.timing.lease_ms())
            }
            _ => false,
        };
        let may =
            careless || !machine.enforces || former || machine.lease.may_pet(clock_ms, guarded);
        if may {
            self.pet_watchdog(node);
        }
    }

    fn pet_watchdog(&mut self, node: Index) {
        if self.machines[node].watchdog {
            let timeout_ms = self.timing.watchdog_timeout_s() * 1000;
            self.machines[node].fires_ms = Some(self.now_ms + timeout_ms);
            self.push(timeout_ms, Event::WatchdogFires(node));
        }
    }

    pub(super) fn watchdog_fires(&mut self, node: Index) {
        let machine = &self.machines[node];
        let fires = machine.fires_ms.is_some_and(|fires_ms| fires_ms <= self.now_ms);
        if !(fires && machine.power && machine.watchdog) {
            return;
        }
        self.judge_reset(node);
        self.tell(format!("{}: the watchdog resets it", self.machines[node].name));
        self.lose_power(node);
        self.machines[node].boots = true;
        let boot_ms = self.random.between(20_000, 40_000);
        self.push(boot_ms, Event::Boot(node));
    }

    /// All that runs there is gone, at once.
    fn lose_power(&mut self, node: Index) {
        let now_ms = self.now_ms;
        let timing = self.timing;
        let machine = &mut self.machines[node];
        let names: Vec<Name> = machine.processes.keys().cloned().collect();
        machine.life += 1;
        machine.agent = false;
        machine.boots = false;
        machine.hangs_until_ms = 0;
        machine.fires_ms = None;
        machine.leaving = None;
        machine.processes.clear();
        machine.exits.clear();
        machine.jobs.clear();
        machine.leads = None;
        machine.cleaning = false;
        machine.former_ms = None;
        machine.lease = NodeLease::new(timing);
        machine.detector = Detector::new(machine.id, timing);
        machine.unwell_ms = now_ms;
        for name in &names {
            self.note_running(name);
        }
        self.changed();
    }

    pub(super) fn set_power(&mut self, node: Index, on: bool) {
        if self.machines[node].power == on && !self.machines[node].boots {
            return;
        }
        let name = self.machines[node].name.clone();
        if on {
            self.machines[node].power = true;
            self.machines[node].network = true;
            self.machines[node].boots = true;
            self.tell(format!("{name}: switched on"));
            let boot_ms = self.random.between(20_000, 40_000);
            self.push(boot_ms, Event::Boot(node));
        } else {
            self.lose_power(node);
            self.machines[node].power = false;
            self.machines[node].network = false;
            self.tell(format!("{name}: the power is gone"));
        }
        self.changed();
    }

    pub(super) fn boot(&mut self, node: Index) {
        let machine = &mut self.machines[node];
        if !(machine.power && machine.boots) {
            return;
        }
        machine.boots = false;
        machine.enforces = true;
        let name = machine.name.clone();
        self.tell(format!("{name}: is up"));
        self.push(0, Event::AgentUp(node));
    }

    pub(super) fn agent_up(&mut self, node: Index) {
        self.machines[node].agent = true;
        self.machines[node].unwell_ms = self.now_ms;
        self.begin_agent(node);
        self.changed();
    }

    pub(super) fn restart_agent(&mut self, node: Index) {
        let (now_ms, timing) = (self.now_ms, self.timing);
        let machine = &mut self.machines[node];
        if !(machine.power && machine.agent) {
            return;
        }
        let clock_ms = machine.clock(now_ms);
        let sent_ms = machine.lease.age_ms(clock_ms).map(|age_ms| clock_ms - age_ms);
        machine.former_ms = sent_ms.or(machine.former_ms);
        machine.life += 1;
        machine.agent = false;
        machine.leads = None;
        machine.jobs.clear();
        machine.cleaning = false;
        machine.lease = NodeLease::new(timing);
        machine.detector = Detector::new(machine.id, timing);
        // The processes' own deadlines go on without an agent.
        self.watch_deadlines(node);
        let up_ms = self.random.between(500, 2_500);
        self.push(up_ms, Event::AgentUp(node));
        self.changed();
    }

    pub(super) fn hang(&mut self, node: Index, for_ms: u64) {
        let machine = &mut self.machines[node];
        if machine.power {
            machine.hangs_until_ms = machine.hangs_until_ms.max(self.now_ms + for_ms);
        }
    }

    pub(super) fn set_rate(&mut self, node: Index, rate: u64) {
        let now_ms = self.now_ms;
        let machine = &mut self.machines[node];
        let shows_ms = machine.clock.shows(now_ms);
        machine.clock = Clock { rate, at_ms: now_ms, shows_ms };
        self.watch_deadlines(node);
    }

    pub(super) fn fail_watchdog(&mut self, node: Index) {
        self.machines[node].watchdog = false;
        self.machines[node].fires_ms = None;
    }

    pub(super) fn begin_leaving(&mut self, node: Index, kind: AbsenceKind) {
        let until_ms = self.now_ms + SHUTDOWN_LIMIT_MS;
        if self.machines[node].runs(self.now_ms) {
            self.machines[node].leaving = Some((kind, until_ms));
        }
    }

    /// Brings the node's record up to what the node is, and takes it down when it may go.
    pub(super) fn look_after_itself(&mut self, node: Index) {
        let machine = &self.machines[node];
        let Some(record) = self.store.nodes.get(&machine.id) else { return };
        let absence = machine.leaving.map(|(kind, _)| Absence {
            kind,
            clear: record.absence.is_some() && self.is_empty(node),
        });
        if let (Some(absence), Some((_, until_ms))) = (absence, machine.leaving)
            && (record.absence == Some(absence) && absence.clear || self.now_ms >= until_ms)
        {
            self.push(1, Event::GoDown(node));
            return;
        }
        let watchdog = if machine.watchdog { "model" } else { "" };
        let change = if record.absence != absence {
            NodeChange::Absence(absence)
        } else if record.watchdog != watchdog {
            NodeChange::Watchdog(watchdog.to_owned())
        } else {
            return;
        };
        let what = What::Node { node: machine.id, change };
        self.propose(Proposal { by: Some(node), what }, false);
    }

    /// Whether no HA VM runs or is to run here.
    fn is_empty(&self, node: Index) -> bool {
        let machine = &self.machines[node];
        let ignored = |name: &Name| {
            self.store
                .vms
                .get(name)
                .is_some_and(|vm| vm.placement.requested == proto::record::Requested::Ignored)
        };
        let owned = self.store.vms.iter().any(|(name, vm)| {
            let places = vm.view().places();
            (places.at == Some(machine.id) || places.to == Some(machine.id)) && !ignored(name)
        });
        !owned && machine.processes.keys().all(ignored)
    }

    pub(super) fn go_down(&mut self, node: Index) {
        let Some((kind, _)) = self.machines[node].leaving else { return };
        self.lose_power(node);
        let name = self.machines[node].name.clone();
        match kind {
            AbsenceKind::Shutdown => {
                self.machines[node].power = false;
                self.machines[node].network = false;
                self.tell(format!("{name}: is off, as planned"));
            }
            AbsenceKind::Reboot => {
                self.machines[node].boots = true;
                self.tell(format!("{name}: reboots"));
                let boot_ms = self.random.between(20_000, 40_000);
                self.push(boot_ms, Event::Boot(node));
            }
        }
    }
}
