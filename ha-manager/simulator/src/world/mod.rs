//! The modelled world: machines with clocks of their own, a network, a replicated store, watchdogs
//! and VM processes, in true time. What decides in it is the real code: [`ha_manager::plan`] with
//! the detector on the leader, the node lease and [`ha_manager::owner`] on each node.
//!
//! ```text
//! commands.rs ─► machine.rs (power, boot, hang)      leader.rs (hears, plans, proposes) ─┐
//!                agent.rs   (lease, watchdog, VMs) ──────────────────────────────────────┼► store.rs
//!                migrate.rs (source and target)                                          ┘  (commits)
//!                                 judge.rs knows the truth, at each moment
//! ```
//!
//! Events happen one after the other, ordered by true time and then by when they were thought of;
//! all chance comes from the seed. A node that hangs handles what waits for it when it wakes.

mod agent;
mod commands;
mod judge;
mod leader;
mod machine;
mod migrate;
mod network;
mod store;

use std::collections::{BTreeMap, BTreeSet};

use ha_manager::{Policy, Timing};
use proto::{Name, NodeId};

use crate::outcome::{Kind, Outcome};
use crate::random::Random;
use crate::scenario::{Checked, Failures, Request, ResourceSpec, Step, Switch, When};
use agent::JobId;
use machine::Machine;
use store::{Proposal, Store};

/// A rule that is broken on purpose, so that the judge can be seen to notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mistake {
    /// A node's HA VMs run on until L instead of 0.6 L, and its watchdog is petted until then.
    NoMargin,
    /// Transactions do not compare what they were decided on.
    NoGenerationCheck,
    /// A new leader believes what it never heard.
    NoNewLeaderWait,
    /// VMs of a silent node are started elsewhere without fencing it.
    NoFence,
    /// The watchdog is petted whether there is a lease or not.
    PetWithoutLease,
    /// A silent node without watchdog or power fencing is taken for dead.
    TrustUnprotected,
}

/// A number for a machine: its place in [`World::machines`].
type Index = usize;

#[derive(Debug, Clone)]
enum Event {
    /// Raft: is there a leader? Once for all, each 100 ms.
    Raft,
    /// Each second: what must have happened by now, and is all at rest?
    Look,
    Beat(Index),
    Arrive {
        leader: Index,
        from: Index,
        sequence: u64,
        storage: bool,
    },
    Confirm {
        leader: Index,
        from: Index,
        sequence: u64,
        term: u64,
    },
    Ack {
        node: Index,
        sequence: u64,
        term: u64,
        fenced: bool,
    },
    Pet(Index),
    WatchdogFires(Index),
    LeaseEnds(Index),
    Reconcile(Index),
    JobDone(Index, JobId),
    Plan(Index),
    Commit(Box<Proposal>),
    /// Someone outside has switched the node off.
    SwitchedOff {
        by: Index,
        term: u64,
        node: Index,
    },
    Boot(Index),
    AgentUp(Index),
    GoDown(Index),
    Next,
}

impl Event {
    /// The machine that must run to handle it.
    fn on(&self) -> Option<Index> {
        match self {
            Self::Beat(node)
            | Self::Ack { node, .. }
            | Self::Pet(node)
            | Self::LeaseEnds(node)
            | Self::Reconcile(node)
            | Self::JobDone(node, _)
            | Self::Plan(node)
            | Self::GoDown(node)
            | Self::AgentUp(node) => Some(*node),
            Self::Arrive { leader, .. } | Self::Confirm { leader, .. } => Some(*leader),
            Self::Raft
            | Self::Look
            | Self::WatchdogFires(_)
            | Self::Commit(_)
            | Self::SwitchedOff { .. }
            | Self::Boot(_)
            | Self::Next => None,
        }
    }
}

/// What the world does to a resource, whatever is decided about it.
#[derive(Debug, Clone)]
struct Body {
    id: String,
    fail_start: Failures,
    failed_starts: BTreeMap<Name, u32>,
    fail_migrate: u32,
    fail_stop: u32,
    live: bool,
    /// Where it ran last, and what its next start elsewhere is called.
    was_on: Option<Index>,
    next: Kind,
    /// Since when it is down although it should run.
    down_since_ms: Option<u64>,
    down_ms: u64,
    /// Since when nothing but the manager keeps it down.
    due_since_ms: Option<u64>,
}

