//! The agent of a node: its lease, and the VMs that the placements say are its own.

use ha_manager::owner::{self, Ended, ProcessState, Step};
use ha_manager::{Ack, Edit};
use proto::record::{Phase, Placement};
use proto::{Generation, Name, VmId};

use super::store::{Proposal, Then, What};
use super::{Event, Index, Mistake, World, index};

/// A VM process.
#[derive(Debug, Clone)]
pub(super) struct Process {
    pub(super) vm_id: VmId,
    pub(super) generation: Generation,
    pub(super) ha: bool,
    /// On the node's clock; it ends itself then.
    pub(super) deadline_ms: Option<u64>,
    pub(super) state: State,
    /// It hangs in a disk write: nothing but a reset of the machine ends it.
    pub(super) stuck: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Runs the VM.
    Runs,
    /// Receives it.
    Receives { complete: bool },
    /// Has sent it, and waits for the commit.
    AwaitsCommit,
}

impl Process {
    fn seen(&self) -> owner::Process {
        let (receives, state) = match self.state {
            State::Runs => (false, ProcessState::Answers),
            State::Receives { complete: false } => (true, ProcessState::Answers),
            State::Receives { complete: true } => (true, ProcessState::Complete),
            State::AwaitsCommit => (false, ProcessState::AwaitingCommit),
        };
        let (vm_id, generation) = (self.vm_id, self.generation);
        owner::Process { vm_id, generation, receives, state }
    }
}

/// One at a time for a VM on a node.
#[derive(Debug, Clone)]
pub(super) enum Job {
    /// Made ready; then it has started, or failed to.
    Start { placement: Placement, at: proto::Revision },
    /// Then its process is gone.
    Stop,
    /// Waits for a transaction.
    Put,
    /// Is copied to another node.
    Migrate(super::migrate::Migration),
}

/// Which job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct JobId(pub(super) u64);

impl World {
    pub(super) fn beat(&mut self, node: Index) {
        let interval_ms = self.timing.heartbeat_interval_ms();
        let wait_ms = {
            let machine = &self.machines[node];
            machine.until(self.now_ms, machine.clock(self.now_ms) + interval_ms)
        };
        self.push(wait_ms.max(1), Event::Beat(node));
        let clock_ms = self.machines[node].clock(self.now_ms);
        if !self.store.nodes.contains_key(&self.machines[node].id) {
            return;
        }
        let sequence = self.machines[node].lease.begin_heartbeat(clock_ms);
        let storage = self.machines[node].storage;
        // It asks whoever claims to lead: a node cannot know which of two claims is stale.
        for leader in 0..self.machines.len() {
            if self.machines[leader].leads.is_some() {
                let message = Event::Arrive { leader, from: node, sequence, storage };
                self.send(node, leader, message);
            }
        }
    }

    pub(super) fn ack(&mut self, node: Index, sequence: u64, term: u64, fenced: bool) {
        if !self.machines[node].agent {
            return;
        }
        let lease = &mut self.machines[node].lease;
        if fenced {
            if lease.revoke(sequence) {
                self.clean_up(node);
            }
            return;
        }
        if matches!(lease.acknowledged(sequence, term), Ack::Renewed { .. }) {
            self.set_deadlines(node);
        }
    }

    fn deadline_ms(&self, node: Index) -> Option<u64> {
        let deadline_ms = self.machines[node].lease.deadline_ms()?;
        let timing = self.timing;
        let more_ms = match self.mistake {
            Some(Mistake::NoMargin) => timing.lease_ms() - timing.self_stop_ms(),
            _ => 0,
        };
        Some(deadline_ms + more_ms)
    }

    /// Gives the processes the lease's deadline; none while it does not bind them.
    pub(super) fn set_deadlines(&mut self, node: Index) {
        let deadline_ms = self.deadline_ms(node);
        let enforces = self.machines[node].enforces;
        for process in self.machines[node].processes.values_mut() {
            if process.ha && !matches!(process.state, State::Receives { .. }) {
                process.deadline_ms = match enforces {
                    true => deadline_ms.or(process.deadline_ms).or(Some(0)),
                    false => None,
                };
            }
        }
        self.watch_deadlines(node);
    }

