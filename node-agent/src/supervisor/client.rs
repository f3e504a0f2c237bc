//! Talking to one VM process, and seeing it end.

use std::path::PathBuf;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt};
use hyper_util::rt::TokioIo;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use proto::Generation;
use proto::v1::vm_process_client::VmProcessClient;
use proto::v1::{
    ConsoleInput, ConsoleOutput, ResolveCommitRequest, RunIncomingRequest, VmProcessEmpty,
    VmProcessStatus, VmProcessStatusRequest,
};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Response, Status};

use super::{ExitReason, LastSeen, Live, RunningVm, Stop, VmError, VmState};
use crate::vm_process::ExitRecord;

/// How long a healthy process takes at most to answer what needs no disk.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long pausing and flushing may take.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(30);
/// How soon a guest that did not listen to its power button is tried again.
const PRESS_AGAIN: Duration = Duration::from_secs(1);
/// How soon a process that cannot be watched is tried again.
const WATCH_AGAIN: Duration = Duration::from_millis(500);
/// After a polite stop, before the kill.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// A client of the process behind a control socket. Connects when it is first used.
pub(super) fn connect(socket: PathBuf) -> VmProcessClient<Channel> {
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // The authority is only a label: the connector goes to the socket whatever it says.
    let endpoint = Endpoint::from_static("http://vm-process");
    VmProcessClient::new(endpoint.connect_with_connector_lazy(connector))
}

impl Live {
    pub(super) fn summary(&self) -> RunningVm {
        let last = self.last();
        RunningVm {
            name: self.state.name.clone(),
            vm_id: self.state.vm_id,
            generation: last.generation,
            ha: self.state.ha,
            state: last.state,
            migration_id: last.incoming.clone(),
            pid: self.process.pid(),
            memory_bytes: self.state.memory_bytes,
        }
    }

    pub(super) fn last(&self) -> MutexGuard<'_, LastSeen> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for the status and remembers it.
    pub(super) async fn refresh(&self) -> Option<VmProcessStatus> {
        self.refresh_within(ANSWER_TIMEOUT).await
    }

    pub(super) async fn refresh_within(&self, limit: Duration) -> Option<VmProcessStatus> {
        let mut client = self.client.clone();
        let asked = client.status(VmProcessStatusRequest {});
        let answer = tokio::time::timeout(limit, asked).await.ok().and_then(Result::ok);
        let Some(status) = answer.map(Response::into_inner) else {
            self.last().state = VmState::Unknown;
            return None;
        };
        self.remember(&status);
        Some(status)
    }

    pub(super) fn remember(&self, status: &VmProcessStatus) {
        let mut last = self.last();
        last.state = VmState::from_word(&status.state);
        last.generation = last.generation.max(Generation(status.generation));
        if !matches!(last.state, VmState::Incoming | VmState::IncomingComplete | VmState::Unknown) {
            last.incoming = None;
        }
    }

    pub(super) async fn pause(&self) -> Result<(), VmError> {
        let mut client = self.client.clone();
        let paused = self.ask("pause", FLUSH_TIMEOUT, client.pause(VmProcessEmpty {})).await;
        self.refresh().await;
        paused
    }

    pub(super) async fn resume(&self) -> Result<(), VmError> {
        let mut client = self.client.clone();
        let resumed = self.ask("resume", ANSWER_TIMEOUT, client.resume(VmProcessEmpty {})).await;
        self.refresh().await;
        resumed
    }

    pub(super) async fn reset(&self) -> Result<(), VmError> {
        let mut client = self.client.clone();
        self.ask("reset", FLUSH_TIMEOUT, client.reset(VmProcessEmpty {})).await
    }

    pub(super) async fn resolve_commit(
        &self,
        migration_id: &str,
        committed: bool,
    ) -> Result<(), VmError> {
        let request = ResolveCommitRequest { migration_id: migration_id.to_owned(), committed };
        let mut client = self.client.clone();
        let resolved =
            self.ask("resolve commit", FLUSH_TIMEOUT, client.resolve_commit(request)).await;
        if !committed {
            self.refresh().await;
        }
        resolved
    }

    pub(super) async fn run_incoming(
        &self,
        migration_id: &str,
        generation: Generation,
        deadline_ns: Option<u64>,
    ) -> Result<(), VmError> {
        let migration_id = migration_id.to_owned();
        let request = RunIncomingRequest { migration_id, generation: generation.0, deadline_ns };
        let mut client = self.client.clone();
        self.ask("run incoming", FLUSH_TIMEOUT, client.run_incoming(request)).await?;
        {
            let mut last = self.last();
            last.generation = last.generation.max(generation);
            last.state = VmState::Running;
            last.incoming = None;
        }
        let mut state = self.state.clone();
        (state.generation, state.migration_id) = (generation, None);
        self.files.write_state(&state)
    }

