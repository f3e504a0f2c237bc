//! The scenario format: a cluster, what happens to it, and what must come out. TOML, or JSON of the
//! same structure.

use std::collections::{BTreeMap, BTreeSet};

use ha_manager::rules::{Conflict, Kind, Rule};
use ha_manager::{Balance, Policy, Rules, Shutdown, Timing, Wishes};
use proto::{Name, TimeSpan};
use serde::{Deserialize, Serialize};

use crate::command::{Command, CommandError};

/// A scenario as it is written.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What it shows.
    #[serde(default)]
    pub name: String,
    /// Jitter of heartbeats, message delay, work times; the same seed is the same run.
    #[serde(default)]
    pub seed: u64,
    /// What the operator chose.
    #[serde(default)]
    pub policy: PolicySpec,
    /// By name.
    pub nodes: BTreeMap<Name, NodeSpec>,
    /// By id, as in `vm:101`.
    #[serde(default)]
    pub resources: BTreeMap<String, ResourceSpec>,
    /// Which of them belong together, apart, or on which nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<RuleSpec>,
    /// What happens, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<StepSpec>,
    /// What must come out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expect: Option<Expect>,
}

/// What the operator chose; what is absent is the product's default.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicySpec {
    /// The lease time L.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease_ms: Option<u64>,
    /// What happens to VMs of a node that goes down as planned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shutdown: Option<Shutdown>,
    /// How load is counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balance: Option<Balance>,
    /// A VM that is started goes to the least loaded node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rebalance_on_start: Option<bool>,
    /// Running VMs are moved when the load is uneven.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_rebalance: Option<bool>,
    /// HA VMs run only where a watchdog or power fencing is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub require_watchdog: Option<bool>,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeSpec {
    /// At the beginning.
    pub power: Switch,
    /// At the beginning.
    pub network: Switch,
    /// Logical CPUs.
    pub cpus: u32,
    /// Memory that VMs may use.
    pub memory_mib: u64,
    /// Resets it when it hangs.
    pub watchdog: bool,
    /// Something outside can cut its power and confirm.
    pub power_fencing: bool,
}

impl Default for NodeSpec {
    fn default() -> Self {
        Self {
            power: Switch::On,
            network: Switch::On,
            cpus: 16,
            memory_mib: 65_536,
            watchdog: true,
            power_fencing: false,
        }
    }
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Switch {
    /// On.
    #[default]
    On,
    /// Off.
    Off,
}

/// What a person wants of a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// To run.
    #[default]
    Started,
    /// Not to run.
    Stopped,
    /// HA is to leave it alone.
    Ignored,
}

/// A VM that is highly available.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResourceSpec {
    /// Its owner at the beginning.
    pub node: Name,
    /// What is asked for.
    #[serde(default)]
    pub requested: Request,
    /// Whether it runs at the beginning; absent: if it is asked to and its node is on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<bool>,
    /// vCPUs.
    #[serde(default = "two")]
    pub cpus: u32,
    /// Guest memory.
    #[serde(default = "two_gib")]
    pub memory_mib: u64,
    /// What it takes of its node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<UsageSpec>,
    /// Failed starts that are tried again on the same node.
    #[serde(default = "one")]
    pub max_restarts: u32,
    /// Nodes it is given to after that.
    #[serde(default = "one")]
    pub max_relocations: u32,
    /// It returns to nodes it prefers.
    #[serde(default = "yes")]
    pub failback: bool,
    /// It can move while it runs.
    #[serde(default = "yes")]
    pub live: bool,
    /// Higher first.
    #[serde(default)]
    pub priority: i32,
    /// Started after these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<String>,
    /// An operation holds it.
    #[serde(default)]
    pub locked: bool,
    /// So many first starts fail.
    #[serde(default)]
    pub fail_start: Failures,
    /// So many first migrations fail.
    #[serde(default)]
    pub fail_migrate: u32,
    /// So many first stops fail.
    #[serde(default)]
    pub fail_stop: u32,
}

impl ResourceSpec {
    /// With all the defaults.
    #[must_use]
    pub fn plain(node: Name, requested: Request) -> Self {
        Self {
            node,
            requested,
            running: None,
            cpus: two(),
            memory_mib: two_gib(),
            usage: None,
            max_restarts: one(),
            max_relocations: one(),
            failback: true,
            live: true,
            priority: 0,
            after: Vec::new(),
            locked: false,
            fail_start: Failures::default(),
            fail_migrate: 0,
            fail_stop: 0,
        }
    }
}