    pub(super) fn watch_deadlines(&mut self, node: Index) {
        let machine = &self.machines[node];
        let first_ms = machine.processes.values().filter_map(|process| process.deadline_ms).min();
        if let Some(deadline_ms) = first_ms {
            let wait_ms = machine.until(self.now_ms, deadline_ms);
            self.push(wait_ms, Event::LeaseEnds(node));
        }
    }

    pub(super) fn lease_ends(&mut self, node: Index) {
        let clock_ms = self.machines[node].clock(self.now_ms);
        let over = |process: &Process| {
            !process.stuck && process.deadline_ms.is_some_and(|deadline_ms| deadline_ms <= clock_ms)
        };
        let ended: Vec<Name> = self.machines[node]
            .processes
            .iter()
            .filter(|(_, process)| over(process))
            .map(|(name, _)| name.clone())
            .collect();
        for name in ended {
            self.judge_self_stop(node, &name);
            let id = self.id_of(&name);
            let node_name = self.machines[node].name.clone();
            self.tell(format!("{id}: ends on {node_name}, whose lease has run out"));
            let how = Ended::FromOutside("ended by its lease".to_owned());
            self.end_process(node, &name, Some(how));
        }
    }

    /// Some process may yet be ended by its lease.
    pub(super) fn lease_is_running_out(&self) -> bool {
        (0..self.machines.len()).any(|node| {
            let machine = &self.machines[node];
            machine.power
                && !self.reads(node)
                && machine.enforces
                && machine.processes.values().any(|process| process.ha && !process.stuck)
        })
    }

    /// It was fenced: it ends what it runs, then says so.
    fn clean_up(&mut self, node: Index) {
        let names: Vec<Name> = self.machines[node].processes.keys().cloned().collect();
        for name in names {
            self.end_process(node, &name, None);
        }
        let machine = &mut self.machines[node];
        if machine.processes.is_empty() && !machine.cleaning && self.store.up {
            self.machines[node].cleaning = true;
            let what = What::Clean { node: self.machines[node].id };
            self.propose(Proposal { by: Some(node), what }, false);
        }
    }

    pub(super) fn begin_process(
        &mut self,
        node: Index,
        name: &Name,
        vm_id: VmId,
        generation: Generation,
    ) {
        self.judge_arrival(node, name);
        let deadline_ms = self.deadline_ms(node);
        let machine = &mut self.machines[node];
        // At the very beginning there is no lease yet, and the process has what one would give it.
        let clock_ms = machine.clock(self.now_ms);
        let deadline_ms = deadline_ms.unwrap_or(clock_ms + self.timing.self_stop_ms());
        let deadline_ms = machine.enforces.then_some(deadline_ms);
        let process =
            Process { vm_id, generation, ha: true, deadline_ms, state: State::Runs, stuck: false };
        machine.processes.insert(name.clone(), process);
        if let Some(body) = self.bodies.get_mut(name) {
            body.was_on = Some(node);
        }
        self.watch_deadlines(node);
        self.note_running(name);
        self.changed();
    }

    /// Ends a process, unless nothing can.
    pub(super) fn end_process(&mut self, node: Index, name: &Name, how: Option<Ended>) {
        let machine = &mut self.machines[node];
        if machine.processes.get(name).is_none_or(|process| process.stuck) {
            return;
        }
        machine.processes.remove(name);
        if let Some(how) = how {
            machine.exits.insert(name.clone(), how);
        }
        self.note_running(name);
        self.changed();
    }

    /// The node looks at every VM that concerns it.
    pub(super) fn reconcile(&mut self, node: Index) {
        self.push(1_000, Event::Reconcile(node));
        if !self.machines[node].agent || !self.reads(node) {
            return;
        }
        self.follow_arming(node);
        self.look_after_itself(node);
        let id = self.machines[node].id;
        let mine = self.store.vms.iter().filter(|(_, vm)| vm.placement.owner == id);
        let mut names: Vec<Name> = mine.map(|(name, _)| name.clone()).collect();
        names.extend(self.machines[node].processes.keys().cloned());
        names.sort();
        names.dedup();
        for name in names {
            if !self.machines[node].jobs.contains_key(&name) {
                self.reconcile_vm(node, &name);
            }
        }
    }

