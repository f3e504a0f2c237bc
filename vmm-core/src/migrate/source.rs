//! The source of a migration: copies a running VM to the target and asks for the commit.
//!
//! Never decides that the VM is gone: [`SourceHooks::commit`] does. Whatever fails before, the VM runs on
//! here with dirty tracking off.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::converge::{self, Decision, Estimate, Limits, Round};
use super::error::{SourceError, StreamError};
use super::pace::Pace;
use super::round::{RoundCount, RoundJob};
use super::stream::{Connector, Patience, Stream};
use super::wire::{self, Accept, Attach, Hello, Kind, RegionLayout, Tally};
use super::{CancelToken, DirtyPages, MigrationVm, PAGE_SIZE, Pagemap, Subject, VmError};

/// How long a failed migration tries to tell the target why, and to hear its reason.
const FAREWELL: Duration = Duration::from_secs(1);
/// A flush of the disks that took longer than this gave the guest time to dirty memory: one more
/// round makes up for it.
const SHORT_FLUSH: Duration = Duration::from_millis(10);

/// How a migration is to be done.
#[derive(Debug, Clone)]
pub struct SourceOptions {
    /// Which VM, in which migration.
    pub subject: Subject,
    /// Pause as soon as the expected downtime is at most this.
    pub downtime_limit: Duration,
    /// When more rounds no longer help: pause if the expected downtime is at most this, else give up.
    pub forced_downtime_limit: Duration,
    /// Most precopy rounds.
    pub max_rounds: u32,
    /// Most bytes a second over all connections.
    pub bandwidth_limit_bytes_s: Option<NonZeroU64>,
    /// How many data connections to ask for.
    pub data_connections: u16,
    /// How long the target may stand still before the migration fails.
    pub stall_limit: Duration,
    /// How long to wait, after the commit, for the target's word that it runs.
    pub running_limit: Duration,
    /// Cancels the migration until the commit.
    pub cancel: CancelToken,
    /// The page map of this process, if it could be opened.
    pub pagemap: Option<Arc<Pagemap>>,
}

impl SourceOptions {
    /// Defaults: 300 ms downtime, at most 3 s where rounds no longer help, 30 rounds, one data connection,
    /// 30 s until a target that stands still is given up.
    #[must_use]
    pub fn new(subject: Subject) -> Self {
        Self {
            subject,
            downtime_limit: Duration::from_millis(300),
            forced_downtime_limit: Duration::from_secs(3),
            max_rounds: 30,
            bandwidth_limit_bytes_s: None,
            data_connections: 1,
            stall_limit: Duration::from_secs(30),
            running_limit: Duration::from_secs(10),
            cancel: CancelToken::default(),
            pagemap: None,
        }
    }

    fn limits(&self) -> Limits {
        Limits {
            downtime: self.downtime_limit,
            forced_downtime: self.forced_downtime_limit,
            rounds: self.max_rounds.max(1),
            state_bytes: 256 << 10,
            fixed: Duration::from_millis(10),
        }
    }
}

/// Where a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Copying memory while the VM runs.
    Precopy,
    /// The VM is paused; the rest is copied.
    StopAndCopy,
    /// The target has everything; the commit is under way.
    Commit,
}

impl Phase {
    /// The phase's name in progress reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::StopAndCopy => "stop-and-copy",
            Self::Commit => "commit",
        }
    }
}

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Where it is.
    pub phase: Phase,
    /// The round under way; the first is 1.
    pub round: u32,
    /// Bytes sent so far.
    pub bytes: u64,
    /// Bytes of guest memory that this round still has to cover.
    pub remaining_bytes: u64,
    /// Bytes a second sent in this round.
    pub bandwidth_bytes_s: u64,
    /// Bytes a second that the guest dirtied in the last round; `None` in the first.
    pub dirty_bytes_s: Option<u64>,
    /// The downtime if the VM were paused after this round; `None` until the bandwidth is measured.
    pub expected_downtime: Option<Duration>,
}

/// What the commit decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Commit {
    /// The target owns the VM. The source never resumes it.
    Committed,
    /// It was refused, for certain; the VM resumes here.
    Refused(String),
}

