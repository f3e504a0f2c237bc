//! Whether rules can hold together: asked when a rule is written, so that the answer names the
//! rules, not a VM that stays down one night.

use std::collections::{BTreeMap, BTreeSet};

use proto::Name;

use super::{Kind, Rule, Rules, WEIGHT_MAX};

/// Why rules are refused. `rule` and `other` count from 1, in the order they are written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// A rule about nothing.
    #[error("rule {rule}: it names no resources")]
    NoResources {
        /// Which.
        rule: usize,
    },
    /// A set of one.
    #[error("rule {rule}: {kind} needs two resources or more, not `{only}` alone")]
    Alone {
        /// Which.
        rule: usize,
        /// Its kind.
        kind: &'static str,
        /// The one.
        only: Name,
    },
    /// The same twice in one rule.
    #[error("rule {rule}: resource `{resource}` is listed twice")]
    Twice {
        /// Which.
        rule: usize,
        /// What.
        resource: Name,
    },
    /// No such VM.
    #[error("rule {rule}: there is no resource `{resource}`")]
    UnknownResource {
        /// Which.
        rule: usize,
        /// What.
        resource: Name,
    },
    /// No such node.
    #[error("rule {rule}: there is no node `{node}`")]
    UnknownNode {
        /// Which.
        rule: usize,
        /// What.
        node: Name,
    },
    /// Node affinity to nothing.
    #[error("rule {rule}: node-affinity names no nodes")]
    NoNodes {
        /// Which.
        rule: usize,
    },
    /// Nodes where they mean nothing.
    #[error("rule {rule}: `nodes` belongs to node-affinity, not to {kind}")]
    StrayNodes {
        /// Which.
        rule: usize,
        /// Its kind.
        kind: &'static str,
    },
    /// Beyond [`WEIGHT_MAX`].
    #[error("rule {rule}: the weight of node `{node}` is {weight}; 0 to {WEIGHT_MAX} are allowed")]
    Weight {
        /// Which.
        rule: usize,
        /// Whose.
        node: Name,
        /// The weight.
        weight: u32,
    },
    /// Two rules about the nodes of one VM.
    #[error(
        "rules {other} and {rule}: both say which nodes `{resource}` belongs on; make one rule of them"
    )]
    TwoNodeAffinities {
        /// Which.
        rule: usize,
        /// The other one.
        other: usize,
        /// Of what.
        resource: Name,
    },
    /// Together and apart.
    #[error(
        "rule {rule}: `{first}` and `{second}` must be apart, but strict affinity (rule {other}) keeps them together"
    )]
    TogetherAndApart {
        /// The one of anti-affinity.
        rule: usize,
        /// One of affinity.
        other: usize,
        /// One.
        first: Name,
        /// The other.
        second: Name,
    },
    /// VMs that belong together, on different nodes.
    #[error(
        "rules {other} and {rule}: `{first}` and `{second}` must be together, but no node is allowed for both"
    )]
    NoNodeForAll {
        /// Which.
        rule: usize,
        /// The other one.
        other: usize,
        /// One.
        first: Name,
        /// The other.
        second: Name,
    },
    /// More VMs apart than nodes.
    #[error(
        "rule {rule}: {members} resources must be apart from each other, but they may run on {nodes} nodes only ({allowed})"
    )]
    TooFewNodes {
        /// Which.
        rule: usize,
        /// How many must be apart.
        members: usize,
        /// On how many nodes.
        nodes: usize,
        /// Which nodes.
        allowed: String,
    },
}

pub(super) fn check(
    rules: &Rules,
    vms: &BTreeSet<Name>,
    nodes: &BTreeSet<Name>,
) -> Result<(), Conflict> {
    let mut placed: BTreeMap<&Name, usize> = BTreeMap::new();
    for (rule, number) in rules.list().iter().zip(1..) {
        check_alone(rule, number, vms, nodes)?;
        if rule.kind == Kind::NodeAffinity {
            for resource in &rule.resources {
                if let Some(other) = placed.insert(resource, number) {
                    let resource = resource.clone();
                    return Err(Conflict::TwoNodeAffinities { rule: number, other, resource });
                }
            }
        }
    }
    let allowed = Allowed { rules, nodes };
    allowed.check_bundles(&placed)?;
    for (rule, number) in rules.list().iter().zip(1..) {
        if rule.kind == Kind::AntiAffinity && rule.strict {
            check_apart(rules, rule, number)?;
            allowed.check_room(rule, number)?;
        }
    }
    Ok(())
}

