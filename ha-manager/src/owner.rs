//! The owner's part: what a node does about one VM, a pure function of its placement and its process
//! there; and what it writes into the placement when something has become of the VM.
//!
//! ```text
//!                     no process        process of this        process of another
//!                                       generation             generation, or not mine
//! starting            Start             MarkStarted            Kill
//! started             MarkLost          -                      Kill
//! migrating           MarkLost          Settle (no task)       Kill
//! stopping            MarkStopped       Stop                   Kill
//! relocating          HandOver          Stop                   Kill
//! frozen              -                 Stop                   Kill
//! stopped, error, …   -                 Kill                   Kill
//! ```
//! A process that does not answer is ended where it must not run, and left alone otherwise.
//! Receiving processes and sources that wait for a commit are told by the placement as well:
//! RunIncoming, ResolveCommit, Kill.

use proto::record::{Phase, Placement, Requested};
use proto::{Generation, NodeId, VmId};

/// A process of a VM, as the decision sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Of which VM.
    pub vm_id: VmId,
    /// At which generation; one that receives knows the source's.
    pub generation: Generation,
    /// It was made to receive a migration.
    pub receives: bool,
    /// What it says of itself.
    pub state: ProcessState,
}

/// What a VM process says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessState {
    /// It answers: runs the VM, or receives it.
    Answers,
    /// It has received all of the VM, and waits for the commit to be read.
    Complete,
    /// A source: paused, all sent, and only the placement says who runs the VM.
    AwaitingCommit,
    /// A source whose migration is committed; the process is ending.
    Migrated,
    /// It answers nothing: hung, or stopped by a signal.
    Silent,
}

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
    /// It is to be another node's, and runs no more: give it to that.
    HandOver,
}

/// Decides. `placement` is `None` where the VM does not exist; `process` where none runs here;
/// `starting`: a process is being made ready; `may_start`: the node lease is fresh enough.
///
/// The caller holds the VM's job, so no task of this agent works on the VM.
#[must_use]
pub fn decide(
    me: NodeId,
    placement: Option<&Placement>,
    process: Option<&Process>,
    starting: bool,
    may_start: bool,
) -> Step {
    let mine = placement.filter(|placement| placement.owner == me);
    match process {
        Some(process) if process.state == ProcessState::Silent => {
            unanswered(me, placement, process)
        }
        Some(process) if process.receives => incoming(me, placement, process),
        Some(process) if process.state == ProcessState::AwaitingCommit => outgoing(mine, process),
        Some(process) if process.state == ProcessState::Migrated => Step::Leave,
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
        Phase::Stopping | Phase::Relocating { .. } | Phase::Frozen => Step::Stop,
        Phase::Migrating { .. } => Step::SettleMigration,
        Phase::Stopped | Phase::Recovering | Phase::Error | Phase::Unplaceable => Step::Kill,
    }
}

fn absent(phase: Phase, may_start: bool) -> Step {
    match phase {
        Phase::Starting if may_start => Step::Start,
        Phase::Started | Phase::Migrating { .. } => Step::MarkLost,
        Phase::Stopping => Step::MarkStopped,
        Phase::Relocating { .. } => Step::HandOver,
        Phase::Starting
        | Phase::Stopped
        | Phase::Recovering
        | Phase::Error
        | Phase::Unplaceable
        | Phase::Frozen => Step::Leave,
    }
}

/// A process that does not answer (yet). It is only ended where it must not run whatever it does;
/// one that hangs is found by its supervisor.
fn unanswered(me: NodeId, placement: Option<&Placement>, process: &Process) -> Step {
    let receives = process.receives;
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
        Phase::Stopping | Phase::Relocating { .. } | Phase::Frozen => Step::Stop,
        Phase::Stopped | Phase::Recovering | Phase::Error | Phase::Unplaceable => Step::Kill,
    }
}

/// A process that receives the VM. It is kept while the source's migration to here is under way.
fn incoming(me: NodeId, placement: Option<&Placement>, process: &Process) -> Step {
    let Some(placement) = placement.filter(|placement| placement.vm_id == process.vm_id) else {
        return Step::Kill;
    };
    match placement.phase {
        Phase::Migrating { target } if target == me && placement.owner != me => Step::Leave,
        // The commit raises the generation by one; a receiver knows the source's.
        Phase::Started
            if placement.owner == me
                && placement.generation == process.generation.next()
                && process.state == ProcessState::Complete =>
        {
            Step::RunIncoming
        }
        Phase::Starting
        | Phase::Started
        | Phase::Stopping
        | Phase::Migrating { .. }
        | Phase::Relocating { .. }
        | Phase::Stopped
        | Phase::Recovering
        | Phase::Error
        | Phase::Unplaceable
        | Phase::Frozen => Step::Kill,
    }
}

