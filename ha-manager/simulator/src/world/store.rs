//! The replicated store: records with revisions, and transactions that compare them. A transaction is
//! committed some time after it was proposed, whatever has become of its proposer: it is in the log.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ha_manager::{
    Action, Disarm, Edit, FencedVm, Mobility, NodeView, Rules, VmView, Wishes, edits,
};
use proto::record::{Absence, NodeRecord, Phase, Placement, Requested};
use proto::{Generation, Name, NodeId, Revision, VmId};

use super::{Event, Index, Mistake, World, index};
use crate::outcome::Kind;
use crate::scenario::{Request, ResourceSpec};

#[derive(Debug)]
pub(super) struct Store {
    pub(super) vms: BTreeMap<Name, Vm>,
    pub(super) nodes: BTreeMap<NodeId, NodeRecord>,
    pub(super) fenced: BTreeMap<NodeId, Revision>,
    /// Which leadership may act: its term, and the record's revision.
    pub(super) ha_leader: (u64, Revision),
    pub(super) disarmed: Option<Disarm>,
    pub(super) unarmed: BTreeSet<NodeId>,
    pub(super) rules: Arc<Rules>,
    pub(super) up: bool,
    revision: u64,
    made: u128,
}

#[derive(Debug, Clone)]
pub(super) struct Vm {
    pub(super) placement: Placement,
    pub(super) revision: Revision,
    live: bool,
    pub(super) wishes: Arc<Wishes>,
}

impl Vm {
    pub(super) fn view(&self) -> VmView {
        VmView {
            placement: self.placement.clone(),
            mod_revision: self.revision,
            mobility: if self.live { Mobility::Live } else { Mobility::Cold },
            wishes: self.wishes.clone(),
        }
    }
}

/// A transaction on its way into the log.
#[derive(Debug, Clone)]
pub(super) struct Proposal {
    /// Who proposed it; `None`: a person.
    pub(super) by: Option<Index>,
    pub(super) what: What,
}

#[derive(Debug, Clone)]
pub(super) enum What {
    /// A new leadership says that it is the one that acts.
    OpenEpoch { term: u64 },
    /// Something the plan decided.
    Ha { epoch: Revision, term: u64, action: Action, edits: Vec<Edit> },
    /// Something a VM's owner says about it.
    Owner { edit: Edit, then: Then },
    /// A fenced node has ended all it ran.
    Clean { node: NodeId },
    /// A node's own record.
    Node { node: NodeId, change: NodeChange },
    /// A node's lease binds its VMs again.
    Rearmed { node: NodeId },
    /// What a person asks for, until it can be written.
    Person(Wish),
}

/// What a VM's owner goes on with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    Nothing,
    /// Copy the VM.
    Copy {
        target: Index,
    },
    /// The target's from now on.
    Migrated {
        target: Index,
    },
    /// Given to the target.
    HandedOver {
        target: Index,
    },
}

#[derive(Debug, Clone)]
pub(super) enum NodeChange {
    Absence(Option<Absence>),
    Watchdog(String),
    Maintenance(bool),
    Removed,
}

/// What a person asks for.
#[derive(Debug, Clone)]
pub(super) enum Wish {
    Node(NodeId, NodeChange),
    Request(Name, Request),
    Relocate(Name, NodeId),
    Lock(Name, bool),
    Add(Name, NodeId, Request),
    Delete(Name),
    Disarm(Option<Disarm>),
}

impl Store {
    pub(super) fn new(rules: &Rules) -> Self {
        Self {
            vms: BTreeMap::new(),
            nodes: BTreeMap::new(),
            fenced: BTreeMap::new(),
            ha_leader: (0, Revision(0)),
            disarmed: None,
            unarmed: BTreeSet::new(),
            rules: Arc::new(rules.clone()),
            up: true,
            revision: 1,
            made: 0,
        }
    }

    fn next(&mut self) -> Revision {
        self.revision += 1;
        Revision(self.revision)
    }

    pub(super) fn add_vm(
        &mut self,
        name: &Name,
        owner: NodeId,
        spec: &ResourceSpec,
        runs: bool,
    ) -> VmId {
        self.made += 1;
        let vm_id = VmId(uuid::Uuid::from_u128(self.made));
        let placement = Placement {
            vm_id,
            owner,
            generation: Generation(1),
            phase: if runs { Phase::Started } else { Phase::Stopped },
            requested: requested(spec.requested),
            ha: true,
            cpus: spec.cpus,
            memory_bytes: spec.memory_mib << 20,
            start_failures: 0,
            tried: Vec::new(),
            home: None,
            lock: spec.locked.then(|| "an operation".to_owned()),
            retry_at_unix_ms: None,
            message: None,
            events: Vec::new(),
        };
        let revision = self.next();
        let vm = Vm { placement, revision, live: spec.live, wishes: Arc::new(Wishes::default()) };
        self.vms.insert(name.clone(), vm);
        vm_id
    }

    pub(super) fn node_view(&self, id: NodeId, power_fencing: bool) -> Option<NodeView> {
        Some(NodeView {
            record: self.nodes.get(&id)?.clone(),
            fenced: self.fenced.get(&id).copied(),
            power_fencing,
            unarmed: self.unarmed.contains(&id),
        })
    }

