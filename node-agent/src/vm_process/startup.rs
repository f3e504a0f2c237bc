//! The start's conversation with the agent, on descriptor 0: "go" in, one line of JSON out.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::launch::Startup;

/// The connection to the agent that started this process; closed when the start is over.
#[derive(Debug)]
pub(super) struct StartupChannel(UnixStream);

impl StartupChannel {
    /// Takes descriptor 0 and puts /dev/null there.
    pub(super) fn take() -> io::Result<Self> {
        let stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        nix::unistd::dup2_stdin(File::open("/dev/null")?)?;
        // Anything but a socket (a terminal, say) fails here: this command is not for people.
        stream.peer_addr().map_err(|error| {
            io::Error::new(error.kind(), "`node-agent vm` is run by the node agent only")
        })?;
        Ok(Self(stream))
    }

    /// Waits until the agent has written down that this process exists.
    pub(super) fn wait_for_go(&self) -> io::Result<()> {
        let mut line = String::new();
        BufReader::new(&self.0).read_line(&mut line)?;
        if line == "go\n" {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the agent went away before the start"))
    }

    pub(super) fn ready(self, listen: Option<SocketAddr>, fingerprint: Option<String>) {
        self.say(&Startup::Ready { listen, fingerprint });
    }

    pub(super) fn failed(self, reason: String) {
        self.say(&Startup::Failed { reason });
    }

    /// An agent that is gone hears nothing; the next one finds the process by its state file.
    fn say(mut self, word: &Startup) {
        if let Ok(mut line) = serde_json::to_string(word) {
            line.push('\n');
            let _ = self.0.write_all(line.as_bytes());
        }
    }
}
