//! The target of a migration: fills a VM that was built for it, and hands it over ready to run.
//!
//! Never runs the VM: the caller does, once it has read the commit. What comes from the source is checked
//! against what was announced and against the VM that was built; nothing is allocated by its word alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::batch::{Record, Records, is_zero};
use super::error::{StreamError, TargetError};
use super::source::layout;
use super::stream::{Acceptor, Patience, Stream};
use super::wire::{self, Accept, Attach, Hello, Kind, RoundEnd, Tally};
use super::{
    CancelToken, DirtyPages, IncomingVm, PAGE_BYTES, PAGE_SIZE, PageRun, Pagemap, Subject,
};
use crate::memory::GuestMemory;

/// Rounds after which a source is taken to be hostile.
const ROUNDS_MAX: u32 = 10_000;
/// How long the target tries to tell the source why it gave up.
const FAREWELL: Duration = Duration::from_secs(1);

/// What a target expects.
#[derive(Debug, Clone)]
pub struct TargetOptions {
    /// Which VM, in which migration: anything else is refused.
    pub subject: Subject,
    /// Most data connections to accept.
    pub data_connections: u16,
    /// How long to wait for the source's first connection.
    pub connect_limit: Duration,
    /// How long the source may stand still, or one of its frames may take.
    pub stall_limit: Duration,
    /// Cancels the reception.
    pub cancel: CancelToken,
    /// The page map of this process, if it could be opened.
    pub pagemap: Option<Arc<Pagemap>>,
}

impl TargetOptions {
    /// Defaults: 60 s for the source to connect, 30 s until a source that stands still is given up.
    #[must_use]
    pub fn new(subject: Subject) -> Self {
        Self {
            subject,
            data_connections: wire::DATA_CONNECTIONS_MAX,
            connect_limit: Duration::from_secs(60),
            stall_limit: Duration::from_secs(30),
            cancel: CancelToken::default(),
            pagemap: None,
        }
    }
}

/// What the source says about the commit. A hint only: the configuration has the truth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The source saw the commit.
    Committed,
    /// The source resumed the VM, and says why.
    Abandoned(String),
    /// The connection is lost, or nothing came in time.
    Unknown,
}

/// A VM that has everything, and does not run yet.
pub struct Ready<V> {
    /// The VM. Its caller lets it run after it has read the commit; else it is dropped.
    pub vm: V,
    /// Rounds received, stop-and-copy too.
    pub rounds: u32,
    /// Pages received, zero pages too.
    pub pages: u64,
    control: Box<dyn Stream>,
}

impl<V> std::fmt::Debug for Ready<V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ready")
            .field("rounds", &self.rounds)
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

impl<V> Ready<V> {
    /// Waits for the source's word about the commit, at most `limit`.
    pub fn wait_outcome(&mut self, limit: Duration) -> Outcome {
        let never = CancelToken::default();
        let patience = Patience { limit, cancel: &never };
        let mut payload = Vec::new();
        let kinds = [Kind::Committed, Kind::Abandoned];
        let doing = "waiting for the commit";
        match wire::receive(self.control.as_mut(), &mut payload, &kinds, patience, doing) {
            Ok(Kind::Committed) => Outcome::Committed,
            Ok(_) => Outcome::Abandoned(abandoned_reason(&payload)),
            Err(_) => Outcome::Unknown,
        }
    }

    /// Tells the source that the VM runs, so that it can measure the downtime. Its loss is harmless.
    pub fn announce_running(&mut self) {
        let never = CancelToken::default();
        let patience = Patience { limit: FAREWELL, cancel: &never };
        if let Err(error) = wire::send(self.control.as_mut(), Kind::Running, &[], patience) {
            tracing::info!(%error, "the source could not be told that the VM runs");
        }
    }

    /// The VM alone, and a handle to announce with while the VM is elsewhere.
    pub fn split(self) -> (V, Ready<()>) {
        let Self { vm, rounds, pages, control } = self;
        (vm, Ready { vm: (), rounds, pages, control })
    }
}

fn abandoned_reason(payload: &[u8]) -> String {
    String::from_utf8_lossy(payload).escape_debug().to_string()
}

