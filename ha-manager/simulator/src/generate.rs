//! Random scenarios: three to five nodes, some VMs with rules, and a dozen things that go wrong.

use std::collections::BTreeMap;

use ha_manager::rules::Kind;
use ha_manager::{Balance, Shutdown};
use proto::Name;

use crate::random::Random;
use crate::scenario::{
    Failures, NodeSpec, PolicySpec, Request, ResourceSpec, RuleSpec, Scenario, StepSpec,
};

/// The scenario of a seed.
#[must_use]
pub fn scenario(seed: u64) -> Scenario {
    let mut generator = Generator { random: Random::new(seed ^ 0x5eed), nodes: Vec::new() };
    let mut scenario = generator.cluster(seed);
    // Rules that contradict each other are refused; then without them.
    if scenario.clone().check("").is_err() {
        scenario.rules.clear();
    }
    scenario
}

struct Generator {
    random: Random,
    nodes: Vec<Name>,
}

impl Generator {
    fn cluster(&mut self, seed: u64) -> Scenario {
        let count = self.random.between(3, 5);
        self.nodes = (1..=count).filter_map(|n| format!("node{n}").parse().ok()).collect();
        let nodes: BTreeMap<Name, NodeSpec> =
            self.nodes.clone().into_iter().map(|name| (name, self.node())).collect();
        let vms = self.random.between(2, 9);
        let ids: Vec<String> = (1..=vms).map(|n| format!("vm:{}", 100 + n)).collect();
        let mut resources: BTreeMap<String, ResourceSpec> = BTreeMap::new();
        for id in &ids {
            let resource = self.resource(&resources);
            resources.insert(id.clone(), resource);
        }
        let rules = (0..self.random.between(0, 2)).map(|_| self.rule(&ids)).collect();
        let mut steps: Vec<StepSpec> =
            (0..self.random.between(3, 12)).map(|_| self.step(&ids)).collect();
        if self.chance(10)
            && let Some((id, resource)) = resources.first_key_value()
        {
            // What only a reset ends, on a node whose lease runs out.
            let commands = vec![format!("stick {id}"), format!("network {} off", resource.node)];
            steps.insert(0, StepSpec { after: Some("5s".to_owned()), commands });
            steps.insert(1, StepSpec { after: Some("20s".to_owned()), commands: Vec::new() });
        }
        let mut scenario = Scenario {
            name: format!("seed {seed}"),
            seed,
            policy: self.policy(),
            nodes,
            resources,
            rules,
            steps,
            expect: None,
        };
        if self.chance(40) {
            let rate = |generator: &mut Self| generator.random.between(91, 109);
            let commands = self.nodes.clone().into_iter().map(|node| {
                let rate = rate(self);
                format!("skew {node} {}.{:02}", rate / 100, rate % 100)
            });
            let commands = commands.collect();
            scenario.steps.insert(0, StepSpec { after: Some("0s".to_owned()), commands });
        }
        // A watchdog that fails unnoticed, on a node that hangs, is what no manager can know of.
        let says = |step: &StepSpec, word: &str| step.commands.iter().any(|c| c.starts_with(word));
        if scenario.steps.iter().any(|step| says(step, "store")) {
            scenario.steps.retain(|step| !says(step, "fail-watchdog"));
        }
        for index in 0..scenario.steps.len() {
            if says(&scenario.steps[index], "fail-watchdog") {
                scenario.steps[index].commands.retain(|command| command.starts_with("fail-"));
                scenario.steps[index].after = Some("quiescent".to_owned());
                if let Some(next) = scenario.steps.get_mut(index + 1) {
                    next.after = Some("20s".to_owned());
                }
            }
        }
        // In the end nothing is wrong any more: what should run must run.
        let node_steps: Vec<String> = self
            .nodes
            .iter()
            .flat_map(|node| [format!("power {node} on"), format!("network {node} on")])
            .collect();
        let calm = ["heal", "loss 0%", "delay 0ms", "store up", "arm"];
        let commands = calm.iter().map(|text| (*text).to_owned()).chain(node_steps).collect();
        let after = Some("1s".to_owned());
        scenario.steps.push(StepSpec { after, commands });
        scenario
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.random.chance(percent * 10)
    }

    fn one<T: Clone>(&mut self, of: &[T]) -> Option<T> {
        self.random.pick(of).cloned()
    }

    fn any_node(&mut self) -> String {
        let nodes = self.nodes.clone();
        self.one(&nodes).map_or_else(String::new, |name| name.to_string())
    }

    fn policy(&mut self) -> PolicySpec {
        let shutdowns =
            [Shutdown::Migrate, Shutdown::Failover, Shutdown::Freeze, Shutdown::Conditional];
        let balances = [Balance::Count, Balance::Static, Balance::Dynamic];
        PolicySpec {
            lease_ms: self.one(&[None, None, Some(5_000), Some(20_000)]).flatten(),
            shutdown: self.one(&shutdowns),
            balance: self.one(&balances),
            rebalance_on_start: Some(self.chance(30)),
            auto_rebalance: Some(self.chance(30)),
            require_watchdog: None,
        }
    }

