//! What a scenario's steps do to the world.

use ha_manager::owner::Ended;
use ha_manager::{Usage, check_target};
use proto::Name;
use proto::record::{AbsenceKind, Phase};

use super::store::{NodeChange, Proposal, What, Wish};
use super::{Index, World, index, node_id};
use crate::command::Command;
use crate::scenario::{NodeSpec, Request, ResourceSpec, Switch};

impl World {
    pub(super) fn command(&mut self, command: Command) {
        match command {
            Command::Power(node, to) => self.at(&node, |w, n| w.set_power(n, to == Switch::On)),
            Command::Network(node, to) => self.at(&node, |w, n| w.set_network(n, to)),
            Command::Hang(node, ms) => self.at(&node, |w, n| {
                w.tell(format!("{node}: hangs for {} ms", ms));
                w.hang(n, ms);
            }),
            Command::Skew(node, rate) => self.at(&node, |w, n| w.set_rate(n, rate)),
            Command::StepClock(node, by_ms) => self.at(&node, |w, n| {
                let offset_ms = &mut w.machines[n].unix_offset_ms;
                *offset_ms = offset_ms.saturating_add(by_ms);
            }),
            Command::Shutdown(node) => self.go(&node, AbsenceKind::Shutdown),
            Command::Reboot(node) => self.go(&node, AbsenceKind::Reboot),
            Command::RestartAgent(node) => self.at(&node, World::restart_agent),
            Command::Maintenance(node, to) => self.at(&node, |w, n| {
                let change = NodeChange::Maintenance(to == Switch::On);
                w.wish(Wish::Node(node_id(n), change));
            }),
            Command::FailWatchdog(node) => self.at(&node, World::fail_watchdog),
            Command::Storage(node, to) => self.at(&node, |w, n| {
                let word = if to == Switch::On { "is back" } else { "is lost" };
                w.tell(format!("{node}: its VM storage {word}"));
                w.machines[n].storage = to == Switch::On;
            }),
            Command::Cut(a, b) => self.cut(&a, &b, true),
            Command::CutOneWay(a, b) => self.cut(&a, &b, false),
            Command::Heal => self.network.cuts.clear(),
            Command::Loss(per_mille) => self.network.loss_per_mille = per_mille,
            Command::Delay(ms) => self.network.delay_ms = ms,
            Command::Store(up) => {
                self.tell(format!("the store {}", if up { "is up" } else { "takes no writes" }));
                self.store.up = up;
            }
            Command::PauseManager(ms) => self.paused_until_ms = self.now_ms + ms,
            Command::Disarm(disarm) => self.wish(Wish::Disarm(Some(disarm))),
            Command::Arm => self.wish(Wish::Disarm(None)),
            Command::AddNode(name) => {
                self.tell(format!("{name}: is a new node"));
                self.add_machine(&name, &NodeSpec::default());
            }
            Command::RemoveNode(node) => {
                self.at(&node, |w, n| w.wish(Wish::Node(node_id(n), NodeChange::Removed)));
            }
            other => self.command_about_resource(other),
        }
    }

    fn command_about_resource(&mut self, command: Command) {
        match command {
            Command::Request(id, request) => self.of(&id, |w, name| {
                w.wish(Wish::Request(name, request));
            }),
            Command::Stop(id, _) => {
                self.of(&id, |w, name| w.wish(Wish::Request(name, Request::Stopped)));
            }
            Command::Migrate(id, node) => self.move_by_hand(&id, &node, true),
            Command::Relocate(id, node) => self.move_by_hand(&id, &node, false),
            Command::Crash(id) => self.of(&id, |w, name| {
                let on: Vec<Index> = w.running_on(&name).collect();
                for node in on {
                    w.tell(format!("{id}: its process ends"));
                    let how = Ended::Failed("ended: signal 11".to_owned());
                    w.end_process(node, &name, Some(how));
                    w.wake(node);
                }
            }),
            Command::Stick(id) => self.of(&id, |w, name| {
                let on: Vec<Index> = w.running_on(&name).collect();
                for node in on {
                    if let Some(process) = w.machines[node].processes.get_mut(&name) {
                        process.stuck = true;
                    }
                }
            }),
            Command::Lock(id) => self.of(&id, |w, name| w.wish(Wish::Lock(name, true))),
            Command::Unlock(id) => self.of(&id, |w, name| w.wish(Wish::Lock(name, false))),
            Command::Delete(id) => self.of(&id, |w, name| w.wish(Wish::Delete(name))),
            Command::Usage(id, cpu_milli, memory_mib) => self.of(&id, |w, name| {
                w.usage.insert(name, Usage { cpu_milli, memory_bytes: memory_mib << 20 });
            }),
            Command::Add(id, node, request) => self.add(&id, &node, request),
            // The other half of the commands.
            _ => {}
        }
    }

