//! A TLS connection over a TCP socket that returns after each tick without progress, with nothing
//! lost: the caller calls again. Records are written many at a time (vectored).

use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;

use rustls::Connection;

use crate::migrate::StreamError;

/// Plaintext that may wait for the socket; 64 records of 16 KiB go out in one vectored write.
const BUFFER_BYTES: usize = 1 << 20;
/// rustls reads 4 KiB at a time; this makes them memory copies instead of system calls.
const READ_BYTES: usize = 256 << 10;

/// How far a handshake is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// For the peer's next message.
    Waiting,
    /// The peer is the expected one.
    Done,
}

pub(super) struct TlsStream {
    connection: Connection,
    socket: BufReader<TcpStream>,
}

impl TlsStream {
    /// The socket's time limits must be one tick.
    pub(super) fn new(mut connection: Connection, socket: TcpStream) -> Self {
        connection.set_buffer_limit(Some(BUFFER_BYTES));
        Self { connection, socket: BufReader::with_capacity(READ_BYTES, socket) }
    }

    /// Goes on with the handshake as far as it goes without waiting for longer than the socket does.
    ///
    /// # Errors
    /// [`StreamError`]: the handshake has failed.
    pub(super) fn handshake(&mut self) -> Result<Step, StreamError> {
        let doing = "agreeing on TLS";
        while self.connection.is_handshaking() {
            let Err(error) = self.handshake_step() else { continue };
            return match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => {
                    Ok(Step::Waiting)
                }
                ErrorKind::InvalidData => {
                    Err(StreamError::NotThePeer { reason: error.to_string() })
                }
                ErrorKind::UnexpectedEof => Err(StreamError::Closed { doing }),
                _ => Err(StreamError::Io { doing, source: error }),
            };
        }
        Ok(Step::Done)
    }

    /// The connection below.
    pub(super) fn socket(&self) -> &TcpStream {
        self.socket.get_ref()
    }

    fn handshake_step(&mut self) -> io::Result<()> {
        self.flush()?;
        if self.connection.is_handshaking() && !self.read_records()? {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.flush()
    }

    /// Reads from the socket once and decrypts what is there. False at the end of the connection.
    fn read_records(&mut self) -> io::Result<bool> {
        let count = self.connection.read_tls(&mut self.socket)?;
        if let Err(error) = self.connection.process_new_packets() {
            // The alert says to the peer why; if it can't be sent, the error here is enough.
            let _ = self.write_records();
            return Err(io::Error::new(ErrorKind::InvalidData, error));
        }
        Ok(count > 0)
    }

    fn write_records(&mut self) -> io::Result<()> {
        while self.connection.wants_write() {
            if self.connection.write_tls(self.socket.get_mut())? == 0 {
                return Err(ErrorKind::WriteZero.into());
            }
        }
        Ok(())
    }
}

impl Read for TlsStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                done => return done,
            }
            if !self.read_records()? {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

impl Write for TlsStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let count = self.connection.writer().write(bytes)?;
            if count > 0 || bytes.is_empty() {
                return Ok(count);
            }
            self.write_records()?; // the buffer is full
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.write_records()
    }
}
