//! The switch's sockets: a task that reads and one that writes for each connected node, and the
//! control socket.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::Command;
use super::fabric::{Fabric, Port};

/// Longest frame, bytes: QEMU's own limit with segmentation offload is 64 KiB and a header.
const FRAME_MAX: usize = 68 << 10;
/// Frames that wait for a port; more are dropped, as a real switch does.
const QUEUE: usize = 2048;

/// How often an emulated node is woken.
const WAKE_EVERY: Duration = Duration::from_millis(250);

type Queued = (u64, Arc<[u8]>);

#[derive(Debug)]
struct Shared {
    started: Instant,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    fabric: Fabric,
    connected: BTreeMap<Port, mpsc::Sender<Queued>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in a locked section can leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn forward(&self, from: Port, frame: &Arc<[u8]>) {
        let now_us = self.now_us();
        let mut state = self.lock();
        let State { fabric, connected } = &mut *state;
        for delivery in fabric.handle_frame(from, frame, connected.keys().copied(), now_us) {
            if let Some(queue) = connected.get(&delivery.to) {
                // A full queue drops the frame.
                let _ = queue.try_send((delivery.at_us, Arc::clone(frame)));
            }
        }
    }
}

/// Serves `ports` as `FOLDER/N.sock` and the control socket as `FOLDER/control.sock`, for ever.
///
/// # Errors
/// If a socket cannot be made.
pub async fn serve(folder: &Path, ports: impl Iterator<Item = Port>) -> io::Result<()> {
    let shared = Arc::new(Shared { started: Instant::now(), state: Mutex::default() });
    for port in ports {
        let listener = bind(&folder.join(format!("{port}.sock")))?;
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                tokio::spawn(serve_port(Arc::clone(&shared), port, stream));
            }
        });
    }
    let control = bind(&folder.join("control.sock"))?;
    loop {
        let (stream, _) = control.accept().await?;
        tokio::spawn(serve_control(Arc::clone(&shared), stream));
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => UnixListener::bind(path),
    }
}

async fn serve_port(shared: Arc<Shared>, port: Port, stream: UnixStream) {
    let (reader, writer) = stream.into_split();
    let (queue, queued) = mpsc::channel(QUEUE);
    // A node that was powered on again takes over from its former self.
    shared.lock().connected.insert(port, queue.clone());
    let writer = tokio::spawn(write_frames(Arc::clone(&shared), queued, writer));
    let waker = tokio::spawn(wake(port, queue.clone()));
    // However it ends, the node is unplugged.
    let _ = read_frames(&shared, port, reader).await;
    writer.abort();
    waker.abort();
    let mut state = shared.lock();
    if state.connected.get(&port).is_some_and(|current| current.same_channel(&queue)) {
        state.connected.remove(&port);
    }
}

/// Sends a node a frame that says nothing (EtherType 88B5, for experiments), whatever is cut. Seen with
/// one node and eight guests under QEMU 7.2: its CPU, whose SVM is emulated, stays halted with
/// interrupts on, as if its timer's interrupt were lost, until the watchdog resets it. The next
/// interrupt wakes it; a node without neighbours gets none from outside but this one.
async fn wake(port: Port, queue: mpsc::Sender<Queued>) {
    let mut ticks = tokio::time::interval(WAKE_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let frame = wake_frame(port);
    while !queue.is_closed() {
        ticks.tick().await;
        // A node that takes nothing needs no waking.
        let _ = queue.try_send((0, Arc::clone(&frame)));
    }
}

/// To the node's own address: its bridge hands it to no guest.
fn wake_frame(port: Port) -> Arc<[u8]> {
    let number = port.to_be_bytes();
    let mut frame = [0; 60];
    frame[..6].copy_from_slice(&[0x52, 0x54, 0, 0x77, 1, number[number.len() - 1]]);
    frame[6..12].copy_from_slice(&[0x02, 0, 0, 0x77, 0, 0]);
    frame[12..14].copy_from_slice(&0x88b5_u16.to_be_bytes());
    Arc::from(frame)
}

async fn read_frames(shared: &Shared, port: Port, reader: OwnedReadHalf) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(256 << 10, reader);
    loop {
        let length = usize::try_from(reader.read_u32().await?).unwrap_or(usize::MAX);
        if length > FRAME_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "frame too long"));
        }
        let mut frame = vec![0; length];
        reader.read_exact(&mut frame).await?;
        shared.forward(port, &frame.into());
    }
}

/// Writes each frame when it is due: one that is held back does not hold up those behind it.
async fn write_frames(
    shared: Arc<Shared>,
    mut queued: mpsc::Receiver<Queued>,
    mut to: OwnedWriteHalf,
) {
    let mut waiting: BTreeMap<(u64, u64), Arc<[u8]>> = BTreeMap::new();
    for number in 0_u64.. {
        let due = waiting.first_key_value().map(|((at_us, _), _)| *at_us);
        let due = due.map(|at_us| (shared.started + Duration::from_micros(at_us)).into());
        tokio::select! {
            // What is due goes out first; a full house takes no more until then.
            biased;
            () = until(due) => {
                let Some((_, frame)) = waiting.pop_first() else { continue };
                if write_frame(&mut to, &frame).await.is_err() {
                    return;
                }
            }
            arrived = queued.recv(), if waiting.len() < QUEUE => {
                let Some((at_us, frame)) = arrived else { return };
                waiting.insert((at_us, number), frame);
            }
        }
    }
}

/// Until a moment; for ever if there is none.
async fn until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) if at <= tokio::time::Instant::now() => {}
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn write_frame(to: &mut OwnedWriteHalf, frame: &[u8]) -> io::Result<()> {
    let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(frame.len() + 4);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(frame);
    to.write_all(&bytes).await
}

async fn serve_control(shared: Arc<Shared>, stream: UnixStream) {
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let answer = match serde_json::from_str(&line) {
            Ok(Command::Set(rules)) => {
                shared.lock().fabric.rules = rules;
                "ok".to_owned()
            }
            Ok(Command::Get) => serde_json::to_string(&shared.lock().fabric.rules)
                .unwrap_or_else(|error| format!("error: {error}")),
            Err(error) => format!("error: {error}"),
        };
        if writer.write_all(format!("{answer}\n").as_bytes()).await.is_err() {
            return;
        }
    }
}