fn one() -> u32 {
    1
}

fn two() -> u32 {
    2
}

fn two_gib() -> u64 {
    2048
}

fn yes() -> bool {
    true
}

/// What a VM takes of its node.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UsageSpec {
    /// CPUs.
    pub cpus: f64,
    /// Memory.
    pub memory_mib: u64,
}

/// How many first starts fail.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Failures {
    /// On each node.
    Everywhere(u32),
    /// On these nodes.
    On(BTreeMap<Name, u32>),
}

impl Default for Failures {
    fn default() -> Self {
        Self::Everywhere(0)
    }
}

impl Failures {
    /// On this node.
    #[must_use]
    pub fn on(&self, node: &Name) -> u32 {
        match self {
            Self::Everywhere(count) => *count,
            Self::On(counts) => counts.get(node).copied().unwrap_or_default(),
        }
    }
}

/// A rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleSpec {
    /// What it asks for.
    pub kind: Kind,
    /// Of which resources.
    pub resources: Vec<String>,
    /// Nodes with their weights.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub nodes: BTreeMap<Name, u32>,
    /// It must hold.
    #[serde(default)]
    pub strict: bool,
}

/// Commands, and when.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepSpec {
    /// `quiescent`, or so long after the step before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// One after the other, at once.
    #[serde(default, rename = "do")]
    pub commands: Vec<String>,
}

/// What must come out.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// Exactly these nodes were fenced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fenced: Option<Vec<Name>>,
    /// By id.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub resources: BTreeMap<String, ExpectResource>,
    /// By name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub nodes: BTreeMap<Name, ExpectNode>,
}

/// What a resource must be like in the end.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpectResource {
    /// Its state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Its owner, one of these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on: Option<Vec<Name>>,
    /// It was down for no longer than this in all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub down_ms_max: Option<u64>,
    /// It changed its node so often.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moves: Option<usize>,
}

/// What a node must be like in the end.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpectNode {
    /// Its state.
    pub state: String,
}

/// Why a scenario is refused.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// Not TOML of this structure; the message shows the place.
    #[error("{0}")]
    Toml(#[from] toml::de::Error),
    /// Not JSON of this structure.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    /// It says something that makes no sense.
    #[error("{place}: {why}")]
    Invalid {
        /// Where, as in `steps[2].do[0]`, with the line where it is known.
        place: String,
        /// What is wrong.
        why: String,
    },
}

fn invalid(place: impl Into<String>, why: impl ToString) -> ScenarioError {
    ScenarioError::Invalid { place: place.into(), why: why.to_string() }
}

/// When a step happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// When nothing is under way and no timer is left to fire.
    Quiescent,
    /// So long after the step before.
    After {
        /// Milliseconds.
        ms: u64,
    },
}

/// A step that was understood.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// When.
    pub when: When,
    /// What.
    pub commands: Vec<Command>,
}

/// A scenario that makes sense.
#[derive(Debug, Clone)]
pub struct Checked {
    /// As it is written.
    pub spec: Scenario,
    /// All of its policy.
    pub policy: Policy,
    /// Lease and all that scales from it.
    pub timing: Timing,
    /// Its rules, by resource name.
    pub rules: Rules,
    /// Its steps.
    pub steps: Vec<Step>,
    /// The names that decisions know resources by, by id.
    pub names: BTreeMap<String, Name>,
}

impl Checked {
    /// What the resource asks of HA.
    #[must_use]
    pub fn wishes(&self, spec: &ResourceSpec) -> Wishes {
        Wishes {
            priority: spec.priority,
            after: spec.after.iter().filter_map(|id| self.names.get(id).cloned()).collect(),
            max_restarts: spec.max_restarts,
            max_relocations: spec.max_relocations,
            failback: spec.failback,
        }
    }
}

/// `vm:101` → `101`; another kind stays in the name.
pub(crate) fn resource_name(id: &str) -> Result<Name, String> {
    let text = match id.split_once(':') {
        Some(("vm", name)) => name.to_owned(),
        Some((kind, name)) => format!("{kind}-{name}"),
        None => id.to_owned(),
    };
    text.parse::<Name>().map_err(|error| format!("resource `{id}`: {error}"))
}

