//! What a node does about one VM: a pure function of its placement and its process here.
//!
//! ```text
//!                     no process        process of this        process of another
//!                                       generation             generation, or not mine
//! starting            Start             MarkStarted            Kill
//! started             MarkLost          -                      Kill
//! migrating           MarkLost          Settle (no task)       Kill
//! stopping            MarkStopped       Stop                   Kill
//! stopped, error, …   -                 Kill                   Kill
//! ```
//! A process that does not answer is ended where it must not run, and left alone otherwise.
//! Receiving processes and sources that wait for a commit are told by the placement as well:
//! RunIncoming, ResolveCommit, Kill.

use proto::NodeId;
use proto::record::{Phase, Placement};

use crate::supervisor::{RunningVm, VmState};

/// What to do about a VM here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing, or nothing now.
    Leave,
    /// Start a process at the placement's generation.
    Start,
    /// The process runs: say so.
    MarkStarted,
    /// It should run and does not: say so, it is started again.
    MarkLost,
    /// Stop the process, then say so.
    Stop,
    /// There is no process: say so.
    MarkStopped,
    /// The process acts for nobody: kill it.
    Kill,
    /// A source that waits for the commit: tell it the outcome.
    ResolveCommit {
        /// The VM is another node's now.
        committed: bool,
    },
    /// A target that has received everything, and the commit is there: run it.
    RunIncoming,
    /// The phase says migrating, and no task of this agent is at it: the VM runs on here.
    SettleMigration,
}

/// Decides. `placement` is `None` where the VM does not exist; `process` where none runs here;
/// `starting`: a process is being made ready; `may_start`: the node lease is fresh enough.
///
/// The caller holds the VM's job, so no task of this agent works on the VM.
#[must_use]
pub fn decide(
    me: NodeId,
    placement: Option<&Placement>,
    process: Option<&RunningVm>,
    starting: bool,
    may_start: bool,
) -> Step {
    let mine = placement.filter(|placement| placement.owner == me);
    match process {
        Some(process) if process.state == VmState::Unknown => unanswered(me, placement, process),
        Some(process) if process.migration_id.is_some() => incoming(me, placement, process),
        Some(process) if process.state == VmState::AwaitingCommit => outgoing(mine, process),
        Some(process) if process.state == VmState::Migrated => Step::Leave,
        Some(process) => {
            let current = mine.filter(|placement| {
                placement.vm_id == process.vm_id && placement.generation == process.generation
            });
            current.map_or(Step::Kill, |placement| running(placement.phase))
        }
        None if starting => Step::Leave,
        None => mine.map_or(Step::Leave, |placement| absent(placement.phase, may_start)),
    }
}

fn running(phase: Phase) -> Step {
    match phase {
        Phase::Starting => Step::MarkStarted,
        Phase::Started => Step::Leave,
        Phase::Stopping => Step::Stop,
        Phase::Migrating { .. } => Step::SettleMigration,
        Phase::Stopped | Phase::Recovering | Phase::Error | Phase::Unplaceable => Step::Kill,
    }
}

fn absent(phase: Phase, may_start: bool) -> Step {
    match phase {
        Phase::Starting if may_start => Step::Start,
        Phase::Started | Phase::Migrating { .. } => Step::MarkLost,
        Phase::Stopping => Step::MarkStopped,
        Phase::Starting
        | Phase::Stopped
        | Phase::Recovering
        | Phase::Error
        | Phase::Unplaceable => Step::Leave,
    }
}

/// A process that does not answer (yet). It is only ended where it must not run whatever it does;
/// one that hangs is found by its supervisor.
fn unanswered(me: NodeId, placement: Option<&Placement>, process: &RunningVm) -> Step {
    let receives = process.migration_id.is_some();
    let placement = placement.filter(|placement| placement.vm_id == process.vm_id);
    let Some(mine) = placement.filter(|placement| placement.owner == me) else {
        let awaited = placement
            .is_some_and(|theirs| receives && theirs.phase == Phase::Migrating { target: me });
        return if awaited { Step::Leave } else { Step::Kill };
    };
    // One that receives may run the VM by now, at the generation of the commit.
    let current = mine.generation == process.generation
        || receives && mine.generation == process.generation.next();
    match mine.phase {
        _ if !current => Step::Kill,
        Phase::Starting | Phase::Started | Phase::Migrating { .. } => Step::Leave,
        Phase::Stopping => Step::Stop,
        Phase::Stopped | Phase::Recovering | Phase::Error | Phase::Unplaceable => Step::Kill,
    }
}