    fn at(&mut self, node: &Name, act: impl FnOnce(&mut Self, Index)) {
        if let Some(index) = self.machine_named(node) {
            act(self, index);
        }
    }

    fn of(&mut self, id: &str, act: impl FnOnce(&mut Self, Name)) {
        if let Some(name) = self.ids.get(id).cloned() {
            act(self, name);
        }
    }

    fn wish(&mut self, wish: Wish) {
        self.propose(Proposal { by: None, what: What::Person(wish) }, false);
    }

    fn set_network(&mut self, node: Index, to: Switch) {
        let on = to == Switch::On;
        let machine = &mut self.machines[node];
        if machine.power && machine.network != on {
            machine.network = on;
            let name = machine.name.clone();
            self.tell(format!("{name}: the network {}", if on { "is back" } else { "is gone" }));
        }
    }

    fn go(&mut self, node: &Name, kind: AbsenceKind) {
        let word = match kind {
            AbsenceKind::Shutdown => "is to shut down",
            AbsenceKind::Reboot => "is to reboot",
        };
        self.tell(format!("{node}: {word}"));
        self.at(node, |w, n| w.begin_leaving(n, kind));
    }

    fn cut(&mut self, a: &Name, b: &Name, both: bool) {
        let (Some(a), Some(b)) = (self.machine_named(a), self.machine_named(b)) else { return };
        self.network.cuts.insert((a, b));
        if both {
            self.network.cuts.insert((b, a));
        }
    }

    fn add(&mut self, id: &str, node: &Name, request: Request) {
        let Some(name) = self.ids.get(id).cloned() else { return };
        let Some(owner) = self.machine_named(node) else { return };
        self.tell(format!("{id}: is new, on {node}"));
        let spec = ResourceSpec::plain(node.clone(), request);
        self.add_body(id, &name, owner, &spec);
        self.wish(Wish::Add(name, node_id(owner), request));
    }

    /// What `vm migrate` does: checks, then asks the owner.
    fn move_by_hand(&mut self, id: &str, node: &Name, live: bool) {
        let Some(name) = self.ids.get(id).cloned() else { return };
        let Some(to) = self.machine_named(node) else { return };
        let state = self.cluster_state();
        let leader = self.raft.leader.unwrap_or_default();
        let observations = self.observations(leader);
        let Some(view) = state.vms.get(&name) else {
            return self.tell(format!("{id}: there is no such resource any more"));
        };
        let checked = check_target(&state, &observations, &self.policy, &name, view, node_id(to));
        if let Err(denied) = checked {
            return self.tell(format!("{id}: cannot move to {node}: {denied}"));
        }
        if view.placement.phase != Phase::Started {
            let word = view.placement.phase.word();
            return self.tell(format!("{id}: is {word}; only what runs is moved"));
        }
        let from = index(view.placement.owner);
        if live && self.bodies.get(&name).is_some_and(|body| body.live) {
            if !self.begin_migration(from, &name, to) {
                self.tell(format!("{id}: its owner cannot move it now"));
            }
        } else {
            if let Some(body) = self.bodies.get_mut(&name) {
                body.next = crate::outcome::Kind::Relocate;
            }
            self.wish(Wish::Relocate(name, node_id(to)));
        }
    }
}
