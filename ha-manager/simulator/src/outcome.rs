//! What came out of a run.

use std::collections::BTreeMap;

use ha_manager::{Cause, NodeState};
use proto::Name;
use proto::record::{Phase, Placement, Requested};
use serde::Serialize;

use crate::scenario::{Checked, Expect, Switch};

/// What came out of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// The scenario's.
    pub name: String,
    /// Nothing was violated, and what was expected holds.
    pub ok: bool,
    /// By id.
    pub resources: BTreeMap<String, ResourceOutcome>,
    /// By name.
    pub nodes: BTreeMap<Name, NodeOutcome>,
    /// In the order of their first time.
    pub fenced: Vec<Name>,
    /// Changes of a resource's node, in order.
    pub moves: Vec<MoveOutcome>,
    /// What happened, for people.
    pub timeline: Vec<Line>,
    /// Promises that were broken, and expectations that do not hold.
    pub violations: Vec<String>,
    #[serde(skip)]
    expect: Expect,
}

/// A resource in the end.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ResourceOutcome {
    /// running, stopped, error, unplaceable, frozen; or what is under way.
    pub state: String,
    /// What is asked for.
    pub requested: Requested,
    /// Whose it is.
    pub owner: Option<Name>,
    /// Where it runs, in truth.
    pub running_on: Vec<Name>,
    /// How long it was down in all while it should have run.
    pub down_ms: u64,
}

/// A node in the end.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NodeOutcome {
    /// In truth.
    pub power: Switch,
    /// In truth.
    pub network: Switch,
    /// As the leader sees it.
    pub state: NodeState,
}

/// A resource's change of node.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MoveOutcome {
    /// When.
    pub at_ms: u64,
    /// What.
    pub resource: String,
    /// Where it was.
    pub from: Name,
    /// Where it is.
    pub to: Name,
    /// How, or why.
    pub kind: Kind,
}

/// How, or why, a resource changed its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Its node was fenced.
    Recover,
    /// While it ran.
    Live,
    /// It was stopped for it, or could not be started where it was.
    Relocate,
    /// Back to a node that it prefers, or had left.
    Failback,
    /// To even out the load.
    Rebalance,
}

impl Kind {
    pub(crate) fn of(cause: Cause, live: bool) -> Self {
        match cause {
            Cause::Failback => Self::Failback,
            Cause::Rebalance => Self::Rebalance,
            Cause::Evacuation | Cause::Rule if live => Self::Live,
            Cause::Evacuation | Cause::Rule => Self::Relocate,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Recover => "recovered",
            Self::Live => "moved live",
            Self::Relocate => "relocated",
            Self::Failback => "moved back",
            Self::Rebalance => "moved to even out the load",
        }
    }
}

/// A line of the story.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// When.
    pub at_ms: u64,
    /// What.
    pub text: String,
}

impl Outcome {
    pub(crate) fn new(scenario: &Checked) -> Self {
        Self {
            name: scenario.spec.name.clone(),
            ok: false,
            resources: BTreeMap::new(),
            nodes: BTreeMap::new(),
            fenced: Vec::new(),
            moves: Vec::new(),
            timeline: Vec::new(),
            violations: Vec::new(),
            expect: scenario.spec.expect.clone().unwrap_or_default(),
        }
    }

    pub(crate) fn tell(&mut self, at_ms: u64, text: String) {
        self.timeline.push(Line { at_ms, text });
    }

    pub(crate) fn violated(&mut self, at_ms: u64, text: String) {
        self.tell(at_ms, format!("VIOLATION {text}"));
        self.violations.push(format!("at {at_ms} ms: {text}"));
    }

    pub(crate) fn fenced(&mut self, node: &Name) {
        if !self.fenced.contains(node) {
            self.fenced.push(node.clone());
        }
    }

    pub(crate) fn moved(
        &mut self,
        at_ms: u64,
        resource: String,
        from: &Name,
        to: &Name,
        kind: Kind,
    ) {
        self.tell(at_ms, format!("{resource}: {} from {from} to {to}", kind.word()));
        let (from, to) = (from.clone(), to.clone());
        self.moves.push(MoveOutcome { at_ms, resource, from, to, kind });
    }

    pub(crate) fn node(&mut self, name: &Name, power: Switch, network: Switch, state: NodeState) {
        self.nodes.insert(name.clone(), NodeOutcome { power, network, state });
    }

    pub(crate) fn resource(
        &mut self,
        id: &str,
        placement: Option<(Placement, Name)>,
        running_on: Vec<Name>,
        down_ms: u64,
    ) {
        let Some((placement, owner)) = placement else { return };
        let state = match placement.phase {
            Phase::Started => "running",
            phase => phase.word(),
        };
        let outcome = ResourceOutcome {
            state: state.to_owned(),
            requested: placement.requested,
            owner: Some(owner),
            running_on,
            down_ms,
        };
        self.resources.insert(id.to_owned(), outcome);
    }

    pub(crate) fn finish(mut self) -> Self {
        let unmet = self.unmet();
        self.violations.extend(unmet);
        self.ok = self.violations.is_empty();
        self
    }

    /// Expectations that do not hold.
    fn unmet(&self) -> Vec<String> {
        let mut unmet = Vec::new();
        if let Some(expected) = &self.expect.fenced {
            let list = |names: &[Name]| {
                let mut names: Vec<&str> = names.iter().map(Name::as_str).collect();
                names.sort_unstable();
                if names.is_empty() { "none".to_owned() } else { names.join(", ") }
            };
            if list(expected) != list(&self.fenced) {
                let (expected, got) = (list(expected), list(&self.fenced));
                unmet.push(format!("expected: fenced {expected}; it was {got}"));
            }
        }
        for (id, expected) in &self.expect.resources {
            let Some(got) = self.resources.get(id) else {
                unmet.push(format!("expected: {id} exists; it was deleted"));
                continue;
            };
            if let Some(state) = expected.state.as_ref().filter(|state| **state != got.state) {
                unmet.push(format!("expected: {id} is {state}; it is {}", got.state));
            }
            if let (Some(on), Some(owner)) = (&expected.on, &got.owner)
                && !on.contains(owner)
            {
                let on: Vec<&str> = on.iter().map(Name::as_str).collect();
                unmet.push(format!("expected: {id} on {}; it is on {owner}", on.join(" or ")));
            }
            if let Some(most) = expected.down_ms_max.filter(|most| got.down_ms > *most) {
                let down_ms = got.down_ms;
                unmet.push(format!(
                    "expected: {id} is down for at most {most} ms; it was for {down_ms} ms"
                ));
            }
            let moves = self.moves.iter().filter(|moved| moved.resource == *id).count();
            if let Some(expected) = expected.moves.filter(|expected| *expected != moves) {
                unmet.push(format!("expected: {id} moves {expected} times; it did {moves} times"));
            }
        }
        for (name, expected) in &self.expect.nodes {
            let got = self.nodes.get(name).map_or("gone", |node| node.state.word());
            if expected.state != got {
                unmet.push(format!("expected: {name} is {}; it is {got}", expected.state));
            }
        }
        unmet
    }
}
