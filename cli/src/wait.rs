//! Waiting for a task: its log and progress on stderr, its end as the answer. A connection that
//! breaks on the way is made again; the task does not mind.

use std::future::Future;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use proto::v1;
use proto::v1::task_update::Update;
use proto::v1::tasks_client::TasksClient;
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::args::Format;
use crate::connect::Session;
use crate::failure::{Exit, Failure};
use crate::output;

/// A lost connection is tried again for this long.
const RECONNECT_LIMIT: Duration = Duration::from_secs(30);
const RECONNECT_PAUSE: Duration = Duration::from_millis(500);

/// What Ctrl-C does while waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnInterrupt {
    /// Says that the task goes on.
    Leave,
    /// On a terminal, asks whether to cancel the task.
    OfferCancel,
}

impl Session {
    /// Waits for the task of a change and prints how it ended; with `--no-wait` prints its id.
    pub(crate) async fn finish(&self, what: &str, task_id: &str) -> Result<(), Failure> {
        if self.global.no_wait {
            return self.print_task_id(task_id);
        }
        let task = self.wait(what, task_id, OnInterrupt::Leave).await?;
        output::print(self.global.output, &task, |task| ended_line(what, task))
    }

    /// For `--no-wait`.
    pub(crate) fn print_task_id(&self, task_id: &str) -> Result<(), Failure> {
        let reference = v1::TaskRef { task_id: task_id.to_owned() };
        output::print(self.global.output, &reference, |reference| reference.task_id.clone())
    }

    /// Follows a task to its end.
    ///
    /// # Errors
    /// If it fails or is cancelled, the limit passes, the cluster stays away, or on Ctrl-C.
    pub(crate) async fn wait(
        &self,
        what: &str,
        task_id: &str,
        on_interrupt: OnInterrupt,
    ) -> Result<v1::Task, Failure> {
        let view = View::new(self.global.output);
        let mut follower = Follower { session: self, what, task_id, view: &view, lines_seen: 0 };
        let limit = async {
            match self.global.timeout {
                Some(limit) => tokio::time::sleep(limit).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(limit);
        loop {
            let outcome = tokio::select! {
                ended = follower.reach_end() => ended.and_then(|task| judge(what, task)),
                () = &mut limit => Err(goes_on(Exit::Timeout, what, task_id, "the time limit passed")),
                () = interrupt() => {
                    if on_interrupt == OnInterrupt::OfferCancel && view.suspend(ask_to_cancel).await {
                        view.say("cancelling …");
                        cancel(self, task_id).await?;
                        continue;
                    }
                    Err(goes_on(Exit::Interrupted, what, task_id, "interrupted"))
                }
            };
            view.clear();
            return outcome;
        }
    }
}

/// Asks a task to stop.
pub(crate) async fn cancel(session: &Session, task_id: &str) -> Result<v1::Task, Failure> {
    let request = v1::GetTaskRequest { task_id: task_id.to_owned() };
    let mut client = TasksClient::new(session.channel.clone());
    session.call(&format!("cancel task {task_id}"), client.cancel(request)).await
}

/// `vm web started (1.2 s)`.
pub(crate) fn ended_line(what: &str, task: &v1::Task) -> String {
    match task.ended_unix_ms {
        Some(ended_ms) => {
            let took_ms = ended_ms.saturating_sub(task.started_unix_ms);
            format!("done: {what} ({})", output::duration_ms(took_ms))
        }
        None => format!("done: {what}"),
    }
}

fn judge(what: &str, task: v1::Task) -> Result<v1::Task, Failure> {
    let log = format!("its log: `clusterctl task log {}`", task.task_id);
    match task.state.as_str() {
        "done" => Ok(task),
        "cancelled" => {
            let why = match task.error.as_str() {
                "" => "the task was cancelled".to_owned(),
                reason => format!("the task was cancelled: {reason}"),
            };
            Err(Failure::new(Exit::Failed, format!("cannot {what}")).why(why).remedy(log))
        }
        _ => {
            let why = if task.error.is_empty() { "the task failed".to_owned() } else { task.error };
            Err(Failure::new(Exit::Failed, format!("cannot {what}")).why(why).remedy(log))
        }
    }
}

fn goes_on(exit: Exit, what: &str, task_id: &str, why: &str) -> Failure {
    Failure::new(exit, format!("stopped waiting for: {what}"))
        .why(format!("{why}; task {task_id} goes on"))
        .remedy(format!(
            "follow it with `clusterctl task wait {task_id}`, end it with `clusterctl task cancel {task_id}`"
        ))
}

/// Completes on Ctrl-C, never if that cannot be heard.
pub(crate) async fn interrupt() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Asks on the terminal. No answer, another Ctrl-C or no terminal means no.
async fn ask_to_cancel() -> bool {
    if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
        return false;
    }
    eprint!("\nCancel the task? It goes on otherwise. [y/N] ");
    let answer = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).map(|_| line).unwrap_or_default()
    });
    tokio::select! {
        answer = answer => answer.is_ok_and(|line| line.trim().eq_ignore_ascii_case("y")),
        () = interrupt() => false,
    }
}

