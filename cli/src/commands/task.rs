//! `clusterctl task`: changes that take time.

use clap::Subcommand;
use proto::v1;
use proto::v1::task_update::Update;
use proto::v1::tasks_client::TasksClient;
use tonic::transport::Channel;

use crate::connect::Session;
use crate::failure::Failure;
use crate::output::{self, or_dash};
use crate::wait::{OnInterrupt, cancel, ended_line};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// What runs and what ran, newest first
    #[command(visible_alias = "ls", after_help = "Examples:\n  clusterctl task list --limit 10")]
    List {
        /// At most so many
        #[arg(long, default_value_t = 50)]
        limit: u32,
    },
    /// One task
    #[command(after_help = "Examples:\n  clusterctl task show 1-42 -o json")]
    Show {
        /// The task's id
        id: String,
    },
    /// What a task has logged so far; for one that runs, until its end
    #[command(after_help = "Examples:\n  clusterctl task log 1-42")]
    Log {
        /// The task's id
        id: String,
    },
    /// Wait until a task ends; fails if it failed
    #[command(after_help = "Examples:\n  clusterctl task wait 1-42 --timeout 5m")]
    Wait {
        /// The task's id
        id: String,
    },
    /// Ask a task to stop
    #[command(after_help = "Examples:\n  clusterctl task cancel 1-42")]
    Cancel {
        /// The task's id
        id: String,
    },
}

pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    let mut client = TasksClient::new(session.channel.clone());
    let format = session.global.output;
    match command {
        Command::List { limit } => {
            let tasks = client.list(v1::ListTasksRequest { limit });
            let tasks = session.call("list tasks", tasks).await?;
            output::print(format, &tasks, |tasks| list_table(&tasks.tasks))
        }
        Command::Show { id } => {
            let what = format!("show task {id}");
            let task = client.get(v1::GetTaskRequest { task_id: id });
            let task = session.call(&what, task).await?;
            output::print(format, &task, task_table)
        }
        Command::Log { id } => {
            let what = format!("read the log of task {id}");
            session.within(&what, log(session, &mut client, &what, id)).await
        }
        Command::Wait { id } => {
            let what = format!("wait for task {id}");
            let task = session.wait(&what, &id, OnInterrupt::Leave).await?;
            output::print(format, &task, |task| {
                ended_line(&format!("{} {}", task.kind, task.subject), task)
            })
        }
        Command::Cancel { id } => {
            let task = cancel(session, &id).await?;
            output::print(format, &task, |task| format!("task {} is {}", task.task_id, task.state))
        }
    }
}

async fn log(
    session: &Session,
    client: &mut TasksClient<Channel>,
    what: &str,
    task_id: String,
) -> Result<(), Failure> {
    let follow = client.follow(v1::GetTaskRequest { task_id });
    let mut updates = session.call(what, follow).await?;
    loop {
        match updates.message().await {
            Ok(Some(v1::TaskUpdate { update: Some(Update::Log(text)) })) => {
                output::line(text.trim_end())?;
            }
            Ok(Some(v1::TaskUpdate { update: Some(Update::Ended(task)) })) => {
                eprintln!("{}", if task.error.is_empty() { task.state } else { task.error });
                return Ok(());
            }
            Ok(Some(_)) => {}
            Ok(None) => return Ok(()),
            Err(status) => return Err(Failure::status(what, &status)),
        }
    }
}

fn took(task: &v1::Task) -> String {
    let ended = task.ended_unix_ms.map(|ended_ms| ended_ms.saturating_sub(task.started_unix_ms));
    ended.map_or_else(|| "-".to_owned(), output::duration_ms)
}

fn list_table(tasks: &[v1::Task]) -> String {
    let rows = tasks.iter().map(|task| {
        let progress = task.progress.as_ref().map(|progress| progress.text.clone());
        // What it was doing says nothing once it has ended.
        let note = match task.ended_unix_ms {
            Some(_) => task.error.clone(),
            None => progress.unwrap_or_default(),
        };
        [
            task.task_id.clone(),
            task.kind.clone(),
            or_dash(&task.subject),
            task.state.clone(),
            or_dash(&task.node),
            output::ago(task.started_unix_ms),
            took(task),
            or_dash(note.lines().next().unwrap_or_default()),
        ]
    });
    output::columns(["TASK", "KIND", "SUBJECT", "STATE", "NODE", "STARTED", "TOOK", "NOTE"], rows)
}

fn task_table(task: &v1::Task) -> String {
    output::fields([
        ("task", task.task_id.clone()),
        ("kind", task.kind.clone()),
        ("subject", task.subject.clone()),
        ("state", task.state.clone()),
        ("node", task.node.clone()),
        ("user", task.user.clone()),
        ("started", output::ago(task.started_unix_ms)),
        ("took", took(task)),
        ("progress", task.progress.as_ref().map(|p| p.text.clone()).unwrap_or_default()),
        ("error", task.error.clone()),
        ("result", task.result.clone()),
    ])
}