impl Scenario {
    /// Reads TOML.
    ///
    /// # Errors
    /// [`ScenarioError`], with the place.
    pub fn from_toml(text: &str) -> Result<Checked, ScenarioError> {
        let scenario: Self = toml::from_str(text)?;
        scenario.check(text)
    }

    /// Reads JSON.
    ///
    /// # Errors
    /// [`ScenarioError`], with the place.
    pub fn from_json(text: &str) -> Result<Checked, ScenarioError> {
        let scenario: Self = serde_json::from_str(text)?;
        scenario.check(text)
    }

    /// Checks what the structure alone does not say. `text` is what it was read from.
    ///
    /// # Errors
    /// [`ScenarioError::Invalid`].
    pub fn check(self, text: &str) -> Result<Checked, ScenarioError> {
        if self.nodes.is_empty() {
            return Err(invalid("nodes", "there is none: a cluster needs at least one"));
        }
        for (name, node) in &self.nodes {
            if node.cpus == 0 || node.memory_mib == 0 || node.memory_mib > 1 << 30 {
                let why = "cpus and memory_mib must be more than 0, memory_mib at most 2^30";
                return Err(invalid(format!("nodes.{name}"), why));
            }
        }
        let lease_ms = self.policy.lease_ms.unwrap_or(Timing::LEASE_DEFAULT_MS);
        let timing = Timing::new(lease_ms).map_err(|error| invalid("policy.lease_ms", error))?;
        let names = self.check_resources()?;
        let rules = self.check_rules(&names)?;
        let mut known = Known {
            nodes: self.nodes.keys().cloned().collect(),
            resources: names.keys().cloned().collect(),
            ever: names.keys().cloned().collect(),
        };
        let nodes = known.nodes.clone();
        let mut steps = Vec::new();
        for (index, step) in self.steps.iter().enumerate() {
            steps.push(check_step(index, step, &mut known, text)?);
        }
        let mut names = names;
        for id in &known.ever {
            if !names.contains_key(id) {
                let name = resource_name(id).map_err(|why| invalid("steps", why))?;
                names.insert(id.clone(), name);
            }
        }
        known.nodes.extend(nodes);
        if let Some(expect) = &self.expect {
            check_expect(expect, &known)?;
        }
        let policy = self.policy.whole(timing);
        Ok(Checked { policy, timing, rules, steps, names, spec: self })
    }

    fn check_resources(&self) -> Result<BTreeMap<String, Name>, ScenarioError> {
        let mut names = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for (id, resource) in &self.resources {
            let place = format!("resources.\"{id}\"");
            let name = resource_name(id).map_err(|why| invalid(place.clone(), why))?;
            if !seen.insert(name.clone()) {
                return Err(invalid(place, format!("another resource is called `{name}` already")));
            }
            names.insert(id.clone(), name);
            if !self.nodes.contains_key(&resource.node) {
                let why = format!("there is no node `{}`", resource.node);
                return Err(invalid(format!("{place}.node"), why));
            }
            if resource.cpus == 0 || resource.memory_mib == 0 || resource.memory_mib > 1 << 30 {
                let why = "cpus and memory_mib must be more than 0, memory_mib at most 2^30";
                return Err(invalid(place, why));
            }
            if resource.usage.is_some_and(|usage| !(0.0..=1e6).contains(&usage.cpus)) {
                return Err(invalid(format!("{place}.usage.cpus"), "0 to 1000000 is allowed"));
            }
            if let Failures::On(nodes) = &resource.fail_start
                && let Some(node) = nodes.keys().find(|node| !self.nodes.contains_key(node))
            {
                let why = format!("there is no node `{node}`");
                return Err(invalid(format!("{place}.fail_start"), why));
            }
        }
        for (id, resource) in &self.resources {
            if let Some(other) = resource.after.iter().find(|other| !names.contains_key(*other)) {
                let why = format!("there is no resource `{other}`");
                return Err(invalid(format!("resources.\"{id}\".after"), why));
            }
        }
        let after = |id: &String| self.resources.get(id).map_or(&[][..], |r| &r.after[..]);
        if let Some(cycle) = ha_manager::rules::cycle(self.resources.keys(), after) {
            let cycle: Vec<&str> = cycle.into_iter().map(String::as_str).collect();
            let why = format!("they wait for each other: {}", cycle.join(" after "));
            return Err(invalid(format!("resources.\"{}\".after", cycle[0]), why));
        }
        Ok(names)
    }