/// The target has everything and waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommitWanted {
    /// Since the migration began.
    pub elapsed: Duration,
    /// Since the VM was paused.
    pub paused: Duration,
    /// Bytes sent.
    pub bytes: u64,
    /// Rounds made, stop-and-copy too.
    pub rounds: u32,
}

/// What the caller of [`migrate`] does along the way.
pub trait SourceHooks {
    /// Hears how far it is, a few times a second and at each change of phase. Returns quickly.
    fn progress(&mut self, progress: &Progress);

    /// Commits: makes the target the VM's owner. Called once, with the VM paused and the target ready; it
    /// returns only when the outcome is known for certain, however long that takes.
    fn commit(&mut self, wanted: &CommitWanted) -> Commit;
}

/// A migration that was committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Migrated {
    /// From the begin to the target's word that it runs, or to the commit if that never came.
    pub total: Duration,
    /// From the pause to the target's word that it runs; `None` if that never came.
    pub downtime: Option<Duration>,
    /// From the pause to the request for the commit: the part that copying took.
    pub paused_before_commit: Duration,
    /// Bytes sent.
    pub bytes: u64,
    /// Rounds made, stop-and-copy too.
    pub rounds: u32,
}

/// Moves `vm` over the connections that `connector` opens. Blocks until the VM is the target's, or the
/// migration has failed.
///
/// # Errors
/// [`SourceError`]. Unless it is [`SourceError::NotResumed`], the VM runs on here.
pub fn migrate(
    vm: &dyn MigrationVm,
    connector: &mut dyn Connector,
    options: &SourceOptions,
    hooks: &mut dyn SourceHooks,
) -> Result<Migrated, SourceError> {
    let begin = Instant::now();
    let mut session = Session::open(vm, connector, options, begin)?;
    let mut paused = None;
    let result = session.copy(hooks, &mut paused).and_then(|wanted| session.commit(hooks, wanted));
    let cause = match result {
        Ok(wanted) => return Ok(session.finish(&wanted, paused)),
        Err(SourceError::Stream(error)) => session.reason(error),
        Err(error) => error,
    };
    // Resume first: what follows may wait for the network.
    let resumed = if paused.is_some() { vm.resume() } else { Ok(()) };
    if let Err(error) = vm.stop_dirty_tracking() {
        tracing::warn!(%error, "dirty tracking could not be stopped; the VM runs on, more slowly");
    }
    session.say_farewell(&cause);
    match resumed {
        Ok(()) => Err(cause),
        Err(source) => Err(SourceError::NotResumed { cause: Box::new(cause), source }),
    }
}

/// An open migration on the source.
struct Session<'a> {
    vm: &'a dyn MigrationVm,
    options: &'a SourceOptions,
    control: Box<dyn Stream>,
    data: Vec<Box<dyn Stream>>,
    begin: Instant,
    pace: Mutex<Pace>,
    bytes: u64,
    pages: u64,
    rounds: Vec<Round>,
}

impl<'a> Session<'a> {
    /// Prepare: agrees with the target on what is moved. The VM is not touched yet.
    fn open(
        vm: &'a dyn MigrationVm,
        connector: &mut dyn Connector,
        options: &'a SourceOptions,
        begin: Instant,
    ) -> Result<Self, SourceError> {
        let hello = hello(vm, options)?.encode()?;
        let patience = Patience { limit: options.stall_limit, cancel: &options.cancel };
        let mut control = connector.connect(&options.cancel)?;
        wire::send(control.as_mut(), Kind::Hello, &hello, patience)?;
        let mut payload = Vec::new();
        let doing = "waiting for the target to accept";
        wire::receive(control.as_mut(), &mut payload, &[Kind::Accept], patience, doing)?;
        let accept = Accept::decode(&payload)?;
        let versions = wire::PROTOCOL_MIN..=wire::PROTOCOL_MAX;
        let wanted = options.data_connections.clamp(1, wire::DATA_CONNECTIONS_MAX);
        if !versions.contains(&accept.protocol) || !(1..=wanted).contains(&accept.data_connections)
        {
            let Accept { protocol, data_connections } = accept;
            let reason =
                format!("accepted protocol {protocol} with {data_connections} data connections");
            return Err(StreamError::protocol(reason).into());
        }
        let mut data = Vec::new();
        for index in 0..accept.data_connections {
            let mut stream = connector.connect(&options.cancel)?;
            let attach = Attach { index, migration_id: options.subject.migration_id.clone() };
            wire::send(stream.as_mut(), Kind::Attach, &attach.encode()?, patience)?;
            data.push(stream);
        }
        let pace = Mutex::new(Pace::new(options.bandwidth_limit_bytes_s));
        Ok(Self { vm, options, control, data, begin, pace, bytes: 0, pages: 0, rounds: Vec::new() })
    }