struct Follower<'a> {
    session: &'a Session,
    what: &'a str,
    task_id: &'a str,
    view: &'a View,
    /// The log is sent from its start each time; what was shown is not shown again.
    lines_seen: usize,
}

impl Follower<'_> {
    async fn reach_end(&mut self) -> Result<v1::Task, Failure> {
        let mut lost_since = None;
        loop {
            let lost = match self.follow(&mut lost_since).await {
                Ok(Some(task)) => return Ok(task),
                Ok(None) => Status::unavailable("the node ended the stream"),
                Err(status) if !is_lost(&status) => {
                    return Err(Failure::status(&format!("follow task {}", self.task_id), &status));
                }
                Err(status) => status,
            };
            let since = *lost_since.get_or_insert_with(Instant::now);
            if since.elapsed() > RECONNECT_LIMIT {
                let mut failure = Failure::status(&format!("see the end of: {}", self.what), &lost);
                failure.exit = Exit::Unreachable;
                return Err(failure.remedy(format!(
                    "the task may go on; look again with `clusterctl task wait {}`",
                    self.task_id
                )));
            }
            self.view.say("connection lost, trying again …");
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    }

    /// One stream: the task at its end, or `None` if the stream ended before it did.
    async fn follow(
        &mut self,
        lost_since: &mut Option<Instant>,
    ) -> Result<Option<v1::Task>, Status> {
        let request = v1::GetTaskRequest { task_id: self.task_id.to_owned() };
        let mut client = TasksClient::new(self.session.channel.clone());
        let mut updates = client.follow(request).await?.into_inner();
        let mut line = 0;
        while let Some(update) = updates.message().await? {
            *lost_since = None;
            match update.update {
                Some(Update::Log(text)) => {
                    line += 1;
                    if line > self.lines_seen {
                        self.lines_seen = line;
                        self.view.say(text.trim_end());
                    }
                }
                Some(Update::Progress(progress)) => self.view.progress(&progress),
                Some(Update::Ended(task)) => return Ok(Some(task)),
                None => {}
            }
        }
        Ok(None)
    }
}

/// Whether a stream broke for reasons that have nothing to do with the task.
fn is_lost(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal)
}

/// Where progress is shown: a spinner or bar on a terminal, plain lines otherwise.
pub(crate) struct View {
    bar: Option<ProgressBar>,
    shown: std::cell::RefCell<String>,
}

impl View {
    pub(crate) fn new(format: Format) -> Self {
        let bar = (std::io::stderr().is_terminal() && format == Format::Table).then(|| {
            let bar = ProgressBar::new_spinner();
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { bar, shown: std::cell::RefCell::default() }
    }

    pub(crate) fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => self.line(text),
        }
    }

    /// A line where there is no terminal. Each text once: the log repeats what the progress said,
    /// and numbers that only grow would fill it.
    fn line(&self, text: &str) {
        if *self.shown.borrow() != text {
            eprintln!("{text}");
            self.shown.replace(text.to_owned());
        }
    }

    pub(crate) fn progress(&self, progress: &v1::TaskProgress) {
        let Some(bar) = &self.bar else {
            return self.line(&progress.text);
        };
        if progress.total > 0 {
            let style =
                ProgressStyle::with_template("{spinner} {wide_msg} {bar:20} {percent:>3} %");
            if let Ok(style) = style {
                bar.set_style(style);
            }
            bar.set_length(progress.total);
            bar.set_position(progress.done.min(progress.total));
        }
        bar.set_message(progress.text.clone());
    }

    /// Runs something that uses the terminal itself.
    async fn suspend<T, F: Future<Output = T>>(&self, run: impl FnOnce() -> F) -> T {
        if let Some(bar) = &self.bar {
            bar.disable_steady_tick();
            bar.suspend(|| ());
        }
        let answer = run().await;
        if let Some(bar) = &self.bar {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        answer
    }

    pub(crate) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(state: &str) -> v1::Task {
        let task_id = "3-17".to_owned();
        v1::Task { task_id, state: state.to_owned(), ..v1::Task::default() }
    }

    #[test]
    fn ends_become_exits() {
        assert!(judge("start vm web", task("done")).is_ok());
        let cancelled = judge("start vm web", task("cancelled")).unwrap_err();
        assert!(cancelled.to_string().contains("cancelled"));
        let mut failed = task("failed");
        failed.error = "no such kernel".to_owned();
        let failure = judge("start vm web", failed).unwrap_err();
        assert_eq!(failure.exit, Exit::Failed);
        let text = failure.to_string();
        assert!(text.contains("no such kernel") && text.contains("task log 3-17"), "{text}");
    }

    #[test]
    fn who_stops_waiting_learns_how_to_go_on() {
        let text = goes_on(Exit::Interrupted, "migrate vm web", "3-17", "interrupted").to_string();
        assert!(text.contains("task 3-17 goes on"), "{text}");
        assert!(text.contains("task wait 3-17") && text.contains("task cancel 3-17"), "{text}");
    }
}