/// Receives a VM into `vm`. Blocks until all of it is there and restored.
///
/// # Errors
/// [`TargetError`]; `vm` is dropped then, and the source was told if it still listens.
pub fn receive<V: IncomingVm>(
    mut vm: V,
    acceptor: &mut dyn Acceptor,
    options: &TargetOptions,
) -> Result<Ready<V>, TargetError> {
    let mut control = acceptor.accept(options.connect_limit, &options.cancel)?;
    let patience = Patience { limit: options.stall_limit, cancel: &options.cancel };
    let mut session = Session { control: control.as_mut(), options, patience, rounds: 0, pages: 0 };
    let result = session.receive_vm(&mut vm, acceptor);
    let Session { rounds, pages, .. } = session;
    match result {
        Ok(()) => Ok(Ready { vm, rounds, pages, control }),
        Err(error) => {
            let error = source_reason(control.as_mut(), error);
            say_farewell(control.as_mut(), &error);
            Err(error)
        }
    }
}

/// A data connection ended: perhaps because the source gave up, and it says why on the control connection.
fn source_reason(control: &mut dyn Stream, error: TargetError) -> TargetError {
    let TargetError::Stream(StreamError::Io { .. } | StreamError::Closed { .. }) = error else {
        return error;
    };
    let never = CancelToken::default();
    let patience = Patience { limit: FAREWELL, cancel: &never };
    let mut payload = Vec::new();
    let doing = "waiting for the source's reason";
    match wire::receive(control, &mut payload, &[Kind::Abandoned], patience, doing) {
        Ok(_) => StreamError::Refused { reason: abandoned_reason(&payload) }.into(),
        Err(refused @ StreamError::Refused { .. }) => refused.into(),
        Err(_) => error,
    }
}

fn say_farewell(control: &mut dyn Stream, error: &TargetError) {
    let never = CancelToken::default();
    let patience = Patience { limit: FAREWELL, cancel: &never };
    let mut reason = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        reason = format!("{reason}: {next}");
        cause = next.source();
    }
    let reason = wire::reason_bytes(&reason);
    if let Err(error) = wire::send(control, Kind::Failed, reason, patience) {
        tracing::debug!(%error, "the source could not be told that the migration failed");
    }
}

/// An open migration on the target.
struct Session<'a> {
    control: &'a mut dyn Stream,
    options: &'a TargetOptions,
    patience: Patience<'a>,
    rounds: u32,
    pages: u64,
}