    fn patience(&self) -> Patience<'a> {
        Patience { limit: self.options.stall_limit, cancel: &self.options.cancel }
    }

    /// Precopy and stop-and-copy, until the target is ready. Sets `paused` when it pauses the VM.
    fn copy(
        &mut self,
        hooks: &mut dyn SourceHooks,
        paused: &mut Option<Instant>,
    ) -> Result<CommitWanted, SourceError> {
        let vm = self.vm;
        vm.start_dirty_tracking().map_err(vm_error("track its dirty pages"))?;
        // Looked at after tracking began: a page that is touched from here on is dirty.
        let untouched = self.untouched();
        let mut pages = DirtyPages::all(vm.memory());
        let limits = self.options.limits();
        let mut flushed = false;
        loop {
            match converge::decide(&self.rounds, &limits) {
                Decision::AnotherRound(_) => {}
                Decision::StopAndCopy(reason, estimate) => {
                    tracing::info!(
                        ?reason,
                        ?estimate,
                        rounds = self.rounds.len(),
                        "stopping to copy the rest"
                    );
                    let flush = Instant::now();
                    vm.flush_disks().map_err(vm_error("flush its disks"))?;
                    if std::mem::replace(&mut flushed, true) || flush.elapsed() <= SHORT_FLUSH {
                        break;
                    }
                }
                Decision::GiveUp(reason) => return Err(SourceError::NotConverging { reason }),
            }
            let untouched = untouched.as_ref().filter(|_| self.rounds.is_empty());
            pages = self.precopy_round(&pages, untouched, hooks)?;
        }
        if self.options.cancel.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        let stop = Instant::now();
        *paused = Some(stop);
        vm.pause().map_err(vm_error("pause"))?;
        let state = vm.save_state().map_err(vm_error("save its state"))?;
        pages.merge(vm.take_dirty().map_err(vm_error("give its dirty pages"))?);
        self.send_round(&pages, None, Phase::StopAndCopy, hooks)?;
        self.send_state(&state)?;
        Ok(self.wanted(stop))
    }

    fn untouched(&self) -> Option<DirtyPages> {
        let pagemap = self.options.pagemap.as_ref()?;
        match pagemap.untouched(self.vm.memory()) {
            Ok(untouched) => Some(untouched),
            Err(error) => {
                tracing::warn!(%error, "the page map can't be read; unused memory is read page by page");
                None
            }
        }
    }

    /// Sends `pages` while the VM runs; the pages that are dirty after it.
    fn precopy_round(
        &mut self,
        pages: &DirtyPages,
        untouched: Option<&DirtyPages>,
        hooks: &mut dyn SourceHooks,
    ) -> Result<DirtyPages, SourceError> {
        let begin = Instant::now();
        let count = self.send_round(pages, untouched, Phase::Precopy, hooks)?;
        let mut payload = Vec::new();
        let doing = "waiting for the target to acknowledge a round";
        // The target may still have to look through zero pages: at least 1 GiB a second.
        let limit = self.options.stall_limit + Duration::from_secs(pages.bytes() >> 30);
        let patience = Patience { limit, ..self.patience() };
        wire::receive(self.control.as_mut(), &mut payload, &[Kind::RoundAck], patience, doing)?;
        let expected = Tally { round: self.round_number(), state_crc: 0, pages: self.pages };
        check_tally(&payload, expected)?;
        let elapsed = begin.elapsed();
        let dirty = self.vm.take_dirty().map_err(vm_error("give its dirty pages"))?;
        let round = Round {
            covered_bytes: pages.bytes(),
            sent_bytes: count.sent_bytes,
            elapsed,
            dirty_bytes: dirty.bytes(),
        };
        tracing::debug!(?round, "precopy round");
        self.rounds.push(round);
        Ok(dirty)
    }

    /// The round under way; the first is 1.
    fn round_number(&self) -> u32 {
        u32::try_from(self.rounds.len()).unwrap_or(u32::MAX).saturating_add(1)
    }

    fn send_round(
        &mut self,
        pages: &DirtyPages,
        untouched: Option<&DirtyPages>,
        phase: Phase,
        hooks: &mut dyn SourceHooks,
    ) -> Result<RoundCount, SourceError> {
        let round = self.round_number();
        let estimate = converge::estimate(&self.rounds, &self.options.limits());
        let (before, begin, total) = (self.bytes, Instant::now(), pages.count());
        let progress =
            |count: RoundCount| progress(phase, round, before, total, count, begin, &estimate);
        hooks.progress(&progress(RoundCount::default()));
        let job = RoundJob {
            memory: self.vm.memory(),
            pages,
            untouched,
            round,
            is_last: phase == Phase::StopAndCopy,
            pace: &self.pace,
            epoch: self.begin,
            patience: self.patience(),
        };
        let count = job.send(&mut self.data, &mut |count| hooks.progress(&progress(count)))?;
        self.bytes += count.sent_bytes;
        self.pages += count.pages;
        Ok(count)
    }

    /// Sends the state and waits until the target has restored it.
    fn send_state(&mut self, state: &[u8]) -> Result<(), SourceError> {
        let patience = self.patience();
        wire::send(self.control.as_mut(), Kind::State, state, patience)?;
        self.bytes += state.len() as u64;
        let mut payload = Vec::new();
        let doing = "waiting for the target to restore the state";
        wire::receive(self.control.as_mut(), &mut payload, &[Kind::Ready], patience, doing)?;
        let state_crc = crc32fast::hash(state);
        check_tally(&payload, Tally { round: self.round_number(), state_crc, pages: self.pages })
    }

    fn wanted(&self, stop: Instant) -> CommitWanted {
        CommitWanted {
            elapsed: self.begin.elapsed(),
            paused: stop.elapsed(),
            bytes: self.bytes,
            rounds: self.round_number(),
        }
    }

    /// Asks for the commit. From here on the migration can't be cancelled.
    fn commit(
        &mut self,
        hooks: &mut dyn SourceHooks,
        wanted: CommitWanted,
    ) -> Result<CommitWanted, SourceError> {
        if !self.options.cancel.begin_commit() {
            return Err(SourceError::Cancelled);
        }
        let estimate = converge::estimate(&self.rounds, &self.options.limits());
        let count = RoundCount::default();
        let Session { begin, bytes, .. } = *self;
        hooks.progress(&progress(Phase::Commit, wanted.rounds, bytes, 0, count, begin, &estimate));
        match hooks.commit(&wanted) {
            Commit::Committed => Ok(wanted),
            Commit::Refused(reason) => Err(SourceError::CommitRefused { reason }),
        }
    }

    /// After the commit: tells the target, and hears when it runs. Nothing here can fail the migration.
    fn finish(mut self, wanted: &CommitWanted, paused: Option<Instant>) -> Migrated {
        let patience = Patience { limit: self.options.running_limit, cancel: &self.options.cancel };
        let control = self.control.as_mut();
        let mut payload = Vec::new();
        let running = wire::send(control, Kind::Committed, &[], patience).and_then(|()| {
            let doing = "waiting for the target to run";
            wire::receive(control, &mut payload, &[Kind::Running], patience, doing)
        });
        if let Err(error) = &running {
            tracing::warn!(%error, "committed, but the target's word that it runs did not come");
        }
        Migrated {
            total: self.begin.elapsed(),
            downtime: running.ok().and(paused).map(|stop| stop.elapsed()),
            paused_before_commit: wanted.paused,
            bytes: wanted.bytes,
            rounds: wanted.rounds,
        }
    }

    /// A connection failed: perhaps because the target gave up, and it says why on the control connection.
    fn reason(&mut self, error: StreamError) -> SourceError {
        match error {
            StreamError::Cancelled => SourceError::Cancelled,
            StreamError::Io { .. } | StreamError::Closed { .. } => {
                let never = CancelToken::default();
                let patience = Patience { limit: FAREWELL, cancel: &never };
                let doing = "waiting for the target's reason";
                let mut payload = Vec::new();
                // An acknowledgement may stand before the reason.
                let acks = [Kind::RoundAck, Kind::Ready];
                for _ in 0..2 {
                    let next =
                        wire::receive(self.control.as_mut(), &mut payload, &acks, patience, doing);
                    match next {
                        Ok(_) => {}
                        Err(refused @ StreamError::Refused { .. }) => return refused.into(),
                        Err(_) => break,
                    }
                }
                error.into()
            }
            error => error.into(),
        }
    }

    fn say_farewell(&mut self, cause: &SourceError) {
        let never = CancelToken::default();
        let patience = Patience { limit: FAREWELL, cancel: &never };
        let reason = cause.to_string();
        let reason = wire::reason_bytes(&reason);
        if let Err(error) = wire::send(self.control.as_mut(), Kind::Abandoned, reason, patience) {
            tracing::debug!(%error, "the target could not be told that the migration failed");
        }
    }
}