/// A process that receives the VM. It is kept while the source's migration to here is under way.
fn incoming(me: NodeId, placement: Option<&Placement>, process: &RunningVm) -> Step {
    let Some(placement) = placement.filter(|placement| placement.vm_id == process.vm_id) else {
        return Step::Kill;
    };
    match placement.phase {
        Phase::Migrating { target } if target == me && placement.owner != me => Step::Leave,
        // The commit raises the generation by one; a receiver knows the source's.
        Phase::Started
            if placement.owner == me
                && placement.generation == process.generation.next()
                && process.state == VmState::IncomingComplete =>
        {
            Step::RunIncoming
        }
        Phase::Starting
        | Phase::Started
        | Phase::Stopping
        | Phase::Migrating { .. }
        | Phase::Stopped
        | Phase::Recovering
        | Phase::Error
        | Phase::Unplaceable => Step::Kill,
    }
}

/// A source that is paused and has sent everything: only the placement says who runs the VM.
fn outgoing(mine: Option<&Placement>, process: &RunningVm) -> Step {
    let still_mine = mine.filter(|placement| {
        placement.vm_id == process.vm_id && placement.generation == process.generation
    });
    match still_mine.map(|placement| placement.phase) {
        // The commit of the agent before this one may still be on its way. It compares the
        // placement: once that is written anew it comes to nothing, and only then may the VM run on.
        Some(Phase::Migrating { .. }) => Step::SettleMigration,
        still_mine => Step::ResolveCommit { committed: still_mine.is_none() },
    }
}

#[cfg(test)]
mod tests {
    use proto::record::Requested;
    use proto::{Generation, VmId};

    use super::*;

    const ME: NodeId = NodeId(1);
    const OTHER: NodeId = NodeId(2);
    const ID: VmId = VmId(uuid::Uuid::from_u128(7));

    fn placement(owner: NodeId, generation: u64, phase: Phase) -> Placement {
        Placement {
            vm_id: ID,
            owner,
            generation: Generation(generation),
            phase,
            requested: Requested::Started,
            ha: true,
            cpus: 1,
            memory_bytes: 64 << 20,
            message: None,
            events: Vec::new(),
            start_failures: 0,
            retry_at_unix_ms: None,
        }
    }

    fn process(generation: u64, state: VmState) -> RunningVm {
        let incoming = matches!(state, VmState::Incoming | VmState::IncomingComplete);
        RunningVm {
            name: "web".parse().unwrap(),
            vm_id: ID,
            generation: Generation(generation),
            ha: true,
            state,
            migration_id: incoming.then(|| "m".to_owned()),
            pid: 1,
            memory_bytes: 64 << 20,
        }
    }

    fn step(placement: Option<&Placement>, process: Option<&RunningVm>) -> Step {
        decide(ME, placement, process, false, true)
    }

    const PHASES: [Phase; 8] = [
        Phase::Stopped,
        Phase::Starting,
        Phase::Started,
        Phase::Stopping,
        Phase::Migrating { target: OTHER },
        Phase::Recovering,
        Phase::Error,
        Phase::Unplaceable,
    ];

    #[test]
    fn a_vm_starts_only_as_mine_and_with_a_lease() {
        let starting = placement(ME, 1, Phase::Starting);
        assert_eq!(step(Some(&starting), None), Step::Start);
        assert_eq!(decide(ME, Some(&starting), None, false, false), Step::Leave, "no lease");
        assert_eq!(decide(ME, Some(&starting), None, true, true), Step::Leave, "at it already");
        for phase in PHASES {
            assert_eq!(step(Some(&placement(OTHER, 1, phase)), None), Step::Leave, "{phase:?}");
            let mine = step(Some(&placement(ME, 1, phase)), None);
            assert_eq!(mine == Step::Start, phase == Phase::Starting, "{phase:?}");
        }
    }