    fn put(&mut self, edit: &Edit) {
        let revision = self.next();
        if let Some(vm) = self.vms.get_mut(&edit.vm) {
            vm.placement = edit.placement.clone();
            vm.revision = revision;
        }
    }

    /// Whether a VM may be given to the node.
    fn takes(&self, node: Option<NodeId>) -> bool {
        node.is_none_or(|node| !self.fenced.contains_key(&node) && self.nodes.contains_key(&node))
    }
}

pub(super) fn requested(request: Request) -> Requested {
    match request {
        Request::Started => Requested::Started,
        Request::Stopped => Requested::Stopped,
        Request::Ignored => Requested::Ignored,
    }
}

/// How soon a person, or their tool, tries again.
const AGAIN_MS: u64 = 500;

impl World {
    /// Whether a transaction can be committed now.
    pub(super) fn writable(&self) -> bool {
        self.store.up && self.raft.leader.is_some_and(|leader| self.has_majority(leader))
    }

    /// Whether `node` can read what is confirmed by a quorum, now.
    pub(super) fn reads(&self, node: Index) -> bool {
        self.machines[node].runs(self.now_ms)
            && self
                .raft
                .leader
                .is_some_and(|leader| self.has_majority(leader) && self.connected(node, leader))
    }

    /// Hands a transaction to the log. One in many is long in coming, if it `may_be_late`.
    pub(super) fn propose(&mut self, proposal: Proposal, may_be_late: bool) {
        // What is compared matters to what is late: where nothing is, that is looked for harder.
        let per_mille = if self.mistake == Some(Mistake::NoGenerationCheck) { 300 } else { 60 };
        let late = may_be_late && self.random.chance(per_mille);
        let after_ms =
            if late { self.random.between(50, 15_000) } else { self.random.between(3, 25) };
        self.in_flight += 1;
        self.push(after_ms, Event::Commit(Box::new(proposal)));
    }

    pub(super) fn commit(&mut self, proposal: Proposal) {
        self.in_flight -= 1;
        let done = self.writable() && self.apply(&proposal);
        self.after(&proposal, done);
    }

    /// Whether what it compares is still so; then it is written.
    fn apply(&mut self, proposal: &Proposal) -> bool {
        let compares = self.mistake != Some(Mistake::NoGenerationCheck);
        let unchanged = |store: &Store, edit: &Edit| {
            let vm = store.vms.get(&edit.vm);
            vm.is_some_and(|vm| !compares || vm.revision == edit.at) && store.takes(edit.gives_to)
        };
        match &proposal.what {
            What::OpenEpoch { term } => {
                if self.store.ha_leader.0 > *term {
                    return false;
                }
                self.store.ha_leader = (*term, self.store.next());
            }
            What::Ha { epoch, action, edits, .. } => {
                let current = !compares || self.store.ha_leader.1 == *epoch;
                let armed = self.store.disarmed.is_none();
                if !(current && armed && edits.iter().all(|edit| unchanged(&self.store, edit))) {
                    return false;
                }
                if let Action::Fence { node, fenced, .. } = action {
                    let present = self.store.fenced.get(node).copied().unwrap_or_default();
                    if compares && present != *fenced {
                        return false;
                    }
                    let revision = self.store.next();
                    self.store.fenced.insert(*node, revision);
                }
                self.judge_action(action);
                edits.iter().for_each(|edit| self.store.put(edit));
            }
            What::Owner { edit, .. } => {
                if !unchanged(&self.store, edit) {
                    return false;
                }
                self.store.put(edit);
            }
            What::Clean { node } => {
                self.store.fenced.remove(node);
            }
            What::Node { node, change } => self.change_node(*node, change),
            What::Rearmed { node } => {
                if self.store.disarmed.is_some() {
                    return false;
                }
                self.store.unarmed.remove(node);
            }
            What::Person(wish) => self.grant(wish),
        }
        self.judge_majority();
        self.changed();
        true
    }

    fn change_node(&mut self, node: NodeId, change: &NodeChange) {
        let Some(record) = self.store.nodes.get_mut(&node) else { return };
        match change {
            NodeChange::Absence(absence) => record.absence = *absence,
            NodeChange::Watchdog(watchdog) => record.watchdog.clone_from(watchdog),
            NodeChange::Maintenance(on) => record.maintenance = *on,
            NodeChange::Removed => {
                self.store.nodes.remove(&node);
                self.store.fenced.remove(&node);
                self.store.unarmed.remove(&node);
                self.machines[index(node)].removed = true;
            }
        }
    }