fn check_alone(
    rule: &Rule,
    number: usize,
    vms: &BTreeSet<Name>,
    nodes: &BTreeSet<Name>,
) -> Result<(), Conflict> {
    let mut seen = BTreeSet::new();
    for resource in &rule.resources {
        if !vms.contains(resource) {
            return Err(Conflict::UnknownResource { rule: number, resource: resource.clone() });
        }
        if !seen.insert(resource) {
            return Err(Conflict::Twice { rule: number, resource: resource.clone() });
        }
    }
    let kind = rule.kind.word();
    match (rule.kind, rule.resources.as_slice()) {
        (_, []) => return Err(Conflict::NoResources { rule: number }),
        (Kind::Affinity | Kind::AntiAffinity, [only]) => {
            return Err(Conflict::Alone { rule: number, kind, only: only.clone() });
        }
        (Kind::Affinity | Kind::AntiAffinity, _) if !rule.nodes.is_empty() => {
            return Err(Conflict::StrayNodes { rule: number, kind });
        }
        (Kind::NodeAffinity, _) if rule.nodes.is_empty() => {
            return Err(Conflict::NoNodes { rule: number });
        }
        (Kind::NodeAffinity | Kind::Affinity | Kind::AntiAffinity, _) => {}
    }
    for (node, weight) in &rule.nodes {
        if !nodes.contains(node) {
            return Err(Conflict::UnknownNode { rule: number, node: node.clone() });
        }
        if *weight > WEIGHT_MAX {
            return Err(Conflict::Weight { rule: number, node: node.clone(), weight: *weight });
        }
    }
    Ok(())
}

/// No two of them may be of one bundle.
fn check_apart(rules: &Rules, rule: &Rule, number: usize) -> Result<(), Conflict> {
    for (index, first) in rule.resources.iter().enumerate() {
        let bundle = rules.bundle(first);
        if let Some(second) = rule.resources[..index].iter().find(|name| bundle.contains(name)) {
            let strict = |other: &Rule| other.kind == Kind::Affinity && other.strict;
            let other = rules.list().iter().position(|r| strict(r) && r.resources.contains(first));
            return Err(Conflict::TogetherAndApart {
                rule: number,
                other: other.map_or(0, |index| index + 1),
                first: second.clone(),
                second: first.clone(),
            });
        }
    }
    Ok(())
}

struct Allowed<'a> {
    rules: &'a Rules,
    nodes: &'a BTreeSet<Name>,
}

impl Allowed<'_> {
    /// Where strict rules let a VM and its bundle run.
    fn nodes(&self, vm: &Name) -> BTreeSet<Name> {
        let bundle = self.rules.bundle(vm);
        let members = if bundle.is_empty() { std::slice::from_ref(vm) } else { bundle };
        let mut allowed = self.nodes.clone();
        for member in members {
            if let Some(rule) = self.rules.node_affinity(member).filter(|rule| rule.strict) {
                allowed.retain(|node| rule.nodes.contains_key(node));
            }
        }
        allowed
    }

    fn check_bundles(&self, placed: &BTreeMap<&Name, usize>) -> Result<(), Conflict> {
        for bundle in &self.rules.bundles {
            let strict = |vm: &&Name| self.rules.node_affinity(vm).is_some_and(|rule| rule.strict);
            let bound: Vec<&Name> = bundle.iter().filter(strict).collect();
            let [first, .., last] = bound.as_slice() else { continue };
            if self.nodes(first).is_empty() {
                let number = |vm: &Name| placed.get(vm).copied().unwrap_or_default();
                return Err(Conflict::NoNodeForAll {
                    rule: number(last),
                    other: number(first),
                    first: (*first).clone(),
                    second: (*last).clone(),
                });
            }
        }
        Ok(())
    }

    /// Each of the VMs needs a node of its own: a matching of VMs to nodes (Kuhn's algorithm).
    fn check_room(&self, rule: &Rule, number: usize) -> Result<(), Conflict> {
        let choices: Vec<BTreeSet<Name>> = rule.resources.iter().map(|vm| self.nodes(vm)).collect();
        let mut taken: BTreeMap<Name, usize> = BTreeMap::new();
        for vm in 0..choices.len() {
            let mut tried = BTreeSet::new();
            if !assign(vm, &choices, &mut taken, &mut tried) {
                // Those that compete for the nodes that were tried are too many for them.
                let members = choices.iter().filter(|nodes| nodes.is_subset(&tried)).count();
                let allowed: Vec<&str> = tried.iter().map(Name::as_str).collect();
                return Err(Conflict::TooFewNodes {
                    rule: number,
                    members,
                    nodes: tried.len(),
                    allowed: allowed.join(", "),
                });
            }
        }
        Ok(())
    }
}

