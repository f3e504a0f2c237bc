//! Rules: which nodes VMs belong on, which VMs belong together, which apart.
//!
//! A set of VMs that strict rules keep together, directly or through others, is a *bundle*: it is
//! placed and moved as one. What a rule says of names that do not exist has no effect.
//!
//! Invariant: a [`Rules`] value was checked by [`Rules::new`]: no strict rule contradicts another.

mod conflicts;

use std::collections::{BTreeMap, BTreeSet};

use proto::Name;
use serde::{Deserialize, Serialize};

pub use conflicts::Conflict;

/// One rule, as it is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// What it asks for.
    pub kind: Kind,
    /// Of which VMs.
    pub resources: Vec<Name>,
    /// Nodes with their weights, for [`Kind::NodeAffinity`]: 0 to 1000, higher first.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub nodes: BTreeMap<Name, u32>,
    /// It must hold; else it should.
    #[serde(default)]
    pub strict: bool,
}

/// What a rule asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The VMs belong on these nodes.
    NodeAffinity,
    /// The VMs belong together.
    Affinity,
    /// No two of the VMs belong on the same node.
    AntiAffinity,
}

impl Kind {
    /// The word in documents.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::NodeAffinity => "node-affinity",
            Self::Affinity => "affinity",
            Self::AntiAffinity => "anti-affinity",
        }
    }
}

/// The largest weight of a node.
pub const WEIGHT_MAX: u32 = 1000;

/// Rules that do not contradict each other, and what they mean for each VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    list: Vec<Rule>,
    of: BTreeMap<Name, Of>,
    bundles: Vec<Vec<Name>>,
}

/// Where a VM's rules are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Of {
    node_affinity: Option<usize>,
    bundle: Option<usize>,
    together: Vec<usize>,
    apart: Vec<usize>,
}

impl Rules {
    /// Rules for these VMs on these nodes.
    ///
    /// # Errors
    /// The first [`Conflict`].
    pub fn new(
        list: Vec<Rule>,
        vms: &BTreeSet<Name>,
        nodes: &BTreeSet<Name>,
    ) -> Result<Self, Conflict> {
        let rules = Self::unchecked(list);
        conflicts::check(&rules, vms, nodes)?;
        Ok(rules)
    }

    /// Rules that were checked when they were written; names may have gone since.
    #[must_use]
    pub fn unchecked(list: Vec<Rule>) -> Self {
        let mut of: BTreeMap<Name, Of> = BTreeMap::new();
        for (index, rule) in list.iter().enumerate() {
            for name in &rule.resources {
                let of = of.entry(name.clone()).or_default();
                match rule.kind {
                    Kind::NodeAffinity => of.node_affinity = Some(index),
                    Kind::Affinity if !rule.strict => of.together.push(index),
                    Kind::Affinity => {}
                    Kind::AntiAffinity => of.apart.push(index),
                }
            }
        }
        let bundles = bundles(&list);
        for (index, bundle) in bundles.iter().enumerate() {
            for name in bundle {
                of.entry(name.clone()).or_default().bundle = Some(index);
            }
        }
        Self { list, of, bundles }
    }

    /// As they are written.
    #[must_use]
    pub fn list(&self) -> &[Rule] {
        &self.list
    }

    /// Whether any rule names the VM.
    pub(crate) fn mention(&self, vm: &Name) -> bool {
        self.of.contains_key(vm)
    }

    /// The nodes it belongs on, with the rule.
    #[must_use]
    pub fn node_affinity(&self, vm: &Name) -> Option<&Rule> {
        self.list.get(self.of.get(vm)?.node_affinity?)
    }

    /// The VMs that must be where it is, itself included; empty: it is alone.
    #[must_use]
    pub fn bundle(&self, vm: &Name) -> &[Name] {
        let index = self.of.get(vm).and_then(|of| of.bundle);
        index.and_then(|index| self.bundles.get(index)).map_or(&[], Vec::as_slice)
    }

    /// Rules that it should, but need not, be with others by.
    pub(crate) fn together(&self, vm: &Name) -> impl Iterator<Item = &Rule> {
        let indexes = self.of.get(vm).map_or(&[][..], |of| &of.together);
        indexes.iter().filter_map(|index| self.list.get(*index))
    }

    /// Rules that keep it apart from others, strict or not.
    pub fn apart(&self, vm: &Name) -> impl Iterator<Item = &Rule> {
        let indexes = self.of.get(vm).map_or(&[][..], |of| &of.apart);
        indexes.iter().filter_map(|index| self.list.get(*index))
    }
}

/// Sets that strict affinity joins, directly or through others, in the order of their first names.
fn bundles(list: &[Rule]) -> Vec<Vec<Name>> {
    let mut sets: Vec<BTreeSet<Name>> = Vec::new();
    for rule in list.iter().filter(|rule| rule.strict && rule.kind == Kind::Affinity) {
        let mut joined: BTreeSet<Name> = rule.resources.iter().cloned().collect();
        sets.retain(|set| {
            let apart = set.is_disjoint(&joined);
            if !apart {
                joined.extend(set.iter().cloned());
            }
            apart
        });
        sets.push(joined);
    }
    let mut bundles: Vec<Vec<Name>> =
        sets.into_iter().filter(|set| set.len() > 1).map(|set| set.into_iter().collect()).collect();
    bundles.sort();
    bundles
}

/// VMs that wait for each other, if any do, each with the one that it is started after; the first
/// is named again at the end. `after` gives what a VM is started after.
pub fn cycle<'a, T: Ord + 'a>(
    vms: impl IntoIterator<Item = &'a T>,
    after: impl Fn(&'a T) -> &'a [T],
) -> Option<Vec<&'a T>> {
    let mut done: BTreeSet<&T> = BTreeSet::new();
    for vm in vms {
        // The way to where the search is, and how many of each one's `after` have been followed.
        let mut way: Vec<(&T, usize)> = vec![(vm, 0)];
        while let Some((at, followed)) = way.last_mut() {
            let (at, next) = (*at, after(at).get(*followed));
            *followed += 1;
            match next {
                _ if done.contains(at) => _ = way.pop(),
                None => {
                    done.insert(at);
                    way.pop();
                }
                Some(next) => {
                    if let Some(start) = way.iter().position(|(on, _)| *on == next) {
                        let names = way[start..].iter().map(|(on, _)| *on);
                        return Some(names.chain([next]).collect());
                    }
                    way.push((next, 0));
                }
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cycle_of(text: &str) -> Option<String> {
        let after: BTreeMap<&str, Vec<&str>> = text
            .split(", ")
            .map(|line| {
                let (vm, after) = line.split_once(" after ").unwrap();
                (vm, after.split(' ').filter(|name| !name.is_empty()).collect())
            })
            .collect();
        let found = cycle(after.keys(), |vm| after.get(vm).map_or(&[][..], Vec::as_slice));
        found.map(|names| names.into_iter().copied().collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn a_cycle_is_found_and_named() {
        assert_eq!(cycle_of("a after b c, b after c, c after "), None);
        assert_eq!(cycle_of("a after a"), Some("a a".to_owned()));
        assert_eq!(
            cycle_of("a after b, b after c, c after d e, e after b"),
            Some("b c e b".into())
        );
        // Many ways to the same ones are no cycle, and are not walked again and again.
        let wide: Vec<String> = (0..40)
            .map(|n| {
                format!(
                    "v{n:02} after v{:02} w{:02}, w{n:02} after v{:02} w{:02}",
                    n + 1,
                    n + 1,
                    n + 1,
                    n + 1
                )
            })
            .collect();
        assert_eq!(cycle_of(&wide.join(", ")), None);
    }
}
