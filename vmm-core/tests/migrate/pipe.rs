//! Connections inside one process, that can be made to fail at a chosen frame, and recorded.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm_core::migrate::{Acceptor, CancelToken, Connector, Stream, StreamError};

/// Where a side's connections fail: at its n-th frame, before or after the frame is sent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fault {
    pub(crate) frame: u32,
    pub(crate) after_sending: bool,
}

/// What the connections of one side share.
#[derive(Default)]
pub(crate) struct Side {
    pub(crate) fault: Option<Fault>,
    state: Mutex<SideState>,
}

#[derive(Default)]
struct SideState {
    frames: u32,
    sockets: Vec<UnixStream>,
    /// Everything sent, connection by connection.
    recorded: Vec<Vec<u8>>,
}

impl Side {
    pub(crate) fn failing_at(frame: u32, after_sending: bool) -> Arc<Self> {
        Arc::new(Self { fault: Some(Fault { frame, after_sending }), state: Mutex::default() })
    }

    /// Whether the fault was reached.
    pub(crate) fn has_failed(&self) -> bool {
        self.fault.is_some_and(|fault| self.state.lock().unwrap().frames > fault.frame)
    }

    pub(crate) fn recorded(&self) -> Vec<Vec<u8>> {
        self.state.lock().unwrap().recorded.clone()
    }

    fn open(self: &Arc<Self>, socket: UnixStream) -> Box<dyn Stream> {
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        socket.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
        let mut state = self.state.lock().unwrap();
        state.sockets.push(socket.try_clone().unwrap());
        state.recorded.push(Vec::new());
        let index = state.recorded.len() - 1;
        Box::new(Pipe { side: Arc::clone(self), index, socket, unsent: Vec::new() })
    }
}

/// One end of a connection. A frame is sent when it is flushed.
struct Pipe {
    side: Arc<Side>,
    index: usize,
    socket: UnixStream,
    unsent: Vec<u8>,
}

impl Read for Pipe {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.read(buffer)
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.unsent.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.unsent.is_empty() {
            return Ok(());
        }
        let (fails, after_sending) = {
            let mut state = self.side.state.lock().unwrap();
            let frame = state.frames;
            state.frames += 1;
            match self.side.fault {
                Some(fault) => (frame >= fault.frame, frame == fault.frame && fault.after_sending),
                None => (false, false),
            }
        };
        if !fails || after_sending {
            self.side.state.lock().unwrap().recorded[self.index].extend_from_slice(&self.unsent);
            let mut sent = 0;
            while sent < self.unsent.len() {
                match self.socket.write(&self.unsent[sent..]) {
                    Ok(count) => sent += count,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
        }
        self.unsent.clear();
        if fails {
            for socket in &self.side.state.lock().unwrap().sockets {
                let _ = socket.shutdown(Shutdown::Both);
            }
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Ok(())
    }
}

pub(crate) struct PipeConnector(Arc<Side>, Sender<UnixStream>);
pub(crate) struct PipeAcceptor(Arc<Side>, Receiver<UnixStream>);

/// Both ends of connections inside this process.
pub(crate) fn pipes(source: Arc<Side>, target: Arc<Side>) -> (PipeConnector, PipeAcceptor) {
    let (sender, receiver) = channel();
    (PipeConnector(source, sender), PipeAcceptor(target, receiver))
}

impl Connector for PipeConnector {
    fn connect(&mut self, _: &CancelToken) -> Result<Box<dyn Stream>, StreamError> {
        let doing = "connecting in a test";
        let (ours, theirs) = UnixStream::pair().unwrap();
        let gone = |_| StreamError::Closed { doing };
        self.1.send(theirs).map_err(gone)?;
        Ok(self.0.open(ours))
    }
}

impl Acceptor for PipeAcceptor {
    fn accept(&mut self, limit: Duration, _: &CancelToken) -> Result<Box<dyn Stream>, StreamError> {
        let doing = "accepting in a test";
        let socket =
            self.1.recv_timeout(limit).map_err(|_| StreamError::Stalled { doing, limit })?;
        Ok(self.0.open(socket))
    }
}

/// A source that was recorded: gives its bytes, swallows the answers.
pub(crate) struct Replay(pub(crate) std::vec::IntoIter<Vec<u8>>);

struct ReplayStream(io::Cursor<Vec<u8>>);

impl Read for ReplayStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for ReplayStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Acceptor for Replay {
    fn accept(&mut self, _: Duration, _: &CancelToken) -> Result<Box<dyn Stream>, StreamError> {
        let doing = "accepting a recording";
        let bytes = self.0.next().ok_or(StreamError::Closed { doing })?;
        Ok(Box::new(ReplayStream(io::Cursor::new(bytes))))
    }
}