/// All of it.
#[derive(Debug)]
pub(crate) struct World {
    policy: Policy,
    timing: Timing,
    mistake: Option<Mistake>,
    random: Random,
    now_ms: u64,
    queue: BTreeMap<(u64, u64), (Event, u64)>,
    queued: u64,
    machines: Vec<Machine>,
    network: network::Network,
    raft: leader::Raft,
    store: Store,
    bodies: BTreeMap<Name, Body>,
    ids: BTreeMap<String, Name>,
    usage: BTreeMap<Name, ha_manager::Usage>,
    paused_until_ms: u64,
    steps: std::vec::IntoIter<Step>,
    next: Option<Step>,
    last_step_ms: u64,
    changed_ms: u64,
    in_flight: usize,
    switching_off: BTreeSet<Index>,
    /// Who asked for a migration that is under way, and what it is called.
    asked: BTreeMap<Name, (migrate::Asked, Kind)>,
    over: bool,
    outcome: Outcome,
}

/// A run that has not come to rest so long after a step goes on to the next one.
const RESTLESS_MS: u64 = 2_400_000;

impl World {
    pub(crate) fn new(scenario: &Checked, seed: u64, mistake: Option<Mistake>) -> Self {
        let timing = scenario.timing;
        let mut policy = scenario.policy;
        policy.require_watchdog &= mistake != Some(Mistake::TrustUnprotected);
        let mut world = Self {
            policy,
            timing,
            mistake,
            random: Random::new(seed),
            now_ms: 0,
            queue: BTreeMap::new(),
            queued: 0,
            machines: Vec::new(),
            network: network::Network::default(),
            raft: leader::Raft::default(),
            store: Store::new(&scenario.rules),
            bodies: BTreeMap::new(),
            ids: scenario.names.clone(),
            usage: BTreeMap::new(),
            paused_until_ms: 0,
            steps: scenario.steps.clone().into_iter(),
            next: None,
            last_step_ms: 0,
            changed_ms: 0,
            in_flight: 0,
            switching_off: BTreeSet::new(),
            asked: BTreeMap::new(),
            over: false,
            outcome: Outcome::new(scenario),
        };
        for (name, node) in &scenario.spec.nodes {
            world.add_machine(name, node);
        }
        for (id, resource) in &scenario.spec.resources {
            let wishes = std::sync::Arc::new(scenario.wishes(resource));
            world.add_resource(id, resource, wishes);
            if let Some(usage) = resource.usage {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "0 to 10^6, checked"
                )]
                let cpu_milli = (usage.cpus * 1000.0) as u64;
                let memory_bytes = usage.memory_mib << 20;
                let used = ha_manager::Usage { cpu_milli, memory_bytes };
                world.usage.extend(scenario.names.get(id).map(|name| (name.clone(), used)));
            }
        }
        world.push(0, Event::Raft);
        world.push(0, Event::Look);
        world.next_step();
        world
    }

    fn add_resource(
        &mut self,
        id: &str,
        resource: &ResourceSpec,
        wishes: std::sync::Arc<ha_manager::Wishes>,
    ) {
        let (Some(name), Some(owner)) =
            (self.ids.get(id).cloned(), self.machine_named(&resource.node))
        else {
            return;
        };
        let on = self.machines[owner].power;
        let runs = resource.running.unwrap_or(resource.requested == Request::Started && on) && on;
        self.add_body(id, &name, owner, resource);
        let vm_id = self.store.add_vm(&name, node_id(owner), resource, runs);
        if let Some(vm) = self.store.vms.get_mut(&name) {
            vm.wishes = wishes;
        }
        if runs {
            self.begin_process(owner, &name, vm_id, proto::Generation(1));
        }
        self.note_running(&name);
    }

    fn add_body(&mut self, id: &str, name: &Name, owner: Index, resource: &ResourceSpec) {
        let body = Body {
            id: id.to_owned(),
            fail_start: resource.fail_start.clone(),
            failed_starts: BTreeMap::new(),
            fail_migrate: resource.fail_migrate,
            fail_stop: resource.fail_stop,
            live: resource.live,
            was_on: Some(owner),
            next: Kind::Recover,
            down_since_ms: None,
            down_ms: 0,
            due_since_ms: None,
        };
        self.bodies.insert(name.clone(), body);
    }

    pub(crate) fn run(mut self) -> Outcome {
        while let Some(((at_ms, _), (event, life))) = self.queue.pop_first() {
            self.now_ms = at_ms;
            if let Some(on) = event.on() {
                let machine = &self.machines[on];
                if machine.life != life {
                    continue;
                }
                if machine.hangs_until_ms > at_ms {
                    let wait_ms = machine.hangs_until_ms - at_ms;
                    self.push(wait_ms, event);
                    continue;
                }
            }
            self.handle(event);
            if self.over {
                break;
            }
        }
        self.finish()
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Raft => self.look_at_raft(),
            Event::Look => self.look(),
            Event::Beat(node) => self.beat(node),
            Event::Arrive { leader, from, sequence, storage } => {
                self.arrive(leader, from, sequence, storage);
            }
            Event::Confirm { leader, from, sequence, term } => {
                self.confirm(leader, from, sequence, term);
            }
            Event::Ack { node, sequence, term, fenced } => self.ack(node, sequence, term, fenced),
            Event::Pet(node) => self.pet(node),
            Event::WatchdogFires(node) => self.watchdog_fires(node),
            Event::LeaseEnds(node) => self.lease_ends(node),
            Event::Reconcile(node) => self.reconcile(node),
            Event::JobDone(node, job) => self.job_done(node, job),
            Event::Plan(node) => self.plan(node),
            Event::Commit(proposal) => self.commit(*proposal),
            Event::SwitchedOff { by, term, node } => self.switched_off(by, term, node),
            Event::Boot(node) => self.boot(node),
            Event::AgentUp(node) => self.agent_up(node),
            Event::GoDown(node) => self.go_down(node),
            Event::Next => self.take_step(),
        }
    }

    fn push(&mut self, after_ms: u64, event: Event) {
        self.queued += 1;
        let life = event.on().map_or(0, |on| self.machines[on].life);
        self.queue.insert((self.now_ms + after_ms, self.queued), (event, life));
    }

    fn machine_named(&self, name: &Name) -> Option<Index> {
        self.machines.iter().position(|machine| machine.name == *name && !machine.removed)
    }

    /// Something happened that others may have to react to.
    fn changed(&mut self) {
        self.changed_ms = self.now_ms;
    }

    fn tell(&mut self, text: String) {
        self.outcome.tell(self.now_ms, text);
    }

    fn id_of(&self, name: &Name) -> String {
        self.bodies.get(name).map_or_else(|| name.to_string(), |body| body.id.clone())
    }

    fn moved(&mut self, name: &Name, from: Index, to: Index, kind: Kind) {
        let (id, from, to) = (self.id_of(name), &self.machines[from].name, &self.machines[to].name);
        self.outcome.moved(self.now_ms, id, from, to, kind);
    }

    fn next_step(&mut self) {
        self.next = self.steps.next();
        self.last_step_ms = self.now_ms;
        if let Some(When::After { ms }) = self.next.as_ref().map(|step| step.when) {
            self.push(ms, Event::Next);
        }
    }

    fn take_step(&mut self) {
        let Some(step) = self.next.take() else { return };
        for command in step.commands {
            self.command(command);
        }
        self.changed();
        self.next_step();
    }

    /// Each second.
    fn look(&mut self) {
        self.push(1_000, Event::Look);
        self.judge_time();
        let waits = matches!(&self.next, None | Some(Step { when: When::Quiescent, .. }));
        if !waits {
            return;
        }
        let restless = self.now_ms >= self.last_step_ms + RESTLESS_MS;
        if !(restless || self.at_rest()) {
            return;
        }
        if restless {
            self.tell("still not at rest; going on".to_owned());
        }
        match self.next {
            Some(_) => self.take_step(),
            None => self.over = true,
        }
    }

    /// Nothing is under way and no timer is left to fire.
    fn at_rest(&self) -> bool {
        let now_ms = self.now_ms;
        let settled = now_ms >= self.changed_ms + 2_500
            && self.in_flight == 0
            && self.switching_off.is_empty()
            && now_ms >= self.paused_until_ms
            && self.machines.iter().all(|machine| machine.at_rest(now_ms));
        settled && self.leader_at_rest() && !self.lease_is_running_out()
    }

    fn finish(mut self) -> Outcome {
        let names: Vec<Name> = self.bodies.keys().cloned().collect();
        for name in &names {
            self.settle_downtime(name);
        }
        for machine in self.machines.iter().filter(|machine| !machine.removed) {
            let state = self.state_of(machine.id);
            let on = |on: bool| if on { Switch::On } else { Switch::Off };
            self.outcome.node(&machine.name, on(machine.power), on(machine.network), state);
        }
        for name in &names {
            let running_on: Vec<Name> =
                self.running_on(name).map(|node| self.machines[node].name.clone()).collect();
            let body = &self.bodies[name];
            let owner = self.store.vms.get(name).map(|vm| {
                let owner = index(vm.placement.owner);
                (vm.placement.clone(), self.machines[owner].name.clone())
            });
            self.outcome.resource(&body.id, owner, running_on, body.down_ms);
        }
        self.outcome.finish()
    }
}

fn node_id(index: Index) -> NodeId {
    NodeId(index as u64 + 1)
}

/// Of a node that exists: ids are given by [`node_id`] alone.
fn index(id: NodeId) -> Index {
    usize::try_from(id.0.saturating_sub(1)).unwrap_or(usize::MAX)
}
