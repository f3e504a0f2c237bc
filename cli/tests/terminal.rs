//! What a person at a terminal sees: a console in raw mode, and the question at Ctrl-C.

mod mock;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, Stdio};
use std::sync::atomic::Ordering;

use mock::{Mock, command};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{OpenptyResult, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};

/// clusterctl on a terminal of its own.
struct OnTerminal {
    child: Child,
    master: File,
    slave: File,
    seen: String,
}

impl OnTerminal {
    fn run(mock: &Mock, arguments: &[&str]) -> Self {
        let OpenptyResult { master, slave } = openpty(None, None).unwrap();
        let slave = File::from(slave);
        let end = || Stdio::from(slave.try_clone().unwrap());
        let mut command = command(mock.folder.path());
        command.env("HOLDFAST_SOCKET", mock.socket()).args(arguments);
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        Self { child, master: File::from(master), slave, seen: String::new() }
    }

    /// Reads the screen until it shows `text`; fails if nothing more comes for 10 s.
    fn see(&mut self, text: &str) {
        let mut buffer = [0; 256];
        while !self.seen.contains(text) {
            let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut fds, PollTimeout::from(10_000_u16)).unwrap();
            assert_eq!(ready, 1, "waited for `{text}`, saw: {}", self.seen);
            let count = self.master.read(&mut buffer).unwrap();
            self.seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    }

    fn type_keys(&mut self, keys: &[u8]) {
        self.master.write_all(keys).unwrap();
    }

    fn is_raw(&self) -> bool {
        let flags = tcgetattr(&self.slave).unwrap().local_flags;
        !flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
    }
}

#[test]
fn a_console_is_raw_and_ctrl_bracket_puts_the_terminal_back() {
    let mock = Mock::start();
    let mut terminal = OnTerminal::run(&mock, &["vm", "console", "web"]);
    terminal.see("Ctrl-] leaves");
    assert!(terminal.is_raw());
    // Ctrl-C is the guest's.
    terminal.type_keys(b"\x03hello\r");
    terminal.see("HELLO");
    assert_eq!(terminal.child.try_wait().unwrap(), None);
    terminal.type_keys(b"\x1d");
    assert_eq!(terminal.child.wait().unwrap().code(), Some(0));
    assert!(!terminal.is_raw());
}

#[test]
fn a_guest_that_hangs_up_puts_the_terminal_back_too() {
    let mock = Mock::start();
    let mut terminal = OnTerminal::run(&mock, &["vm", "console", "web"]);
    terminal.see("Ctrl-] leaves");
    terminal.type_keys(b"q");
    assert_eq!(terminal.child.wait().unwrap().code(), Some(0));
    assert!(!terminal.is_raw());
}

#[test]
fn ctrl_c_in_a_migration_offers_to_cancel_it() {
    for (answer, exit, cancels, last) in
        [("y\n", 1, 1, "the task was cancelled"), ("n\n", 130, 0, "task 1-4 goes on")]
    {
        let mock = Mock::start();
        let mut terminal = OnTerminal::run(&mock, &["vm", "migrate", "web", "slow"]);
        terminal.see("first");
        let pid = nix::unistd::Pid::from_raw(terminal.child.id().try_into().unwrap());
        kill(pid, Signal::SIGINT).unwrap();
        terminal.see("[y/N]");
        terminal.type_keys(answer.as_bytes());
        terminal.see(last);
        assert_eq!(terminal.child.wait().unwrap().code(), Some(exit), "{}", terminal.seen);
        assert_eq!(mock.agent.0.cancels.load(Ordering::SeqCst), cancels);
    }
}