    fn check_rules(&self, names: &BTreeMap<String, Name>) -> Result<Rules, ScenarioError> {
        let mut list = Vec::new();
        for (index, rule) in self.rules.iter().enumerate() {
            let mut resources = Vec::new();
            for id in &rule.resources {
                let place = || format!("rules[{index}].resources");
                let name = names
                    .get(id)
                    .ok_or_else(|| invalid(place(), format!("there is no resource `{id}`")))?;
                resources.push(name.clone());
            }
            let RuleSpec { kind, nodes, strict, .. } = rule.clone();
            list.push(Rule { kind, resources, nodes, strict });
        }
        let vms = names.values().cloned().collect();
        let nodes = self.nodes.keys().cloned().collect();
        Rules::new(list, &vms, &nodes).map_err(|conflict: Conflict| invalid("rules", conflict))
    }
}

impl PolicySpec {
    fn whole(self, timing: Timing) -> Policy {
        let default = Policy::with_timing(timing);
        Policy {
            shutdown: self.shutdown.unwrap_or(default.shutdown),
            balance: self.balance.unwrap_or(default.balance),
            rebalance_on_start: self.rebalance_on_start.unwrap_or(default.rebalance_on_start),
            auto_rebalance: self.auto_rebalance.unwrap_or(default.auto_rebalance),
            require_watchdog: self.require_watchdog.unwrap_or(default.require_watchdog),
            ..default
        }
    }
}

/// What commands may speak of, as far as the steps before have come.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) nodes: BTreeSet<Name>,
    pub(crate) resources: BTreeSet<String>,
    /// Those that were deleted, too.
    pub(crate) ever: BTreeSet<String>,
}

fn check_step(
    index: usize,
    step: &StepSpec,
    known: &mut Known,
    text: &str,
) -> Result<Step, ScenarioError> {
    let when = match step.after.as_deref() {
        None | Some("quiescent") => When::Quiescent,
        Some(span) => {
            let span: TimeSpan = span.parse().map_err(|error| {
                let why = format!("`quiescent`, or a time as in `30s`: {error}");
                invalid(format!("steps[{index}].after"), why)
            })?;
            When::After { ms: span.as_ms() }
        }
    };
    let mut commands = Vec::new();
    for (number, command) in step.commands.iter().enumerate() {
        let parsed = Command::parse(command, known).map_err(|error: CommandError| {
            let quoted = format!("\"{command}\"");
            let line = text.lines().position(|line| line.contains(&quoted));
            let line = line.map_or_else(String::new, |line| format!(" (line {})", line + 1));
            invalid(format!("steps[{index}].do[{number}]{line}"), error)
        })?;
        commands.push(parsed);
    }
    Ok(Step { when, commands })
}

const STATES: [&str; 5] = ["running", "stopped", "error", "unplaceable", "frozen"];

fn check_expect(expect: &Expect, known: &Known) -> Result<(), ScenarioError> {
    let node = |place: String, node: &Name| match known.nodes.contains(node) {
        true => Ok(()),
        false => Err(invalid(place, format!("there is no node `{node}`"))),
    };
    for name in expect.fenced.iter().flatten() {
        node("expect.fenced".to_owned(), name)?;
    }
    for name in expect.nodes.keys() {
        node("expect.nodes".to_owned(), name)?;
    }
    for (id, wanted) in &expect.resources {
        let place = format!("expect.resources.\"{id}\"");
        if !known.ever.contains(id) {
            return Err(invalid(place, format!("there is no resource `{id}`")));
        }
        if let Some(state) = wanted.state.as_deref().filter(|state| !STATES.contains(state)) {
            let why = format!("`{state}` is none of {}", STATES.join(", "));
            return Err(invalid(format!("{place}.state"), why));
        }
        for name in wanted.on.iter().flatten() {
            node(format!("{place}.on"), name)?;
        }
    }
    Ok(())
}