    /// While HA is disarmed the lease binds nothing; armed again, the node says so.
    fn follow_arming(&mut self, node: Index) {
        let (id, armed) = (self.machines[node].id, self.store.disarmed.is_none());
        if self.machines[node].enforces != armed {
            self.machines[node].enforces = armed;
            self.set_deadlines(node);
        }
        if armed && self.store.unarmed.contains(&id) && self.store.up {
            self.propose(Proposal { by: Some(node), what: What::Rearmed { node: id } }, false);
        }
    }

    fn reconcile_vm(&mut self, node: Index, name: &Name) {
        let machine = &self.machines[node];
        let clock_ms = machine.clock(self.now_ms);
        let vm = self.store.vms.get(name).cloned();
        let placement = vm.as_ref().map(|vm| &vm.placement);
        let mut process = machine.processes.get(name).map(Process::seen);
        if self.mistake == Some(Mistake::NoGenerationCheck)
            && let (Some(process), Some(placement)) = (&mut process, placement)
        {
            process.generation = placement.generation;
        }
        let may_start = machine.lease.may_start(clock_ms) || !machine.enforces;
        let step = owner::decide(machine.id, placement, process.as_ref(), false, may_start);
        let Some(vm) = vm else {
            if step == Step::Kill {
                self.end_process(node, name, None);
            }
            return;
        };
        let here = machine.name.to_string();
        match step {
            Step::Leave => {}
            Step::Start => self.begin_start(node, name, &vm),
            Step::MarkStarted => self.put(node, name, &vm, |p| owner::started(p, &here)),
            Step::MarkLost => {
                let how = self.machines[node].exits.remove(name);
                let how = how.unwrap_or(Ended::FromOutside("not running".to_owned()));
                self.put(node, name, &vm, |p| owner::lost(p, how, &here));
            }
            Step::Stop => {
                let after_ms = self.random.between(1_000, 4_000);
                self.begin_job(node, name, Job::Stop, Some(after_ms));
            }
            Step::MarkStopped => self.put(node, name, &vm, owner::stopped),
            Step::Kill => self.end_process(node, name, None),
            Step::ResolveCommit { committed: true } => self.end_process(node, name, None),
            Step::ResolveCommit { committed: false } => self.run_on(node, name),
            Step::RunIncoming => self.run_incoming(node, name, &vm),
            Step::SettleMigration => self.put(node, name, &vm, |placement| {
                placement.phase = Phase::Started;
                "the migration was interrupted; the VM runs on here".to_owned()
            }),
            Step::HandOver => self.hand_over(node, name, &vm),
        }
    }

    fn begin_start(&mut self, node: Index, name: &Name, vm: &super::store::Vm) {
        let placement = vm.placement.clone();
        let (vm_id, generation) = (placement.vm_id, placement.generation);
        let job = Job::Start { placement, at: vm.revision };
        let after_ms = self.random.between(800, 2_500);
        self.begin_job(node, name, job, Some(after_ms));
        self.begin_process(node, name, vm_id, generation);
    }

    pub(super) fn begin_job(
        &mut self,
        node: Index,
        name: &Name,
        job: Job,
        done_after_ms: Option<u64>,
    ) -> JobId {
        self.queued += 1;
        let id = JobId(self.queued);
        self.machines[node].jobs.insert(name.clone(), (id, job));
        if let Some(after_ms) = done_after_ms {
            self.push(after_ms, Event::JobDone(node, id));
        }
        self.changed();
        id
    }

    pub(super) fn job_done(&mut self, node: Index, id: JobId) {
        let jobs = &mut self.machines[node].jobs;
        let Some(name) = jobs.iter().find(|(_, (of, _))| *of == id).map(|(name, _)| name.clone())
        else {
            return;
        };
        let Some((_, job)) = jobs.remove(&name) else { return };
        self.changed();
        match job {
            Job::Start { placement, at } => self.end_start(node, &name, &placement, at),
            Job::Stop => self.end_stop(node, &name),
            Job::Put => {}
            Job::Migrate(migration) => self.copied(node, &name, migration),
        }
    }

