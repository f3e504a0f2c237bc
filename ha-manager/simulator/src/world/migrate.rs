//! Live migration: phase migrating, the copy, the commit; and what its two ends do when something
//! comes in between.

use ha_manager::{Edit, owner};
use proto::Name;
use proto::record::Phase;

use super::agent::{Job, Process, State};
use super::store::{Then, Vm};
use super::{Index, World, node_id};
use crate::outcome::Kind;

/// A migration whose memory is being copied.
#[derive(Debug, Clone)]
pub(super) struct Migration {
    target: Index,
}

/// Who asked for a migration, to be told how it ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) leader: Index,
    pub(super) term: u64,
}

impl World {
    /// The plan asks the owner.
    pub(super) fn ask_to_migrate(
        &mut self,
        leader: Index,
        term: u64,
        name: &Name,
        from: Index,
        to: Index,
        kind: Kind,
    ) {
        self.asked.insert(name.clone(), (Asked { leader, term }, kind));
        if !(self.connected(leader, from) && self.begin_migration(from, name, to)) {
            self.migration_failed(name);
        }
    }

    /// The owner begins; false: it cannot.
    pub(super) fn begin_migration(&mut self, from: Index, name: &Name, to: Index) -> bool {
        let Some(vm) = self.store.vms.get(name).cloned() else { return false };
        let machine = &self.machines[from];
        let runs = machine.processes.get(name).is_some_and(|process| {
            process.state == State::Runs && process.generation == vm.placement.generation
        });
        let ready = runs
            && self.reads(from)
            && !machine.jobs.contains_key(name)
            && vm.placement.owner == machine.id
            && vm.placement.phase == Phase::Started;
        if !ready {
            return false;
        }
        let mut placement = vm.placement.clone();
        placement.phase = Phase::Migrating { target: node_id(to) };
        let edit = Edit {
            vm: name.clone(),
            at: vm.revision,
            placement,
            gives_to: Some(node_id(to)),
            note: "migration".to_owned(),
        };
        self.put_edit(from, name, edit, Then::Copy { target: to });
        true
    }

    /// The placement says migrating, or not; then the target is made ready and the copy begins.
    pub(super) fn copy(&mut self, from: Index, edit: &Edit, target: Index, done: bool) {
        let name = &edit.vm;
        let process = self.machines[from].processes.get(name).cloned();
        let there = &self.machines[target];
        let ready = done
            && there.runs(self.now_ms)
            && there.storage
            && self.connected(from, target)
            && !there.processes.contains_key(name);
        let Some(process) = process.filter(|_| ready) else { return self.migration_failed(name) };
        let receiver = Process {
            state: State::Receives { complete: false },
            deadline_ms: None,
            stuck: false,
            ..process
        };
        self.machines[target].processes.insert(name.clone(), receiver);
        let after_ms = self.random.between(1_000, 6_000);
        self.begin_job(from, name, Job::Migrate(Migration { target }), Some(after_ms));
    }

    /// The memory is copied, or the copy has failed.
    pub(super) fn copied(&mut self, from: Index, name: &Name, migration: Migration) {
        let target = migration.target;
        let Some(vm) = self.store.vms.get(name).cloned() else { return };
        let fails = self.bodies.get_mut(name).is_some_and(|body| {
            let fails = body.fail_migrate > 0;
            body.fail_migrate -= u32::from(fails);
            fails
        });
        let received = self.machines[target].runs(self.now_ms)
            && self.connected(from, target)
            && self.machines[target]
                .processes
                .get(name)
                .is_some_and(|process| matches!(process.state, State::Receives { .. }));
        let source = self.machines[from].processes.get(name);
        let mine = vm.placement.owner == self.machines[from].id
            && matches!(vm.placement.phase, Phase::Migrating { .. })
            && source.is_some_and(|process| process.state == State::Runs && !process.stuck);
        if fails || !received || !mine {
            if matches!(
                self.machines[target].processes.get(name).map(|process| process.state),
                Some(State::Receives { .. })
            ) {
                self.end_process(target, name, None);
            }
            // The reconciler settles the placement.
            return self.migration_failed(name);
        }
        if let Some(process) = self.machines[from].processes.get_mut(name) {
            process.state = State::AwaitsCommit;
        }
        if let Some(process) = self.machines[target].processes.get_mut(name) {
            process.state = State::Receives { complete: true };
        }
        self.note_running(name);
        let mut placement = vm.placement.clone();
        let to_name = self.machines[target].name.to_string();
        let note = owner::committed(&mut placement, node_id(target), &to_name);
        let edit = Edit {
            vm: name.clone(),
            at: vm.revision,
            placement,
            gives_to: Some(node_id(target)),
            note,
        };
        self.put_edit(from, name, edit, Then::Migrated { target });
    }

    pub(super) fn migrated(&mut self, from: Index, edit: &Edit, target: Index, done: bool) {
        if !done {
            return self.migration_failed(&edit.vm);
        }
        let id = self.id_of(&edit.vm);
        self.tell(format!("{id}: {}", edit.note));
        self.judge_move(target, &edit.vm);
        let (asked, kind) = match self.asked.remove(&edit.vm) {
            Some((asked, kind)) => (Some(asked), kind),
            None => (None, Kind::Live),
        };
        self.moved(&edit.vm, from, target, kind);
        if let Some(body) = self.bodies.get_mut(&edit.vm) {
            body.was_on = Some(target);
        }
        if let Some(Asked { leader, term }) = asked {
            self.migration_ended(leader, term, &edit.vm, true);
        }
    }

    fn migration_failed(&mut self, name: &Name) {
        let id = self.id_of(name);
        self.tell(format!("{id}: its migration failed"));
        self.changed();
        if let Some((Asked { leader, term }, _)) = self.asked.remove(name) {
            self.migration_ended(leader, term, name, false);
        }
    }

    /// The target has read the commit.
    pub(super) fn run_incoming(&mut self, node: Index, name: &Name, vm: &Vm) {
        let (vm_id, generation) = (vm.placement.vm_id, vm.placement.generation);
        self.begin_process(node, name, vm_id, generation);
    }

    /// A source whose migration came to nothing.
    pub(super) fn run_on(&mut self, node: Index, name: &Name) {
        self.judge_start(node, name);
        if let Some(process) = self.machines[node].processes.get_mut(name) {
            process.state = State::Runs;
        }
        self.note_running(name);
    }
}
