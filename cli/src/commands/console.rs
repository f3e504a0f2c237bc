//! A VM's serial console: attached to this terminal, or as a log.

use std::io::IsTerminal;

use proto::v1;
use proto::v1::vms_client::VmsClient;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::connect::Session;
use crate::failure::{Exit, Failure};
use crate::output;
use crate::terminal::{RawMode, until_escape};

/// Attaches until Ctrl-] (on a terminal), or until the VM ends the stream.
pub(crate) async fn attach(client: &mut VmsClient<Channel>, vm: String) -> Result<(), Failure> {
    let what = format!("attach to the console of vm {vm}");
    let (keys, typed) = mpsc::channel(16);
    let hello = v1::ConsoleInput { vm, data: Vec::new() };
    // The channel is new and has room: this cannot fail.
    let _ = keys.try_send(hello);
    let answer = client.console(ReceiverStream::new(typed)).await;
    let screen = answer.map_err(|status| Failure::status(&what, &status))?.into_inner();
    let raw = RawMode::enter().map_err(|error| {
        Failure::new(Exit::Failed, "cannot set the terminal to raw mode").why(error.to_string())
    })?;
    if raw.is_some() {
        eprint!("attached; Ctrl-] leaves\r\n");
    }
    let mut terminated = terminate_signal()?;
    let outcome = tokio::select! {
        shown = show(&what, screen) => shown,
        () = send_keys(keys, raw.is_some()) => Ok(()),
        _ = terminated.recv() => Ok(()),
    };
    let was_raw = raw.is_some();
    drop(raw);
    if was_raw {
        eprintln!();
    }
    outcome
}

fn terminate_signal() -> Result<tokio::signal::unix::Signal, Failure> {
    tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(|error| {
        Failure::new(Exit::Failed, "cannot listen for signals").why(error.to_string())
    })
}

async fn show(what: &str, mut screen: Streaming<v1::ConsoleOutput>) -> Result<(), Failure> {
    loop {
        match screen.message().await {
            Ok(Some(printed)) => output::bytes(&printed.data)?,
            Ok(None) => return Ok(()),
            Err(status) => return Err(Failure::status(what, &status)),
        }
    }
}

/// Sends what is typed; returns on the escape. Input that is no terminal may end: then only the
/// screen goes on.
async fn send_keys(keys: mpsc::Sender<v1::ConsoleInput>, terminal: bool) {
    let mut stdin = tokio::io::stdin();
    let mut buffer = [0; 1024];
    while let Ok(count @ 1..) = stdin.read(&mut buffer).await {
        let typed = &buffer[..count];
        let (data, left) = if terminal { until_escape(typed) } else { (typed, false) };
        let input = v1::ConsoleInput { vm: String::new(), data: data.to_vec() };
        if keys.send(input).await.is_err() || left {
            return;
        }
    }
    keys.closed().await;
}

/// Prints a VM's log, and goes on if asked.
pub(crate) async fn log(
    session: &Session,
    client: &mut VmsClient<Channel>,
    what: &str,
    request: v1::VmLogRequest,
) -> Result<(), Failure> {
    let follow = request.follow;
    let screen = session.call(what, client.log(request)).await?;
    tokio::select! {
        shown = show(what, screen) => shown,
        () = crate::wait::interrupt(), if follow => {
            if std::io::stdout().is_terminal() {
                eprintln!();
            }
            Ok(())
        }
    }
}
