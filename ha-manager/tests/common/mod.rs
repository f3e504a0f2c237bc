//! A cluster in words, and a plan in words, so that tests read like transcripts.

#![allow(dead_code, reason = "each test file uses its part")]

use ha_manager::{
    Action, ClusterState, NodeView, Now, Observations, Plan, Policy, Verdict, VmRef, VmView,
};
use proto::record::{NodeRecord, Phase, Placement, Requested};
use proto::{Name, NodeId, Revision};

pub(crate) const MIB: u64 = 1 << 20;

pub(crate) fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub(crate) fn id(node: &str) -> NodeId {
    NodeId(node.strip_prefix("node").unwrap().parse().unwrap())
}

pub(crate) fn phase(word: &str) -> Phase {
    match word.split_once("->") {
        Some(("migrating", target)) => Phase::Migrating { target: id(target) },
        Some(_) => panic!("{word}"),
        None => [
            Phase::Stopped,
            Phase::Starting,
            Phase::Started,
            Phase::Stopping,
            Phase::Recovering,
            Phase::Error,
            Phase::Unplaceable,
        ]
        .into_iter()
        .find(|phase| phase.word() == word)
        .unwrap(),
    }
}

#[derive(Debug, Default, Clone)]
pub(crate) struct Cluster {
    pub(crate) state: ClusterState,
    pub(crate) observations: Observations,
    pub(crate) policy: Policy,
    pub(crate) now: Now,
}

impl Cluster {
    /// One line each: `node1 alive|unknown|dead [drained] [fenced] [witness] [512MiB]` or
    /// `vm NAME on node1 PHASE [ha] [local] [down] [256MiB] [failed=N]
    /// [retry=UNIX_MS]`.
    pub(crate) fn new(text: &str) -> Self {
        let mut cluster = Self::default();
        text.lines().for_each(|line| cluster.add(line));
        cluster
    }

    pub(crate) fn add(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [] => {}
            ["vm", vm, "on", owner, phase_word, flags @ ..] => {
                self.state.vms.insert(name(vm), vm_view(id(owner), phase(phase_word), flags));
            }
            [node, verdict, flags @ ..] => self.add_node(node, verdict, flags),
            [_] => panic!("{line}"),
        }
    }

    fn add_node(&mut self, node: &str, verdict: &str, flags: &[&str]) {
        // By JSON, as the records are kept: fields that do not matter here have their defaults.
        let record: NodeRecord = serde_json::from_value(serde_json::json!({
            "node_id": id(node),
            "name": node,
            "api_address": "",
            "cpus": 4,
            "memory_bytes": size(flags).unwrap_or(1024 * MIB),
            "maintenance": flags.contains(&"drained"),
            "witness": flags.contains(&"witness"),
        }))
        .unwrap();
        let verdict = match verdict {
            "alive" => Verdict::Alive { age_ms: 0 },
            "unknown" => Verdict::Unknown { age_ms: 5_000 },
            "dead" => Verdict::Dead { age_ms: 10_000 },
            "following" => Verdict::NotLeading,
            other => panic!("{other}"),
        };
        let fenced = flags.contains(&"fenced").then_some(Revision(77));
        self.state.nodes.insert(id(node), NodeView { record, fenced });
        self.observations.verdicts.insert(id(node), verdict);
    }

    pub(crate) fn plan(&self) -> Plan {
        ha_manager::plan(&self.state, &self.observations, &self.policy, self.now)
    }

    /// The plan's actions, a line each.
    pub(crate) fn actions(&self) -> Vec<String> {
        self.plan().actions.iter().map(words).collect()
    }
}

fn number(flags: &[&str], prefix: &str) -> Option<u64> {
    flags.iter().find_map(|flag| flag.strip_prefix(prefix)).map(|text| text.parse().unwrap())
}

fn size(flags: &[&str]) -> Option<u64> {
    flags.iter().find_map(|flag| Some(flag.parse::<proto::ByteSize>().ok()?.0))
}

fn vm_view(owner: NodeId, phase: Phase, flags: &[&str]) -> VmView {
    let failed = flags.iter().find_map(|flag| flag.strip_prefix("failed="));
    let requested = if flags.contains(&"down") { Requested::Stopped } else { Requested::Started };
    let placement: Placement = serde_json::from_value(serde_json::json!({
        "vm_id": "00000000-0000-4000-8000-000000000001",
        "owner": owner,
        "generation": 3,
        "phase": phase,
        "requested": requested,
        "ha": flags.contains(&"ha"),
        "cpus": 1,
        "memory_bytes": size(flags).unwrap_or(256 * MIB),
        "start_failures": failed.map_or(0, |count| count.parse().unwrap()),
        "retry_at_unix_ms": number(flags, "retry="),
        "message": failed.map(|_| "no such kernel"),
    }))
    .unwrap();
    VmView { placement, mod_revision: Revision(40), movable: !flags.contains(&"local") }
}

fn vm_words(vm: &VmRef) -> String {
    format!("{} g{} r{}", vm.name, vm.generation, vm.mod_revision)
}

pub(crate) fn words(action: &Action) -> String {
    match action {
        Action::Fence { node, fenced, vms, .. } => {
            let vms: Vec<_> =
                vms.iter().map(|v| format!("{} {}", vm_words(&v.vm), v.phase.word())).collect();
            format!("fence node{node} r{fenced} [{}]", vms.join(", "))
        }
        Action::Start { vm, to, .. } => format!("start {} on node{to}", vm_words(vm)),
        Action::Migrate { vm, from, to, .. } => {
            format!("migrate {} node{from} -> node{to}", vm_words(vm))
        }
        Action::Reassign { vm, to, .. } => format!("reassign {} to node{to}", vm_words(vm)),
        Action::Delay { vm, until_unix_ms, .. } => {
            format!("delay {} until {until_unix_ms}", vm_words(vm))
        }
        Action::MarkUnplaceable { vm, message } => {
            format!("unplaceable {}: {message}", vm_words(vm))
        }
        Action::MarkError { vm, message } => format!("error {}: {message}", vm_words(vm)),
    }
}
