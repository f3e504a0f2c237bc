//! A person at the serial line: what is typed goes in, what the guest prints comes out.

use std::time::Duration;

use futures::StreamExt;
use proto::v1::{ConsoleInput, ConsoleOutput};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};
use vmm_core::legacy::serial::SerialLine;

/// A newcomer sees this much of what was printed before.
const BACKLOG_BYTES: u64 = 4096;
const CHUNK_BYTES: usize = 4096;
/// How soon a reader that went away is noticed.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// How soon a guest that did not read is tried again.
const TYPE_AGAIN: Duration = Duration::from_millis(10);

/// Attaches until the other side hangs up or the VM ends.
pub(super) fn attach(
    serial: SerialLine,
    input: Streaming<ConsoleInput>,
) -> mpsc::Receiver<Result<ConsoleOutput, Status>> {
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(type_in(serial.clone(), input, sender.clone()));
    tokio::task::spawn_blocking(move || print_out(&serial, &sender));
    receiver
}

async fn type_in(
    serial: SerialLine,
    mut input: Streaming<ConsoleInput>,
    sender: mpsc::Sender<Result<ConsoleOutput, Status>>,
) {
    while let Some(Ok(message)) = input.next().await {
        let mut left = message.data.as_slice();
        while !left.is_empty() && !sender.is_closed() {
            let taken = serial.type_input(left);
            left = left.get(taken..).unwrap_or_default();
            if taken == 0 {
                tokio::time::sleep(TYPE_AGAIN).await;
            }
        }
    }
}

fn print_out(serial: &SerialLine, sender: &mpsc::Sender<Result<ConsoleOutput, Status>>) {
    let ring = serial.output();
    let mut offset = ring.end().saturating_sub(BACKLOG_BYTES);
    while !sender.is_closed() {
        let chunk = ring.wait(offset, CHUNK_BYTES, LOOK_AGAIN);
        offset = chunk.next_offset();
        if chunk.bytes.is_empty() {
            if ring.is_closed() {
                return;
            }
            continue;
        }
        if sender.blocking_send(Ok(ConsoleOutput { data: chunk.bytes })).is_err() {
            return;
        }
    }
}