fn assign(
    vm: usize,
    choices: &[BTreeSet<Name>],
    taken: &mut BTreeMap<Name, usize>,
    tried: &mut BTreeSet<Name>,
) -> bool {
    let Some(nodes) = choices.get(vm) else { return false };
    for node in nodes {
        if !tried.insert(node.clone()) {
            continue;
        }
        let free = match taken.get(node).copied() {
            None => true,
            Some(other) => assign(other, choices, taken, tried),
        };
        if free {
            taken.insert(node.clone(), vm);
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> BTreeSet<Name> {
        text.split_whitespace().map(|name| name.parse().unwrap()).collect()
    }

    /// `kind[!] a b c [@ node=weight …]`, `!` for strict; VMs a to f, nodes n1 to n3.
    fn rule(text: &str) -> Rule {
        let (head, nodes) = text.split_once('@').unwrap_or((text, ""));
        let mut words = head.split_whitespace();
        let kind = words.next().unwrap();
        let strict = kind.ends_with('!');
        let kind = match kind.trim_end_matches('!') {
            "nodes" => Kind::NodeAffinity,
            "together" => Kind::Affinity,
            "apart" => Kind::AntiAffinity,
            other => panic!("{other}"),
        };
        let nodes = nodes.split_whitespace().map(|node| {
            let (name, weight) = node.split_once('=').unwrap_or((node, "0"));
            (name.parse().unwrap(), weight.parse().unwrap())
        });
        let resources = words.map(|name| name.parse().unwrap()).collect();
        Rule { kind, resources, nodes: nodes.collect(), strict }
    }

    fn refused(rules: &[&str]) -> String {
        let list = rules.iter().map(|text| rule(text)).collect();
        Rules::new(list, &names("a b c d e f"), &names("n1 n2 n3"))
            .map_or_else(|conflict| conflict.to_string(), |_| "accepted".to_owned())
    }

    #[test]
    fn rules_that_can_hold_are_taken() {
        let cases: [&[&str]; 6] = [
            &[],
            &["nodes! a b @n1=2 n2=1", "apart! a b", "together! c d"],
            &["apart! a b c"],
            &["together a b", "apart! a b"],
            &["together! a b", "apart a b"],
            &["together! a b", "together! b c", "apart! a d e"],
        ];
        for rules in cases {
            assert_eq!(refused(rules), "accepted", "{rules:?}");
        }
    }

    #[test]
    fn rules_that_cannot_hold_are_refused_with_the_reason() {
        let cases: [(&[&str], &str); 14] = [
            (&["apart"], "rule 1: it names no resources"),
            (&["apart! a"], "rule 1: anti-affinity needs two resources or more, not `a` alone"),
            (&["apart a b a"], "rule 1: resource `a` is listed twice"),
            (&["apart a x"], "rule 1: there is no resource `x`"),
            (&["nodes a @n9"], "rule 1: there is no node `n9`"),
            (&["nodes a"], "rule 1: node-affinity names no nodes"),
            (&["apart a b @n1"], "rule 1: `nodes` belongs to node-affinity, not to anti-affinity"),
            (
                &["nodes a @n1=1001"],
                "rule 1: the weight of node `n1` is 1001; 0 to 1000 are allowed",
            ),
            (
                &["nodes a @n1", "nodes b a @n2"],
                "rules 1 and 2: both say which nodes `a` belongs on; make one rule of them",
            ),
            (
                &["together! a b", "together! b c", "apart! a d c"],
                "rule 3: `a` and `c` must be apart, but strict affinity (rule 2) keeps them together",
            ),
            (
                &["together! a b", "nodes! a @n1", "nodes! b @n2"],
                "rules 2 and 3: `a` and `b` must be together, but no node is allowed for both",
            ),
            (
                &["apart! a b c d"],
                "rule 1: 4 resources must be apart from each other, but they may run on 3 nodes only (n1, n2, n3)",
            ),
            (
                &["nodes! a b c @n1 n2", "apart! a b c"],
                "rule 2: 3 resources must be apart from each other, but they may run on 2 nodes only (n1, n2)",
            ),
            // Through a bundle: c is tied to n1 by d, so a and c compete for it.
            (
                &["nodes! a d @n1", "together! c d", "apart! a b c"],
                "rule 3: 2 resources must be apart from each other, but they may run on 1 nodes only (n1)",
            ),
        ];
        for (rules, expected) in cases {
            assert_eq!(refused(rules), expected, "{rules:?}");
        }
    }
}