/// A source that is paused and has sent everything: only the placement says who runs the VM.
fn outgoing(mine: Option<&Placement>, process: &Process) -> Step {
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

/// How a VM's process ended that should have run on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The guest powered off.
    ByGuest,
    /// The process failed, or hung and was killed: how, as in "ended: signal 11".
    Failed(String),
    /// By the lease, by this agent, or while no agent looked (power loss, a reset): why, as in
    /// "not running".
    FromOutside(String),
}

/// Puts that the VM runs on `here`; gives the event.
pub fn started(placement: &mut Placement, here: &str) -> String {
    placement.phase = Phase::Started;
    placement.message = None;
    format!("started on {here}, generation {}", placement.generation)
}

/// Puts that the VM could not be started on `here`; gives the event.
pub fn start_failed(placement: &mut Placement, here: &str, why: String) -> String {
    let event = format!("start on {here} failed: {why}");
    placement.message = Some(why);
    failed(placement);
    event
}

fn failed(placement: &mut Placement) {
    if placement.ha {
        placement.start_failures = placement.start_failures.saturating_add(1);
        placement.retry_at_unix_ms = None;
        placement.phase = Phase::Recovering;
    } else {
        placement.phase = Phase::Error;
    }
}

/// Puts what becomes of a VM whose process on `here` is gone although it should run; gives the event.
pub fn lost(placement: &mut Placement, how: Ended, here: &str) -> String {
    match how {
        Ended::ByGuest => {
            placement.phase = Phase::Stopped;
            if placement.requested != Requested::Ignored {
                placement.requested = Requested::Stopped;
            }
            placement.message = None;
            "the guest powered off".to_owned()
        }
        Ended::Failed(how) => {
            let why = format!("its process on {here} {how}");
            if placement.requested == Requested::Ignored {
                placement.phase = Phase::Stopped;
            } else {
                failed(placement);
            }
            placement.message = Some(match placement.phase {
                Phase::Error => format!("{why}; see `clusterctl vm log`, then start it"),
                _ => why.clone(),
            });
            why
        }
        Ended::FromOutside(why) => {
            match (placement.requested, placement.ha) {
                (Requested::Stopped | Requested::Ignored, _) => {
                    placement.phase = Phase::Stopped;
                    return format!("{why} on {here}");
                }
                (Requested::Started, true) => placement.phase = Phase::Recovering,
                (Requested::Started, false) => {
                    placement.phase = Phase::Starting;
                    placement.generation = placement.generation.next();
                }
            }
            format!("{why} on {here}; it is started again")
        }
    }
}

/// Puts that the VM was stopped: for good, or to be started elsewhere; gives the event.
pub fn stopped(placement: &mut Placement) -> String {
    placement.message = None;
    if placement.ha && placement.requested == Requested::Started {
        placement.phase = Phase::Recovering;
        "stopped; it is started again".to_owned()
    } else {
        placement.phase = Phase::Stopped;
        "stopped".to_owned()
    }
}

/// Gives a VM that was stopped for it to the node that it is relocated to; gives the event.
pub fn handed_over(placement: &mut Placement, to: &str) -> String {
    if let Phase::Relocating { target } = placement.phase {
        placement.owner = target;
        placement.generation = placement.generation.next();
        placement.phase = Phase::Starting;
        placement.start_failures = 0;
    }
    format!("stopped, and given to {to}, generation {}", placement.generation)
}

/// The target could not be given the VM (it is fenced by now): it looks for another place.
pub fn not_handed_over(placement: &mut Placement, to: &str) -> String {
    placement.phase = Phase::Recovering;
    format!("stopped; {to} cannot be given it any more")
}

/// Puts that the migration is committed: the target's from now on; gives the event.
pub fn committed(placement: &mut Placement, target: NodeId, to: &str) -> String {
    placement.owner = target;
    placement.generation = placement.generation.next();
    placement.phase = Phase::Started;
    placement.message = None;
    format!("runs on {to} after a live migration, generation {}", placement.generation)
}

/// Forgets failed starts: the VM has run for a while, or a person asks for it.
pub fn forget_failures(placement: &mut Placement) {
    placement.start_failures = 0;
    placement.tried.clear();
    placement.retry_at_unix_ms = None;
}