    fn end_start(&mut self, node: Index, name: &Name, placement: &Placement, at: proto::Revision) {
        // Its lease has ended it meanwhile: it did not fail, and is looked at anew.
        if !self.machines[node].processes.contains_key(name) {
            return;
        }
        let here = self.machines[node].name.clone();
        let Some(body) = self.bodies.get_mut(name) else { return };
        let failed = body.failed_starts.entry(here.clone()).or_default();
        let fails = *failed < body.fail_start.on(&here);
        *failed += u32::from(fails);
        let why = match (fails, self.machines[node].storage) {
            (true, _) => Some("no such kernel".to_owned()),
            (false, false) => Some("its storage does not answer".to_owned()),
            (false, true) => None,
        };
        let mut placement = placement.clone();
        let note = match why {
            None => owner::started(&mut placement, here.as_str()),
            Some(why) => {
                self.end_process(node, name, None);
                owner::start_failed(&mut placement, here.as_str(), why)
            }
        };
        let id = self.id_of(name);
        self.tell(format!("{id}: {note}"));
        let edit = Edit { vm: name.clone(), at, placement, gives_to: None, note };
        self.put_edit(node, name, edit, Then::Nothing);
    }

    fn end_stop(&mut self, node: Index, name: &Name) {
        let Some(body) = self.bodies.get_mut(name) else { return };
        if body.fail_stop > 0 {
            body.fail_stop -= 1;
            let id = body.id.clone();
            return self.tell(format!("{id}: stopping it failed; again"));
        }
        self.end_process(node, name, None);
        self.wake(node);
    }

    fn hand_over(&mut self, node: Index, name: &Name, vm: &super::store::Vm) {
        let Phase::Relocating { target } = vm.placement.phase else { return };
        let to = index(target);
        let to_name = self.machines[to].name.to_string();
        let takes =
            !self.store.fenced.contains_key(&target) && self.store.nodes.contains_key(&target);
        if !takes {
            return self.put(node, name, vm, |p| owner::not_handed_over(p, &to_name));
        }
        let mut placement = vm.placement.clone();
        let note = owner::handed_over(&mut placement, &to_name);
        let edit =
            Edit { vm: name.clone(), at: vm.revision, placement, gives_to: Some(target), note };
        self.put_edit(node, name, edit, Then::HandedOver { target: to });
    }

    pub(super) fn put(
        &mut self,
        node: Index,
        name: &Name,
        vm: &super::store::Vm,
        change: impl FnOnce(&mut Placement) -> String,
    ) {
        let mut placement = vm.placement.clone();
        let note = change(&mut placement);
        let edit = Edit { vm: name.clone(), at: vm.revision, placement, gives_to: None, note };
        self.put_edit(node, name, edit, Then::Nothing);
    }

    /// Proposes it, and lets the VM's job wait for the outcome.
    pub(super) fn put_edit(&mut self, node: Index, name: &Name, edit: Edit, then: Then) {
        self.begin_job(node, name, Job::Put, None);
        self.propose(Proposal { by: Some(node), what: What::Owner { edit, then } }, false);
    }

    pub(super) fn owner_settled(&mut self, node: Index, edit: &Edit, then: Then, done: bool) {
        let job = self.machines[node].jobs.get(&edit.vm);
        // The agent that asked may be gone; what it asked for holds all the same.
        let asked = matches!(job, Some((_, Job::Put)));
        if asked {
            self.machines[node].jobs.remove(&edit.vm);
        }
        match then {
            Then::Nothing => {}
            Then::Copy { target } => self.copy(node, edit, target, done && asked),
            Then::Migrated { target } => self.migrated(node, edit, target, done),
            Then::HandedOver { target } if done => {
                let kind = self.bodies.get(&edit.vm).map(|body| body.next);
                let kind = kind.unwrap_or(crate::outcome::Kind::Relocate);
                self.moved(&edit.vm, node, target, kind);
            }
            Then::HandedOver { .. } => {}
        }
        if !done && self.machines[node].power && self.machines[node].agent {
            self.wake(node);
        }
    }
}