    pub(super) async fn console(
        &self,
        input: impl Stream<Item = Vec<u8>> + Send + 'static,
    ) -> Result<tonic::Streaming<ConsoleOutput>, VmError> {
        let messages = input.map(|data| ConsoleInput { vm: String::new(), data });
        let answer = self.client.clone().console(messages).await;
        answer.map(Response::into_inner).map_err(|status| self.refused("console", status))
    }

    /// SIGKILL, remembered so that the exit is told as a kill. Never blocks.
    pub(super) fn kill(&self) -> Result<(), VmError> {
        self.kill_as(ExitReason::Killed)
    }

    /// The first reason counts.
    pub(super) fn kill_as(&self, reason: ExitReason) -> Result<(), VmError> {
        self.last().killed.get_or_insert(reason);
        self.signal(Signal::SIGKILL)
    }

    pub(super) fn signal(&self, signal: Signal) -> Result<(), VmError> {
        self.process.signal(signal).map_err(|errno| VmError::Signal {
            name: self.state.name.clone(),
            pid: self.process.pid(),
            errno,
        })
    }

    pub(super) async fn stop(&self, how: Stop) -> Result<(), VmError> {
        match how {
            Stop::Kill => {
                self.kill()?;
                self.wait_gone().await;
                Ok(())
            }
            Stop::Graceful => self.stop_gracefully().await,
            Stop::PowerButton { timeout, force } => self.press_power_button(timeout, force).await,
        }
    }

    async fn stop_gracefully(&self) -> Result<(), VmError> {
        let mut client = self.client.clone();
        let asked = self.ask("stop", STOP_GRACE, client.stop(VmProcessEmpty {})).await;
        if let Err(error) = asked {
            // The answer may be lost because the process ended; if not, the kill below ends it.
            tracing::debug!(vm = %self.state.name, %error, "the process did not confirm its stop");
        }
        if tokio::time::timeout(STOP_GRACE, self.wait_gone()).await.is_err() {
            tracing::warn!(vm = %self.state.name, "did not end when asked to: killing it");
            self.kill()?;
            self.wait_gone().await;
        }
        Ok(())
    }

    /// Presses it again until the guest listens: one that boots does not, yet.
    async fn press_power_button(&self, timeout: Duration, force: bool) -> Result<(), VmError> {
        let begin = Instant::now();
        while begin.elapsed() < timeout {
            let mut client = self.client.clone();
            let request = client.power_button(VmProcessEmpty {});
            let pressed = self.ask("power button", ANSWER_TIMEOUT, request).await;
            let left = timeout.saturating_sub(begin.elapsed());
            let wait = if pressed.is_ok() { left } else { left.min(PRESS_AGAIN) };
            if tokio::time::timeout(wait, self.wait_gone()).await.is_ok() {
                return Ok(());
            }
        }
        if force {
            return self.stop_gracefully().await;
        }
        let name = self.state.name.clone();
        Err(VmError::ShutdownTimeout { name, seconds: timeout.as_secs() })
    }

    /// Waits until the process is gone and its exit was told.
    pub(super) async fn wait_gone(&self) -> ExitReason {
        let mut gone = self.gone.subscribe();
        let reason = gone.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
        reason.unwrap_or(ExitReason::Killed)
    }

    /// Waits for the process itself and says why it ended.
    pub(super) async fn watch(self: &Arc<Self>) -> ExitReason {
        loop {
            match self.process.exited().await {
                Ok(status) => return self.exit_reason(status),
                // That it cannot be watched (no descriptor is left, say) is no sign that it ended:
                // a VM that is told to be gone is started elsewhere.
                Err(error) => {
                    tracing::error!(vm = %self.state.name, %error, "cannot watch the process");
                }
            }
            tokio::time::sleep(WATCH_AGAIN).await;
        }
    }

    fn exit_reason(&self, status: Option<WaitStatus>) -> ExitReason {
        if let Some(record) = ExitRecord::read(&self.files.exit_record()) {
            return record.into();
        }
        if let Some(killed) = self.last().killed.clone() {
            return killed;
        }
        ExitReason::Failed(match status {
            Some(WaitStatus::Signaled(_, Signal::SIGSYS, _)) => {
                "ended by its seccomp filter: it made a system call that it must not make".into()
            }
            Some(WaitStatus::Signaled(_, signal, _)) => format!("ended by {signal}"),
            Some(WaitStatus::Exited(_, code)) => format!("ended with code {code}, see its log"),
            _ => "ended without leaving a reason".into(),
        })
    }

    async fn ask<T>(
        &self,
        action: &'static str,
        limit: Duration,
        request: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<(), VmError> {
        let answer = tokio::time::timeout(limit, request).await;
        let late = || Status::deadline_exceeded(format!("no answer within {} s", limit.as_secs()));
        let answer = answer.unwrap_or_else(|_| Err(late()));
        answer.map(drop).map_err(|status| self.refused(action, status))
    }

    fn refused(&self, action: &'static str, status: Status) -> VmError {
        VmError::Process { name: self.state.name.clone(), action, status }
    }
}
