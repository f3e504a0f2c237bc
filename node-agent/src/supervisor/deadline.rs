//! Tells VM processes their new deadlines: one datagram each, on a socket that a thread of the VM
//! process waits at. Needs no runtime on either side, so a busy executor cannot end a VM.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use proto::Name;

/// The sockets of the HA VMs' processes, from the moment that they are started: a process that
/// takes long to set its VM up finds its renewals waiting.
#[derive(Debug, Default)]
pub(super) struct Renewer {
    sockets: Mutex<BTreeMap<Name, Line>>,
}

#[derive(Debug)]
struct Line {
    path: PathBuf,
    /// Connected once the process has made its end.
    socket: Option<UnixDatagram>,
}

impl Renewer {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn add(&self, name: &Name, path: PathBuf) {
        self.sockets().insert(name.clone(), Line { path, socket: None });
    }

    pub(super) fn remove(&self, name: &Name) {
        self.sockets().remove(name);
    }

    /// A process that cannot take it (its queue is full, or it is gone) is left to its old
    /// deadline, which is the safe side; the next renewal tries again.
    pub(super) fn renew(&self, deadline_ns: u64) {
        for (name, line) in self.sockets().iter_mut() {
            if let Err(error) = line.send(deadline_ns) {
                tracing::debug!(vm = %name, %error, "deadline not renewed");
            }
        }
    }

    fn sockets(&self) -> MutexGuard<'_, BTreeMap<Name, Line>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    fn send(&mut self, deadline_ns: u64) -> io::Result<()> {
        let socket = match &self.socket {
            Some(socket) => socket,
            None => self.socket.insert(connect(&self.path)?),
        };
        socket.send(&deadline_ns.to_le_bytes()).map(drop)
    }
}

fn connect(path: &Path) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect(path)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_does_not_block() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deadline.sock");
        let renewer = Renewer::new();
        let name: Name = "web".parse().unwrap();
        renewer.add(&name, path.clone());
        renewer.renew(u64::MAX); // nobody is there yet
        let process = UnixDatagram::bind(&path).unwrap();
        (0..10_000).for_each(|deadline| renewer.renew(deadline));
        let mut first = [0; 8];
        assert_eq!(process.recv(&mut first).unwrap(), 8);
        assert_eq!(u64::from_le_bytes(first), 0);
        drop(process);
        renewer.renew(1);
        renewer.remove(&name);
    }
}