impl Session<'_> {
    fn receive_vm<V: IncomingVm>(
        &mut self,
        vm: &mut V,
        acceptor: &mut dyn Acceptor,
    ) -> Result<(), TargetError> {
        let accept = self.prepare(vm.memory())?;
        let mut data = self.accept_data(accept, acceptor)?;
        let mut fillers = vec![Filler::default(); data.len()];
        let mut untouched = self.untouched(vm.memory());
        while !self.receive_round(vm.memory(), untouched.as_ref(), &mut data, &mut fillers)? {
            untouched = None;
            let tally = Tally { round: self.rounds, state_crc: 0, pages: self.pages };
            wire::send(self.control, Kind::RoundAck, &tally.encode(), self.patience)?;
        }
        let mut state = Vec::new();
        let doing = "waiting for the state";
        wire::receive(self.control, &mut state, &[Kind::State], self.patience, doing)?;
        vm.restore_state(&state).map_err(|source| TargetError::Restore { source })?;
        let state_crc = crc32fast::hash(&state);
        let tally = Tally { round: self.rounds, state_crc, pages: self.pages };
        // From here on the source may commit. Whether this arrives can't be known here, so that an error
        // does not throw the VM away: the caller reads in the configuration who owns it.
        if let Err(error) = wire::send(self.control, Kind::Ready, &tally.encode(), self.patience) {
            tracing::warn!(%error, "the source could not be told that the VM is ready");
        }
        Ok(())
    }

    /// Hello and Accept: the same migration, the same VM, the same memory.
    fn prepare(&mut self, memory: &GuestMemory) -> Result<Accept, TargetError> {
        let mut payload = Vec::new();
        let doing = "waiting for the source to name its VM";
        wire::receive(self.control, &mut payload, &[Kind::Hello], self.patience, doing)?;
        let hello = Hello::decode(&payload)?;
        self.check(&hello, memory)?;
        let accept = Accept {
            protocol: hello.protocol_max.min(wire::PROTOCOL_MAX),
            data_connections: hello
                .data_connections
                .clamp(1, self.options.data_connections.clamp(1, wire::DATA_CONNECTIONS_MAX)),
        };
        wire::send(self.control, Kind::Accept, &accept.encode(), self.patience)?;
        Ok(accept)
    }

    fn check(&self, hello: &Hello, memory: &GuestMemory) -> Result<(), TargetError> {
        let mismatch = |reason: String| Err(TargetError::Mismatch { reason });
        let (min, max) = (hello.protocol_min, hello.protocol_max);
        if min > max || min > wire::PROTOCOL_MAX || max < wire::PROTOCOL_MIN {
            let (our_min, our_max) = (wire::PROTOCOL_MIN, wire::PROTOCOL_MAX);
            return mismatch(format!(
                "the source speaks protocol {min} to {max}, this node {our_min} to {our_max}; upgrade the older node"
            ));
        }
        if u64::from(hello.page_bytes) != PAGE_SIZE {
            return mismatch(format!("the source has pages of {} bytes", hello.page_bytes));
        }
        let expected = &self.options.subject;
        if hello.subject != *expected {
            return mismatch(format!(
                "the source sends VM {} generation {} in migration {:?}, expected is VM {} generation {} in migration {:?}",
                hello.subject.vm_id,
                hello.subject.generation,
                hello.subject.migration_id,
                expected.vm_id,
                expected.generation,
                expected.migration_id,
            ));
        }
        let ours = layout(memory);
        if hello.layout != ours {
            let theirs = &hello.layout;
            return mismatch(format!("its memory is laid out as {theirs:x?}, here as {ours:x?}"));
        }
        Ok(())
    }

    fn accept_data(
        &self,
        accept: Accept,
        acceptor: &mut dyn Acceptor,
    ) -> Result<Vec<Box<dyn Stream>>, TargetError> {
        let mut data: BTreeMap<u16, Box<dyn Stream>> = BTreeMap::new();
        while data.len() < usize::from(accept.data_connections) {
            let mut stream = acceptor.accept(self.options.stall_limit, &self.options.cancel)?;
            let mut payload = Vec::new();
            let doing = "waiting for a data connection";
            wire::receive(stream.as_mut(), &mut payload, &[Kind::Attach], self.patience, doing)?;
            let Attach { index, migration_id } = Attach::decode(&payload)?;
            let wanted = index < accept.data_connections && !data.contains_key(&index);
            if !wanted || migration_id != self.options.subject.migration_id {
                let reason = format!(
                    "data connection {index} of migration {migration_id:?} where {} are expected",
                    accept.data_connections
                );
                return Err(StreamError::protocol(reason).into());
            }
            data.insert(index, stream);
        }
        Ok(data.into_values().collect())
    }

    /// Pages that are zero because nothing ever touched them. Holds for the first round alone: later ones
    /// may clear what it wrote.
    fn untouched(&self, memory: &GuestMemory) -> Option<DirtyPages> {
        self.options.pagemap.as_ref().and_then(|pagemap| pagemap.untouched(memory).ok())
    }

    /// Receives one round on all data connections; true if it was the last.
    fn receive_round(
        &mut self,
        memory: &GuestMemory,
        untouched: Option<&DirtyPages>,
        data: &mut [Box<dyn Stream>],
        fillers: &mut [Filler],
    ) -> Result<bool, TargetError> {
        if self.rounds == ROUNDS_MAX {
            return Err(StreamError::protocol(format!("more than {ROUNDS_MAX} rounds")).into());
        }
        self.rounds += 1;
        let total = DirtyPages::all(memory).count();
        let round = IncomingRound { memory, untouched, total, patience: self.patience };
        let ends = round.receive(data, fillers)?;
        let is_last = ends.first().is_some_and(|end| end.is_last);
        let mut pages = 0_u64;
        for end in &ends {
            if end.round != self.rounds || end.is_last != is_last {
                let reason = format!("{end:?} in round {}", self.rounds);
                return Err(StreamError::protocol(reason).into());
            }
            pages = pages.saturating_add(end.pages);
        }
        if pages > total {
            let reason = format!("{pages} pages in one round of a VM that has {total}");
            return Err(StreamError::protocol(reason).into());
        }
        self.pages = self.pages.saturating_add(pages);
        Ok(is_last)
    }
}

/// What one round is received into.
#[derive(Clone, Copy)]
struct IncomingRound<'a> {
    memory: &'a GuestMemory,
    /// Pages that need not be cleared.
    untouched: Option<&'a DirtyPages>,
    /// Pages of the VM.
    total: u64,
    patience: Patience<'a>,
}