    fn grant(&mut self, wish: &Wish) {
        match wish {
            Wish::Node(node, change) => self.change_node(*node, change),
            Wish::Request(name, request) => self.change_vm(name, |placement| {
                placement.requested = requested(*request);
                ha_manager::owner::forget_failures(placement);
                placement.phase = match (request, placement.phase) {
                    (Request::Started, Phase::Stopped | Phase::Error | Phase::Unplaceable) => {
                        Phase::Stopped
                    }
                    (Request::Started, Phase::Stopping) => Phase::Stopping,
                    (
                        Request::Stopped,
                        Phase::Starting
                        | Phase::Started
                        | Phase::Stopping
                        | Phase::Migrating { .. }
                        | Phase::Relocating { .. },
                    ) => Phase::Stopping,
                    (Request::Stopped, _) => Phase::Stopped,
                    (_, phase) => phase,
                };
            }),
            Wish::Relocate(name, to) => self.change_vm(name, |placement| {
                if placement.phase == Phase::Started {
                    placement.phase = Phase::Relocating { target: *to };
                    placement.home = None;
                }
            }),
            Wish::Lock(name, on) => self.change_vm(name, |placement| {
                placement.lock = on.then(|| "an operation".to_owned());
            }),
            Wish::Add(name, owner, request) => {
                let spec = ResourceSpec::plain(self.machines[index(*owner)].name.clone(), *request);
                self.store.add_vm(name, *owner, &spec, false);
            }
            Wish::Delete(name) => {
                self.store.vms.remove(name);
            }
            Wish::Disarm(disarm) => {
                if disarm.is_some() {
                    self.store.unarmed = self.store.nodes.keys().copied().collect();
                }
                self.store.disarmed = *disarm;
            }
        }
    }

    fn change_vm(&mut self, name: &Name, change: impl FnOnce(&mut Placement)) {
        let revision = self.store.next();
        if let Some(vm) = self.store.vms.get_mut(name) {
            change(&mut vm.placement);
            vm.revision = revision;
        }
    }

    /// What follows from a transaction, committed or not.
    fn after(&mut self, proposal: &Proposal, done: bool) {
        match &proposal.what {
            What::OpenEpoch { term } => {
                let Some(by) = proposal.by else { return };
                self.epoch_opened(by, *term, done);
            }
            What::Ha { term, action, .. } => {
                if let (Action::Fence { node, .. }, Some(by)) = (action, proposal.by) {
                    self.fencing_settled(by, *term, *node);
                }
                if done {
                    self.tell_action(action);
                }
            }
            What::Owner { edit, then } => {
                let Some(by) = proposal.by else { return };
                self.owner_settled(by, edit, *then, done);
            }
            What::Clean { node } => {
                let machine = &mut self.machines[index(*node)];
                machine.cleaning = false;
                if done {
                    let name = machine.name.clone();
                    self.tell(format!("{name}: has ended what it ran, and takes part again"));
                }
            }
            What::Node { node, change } => {
                if let (true, NodeChange::Watchdog(watchdog)) = (done, change)
                    && watchdog.is_empty()
                {
                    let name = self.machines[index(*node)].name.clone();
                    self.tell(format!("{name}: says that its watchdog does not work"));
                }
            }
            What::Rearmed { .. } => {}
            What::Person(_) if done => {}
            What::Person(_) => {
                self.in_flight += 1;
                self.push(AGAIN_MS, Event::Commit(Box::new(proposal.clone())));
            }
        }
        if done {
            self.wake_everyone();
        }
    }

    /// Everyone sees what has changed, and looks.
    fn wake_everyone(&mut self) {
        for node in 0..self.machines.len() {
            if self.machines[node].power && self.machines[node].agent {
                self.wake(node);
            }
        }
    }

    fn tell_action(&mut self, action: &Action) {
        if let Some((vm, reason)) = edits_told(action) {
            let id = self.id_of(vm);
            self.tell(format!("{id}: {reason}"));
        }
        match action {
            Action::Fence { node, vms, reason, .. } => {
                let name = self.machines[index(*node)].name.clone();
                self.outcome.fenced(&name);
                self.tell(format!("{name} is fenced: {reason}"));
                for FencedVm { vm, phase } in vms {
                    let id = self.id_of(&vm.name);
                    self.tell(format!("{id}: {}", phase.word()));
                }
            }
            Action::Start { vm, to, .. } => {
                let to = index(*to);
                if let Some(from) = self.bodies.get(&vm.name).and_then(|body| body.was_on)
                    && from != to
                {
                    let kind = self.bodies.get(&vm.name).map_or(Kind::Recover, |body| body.next);
                    self.moved(&vm.name, from, to, kind);
                }
            }
            _ => {}
        }
    }

    pub(super) fn edits_of(&self, action: &Action, state: &ha_manager::ClusterState) -> Vec<Edit> {
        edits(state, action)
    }
}

/// Actions that a line of their reason tells.
fn edits_told(action: &Action) -> Option<(&Name, &str)> {
    match action {
        Action::Start { vm, reason, .. }
        | Action::Relocate { vm, reason, .. }
        | Action::Reassign { vm, reason, .. }
        | Action::Stop { vm, reason }
        | Action::Freeze { vm, reason }
        | Action::Delay { vm, reason, .. } => Some((&vm.name, reason)),
        Action::MarkUnplaceable { vm, message } | Action::MarkError { vm, message } => {
            Some((&vm.name, message))
        }
        Action::Fence { .. }
        | Action::PowerOff { .. }
        | Action::Migrate { .. }
        | Action::Remember { .. } => None,
    }
}
