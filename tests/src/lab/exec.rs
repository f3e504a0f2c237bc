//! Running programs in a node: a small protocol of our own over the node's private NIC, which no
//! partition of the lab's switch touches. The server is `lab-node serve`.
//!
//! Invariants: a connection is one program; it ends with exactly one [`Frame::Exit`] or
//! [`Frame::Refused`]. If the connection ends first, the server kills the program's process group.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The port inside a node.
pub const PORT: u16 = 7700;
/// A node that has not started a program by then is down, hung or starting: its own network on the
/// host takes connections all the same.
const START_LIMIT: Duration = Duration::from_secs(10);
/// Longest payload of a frame, bytes; more is a broken peer.
const FRAME_MAX: u32 = 1 << 20;

/// The first thing a client sends, as the payload of a frame of kind `request`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// The lab's secret.
    pub token: String,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Run it on a terminal of this size (rows, columns).
    pub terminal: Option<(u16, u16)>,
}

/// What travels in both directions: kind (1 byte), length (4 bytes, big endian), payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Client: what to run (JSON of [`Request`]).
    Request(Vec<u8>),
    /// Client: bytes for the program's standard input; none at all: end of input.
    Stdin(Vec<u8>),
    /// Server: the program's output.
    Stdout(Vec<u8>),
    /// Server: the program's error output.
    Stderr(Vec<u8>),
    /// Server: it ended; 128 + signal when killed.
    Exit(i32),
    /// Server: it was not started, and why.
    Refused(String),
    /// Server: it runs; comes before any output.
    Started,
}

impl Frame {
    /// Writes the frame in one piece.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let exit_code;
        let (kind, payload): (u8, &[u8]) = match self {
            Self::Request(json) => (1, json),
            Self::Stdin(bytes) => (2, bytes),
            Self::Stdout(bytes) => (3, bytes),
            Self::Stderr(bytes) => (4, bytes),
            Self::Exit(code) => {
                exit_code = code.to_be_bytes();
                (5, &exit_code)
            }
            Self::Refused(why) => (6, why.as_bytes()),
            Self::Started => (7, &[]),
        };
        let length = u32::try_from(payload.len()).map_err(|_| invalid("frame too long"))?;
        let mut bytes = Vec::with_capacity(payload.len() + 5);
        bytes.push(kind);
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(payload);
        to.write_all(&bytes)?;
        to.flush()
    }

    /// Reads one frame.
    ///
    /// # Errors
    /// Those of the reader; `InvalidData` if it is no frame.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut head = [0; 5];
        from.read_exact(&mut head)?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
        if length > FRAME_MAX {
            return Err(invalid("frame too long"));
        }
        let mut payload = vec![0; usize::try_from(length).map_err(|_| invalid("frame too long"))?];
        from.read_exact(&mut payload)?;
        match head[0] {
            1 => Ok(Self::Request(payload)),
            2 => Ok(Self::Stdin(payload)),
            3 => Ok(Self::Stdout(payload)),
            4 => Ok(Self::Stderr(payload)),
            5 => {
                let code = payload.try_into().map_err(|_| invalid("exit code of a wrong size"))?;
                Ok(Self::Exit(i32::from_be_bytes(code)))
            }
            6 => Ok(Self::Refused(String::from_utf8_lossy(&payload).into_owned())),
            7 => Ok(Self::Started),
            _ => Err(invalid("unknown frame")),
        }
    }
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// How a program in a node ended, and what it wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit code; 128 + signal when killed.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// The output of a program that succeeded.
    ///
    /// # Errors
    /// With all it wrote, if it did not succeed.
    pub fn ok(self) -> Result<String, ExecError> {
        if self.code == 0 { Ok(self.stdout) } else { Err(ExecError::Failed(self)) }
    }
}

/// Why a program in a node gave no result.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// No connection, or it broke. The node is down, hung or still starting.
    #[error("the node does not answer (is it up? see its console log)")]
    Connection(#[from] io::Error),
    /// The server did not start it.
    #[error("the node did not start the program: {0}")]
    Refused(String),
    /// It took longer than allowed.
    #[error("`{0}` did not end within {1:?}")]
    TimedOut(String, Duration),
    /// It ran and failed.
    #[error("it ended with code {}: {}{}", .0.code, .0.stderr, .0.stdout)]
    Failed(Output),
}

/// Starts a program, within `limit`; the caller reads the frames that follow.
///
/// # Errors
/// If the node does not answer in time, or refuses.
pub fn start(
    address: SocketAddr,
    request: &Request,
    limit: Duration,
) -> Result<TcpStream, ExecError> {
    let mut stream = TcpStream::connect_timeout(&address, limit.min(Duration::from_secs(2)))?;
    stream.set_nodelay(true)?;
    let json = serde_json::to_vec(request).map_err(io::Error::from)?;
    Frame::Request(json).write(&mut stream)?;
    stream.set_read_timeout(Some(limit.min(START_LIMIT)))?;
    match Frame::read(&mut stream)? {
        Frame::Started => {}
        Frame::Refused(why) => return Err(ExecError::Refused(why)),
        _ => return Err(invalid("the first frame is not `started`").into()),
    }
    stream.set_read_timeout(None)?;
    Ok(stream)
}

/// Runs a program to its end, with `stdin` as its input.
///
/// # Errors
/// If the node does not answer, refuses, or the program takes longer than `limit`.
pub fn run(
    address: SocketAddr,
    request: &Request,
    stdin: &[u8],
    limit: Duration,
) -> Result<Output, ExecError> {
    let deadline = Instant::now() + limit;
    let mut stream = start(address, request, limit)?;
    for chunk in stdin.chunks(64 << 10) {
        Frame::Stdin(chunk.to_vec()).write(&mut stream)?;
    }
    Frame::Stdin(Vec::new()).write(&mut stream)?;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let late = || ExecError::TimedOut(request.argv.join(" "), limit);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        stream.set_read_timeout(Some(left))?;
        match Frame::read(&mut stream) {
            Ok(Frame::Stdout(bytes)) => stdout.extend(bytes),
            Ok(Frame::Stderr(bytes)) => stderr.extend(bytes),
            Ok(Frame::Exit(code)) => {
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                return Ok(Output { code, stdout: text(&stdout), stderr: text(&stderr) });
            }
            Ok(Frame::Refused(why)) => return Err(ExecError::Refused(why)),
            Ok(Frame::Request(_) | Frame::Stdin(_) | Frame::Started) => {
                return Err(invalid("a frame that has no place here").into());
            }
            Err(error)
                if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) =>
            {
                return Err(late());
            }
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_were() {
        let frames = [
            Frame::Request(b"{}".to_vec()),
            Frame::Stdin(Vec::new()),
            Frame::Stdout(vec![0; 70_000]),
            Frame::Stderr(b"x".to_vec()),
            Frame::Exit(-3),
            Frame::Refused("no".into()),
            Frame::Started,
        ];
        let mut wire = Vec::new();
        for frame in &frames {
            frame.write(&mut wire).unwrap();
        }
        let mut rest = wire.as_slice();
        for frame in &frames {
            assert_eq!(&Frame::read(&mut rest).unwrap(), frame);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for wire in [&[9, 0, 0, 0, 0][..], &[3, 0xff, 0, 0, 0], &[5, 0, 0, 0, 1, 7]] {
            let error = Frame::read(&mut &*wire).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{wire:?}");
        }
    }
}