    fn node(&mut self) -> NodeSpec {
        NodeSpec {
            memory_mib: self.random.between(4, 32) * 1024,
            watchdog: !self.chance(8),
            power_fencing: self.chance(25),
            ..NodeSpec::default()
        }
    }

    fn resource(&mut self, before: &BTreeMap<String, ResourceSpec>) -> ResourceSpec {
        let nodes = self.nodes.clone();
        let node = self.one(&nodes).unwrap_or_else(|| nodes[0].clone());
        let requests = [Request::Started, Request::Started, Request::Started, Request::Stopped];
        let requested = self.one(&requests).unwrap_or_default();
        let before: Vec<String> = before.keys().cloned().collect();
        let after = if self.chance(15) { self.one(&before).into_iter().collect() } else { vec![] };
        ResourceSpec {
            memory_mib: self.random.between(1, 3) * 512,
            max_restarts: u32::try_from(self.random.between(0, 2)).unwrap_or_default(),
            max_relocations: u32::try_from(self.random.between(0, 2)).unwrap_or_default(),
            failback: self.chance(70),
            live: self.chance(80),
            priority: i32::try_from(self.random.between(0, 3)).unwrap_or_default(),
            fail_start: Failures::Everywhere(u32::from(self.chance(10))),
            fail_migrate: u32::from(self.chance(10)),
            fail_stop: u32::from(self.chance(5)),
            locked: self.chance(3),
            after,
            ..ResourceSpec::plain(node, requested)
        }
    }

    fn rule(&mut self, ids: &[String]) -> RuleSpec {
        let kinds = [Kind::NodeAffinity, Kind::Affinity, Kind::AntiAffinity];
        let kind = self.one(&kinds).unwrap_or(Kind::NodeAffinity);
        let mut resources: Vec<String> = ids.to_vec();
        resources.retain(|_| self.chance(40));
        let mut nodes = BTreeMap::new();
        if kind == Kind::NodeAffinity {
            for node in self.nodes.clone() {
                if self.chance(60) {
                    let weight = u32::try_from(self.random.between(0, 3)).unwrap_or_default();
                    nodes.insert(node, weight);
                }
            }
        }
        RuleSpec { kind, resources, nodes, strict: self.chance(60) }
    }

    fn step(&mut self, ids: &[String]) -> StepSpec {
        let seconds = self.random.between(0, 40);
        let after = if self.chance(15) { "quiescent".to_owned() } else { format!("{seconds}s") };
        let count = self.random.between(1, 2);
        let commands = (0..count).map(|_| self.command(ids)).collect();
        StepSpec { after: Some(after), commands }
    }

    fn command(&mut self, ids: &[String]) -> String {
        let (node, other) = (self.any_node(), self.any_node());
        let vm = self.one(ids).unwrap_or_default();
        let switch = self.one(&["on", "off"]).unwrap_or("on");
        let (seconds, short) = (self.random.between(1, 60), self.random.between(1, 9));
        match self.random.between(0, 33) {
            0..=2 => format!("power {node} off"),
            3..=4 => format!("power {node} on"),
            5..=7 => format!("network {node} {switch}"),
            8..=9 => format!("hang {node} {seconds}s"),
            10 => format!("hang {node} {short}s"),
            11 => format!("skew {node} 1.0{short}"),
            12 => format!("skew {node} 0.9{short}"),
            13 => format!("step {node} 1h"),
            14 => format!("reboot {node}"),
            15 => format!("shutdown {node}"),
            16 => format!("restart-agent {node}"),
            17 => format!("maintenance {node} {switch}"),
            18 => format!("storage {node} {switch}"),
            19 if node != other => format!("cut {node} {other}"),
            20 if node != other => format!("cut-one-way {node} {other}"),
            21 => "heal".to_owned(),
            22 => format!("loss {short}%"),
            23 => format!("delay {}ms", seconds * 10),
            24 => self.one(&["store down", "store up"]).unwrap_or("store up").to_owned(),
            25 => format!("pause-manager {seconds}s"),
            26 => self.one(&["disarm freeze", "disarm ignore", "arm"]).unwrap_or("arm").to_owned(),
            27 => format!("crash {vm}"),
            28 => format!("stick {vm}"),
            29 => {
                let request = self.one(&["started", "stopped", "ignored"]).unwrap_or("started");
                format!("request {vm} {request}")
            }
            30 => format!("migrate {vm} {node}"),
            31 => format!("relocate {vm} {node}"),
            32 => self.one(&[format!("lock {vm}"), format!("unlock {vm}")]).unwrap_or_default(),
            33 if self.chance(20) => format!("fail-watchdog {node}"),
            _ => format!("usage {vm} {short} 1024"),
        }
    }
}
