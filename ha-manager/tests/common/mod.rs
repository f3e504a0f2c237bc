//! A cluster in words, and a plan in words, so that tests read like transcripts.

#![allow(dead_code, reason = "each test file uses its part")]

use std::sync::Arc;

use ha_manager::{
    Action, ClusterState, Explainer, Mobility, NodeView, Now, Observations, Plan, Policy, Rules,
    Verdict, VmRef, VmReport, VmView, Wishes,
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
        Some(("relocating", target)) => Phase::Relocating { target: id(target) },
        Some(_) => panic!("{word}"),
        None => [
            Phase::Stopped,
            Phase::Starting,
            Phase::Started,
            Phase::Stopping,
            Phase::Recovering,
            Phase::Error,
            Phase::Unplaceable,
            Phase::Frozen,
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
    /// One line each: `node1 alive|unknown|dead [drained] [fenced] [witness] [unguarded] [power]
    /// [shutdown|reboot] [clear] [512MiB]` or `vm NAME on node1 PHASE [ha] [local] [cold] [down]
    /// [ignored] [256MiB] [failed=N] [tried=N] [restarts=N] [relocations=N] [priority=N] [after=VM]
    /// [home=node1] [locked] [sticky] [retry=UNIX_MS]`.
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
            "watchdog": if flags.contains(&"unguarded") { "" } else { "softdog" },
            "absence": absence(flags),
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
        let power_fencing = flags.contains(&"power");
        let unarmed = flags.contains(&"unarmed");
        self.state.nodes.insert(id(node), NodeView { record, fenced, power_fencing, unarmed });
        self.observations.verdicts.insert(id(node), verdict);
    }

    pub(crate) fn plan(&self) -> Plan {
        ha_manager::plan(&self.state, &self.observations, &self.policy, self.now)
    }

    /// Gives the cluster rules: `nodes[!] a b @ node1=2 node2`, `together[!] a b`, `apart[!] a b`.
    pub(crate) fn rules(&mut self, lines: &[&str]) {
        self.state.rules =
            Arc::new(Rules::unchecked(lines.iter().map(|text| rule(text)).collect()));
    }

    /// Why a VM is where it is.
    pub(crate) fn explain(&self, vm: &str) -> VmReport {
        let plan = self.plan();
        let explainer = Explainer::new(&self.state, &self.observations, &self.policy, &plan);
        explainer.explain(&name(vm)).unwrap()
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

fn absence(flags: &[&str]) -> serde_json::Value {
    let clear = flags.contains(&"clear");
    let kind = flags.iter().find(|flag| ["shutdown", "reboot"].contains(flag));
    kind.map_or(serde_json::Value::Null, |kind| serde_json::json!({"kind": kind, "clear": clear}))
}

fn rule(text: &str) -> ha_manager::Rule {
    let (head, nodes) = text.split_once('@').unwrap_or((text, ""));
    let mut words = head.split_whitespace();
    let word = words.next().unwrap();
    let kind = match word.trim_end_matches('!') {
        "nodes" => ha_manager::rules::Kind::NodeAffinity,
        "together" => ha_manager::rules::Kind::Affinity,
        "apart" => ha_manager::rules::Kind::AntiAffinity,
        other => panic!("{other}"),
    };
    let nodes = nodes.split_whitespace().map(|node| {
        let (node, weight) = node.split_once('=').unwrap_or((node, "0"));
        (name(node), weight.parse().unwrap())
    });
    let resources = words.map(name).collect();
    ha_manager::Rule { kind, resources, nodes: nodes.collect(), strict: word.ends_with('!') }
}

fn vm_view(owner: NodeId, phase: Phase, flags: &[&str]) -> VmView {
    let failed = number(flags, "failed=").unwrap_or(0);
    let requested = match (flags.contains(&"down"), flags.contains(&"ignored")) {
        (true, _) => Requested::Stopped,
        (false, true) => Requested::Ignored,
        (false, false) => Requested::Started,
    };
    let tried: Vec<u64> = (0..number(flags, "tried=").unwrap_or(0)).map(|n| 90 + n).collect();
    let home = flags.iter().find_map(|flag| flag.strip_prefix("home=")).map(id);
    let placement: Placement = serde_json::from_value(serde_json::json!({
        "vm_id": "00000000-0000-4000-8000-000000000001",
        "owner": owner,
        "generation": 3,
        "phase": phase,
        "requested": requested,
        "ha": flags.contains(&"ha"),
        "cpus": 1,
        "memory_bytes": size(flags).unwrap_or(256 * MIB),
        "start_failures": failed,
        "tried": tried,
        "home": home,
        "lock": flags.contains(&"locked").then_some("a backup"),
        "retry_at_unix_ms": number(flags, "retry="),
        "message": (failed > 0).then_some("no such kernel"),
    }))
    .unwrap();
    let small = |prefix| number(flags, prefix).and_then(|number| u32::try_from(number).ok());
    let wishes = Wishes {
        priority: small("priority=").and_then(|number| i32::try_from(number).ok()).unwrap_or(0),
        after: flags.iter().filter_map(|flag| flag.strip_prefix("after=")).map(name).collect(),
        max_restarts: small("restarts=").unwrap_or(1),
        max_relocations: small("relocations=").unwrap_or(1),
        failback: !flags.contains(&"sticky"),
    };
    let mobility = match (flags.contains(&"local"), flags.contains(&"cold")) {
        (true, _) => Mobility::Bound,
        (false, true) => Mobility::Cold,
        (false, false) => Mobility::Live,
    };
    VmView { placement, mod_revision: Revision(40), mobility, wishes: Arc::new(wishes) }
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
        Action::PowerOff { node, .. } => format!("power off node{node}"),
        Action::Relocate { vm, from, to, .. } => {
            format!("relocate {} node{from} -> node{to}", vm_words(vm))
        }
        Action::Remember { vm, home, .. } => match home {
            Some(home) => format!("remember {} of node{home}", vm_words(vm)),
            None => format!("forget home of {}", vm_words(vm)),
        },
        Action::Stop { vm, .. } => format!("stop {}", vm_words(vm)),
        Action::Freeze { vm, .. } => format!("freeze {}", vm_words(vm)),
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