fn vm_error(doing: &'static str) -> impl FnOnce(VmError) -> SourceError {
    move |source| SourceError::Vm { doing, source }
}

fn check_tally(payload: &[u8], expected: Tally) -> Result<(), SourceError> {
    let found = Tally::decode(payload)?;
    if found != expected {
        let reason = format!("the target has {found:?} where {expected:?} was sent");
        return Err(StreamError::protocol(reason).into());
    }
    Ok(())
}

fn hello(vm: &dyn MigrationVm, options: &SourceOptions) -> Result<Hello, SourceError> {
    let layout = layout(vm.memory());
    if let Some(odd) = layout.iter().find(|region| (region.start | region.bytes) % PAGE_SIZE != 0) {
        let reason = format!("its memory at {:#x} is not made of whole pages", odd.start);
        return Err(SourceError::Unsupported { reason });
    }
    Ok(Hello {
        protocol_min: wire::PROTOCOL_MIN,
        protocol_max: wire::PROTOCOL_MAX,
        data_connections: options.data_connections.clamp(1, wire::DATA_CONNECTIONS_MAX),
        page_bytes: u32::try_from(PAGE_SIZE).unwrap_or(u32::MAX),
        subject: options.subject.clone(),
        layout,
    })
}

/// The regions of guest memory, rising.
pub(super) fn layout(memory: &crate::memory::GuestMemory) -> Vec<RegionLayout> {
    let region = |region: &<crate::memory::GuestMemory as GuestMemoryBackend>::R| RegionLayout {
        start: region.start_addr().raw_value(),
        bytes: region.len(),
    };
    memory.iter().map(region).collect()
}

fn progress(
    phase: Phase,
    round: u32,
    before: u64,
    total_pages: u64,
    count: RoundCount,
    begin: Instant,
    estimate: &Estimate,
) -> Progress {
    let micros = begin.elapsed().as_micros().max(1);
    let measured = u128::from(count.sent_bytes) * 1_000_000 / micros;
    let bandwidth_bytes_s = match count.sent_bytes {
        0 if estimate.is_measured => estimate.bandwidth_bytes_s,
        _ => u64::try_from(measured).unwrap_or(u64::MAX),
    };
    Progress {
        phase,
        round,
        bytes: before + count.sent_bytes,
        remaining_bytes: total_pages.saturating_sub(count.pages).saturating_mul(PAGE_SIZE),
        bandwidth_bytes_s,
        dirty_bytes_s: (round > 1).then_some(estimate.dirty_bytes_s),
        expected_downtime: estimate.is_measured.then_some(estimate.downtime),
    }
}