    #[test]
    fn a_process_of_another_owner_generation_or_vm_is_killed() {
        let old = process(1, VmState::Running);
        for phase in PHASES {
            assert_eq!(step(Some(&placement(ME, 2, phase)), Some(&old)), Step::Kill);
            assert_eq!(step(Some(&placement(OTHER, 1, phase)), Some(&old)), Step::Kill);
            let mut another = placement(ME, 1, phase);
            another.vm_id = VmId(uuid::Uuid::from_u128(8));
            assert_eq!(step(Some(&another), Some(&old)), Step::Kill);
        }
        assert_eq!(step(None, Some(&old)), Step::Kill);
    }

    #[test]
    fn a_current_process_follows_its_phase() {
        let current = process(1, VmState::Running);
        let steps = PHASES.map(|phase| step(Some(&placement(ME, 1, phase)), Some(&current)));
        assert_eq!(
            steps,
            [
                Step::Kill,
                Step::MarkStarted,
                Step::Leave,
                Step::Stop,
                Step::SettleMigration,
                Step::Kill,
                Step::Kill,
                Step::Kill
            ]
        );
    }

    #[test]
    fn a_process_that_does_not_answer_is_ended_only_where_it_must_not_run() {
        let silent = process(1, VmState::Unknown);
        let steps = PHASES.map(|phase| step(Some(&placement(ME, 1, phase)), Some(&silent)));
        use Step::{Kill, Leave, Stop};
        assert_eq!(steps, [Kill, Leave, Leave, Stop, Leave, Kill, Kill, Kill]);
        for phase in PHASES {
            assert_eq!(step(Some(&placement(ME, 2, phase)), Some(&silent)), Kill);
            assert_eq!(step(Some(&placement(OTHER, 1, phase)), Some(&silent)), Kill);
        }
        assert_eq!(step(None, Some(&silent)), Kill);
        // It may have been told to run what it received, just before the agent before this one ended.
        let receiver = RunningVm { migration_id: Some("m".into()), ..silent };
        assert_eq!(step(Some(&placement(ME, 2, Phase::Started)), Some(&receiver)), Leave);
        assert_eq!(step(Some(&placement(ME, 3, Phase::Started)), Some(&receiver)), Kill);
        let to_me = placement(OTHER, 1, Phase::Migrating { target: ME });
        assert_eq!(step(Some(&to_me), Some(&receiver)), Leave);
    }

    #[test]
    fn a_vm_that_should_run_and_does_not_is_told() {
        let steps = PHASES.map(|phase| step(Some(&placement(ME, 1, phase)), None));
        assert_eq!(steps[2], Step::MarkLost);
        assert_eq!(steps[3], Step::MarkStopped);
        assert_eq!(steps[4], Step::MarkLost);
    }

    #[test]
    fn after_the_commit_the_source_ends_and_the_target_runs() {
        let committed = placement(OTHER, 2, Phase::Started);
        let source = process(1, VmState::AwaitingCommit);
        assert_eq!(step(Some(&committed), Some(&source)), Step::ResolveCommit { committed: true });
        // A commit may be on its way: first it is made void, then the VM runs on.
        let before = placement(ME, 1, Phase::Migrating { target: OTHER });
        assert_eq!(step(Some(&before), Some(&source)), Step::SettleMigration);
        let settled = placement(ME, 1, Phase::Started);
        assert_eq!(step(Some(&settled), Some(&source)), Step::ResolveCommit { committed: false });
        // Fenced in the meantime: it must not resume.
        let fenced = placement(ME, 2, Phase::Recovering);
        assert_eq!(step(Some(&fenced), Some(&source)), Step::ResolveCommit { committed: true });

        let target = process(1, VmState::IncomingComplete);
        let to_me = placement(OTHER, 1, Phase::Migrating { target: ME });
        assert_eq!(step(Some(&to_me), Some(&target)), Step::Leave);
        assert_eq!(step(Some(&placement(ME, 2, Phase::Started)), Some(&target)), Step::RunIncoming);
        // Recovered elsewhere, or to here by a start: what was received is worth nothing.
        assert_eq!(step(Some(&placement(ME, 3, Phase::Started)), Some(&target)), Step::Kill);
        assert_eq!(step(Some(&placement(OTHER, 1, Phase::Started)), Some(&target)), Step::Kill);
        assert_eq!(step(None, Some(&target)), Step::Kill);
        let half = process(1, VmState::Incoming);
        assert_eq!(step(Some(&placement(ME, 2, Phase::Started)), Some(&half)), Step::Kill);
    }
}