/// What one data connection reuses from round to round.
#[derive(Debug, Clone, Default)]
struct Filler {
    payload: Vec<u8>,
    page: Vec<u8>,
}

impl IncomingRound<'_> {
    /// Receives on each data connection, each in a thread of its own if there are several.
    fn receive(
        self,
        data: &mut [Box<dyn Stream>],
        fillers: &mut [Filler],
    ) -> Result<Vec<RoundEnd>, TargetError> {
        let connections = data.iter_mut().zip(fillers);
        if connections.len() == 1 {
            return connections
                .map(|(stream, filler)| self.fill(stream.as_mut(), filler))
                .collect();
        }
        thread::scope(|scope| {
            let threads: Vec<_> = connections
                .map(|(stream, filler)| scope.spawn(move || self.fill(stream.as_mut(), filler)))
                .collect();
            let join = |thread: thread::ScopedJoinHandle<'_, _>| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            threads.into_iter().map(join).collect()
        })
    }

    /// Receives on one data connection until its round ends.
    fn fill(self, stream: &mut dyn Stream, filler: &mut Filler) -> Result<RoundEnd, TargetError> {
        let kinds = [Kind::Pages, Kind::RoundEnd];
        let Filler { payload, page } = filler;
        let mut pages = 0_u64;
        loop {
            let kind = wire::receive(stream, payload, &kinds, self.patience, "receiving memory")?;
            if kind == Kind::RoundEnd {
                let end = RoundEnd::decode(payload)?;
                if end.pages != pages {
                    let reason = format!("{pages} pages where {} were announced", end.pages);
                    return Err(StreamError::protocol(reason).into());
                }
                return Ok(end);
            }
            if payload.is_empty() {
                // Else a source could go on with them for ever.
                return Err(StreamError::protocol("pages that are none").into());
            }
            for record in Records::of(payload) {
                let record = record?;
                let (Record::Zero(run) | Record::Data(run, _)) = record;
                pages = pages.saturating_add(run.count);
                if pages > self.total {
                    let reason = format!("more pages in a round than the VM has ({})", self.total);
                    return Err(StreamError::protocol(reason).into());
                }
                self.apply(&record, page)?;
            }
        }
    }

    fn apply(self, record: &Record<'_>, page: &mut Vec<u8>) -> Result<(), TargetError> {
        match record {
            Record::Zero(run) => {
                check_range(self.memory, *run)?;
                (run.first..run.end()).try_for_each(|frame| self.clear_page(frame, page))
            }
            Record::Data(run, data) => {
                let address = check_range(self.memory, *run)?;
                let written = self.memory.write_slice(data, address);
                written.map_err(|error| memory_error(address, &error))
            }
        }
    }

    /// Makes a page zero; one that is zero already is left alone, so that it takes no memory.
    fn clear_page(self, frame: u64, page: &mut Vec<u8>) -> Result<(), TargetError> {
        if self.untouched.is_some_and(|untouched| untouched.contains(frame)) {
            return Ok(());
        }
        let address = GuestAddress(frame.saturating_mul(PAGE_SIZE));
        let failed = |error| memory_error(address, &error);
        page.resize(PAGE_BYTES, 0);
        self.memory.read_slice(page, address).map_err(failed)?;
        if !is_zero(page) {
            page.fill(0);
            self.memory.write_slice(page, address).map_err(failed)?;
        }
        Ok(())
    }
}

/// The address of a run that lies in guest memory as a whole.
fn check_range(memory: &GuestMemory, run: PageRun) -> Result<GuestAddress, TargetError> {
    let address = run.first.checked_mul(PAGE_SIZE);
    let bytes = run.count.checked_mul(PAGE_SIZE).and_then(|bytes| usize::try_from(bytes).ok());
    match (address, bytes) {
        (Some(address), Some(bytes)) if memory.check_range(GuestAddress(address), bytes) => {
            Ok(GuestAddress(address))
        }
        _ => {
            let reason = format!("pages {:#x}+{:#x} are not guest memory", run.first, run.count);
            Err(StreamError::protocol(reason).into())
        }
    }
}

fn memory_error(address: GuestAddress, error: &impl std::fmt::Display) -> TargetError {
    TargetError::Memory { address: address.0, reason: error.to_string() }
}
