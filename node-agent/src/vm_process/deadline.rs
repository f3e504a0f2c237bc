//! The thread that ends the process when its deadline passes, and takes renewals from the agent.
//!
//! Invariant: a deadline that has passed is not renewed any more, whatever comes late.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_core::gate::{WriteGate, boottime_ns};

/// `poll` counts on a clock that stands still while the machine sleeps: look at least this often.
const LOOK_AT_LEAST: Duration = Duration::from_millis(250);

/// Takes a later deadline. False if the present one has passed: then it is too late.
pub(super) fn renew(gate: &WriteGate, deadline_ns: u64) -> bool {
    match gate.deadline_ns() {
        None => !gate.is_closed(),
        Some(current) if boottime_ns() >= current => false,
        Some(current) => deadline_ns <= current || gate.renew(deadline_ns),
    }
}

/// Starts the thread. `expired` is called once, and must end the process. Renewals that came while
/// the process was being set up are taken first, however long that took: nothing has run yet.
pub(super) fn watch(
    gate: WriteGate,
    socket: UnixDatagram,
    expired: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    while let Some(deadline_ns) = receive(&socket) {
        if gate.deadline_ns().is_some_and(|current| deadline_ns > current) {
            gate.renew(deadline_ns);
        }
    }
    let thread = std::thread::Builder::new().name("deadline".into());
    thread.spawn(move || {
        wait_for_expiry(&gate, &socket);
        expired();
    })?;
    Ok(())
}

fn wait_for_expiry(gate: &WriteGate, socket: &UnixDatagram) {
    loop {
        let left = match gate.deadline_ns() {
            Some(deadline) => match deadline.checked_sub(boottime_ns()).filter(|left| *left > 0) {
                Some(left) => Duration::from_nanos(left).min(LOOK_AT_LEAST),
                None => return,
            },
            None => LOOK_AT_LEAST,
        };
        // Rounded up, or the last millisecond would be spent spinning.
        let millis = u16::try_from(left.as_millis().saturating_add(1)).unwrap_or(u16::MAX);
        let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        // An error (a signal, say) only means to look again.
        let _ = poll(&mut polled, PollTimeout::from(millis));
        while let Some(deadline_ns) = receive(socket) {
            renew(gate, deadline_ns);
        }
    }
}

/// The next renewal that waits. One of another length is none: it counts as no time at all.
fn receive(socket: &UnixDatagram) -> Option<u64> {
    let mut datagram = [0; 9];
    let length = socket.recv(&mut datagram).ok()?;
    let number = datagram.get(..length).and_then(|bytes| bytes.try_into().ok());
    Some(number.map_or(0, u64::from_le_bytes))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn renewals_hold_it_off_and_late_ones_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deadline.sock");
        let socket = UnixDatagram::bind(&path).unwrap();
        let agent = UnixDatagram::unbound().unwrap();
        agent.connect(&path).unwrap();
        let begin = boottime_ns();
        let gate = WriteGate::new(begin + 100 * MS);
        let (expired, expiry) = mpsc::channel();
        watch(gate.clone(), socket, move || expired.send(boottime_ns()).unwrap()).unwrap();
        agent.send(&(begin + 400 * MS).to_le_bytes()).unwrap();
        agent.send(&(begin + 50 * MS).to_le_bytes()).unwrap(); // an older one comes late
        agent.send(b"garbage that is no number").unwrap();
        let at = expiry.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(at >= begin + 400 * MS, "ended {} ms early", (begin + 400 * MS - at) / MS);
        assert!(!renew(&gate, boottime_ns() + 1_000_000 * MS));
        assert!(gate.check().is_err());
    }
}