/// Whether there is anything to forget.
#[must_use]
pub fn has_failures(placement: &Placement) -> bool {
    placement.start_failures > 0 || !placement.tried.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: NodeId = NodeId(1);
    const OTHER: NodeId = NodeId(2);

    fn id(number: u64) -> VmId {
        let text = format!("\"00000000-0000-4000-8000-00000000000{number}\"");
        serde_json::from_str(&text).unwrap()
    }

    fn placement(owner: NodeId, generation: u64, phase: Phase) -> Placement {
        serde_json::from_value(serde_json::json!({
            "vm_id": id(7), "owner": owner, "generation": generation, "phase": phase,
            "requested": "started", "ha": true, "cpus": 1, "memory_bytes": 64 << 20,
        }))
        .unwrap()
    }

    fn process(generation: u64, state: ProcessState) -> Process {
        Process { vm_id: id(7), generation: Generation(generation), receives: false, state }
    }

    fn receiver(state: ProcessState) -> Process {
        Process { receives: true, ..process(1, state) }
    }

    fn step(placement: Option<&Placement>, process: Option<&Process>) -> Step {
        decide(ME, placement, process, false, true)
    }

    const PHASES: [Phase; 10] = [
        Phase::Stopped,
        Phase::Starting,
        Phase::Started,
        Phase::Stopping,
        Phase::Migrating { target: OTHER },
        Phase::Recovering,
        Phase::Error,
        Phase::Unplaceable,
        Phase::Relocating { target: OTHER },
        Phase::Frozen,
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
        let old = process(1, ProcessState::Answers);
        for phase in PHASES {
            assert_eq!(step(Some(&placement(ME, 2, phase)), Some(&old)), Step::Kill);
            assert_eq!(step(Some(&placement(OTHER, 1, phase)), Some(&old)), Step::Kill);
            let mut another = placement(ME, 1, phase);
            another.vm_id = id(8);
            assert_eq!(step(Some(&another), Some(&old)), Step::Kill);
        }
        assert_eq!(step(None, Some(&old)), Step::Kill);
    }

    #[test]
    fn a_current_process_follows_its_phase() {
        let current = process(1, ProcessState::Answers);
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
                Step::Kill,
                Step::Stop,
                Step::Stop,
            ]
        );
    }

    #[test]
    fn a_process_that_does_not_answer_is_ended_only_where_it_must_not_run() {
        let silent = process(1, ProcessState::Silent);
        let steps = PHASES.map(|phase| step(Some(&placement(ME, 1, phase)), Some(&silent)));
        use Step::{Kill, Leave, Stop};
        assert_eq!(steps, [Kill, Leave, Leave, Stop, Leave, Kill, Kill, Kill, Stop, Stop]);
        for phase in PHASES {
            assert_eq!(step(Some(&placement(ME, 2, phase)), Some(&silent)), Kill);
            assert_eq!(step(Some(&placement(OTHER, 1, phase)), Some(&silent)), Kill);
        }
        assert_eq!(step(None, Some(&silent)), Kill);
        // It may have been told to run what it received, just before the agent before this one ended.
        let receiver = Process { receives: true, ..silent };
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
        assert_eq!((steps[8], steps[9]), (Step::HandOver, Step::Leave));
    }

    #[test]
    fn after_the_commit_the_source_ends_and_the_target_runs() {
        let committed = placement(OTHER, 2, Phase::Started);
        let source = process(1, ProcessState::AwaitingCommit);
        assert_eq!(step(Some(&committed), Some(&source)), Step::ResolveCommit { committed: true });
        // A commit may be on its way: first it is made void, then the VM runs on.
        let before = placement(ME, 1, Phase::Migrating { target: OTHER });
        assert_eq!(step(Some(&before), Some(&source)), Step::SettleMigration);
        let settled = placement(ME, 1, Phase::Started);
        assert_eq!(step(Some(&settled), Some(&source)), Step::ResolveCommit { committed: false });
        // Fenced in the meantime: it must not resume.
        let fenced = placement(ME, 2, Phase::Recovering);
        assert_eq!(step(Some(&fenced), Some(&source)), Step::ResolveCommit { committed: true });

        let target = receiver(ProcessState::Complete);
        let to_me = placement(OTHER, 1, Phase::Migrating { target: ME });
        assert_eq!(step(Some(&to_me), Some(&target)), Step::Leave);
        assert_eq!(step(Some(&placement(ME, 2, Phase::Started)), Some(&target)), Step::RunIncoming);
        // Recovered elsewhere, or to here by a start: what was received is worth nothing.
        assert_eq!(step(Some(&placement(ME, 3, Phase::Started)), Some(&target)), Step::Kill);
        assert_eq!(step(Some(&placement(OTHER, 1, Phase::Started)), Some(&target)), Step::Kill);
        assert_eq!(step(None, Some(&target)), Step::Kill);
        let half = receiver(ProcessState::Answers);
        assert_eq!(step(Some(&placement(ME, 2, Phase::Started)), Some(&half)), Step::Kill);
    }
}
